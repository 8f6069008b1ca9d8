"""The gate's formula, its ablation switches, and the traps of the published one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from forcetune.adapters.updates.gate import Gate, GateActivation, gain_and_slope
from forcetune.backbones.protocol import Site, WeightPath
from forcetune.irreps import merge_neighbours, parse_irreps
from forcetune.kernels.compiled.choice import Kernels
from forcetune.kernels.features import Features, make_features
from forcetune.kernels.fixed_gate import FixedWeights
from forcetune.kernels.gated_linear import gated_linear
from forcetune.kernels.layers import EquivariantLinear
from forcetune.kernels.tensors import TensorSource


def site(irreps_in: str, irreps_out: str) -> Site:
    return Site(
        "layer.weight", "layer", "weight", "layer", "linear", (WeightPath("all", 0, (1, 1)),), irreps_in, irreps_out
    )


def gate(irreps_in: str, irreps_out: str, **options: object) -> GateActivation:
    torch.manual_seed(0)
    made = Gate(**options).build(site(irreps_in, irreps_out), torch.zeros(1, dtype=torch.float64))  # pyright: ignore[reportArgumentType]
    assert isinstance(made, GateActivation)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def test_formula_of_the_paper() -> None:
    made = gate("3x0e+2x1o", "2x0e+2x1o", rank=4)
    inputs, outputs = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    hidden = functional.silu(inputs[:, :3] @ made.down.weight.T + made.down.bias)
    assert made.shift is not None
    assert made.gain is not None
    shift = hidden @ made.shift.weight.T + made.shift.bias
    gain = torch.exp(hidden @ made.gain.weight.T + made.gain.bias)
    actual = made(inputs, outputs)
    torch.testing.assert_close(actual[:, :2], outputs[:, :2] + shift, rtol=1e-12, atol=0)
    torch.testing.assert_close(actual[:, 2:5], outputs[:, 2:5] * gain[:, :1], rtol=1e-12, atol=0)
    torch.testing.assert_close(actual[:, 5:8], outputs[:, 5:8] * gain[:, 1:], rtol=1e-12, atol=0)


def test_odd_scalars_get_a_gain_and_no_shift_and_drive_nothing() -> None:
    made = gate("2x0o+3x0e", "2x0o+1x0e", rank=4)
    inputs = torch.randn(4, 5, dtype=torch.float64)
    outputs = torch.zeros(4, 3, dtype=torch.float64)
    actual = made(inputs, outputs)
    assert torch.equal(actual[:, :2], torch.zeros(4, 2, dtype=torch.float64))
    mirrored = torch.cat([-inputs[:, :2], inputs[:, 2:]], dim=1)
    assert torch.equal(made(mirrored, outputs), actual)


def test_several_scalar_blocks_each_get_their_own_slice() -> None:
    apart = gate("1x0e+1x1o+2x0e", "2x0e+1x1o+1x0e", rank=3)
    inputs, outputs = torch.randn(2, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64)
    actual = apart(inputs, outputs)
    hidden = functional.silu(inputs[:, [0, 4, 5]] @ apart.down.weight.T + apart.down.bias)
    assert apart.shift is not None
    expected = hidden @ apart.shift.weight.T + apart.shift.bias
    torch.testing.assert_close(actual[:, [0, 1, 5]], expected, rtol=1e-12, atol=0)
    assert len({round(float(value), 12) for value in actual.detach()[0, [0, 1, 5]]}) == 3


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 4), (0,)])
def test_any_batch_shape(batch: tuple[int, ...]) -> None:
    made = gate("3x0e+2x1o", "2x0e+2x1o")
    inputs, outputs = torch.randn(*batch, 9, dtype=torch.float64), torch.randn(*batch, 8, dtype=torch.float64)
    actual = made(inputs, outputs)
    assert actual.shape == outputs.shape
    flat = made(inputs.reshape(-1, 9), outputs.reshape(-1, 8))
    torch.testing.assert_close(actual.reshape(-1, 8), flat, rtol=1e-12, atol=1e-14)


@given(st.floats(-1e4, 1e4))
@settings(max_examples=60, deadline=None)
def test_gain_cannot_overflow_and_is_smooth(x: float) -> None:
    for dtype in (torch.float32, torch.float64):
        value = torch.tensor(x, dtype=dtype, requires_grad=True)
        gain, slope = gain_and_slope("exp", value)
        assert torch.equal(torch.autograd.grad(gain, value)[0], slope)
        assert bool(torch.isfinite(gain))
        assert bool(torch.isfinite(slope))
        assert float(gain.detach()) >= 0
        if x <= 10:
            assert float(gain.detach()) == pytest.approx(float(torch.exp(value.detach())), rel=1e-6)


def test_switches_take_out_their_part() -> None:
    inputs, outputs = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    without_shift = gate("3x0e+2x1o", "2x0e+2x1o", shift=False)
    assert torch.equal(without_shift(inputs, outputs)[:, :2], outputs[:, :2])
    without_gain = gate("3x0e+2x1o", "2x0e+2x1o", modulation=False)
    assert torch.equal(without_gain(inputs, outputs)[:, 2:], outputs[:, 2:])
    shared = gate("3x0e+2x1o", "2x0e+2x1o", shared_gain=True)(inputs, outputs)[:, 2:] / outputs[:, 2:]
    torch.testing.assert_close(shared, shared[:, :1].expand(-1, 6), rtol=1e-12, atol=0)
    linear = gate("3x0e+2x1o", "2x0e+2x1o", gain="linear", activation=False)
    assert linear.gain is not None
    raw = (inputs[:, :3] @ linear.down.weight.T + linear.down.bias) @ linear.gain.weight.T + linear.gain.bias
    torch.testing.assert_close(linear(inputs, outputs)[:, 2:5], outputs[:, 2:5] * (1 + raw[:, :1]), rtol=1e-12, atol=0)
    apart = gate("3x0e+2x1o", "2x0e+2x1o", rank=4, shared_bottleneck=False)
    assert sum(p.numel() for p in apart.parameters()) == 2 * (3 * 4 + 4) + (4 * 2 + 2) + (4 * 2 + 2)
    random_start = Gate(shift_init=0.001).build(site("3x0e", "2x0e"), torch.zeros(1))
    assert random_start.shift is not None
    assert 0 < float(random_start.shift.weight.detach().std()) < 0.01


def test_layers_that_a_gate_leaves_alone_say_why() -> None:
    assert Gate().unsupported_reason(site("2x0o+1x1o", "1x0e")) == "its input has no even scalars to drive a gate"
    assert "no channels" in (Gate(shift=False).unsupported_reason(site("2x0e", "2x0e")) or "")
    assert Gate().unsupported_reason(site("2x0e", "2x1o")) is None
    with pytest.raises(ValueError, match="does nothing"):
        Gate(shift=False, modulation=False)


OPTIONS: dict[str, dict[str, object]] = {
    "as published": {},
    "no shift": {"shift": False},
    "no gain": {"modulation": False},
    "shared gain": {"shared_gain": True},
    "no activation": {"activation": False},
    "1 + x": {"gain": "linear"},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("irreps_in", ["3x0e+2x1o", "2x1o+1x0e+2x0e", "2x0e+1x1o+1x0e"])
def test_constant_weights_on_blocks_give_the_same_with_all_derivatives(option: str, irreps_in: str) -> None:
    """What the kernels hand over is by blocks, neighbours of one irrep as one; twice differentiated, too."""
    made = gate(irreps_in, "2x0e+2x1o+1x2e", rank=4, **OPTIONS[option])
    made.requires_grad_(False)
    blocks = merge_neighbours(parse_irreps(irreps_in))
    layouts = tuple((block.dim, block.multiplicity) for block in blocks), ((1, 2), (3, 2), (5, 1))
    flat = [torch.randn(4, width, dtype=torch.float64, requires_grad=True) for width in (9, 13)]
    weights = torch.randn(4, 13, dtype=torch.float64)

    def by_blocks(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        given = [make_features(part, layout) for part, layout in zip((inputs, outputs), layouts, strict=True)]
        actual = made(*given)
        assert isinstance(actual, Features)
        return actual.flat

    expected, actual = made(*flat), by_blocks(*flat)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)
    for twice in (False, True):
        mine, theirs = (
            torch.autograd.grad((value * weights).sin().sum(), flat, create_graph=twice, retain_graph=True)
            for value in (actual, expected)
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)
        if twice:
            seconds = [
                torch.autograd.grad([one.square().sum() for one in grads], flat, retain_graph=True)
                for grads in (mine, theirs)
            ]
            torch.testing.assert_close(*seconds, rtol=1e-10, atol=1e-12)


def linear_layer(irreps_in: str, irreps_out: str) -> EquivariantLinear:
    torch.manual_seed(1)
    return EquivariantLinear(irreps_in, irreps_out, TensorSource(None)).double()


LAYERS = {
    "all": ("3x0e+2x1o", "2x0e+2x1o"),
    "outputs in another order": ("2x1o+3x0e+2x2e", "2x2e+2x0e+3x1o"),
    "scalars only": ("3x0e+2x1o", "4x0e"),
    "no scalars come out": ("3x0e+2x1o", "2x1o"),
    "odd scalars": ("2x0o+3x0e+1x1o", "3x0o+2x0e+2x1o"),
    "scalars in two places": ("3x0e+2x1o", "2x0e+2x1o+1x0e"),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_layer_together_with_its_gate_is_one_after_the_other(
    option: str, kind: str, trains: bool, kernels: Kernels
) -> None:
    """Outputs, gradients by inputs and weights, and gradients of gradients."""
    layer = linear_layer(*LAYERS[kind])
    if not trains:
        layer.requires_grad_(False)
    own = next(layer.sites("layer"))
    if Gate(**OPTIONS[option]).unsupported_reason(own) is not None:  # pyright: ignore[reportArgumentType]
        pytest.skip("such a gate leaves this layer alone")
    made = gate(*LAYERS[kind], rank=4, **OPTIONS[option])
    made.requires_grad_(trains)
    structure = made.structure_on(layer)
    assert structure is not None
    layout = [(block.dim, block.multiplicity) for block in parse_irreps(layer.irreps_in)]
    torch.manual_seed(2)
    inputs = [torch.randn(4, *shape, dtype=torch.float64, requires_grad=True) for shape in layout]
    leaves = [*inputs, *(p for p in (*layer.parameters(), *made.parameters()) if p.requires_grad)]
    after = made(given := Features(inputs, geometric=True, trains=False), layer(given))  # pyright: ignore[reportArgumentType]
    assert isinstance(after, Features)
    together = gated_linear(structure, layer.weight, made.weights(), inputs, FixedWeights(structure), kernels)
    torch.testing.assert_close(list(together), list(after.blocks), rtol=1e-12, atol=1e-13)

    def derivatives(blocks: Sequence[torch.Tensor], twice: bool) -> tuple[torch.Tensor, ...]:
        value = torch.stack([(block * (1 + k) + block**2).sum() for k, block in enumerate(blocks)]).sum()
        first = torch.autograd.grad(value, leaves, create_graph=twice, retain_graph=True, materialize_grads=True)
        if not twice:
            return first
        squares = torch.stack([one.square().sum() for one in first]).sum()
        return torch.autograd.grad(squares, leaves, retain_graph=True, materialize_grads=True)

    for twice in (False, True):
        actual, expected = derivatives(together, twice), derivatives(after.blocks, twice)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_layers_that_cannot_be_computed_together_with_a_gate() -> None:
    layer = linear_layer("3x0e+2x1o", "2x0e+2x1o")
    assert gate("3x0e+2x1o", "2x0e+2x1o", shared_bottleneck=False).structure_on(layer) is None
    torch.manual_seed(0)
    biased = EquivariantLinear("3x0e", "2x0e", TensorSource(None), biases=True)
    assert gate("3x0e", "2x0e").structure_on(biased) is None


@pytest.mark.parametrize("kernels", ["torch", "compiled"])
def test_second_derivatives_of_fixed_weights_for_inputs_that_are_slices(kernels: Kernels) -> None:
    layer, made = linear_layer("3x0e+2x1o", "2x0e+2x1o").requires_grad_(False), gate("3x0e+2x1o", "2x0e+2x1o")
    made.requires_grad_(False)
    structure = made.structure_on(layer)
    assert structure is not None
    flat = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)

    def function(values: torch.Tensor) -> torch.Tensor:
        blocks = [values[:, :3].unsqueeze(1), values[:, 3:].view(4, 2, 3).transpose(1, 2)]
        assert not blocks[1].is_contiguous()
        outputs = gated_linear(structure, layer.weight, made.weights(), blocks, FixedWeights(structure), kernels)
        return sum(((index + 1) * (output**2).sum() for index, output in enumerate(outputs)), torch.zeros(()))

    assert torch.autograd.gradgradcheck(function, (flat,), atol=1e-6)


def test_fixed_weights_follow_every_change() -> None:
    layer, made = linear_layer("3x0e+2x1o", "2x0e+2x1o").requires_grad_(False), gate("3x0e+2x1o", "2x0e+2x1o")
    made.requires_grad_(False)
    structure = made.structure_on(layer)
    assert structure is not None
    fixed = FixedWeights(structure)
    inputs = [torch.randn(4, dim, n, dtype=torch.float64, requires_grad=True) for dim, n in ((1, 3), (3, 2))]

    def difference() -> float:
        given = Features(inputs, geometric=True, trains=False)
        after = made(given, layer(given))  # pyright: ignore[reportArgumentType]
        assert isinstance(after, Features)
        together = gated_linear(structure, layer.weight, made.weights(), inputs, fixed)
        pairs = zip(together, after.blocks, strict=True)
        # gains grow exponentially with the weights, and so does what rounding leaves
        return max(float(((one - two).abs() / two.abs().clamp(min=1)).detach().max()) for one, two in pairs)

    assert difference() < 1e-13
    assert fixed.prepare(layer.weight, made.weights()) is fixed.prepare(layer.weight, made.weights())
    for parameter in (layer.weight, *made.parameters()):
        parameter.data.mul_(1.5)  # does not count as a change of the parameter's version
        parameter.detach().add_(0.25)
        assert difference() < 1e-13
        parameter.data = parameter.data + 0.25
        assert difference() < 1e-13
