"""Compiled gates against PyTorch's operations, and their derivatives against finite differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from forcetune.kernels.compiled import choice, threads
from forcetune.kernels.compiled.gate import Gate, apply_gate
from forcetune.kernels.compiled.gate_layout import GateShape
from forcetune.kernels.compiled.gated_layer import FixedLayer
from forcetune.kernels.gain import LARGEST_EXPONENT, GainKind, gain_and_slope

pytestmark = pytest.mark.skipif(choice.missing_reason() is not None, reason="there are no compiled kernels")

# rank, scalars that drive it, and blocks: whether it is a gain, components, channels
CASES = {
    "whole vectors": (16, 32, ((False, 1, 32), (True, 3, 32), (True, 5, 16))),
    "odd widths": (3, 7, ((False, 1, 5), (True, 3, 9), (True, 1, 1))),
    "one output": (16, 16, ((False, 1, 1),)),
    "gains alone": (5, 33, ((True, 7, 17),)),
    "two shifts": (20, 4, ((False, 1, 3), (False, 1, 18), (True, 3, 20))),
}


class Inputs:
    """A gate with its weights and blocks; one gain is beyond the largest exponent."""

    def __init__(
        self,
        case: str,
        atoms: int,
        *,
        activation: bool = True,
        gain: str = "exp",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        rank, n_in, blocks = CASES[case]
        self.shape = GateShape(activation, gain, rank, n_in, blocks)
        self.gate = Gate(self.shape, self.shape.flat, self.reference)
        generator = torch.Generator().manual_seed(3)

        def random(*size: int) -> Tensor:
            return (torch.randn(*size, generator=generator, dtype=dtype) / 2).requires_grad_()

        self.counts = [sum(channels for is_gain, _, channels in blocks if is_gain == kind) for kind in (False, True)]
        self.weights = [random(rank, n_in), random(rank)]
        for count in self.counts:
            self.weights += [random(count, rank), random(count)] if count else []
        if self.counts[1]:
            with torch.no_grad():
                self.weights[-1][0] = 13.0
        self.h = random(atoms, 1, n_in)
        self.y = [random(atoms, dim, channels) for _, dim, channels in blocks]
        self.g = [random(*block.shape) for block in self.y]

    def compiled(self) -> Sequence[Tensor]:
        return apply_gate(self.gate, self.h, self.weights, self.y)

    def plain(self) -> Sequence[Tensor]:
        return self.reference(self.h, self.weights, self.y)

    def reference(self, h: Tensor, weights: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
        hidden = functional.linear(h[:, 0], weights[0], weights[1])
        hidden = functional.silu(hidden) if self.shape.activation else hidden
        rest = iter([functional.linear(hidden, *weights[place : place + 2]) for place in range(2, len(weights), 2)])
        left = [next(rest) if count else None for count in self.counts]
        out: list[Tensor] = []
        for block, (is_gain, _, channels) in zip(y, self.shape.blocks, strict=True):
            values = left[is_gain]
            assert values is not None
            own, left[is_gain] = values[:, :channels].unsqueeze(1), values[:, channels:]
            if is_gain:
                assert self.shape.gain in ("exp", "linear")
                out.append(block * gain_and_slope("exp" if self.shape.gain == "exp" else "linear", own)[0])
            else:
                out.append(block + own)
        return out

    def derivatives(self, out: Sequence[Tensor]) -> list[Tensor]:
        """Outputs, forces, gradients of a loss of both by everything, and its gradients by weights differentiated."""
        geometry = [self.h, *self.y]
        everything = [*geometry, *self.weights, *self.g]
        forces = torch.autograd.grad(out, geometry, self.g, create_graph=True)
        waves = [torch.linspace(-1, 2, f.numel(), dtype=f.dtype).view(f.shape).cos() for f in forces]
        loss = sum((f * wave).sum() for f, wave in zip(forces, waves, strict=True))
        loss = loss + sum(o.square().sum() for o in out) / 5
        first = torch.autograd.grad(loss, everything, retain_graph=True)
        by_weights = torch.autograd.grad(loss, self.weights, create_graph=True)
        third = torch.autograd.grad(sum(w.square().sum() for w in by_weights), everything, allow_unused=True)
        return [*out, *forces, *first, *(torch.zeros(1) if value is None else value for value in third)]


def assert_same(one: Sequence[Tensor], other: Sequence[Tensor], tolerance: float) -> None:
    """Within the tolerance of the largest value of each."""
    for mine, theirs in zip(one, other, strict=True):
        largest = max(1.0, float(theirs.detach().abs().max()))
        assert torch.allclose(mine, theirs, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("atoms", [1, 16, 21])
@pytest.mark.parametrize("activation, gain", [(True, "exp"), (False, "linear")])
def test_equals_the_operations_up_to_third_derivatives(case: str, atoms: int, activation: bool, gain: str) -> None:
    inputs = Inputs(case, atoms, activation=activation, gain=gain)
    assert_same(inputs.derivatives(inputs.compiled()), inputs.derivatives(inputs.plain()), 1e-12)


@pytest.mark.parametrize("case", ["odd widths", "two shifts"])
def test_derivatives_are_those_of_finite_differences(case: str) -> None:
    inputs = Inputs(case, 2)
    with torch.no_grad():  # differences of e^13 would be rounded away
        inputs.weights[-1][0] = 0.5
    leaves = [inputs.h, *inputs.weights, *inputs.y]
    n = 1 + len(inputs.weights)

    def whole(*values: Tensor) -> tuple[Tensor, ...]:
        return apply_gate(inputs.gate, values[0], values[1:n], values[n:])

    assert torch.autograd.gradcheck(whole, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(whole, leaves, fast_mode=True)


def test_single_precision_and_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 within 1e-5 of the largest value; sums over atoms come in another order on several threads."""
    inputs = Inputs("two shifts", 50, dtype=torch.float32)
    with torch.no_grad():
        inputs.weights[-1][0] = 0.5
    expected = inputs.derivatives(inputs.plain())
    alone = inputs.derivatives(inputs.compiled())
    monkeypatch.setattr(threads, "thread_count", lambda _: 3)
    together = inputs.derivatives(inputs.compiled())
    assert_same(alone, expected, 2e-5)
    assert_same(together, expected, 2e-5)


