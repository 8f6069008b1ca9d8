"""A model with the kernels against the library's own: energies, forces, stress and every gradient of a loss of them."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from torch import Tensor

from forcetune.adapters.attach import attach, detach, disable_adapter, merge_weights
from forcetune.adapters.methods import METHODS, method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.library import import_mace
from forcetune.evaluation.metrics import graphs_of
from forcetune.graphs.graph import Batch, collate
from forcetune.kernels.mace import PLAN, install, install_in, plan_of, remove
from models import make_mace
from systems import backbone, cluster, crystal, frames_of, perturb

EXACT = 1e-10
SINGLE = 1e-4

MODELS: dict[str, dict[str, Any]] = {
    "scale-shift": {},
    "scalars only": {"hidden_irreps": "8x0e"},
    "order 1": {"correlation": 1},
    "plain, up to 2e, order 3": {"kind": "MACE", "hidden_irreps": "6x0e+6x1o+6x2e", "correlation": 3, "max_ell": 3},
    "odd scalars": {"hidden_irreps": "6x0e+6x0o+6x1o+6x1e"},
    "density, trainable basis": {
        "first": "RealAgnosticDensityInteractionBlock",
        "later": "RealAgnosticDensityResidualInteractionBlock",
        "trainable_bessel": True,
    },
    "residual from the first": {"first": "RealAgnosticResidualInteractionBlock"},
    "nonlinear residual": {
        "first": "RealAgnosticResidualNonLinearInteractionBlock",
        "later": "RealAgnosticResidualNonLinearInteractionBlock",
        "readout": "NonLinearBiasReadoutBlock",
    },
    "agnostic product": {"use_agnostic_product": True},
    "pair repulsion, cutoff on weights": {
        "pair_repulsion": True,
        "apply_cutoff": False,
        "distance_transform": "Agnesi",
    },
    "one layer": {"num_interactions": 1},
    "three layers": {"num_interactions": 3, "hidden_irreps": "4x0e+4x1o"},
    "edge irreps": {"edge_irreps": "4x0e+4x1o"},
    "no parity": {"use_so3": True, "hidden_irreps": "4x0e+4x1e", "correlation": 3},
}


def model(name: str, **options: Any) -> MaceBackbone:
    chosen = MODELS[name] | options
    if "edge_irreps" in chosen:
        import_mace()
        from e3nn import o3

        chosen = chosen | {"edge_irreps": o3.Irreps(chosen["edge_irreps"])}
    return backbone(**chosen)


def boxed(atoms: Atoms) -> Atoms:
    """In a cell, without which the library's gradients of stresses are not numbers."""
    atoms.set_cell([30.0, 31.0, 32.0])
    return atoms


def batch_for(tuned: MaceBackbone, *structures: Atoms) -> Batch:
    return collate(graphs_of(tuned, frames_of(*structures)))


def mixed(tuned: MaceBackbone) -> Batch:
    """Clusters, a small periodic cell, lone atoms, atoms out of each other's reach."""
    far = Atoms("CH", [[0, 0, 0], [0, 0, 15.0]])
    structures = (boxed(cluster()), crystal(), boxed(Atoms("O")), boxed(cluster((1, 6), 5, seed=9)), boxed(far))
    return batch_for(tuned, *structures)


def everything(tuned: MaceBackbone, batch: Batch, *, stress: bool = True) -> dict[str, Tensor]:
    """Predictions, and the gradient of a loss of them by every trainable parameter."""
    found = tuned.predict(batch, stress=stress, create_graph=True)
    weight = torch.linspace(-1, 2, found.forces.numel(), dtype=found.forces.dtype).view(found.forces.shape)
    loss = 1e-3 * found.energy.square().sum() + (found.forces * weight).sum() + found.forces.square().sum()
    result = {"energy": found.energy.detach(), "forces": found.forces.detach()}
    if found.stress is not None:
        loss = loss + found.stress.square().sum() + found.stress[:, 0, 1].sum()
        result["stress"] = found.stress.detach()
    names = [name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for parameter in tuned.model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return result | dict(zip(names, gradients, strict=True))


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT) -> None:
    assert found.keys() == expected.keys()
    values = ("energy", "forces", "stress")
    largest = max((float(t.abs().max()) for name, t in expected.items() if name not in values), default=1.0)
    for name, other in expected.items():
        if other.numel() == 0:
            continue
        # a gradient that symmetry makes 0 is rounding in both
        floor = 1e-6 * largest if name not in values else 1e-6
        scale = max(float(other.detach().abs().max()), floor)
        assert torch.isfinite(found[name]).all(), name
        assert (found[name] - other).abs().max() <= tolerance * scale, name


