from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from forcetune.backbones.safe_unpickle.reader import Global, Record, read_inert
from forcetune.errors import InputError


def _archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _pickled(path: Path, program: bytes, storages: dict[str, bytes] | None = None) -> Path:
    stored = {f"a/data/{key}": content for key, content in (storages or {}).items()}
    return _archive(path, {"a/data.pkl": program, **stored})


def test_plain_values_come_out_as_themselves(tmp_path: Path) -> None:
    content = {
        "numbers": [1, -5, 2**70, 1.5, True, None, 2 + 3j],
        "text": "Å",
        "bytes": b"\x00\xff",
        "tuple": (1, (2, 3), ()),
        "sets": [{1, 2}, frozenset("ab")],
        "ordered": collections.OrderedDict(a=1, b=2),
        "slice": slice(1, None, 2),
        "dtype": torch.float32,
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "scalar": np.float32(0.5),
        "array": np.arange(6, dtype=">i4").reshape(2, 3),
    }
    torch.save(content, tmp_path / "a.pt")
    actual = read_inert(tmp_path / "a.pt")
    assert np.array_equal(actual.pop("array"), content.pop("array"))
    assert actual == content
    assert type(actual["ordered"]) is collections.OrderedDict


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.bool, torch.uint16])
def test_tensors_come_out_with_shape_and_strides(dtype: torch.dtype, tmp_path: Path) -> None:
    base = torch.arange(24).reshape(2, 3, 4).to(dtype)
    content = [base, base.transpose(0, 2), base[1, :, 1:3], base[0, 0, 0], torch.empty(0, 3, dtype=dtype)]
    torch.save(content, tmp_path / "a.pt")
    for tensor, expected in zip(read_inert(tmp_path / "a.pt"), content, strict=True):
        assert torch.equal(tensor, expected)
        assert tensor.dtype == expected.dtype and tensor.stride() == expected.stride()


def test_parameters_keep_their_kind_and_shared_memory(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.rand(3), requires_grad=False)
    torch.save([weight, weight, weight.data[1:]], tmp_path / "a.pt")
    first, second, view = read_inert(tmp_path / "a.pt")
    assert isinstance(first, nn.Parameter) and not first.requires_grad
    assert first is second
    assert view.data_ptr() == first.data_ptr() + 4


def test_objects_come_out_as_records(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 3), nn.SiLU()), tmp_path / "a.pt")
    content = read_inert(tmp_path / "a.pt")
    assert isinstance(content, Record)
    assert (content.module, content.name) == ("torch.nn.modules.container", "Sequential")
    linear = content.state["_modules"]["0"]
    assert linear.state["_parameters"]["weight"].shape == (3, 2)
    torch.save([os.path.join, collections.deque([1, 2], 5)], tmp_path / "b.pt")
    function, queue = read_inert(tmp_path / "b.pt")
    assert function == Global("posixpath", "join")
    assert queue.items == [1, 2]


