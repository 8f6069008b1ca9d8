"""Our network against mace: energies, forces, stress, features of atoms and every gradient of a loss of them."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from torch import Tensor, nn

from forcetune.adapters.attach import attach, detach, disable_adapter, merge_weights
from forcetune.adapters.methods import method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.network import MaceNetwork
from forcetune.backbones.network import NetworkBackbone
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate
from models import ARCHITECTURES, NONLINEAR, Oracle, default_dtype, make_mace, oracle
from systems import METHODS_FOR_MACE, backbone, cluster, crystal, frames_of, library, perturb

EXACT = 1e-10
SINGLE = 1e-4


@functools.cache
def mace_model(name: str) -> nn.Module:
    """Made once; whoever uses it takes a copy."""
    return make_mace(**ARCHITECTURES[name])


def ours(name: str) -> MaceBackbone:
    model = MaceBackbone.from_module(mace_model(name))
    assert isinstance(model, MaceBackbone) and isinstance(model.model, MaceNetwork)
    return model


def theirs(name: str) -> Oracle:
    return oracle(mace_model(name))


def boxed(atoms: Atoms) -> Atoms:
    """In a cell, without which the library's gradients of stresses are not numbers."""
    atoms.set_cell([30.0, 31.0, 32.0])
    return atoms


def batch_for(tuned: NetworkBackbone, *structures: Atoms) -> Batch:
    return collate(build_graphs(tuned, frames_of(*structures)))


def mixed(tuned: NetworkBackbone) -> Batch:
    """Clusters, a small periodic cell, lone atoms, atoms out of each other's reach."""
    far = Atoms("CH", [[0, 0, 0], [0, 0, 15.0]])
    structures = (boxed(cluster()), crystal(), boxed(Atoms("O")), boxed(cluster((1, 6), 5, seed=9)), boxed(far))
    return batch_for(tuned, *structures)


def everything(tuned: NetworkBackbone, batch: Batch, *, stress: bool = True) -> dict[str, Tensor]:
    """Predictions, and the gradient of a loss of them by every trainable parameter."""
    prediction = tuned.predict(batch, stress=stress, create_graph=True)
    forces = prediction.forces
    weight = torch.linspace(-1, 2, forces.numel(), dtype=forces.dtype).view(forces.shape)
    loss = 1e-3 * prediction.energy.square().sum() + (forces * weight).sum() + forces.square().sum()
    result = {"energy": prediction.energy.detach(), "forces": prediction.forces.detach()}
    if prediction.stress is not None:
        loss = loss + prediction.stress.square().sum() + prediction.stress[:, 0, 1].sum()
        result["stress"] = prediction.stress.detach()
    named = {name: parameter for name, parameter in tuned.model.named_parameters() if parameter.requires_grad}
    with default_dtype(tuned.dtype):
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return result | dict(zip(named, gradients, strict=True))


def features_of_atoms(tuned: NetworkBackbone, batch: Batch) -> Tensor:
    """Of all layers side by side, as mace gives them."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: Any, output: Any) -> None:
        if isinstance(output, dict):
            outputs.append(output["node_feats"].detach())
        else:
            plan, (_, layers) = arguments[0], output
            outputs.append(torch.cat([layer.flat for layer in layers], dim=1).detach()[plan.place])

    handle = tuned.model.register_forward_hook(keep)
    tuned.predict(batch)
    handle.remove()
    return outputs[0]


def same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT) -> None:
    assert actual.keys() == expected.keys()
    values = ("energy", "forces", "stress")
    largest = max((float(t.abs().max()) for name, t in expected.items() if name not in values and t.numel()), default=1)
    for name, other in expected.items():
        if other.numel() == 0:
            continue
        # a gradient that symmetry makes 0 is rounding in both
        floor = 1e-6 * largest if name not in values else 1e-6
        scale = max(float(other.detach().abs().max()), floor)
        assert torch.isfinite(actual[name]).all(), name
        assert (actual[name] - other).abs().max() <= tolerance * scale, name


# scratch and freeze train what full does, lora what elora does, sparse-h what sparse does
WAYS = {name: method(name) for name in METHODS_FOR_MACE if name not in ("scratch", "freeze", "lora", "sparse-h")} | {
    "mmea-pure, skip connections": method("mmea-pure", skip=True),
    "elora, norms": method("elora", norms=True),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_mace(name: str) -> None:
    tuned, reference = ours(name), theirs(name)
    batch = mixed(tuned)
    expected = everything(reference, batch)
    same(everything(tuned, batch), expected)
    plain = tuned.predict(batch, stress=True)
    assert plain.stress is not None and not plain.forces.requires_grad and not plain.energy.requires_grad
    actual = {"energy": plain.energy, "forces": plain.forces, "stress": plain.stress}
    same(actual, {key: expected[key] for key in actual})
    same(
        {"features": features_of_atoms(tuned, batch)},
        {"features": features_of_atoms(reference, batch)},
        tolerance=EXACT,
    )
    assert tuned.n_scalars == reference.n_scalars


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sites_are_those_of_the_librarys_layers(name: str) -> None:
    """Adapters fit either, and those of earlier versions were made for the library's."""

    def shown(tuned: NetworkBackbone) -> list[tuple[Any, ...]]:
        return [
            (site.name, site.kind, site.module, site.reader, site.paths, site.layers_behind) for site in tuned.sites()
        ]

    assert sorted(shown(ours(name))) == sorted(shown(theirs(name)))