# scratch and freeze train what full does, lora what elora does, sparse-h what sparse does
WAYS = {name: method(name) for name in METHODS if name not in ("scratch", "freeze", "lora", "sparse-h")} | {
    "mmea-pure, skip connections": method("mmea-pure", skip=True),
    "elora, norms": method("elora", norms=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_library(name: str) -> None:
    tuned = model(name)
    batch = mixed(tuned)
    expected = everything(tuned, batch)
    coverage = install(tuned)
    assert coverage.fast, coverage.left
    assert coverage.left == {}
    same(everything(tuned, batch), expected)
    plain = tuned.predict(batch, stress=True)
    same({"energy": plain.energy, "forces": plain.forces}, {key: expected[key] for key in ("energy", "forces")})
    assert not plain.forces.requires_grad


@pytest.mark.parametrize("name", ["scale-shift", "density, trainable basis", "nonlinear residual", "agnostic product"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", ["kernels", "adapter"])
def test_equals_the_library_with_an_adapter(name: str, way: str, first: str) -> None:
    tuned = model(name)
    batch = mixed(tuned)
    perturb(attach(tuned, WAYS[way]))
    expected = everything(tuned, batch)
    adapter = detach(tuned)
    values = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    if first == "kernels":
        install(tuned)
    adapter = attach(tuned, WAYS[way])
    adapter.load_state_dict(values)
    if first == "adapter":
        install(tuned)
    same(everything(tuned, batch), expected)
    with disable_adapter(tuned):
        base = tuned.predict(batch)
        remove(tuned)
        other = tuned.predict(batch)
    same({"forces": base.forces}, {"forces": other.forces})
    same(everything(tuned, batch), expected)


@pytest.mark.parametrize("name", ["scale-shift", "plain, up to 2e, order 3", "nonlinear residual"])
def test_small_and_odd_batches(name: str) -> None:
    tuned = model(name)
    structures: Sequence[Sequence[Atoms]] = (
        [Atoms("H")],
        [Atoms("H"), Atoms("C")],
        [Atoms("CO", [[0, 0, 0], [0, 0, 1.1]])],
        [Atoms("N", cell=[2.1, 2.2, 2.3], pbc=True)],  # all its neighbours are itself
        [crystal((6,)), crystal((8, 1), seed=6)],
    )
    for chosen in structures:
        batch = batch_for(tuned, *chosen)
        stress = all(atoms.pbc.all() for atoms in chosen)
        remove(tuned)
        expected = everything(tuned, batch, stress=stress)
        install(tuned)
        same(everything(tuned, batch, stress=stress), expected)


def test_edges_in_any_order_and_without_their_reverse() -> None:
    tuned = model("scale-shift")
    batch = batch_for(tuned, crystal())
    order = torch.randperm(batch.n_edges, generator=torch.Generator().manual_seed(0))
    for chosen in (order, order[: batch.n_edges // 2]):
        fields = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
        fields |= {"edge_index": batch.edge_index[:, chosen], "unit_shifts": batch.unit_shifts[chosen]}
        other = Batch(**fields)
        remove(tuned)
        expected = everything(tuned, other)
        install(tuned)
        same(everything(tuned, other), expected)


def test_random_models() -> None:
    kinds = itertools.product(("4x0e", "4x0e+4x1o", "2x0e+2x1o+2x2e"), (1, 2, 3), ((8, 1), (1, 6, 7, 8)))
    for seed, (irreps, order, elements) in enumerate(kinds):
        sizes = {"max_ell": 1 + seed % 3, "num_bessel": 3 + seed % 4, "radial_MLP": [8] * (1 + seed % 2)}
        tuned = backbone(hidden_irreps=irreps, correlation=order, elements=elements, seed=seed, **sizes)
        batch = batch_for(tuned, boxed(cluster(elements, 4 + seed % 5, seed)), crystal(elements, seed))
        expected = everything(tuned, batch)
        assert install(tuned).fast
        same(everything(tuned, batch), expected)


@pytest.mark.parametrize("name", ["scale-shift", "density, trainable basis"])
def test_single_precision(name: str) -> None:
    tuned = model(name)
    single = MaceBackbone.from_module(copy.deepcopy(tuned.model), dtype=torch.float32)
    batch = mixed(tuned)
    expected = everything(tuned, batch)
    install(single)
    found = everything(single, batch.to(dtype=torch.float32))
    assert found["forces"].dtype == torch.float32
    floor = 1e-2 * max(float(t.abs().max()) for key, t in expected.items() if "." in key)
    for key, other in expected.items():
        scale = max(float(other.abs().max()), floor if "." in key else 0.0)
        assert (found[key].double() - other).abs().max() <= SINGLE * scale, key


def test_kernels_follow_the_models_precision_and_weights() -> None:
    tuned = model("scale-shift")
    batch = batch_for(tuned, crystal())
    perturb(attach(tuned, method("readout")))
    install(tuned)
    before = tuned.predict(batch)
    with torch.no_grad():
        tuned.model.products[0].symmetric_contractions.contractions[0].weights_max.mul_(1.5)
    changed = tuned.predict(batch)
    assert (changed.forces - before.forces).abs().max() > 1e-6
    remove(tuned)
    same({"forces": changed.forces}, {"forces": tuned.predict(batch).forces})


def test_nothing_else_of_the_model_changes() -> None:
    tuned = model("scale-shift")
    state = {name: (tensor, tensor.clone()) for name, tensor in tuned.model.state_dict(keep_vars=True).items()}
    sites, names = tuned.sites(), [name for name, _ in tuned.model.named_parameters()]
    classes = {name: type(module) for name, module in tuned.model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in tuned.model.named_modules()}
    install(tuned)
    install(tuned)
    assert [name for name, _ in tuned.model.named_parameters()] == names
    assert tuned.sites() == sites
    for name, module in tuned.model.named_modules():
        assert type(module).__name__ == classes[name].__name__
        assert isinstance(module, classes[name])
        assert set(vars(module)) == attributes[name]
    tuned.predict(batch_for(tuned, crystal()), create_graph=True)
    remove(tuned)
    assert {name: type(module) for name, module in tuned.model.named_modules()} == classes
    for name, tensor in tuned.model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0]
        assert torch.equal(tensor, state[name][1])


def test_files_copies_and_pickles_are_plain_models(tmp_path: Path) -> None:
    tuned = model("scale-shift")
    kind = type(tuned.model)
    batch = batch_for(tuned, crystal())
    expected = tuned.predict(batch)
    install(tuned)
    tuned.save(tmp_path / "saved.model")
    for plain in (
        torch.load(tmp_path / "saved.model", weights_only=False),
        copy.deepcopy(tuned.model),
        pickle.loads(pickle.dumps(tuned.model)),
    ):
        assert type(plain) is kind
        assert type(plain.products[0].symmetric_contractions).__module__.startswith("mace.")
        found = MaceBackbone.from_module(plain).predict(batch)
        same({"forces": found.forces}, {"forces": expected.forces}, 1e-12)


def test_merging_with_kernels_installed(tmp_path: Path) -> None:
    tuned = model("scale-shift")
    batch = batch_for(tuned, crystal(), cluster())
    install(tuned)
    perturb(attach(tuned, method("elora")))
    adapted = tuned.predict(batch)
    merge_weights(tuned)
    tuned.save(tmp_path / "merged.model")
    merged = MaceBackbone.load(tmp_path / "merged.model").predict(batch)
    for other in (tuned.predict(batch), merged):
        same({"energy": other.energy, "forces": other.forces}, {"energy": adapted.energy, "forces": adapted.forces})


def test_a_block_that_is_not_known_is_left_to_the_library() -> None:
    tuned = backbone(later="RealAgnosticAttResidualInteractionBlock")
    batch = batch_for(tuned, crystal())
    expected = everything(tuned, batch)
    coverage = install(tuned)
    assert not coverage.fast
    assert "RealAgnosticAttResidualInteractionBlock" in coverage.left["interactions.1"]
    same(everything(tuned, batch), expected)


def test_several_heads() -> None:
    plain = make_mace(heads=("one", "two"))
    tuned = MaceBackbone.from_module(copy.deepcopy(plain), head="two")
    batch = batch_for(tuned, crystal(), cluster())
    expected = tuned.predict(batch)
    install(tuned)
    same({"forces": tuned.predict(batch).forces}, {"forces": expected.forces})
    data = tuned._inputs(batch, tuned._species[batch.numbers])
    data["head"] = torch.tensor([1, 0])
    slow = plain(dict(data))
    install_in(plain)
    data["positions"] = batch.positions.clone()
    fast = plain(dict(data))
    same({"forces": fast["forces"]}, {"forces": slow["forces"]})


def test_what_only_the_library_computes_still_comes_from_it() -> None:
    tuned = model("scale-shift")
    batch = batch_for(tuned, crystal())

    def hessian() -> Tensor:
        return tuned.model(tuned._inputs(batch, tuned._species[batch.numbers]), compute_hessian=True)["hessian"]

    expected = hessian()
    install(tuned)
    same({"hessian": hessian()}, {"hessian": expected})


def test_somebody_may_differentiate_forces_by_positions() -> None:
    tuned = model("scale-shift")
    batch = batch_for(tuned, cluster())

    def second(fast: bool) -> Tensor:
        (install if fast else remove)(tuned)
        data = tuned._inputs(batch, tuned._species[batch.numbers])
        data["positions"].requires_grad_()
        forces = tuned.model(data, training=True)["forces"]
        return torch.autograd.grad(forces.square().sum(), data["positions"])[0]

    same({"second": second(True)}, {"second": second(False)})


def test_a_plan_may_come_with_the_batch() -> None:
    tuned = model("scale-shift")
    batch = mixed(tuned)
    install(tuned)
    expected = tuned.predict(batch)
    data: dict[str, Any] = tuned._inputs(batch, tuned._species[batch.numbers])
    found = tuned.model(data | {PLAN: plan_of(tuned, batch)})
    same({"forces": found["forces"]}, {"forces": expected.forces}, 1e-14)


def hessian_product(tuned: MaceBackbone, batch: Batch) -> dict[str, Tensor]:
    """Energy, forces, stress, and the derivative of a weighted sum of the forces by the positions."""
    found = tuned.predict(batch, stress=True)
    species = torch.tensor([tuned.elements.index(int(number)) for number in batch.numbers])
    inputs = tuned._inputs(batch, species)
    positions = inputs["positions"].requires_grad_()
    forces = tuned.model(inputs, training=True)["forces"]
    weight = torch.linspace(-1, 2, forces.numel(), dtype=forces.dtype).view(forces.shape)
    (second,) = torch.autograd.grad((forces * weight).sum(), [positions])
    stress = found.stress
    assert stress is not None
    return {"energy": found.energy, "forces": found.forces, "stress": stress, "second": second}


@pytest.mark.parametrize(
    "options", [{}, {"gain": "linear"}, {"activation": False}, {"shift": False}, {"shared_gain": True}]
)
@pytest.mark.parametrize("name", ["scale-shift", "plain, up to 2e, order 3", "odd scalars"])
def test_gates_that_are_not_trained_equal_those_that_are(name: str, options: dict[str, Any]) -> None:
    tuned = model(name)
    adapter = attach(tuned, method("mmea-pure", **options))
    perturb(adapter)
    batch = batch_for(tuned, boxed(cluster()), crystal())
    expected = hessian_product(tuned, batch)
    install(tuned)
    same(hessian_product(tuned, batch), expected)
    adapter.requires_grad_(False)
    same(hessian_product(tuned, batch), expected)
