"""What an inert pickle is made of: plain values, tensors over checked storages, and records of everything else.

Nothing here imports a module named by a file or calls anything that a file names: the few names that are understood
are compared as text and made by the functions below.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from forcetune.utils.parsing import short

# an expanded tensor takes no memory in the file; up to this many elements it may have more of them than its storage
_EXPANDED = 1 << 20
_KEY_PARTS = 1000

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "complex64",
        "complex128",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
        "double",
        "float",
        "half",
        "long",
        "int",
        "short",
        "cdouble",
        "cfloat",
    ]
}
STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_NUMPY_TYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)")


class MalformedError(ValueError):
    """The pickle says something that no file of ours would; the reader turns this into an InputError."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the file refers to: a class, a function; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Record:
    """An object of the file that was not made.

    Attributes:
        module, name: of its class, or of the function that would have made it.
        args: what that would have been called with.
        state: what the object would have been filled with, mostly a dict of attributes.
        items: what would have been appended, for lists and the like.
        entries: what would have been set by key, for dicts and the like.
    """

    module: str
    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Record({self.module}.{self.name})"


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """The memory of tensors: a flat tensor on the CPU."""

    flat: Tensor


def check_key(key: Any) -> Any:
    """A value that may be a key: hashing tuples nested without end would exhaust the stack, wide ones all time."""
    if isinstance(key, (str, int)):
        return key
    left = [(key, 0)]
    for count in range(_KEY_PARTS):
        if not left:
            return key
        part, depth = left.pop()
        if isinstance(part, tuple):
            if depth > 8:
                raise MalformedError("a key is nested too deeply")
            if count + len(left) + len(part) < _KEY_PARTS:
                left += [(inner, depth + 1) for inner in part]
                continue
            break
        if isinstance(part, (list, dict, set, np.ndarray, bytearray)):
            raise MalformedError(f"a {type(part).__name__} is used as a key")
    raise MalformedError("a key has too many parts")


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise MalformedError(f"a tensor's offset, size or stride is {short(value)}")
    return value


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > 32:
        raise MalformedError("a tensor's shape is not a tuple of integers")
    return tuple(_integer(value) for value in values)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, after checking that all of it lies inside."""
    if not isinstance(storage, Storage):
        raise MalformedError("a tensor has no storage")
    start, shape, strides = _integer(offset), _integers(size), _integers(stride)
    if len(shape) != len(strides):
        raise MalformedError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    available = storage.flat.numel()
    count = math.prod(shape)
    last = start + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if count else start
    if last >= available + (count == 0) or count > max(available, _EXPANDED):
        raise MalformedError(f"a tensor of shape {shape} reaches beyond its storage of {available} elements")
    return torch.as_strided(storage.flat, shape, strides, start)


def _tensor_of_type(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise MalformedError("a tensor has no storage or no type")
    flat = storage.flat.view(torch.uint8)
    width = torch.empty(0, dtype=dtype).element_size()
    return _tensor(Storage(flat[: flat.numel() // width * width].view(dtype)), offset, size, stride)


def _parameter(data: Any, requires_grad: Any = True, *_: Any) -> nn.Parameter:
    if not isinstance(data, Tensor):
        raise MalformedError("a parameter has no tensor")
    return nn.Parameter(data, requires_grad=bool(requires_grad) and data.dtype.is_floating_point)


def _tensor_with_attributes(function: Any, _kind: Any, args: Any, _state: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise MalformedError("a tensor is made by something that is no function")
    if function.name == "_rebuild_from_type_v2":
        raise MalformedError("a tensor is nested in itself")
    return make(function, args)


def _encoded(text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8"):
        raise MalformedError("bytes are stored in an unknown encoding")
    return text.encode(encoding)


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    if isinstance(pairs, dict):
        return OrderedDict(pairs)
    result: OrderedDict[Any, Any] = OrderedDict()
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise MalformedError("an ordered dict is made from something other than pairs")
        result[check_key(pair[0])] = pair[1]
    return result


def _sequence(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    def made(values: Any = ()) -> Any:
        if not isinstance(values, (list, tuple, set, frozenset)):
            raise MalformedError(f"a {kind} is made from a {type(values).__name__}")
        return kind([check_key(value) for value in values] if kind in (set, frozenset) else values)

    return made


def _slice(*bounds: Any) -> slice:
    if not 1 <= len(bounds) <= 3 or any(type(bound) not in (int, type(None)) for bound in bounds):
        raise MalformedError("a slice has bounds that are no integers")
    return slice(*bounds)


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    if any(not isinstance(part, (int, float)) for part in (real, imaginary)):
        raise MalformedError("a complex number is made from something other than numbers")
    return complex(float(real), float(imaginary))


def _size(values: Any = ()) -> torch.Size:
    return torch.Size(_integers(tuple(values)))


def _device(kind: Any, index: Any = None) -> torch.device:
    if not isinstance(kind, str) or type(index) not in (int, type(None)):
        raise MalformedError("a device is stored in an unknown way")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _numpy_type(record: Any) -> np.dtype[Any]:
    """The type of numbers only: never ``object``, which would hold pickles of its own."""
    known = isinstance(record, Record) and (record.module, record.name) == ("numpy", "dtype") and record.args
    code = record.args[0] if known else None
    if not isinstance(code, str) or _NUMPY_TYPE.fullmatch(code) is None:
        raise MalformedError(f"an array has elements of an unknown type {short(code)}")
    result = np.dtype(code)
    order = record.state[1] if isinstance(record.state, tuple) and len(record.state) > 1 else "="
    return result.newbyteorder(order) if order in ("<", ">") else result


def _numpy_bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("latin1")
    if not isinstance(value, bytes):
        raise MalformedError("an array has no data")
    return value


def _numpy_scalar(kind: Any, data: Any) -> bool | int | float | complex:
    dtype, content = _numpy_type(kind), _numpy_bytes(data)
    if len(content) != dtype.itemsize:
        raise MalformedError(f"a number of {dtype.itemsize} bytes is stored in {len(content)}")
    return np.frombuffer(content, dtype)[0].item()


def _numpy_array(*_: Any) -> np.ndarray[Any, Any]:
    return np.zeros(0)


def fill_array(array: np.ndarray[Any, Any], state: Any) -> None:
    """Give an array made empty its shape and numbers, in place, as references to it may exist already."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise MalformedError("an array is stored in an unknown way")
    _, shape, kind, fortran, data = state
    dtype, content, sizes = _numpy_type(kind), _numpy_bytes(data), _integers(shape)
    if math.prod(sizes) * dtype.itemsize != len(content):
        raise MalformedError(f"an array of shape {sizes} is stored in {len(content)} bytes")
    target: Any = array
    target.__setstate__((1, sizes, dtype, bool(fortran), content))


