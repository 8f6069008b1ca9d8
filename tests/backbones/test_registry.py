"""Names of published models, and how a name or a path becomes a checked file."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

import pytest

from forcetune.backbones import registry
from forcetune.backbones.published import LICENCE_NOTES, PublishedModel
from forcetune.backbones.registry import (
    ResolvedModel,
    download_model,
    find,
    list_models,
    model_folder,
    resolve,
)
from forcetune.errors import InputError
from loopback import Content, Loopback

WEIGHTS = b"weights of the small model" * 1000
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORCETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FORCETUNE_MODELS_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "models"


def publish(monkeypatch: pytest.MonkeyPatch, server: Loopback, sha256: str | None) -> PublishedModel:
    """Offer a model on the test server under the name ``mace-test-small``."""
    model = PublishedModel(
        name="mace-test-small",
        library="mace",
        url="https://registry.invalid/releases/test_small.model",
        licence="ASL",
        sha256=sha256,
        description="for tests",
        elements="H, O",
        size="small",
        aliases=("test-small",),
    )
    monkeypatch.setattr(registry, "PUBLISHED_MODELS", (*list_models(), model))
    monkeypatch.setenv("FORCETUNE_MODELS_URL", f"{server.url}/mirror/")
    server.contents["/mirror/test_small.model"] = Content(WEIGHTS)
    return model


# ---- the table ------------------------------------------------------------------------------------------------


def test_the_table_is_well_formed() -> None:
    for model in (model for model in list_models() if not model.packaged):
        assert model.url.startswith("https://")
        assert model.file.endswith({"mace": ".model", "sevennet": ".pth", "nequip": ".nequip.zip"}[model.library])
        assert model.licence in LICENCE_NOTES
        assert model.size in ("small", "medium", "large")
        assert model.description
        assert model.elements
        assert model.sha256 is None or re.fullmatch("[0-9a-f]{64}", model.sha256)
        with pytest.raises(dataclasses.FrozenInstanceError):
            model.name = "other"


def test_names_files_and_checksums_are_unique() -> None:
    names = [name for model in list_models() for name in (model.name, *model.aliases)]
    checksums = [model.sha256 for model in list_models() if model.sha256]
    assert len(set(names)) == len(names)
    assert all(name == registry._normal(name) for name in names)
    assert len({model.file for model in list_models()}) == len(list_models())
    assert len(set(checksums)) == len(checksums)


def test_the_models_of_the_papers_are_there() -> None:
    names = {model.name for model in list_models()}
    assert names >= {f"mace-off23-{size}" for size in ("small", "medium", "large")}
    assert names >= {f"mace-mp-0-{size}" for size in ("small", "medium", "large")}
    assert names >= {"mace-off24-medium", "mace-mp-0b3", "mace-mpa-0", "mace-omat-0-medium", "mace-matpes-r2scan-0"}


@pytest.mark.parametrize(("family", "licence"), [("mace-off", "ASL"), ("mace-mp", "MIT"), ("mace-omat", "ASL")])
def test_licences(family: str, licence: str) -> None:
    licences = {model.licence for model in list_models() if model.name.startswith(family)}
    assert licences == {licence}


def test_addresses_are_those_of_mace() -> None:
    """mace knows most of these models too; whoever loads one by its own function must get the same file."""
    foundations = pytest.importorskip("mace.calculators.foundations_models")
    theirs = {**foundations.mace_mp_urls, **{f"off-{size}": url for size, url in foundations.mace_off_urls.items()}}
    ours = {model.url for model in list_models() if model.library == "mace" and not model.packaged}
    multi_head = {url for url in theirs.values() if "/mace_mh_1/" in url}
    assert set(theirs.values()) - multi_head <= ours
    assert {url.rsplit("/", 1)[-1] for url in ours - set(theirs.values())} == {"MACE-OFF24_medium.model"}


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("mace-off23-medium", "mace-off23-medium"),
        ("MACE-OFF23_medium", "mace-off23-medium"),
        (" Mace OFF23 small ", "mace-off23-small"),
        ("mace-off23", "mace-off23-medium"),
        ("medium-mpa-0", "mace-mpa-0"),
        ("mace-mp-0b3-medium", "mace-mp-0b3"),
    ],
)
def test_find_ignores_case_and_knows_aliases(asked: str, name: str) -> None:
    model = find(asked)
    assert model is not None
    assert model.name == name


@pytest.mark.parametrize("asked", ["", "medium", "mace", "mace-off23-medium.model"])
def test_find_does_not_guess(asked: str) -> None:
    assert find(asked) is None


# ---- where models are kept ------------------------------------------------------------------------------------


def test_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FORCETUNE_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert model_folder() == tmp_path / ".cache" / "forcetune" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert model_folder() == tmp_path / ".cache" / "forcetune" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert model_folder() == tmp_path / "cache" / "forcetune" / "models"
    monkeypatch.setenv("FORCETUNE_HOME", "~/forcetune")
    assert model_folder() == tmp_path / "forcetune" / "models"


# ---- paths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["my potential.model", "best.pt", "run.pth", "a.safetensors", "no_ending"])
def test_a_file_is_taken_as_it_is(file: str, home: Path, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_bytes(WEIGHTS)
    assert resolve(str(path)) == ResolvedModel(path, path.stem, "mace", "unknown", SHA256)
    assert resolve(file).path == Path(file)


def test_a_file_wins_over_a_name_and_a_name_over_a_folder(
    home: Path, tmp_path: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, server, SHA256)
    (tmp_path / "mace-test-small").mkdir()
    assert resolve("mace-test-small").path == home / "test_small.model"
    (tmp_path / "mace-test-small").rmdir()
    (tmp_path / "mace-test-small").write_bytes(b"mine")
    assert resolve("mace-test-small").path == Path("mace-test-small")


def test_the_licence_of_a_published_file_is_known_under_any_name(
    home: Path, tmp_path: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, server, SHA256)
    (tmp_path / "copy.model").write_bytes(WEIGHTS)
    resolved = resolve("copy.model")
    assert (resolved.name, resolved.licence) == ("copy", "ASL")


@pytest.mark.parametrize(
    "asked", ["missing.model", "runs/best", "~/nowhere.pt", "/nowhere/a", "mace-off23-small.model"]
)
def test_what_looks_like_a_path_is_told_as_one(asked: str, home: Path) -> None:
    with pytest.raises(InputError, match="no such file") as caught:
        resolve(asked)
    assert asked in str(caught.value)


def test_a_file_name_close_to_a_model_is_told(home: Path) -> None:
    with pytest.raises(InputError, match=r"no such file.*Did you mean mace-off23-small"):
        resolve("MACE-OFF23_small.model")


def test_a_folder_is_no_model(home: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="run: a folder, not a model"):
        resolve("run")


def test_an_address_is_no_model(home: Path) -> None:
    with pytest.raises(InputError, match="download the file and pass its path"):
        resolve("https://registry.invalid/a.model")


def test_an_unknown_name_lists_close_ones(home: Path) -> None:
    with pytest.raises(InputError, match="neither a published model nor a file") as caught:
        resolve("mace-of23-medium")
    assert "Did you mean mace-off23-medium" in str(caught.value)
    assert "`forcetune models`" in str(caught.value)


def test_an_unknown_name_far_from_all_gets_no_guess(home: Path) -> None:
    with pytest.raises(InputError) as caught:
        resolve("zzz")
    assert "Did you mean" not in str(caught.value)


def test_no_name_at_all(home: Path) -> None:
    with pytest.raises(InputError, match="No model was named"):
        resolve("")


# ---- downloads ------------------------------------------------------------------------------------------------


def test_a_published_model_is_downloaded_once_and_checked(
    home: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(monkeypatch, server, SHA256)
    expected = ResolvedModel(home / "test_small.model", "mace-test-small", "mace", "ASL", SHA256)
    assert resolve("Test_Small") == expected
    assert expected.path.read_bytes() == WEIGHTS
    out, error = capsys.readouterr()
    assert out == ""
    assert "mace-test-small: downloaded from" in error
    assert "forbids commercial use" in error
    assert resolve("mace-test-small") == expected
    assert len(server.requests) == 1
    assert capsys.readouterr().err == ""
    assert [path.name for path in home.iterdir()] == ["test_small.model"]


def test_a_pinned_model_that_differs_is_refused(home: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, server, "0" * 64)
    with pytest.raises(InputError, match="not the expected one"):
        resolve("mace-test-small")
    assert list(home.iterdir()) == []


def test_a_pinned_model_that_was_changed_on_disk_is_refused(
    home: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, server, SHA256)
    path = resolve("mace-test-small").path
    path.write_bytes(WEIGHTS[:-1])
    with pytest.raises(InputError, match=r"is not the published one.*Remove it to download mace-test-small again"):
        resolve("mace-test-small")
    path.unlink()
    assert resolve("mace-test-small").sha256 == SHA256


def test_trust_on_first_use(
    home: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(monkeypatch, server, None)
    path = resolve("mace-test-small").path
    record = home / "test_small.model.sha256"
    assert record.read_text() == f"{SHA256}  test_small.model\n"
    assert f"trusted on first use; its SHA-256 {SHA256}" in capsys.readouterr().err
    assert resolve("mace-test-small").sha256 == SHA256
    assert capsys.readouterr().err == ""
    path.write_bytes(b"changed")
    with pytest.raises(InputError, match="is not the one first used") as caught:
        resolve("mace-test-small")
    assert str(record) in str(caught.value)


def test_first_use_also_binds_a_later_download(home: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, server, None)
    resolve("mace-test-small").path.unlink()
    server.contents["/mirror/test_small.model"] = Content(b"another file", etag='"two"')
    with pytest.raises(InputError, match="not the expected one"):
        resolve("mace-test-small")


def test_a_file_put_there_by_hand_is_first_use(home: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, server, None)
    home.mkdir(parents=True)
    (home / "test_small.model").write_bytes(WEIGHTS)
    assert resolve("mace-test-small").sha256 == SHA256
    assert server.requests == []
    assert (home / "test_small.model.sha256").read_text().startswith(SHA256)


@pytest.mark.parametrize("text", ["", "not a checksum", SHA256[:-1]])
def test_a_damaged_record_is_told(text: str, home: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, server, None)
    resolve("mace-test-small")
    (home / "test_small.model.sha256").write_text(text)
    with pytest.raises(InputError, match="should hold the SHA-256"):
        resolve("mace-test-small")


def test_download_model_into_a_folder_with_progress(
    home: Path, tmp_path: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, server, SHA256)
    seen: list[tuple[int, int | None]] = []
    path = download_model(
        "test-small", folder=tmp_path / "other", progress=lambda done, total: seen.append((done, total))
    )
    assert path == tmp_path / "other" / "test_small.model"
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))
    assert not home.exists()


def test_download_model_takes_published_names_only(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.model").write_bytes(WEIGHTS)
    with pytest.raises(InputError):
        download_model("mine.model")


def test_the_mirror_takes_the_place_of_the_publisher(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = find("mace-mp-0b3")
    assert model is not None
    monkeypatch.delenv("FORCETUNE_MODELS_URL", raising=False)
    assert registry._address(model) == model.url
    for base in ("https://mirror.example/mace", "https://mirror.example/mace/"):
        monkeypatch.setenv("FORCETUNE_MODELS_URL", base)
        assert registry._address(model) == "https://mirror.example/mace/mace-mp-0b3-medium.model"


def test_offline_says_how_to_go_on(home: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, server, SHA256)
    server.stop()
    monkeypatch.setattr(server, "stop", lambda: None)
    with pytest.raises(InputError, match="by hand") as caught:
        resolve("mace-test-small")
    assert str(home / "test_small.model") in str(caught.value)
