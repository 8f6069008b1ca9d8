"""Linear layers, convolution, gates and radial networks against those of e3nn and mace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forcetune.backbones.mace.library import import_mace
from forcetune.irreps import merge_neighbours, parse_irreps
from forcetune.kernels import radial
from forcetune.kernels.edge_plan import make_plan
from forcetune.kernels.features import Features, make_features
from forcetune.kernels.harmonics import SphericalHarmonics, wigner_3j
from forcetune.kernels.layers import (
    Convolution,
    EquivariantLinear,
    GatedActivation,
    SpeciesLinear,
    TensorPath,
    channelwise_paths,
    layout_for,
)
from forcetune.kernels.phase import Phase
from forcetune.kernels.step import Step, can_train
from forcetune.kernels.tensors import TensorSource, UnfitError
from models import default_dtype
from systems import cluster

EXACT = 1e-12


@pytest.fixture(autouse=True)
def _double() -> Any:
    """mace and e3nn make their layers in PyTorch's default precision."""
    import_mace()
    with default_dtype(torch.float64), torch.random.fork_rng():
        torch.manual_seed(4)
        yield


def source_of(layer: nn.Module, constants: dict[str, Tensor] | None = None) -> TensorSource:
    stored = dict(layer.named_parameters()) | {
        name: value for name, value in layer.named_buffers() if "_compiled" not in name
    }
    return TensorSource(stored, constants)


