"""SevenNet models against sevenn itself: energies, forces, stress and every gradient, in float64.

``pytest -m slow tests/backbones/sevennet`` runs every recipe of every version. sevenn runs in a process of its own
(``sevennet_oracle.py``); the published checkpoints come from its wheel.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor

import forcetune
from forcetune.backbones.sevennet.backbone import SevenNetBackbone
from forcetune.backbones.sevennet.content import Cut
from forcetune.deployment.calculator import build_frame
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate
from sevennet_models import ALL_VERSIONS, PUBLISHED, RECIPES, structures, universal_structures
from sevennet_oracle import NEWEST, Request, Results, SevenNets

EXACT = 1e-9
VOIGT = (0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)
QUICK = (
    "parity, fully connected",
    "no parity, linear, XPLOR",
    "network as readout",
    "irreps by hand, odd scalars",
    "modalities, all by modality",
    "all elements",
)
CASES = [
    (version, name) for name, recipe in RECIPES.items() for version in recipe.versions if version not in recipe.lost
]
QUICK_CASES = [(NEWEST, name) for name in QUICK] + [("0.9.3.post1", "parity, fully connected")]


def marked(cases: Sequence[tuple[str, str]]) -> list[object]:
    return [
        pytest.param(*case, marks=() if case in QUICK_CASES else pytest.mark.slow, id=" ".join(case)) for case in cases
    ]


def batch_of(backbone: SevenNetBackbone, atoms: Atoms) -> Batch:
    return collate(build_graphs(backbone, [build_frame(atoms)]))


def assert_parity(
    backbone: SevenNetBackbone, results: Results, systems: Sequence[Atoms], tolerance: float = EXACT
) -> None:
    """Energies (eV), forces (eV/Å) and stress (eV/Å³) of all structures with elements that the backbone knows."""
    compared = 0
    for index, atoms in enumerate(systems):
        if not set(atoms.numbers) <= set(backbone.elements):
            continue
        prediction = backbone.predict(batch_of(backbone, atoms), stress=True).detached()
        assert abs(float(prediction.energy) - float(results[f"{index}/energy"])) <= tolerance, atoms
        forces = prediction.forces.double().numpy()
        assert np.abs(forces - results[f"{index}/forces"]).max() <= tolerance, atoms
        if atoms.pbc.all():
            assert prediction.stress is not None
            stress = prediction.stress[0].double().numpy()[VOIGT]
            assert np.abs(stress - results[f"{index}/stress"]).max() <= tolerance, atoms
        compared += 1
    assert compared


def gradients(backbone: SevenNetBackbone, systems: Sequence[Atoms]) -> dict[str, Tensor]:
    """Of the oracle's loss: 10⁻³ E² + Σ F² + Σ σ² (six numbers, where periodic), summed over the structures."""
    parameters = dict(backbone.model.named_parameters())
    loss = torch.zeros((), dtype=torch.float64)
    for atoms in systems:
        prediction = backbone.predict(batch_of(backbone, atoms), stress=True, create_graph=True)
        loss = loss + 1e-3 * prediction.energy.square().sum() + prediction.forces.square().sum()
        if atoms.pbc.all():
            assert prediction.stress is not None
            loss = loss + prediction.stress[0][VOIGT].square().sum()
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, values, strict=True))


def assert_equal_gradients(backbone: SevenNetBackbone, results: Results, systems: Sequence[Atoms]) -> None:
    """Each parameter's gradient is sevenn's, in the places that the file gives the elements and the modality."""
    content = backbone.content
    stored = {
        name: torch.from_numpy(results[f"grad/{name}"]) if f"grad/{name}" in results else torch.zeros_like(tensor)
        for name, tensor in content.tensors.items()
    }
    head = backbone.head if content.architecture.modalities else None
    expected = {
        key: value.detach()
        for key, value in Cut(replace(content, tensors=stored), backbone.elements, head).tensors().items()
    }
    largest = max(float(value.abs().max()) for value in stored.values())
    actual = gradients(backbone, systems)
    for name, value in actual.items():
        scale = max(float(expected[name].abs().max()), 1e-6 * largest)
        assert float((value - expected[name].view(value.shape)).abs().max()) <= EXACT * scale, name
    if content.architecture.modalities:
        assert any(name.endswith(".modality") for name in actual)


