"""What a file from a stranger may do: be read, or be refused in one sentence, within seconds and little memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile
from forcetune.adapters.attach import detach, get_adapter
from forcetune.adapters.file import CONFIG_NAME, TENSORS_NAME, load_adapter
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.config import load_config
from forcetune.errors import ForcetuneError
from terminal import Command

FEW, MANY = 80, 3000


def fuzzed(strategy: st.SearchStrategy[Any]) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """A test over some inputs of a strategy by default, and over thousands among the slow tests."""

    def decorate(check: Callable[[Any], None]) -> Callable[..., None]:
        @pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
        def test(count: int) -> None:
            quiet = settings(
                max_examples=count,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quiet(given(strategy)(check))()

        return test

    return decorate


def refused_or_read(read: Callable[[Path], object]) -> None:
    """Nothing but an error of ours may come out."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            read(Path(folder))
        except ForcetuneError as error:
            assert str(error).strip() and error.exit_code in (1, 2)


def test_every_hostile_file_is_read_or_refused(tmp_path: Path) -> None:
    """Bombs, hangs and nonsense that were thought of, each in a process with 2 GiB and 10 s."""
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))
    done = subprocess.run(
        [sys.executable, hostile.__file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == len(hostile.cases()) > 200
    assert {name: came for name, (came, _) in outcomes.items() if came not in ("read", "refused")} == {}


FRAME_WORDS = st.sampled_from(
    [
        *(
            "3",
            "0",
            "-1",
            "²",
            "1e9",
            "nan",
            "inf",
            "H",
            "O",
            "Zz",
            "X",
            "200",
            "1e400",
            "0 0 0 0 0 0",
            "\n",
            "\n\n",
            " ",
        ),
        *('Lattice="5 0 0 0 5 0 0 0 5"', 'Lattice="1 2"', 'pbc="T F T"', "pbc=T", "energy=-1", "energy=", "energy=T"),
        *("Properties=species:S:1:pos:R:3:forces:R:3", "Properties=pos:R:3", "Properties=:::", "stress=1", "virial=x"),
        *(
            'energy="_JSON [1,[2]]"',
            "REF_energy=1",
            "a=[[1,2],[3]]",
            '"',
            "\\",
            "{",
            "[",
            "=",
            "VEC1 1 0 0",
            "#",
            "\x1b",
            "\0",
        ),
        *("config_type=IsolatedAtom", hostile.WATER, hostile.COMMENT, hostile.frame(), hostile.frame(2)),
    ]
)


@fuzzed(st.lists(FRAME_WORDS | st.text(max_size=8), max_size=25))
def test_frames(words: list[str]) -> None:
    text = " ".join(words) if len(words) % 2 else "".join(words)

    def read(folder: Path) -> None:
        path = folder / "a.xyz"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        hostile.read_and_build(path)

    refused_or_read(read)


@fuzzed(st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=6), st.integers(0, 40)), min_size=1, max_size=6))
def test_frames_with_spoilt_bytes(changes: list[tuple[int, bytes, int]]) -> None:
    def read(folder: Path) -> None:
        path = folder / "a.xyz"
        path.write_bytes(spoilt(2 * hostile.frame().encode(), changes))
        hostile.read_and_build(path)

    refused_or_read(read)


def spoilt(content: bytes, changes: list[tuple[int, bytes, int]]) -> bytes:
    """Some bytes taken out and others put in their place."""
    for place, new, length in changes:
        place %= len(content) + 1
        content = content[:place] + new + content[place + length :]
    return content


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=12,
)
SECTIONS = st.sampled_from(["data", "model", "references", "method", "training", "output", "x"])
KEYS = st.sampled_from(
    [
        *("train", "valid", "test", "energy_key", "model", "head", "mode", "table", "name", "rank", "target", "epochs"),
        *("batch_size", "optimizer", "learning_rate", "schedule", "loss", "second_stage", "seed", "run", "split_seed"),
    ]
)


@fuzzed(st.dictionaries(SECTIONS, st.dictionaries(KEYS, PLAIN, max_size=4) | PLAIN, max_size=4))
def test_configurations(content: dict[str, Any]) -> None:
    def read(folder: Path) -> None:
        path = folder / "a.yaml"
        path.write_bytes(json.dumps(content).encode("utf-8", "surrogatepass"))
        load_config(path)

    refused_or_read(read)


YAML_WORDS = st.sampled_from(
    [
        *(
            "data:",
            "train:",
            "training:",
            "epochs:",
            "seed:",
            " ",
            "  ",
            "\n",
            "- ",
            "? ",
            ": ",
            "&a ",
            "*a",
            "<<: *a",
            "|",
            ">",
        ),
        *(
            "!!int ",
            "!!float ",
            "!!timestamp ",
            "!!set ",
            "!!omap ",
            "!!pairs ",
            "!!binary ",
            "!!python/name:os.system ",
        ),
        *(
            "2024-13-45",
            "1:99",
            "0x_",
            "0b",
            "1e3",
            ".inf",
            ".nan",
            "~",
            "[",
            "]",
            "{",
            "}",
            '"',
            "'",
            "#",
            "%",
            "@",
            "---",
            "...",
        ),
        *("1" * 50, "a.xyz", "null", "\t", "\0", "\ud800", "\x85"),
    ]
)


@fuzzed(st.lists(YAML_WORDS | st.text(max_size=4), max_size=20))
def test_yaml_and_settings(words: list[str]) -> None:
    text = "".join(words)

    def read(folder: Path) -> None:
        path = folder / "a.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        load_config(path)

    refused_or_read(read)
    refused_or_read(lambda _: load_config(settings=[f"data.train={text}"]))
    refused_or_read(lambda _: load_config(settings=[text]))


