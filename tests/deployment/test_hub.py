"""Adapters pushed to a hub and read from it, against a server of our own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ase.build import molecule

import forcetune
from forcetune.adapters.config import read_adapter_config
from forcetune.adapters.hub import CHECKSUMS_NAME, TENSORS_NAME, fetch_adapter, read_reference
from forcetune.errors import ForcetuneNote, InputError
from forcetune.runs.demo import demo_file
from hub_server import TOKEN, HubServer
from terminal import Command

PROGRAM = (
    "import sys, forcetune\n"
    "from ase.build import molecule\n"
    "atoms = molecule('CH3CH2OH')\n"
    "atoms.calc = forcetune.calculator(sys.argv[1])\n"
    "print(repr(atoms.get_potential_energy()), repr(float(abs(atoms.get_forces()).sum())))\n"
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    pytest.importorskip("huggingface_hub")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with HubServer() as server:
        # as if it had been set before the first import
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on `mini`, by a method that merges."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    forcetune.fit(
        demo_file("valid"),
        model="mini",
        method="elora",
        valid=0.2,
        test=demo_file("hot"),
        epochs=1,
        out=folder,
        settings={"output.forgetting": False, "training.learning_rate": 1e-3},
    )
    return folder


def test_a_pushed_adapter_predicts_the_same_in_a_fresh_process(
    hub: HubServer, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = forcetune.push(run_folder, "lab/ethanol")
    assert pushed.commit == hub.repositories["lab/ethanol"].branches["main"]
    atoms = molecule("CH3CH2OH")
    atoms.calc = forcetune.calculator(run_folder)
    expected = f"{atoms.get_potential_energy()!r} {float(abs(atoms.get_forces()).sum())!r}"
    home = os.environ | {"FORCETUNE_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, "hub:lab/ethanol"], capture_output=True, text=True, check=True, env=home
    )
    assert run.stdout.strip() == expected
    # the commit is there now, so that no hub is needed
    monkeypatch.setenv("FORCETUNE_HOME", str(tmp_path / "home"))
    asked = len(hub.requests)
    atoms.calc = forcetune.calculator(pushed.reference)
    assert f"{atoms.get_potential_energy()!r} {float(abs(atoms.get_forces()).sum())!r}" == expected
    assert len(hub.requests) == asked


def test_every_command_that_takes_a_run_takes_a_hub_s(
    hub: HubServer, run_folder: Path, tmp_path: Path, command: Command
) -> None:
    code, out, err = command("push", run_folder, "lab/commands", "--message", "first")
    assert code == 0, err
    reference = out.split("'")[1]
    data = demo_file("hot")
    code, own, _ = command("evaluate", run_folder, data, "--json")
    assert code == 0
    for arguments in ((reference, data), ("mini", data, "--adapter", "hub:lab/commands")):
        code, out, err = command("evaluate", *arguments, "--json")
        assert code == 0, err
        assert json.loads(out) == json.loads(own)
    code, out, err = command("merge", reference, "-o", tmp_path / "tuned.safetensors")
    assert (code == 2 and "tuned.safetensors" in err) or code == 0
    code, out, err = command("inspect", reference, "--json")
    assert code == 0, err
    assert json.loads(out)["method"] == "elora"


def test_ensembles_and_combinations_take_a_hub_s(hub: HubServer, run_folder: Path, tmp_path: Path) -> None:
    pushed = forcetune.push(run_folder, "lab/one")
    atoms = molecule("CH3CH2OH")
    atoms.calc = forcetune.calculator(run_folder)
    alone = atoms.get_potential_energy()
    elements = read_adapter_config(run_folder / "adapter").numbers
    both = forcetune.combine(forcetune.load("mini", elements=elements), {"a": pushed.reference})
    atoms.calc = forcetune.calculator(both.backbone)
    assert atoms.get_potential_energy() == pytest.approx(alone, abs=1e-8)
    other = shutil.copytree(run_folder / "adapter", tmp_path / "other")
    atoms.calc = forcetune.calculator(adapter=[pushed.reference, other])
    assert atoms.get_potential_energy() == pytest.approx(alone, abs=1e-8)


def test_the_card_says_what_the_adapter_is(hub: HubServer, run_folder: Path) -> None:
    forcetune.push(run_folder / "adapter", "lab/card")
    forcetune.push(run_folder, "lab/card")
    table = hub.repositories["lab/card"]
    files = table.commits[table.branches["main"]]
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md", CHECKSUMS_NAME}
    card = files["README.md"].decode()
    results = json.loads((run_folder / "results.json").read_text(encoding="utf-8"))
    pair = results["errors"]["test"]
    for side in ("before", "after"):
        assert f"{pair[side]['forces_mae_mev_per_ang']:.1f}" in card
    assert "license: mit" in card
    assert "library_name: forcetune" in card
    assert results["model"]["sha256"] in card
    assert results["data"]["train"]["sha256"] in card
    assert 'forcetune.calculator("hub:lab/card")' in card
    assert files["adapter_model.safetensors"] == (run_folder / "adapter" / TENSORS_NAME).read_bytes()


def test_a_branch_is_written_and_read(hub: HubServer, run_folder: Path) -> None:
    forcetune.push(run_folder, "lab/branch", private=True)
    hub.repositories["lab/branch"].commit({"README.md": b"nothing"})
    pushed = forcetune.push(run_folder, "lab/branch", branch="v1")
    assert hub.repositories["lab/branch"].private
    assert pushed.commit == hub.repositories["lab/branch"].branches["v1"]
    with pytest.warns(ForcetuneNote, match=pushed.commit):
        assert fetch_adapter("hub:lab/branch@v1").name == pushed.commit
    with pytest.warns(ForcetuneNote), pytest.raises(InputError, match="no adapter_config"):
        fetch_adapter("hub:lab/branch")


@pytest.mark.filterwarnings("ignore::forcetune.errors.ForcetuneNote")
def test_what_is_not_what_was_pushed_is_refused(hub: HubServer, run_folder: Path) -> None:
    pushed = forcetune.push(run_folder, "lab/changed")
    hub.spoilt.add("adapter_config.json")
    with pytest.raises(InputError, match=r"adapter_config\.json has SHA-256 .* SHA256SUMS says"):
        fetch_adapter(pushed.reference)
    hub.spoilt.clear()
    folder = fetch_adapter(pushed.reference)
    (folder / TENSORS_NAME).write_bytes(b"something else")
    with pytest.raises(InputError, match="is not what was downloaded"):
        fetch_adapter(pushed.reference)
    # a hub whose content was exchanged without our list: its own SHA-256 of large files counts
    table = hub.repositories["lab/changed"]
    files = dict(table.commits[pushed.commit])
    del files[CHECKSUMS_NAME]
    commit = table.commit(files)
    hub.spoilt.add(TENSORS_NAME)
    with pytest.raises(InputError, match="the hub says"):
        fetch_adapter(f"hub:lab/changed@{commit}")
    # without any list the first download counts
    hub.spoilt.clear()
    assert fetch_adapter(f"hub:lab/changed@{commit}").name == commit


@pytest.mark.filterwarnings("ignore::forcetune.errors.ForcetuneNote")
def test_errors_say_what_to_do(
    hub: HubServer, run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pushed = forcetune.push(run_folder, "lab/errors")
    with pytest.raises(InputError, match="no such repository, or it is private"):
        fetch_adapter("hub:lab/nothing")
    with pytest.raises(InputError, match="no such revision"):
        fetch_adapter("hub:lab/errors@v9")
    with pytest.raises(InputError, match="owner/name"):
        fetch_adapter("hub:../../etc")
    with pytest.raises(InputError, match="on this machine"):
        forcetune.push(pushed.reference, "lab/again")
    with pytest.raises(InputError, match="holds no adapter_config"):
        forcetune.push(tmp_path, "lab/again")
    adapter = shutil.copytree(run_folder / "adapter", tmp_path / "adapter")
    for name in ("adapter_config.json", TENSORS_NAME):
        secret = (adapter / name).rename(tmp_path / f"secret_{name}")
        (adapter / name).symlink_to(secret)
        with pytest.raises(InputError, match=f"{name}: is a link"):
            forcetune.push(adapter, "lab/links")
        secret.replace(adapter / name)
    (adapter / TENSORS_NAME).write_bytes(b"a private key")
    with pytest.raises(InputError, match="is no safetensors file"):
        forcetune.push(adapter, "lab/links")
    assert "lab/links" not in hub.repositories
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(InputError, match="HF_TOKEN"):
        forcetune.push(run_folder, "lab/errors")
    fetch_adapter(pushed.reference)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=f"cannot be reached .*in the cache is {pushed.reference}"):
        fetch_adapter("hub:lab/errors@main")
    assert fetch_adapter(pushed.reference).name == pushed.commit


def test_names_are_read() -> None:
    assert read_reference("hub:lab/name").revision is None
    assert read_reference("hub:lab/name@v1.0").revision == "v1.0"
    for text in (
        "hub:name",
        "hub:lab/na me",
        "hub:lab/name@",
        "hub:lab/../x",
        "hub:lab/name@../x",
        "hub:/lab/name",
        "hub:a--b/c",
    ):
        with pytest.raises(InputError, match="hub:owner/name"):
            read_reference(text)


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"forcetune\[hub\]"):
        fetch_adapter("hub:lab/elsewhere")