_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUILTINS = ("builtins", "__builtin__")
_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_type,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_with_attributes,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): _ordered,
    ("_codecs", "encode"): _encoded,
    **{(module, "scalar"): _numpy_scalar for module in _MULTIARRAY},
    **{(module, "_reconstruct"): _numpy_array for module in _MULTIARRAY},
    **{(module, "slice"): _slice for module in _BUILTINS},
    **{(module, "complex"): _complex for module in _BUILTINS},
    **{(module, "bytes"): lambda: b"" for module in _BUILTINS},
    **{(module, kind.__name__): _sequence(kind) for module in _BUILTINS for kind in (set, frozenset, list, tuple)},
}


def named(module: str, name: str) -> Any:
    """What stands for a name of the file: a dtype, or the name itself."""
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    return Global(module, name)


def make(function: Any, args: Any) -> Any:
    """The value that calling ``function`` would have given, where it is a plain one, else a record of the call.

    Raises:
        MalformedError: a plain value's arguments are not what they should be.
    """
    if not isinstance(function, Global):
        raise MalformedError(f"a {type(function).__name__} is called as if it were a function")
    if not isinstance(args, tuple):
        raise MalformedError("a call has no arguments")
    maker = _MAKERS.get((function.module, function.name))
    if maker is None:
        return Record(function.module, function.name, args)
    try:
        return maker(*args)
    except MalformedError:
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise MalformedError(f"{function} cannot be made: {error}") from error
