"""Files of genuine mace-torch versions: read, or refused in a sentence, with that version's own results.

``pytest -m slow tests/backbones/mace/test_versions.py`` runs every recipe of every version; a few of three versions run
always. Everything goes through public entry points, so that it holds for whatever reads and computes the models.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.data import chemical_symbols

import forcetune
from forcetune.backbones.protocol import Backbone
from forcetune.errors import ForcetuneWarning, InputError
from forcetune.frames.frame import Frame, Origin
from forcetune.graphs.graph import build_graph
from genuine import FOLDER_VARIABLE, Genuine, Structure, Versions
from genuine_models import QUICK_VERSIONS, VERSIONS, cases
from oracle_install import UnavailableError
from systems import perturb
from terminal import Command

REQUIRED_VARIABLE = "FORCETUNE_REQUIRE_VERSIONS"
TOLERANCE = 1e-8
TOLERANCE_FLOAT32 = 2e-5

Get = Callable[[str, str], Genuine]


@pytest.fixture(scope="session")
def versions(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    named = os.environ.get(FOLDER_VARIABLE)
    cache = getattr(pytestconfig, "cache", None)
    if named or cache is None:
        return Versions(Path(named) if named else tmp_path_factory.mktemp("genuine"))
    return Versions(cache.mkdir("genuine"))


@pytest.fixture
def get(versions: Versions) -> Get:
    """A model of a version; its neighbours in the list of the same kind are made along with it."""

    def model(version: str, name: str) -> Genuine:
        quick = [other for _, other in cases((version,), quick=True)]
        together = quick if name in quick else [other for _, other in cases((version,))]
        try:
            return versions.get(version, name, together=together)
        except UnavailableError as error:
            if os.environ.get(REQUIRED_VARIABLE):
                raise
            pytest.skip(str(error))

    return model


def as_frame(structure: Structure, index: int) -> Frame:
    parts = (structure.numbers, structure.positions, structure.cell, structure.pbc)
    return Frame(*parts, None, None, None, Origin("genuine", index))


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    """Within ``tolerance``, absolute for what is below 1 and relative to the largest element for what is above."""
    assert np.isfinite(expected).all(), what
    difference = np.abs(actual - expected).max() / max(1.0, np.abs(expected).max())
    assert difference <= tolerance, f"{what} differs by {difference:.1e}"


def assert_parity(
    backbone: Backbone, model: Genuine, *, head: int = 0, double: bool = False, tolerance: float = TOLERANCE
) -> None:
    """The backbone predicts what the version does for every structure of which it knows all elements."""
    compared = 0
    for index, structure in enumerate(model.results.structures):
        if not set(structure.numbers) <= set(backbone.elements):
            continue
        crystal = bool(structure.pbc.all())
        graph = build_graph(as_frame(structure, index), backbone.cutoff, backbone.dtype)
        predicted = backbone.predict(graph, stress=crystal).detached()
        actual = {"energy": predicted.energy[0], "forces": predicted.forces}
        if crystal:
            assert predicted.stress is not None
            actual["stress"] = predicted.stress[0]
        for quantity, value in actual.items():
            expected = model.results.get(index, quantity, head=head, double=double)
            assert expected is not None
            what = f"{quantity} of {model.recipe.name} of {model.version}, structure {index}, head {head},"
            assert_close(value.double().cpu().numpy(), expected, tolerance, what)
        compared += 1
    assert compared


def check(model: Genuine) -> None:
    """A file opens and predicts what its version does, or is refused in the words expected."""
    if model.recipe.refusal:
        with pytest.raises(InputError, match=model.recipe.refusal):
            forcetune.load(str(model.path))
        return
    heads = model.results.heads
    for index, head in enumerate(heads):
        backbone = forcetune.load(str(model.path), head=head if len(heads) > 1 else None)
        assert_parity(backbone, model, head=index, double=True)
    if model.results.is_float32:
        only = forcetune.load(str(model.path), head=heads[0] if len(heads) > 1 else None, dtype="float32")
        assert_parity(only, model, tolerance=TOLERANCE_FLOAT32)


@pytest.mark.parametrize(("version", "name"), cases(QUICK_VERSIONS, quick=True))
def test_file_of_a_version(version: str, name: str, get: Get) -> None:
    check(get(version, name))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*was made by mace 0.3.14, which mixed heads")
@pytest.mark.parametrize(("version", "name"), cases())
def test_every_file_of_every_version(version: str, name: str, get: Get) -> None:
    check(get(version, name))


REPULSIVE = [case for case in cases() if case[1] in ("repulsion", "plain_repulsion", "mp0b", "mp0b_float32")]


@pytest.mark.parametrize(
    ("version", "name"),
    [
        pytest.param(*case, marks=[] if case in (("0.3.6", "repulsion"), ("0.3.10", "repulsion")) else pytest.mark.slow)
        for case in REPULSIVE
    ],
)
def test_repulsion_has_all_digits(version: str, name: str, get: Get) -> None:
    """Charges are integers, whose product has the precision that torch is set to: float64 for a float64 calculator.

    Rounded to float32 on the way, as by earlier versions of this package, energies differ by 3e-9 to 6e-8 eV.
    """
    model = get(version, name)
    backbone = forcetune.load(str(model.path), dtype="float64")
    assert_parity(backbone, model, double=True, tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*was made by mace 0.3.14, which mixed heads")
def test_merged_readouts_of_mixed_heads_are_what_their_version_computes(
    get: Get, versions: Versions, tmp_path: Path
) -> None:
    model = get("0.3.14", "nonlinear_heads")
    backbone = forcetune.load(str(model.path), head="b")
    perturb(forcetune.attach(backbone, forcetune.method("full")))
    pair = model.results.structures[2]
    expected = backbone.predict(build_graph(as_frame(pair, 0), backbone.cutoff, backbone.dtype)).detached()
    forcetune.save_adapter(backbone, tmp_path / "adapter")
    forcetune.merge(tmp_path / "adapter", tmp_path / "tuned.model", model=model.path)
    results = versions.evaluate("0.3.14", tmp_path / "tuned.model", model)
    assert abs(float(expected.energy) - float(model.results.arrays["2/1/energy"])) > 1e-3
    for quantity, value in (("energy", expected.energy[0]), ("forces", expected.forces)):
        quantity_value = results.get(2, quantity, head=1)
        assert quantity_value is not None
        assert_close(quantity_value, value.numpy(), TOLERANCE, quantity)


@pytest.mark.slow
def test_readouts_that_later_versions_compute_otherwise_are_said(get: Get) -> None:
    model = get("0.3.14", "nonlinear_heads")
    with pytest.warns(ForcetuneWarning, match="energies are those of that version"):
        backbone = forcetune.load(str(model.path), head="b")
    assert_parity(backbone, model, head=1, tolerance=1e-11)


@pytest.mark.parametrize("version", QUICK_VERSIONS)
def test_elements_cut_from_a_file_of_a_version(version: str, get: Get) -> None:
    model = get(version, "mp0")
    pair = model.results.structures[2]
    backbone = forcetune.load(str(model.path), elements=[int(z) for z in pair.numbers])
    assert backbone.elements == tuple(sorted(int(z) for z in pair.numbers))
    assert_parity(backbone, model)


@pytest.mark.parametrize(
    ("version", "name"),
    [
        pytest.param(version, name, marks=[] if version in QUICK_VERSIONS and name == "off23" else pytest.mark.slow)
        for version, name in cases()
        if name in ("off23", "mp0b", "plain_residual", "order_two", "agnostic_product")
    ],
)
def test_gradients_of_the_weights_of_a_version(version: str, name: str, get: Get) -> None:
    """What a training follows: dE/dw and, through the forces, second derivatives, of every parameter."""
    model = get(version, name)
    backbone = forcetune.load(str(model.path))
    weights = dict(backbone.model.named_parameters())
    expected = model.results.gradients()
    assert expected and set(expected) <= set(weights)
    for weight in weights.values():
        weight.requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for index, structure in enumerate(model.results.structures[:2]):
        graph = build_graph(as_frame(structure, index), backbone.cutoff, backbone.dtype)
        predicted = backbone.predict(graph, create_graph=True)
        loss = loss + predicted.energy.sum() + (predicted.forces**2).sum()
    slopes = torch.autograd.grad(loss, [weights[parameter] for parameter in expected])
    for (parameter, wanted), slope in zip(expected.items(), slopes, strict=True):
        assert_close(slope.numpy().reshape(wanted.shape), wanted, TOLERANCE, f"gradient of {parameter}")


def write_exactly(path: Path, model: Genuine) -> Path:
    """Structures with the version's results as extended XYZ, every number with all its digits."""
    lines = []
    for index, structure in enumerate(model.results.structures):
        energy, forces = (model.results.get(index, name) for name in ("energy", "forces"))
        assert energy is not None and forces is not None
        words = [f"REF_energy={float(energy)!r}", "Properties=species:S:1:pos:R:3:REF_forces:R:3"]
        if structure.pbc.any():
            words.append(f'Lattice="{" ".join(repr(float(x)) for x in structure.cell.ravel())}"')
        words.append(f'pbc="{" ".join("FT"[int(direction)] for direction in structure.pbc)}"')
        if structure.pbc.all():
            stress = model.results.get(index, "stress")
            assert stress is not None
            words.append(f'REF_stress="{" ".join(repr(float(x)) for x in stress.ravel())}"')
        lines += [str(len(structure.numbers)), " ".join(words)]
        for z, position, force in zip(structure.numbers, structure.positions, forces, strict=True):
            lines.append(" ".join([chemical_symbols[int(z)], *(repr(float(x)) for x in (*position, *force))]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("version", QUICK_VERSIONS)
def test_evaluate_finds_no_error_in_a_versions_own_labels(
    version: str, get: Get, command: Command, tmp_path: Path
) -> None:
    """The command line computes by its kernels, on its own neighbours and its own reading of the file."""
    model = get(version, "off23")
    data = write_exactly(tmp_path / "labels.xyz", model)
    code, out, err = command("evaluate", model.path, data, "--json")
    assert code == 0, err
    errors = json.loads(out)
    assert errors["n_frames"] == len(model.results.structures)
    for name in ("energy_mae_mev", "forces_mae_mev_per_ang", "forces_rmse_mev_per_ang"):
        assert errors[name] == pytest.approx(0, abs=1e3 * TOLERANCE), name
    stress = [value for name, value in errors.items() if name.startswith("stress_mae")]
    assert stress == [pytest.approx(0, abs=1e3 * TOLERANCE)]


def tuned(model: Genuine, folder: Path, dtype: str, elements: Sequence[int]) -> Path:
    """An adapter on a version's file, as a training would leave it, with reference energies of its own."""
    backbone = forcetune.load(str(model.path), dtype=dtype, elements=elements)
    perturb(forcetune.attach(backbone, forcetune.method("elora")))
    references = backbone.reference_energies
    backbone.set_reference_energies({z: references[z] - 13.6 for z in elements})
    forcetune.save_adapter(backbone, folder)
    return folder


MERGED = [(version, name) for version in VERSIONS for name in ("mp0", "mp0_cuda")]
QUICK_MERGED = [("0.3.3", "mp0"), ("0.3.6", "mp0_cuda"), ("0.3.10", "mp0")]


@pytest.mark.parametrize(
    ("version", "name"),
    [pytest.param(*case, marks=[] if case in QUICK_MERGED else pytest.mark.slow) for case in MERGED],
)
def test_merged_file_opens_in_the_version_of_its_base(
    version: str, name: str, get: Get, versions: Versions, tmp_path: Path
) -> None:
    """It is the base's file with other weights: this version and today's mace compute what base and adapter do."""
    model = get(version, name)
    float32 = model.recipe.dtype == "float32"
    pair = model.results.structures[2]
    elements = sorted(int(z) for z in pair.numbers)
    adapter = tuned(model, tmp_path / "adapter", model.recipe.dtype, elements)
    forcetune.merge(adapter, tmp_path / "tuned.model", model=model.path)
    atoms = Atoms(pair.numbers, pair.positions)
    atoms.calc = forcetune.calculator(model.path, adapter=adapter)
    expected = {"energy": np.array(atoms.get_potential_energy()), "forces": atoms.get_forces()}
    assert abs(expected["energy"] - model.results.arrays["2/0/energy"]) > 1
    with zipfile.ZipFile(model.path) as base, zipfile.ZipFile(tmp_path / "tuned.model") as merged:
        assert base.namelist() == merged.namelist()
        pickle = next(member for member in base.namelist() if member.endswith("data.pkl"))
        assert base.read(pickle) == merged.read(pickle)
    for reader in (version, None):
        results = versions.evaluate(reader, tmp_path / "tuned.model", model)
        for quantity, value in expected.items():
            actual = results.get(2, quantity)
            assert actual is not None
            assert_close(actual, value, TOLERANCE_FLOAT32 if float32 else TOLERANCE, f"{quantity} in {reader}")
    whole = forcetune.load(str(tmp_path / "tuned.model"))
    base = forcetune.load(str(model.path))
    assert whole.elements == base.elements
    for z in base.elements:
        change = whole.reference_energies[z] - base.reference_energies[z]
        assert change == pytest.approx(-13.6 if z in elements else 0, abs=1e-5 if float32 else 1e-10)