def same(actual: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    assert actual.shape == expected.shape
    if expected.numel():
        scale = max(1.0, float(expected.detach().abs().max()))
        assert float((actual - expected).detach().abs().max()) <= tolerance * scale


def same_gradients(actual: Tensor, expected: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Of a function of both outputs, by pairs of inputs or weights."""
    weight = torch.linspace(-1, 2, expected.numel()).view(expected.shape)
    gradients = [
        torch.autograd.grad(
            (value * weight).sum() + value.square().sum(), inputs, allow_unused=True, materialize_grads=True
        )
        for value, inputs in zip((actual, expected), zip(*pairs, strict=True), strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        same(one.reshape(other.shape), other, 1e-11)


def as_features(flat: Tensor, irreps: str) -> Features:
    return make_features(flat, layout_for(merge_neighbours(parse_irreps(irreps))))


# ---- linear ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("irreps_in", "irreps_out"),
    [
        ("4x0e+3x1o", "5x0e+2x1o"),
        ("4x0e+3x1o+2x2e", "1x0e"),
        ("2x0e+2x0e+3x1o+1x1o", "3x0e+2x1o"),
        ("3x0o+4x0e+2x1o+2x1e", "2x0o+2x0e+3x1o+1x1e"),
        ("4x0e", "3x1o"),  # nothing reaches the output
        ("4x0e+2x1o", "3x0e+2x1o+2x2e"),
    ],
)
@pytest.mark.parametrize("biases", [False, True])
def test_linear_layers(irreps_in: str, irreps_out: str, biases: bool) -> None:
    from e3nn import o3

    theirs = o3.Linear(irreps_in, irreps_out, biases=biases)
    if biases and theirs.bias.numel():
        theirs.bias.data.normal_()
    ours = EquivariantLinear(irreps_in, irreps_out, source_of(theirs), biases=biases)
    x = torch.randn(7, theirs.irreps_in.dim, requires_grad=True)
    outputs, expected = ours(as_features(x, irreps_in)), theirs(x)
    same(outputs.flat, expected)
    if expected.requires_grad:
        named, mine = dict(theirs.named_parameters()), dict(ours.named_parameters())
        pairs = [(mine[name], named[name]) for name in named if named[name].numel()]
        same_gradients(outputs.flat, expected, [(x, x), *pairs])
    sites = list(ours.sites("a.b"))
    assert [site.name for site in sites] == ["a.b.weight"]
    assert sites[0].numel == ours.weight.numel() and sites[0].kind == "linear"
    stops = [path.start + path.size for path in sites[0].paths]
    assert [path.start for path in sites[0].paths] == [0, *stops[:-1]][: len(stops)]


def test_linear_layers_with_outputs_twice_in_a_row_are_refused() -> None:
    with pytest.raises(UnfitError, match="one irrep twice in a row"):
        EquivariantLinear("4x0e", "2x0e+2x0e", TensorSource(None))
    with pytest.raises(UnfitError, match="has a bias"):
        EquivariantLinear("4x0e", "2x1o", TensorSource({"weight": torch.zeros(0), "bias": torch.ones(2)}))


@pytest.mark.parametrize(
    ("irreps_in", "irreps_out"),
    [
        ("4x0e+3x1o", "4x0e+2x1o"),
        ("2x0e+2x1o+2x2e", "3x0e"),
        ("2x0o+2x0e+2x1e", "2x0o+3x0e+1x1e"),
        ("3x0e", "3x0e+3x1o"),
    ],
)
@pytest.mark.parametrize("carried", [False, True], ids=["exact couplings", "couplings of the file"])
def test_linear_layers_for_each_species(irreps_in: str, irreps_out: str, carried: bool) -> None:
    from e3nn import o3

    theirs = o3.FullyConnectedTensorProduct(irreps_in, "4x0e", irreps_out)
    constants = {}
    if carried:  # rounded, as of a model made in float32
        for name, value in theirs.named_buffers():
            if "_w3j_" in name:
                value.copy_(value.float().double())
                constants[name.rpartition(".")[2]] = value
    ours = SpeciesLinear(irreps_in, irreps_out, 4, source_of(theirs, constants))
    species = torch.tensor([3, 0, 0, 1, 3, 3])
    step = step_for(species)
    x = torch.randn(6, theirs.irreps_in1.dim, requires_grad=True)
    outputs = ours(as_features(x[step.plan.order], irreps_in), step).flat[step.plan.place]
    expected = theirs(x, nn.functional.one_hot(species, 4).double())
    same(outputs, expected)
    same_gradients(outputs, expected, [(x, x), (ours.weight, theirs.weight)])
    (site,) = ours.sites("skip")
    assert site.kind == "tensor_product" and site.numel == theirs.weight_numel


def test_couplings_that_are_none_are_refused() -> None:
    from e3nn import o3

    theirs = o3.FullyConnectedTensorProduct("2x1o", "2x0e", "2x1o")
    for wrong in (2 * wigner_3j(1, 0, 1), torch.zeros(1)):
        with pytest.raises(UnfitError, match="_w3j_1_0_1 has other values"):
            SpeciesLinear("2x1o", "2x1o", 2, source_of(theirs, {"_w3j_1_0_1": wrong}))


# ---- convolution ----------------------------------------------------------------------------------------------------


PRODUCTS = [
    ("4x0e", "1x0e+1x1o+1x2e", "4x0e+4x1o+4x2e"),
    ("3x0e+3x1o", "1x0e+1x1o+1x2e+1x3o", "3x0e+3x1o+3x2e+3x3o"),
    ("3x0e+2x1o", "1x0e+1x1o", "1x0o+1x0e+1x1o+1x1e"),
    ("2x0o+2x0e+2x1o+2x1e", "1x0e+1x1o+1x2e", "2x0o+2x0e+2x1o+2x1e+2x2o+2x2e"),
    ("2x0e+2x1e", "1x0e+1x1e+1x2e", "2x0e+2x1e"),
]


@pytest.mark.parametrize(("irreps_in", "harmonics", "targets"), PRODUCTS)
def test_paths_are_those_of_mace(irreps_in: str, harmonics: str, targets: str) -> None:
    from e3nn import o3
    from mace.modules.irreps_tools import tp_out_irreps_with_instructions

    arguments = (o3.Irreps(irreps_in), o3.Irreps(harmonics), o3.Irreps(targets))
    irreps_mid, instructions = tp_out_irreps_with_instructions(*arguments)
    paths, irreps = channelwise_paths(irreps_in, harmonics, targets)
    assert irreps == str(irreps_mid)
    assert paths == [TensorPath(*row[:3]) for row in instructions]
    assert all(row[3:] == ("uvu", True) for row in instructions)


@pytest.mark.parametrize(("irreps_in", "harmonics", "targets"), PRODUCTS)
@pytest.mark.parametrize("paired", [True, False])
def test_messages_are_those_of_a_tensor_product_over_edges(
    irreps_in: str, harmonics: str, targets: str, paired: bool
) -> None:
    from e3nn import o3

    from forcetune.frames.neighbor_list import neighbours

    paths, irreps_mid = channelwise_paths(irreps_in, harmonics, targets)
    instructions = [(path.source, path.harmonic, path.target, "uvu", True) for path in paths]
    theirs = o3.TensorProduct(
        irreps_in, harmonics, irreps_mid, instructions, shared_weights=False, internal_weights=False
    )
    ours = Convolution(irreps_in, harmonics, paths, irreps_mid, TensorSource(None))
    assert ours.weight_numel == theirs.weight_numel
    atoms = cluster(atoms=6)
    edges, shifts = (torch.tensor(part) for part in neighbours(atoms.positions, atoms.cell.array, atoms.pbc, 3.0))
    plan = make_plan(edges, shifts, torch.tensor(atoms.numbers % 4), paired=paired)
    positions = torch.tensor(atoms.positions, requires_grad=True)
    highest = len(harmonics.split("+")) - 1
    vectors = positions[plan.order][plan.receiver] - positions[plan.order][plan.sender]
    spherical = SphericalHarmonics(highest)(vectors, torch.linalg.vector_norm(vectors, dim=1, keepdim=True))
    weights = torch.randn(plan.n_pairs, ours.weight_numel, requires_grad=True)
    x = torch.randn(len(atoms), theirs.irreps_in1.dim, requires_grad=True)
    step = Step(plan, Phase(), spherical, weights, None, torch.zeros(len(atoms), 1))
    outputs = ours(step, weights, as_features(x[plan.order], irreps_in), True)
    assert outputs.layout == layout_for(parse_irreps(ours.irreps_out))

    sender, receiver = edges
    directions = positions[receiver] - positions[sender]
    angles = o3.spherical_harmonics(list(range(highest + 1)), directions, True, "component")
    messages = theirs(x[sender], angles, weights[plan.edge_pair])
    expected = torch.zeros(len(atoms), messages.shape[1]).index_add(0, receiver, messages)
    same(outputs.flat[plan.place], expected)
    same_gradients(outputs.flat[plan.place], expected, [(x, x), (weights, weights), (positions, positions)])


# ---- gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("irreps", ["4x0e+3x1o", "4x0e+3x1o+2x2e", "2x0e+2x1o+2x1e+2x2e", "5x0e"])
def test_gates_are_those_of_e3nn(irreps: str) -> None:
    from e3nn import o3
    from e3nn.nn import Gate

    blocks = o3.Irreps(irreps)
    scalars = o3.Irreps([(mul, ir) for mul, ir in blocks if ir.l == 0])
    gated = o3.Irreps([(mul, ir) for mul, ir in blocks if ir.l])
    gates = o3.Irreps([(mul, "0e") for mul, _ in gated])
    theirs = Gate(scalars, [nn.functional.silu], gates, [torch.sigmoid] * len(gates), gated)
    ours = GatedActivation(irreps)
    assert ours.irreps_in == str(theirs.irreps_in) and ours.irreps_out == str(theirs.irreps_out)
    x = torch.randn(5, theirs.irreps_in.dim, requires_grad=True)
    outputs, expected = ours(as_features(x, ours.irreps_in)).flat, theirs(x)
    same(outputs, expected)
    same_gradients(outputs, expected, [(x, x)])


@pytest.mark.parametrize("irreps", ["3x1o", "3x1o+4x0e", "2x0e+2x0e+3x1o", "2x0o+2x0e+3x1o"])
def test_other_gates_are_refused(irreps: str) -> None:
    with pytest.raises(UnfitError, match="gated activation"):
        GatedActivation(irreps)


# ---- radial ---------------------------------------------------------------------------------------------------------


def lengths_for(count: int = 40, cutoff: float = 4.0) -> Tensor:
    lengths = torch.linspace(0.4, cutoff + 0.3, count).unsqueeze(1)
    return torch.cat([lengths, torch.tensor([[cutoff]])]).requires_grad_()


@pytest.mark.parametrize("name", ["bessel", "gaussian", "chebyshev", "cutoff"])
@pytest.mark.parametrize("fresh", [True, False])
def test_radial_bases(name: str, fresh: bool) -> None:
    from mace.modules import radial as library

    made: dict[str, Any] = {
        "bessel": library.BesselBasis(r_max=4.0, num_basis=6),
        "gaussian": library.GaussianBasis(r_max=4.0, num_basis=6),
        "chebyshev": library.ChebychevBasis(r_max=4.0, num_basis=6),
        "cutoff": library.PolynomialCutoff(r_max=4.0, p=5),
    }
    theirs = made[name]
    if name == "bessel" and not fresh:
        theirs.bessel_weights *= 1.01
    source = TensorSource(None) if fresh else source_of(theirs)
    ours = {
        "bessel": lambda: radial.BesselBasis(4.0, 6, source),
        "gaussian": lambda: radial.GaussianBasis(4.0, 6, source),
        "chebyshev": lambda: radial.ChebyshevBasis(6, source),
        "cutoff": lambda: radial.PolynomialCutoff(4.0, 5, source),
    }[name]()
    x = lengths_for()
    outputs, expected = ours(x), theirs(x)
    same(outputs, expected)
    if expected.requires_grad:
        same_gradients(outputs, expected, [(x, x)])
    else:
        assert name == "chebyshev" and not outputs.requires_grad
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


@pytest.mark.parametrize("name", ["AgnesiTransform", "SoftTransform", "ZBLBasis"])
@pytest.mark.parametrize("fresh", [True, False])
def test_radial_functions_of_elements(name: str, fresh: bool) -> None:
    from mace.modules import radial as library

    theirs = getattr(library, name)(**({"p": 5} if name == "ZBLBasis" else {}))
    source = TensorSource(None) if fresh else source_of(theirs)
    kinds = {"AgnesiTransform": radial.AgnesiTransform, "SoftTransform": radial.SoftTransform}
    ours = radial.ZBLRepulsion(5, source) if name == "ZBLBasis" else kinds[name](source)
    table = torch.tensor([1, 6, 8, 26, 79])
    x = lengths_for(30, 3.0)
    edges = torch.randint(0, 5, (2, len(x)))
    attributes = nn.functional.one_hot(torch.arange(5), 5).double()
    first, second = table[edges[0]], table[edges[1]]
    expected = theirs(x, attributes, edges, table)
    outputs = ours(x, first, second)
    if name == "ZBLBasis":  # mace adds them up at the receivers
        outputs = torch.zeros(5).index_add(0, edges[1], outputs[:, 0])
    same(outputs.reshape(expected.shape), expected)
    same_gradients(outputs.reshape(expected.shape), expected, [(x, x)])
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


def test_soft_transform_of_earlier_versions() -> None:
    """r + (1 − tanh(s + a sᵇ)) / 2 with s = r over a quarter of the sum of radii."""
    stored = {"a": torch.tensor(0.2), "b": torch.tensor(3.0), "covalent_radii": radial.RADII}
    x = lengths_for(20, 3.0)
    first, second = torch.full((21,), 6), torch.full((21,), 8)
    outputs = radial.SoftTransform(TensorSource(stored))(x, first, second)
    s = x / ((radial.RADII[6] + radial.RADII[8]) / 4)
    same(outputs, x + 0.5 * (1 - torch.tanh(s + 0.2 * s**3)))


@pytest.mark.parametrize("widths", [(6, 8), (6, 16, 8), (6, 16, 12, 9)])
def test_radial_networks(widths: tuple[int, ...]) -> None:
    from e3nn.nn import FullyConnectedNet
    from mace.modules.radial import RadialMLP

    x = torch.randn(11, 6, requires_grad=True)
    plain, normed = FullyConnectedNet(list(widths), nn.functional.silu), RadialMLP(list(widths))
    for theirs, kind in ((plain, radial.RadialNetwork), (normed, radial.NormedRadialNetwork)):
        for parameter in theirs.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        ours = kind(widths, source_of(theirs))
        named, mine = dict(theirs.named_parameters()), dict(ours.named_parameters())
        assert list(named) == list(mine)
        outputs, expected = ours(x), theirs(x)
        same(outputs, expected)
        same_gradients(outputs, expected, [(x, x), *((mine[name], named[name]) for name in named)])


def test_networks_say_whether_they_train() -> None:
    network = radial.RadialNetwork((6, 8), TensorSource(None))
    assert can_train(network)
    network.requires_grad_(False)
    assert not can_train(network)
    handle = network.layer0.register_forward_hook(lambda *_: None)
    assert can_train(network)
    handle.remove()
    assert not can_train(network)


def step_for(species: Tensor) -> Step:
    plan = make_plan(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3), species)
    return Step(plan, Phase(), torch.zeros(0, 1), torch.zeros(0, 1), None, torch.zeros(len(species), 1))
