"""Recorded operations: the same results for other values, to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from forcetune.kernels.recording import CompileError, record

Tensors = list[torch.Tensor]
CONSTANT = torch.arange(12, dtype=torch.float64).reshape(3, 4)


def written_in_place(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    result = torch.empty(6, 4, dtype=x.dtype)
    torch.mm(x, y.detach().T @ x, out=result[:3])
    result[3:] = 2.0
    result[4].add_(x[0], alpha=3)
    unused = torch.zeros(2)
    unused.add_(1)
    return [result, result.t().contiguous()]


def several_results(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    first, _, third = torch.unbind(x)
    parts = torch.split(y, [1, 3], dim=1)
    values, places = torch.topk(first, 2)
    variance, mean = torch.var_mean(x, dim=1, correction=0)
    return [third, *parts, values, places, variance, mean, *torch._foreach_add([x, y], [y, y], alpha=2)]


def plain_arguments(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return [
        *(1 - x, 2 / y, x * 2, x**2, x.sum(), x.sum(dim=(0, 1), keepdim=True), x.mean(0), x.to(torch.float32)),
        torch.where(x > 0, y, 0.0),
        torch.clamp(x, min=0.1),
        torch.full_like(x, 7),
        x.new_zeros(2, dtype=torch.int64),
        torch.cat((x, CONSTANT, y)),
        torch.empty_like(x, memory_format=torch.preserve_format).fill_(1),
        torch.nn.functional.layer_norm(x, (4,), eps=1),
        torch.einsum("ij,kj->ik", x, CONSTANT),
    ]


def places(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    rows = torch.argsort(x[:, 0])
    result = x[rows][:, rows]
    return [result, x[:, None], torch.zeros(5, 4, dtype=x.dtype).index_add(0, rows, y), x.index_select(1, rows)]


def second_derivatives(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    leaf = x.detach().requires_grad_()
    energy = (torch.nn.functional.silu(leaf @ y.T) ** 3).sum()
    (force,) = torch.autograd.grad(energy, [leaf], create_graph=True)
    return [force, *torch.autograd.grad(force.square().sum(), [leaf, y])]


def about_constants(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    torch.zeros(2).add_(1)
    assert torch.equal(CONSTANT, CONSTANT + 0) and bool(CONSTANT.sum() > 1)
    return [x * CONSTANT.max()]


def values_of(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize(
    "function",
    [written_in_place, several_results, plain_arguments, places, second_derivatives, about_constants],
)
def test_what_was_recorded_gives_the_same_for_other_values(function: Callable[..., Tensors]) -> None:
    """Bit for bit, again and again."""

    def with_leaf(x: torch.Tensor, y: torch.Tensor) -> Tensors:
        return function(x, y)

    x, y = values_of(0)
    recording = record(with_leaf, [x], [y.requires_grad_()])
    assert recording.operations > 0 and all(recording.used)
    for seed in (1, 2, 1, 0):
        values = values_of(seed)
        with torch.no_grad():
            mine = recording(*values)
        expected = function(values[0], values[1].requires_grad_())
        assert len(mine) == len(expected)
        for one, two in zip(mine, expected, strict=True):
            assert one.dtype == two.dtype and torch.equal(one, two)


def test_what_nobody_needs_is_left_out() -> None:
    def wasteful(x: torch.Tensor, y: torch.Tensor) -> Tensors:
        ignored = x
        for _ in range(50):
            ignored = torch.sin(ignored) + y
        return [x + y]

    def frugal(x: torch.Tensor, y: torch.Tensor) -> Tensors:
        return [x + y]

    graphs = [str(record(function, *([value] for value in values_of(0))).run.graph) for function in (wasteful, frugal)]  # pyright: ignore[reportFunctionMemberAccess]
    assert graphs[0] == graphs[1] and "sin" not in graphs[0]


def by_a_number(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return [y * float(x.max())]


def by_a_branch(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return [y if x.sum() > 0 else -y]


def by_comparison(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return [y] if torch.equal(x, y) else [-y]


def by_what_was_a_constant(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    fixed = CONSTANT + 0
    fixed[1].copy_(x[0])
    return [y * float(fixed.max())]


def by_mask(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return [y[x > 0].sum()]


def by_masked_writing(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    result = y.clone()
    result[x > 0] = 1.0
    return [result]


def by_a_list(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return [y * x.tolist()[0][0]]


def by_an_array(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return [y + torch.from_numpy(x.detach().numpy().copy())]


def by_search(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    return [torch.nonzero(x > 0).sum() * y]


@pytest.mark.parametrize(
    "function",
    [
        by_a_number,
        by_a_branch,
        by_comparison,
        by_what_was_a_constant,
        by_mask,
        by_masked_writing,
        by_search,
        by_a_list,
        by_an_array,
    ],
)
def test_what_depends_on_values_is_refused(function: Callable[..., Tensors]) -> None:
    x, y = values_of(0)
    with pytest.raises(CompileError, match="depends on values"):
        record(function, [x], [y])


def test_what_the_interpreter_does_not_know_is_told() -> None:
    def with_a_truth_value(x: torch.Tensor, y: torch.Tensor) -> Tensors:
        return [torch.full_like(y, True) * (x * True)]

    recording = record(with_a_truth_value, *([value] for value in values_of(0)))
    with pytest.raises(CompileError, match="its recording fails"):
        recording(*values_of(1))


def test_errors_of_the_step_are_told() -> None:
    def fails(x: torch.Tensor, y: torch.Tensor) -> Tensors:
        raise RuntimeError("no such luck\nmore lines")

    with pytest.raises(CompileError, match=r"cannot be recorded \(RuntimeError: no such luck\)$"):
        record(fails, *([value] for value in values_of(0)))