@pytest.mark.parametrize(
    "name",
    [
        "scale-shift",
        "density, trainable basis",
        "nonlinear residual",
        "agnostic product",
        "odd scalars",
        "Chebyshev, Agnesi",
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_equals_mace_with_an_adapter(name: str, way: str) -> None:
    tuned, reference = ours(name), theirs(name)
    batch = mixed(tuned)
    before = tuned.predict(batch)
    for model in (tuned, reference):
        perturb(attach(model, WAYS[way]))
    values = {key: tensor.clone() for key, tensor in tuned.model.forcetune_adapter.state_dict().items()}
    reference.model.forcetune_adapter.load_state_dict(values)
    expected = everything(reference, batch)
    same(everything(tuned, batch), expected)
    with disable_adapter(tuned):
        # to rounding: where the adapter froze the radial networks, their weights come from splines
        torch.testing.assert_close(tuned.predict(batch).forces, before.forces, rtol=1e-11, atol=1e-12)
    detach(tuned)
    assert torch.equal(tuned.predict(batch).forces, before.forces)
    attach(tuned, WAYS[way]).load_state_dict(values)
    same(everything(tuned, batch), expected)


@pytest.mark.parametrize(
    "name", ["scale-shift", "plain, up to 2e, order 3", "nonlinear residual", "soft, Gaussians", "odd scalars"]
)
@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "with gates"])
def test_small_and_odd_batches(name: str, adapted: bool) -> None:
    tuned, reference = ours(name), theirs(name)
    for model in (tuned, reference) if adapted else ():
        perturb(attach(model, method("mmea")))
    structures: Sequence[Sequence[Atoms]] = (
        [Atoms("H")],
        [Atoms("H"), Atoms("C")],
        [Atoms("CO", [[0, 0, 0], [0, 0, 1.1]])],
        [Atoms("CO", [[0, 0, 0], [0, 0, 11.0]])],  # no edge anywhere
        [Atoms("N", cell=[2.1, 2.2, 2.3], pbc=True)],  # all its neighbours are itself
        [crystal((6,)), crystal((8, 1), seed=6)],
    )
    for chosen in structures:
        batch = batch_for(tuned, *chosen)
        stress = all(atoms.pbc.all() for atoms in chosen)
        same(everything(tuned, batch, stress=stress), everything(reference, batch, stress=stress))
        same({"forces": tuned.predict(batch).forces}, {"forces": reference.predict(batch).forces})


