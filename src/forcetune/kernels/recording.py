"""A step's operations recorded once, to be run without Python between them.

On a CPU they are written down as PyTorch carries them out, and run by TorchScript's interpreter, one by one and with
the same rounding; on a GPU they become a CUDA graph. Nothing is fused: Inductor does not get to the end of graphs of
this size in a reasonable time, and ``make_fx`` with ``torch.jit.trace`` takes ten times as long for the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from forcetune.errors import ForcetuneError

_C: Any = torch._C

Step = Callable[..., Sequence[Tensor | None]]

WARM_UPS = 3
"""Times that a step runs before a CUDA graph of it is recorded, so that what is made only once is there already."""

# by their numbers in PyTorch
_MEMORY_FORMATS = {torch.contiguous_format: 0, torch.preserve_format: 1}

# results that depend on values, or values that became numbers: their graph would be that of one batch only
_DEPENDS_ON_VALUES = frozenset(
    {
        *("nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "bincount"),
        "repeat_interleave",
    }
)


_TAKES_VALUES_OUT = (Tensor.numpy, Tensor.tolist, Tensor.__array__)


class CompileError(ForcetuneError):
    """Why a step is computed eagerly.

    Attributes:
        wanted: nothing is missed by that.
    """

    def __init__(self, message: str, *, wanted: bool = False) -> None:
        super().__init__(message)
        self.wanted = wanted


@dataclass(frozen=True, slots=True)
class Recording:
    """A step that was recorded.

    Attributes:
        run: from the inputs and parameters to those results that there are.
        used: for each result of the step whether there is one.
        operations: of the step.
    """

    run: Callable[..., Sequence[Tensor]]
    used: tuple[bool, ...]
    operations: int

    def __call__(self, *values: Tensor) -> Sequence[Tensor]:
        """Carry it out, without gradients; the results can take no part in a later differentiation.

        Raises:
            CompileError: the interpreter cannot go through with it.
        """
        # unoptimised: nothing is merged or reordered after the first calls, which would round differently
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # pyright: ignore[reportPrivateImportUsage]
            try:
                return self.run(*values)
            except RuntimeError as error:
                raise CompileError(f"its recording fails ({_first_line(error)})") from error


def record(step: Step, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Recording:
    """Record a step.

    Args:
        step: of the inputs and the parameters.
        inputs: that differ from call to call, but not in their shapes.
        parameters: are always the same tensors, with other values.

    Raises:
        CompileError: the step cannot be recorded.
    """
    used: list[bool] = []

    def present(*values: Tensor) -> list[Tensor]:
        results = step(*values)
        used[:] = [value is not None for value in results]
        return [value.detach() for value in results if value is not None]

    gpu = _find_gpu(parameters)
    own = inputs if gpu is None else [value.detach().to(gpu, copy=True) for value in inputs]
    operations = Operations((*own, *parameters))
    try:
        with operations, _Watch(operations):
            results = present(*own, *parameters)
        if gpu is None:
            run: Any = _C._create_function_from_graph("step", operations.graph(results))
        else:
            run = _CudaGraph(present, own, parameters)
    except CompileError:
        raise
    except Exception as error:
        raise CompileError(f"its step cannot be recorded ({_first_line(error)})") from error
    return Recording(run, tuple(used), len(operations.calls))


def _find_gpu(parameters: Sequence[Tensor]) -> torch.device | None:
    return parameters[0].device if parameters and parameters[0].device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor of the recording: an input, a constant, or the result of an operation."""

    index: int


@dataclass(slots=True)
class _Call:
    """An operation with what it was given, tensors by their places, and the places of its results."""

    operation: Any
    given: list[Any]
    results: Any