def _replaced(value: Any, path: list[int], new: Any) -> Any:
    """With the part at a path of places replaced."""
    if not path or not isinstance(value, (dict, list)) or not value:
        return new
    if isinstance(value, dict):
        key = list(value)[path[0] % len(value)]
        return value | {key: _replaced(value[key], path[1:], new)}
    place = path[0] % len(value)
    return [_replaced(part, path[1:], new) if index == place else part for index, part in enumerate(value)]


def _load_spoilt_adapter(name: str, config: bytes | None, tensors: bytes | None) -> None:
    def read(folder: Path) -> None:
        model = hostile.adapter_in(folder, name)
        if config is not None:
            (folder / CONFIG_NAME).write_bytes(config)
        if tensors is not None:
            (folder / TENSORS_NAME).write_bytes(tensors)
        try:
            load_adapter(model, folder)
        finally:
            if get_adapter(model) is not None:
                detach(model)

    refused_or_read(read)
    assert get_adapter(hostile.small_backbone()) is None


METHODS = st.sampled_from(["elora", "mmea", "sparse", "gain", "adapter"])


@fuzzed(st.tuples(METHODS, st.lists(st.integers(0, 20), max_size=6), PLAIN))
def test_adapter_configurations(drawn: tuple[str, list[int], Any]) -> None:
    name, path, new = drawn
    content = json.loads(hostile.adapter_files(name)[CONFIG_NAME])
    _load_spoilt_adapter(name, json.dumps(_replaced(content, path, new)).encode(), None)


@fuzzed(
    st.tuples(
        METHODS,
        st.booleans(),
        st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=8), st.integers(0, 30)), min_size=1, max_size=4),
        st.booleans(),
    )
)
def test_adapter_bytes(drawn: tuple[str, bool, list[tuple[int, bytes, int]], bool]) -> None:
    name, of_config, changes, early = drawn
    files = hostile.adapter_files(name)
    # most changes within the header, where they can do something
    near = [(place % 4000, new, len(new) if early else length) for place, new, length in changes]
    changed = spoilt(files[CONFIG_NAME if of_config else TENSORS_NAME], near if early else changes)
    _load_spoilt_adapter(name, changed if of_config else None, None if of_config else changed)


OPCODES = st.sampled_from(
    [
        *(b"(", b".", b"0", b"1", b"2", b"K\x05", b"N", b"}", b"]", b")", b"t", b"l", b"d", b"u", b"s", b"e", b"a"),
        *(b"R", b"\x81", b"\x85", b"\x86", b"\x87", b"b", b"Q", b"q\x00", b"h\x00", b"\x94", b"\x8f", b"\x90", b"\x91"),
        *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"),
        *(b"ctorch\nSize\n", b"ctorch\ndevice\n", b"c__builtin__\nset\n", b"c__builtin__\ncomplex\n", b"cos\nsystem\n"),
        *(b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\nscalar\n", b"cnumpy\ndtype\n"),
        *(b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000", b"X\x02\x00\x00\x00f8", b"X\x08\x00\x00\x00_modules"),
        *(b"\x8a\x01\xff", b"G?\xf0\x00\x00\x00\x00\x00\x00", b"cmace.modules.models\nScaleShiftMACE\n", b"C\x02ab"),
    ]
)


@fuzzed(st.lists(OPCODES | st.binary(max_size=3), max_size=40))
def test_pickles(program: list[bytes]) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"".join(program) + b".")
        archive.writestr("a/data/0", bytes(16))

    def read(folder: Path) -> None:
        (folder / "a.model").write_bytes(stream.getvalue())
        MaceBackbone.load(folder / "a.model")

    refused_or_read(read)


@fuzzed(
    st.tuples(
        st.booleans(),
        st.booleans(),
        st.lists(st.tuples(st.integers(0, 10**7), st.binary(max_size=8)), min_size=1, max_size=4),
    )
)
def test_model_bytes(drawn: tuple[bool, bool, list[tuple[int, bytes]]]) -> None:
    plain, inside, changes = drawn
    content = hostile.model_bytes(plain)
    if inside and not plain:
        # past the checksums of the archive: the pickle itself
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = next(name for name in members if name.endswith("data.pkl"))
        members[name] = spoilt(members[name], [(place, new, len(new)) for place, new in changes])
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for member, held in members.items():
                archive.writestr(member, held)
        content = stream.getvalue()
    else:
        near = 6000 if inside else len(content)
        content = spoilt(content, [(place % near, new, len(new)) for place, new in changes])

    def read(folder: Path) -> None:
        path = folder / ("a.safetensors" if plain else "a.model")
        path.write_bytes(content)
        MaceBackbone.load(path)

    refused_or_read(read)


def test_the_command_line_says_it_in_a_sentence_and_ends_with_2(tmp_path: Path, command: Command) -> None:
    (tmp_path / "escape.xyz").write_text("\x1b]0;title\x07\n", encoding="utf-8")
    (tmp_path / "bomb.yaml").write_text(hostile.CONFIGS["aliases of tables"], encoding="utf-8")
    torch.save(pickle.dumps(1), tmp_path / "no.model")
    for arguments in (
        ("evaluate", "mini", tmp_path / "escape.xyz"),
        ("fit", "--config", tmp_path / "bomb.yaml"),
        ("evaluate", tmp_path / "no.model", tmp_path / "escape.xyz"),
        ("fit", "~nobody-of-this-name/a.xyz"),
        ("fit", "x" * 5000),
        ("methods", "--model", "\ud800"),
    ):
        code, _, err = command(*arguments)
        assert code == 2 and err.startswith("error: ") and "Traceback" not in err, arguments
        assert "\x1b]" not in err and len(err) < 2000