class _Call:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_nothing_is_called(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    command = f"touch {marker}"
    content = {
        "system": _Call(os.system, command),
        "eval": [_Call(eval, f"__import__('os').system({command!r})")],
        "getattr": _Call(getattr, _Call(__import__, "os"), "system"),
        "blob": _Call(torch.jit.load, io.BytesIO(b"")),
    }
    actual = read_inert(_pickled(tmp_path / "a.pt", pickle.dumps(content, protocol)))
    assert not marker.exists()
    assert isinstance(actual["system"], Record) and actual["system"].args == (command,)
    assert actual["eval"][0].name == "eval"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.rand(100)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    files = {
        "empty": b"",
        "random": np.random.default_rng(0).bytes(5000),
        "text": b"energy,forces\n1,2\n",
        "half": whole[: len(whole) // 2],
        "flipped": whole.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            read_inert(tmp_path / name)
    with pytest.raises(InputError, match="missing"):
        read_inert(tmp_path / "missing")
    with pytest.raises(InputError):
        read_inert(tmp_path)


def test_every_truncation_and_every_flipped_byte_is_an_input_error(tmp_path: Path) -> None:
    torch.save({"a": torch.rand(2), "b": [np.float64(1.0), {1}, slice(2)], "c": nn.Linear(1, 1)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    program = members["data.pkl"]
    storages = {name.split("/")[1]: content for name, content in members.items() if name.startswith("data/")}
    random = np.random.default_rng(0)
    broken = [program[:n] for n in range(0, len(program), 7)]
    for _ in range(300):
        changed = bytearray(program)
        changed[random.integers(len(changed))] = random.integers(256)
        broken.append(bytes(changed))
    for candidate in broken:
        try:
            read_inert(_pickled(tmp_path / "b.pt", candidate, storages))
        except InputError:
            continue


def test_old_format_and_torchscript_say_what_to_do(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"torch before 1\.6.*torch\.save"):
        read_inert(tmp_path / "old.pt")
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "script.pt")
    with pytest.raises(InputError, match="TorchScript"):
        read_inert(tmp_path / "script.pt")


class _Storages(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.value if isinstance(obj, _Reference) else None


class _Reference:
    def __init__(self, *value: Any) -> None:
        self.value = value


def _tensor_program(size: Any, stride: Any, offset: Any = 0, count: int = 4, key: str = "0") -> bytes:
    stream = io.BytesIO()
    storage = _Reference("storage", torch.DoubleStorage, key, "cuda:0", count)
    call = _Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict())
    _Storages(stream, 2).dump(call)
    return stream.getvalue()


def test_tensors_stay_inside_their_storage(tmp_path: Path) -> None:
    storages = {"0": np.arange(4.0).tobytes()}
    good = read_inert(_pickled(tmp_path / "a.pt", _tensor_program((2, 2), (2, 1)), storages))
    assert torch.equal(good, torch.arange(4.0, dtype=torch.float64).reshape(2, 2))
    bad = [
        _tensor_program((5,), (1,)),
        _tensor_program((2, 2), (3, 1)),
        _tensor_program((4,), (1,), 1),
        _tensor_program((4,), (1,), -1),
        _tensor_program((2,), (-1,), 1),
        _tensor_program((2,), (1, 1)),
        _tensor_program((1 << 40,), (0,)),
        _tensor_program((2.0,), (1,)),
        _tensor_program((4,), (1,), count=9),
        _tensor_program((4,), (1,), key="7"),
        _tensor_program((4,), (1,), key="../data.pkl"),
    ]
    for program in bad:
        with pytest.raises(InputError, match=r"a\.pt cannot be read"):
            read_inert(_pickled(tmp_path / "a.pt", program, storages))
    with pytest.raises(InputError, match="ends within an element"):
        read_inert(_pickled(tmp_path / "a.pt", _tensor_program((3,), (1,)), {"0": b"\x00" * 31}))


def test_bombs_are_refused(tmp_path: Path) -> None:
    zeros = pickle.dumps(b"\x00" * 20_000_000)
    with pytest.raises(InputError, match="20 times its size"):
        read_inert(_archive(tmp_path / "a.pt", {"a/data.pkl": zeros}, zipfile.ZIP_DEFLATED))
    nested = b"\x80\x02" + b"(" + b")" + b"\x85" * 200_000 + b"K\x01d."
    with pytest.raises(InputError, match="too deeply"):
        read_inert(_pickled(tmp_path / "b.pt", nested))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(1))
        archive.writestr("a/data.pkl", pickle.dumps(2))
    with pytest.raises(InputError, match="same name"):
        read_inert(tmp_path / "c.pt")


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    program = pickle.dumps(np.array([1, "a", None], dtype=object), 2)
    with pytest.raises(InputError, match="unknown type 'O8'"):
        read_inert(_pickled(tmp_path / "a.pt", program))


@pytest.mark.parametrize(
    "program", [b"\x80\x02K\x01K\x02R.", b"\x80\x02K\x01}b.", b"\x80\x02]K\x01K\x02s.", b"\x80\x02h\x05.", b"\x80\x02."]
)
def test_programs_that_make_no_sense_are_refused(program: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.pt"):
        read_inert(_pickled(tmp_path / "a.pt", program))