class Operations(TorchDispatchMode):
    """Writes down the operations that PyTorch carries out within this context, those of backward passes included.

    Attributes:
        calls: in their order.
        constants: tensors that depend on no input, by their places.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.constants: dict[int, Tensor] = {}
        self._places = 0
        # memory of the constants that nothing has written to so far
        self._fixed: dict[int, int] = {}
        # a tensor is the same object for as long as it lives
        self._known: Any = WeakIdKeyDictionary()
        self._inputs = [self._new(value) for value in inputs]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.detach.default:
            self._known[result] = self._place(args[0])
            return result
        schema, name = func._schema, func._schema.name.split("::")[-1]
        values = _arguments(schema, args, kwargs or {})
        mapped = [self._mapped(value) for value in values]
        used = [place.index for place in _places_in(mapped)]
        fixed = bool(used) and all(index in self._fixed for index in used)
        if not isinstance(result, Tensor | list | tuple | None):
            if not fixed:
                raise CompileError(f"its step depends on values ({name})")
            return result
        chooses = name in _DEPENDS_ON_VALUES or (name in ("index", "index_put", "index_put_") and _by_mask(args[1]))
        if chooses and not fixed:
            raise CompileError(f"its step depends on values ({name})")
        call = _Call(func, mapped, self._results(result))
        self.calls.append(call)
        if schema.is_mutable:
            self._overwritten(schema, values)
        elif fixed:
            for tensor, place in zip(_tensors_in(result), _places_in(call.results), strict=True):
                self.constants[place.index], self._fixed[place.index] = tensor.detach(), _storage_id(tensor)
        return result

    def _overwritten(self, schema: Any, values: Sequence[Any]) -> None:
        """What shares memory with the arguments that an operation writes to is no longer fixed."""
        arguments = zip(schema.arguments, values, strict=True)
        written = [value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write]
        places = {_storage_id(tensor) for tensor in _tensors_in(written)}
        if places.intersection(self._fixed.values()):
            self._fixed = {index: memory for index, memory in self._fixed.items() if memory not in places}

    def is_fixed(self, value: Tensor) -> bool:
        """Whether a tensor depends on no input."""
        return self._place(value).index in self._fixed

    def _new(self, value: Tensor) -> _Place:
        place = _Place(self._places)
        self._places += 1
        self._known[value] = place
        return place

    def _place(self, value: Tensor) -> _Place:
        place = self._known.get(value)
        if place is None:
            place = self._new(value)
            self.constants[place.index] = value.detach()
            self._fixed[place.index] = _storage_id(value)
        return place

    def _mapped(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._place(value)
        if isinstance(value, list | tuple):
            return [self._mapped(item) for item in value]
        return value

    def _results(self, result: Any) -> Any:
        if isinstance(result, list | tuple):
            return [self._results(item) for item in result]
        return None if result is None else self._new(result)

    def _needed(self, results: Sequence[_Place]) -> list[_Call]:
        """Calls that the results depend on, and all that write into tensors; constants are not computed again."""
        needed = {place.index for place in results}
        calls = []
        for call in reversed(self.calls):
            outputs = [place.index for place in _places_in(call.results)]
            writes = call.operation._schema.is_mutable
            if writes or any(index in needed and index not in self._fixed for index in outputs):
                calls.append(call)
                needed.update(place.index for place in _places_in(call.given))
        return calls[::-1]

    def graph(self, results: Sequence[Tensor]) -> Any:
        """What was written down, from the inputs to these results, as TorchScript's interpreter takes it."""
        places = [self._place(value) for value in results]
        return _Graph(self._inputs, self.constants).of(self._needed(places), places)