def test_atoms_that_do_not_interact_have_no_forces() -> None:
    tuned = ours("scale-shift")
    batch = batch_for(tuned, Atoms("O"), Atoms("CH", [[0, 0, 0], [0, 0, 15.0]]))
    prediction = tuned.predict(batch, stress=True)
    assert batch.n_edges == 0 and prediction.stress is not None
    assert torch.equal(prediction.forces, torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(prediction.stress, torch.zeros(2, 3, 3, dtype=torch.float64))
    alone = tuned.predict(batch_for(tuned, Atoms("C"), Atoms("H"))).energy
    assert float(prediction.energy[1]) == pytest.approx(float(alone.sum()), rel=1e-14)


def test_edges_in_any_order_and_without_their_reverse() -> None:
    tuned, reference = ours("scale-shift"), theirs("scale-shift")
    batch = batch_for(tuned, crystal())
    order = torch.randperm(batch.n_edges, generator=torch.Generator().manual_seed(0))
    for chosen in (order, order[: batch.n_edges // 2]):
        fields = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
        fields |= {"edge_index": batch.edge_index[:, chosen], "unit_shifts": batch.unit_shifts[chosen]}
        other = Batch(**fields)
        same(everything(tuned, other), everything(reference, other))


def test_models_of_many_sizes() -> None:
    kinds = itertools.product(("4x0e", "4x0e+4x1o", "2x0e+2x1o+2x2e"), (1, 2, 3), ((8, 1), (1, 6, 7, 8)))
    for seed, (irreps, order, elements) in enumerate(kinds):
        sizes = {"max_ell": 1 + seed % 3, "num_bessel": 3 + seed % 4, "radial_MLP": [8] * (1 + seed % 2)}
        options = {"hidden_irreps": irreps, "correlation": order, "elements": elements, "seed": seed, **sizes}
        tuned, reference = backbone(**options), library(**options)
        batch = batch_for(tuned, boxed(cluster(elements, 4 + seed % 5, seed)), crystal(elements, seed))
        same(everything(tuned, batch), everything(reference, batch))


BLOCKS = (
    ("RealAgnosticInteractionBlock", "RealAgnosticResidualInteractionBlock"),
    ("RealAgnosticResidualInteractionBlock", "RealAgnosticInteractionBlock"),
    ("RealAgnosticDensityInteractionBlock", "RealAgnosticDensityResidualInteractionBlock"),
    ("RealAgnosticResidualInteractionBlock", "RealAgnosticDensityResidualInteractionBlock"),
    (NONLINEAR, NONLINEAR),
)


def drawn(seed: int) -> dict[str, Any]:
    """Options at random, of which all combinations make a model."""
    choose = random.Random(seed)
    first, later = choose.choice(BLOCKS)
    hidden = choose.choice(("3x0e", "3x0e+3x1o", "2x0e+2x1o+2x2e", "2x0e+2x0o+2x1o", "2x0e+2x1o+2x1e+2x2e"))
    even = "NonLinear" in first
    options: dict[str, Any] = {
        "kind": choose.choice(("MACE", "ScaleShiftMACE")),
        "first": first,
        "later": later,
        "hidden_irreps": hidden if not even or "0o" not in hidden else "3x0e+3x1o",
        "correlation": choose.choice((1, 2, 3, [1, 2], [3, 1])),
        "max_ell": choose.choice((1, 2, 3)),
        "gate": choose.choice(("silu", "tanh", "abs", None, "elu", "gelu", "softplus", "relu", "sigmoid")),
        "radial_type": choose.choice(("bessel", "gaussian", "chebyshev")),
        "distance_transform": choose.choice(("None", "Agnesi", "Soft")),
        "num_polynomial_cutoff": choose.choice((3, 5, 6)),
        "pair_repulsion": choose.random() < 0.3,
        "apply_cutoff": choose.random() < 0.7,
        "use_agnostic_product": choose.random() < 0.3,
        "use_last_readout_only": choose.random() < 0.3,
        "readout": choose.choice(("NonLinearReadoutBlock", "NonLinearBiasReadoutBlock")),
        "elements": choose.choice(((1, 8), (1, 6, 7, 8), (1, 6, 8, 26, 79))),
        "radial_MLP": choose.choice(([8], [8, 12], [4, 4, 4])),
        "r_max": choose.choice((3.2, 4.5)),
        "seed": seed,
    }
    if choose.random() < 0.3:
        options |= {"edge_irreps": choose.choice(("2x0e+2x1o", "4x0e")), "use_edge_irreps_first": choose.random() < 0.5}
    return options


@pytest.mark.parametrize("seed", [*range(16), *(pytest.param(k, marks=pytest.mark.slow) for k in range(16, 116))])
def test_models_with_options_at_random(seed: int) -> None:
    options = drawn(seed)
    tuned, reference = backbone(**options), library(**options)
    elements = options["elements"]
    batch = batch_for(tuned, boxed(cluster(elements, 6, seed)), crystal(elements, seed), boxed(Atoms([elements[0]])))
    same(everything(tuned, batch), everything(reference, batch))
    same({"features": features_of_atoms(tuned, batch)}, {"features": features_of_atoms(reference, batch)})


@pytest.mark.parametrize("name", ["scale-shift", "density, trainable basis", "nonlinear residual", "soft, Gaussians"])
def test_single_precision(name: str) -> None:
    tuned = ours(name)
    single = MaceBackbone.from_module(tuned.model, dtype=torch.float32)
    batch = mixed(tuned)
    expected = everything(tuned, batch)
    results = everything(single, batch.to(dtype=torch.float32))
    assert results["forces"].dtype == torch.float32 and results["energy"].dtype == torch.float64
    floor = 1e-2 * max(float(t.abs().max()) for key, t in expected.items() if "." in key)
    for key, other in expected.items():
        scale = max(float(other.abs().max()), floor if "." in key else 0.0)
        assert (results[key].double() - other).abs().max() <= SINGLE * scale, key


@pytest.mark.parametrize("way", ["in place", "other memory", "another parameter"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_weights_that_are_changed_are_computed_with(way: str, frozen: bool) -> None:
    """Coefficients of frozen contractions are kept."""
    tuned = ours("scale-shift")
    batch = batch_for(tuned, crystal())
    if frozen:
        attach(tuned, method("readout"))
    before = tuned.predict(batch)
    contraction = tuned.model.products[0].symmetric_contractions.contractions[0]
    with torch.no_grad():
        weight = contraction.weights_max
        if way == "in place":
            weight.mul_(1.5)
        elif way == "other memory":
            weight.data = 1.5 * weight.data
        else:
            contraction.weights_max = nn.Parameter(1.5 * weight, requires_grad=not frozen)
    changed = tuned.predict(batch)
    assert (changed.forces - before.forces).abs().max() > 1e-6
    reference = oracle(mace_model("scale-shift"))
    with torch.no_grad():
        reference.model.products[0].symmetric_contractions.contractions[0].weights_max.mul_(1.5)
    same({"forces": changed.forces}, {"forces": reference.predict(batch).forces})


def test_adapters_leave_no_trace() -> None:
    tuned = ours("scale-shift")
    state = {name: (tensor, tensor.clone()) for name, tensor in tuned.model.state_dict(keep_vars=True).items()}
    sites, names = tuned.sites(), [name for name, _ in tuned.model.named_parameters()]
    attributes = {name: set(vars(module)) for name, module in tuned.model.named_modules()}
    required = {name: parameter.requires_grad for name, parameter in tuned.model.named_parameters()}
    perturb(attach(tuned, method("mmea")))
    assert tuned.sites() == sites
    tuned.predict(batch_for(tuned, crystal()), create_graph=True)
    detach(tuned)
    assert [name for name, _ in tuned.model.named_parameters()] == names
    assert {name: set(vars(module)) for name, module in tuned.model.named_modules()} == attributes
    assert {name: parameter.requires_grad for name, parameter in tuned.model.named_parameters()} == required
    for name, tensor in tuned.model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0]
        assert torch.equal(tensor, state[name][1])


@pytest.mark.parametrize("name", ["scale-shift", "nonlinear residual", "odd scalars", "soft, Gaussians", "Chebyshev"])
def test_copies_and_pickles(name: str) -> None:
    tuned = ours(name)
    perturb(attach(tuned, method("mmea")))
    batch = batch_for(tuned, crystal())
    expected = tuned.predict(batch)
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert other.model is not tuned.model
        assert torch.equal(other.predict(batch).forces, expected.forces)
        with torch.no_grad():
            for parameter in other.model.parameters():
                parameter.mul_(1.01)
        assert not torch.equal(other.predict(batch).forces, expected.forces)
    assert torch.equal(tuned.predict(batch).forces, expected.forces)
    network = pickle.loads(pickle.dumps(tuned.model))
    detach(tuned)
    model = MaceBackbone.from_module(network)  # leaves the adapter out
    assert torch.equal(model.predict(batch).forces, tuned.predict(batch).forces)


def test_merged_models_are_those_of_mace(tmp_path: Path) -> None:
    tuned = ours("odd scalars")
    batch = batch_for(tuned, crystal(), cluster())
    perturb(attach(tuned, method("elora")))
    adapted = tuned.predict(batch)
    merge_weights(tuned)
    tuned.save(tmp_path / "merged.model")
    merged = MaceBackbone.load(tmp_path / "merged.model")
    pickled = oracle(torch.load(tmp_path / "merged.model", weights_only=False))
    for other in (tuned, merged, pickled):
        prediction = other.predict(batch)
        actual = {"energy": prediction.energy, "forces": prediction.forces}
        same(actual, {"energy": adapted.energy, "forces": adapted.forces})


@pytest.mark.parametrize("name", ["scale-shift", "plain", "biased readout", "nonlinear residual"])
def test_one_head_of_several(name: str) -> None:
    model = make_mace(**ARCHITECTURES[name], heads=("one", "two", "three"))
    tuned, reference = MaceBackbone.from_module(model, head="two"), oracle(model, head="two")
    batch = batch_for(tuned, crystal(), cluster())
    prediction, expected = tuned.predict(batch), reference.predict(batch)
    actual = {"energy": prediction.energy, "forces": prediction.forces}
    same(actual, {"energy": expected.energy, "forces": expected.forces})
    assert tuned.reference_energies == reference.reference_energies


def test_forces_are_differentiated_by_positions() -> None:
    tuned, reference = ours("scale-shift"), theirs("scale-shift")
    batch = batch_for(tuned, cluster())
    batch.positions.requires_grad_()
    forces = tuned.predict(batch, create_graph=True).forces
    (gradient,) = torch.autograd.grad(forces.square().sum(), batch.positions)
    data = reference._inputs(batch, reference._species[batch.numbers])
    data["positions"].requires_grad_()
    forces = reference.model(data, training=True)["forces"]
    (expected,) = torch.autograd.grad(forces.square().sum(), data["positions"])
    same({"second": gradient}, {"second": expected})


def hessian_product(tuned: NetworkBackbone, batch: Batch) -> dict[str, Tensor]:
    """Energy, forces, stress, and the derivative of a weighted sum of the forces by the positions."""
    prediction = tuned.predict(batch, stress=True)
    if isinstance(tuned, Oracle):
        data = tuned._inputs(batch, tuned._species[batch.numbers])
        positions = data["positions"].requires_grad_()
        forces = tuned.model(data, training=True)["forces"]
    else:
        positions = batch.positions.detach().clone().requires_grad_()
        fields = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
        forces = tuned.predict(Batch(**fields | {"positions": positions}), create_graph=True).forces
    weight = torch.linspace(-1, 2, forces.numel(), dtype=forces.dtype).view(forces.shape)
    (second,) = torch.autograd.grad((forces * weight).sum(), [positions])
    assert prediction.stress is not None
    return {"energy": prediction.energy, "forces": prediction.forces, "stress": prediction.stress, "second": second}


@pytest.mark.parametrize(
    "options", [{}, {"gain": "linear"}, {"activation": False}, {"shift": False}, {"shared_gain": True}]
)
@pytest.mark.parametrize("name", ["scale-shift", "plain, up to 2e, order 3", "odd scalars"])
def test_gates_that_are_not_trained_equal_those_that_are(name: str, options: dict[str, Any]) -> None:
    tuned, reference = ours(name), theirs(name)
    adapters = [attach(model, method("mmea-pure", **options)) for model in (tuned, reference)]
    for adapter in adapters:
        perturb(adapter)
    batch = batch_for(tuned, boxed(cluster()), crystal())
    expected = hessian_product(reference, batch)
    same(hessian_product(tuned, batch), expected)
    adapters[0].requires_grad_(False)
    same(hessian_product(tuned, batch), expected)


def test_threads_share_a_network() -> None:
    """Each predicts other species, so that what is kept for one is not what another needs."""
    tuned = ours("scale-shift")
    tuned.model.requires_grad_(False)
    batches = [batch_for(tuned, crystal(elements)) for elements in ((1, 6), (6, 8), (7,), (1, 8))]
    expected = [tuned.predict(batch).forces for batch in batches]
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:

        def often(index: int) -> float:
            return max(float((tuned.predict(batches[index]).forces - expected[index]).abs().max()) for _ in range(25))

        with ThreadPoolExecutor(4) as pool:
            assert max(pool.map(often, range(4))) < 1e-12
    finally:
        sys.setswitchinterval(switching)