# ---- published models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(sevennets: SevenNets) -> dict[tuple[str, str | None], Results]:
    """sevenn's results for all published checkpoints and modalities, computed in one process."""
    cases = [(name, head) for name, model in PUBLISHED.items() for head in model.modalities]
    systems = universal_structures()
    requests = [Request(sevennets.published(PUBLISHED[name].folder), head, systems) for name, head in cases]
    results = sevennets.compute("evaluate", requests, gradients=True)
    return dict(zip(cases, results, strict=True))


@pytest.mark.parametrize(("name", "head"), [(name, head) for name, m in PUBLISHED.items() for head in m.modalities])
def test_published_models_are_what_sevenn_computes(
    published: dict[tuple[str, str | None], Results],
    sevennets: SevenNets,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    head: str | None,
) -> None:
    monkeypatch.syspath_prepend(str(sevennets.install()))
    whole = forcetune.load(name, head=head, device="cpu")
    assert isinstance(whole, SevenNetBackbone)
    assert len(whole.elements) == 89
    assert whole.base.licence == "MIT"
    assert "sevenn" not in sys.modules
    systems = universal_structures()
    results = published[name, head]
    assert_parity(whole, results, systems)
    assert_equal_gradients(whole, results, systems)
    cut = forcetune.load(name, head=head, elements=[8, 28, 13], device="cpu")
    assert isinstance(cut, SevenNetBackbone)
    assert cut.elements == (8, 13, 28)
    assert_parity(cut, results, systems)
    single = forcetune.load(name, head=head, dtype="float32", device="cpu")
    assert isinstance(single, SevenNetBackbone)
    assert_parity(single, results, systems, tolerance=2e-4)


# ---- models that sevenn makes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "name"), marked(CASES))
def test_models_of_each_version_are_what_sevenn_computes(sevennets: SevenNets, version: str, name: str) -> None:
    # those that are asked for together are made and computed in one process
    quick = [other for its, other in QUICK_CASES if its == version]
    names = quick if name in quick else [other for its, other in CASES if its == version]
    paths = dict(zip(names, sevennets.make(names, version), strict=True))
    cases = [(other, head) for other in names for head in RECIPES[other].modalities or (None,)]
    requests = [Request(paths[other], head, structures(RECIPES[other].symbols)) for other, head in cases]
    results = sevennets.compute("evaluate", requests, gradients=True)
    for (other, head), request, expected in zip(cases, requests, results, strict=True):
        if other != name:
            continue
        systems = request.structures
        backbone = SevenNetBackbone.load(request.model, head=head)
        assert_parity(backbone, expected, systems)
        assert_equal_gradients(backbone, expected, systems)
        cut = SevenNetBackbone.load(request.model, head=head, elements=systems[3].numbers.tolist())
        assert_parity(cut, expected, systems)
        single = SevenNetBackbone.load(request.model, head=head, dtype=torch.float32)
        assert_parity(single, expected, systems, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_versions_compute_what_the_newest_does(sevennets: SevenNets, version: str) -> None:
    """The versions' own calculators, in float32: what they saved means what the newest reads."""
    names = [name for name, recipe in RECIPES.items() if version in recipe.versions and recipe.symbols == ("Hf", "O")]
    systems = structures(("Hf", "O"))[:3]
    heads = [RECIPES[name].modalities[-1] if RECIPES[name].modalities else None for name in names]
    requests = [Request(*case, systems) for case in zip(sevennets.make(names, version), heads, strict=True)]
    results = sevennets.compute("calculate", requests, version=version)
    for request, expected in zip(requests, results, strict=True):
        assert_parity(SevenNetBackbone.load(request.model, head=request.modal), expected, systems, tolerance=1e-4)


@pytest.mark.parametrize("name", ["cp_0.pth", "cp_0_old.pth"])
def test_checkpoints_of_the_repository(sevennets: SevenNets, reference_data: Path, name: str) -> None:
    file = reference_data / "sevennet_checkpoints" / name
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    backbone = SevenNetBackbone.load(file)
    assert backbone.elements == (8, 72)
    systems = structures(("Hf", "O"))
    # the old one says no version, which sevenn asks for
    known = file if name == "cp_0.pth" else file.with_name("cp_0.pth")
    (results,) = sevennets.compute("evaluate", [Request(known, None, systems)], gradients=True)
    if name == "cp_0.pth":
        assert_equal_gradients(backbone, results, systems)
    assert_parity(backbone, results, systems)