class _Watch(TorchFunctionMode):
    """Refuses what takes values out of PyTorch: operations never see it."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TAKES_VALUES_OUT and not self.operations.is_fixed(args[0]):
            raise CompileError(f"its step depends on values ({func.__name__})")
        return func(*args, **(kwargs or {}))


def _arguments(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """A value for every argument of an operation."""
    positional = list(args)
    return positional + [
        kwargs.get(argument.name, argument.default_value) for argument in schema.arguments[len(positional) :]
    ]


def _places_in(value: Any) -> Iterator[_Place]:
    if isinstance(value, _Place):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _places_in(item)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def _storage_id(value: Tensor) -> int:
    return value.untyped_storage()._cdata


class _Graph:
    """Calls as a graph of TorchScript."""

    def __init__(self, inputs: Sequence[_Place], constants: Mapping[int, Tensor]) -> None:
        self.graph = _C.Graph()
        self.values = {place.index: self.graph.addInput() for place in inputs}
        self.constants = constants
        self._plain: dict[Any, Any] = {}

    def of(self, calls: Sequence[_Call], results: Sequence[_Place]) -> Any:
        for call in calls:
            self._add(call)
        for place in results:
            self.graph.registerOutput(self._tensor(place))
        self.graph.makeMultiOutputIntoTuple()
        return self.graph

    def _add(self, call: _Call) -> None:
        schema = call.operation._schema
        inputs = [
            self._value(value, argument.type) for value, argument in zip(call.given, schema.arguments, strict=True)
        ]
        node = self.graph.create(schema.name, inputs, len(schema.returns))
        self.graph.insertNode(node)
        results = call.results if len(schema.returns) > 1 else [call.results] if schema.returns else []
        for output, result, returned in zip(node.outputs(), results, schema.returns, strict=True):
            output.setType(returned.type)
            if isinstance(result, list):
                self._unpack(output, result)
            elif result is not None:
                self.values[result.index] = output

    def _unpack(self, items: Any, results: Sequence[_Place]) -> None:
        node = self.graph.create("prim::ListUnpack", [items], len(results))
        self.graph.insertNode(node)
        for output, result in zip(node.outputs(), results, strict=True):
            output.setType(_C.TensorType.get())
            self.values[result.index] = output

    def _tensor(self, place: _Place) -> Any:
        if place.index not in self.values:
            self.values[place.index] = self.graph.insertConstant(self.constants[place.index])
        return self.values[place.index]

    def _value(self, value: Any, kind: Any) -> Any:
        """What stands for a value of the type that an operation takes."""
        if isinstance(value, _Place):
            return self._tensor(value)
        if isinstance(kind, _C.OptionalType) and value is not None:
            return self._value(value, kind.getElementType())
        if isinstance(kind, _C.ListType):
            element = kind.getElementType()
            values: list[Any] = value if isinstance(value, list) else [value]
            if not values or any(isinstance(item, _Place) for item in values):
                return self._list([self._value(item, element) for item in values], kind)
            return self._constant(list(map(float, values)) if isinstance(element, _C.FloatType) else values)
        return self._constant(float(value) if isinstance(kind, _C.FloatType) and value is not None else value)

    def _list(self, items: Sequence[Any], kind: Any) -> Any:
        node = self.graph.create("prim::ListConstruct", list(items), 1)
        self.graph.insertNode(node)
        node.output().setType(kind)
        return node.output()

    def _constant(self, value: Any) -> Any:
        value = _MEMORY_FORMATS.get(value, value) if isinstance(value, torch.memory_format) else value
        key = (type(value), repr(value))
        if key not in self._plain:
            self._plain[key] = self.graph.insertConstant(value)
        return self._plain[key]


class _CudaGraph:
    """A step that a GPU runs by itself, on inputs and parameters that stay where they are."""

    def __init__(
        self, step: Callable[..., list[Tensor]], inputs: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> None:
        """
        Args:
            step: has been carried out before.
            inputs: will be overwritten.
            parameters: that stay.
        """
        self._inputs = inputs
        self._places = [parameter.data_ptr() for parameter in parameters]
        values = (*inputs, *parameters)
        device = parameters[0].device
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                step(*values)
        torch.cuda.current_stream(device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = step(*values)

    def __call__(self, *values: Tensor) -> list[Tensor]:
        parameters = values[len(self._inputs) :]
        if [parameter.data_ptr() for parameter in parameters] != self._places:
            raise CompileError("the parameters are no longer where they were")
        for own, value in zip(self._inputs, values, strict=False):
            own.copy_(value)
        self._graph.replay()
        # the next call writes into the results of this one
        return [result.clone() for result in self._results]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _by_mask(indices: Any) -> bool:
    """Whether an index chooses by truth values, so that how many are chosen depends on them."""
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