def test_forces_do_not_wait_for_gradients_by_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from forcetune.kernels.compiled import gate

    wanted: list[tuple[bool, bool]] = []
    pull = gate.pull

    def watched(*arguments: object) -> list[Tensor]:
        wanted.append(arguments[-1])  # pyright: ignore[reportArgumentType]
        return pull(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(gate, "pull", watched)
    inputs = Inputs("whole vectors", 3)
    out = inputs.compiled()
    torch.autograd.grad(out, [inputs.h, *inputs.y], inputs.g, create_graph=True)
    torch.autograd.grad(out, inputs.weights[:1], inputs.g, retain_graph=True)
    sum(o.sum() for o in out).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert wanted[0] == (True, False)
    assert wanted[1][1] is wanted[2][1] is True
    assert all(weight.grad is not None for weight in inputs.weights)


@pytest.mark.parametrize("gain, bias", [("exp", 0), ("exp", LARGEST_EXPONENT), ("linear", 0)])
@pytest.mark.parametrize("count", [1, 3])
def test_a_whole_layer(count: int, gain: GainKind, bias: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two outputs of one input, an input that no output has, and an output that the gate leaves alone.

    A large bias lets some exponentials go on as their tangent.
    """
    monkeypatch.setattr(threads, "thread_count", lambda _: count)
    shape = GateShape(True, gain, 5, 9, ((False, 1, 6), (True, 3, 11)))
    generator = torch.Generator().manual_seed(4)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) / math.sqrt(size[-1])

    weights = [random(5, 9), random(5), random(6, 5), random(6), random(11, 5), random(11)]
    weights[5] += bias
    matrices = [random(9, 6), random(7, 11), random(7, 33)]
    blocks = [(1, 2, 1), (0, 0, 3), (0, 1, 3)]
    layer = FixedLayer(shape, weights, matrices, blocks, [2, 0], 1)
    # the layer names blocks in the order of the gate: its shift is that of output 2, its gain that of output 0
    inputs = [random(37, 3, 7).requires_grad_(), random(37, 1, 9).requires_grad_(), random(37, 5, 2)]
    outputs, kept = layer.value([x.detach() for x in inputs])
    hidden = functional.silu(functional.linear(inputs[1][:, 0], weights[0], weights[1]))
    change = functional.linear(hidden, weights[4], weights[5])
    beyond = int((change > LARGEST_EXPONENT).sum())
    assert 0 < beyond < change.numel() if bias else beyond == 0
    gains, _ = gain_and_slope(gain, change)
    expected = [
        inputs[0] @ matrices[1] * gains.unsqueeze(1),
        inputs[0] @ matrices[2],
        inputs[1] @ matrices[0] + functional.linear(hidden, weights[2], weights[3]).unsqueeze(1),
    ]
    assert_same(outputs, expected, 1e-13)
    grads = [random(*out.shape) for out in expected]
    found = layer.pull([x.detach() for x in inputs], outputs, grads, kept)
    assert found[2] is None
    assert found[0] is not None and found[1] is not None
    assert_same(found[:2], torch.autograd.grad(expected, inputs[:2], grads), 1e-13)  # pyright: ignore[reportArgumentType]


def test_no_atoms() -> None:
    inputs = Inputs("whole vectors", 0)
    assert [tuple(out.shape) for out in inputs.compiled()] == [(0, 1, 32), (0, 3, 32), (0, 5, 16)]
    sum(o.sum() for o in inputs.compiled()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert inputs.weights[0].grad is not None and not inputs.weights[0].grad.any()


def test_what_is_not_a_number_stays() -> None:
    inputs = Inputs("whole vectors", 2)
    with torch.no_grad():
        inputs.h[0, 0, 3] = math.nan
        inputs.h[1, 0, 3] = -1e6
    one, other = inputs.compiled(), inputs.plain()
    assert all(bool(out[0].isnan().all()) for out in one)
    assert_same([out[1] for out in one], [out[1] for out in other], 1e-12)
