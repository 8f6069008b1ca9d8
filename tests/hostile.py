"""Files built to break a reader: each by name, with what reads it.

``python tests/hostile.py FOLDER`` reads all of them in one process with little memory and prints one JSON object:
name → what came out, seconds.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from forcetune.adapters.attach import attach, detach
from forcetune.adapters.file import CONFIG_NAME, TENSORS_NAME, load_adapter, save_adapter
from forcetune.adapters.methods import method
from forcetune.backbones.loading import load
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.reading import read_module
from forcetune.backbones.mace.writing import write_plain
from forcetune.config import RunConfig, load_config
from forcetune.deployment.loading import base_of_run
from forcetune.errors import ForcetuneError
from forcetune.evaluation.metrics import build_graphs
from forcetune.frames.frame import LabelKeys
from forcetune.frames.read import read_frames
from forcetune.frames.store.streaming import stream_frames
from forcetune.reports.run_page import write_report
from forcetune.runs.folder import read_checkpoint, read_status
from hostile_programs import ARRAYS, PROGRAMS, write_program, write_system
from hostile_stores import HDF5S, LMDBS
from models import make_mace
from systems import backbone

MEMORY = 2 * 2**30
SECONDS = 10

ELEMENTS = (1, 6, 8)
WATER = "O 0 0 0 0 0 0\nH 0 0 0.97 0 0 0\nH 0 0.94 -0.2 0 0 0\n"
COMMENT = 'Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.0 pbc="F F F"'


def frame(count: object = 3, comment: str = COMMENT, atoms: str = WATER) -> str:
    return f"{count}\n{comment}\n{atoms}"


def lattice(*vectors: float, pbc: str = "T T T") -> str:
    numbers = " ".join(str(value) for value in vectors)
    return COMMENT.replace("F F F", pbc) + f' Lattice="{numbers}"'


FRAMES: dict[str, str] = {
    "a count in superscript": frame("²"),
    "a count of 5000 digits": frame("9" * 5000),
    "a count of 10^18": frame(10**18),
    "a negative count": frame(-3),
    "no atoms": frame(0, atoms=""),
    "a billion columns": frame(comment="Properties=species:S:1:pos:R:3:forces:R:1000000000 energy=-1"),
    "a negative number of columns": frame(comment="Properties=species:S:1:pos:R:3:forces:R:-3 energy=-1"),
    "a hundred thousand properties": frame(comment="Properties=species:S:1:pos:R:3:" + "a:R:1:" * 100_000 + "b:R:1"),
    "element 200": frame(1, "Properties=Z:I:1:pos:R:3:forces:R:3 energy=-1", "200 0 0 0 0 0 0\n"),
    "element 10^12": frame(1, "Properties=Z:I:1:pos:R:3:forces:R:3 energy=-1", f"{10**12} 0 0 0 0 0 0\n"),
    "element -5": frame(1, "Properties=Z:I:1:pos:R:3:forces:R:3 energy=-1", "-5 0 0 0 0 0 0\n"),
    "element X": frame(1, atoms="X 0 0 0 0 0 0\n"),
    "atoms 10^8 Å apart": frame(2, atoms="H 0 0 0 0 0 0\nH 1e8 1e8 1e8 0 0 0\n"),
    "atoms 6000 Å apart": frame(2, atoms="H 0 0 0 0 0 0\nH 6000 6000 6000 0 0 0\n"),
    "atoms 10^300 Å apart": frame(2, atoms="H -1e300 0 0 0 0 0\nH 1e300 1e300 1e300 0 0 0\n"),
    "positions that overflow": frame(2, atoms="H 1e999 0 0 0 0 0\nH 0 0 0 0 0 0\n"),
    "a cell of a thousandth of an Å": frame(comment=lattice(1e-3, 0, 0, 0, 1e-3, 0, 0, 0, 1e-3)),
    "a chain of a millionth of an Å": frame(comment=lattice(1e-6, 0, 0, 0, 0, 0, 0, 0, 0, pbc="T F F")),
    "a cell of 10^9 Å": frame(comment=lattice(1e9, 0, 0, 0, 1e9, 0, 0, 0, 1e9)),
    "a flat cell": frame(comment=lattice(5, 0, 0, 0, 5, 0, 5, 5, 0)),
    "a nearly flat cell": frame(comment=lattice(5, 0, 0, 0, 5, 0, 5, 5, 1e-7)),
    "a cell that is not finite": frame(comment=lattice(float("nan"), 0, 0, 0, 5, 0, 5, 5, 1)),
    "energies as ragged lists": frame(comment=COMMENT + ' REF_energy="_JSON [[1],[2,3]]"'),
    "an energy as a table": frame(comment=COMMENT.replace("-1.0", '"_JSON {}"')),
    "an energy nested 5000 times": frame(comment=COMMENT.replace("-1.0", '"_JSON ' + "[" * 5000 + '"')),
    "an energy of 5000 digits": frame(comment=COMMENT.replace("-1.0", "9" * 5000)),
    "a comment of quotes": frame(comment='"' * 20_000),
    "a comment of backslashes": frame(comment="a=" + "\\" * 20_000),
    "a comment of brackets": frame(comment="a=" + "[" * 20_000),
    "a comment of 100000 words": frame(comment=COMMENT + " a" * 100_000),
    "escape sequences": "\x1b[2J\x1b]0;title\x07\n",
    "NUL bytes": frame(atoms="\0" * 50 + "\n" + WATER),
    "VEC lines": frame(2, "c", "H 0 0 0\nVEC1 1 2\nVEC7\n"),
    "a comment instead of a table": "3\n",
}


def read_and_build(path: Path) -> None:
    build_graphs(small_backbone(), read_frames(path).frames)


def _frames(text: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        path = folder / "a.xyz"
        path.write_text(text, encoding="utf-8")
        read_and_build(path)

    return read


def stream_and_build(path: Path) -> None:
    """As :func:`read_and_build`, with frames that stay on disk."""
    keys = LabelKeys(*["auto"] * len(LabelKeys._fields))
    stream = stream_frames([str(path)], keys, ("energy",), "data", folder=path.parent / "store", workers=0)
    build_graphs(small_backbone(), stream.frames)


def _streamed_frames(text: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        path = folder / "a.xyz"
        path.write_text(text, encoding="utf-8")
        stream_and_build(path)

    return read


def _of_program(write: Callable[[Path, str], Path], name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        read_and_build(write(folder, name))

    return read


def _stored_frames(name: str, write: Callable[[Path], None]) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        write(folder / name)
        read_and_build(folder / name)

    return read


def _compressed_frames(
    folder: Path, name: str, pack: Callable[[bytes], bytes], read: Callable[[Path], None] = read_and_build
) -> None:
    path = folder / name
    block = pack(b" " * 2**24)
    # members of gzip and bzip2 may follow each other: 4 GiB from few bytes
    with path.open("wb") as stream:
        for _ in range(256):
            stream.write(block)
    read(path)


def _bomb(leaf: str, of: Callable[[str], str], levels: int = 40) -> str:
    lines = [f"a0: &a0 {leaf}"]
    lines += [f"a{n}: &a{n} {of(f'a{n - 1}')}" for n in range(1, levels)]
    return "\n".join(lines) + f"\ndata: {{train: *a{levels - 1}}}\n"


CONFIGS: dict[str, str] = {
    "aliases of lists": _bomb("[x, y]", lambda name: f"[*{name}, *{name}]"),
    "aliases of tables": _bomb("{x: 1}", lambda name: f"{{l: *{name}, r: *{name}}}"),
    "a list in itself": "data: &a {train: [*a]}\n",
    "a table in itself": "data: &a {train: *a}\n",
    "a merged bomb": "a: &a {x: 1}\ndata:\n  <<: [*a, *a, *a]\n  train: [x]\n",
    "lists nested 20000 times": "data: " + "[" * 20_000,
    "tables nested 20000 times": "data: " + "{a: " * 20_000,
    "dashes nested 5000 times": "- " * 5000 + "a",
    "a number of 5000 digits": "training: {epochs: " + "9" * 5000 + "}",
    "a day that is none": "data: {train: [x], valid: 2024-13-45}",
    "a time that is none": "training: {epochs: !!timestamp foo}",
    "an integer that is a list": "training: {epochs: !!int [1]}",
    "a tag of python": "training: !!python/object/apply:os.system [id]",
    "keys that are lists": "? [1, 2]\n: 3\n",
    "keys that are numbers": "data: {train: [x]}\n1: 2\n",
    "keys that are none": "data: {train: [x], null: 2}",
    "a binary": "data: {train: !!binary zzzz}",
    "a hexadecimal that is none": "training: {epochs: 0x_}",
    "infinite numbers": "data: {train: [x]}\ntraining: {epochs: .inf, learning_rate: .nan}",
    "a seed beyond 64 bits": f"data: {{train: [x]}}\ntraining: {{seed: {10**30}}}",
    "a rank beyond memory": f"data: {{train: [x]}}\nmethod: {{rank: {10**12}}}",
    "control characters": "data: \x00\x07",
    "several documents": "a: 1\n---\nb: 2\n",
}
SETTINGS = (
    *("training.epochs=" + "9" * 5000, "data.valid=2024-13-45", "data=!!timestamp x", "data.train=" + "[" * 20_000),
    *("a" + ".b" * 20_000 + "=1", "data.train={a: &a [*a]}", "=", "x", ".=1", "..=1", "training.epochs={}", "data=1"),
    *("data.train=~", "data.train=[~nobody/x.xyz]", "training.seed=1" + "0" * 30, "1=1", "data.train=\x00"),
)


def _config(text: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        path = folder / "a.yaml"
        path.write_text(text, encoding="utf-8")
        load_config(path)

    return read


def _folder_config(text: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        base_of_run(folder)

    return read


@cache
def small_backbone() -> MaceBackbone:
    return backbone(elements=ELEMENTS)


@cache
def adapter_files(name: str) -> dict[str, bytes]:
    model = small_backbone()
    attach(model, method(name))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        detach(model)
        return {file: (Path(folder) / file).read_bytes() for file in (CONFIG_NAME, TENSORS_NAME)}


@cache
def model_bytes(plain: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.model"
        write_plain(read_module(make_mace()), path) if plain else torch.save(make_mace(), path)
        return path.read_bytes()


def adapter_in(folder: Path, name: str = "elora") -> MaceBackbone:
    """A good adapter to spoil, and the backbone that it belongs to."""
    folder.mkdir(exist_ok=True)
    for file, content in adapter_files(name).items():
        (folder / file).write_bytes(content)
    return small_backbone()


def _changed_config(change: Callable[[dict[str, Any]], None], name: str = "elora") -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        model = adapter_in(folder, name)
        content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        change(content)
        (folder / CONFIG_NAME).write_text(json.dumps(content), encoding="utf-8")
        load_adapter(model, folder)

    return read


def _text_config(text: bytes) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        model = adapter_in(folder)
        (folder / CONFIG_NAME).write_bytes(text)
        load_adapter(model, folder)

    return read


def _updates(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for updates in content["method"]["table"].values():
            for update in updates:
                if key in update:
                    update[key] = value

    return change


ADAPTER_CONFIGS: dict[str, Callable[[Path], None]] = {
    "a rank of 10^12": _changed_config(_updates("rank", 10**12)),
    "a rank of 10^5": _changed_config(_updates("rank", 10**5)),
    "a rank of -1": _changed_config(_updates("rank", -1)),
    "a rank of text": _changed_config(_updates("rank", "16")),
    "a rank of a list": _changed_config(_updates("rank", [16])),
    "a rank that is not a number": _changed_config(_updates("rank", float("nan"))),
    "a scale that is infinite": _changed_config(_updates("alpha", float("inf"))),
    "a scale of text": _changed_config(_updates("alpha", "x")),
    "a gate of rank 10^12": _changed_config(_updates("rank", 10**12), "mmea-pure"),
    "a gate of rank 1.5": _changed_config(_updates("rank", 1.5), "mmea-pure"),
    "a gain that is none": _changed_config(_updates("gain", "tan"), "mmea-pure"),
    "a shift of text": _changed_config(_updates("shift_init", "x"), "mmea-pure"),
    "a threshold of text": _changed_config(_updates("threshold", "x"), "sparse"),
    "a bottleneck of rank 10^12": _changed_config(_updates("rank", 10**12), "adapter"),
    "an expression that never ends": _changed_config(lambda c: c["method"].update(target="(.*.*)*" * 8 + "x")),
    "many stars": _changed_config(lambda c: c["method"].update(target=".*" * 60 + "x")),
    "a target of numbers": _changed_config(lambda c: c["method"].update(target=[1, 2])),
    "a target that is a number": _changed_config(lambda c: c["method"].update(target=5)),
    "a table of numbers": _changed_config(lambda c: c["method"].update(table={"linear": 5})),
    "a table of lists": _changed_config(lambda c: c["method"].update(table={"linear": [[1]]})),
    "an update that is a list": _changed_config(lambda c: c["method"].update(table={"linear": [{"update": []}]})),
    "two weight updates": _changed_config(
        lambda c: c["method"].update(table={"linear": [{"update": "Dense"}, {"update": "Dense"}]})
    ),
    "no table": _changed_config(lambda c: c.update(method={})),
    "no elements": _changed_config(lambda c: c["base"].update(elements=[])),
    "elements twice": _changed_config(lambda c: c["base"].update(elements=["H", "H"])),
    "energies that are not finite": _changed_config(lambda c: c["reference_energies_ev"].update(H=float("nan"))),
    "energies beyond numbers": _changed_config(lambda c: c["reference_energies_ev"].update(H=10**400)),
    "a cutoff that is not a number": _changed_config(lambda c: c["base"].update(cutoff_ang=float("nan"))),
    "a lone surrogate": _changed_config(lambda c: c["method"].update(name="\ud800")),
    "another surrogate": _changed_config(lambda c: c["base"].update(name="\ud800")),
    "nested without end": _text_config(b"[" * 100_000),
    "nested tables": _text_config(b'{"a":' * 100_000),
    "nested metrics": _text_config(b'{"format_version": 1, "metrics": ' + b'{"a":' * 900 + b"1" + b"}" * 901),
    "a number of 10000 digits": _text_config(b'{"format_version": ' + b"1" * 10_000 + b"}"),
    "no text": _text_config(b"\xff\xfe\x00"),
    "nothing": _text_config(b""),
    "a list": _text_config(b"[]"),
    "17 MB": _text_config(b'{"format_version": 1, "a": "' + b"a" * 17 * 2**20 + b'"}'),
}


def _tensors(change: Callable[[bytes], bytes], name: str = "elora") -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        model = adapter_in(folder, name)
        path = folder / TENSORS_NAME
        path.write_bytes(change(path.read_bytes()))
        load_adapter(model, folder)

    return read


def _with(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        from safetensors.torch import load as load_bytes

        tensors = load_bytes(content)
        change(tensors)
        return save(tensors)

    return changed


def _first(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[bytes], bytes]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = sorted(tensors)[0]
        tensors[name] = make(tensors[name])

    return _with(change)


def _all(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[bytes], bytes]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: make(tensor) for name, tensor in tensors.items()})

    return _with(change)


def _header(table: object) -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text


TENSORS: dict[str, Callable[[Path], None]] = {
    "a header of 2^63 bytes": _tensors(lambda c: struct.pack("<Q", 2**63) + c[8:]),
    "a header of 2^40 bytes": _tensors(lambda c: struct.pack("<Q", 2**40) + c[8:]),
    "a header beyond the file": _tensors(lambda c: struct.pack("<Q", len(c)) + c[8:]),
    "a header of nothing": _tensors(lambda c: struct.pack("<Q", 0) + c[8:]),
    "a header nested without end": _tensors(lambda c: struct.pack("<Q", 100_000) + b"[" * 100_000),
    "a shape that overflows": _tensors(
        lambda c: _header({"a": {"dtype": "F64", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}) + b"\0" * 8
    ),
    "offsets beyond the end": _tensors(
        lambda c: _header({"a": {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 2**43]}}) + b"\0" * 8
    ),
    "offsets backwards": _tensors(
        lambda c: _header({"a": {"dtype": "F64", "shape": [1], "data_offsets": [8, 0]}}) + b"\0" * 8
    ),
    "names that lead out": _tensors(_with(lambda t: t.update({"../../../etc/passwd": torch.zeros(1)}))),
    "a name in the adapter's place": _tensors(_with(lambda t: t.update({"__class__/weight/a": torch.zeros(1)}))),
    "20000 tensors": _tensors(_with(lambda t: t.update({f"x{i}": torch.zeros(1) for i in range(20_000)}))),
    "numbers that are not finite": _tensors(_first(lambda t: t * float("nan"))),
    "numbers beyond float32": _tensors(_all(lambda t: t.double() + 1e300)),
    "another shape": _tensors(_first(lambda t: t.reshape(-1))),
    "no elements": _tensors(_first(lambda t: t.flatten()[:0].clone())),
    "eight-bit numbers": _tensors(_first(lambda t: t.to(torch.float8_e4m3fn))),
    "eight-bit exponents": _tensors(_all(lambda t: torch.zeros(t.shape, dtype=torch.uint8).view(torch.float8_e5m2))),
    "whole numbers": _tensors(_all(lambda t: t.to(torch.int64))),
    "unsigned numbers": _tensors(_first(lambda t: torch.zeros(t.shape, dtype=torch.uint64))),
    "flags": _tensors(_all(lambda t: t.bool())),
    "brain floats": _tensors(_all(lambda t: t.to(torch.bfloat16))),
    "complex numbers": _tensors(_all(lambda t: t.to(torch.complex64))),
    "no file": _tensors(lambda c: b""),
    "half a file": _tensors(lambda c: c[: len(c) // 2]),
    "sparse, eight-bit": _tensors(_all(lambda t: t if t.dtype == torch.int32 else t.to(torch.float8_e4m3fn)), "sparse"),
    "sparse, beyond float32": _tensors(_all(lambda t: t if t.dtype == torch.int32 else t.double() + 1e300), "sparse"),
    "sparse, places outside": _tensors(_all(lambda t: t + 10**6 if t.dtype == torch.int32 else t), "sparse"),
    "sparse, complex": _tensors(_all(lambda t: t if t.dtype == torch.int32 else t.to(torch.complex64)), "sparse"),
}


def _pickled(folder: Path, program: bytes, members: dict[str, bytes] | None = None, deflate: bool = False) -> None:
    path = folder / "a.model"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", program)
        for name, content in (members or {}).items():
            archive.writestr(name, content)
    MaceBackbone.load(path)


def _program(program: bytes) -> Callable[[Path], None]:
    return lambda folder: _pickled(folder, program)


def _wide(levels: int, last: bytes) -> bytes:
    """Tuples of a thousand times the same tuple, nested; then ``last``."""
    made = b"\x80\x02K\x00q\x000"
    for level in range(levels):
        made += b"(" + (b"h" + bytes([level])) * 1000 + b"t" + b"q" + bytes([level + 1]) + b"0"
    return made + last.replace(b"#", bytes([levels]))


def _copies(build: bytes, function: bytes, times: int = 200_000) -> bytes:
    """Call ``function`` so many times on one large value, whose program is ``build``."""
    return b"\x80\x02" + build + b"q\x000" + b"(" + (function + b"h\x00\x85R") * times + b"l."


LARGE_LIST = b"(" + b"K\x00" * 500_000 + b"l"
LARGE_TEXT = b"X" + struct.pack("<I", 2_000_000) + b"a" * 2_000_000


def _spoilt_model(change: Callable[[Any], None], **options: Any) -> Callable[[Path], None]:
    """A model that is changed before it is written by ``torch.save``."""

    def read(folder: Path) -> None:
        model = make_mace(**options)
        change(model)
        torch.save(model, folder / "a.model")
        MaceBackbone.load(folder / "a.model")

    return read


def _plain(change: Callable[[dict[str, str], dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from safetensors import safe_open

        path = folder / "a.safetensors"
        path.write_bytes(model_bytes(True))
        with safe_open(path, framework="pt") as stored:
            header = dict(stored.metadata())
        tensors = load_file(path)
        change(header, tensors)
        path.write_bytes(save(tensors, metadata=header))
        MaceBackbone.load(path)

    return read


def _architecture(**values: Any) -> Callable[[dict[str, str], dict[str, torch.Tensor]], None]:
    def change(header: dict[str, str], _: object) -> None:
        header["architecture"] = json.dumps(json.loads(header["architecture"]) | values)

    return change


def _sparse_shape(shape: Any) -> Callable[[dict[str, str], dict[str, torch.Tensor]], None]:
    def change(header: dict[str, str], _: object) -> None:
        table = json.loads(header["sparse"])
        header["sparse"] = json.dumps(dict.fromkeys(table, shape))

    return change


def _model_bytes(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        (folder / "a.model").write_bytes(content(model_bytes(False)))
        MaceBackbone.load(folder / "a.model")

    return read


def _expand_embedding(model: Any) -> None:
    # few bytes in the file, many elements in memory
    model.interactions[1].linear_up.weight = torch.nn.Parameter(torch.zeros(1).expand(1 << 20).double())


def _irreps(model: Any) -> None:
    from e3nn import o3

    for block in model.interactions:
        block.hidden_irreps = o3.Irreps("16000x0e")
        block.node_feats_irreps = o3.Irreps("16000x0e")


MODELS: dict[str, Callable[[Path], None]] = {
    "keys of wide tuples": _program(_wide(4, b"}h#K\x01s.")),
    "sets of wide tuples": _program(_wide(4, b"c__builtin__\nset\n(h#l\x85R.")),
    "a wide tuple as a size": _program(_wide(6, b"ctorch._utils\n_rebuild_tensor\n(NK\x00h#h#tR.")),
    "a wide tuple as a storage": _program(_wide(6, b"(X\x07\x00\x00\x00storageh#X\x01\x00\x00\x000NK\x01tQ.")),
    "a wide tuple as a type": _program(
        _wide(6, b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(h#tRX\x01\x00\x00\x00atR.")
    ),
    "a wide tuple as a device": _program(_wide(6, b"ctorch\ndevice\n(h#tR.")),
    "a wide tuple as an encoding": _program(_wide(6, b"c_codecs\nencode\n(X\x01\x00\x00\x00ah#tR.")),
    "a wide tuple as a number": _program(_wide(6, b"c__builtin__\ncomplex\n(h#tR.")),
    "copies of a list": _program(_copies(LARGE_LIST, b"c__builtin__\nlist\n")),
    "copies of a set": _program(_copies(LARGE_LIST, b"c__builtin__\nset\n")),
    "copies of a text": _program(_copies(LARGE_TEXT, b"c_codecs\nencode\n")),
    "copies of a list in a table": _program(
        b"\x80\x02" + LARGE_LIST + b"q\x000" + b"(" + b"]q\x01h\x00b0" * 100 + b"l."
    ),
    "a number of a megabyte": _program(b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b"."),
    "a number of a megabyte as a size": _program(
        b"\x80\x02ctorch\nSize\n(\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b"t\x85R."
    ),
    "tuples nested 10^6 times": _program(b"\x80\x02K\x00" + b"\x85" * 1_000_000 + b"."),
    "a text that announces 4 GB": _program(b"\x80\x02X\xff\xff\xff\xffa."),
    "a pickle that unpacks to half a gigabyte": lambda folder: _pickled(
        folder, b"\x80\x02X" + struct.pack("<I", 2**29) + b"\0" * 2**29 + b".", deflate=True
    ),
    "a record of records": _program(
        b"\x80\x02cmace\nMACE\n)R}(X\x08\x00\x00\x00_modules}(" + b"X\x01\x00\x00\x00a" + b"cx\ny\n)R" + b"uub."
    ),
    "a model that is its own part": _program(
        b"\x80\x02cmace\nMACE\n)Rq\x00}X\x08\x00\x00\x00_modules}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00usb."
    ),
    "paths that lead out": lambda folder: _pickled(
        folder,
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x0b\x00\x00\x00../../../etX\x03\x00\x00\x00cpuK\x01tQ.",
        {"../../../etc/passwd": b"x", "/etc/passwd": b"y"},
    ),
    "irreps far beyond the file": _spoilt_model(_irreps),
    "expanded tensors": _spoilt_model(_expand_embedding),
    "coupling tensors of 10^15 elements": _plain(_sparse_shape([100_000, 100_000, 100_000])),
    "coupling tensors of 10^9 elements": _plain(_sparse_shape([1000, 1000, 1000])),
    "coupling tensors of negative shape": _plain(_sparse_shape([-4, -4])),
    "coupling tensors of text": _plain(_sparse_shape("abc")),
    "coupling tensors nested without end": _plain(lambda h, _: h.update(sparse="[" * 100_000)),
    "an architecture of 16000 channels": _plain(_architecture(hidden_irreps="16000x0e")),
    "an architecture of 118 elements": _plain(_architecture(atomic_numbers=list(range(1, 119)))),
    "an architecture of order 5": _plain(_architecture(correlation=[5, 5], max_ell=8)),
    "an architecture of l = 12": _plain(_architecture(hidden_irreps="8x0e+8x12e", max_ell=8)),
    "an architecture of wide layers": _plain(_architecture(radial_MLP=[16384] * 3)),
    "an architecture of many layers": _plain(_architecture(radial_MLP=[16384] * 1000)),
    "an architecture of text": _plain(_architecture(hidden_irreps="xxx", r_max="a")),
    "an architecture of tables": _plain(_architecture(hidden_irreps={}, heads={})),
    "an architecture nested without end": _plain(lambda h, _: h.update(architecture="[" * 100_000)),
    "names that do not hash": _plain(lambda h, _: h.update(parameters="[[1]]")),
    "no header": _plain(lambda h, _: h.clear()),
    "a plain model of eight-bit numbers": _plain(
        lambda _, t: t.update({n: v.to(torch.float8_e4m3fn) for n, v in t.items() if v.is_floating_point()})
    ),
    "half a model": _model_bytes(lambda c: c[: len(c) // 2]),
    "a model behind something else": _model_bytes(lambda c: b"#!/bin/sh\n" * 100 + c),
}


def _npz(folder: Path, content: bytes) -> None:
    config = RunConfig.model_validate({"data": {"train": ["x.xyz"]}})
    config.save(folder / "config.yaml")
    (folder / "predictions.npz").write_bytes(content)
    write_report(folder)


def _archive(content: bytes, name: str = "valid/reference/forces.npy") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def _npy(shape: str, descr: str = "'<f8'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0" * 64


def _large_zip() -> bytes:
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("valid/before/forces.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array(member, np.zeros(2**26))
    return stream.getvalue()


def _results(text: str, name: str = "results.json") -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        config = RunConfig.model_validate({"data": {"train": ["x.xyz"]}})
        config.save(folder / "config.yaml")
        (folder / name).write_text(text, encoding="utf-8")
        if name == "results.json":
            read_status(folder)
        write_report(folder)

    return read


def _checkpoint(content: bytes) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.pt").write_bytes(content)
        read_checkpoint(folder)

    return read


def _zipped_pickle(program: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/version", b"3")
    return stream.getvalue()


RUNS: dict[str, Callable[[Path], None]] = {
    "an array of 10^15 numbers": lambda folder: _npz(folder, _archive(_npy("(1000000000000000,)"))),
    "an array of -1 numbers": lambda folder: _npz(folder, _archive(_npy("(-1,)"))),
    "an array of objects": lambda folder: _npz(folder, _archive(_npy("(2,)", "'|O'"))),
    "an array of text": lambda folder: _npz(folder, _archive(_npy("(2,)", "'<U4'"))),
    "an array of nothing known": lambda folder: _npz(folder, _archive(_npy("(2,", "'zz'"))),
    "an archive that unpacks to half a gigabyte": lambda folder: _npz(folder, _large_zip()),
    "a damaged archive": lambda folder: _npz(
        folder,
        bytes(255 - b if 60 < i < 90 else b for i, b in enumerate(_archive(np.random.default_rng(0).bytes(500)))),
    ),
    "results nested without end": _results("[" * 100_000),
    "results with nested parts": _results('{"training": ' + '{"a":' * 3000 + "1" + "}" * 3001),
    "a field of a megabyte": _results("epoch\n" + "1" * 2_000_000 + "\n", "metrics.csv"),
    "metrics with NUL": _results("epoch\n\0\n", "metrics.csv"),
    "a checkpoint of nonsense": _checkpoint(_zipped_pickle(b"\x80\x02K\x01K\x02R.")),
    "a checkpoint of a wrong name": _checkpoint(_zipped_pickle(b"\x80\x02cos\nsystem\n.")),
    "a checkpoint without a value": _checkpoint(_zipped_pickle(b"\x80\x02.")),
    "a checkpoint in the old format": _checkpoint(pickle.dumps({"a": 1})),
    "a checkpoint that unpacks to half a gigabyte": lambda folder: _checkpoint(
        _zipped_pickle(b"\x80\x02X" + struct.pack("<I", 2**29) + b"a" * 2**29 + b".")
    )(folder),
}

NAMES = ("\0", "~nobody-of-this-name/x", "x" * 5000, "[", "a\ud800", "")


def _name(read: Callable[[str], object]) -> Callable[[Path], None]:
    def attempt(_: Path) -> None:
        for name in NAMES:
            try:
                read(name)
            except ForcetuneError:
                continue

    return attempt


def cases() -> dict[str, Callable[[Path], None]]:
    """Every hostile input by name: called with an empty folder, it writes its files there and reads them."""
    all_cases = {f"frames: {name}": _frames(text) for name, text in FRAMES.items()}
    all_cases |= {f"streamed frames: {name}": _streamed_frames(text) for name, text in FRAMES.items()}
    all_cases |= {f"LMDB: {name}": _stored_frames("a.aselmdb", write) for name, write in LMDBS.items()}
    all_cases |= {f"HDF5: {name}": _stored_frames("a.h5", write) for name, write in HDF5S.items()}
    all_cases |= {f"program: {name}": _of_program(write_program, name) for name in PROGRAMS}
    all_cases |= {f"deepmd: {name}": _of_program(write_system, name) for name in ARRAYS}
    all_cases["streamed frames: gzip of blanks"] = lambda folder: _compressed_frames(
        folder, "a.xyz.gz", gzip.compress, stream_and_build
    )
    all_cases["frames: gzip of blanks"] = lambda folder: _compressed_frames(folder, "a.xyz.gz", gzip.compress)
    all_cases["frames: bzip2 of blanks"] = lambda folder: _compressed_frames(folder, "a.xyz.bz2", bz2.compress)
    all_cases |= {f"config: {name}": _config(text) for name, text in CONFIGS.items()}
    all_cases |= {f"base of a run: {name}": _folder_config(text) for name, text in CONFIGS.items()}
    all_cases["base of a run: aliases as the name"] = _folder_config(
        CONFIGS["aliases of lists"].replace("data: {train:", "model: {model:")
    )
    for index, text in enumerate(SETTINGS):
        all_cases[f"setting {index}"] = lambda _, text=text: load_config(settings=[text]) and None
    all_cases |= {f"adapter: {name}": read for name, read in ADAPTER_CONFIGS.items()}
    all_cases |= {f"tensors: {name}": read for name, read in TENSORS.items()}
    all_cases |= {f"model: {name}": read for name, read in MODELS.items()}
    all_cases |= {f"run: {name}": read for name, read in RUNS.items()}
    all_cases["names of data"] = _name(read_frames)
    all_cases["names of models"] = _name(load)
    all_cases["names of devices"] = lambda _: load("mini", device="meta") and None
    return all_cases


def outcome(read: Callable[[Path], None], folder: Path) -> str:
    """``read``, or ``refused``, or what else came out."""
    try:
        read(folder)
    except ForcetuneError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "read"


def _alone(read: Callable[[Path], None], folder: Path) -> str:
    """The outcome in a process of its own, with little memory and time: a reader may hang in C code or be killed."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
            os.write(send, outcome(read, folder).encode("utf-8", "backslashreplace")[:1000])
        finally:
            os._exit(0)
    os.close(send)
    began = time.monotonic()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() - began > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"took more than {SECONDS} s"
        time.sleep(0.005)
    with os.fdopen(receive, "rb") as stream:
        return stream.read().decode("utf-8") or "died"


def main(place: Path, only: str = "") -> dict[str, tuple[str, float]]:
    """Read all inputs, or those with ``only`` in their name."""
    warnings.simplefilter("ignore")
    # what is slow to make or to import is there before the processes part
    model_bytes(True), model_bytes(False)
    for name in ("elora", "mmea-pure", "sparse", "adapter"):
        load_adapter(adapter_in(place / "warm", name), place / "warm")
        detach(small_backbone())
    load("mini")
    outcomes = {}
    for index, (name, read) in enumerate(cases().items()):
        if only not in name:
            continue
        folder = place / str(index)
        folder.mkdir(parents=True)
        began = time.monotonic()
        outcomes[name] = (_alone(read, folder), round(time.monotonic() - began, 2))
        shutil.rmtree(folder)
        print(name, *outcomes[name], file=sys.stderr, flush=True)
    return outcomes


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *sys.argv[2:])))
