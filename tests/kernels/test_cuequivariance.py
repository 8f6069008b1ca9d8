"""Layers computed by cuequivariance, on its CPU fallback: energies, forces, stress and every gradient as by PyTorch.

Where cuequivariance is installed, mace-torch builds its models in another basis, and the oracles of other tests would
change. So it is not part of the development environment: one test here installs it beside that, and runs the others of
this file in a process of its own.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import forcetune
from forcetune.adapters.attach import attach
from forcetune.adapters.methods import method
from forcetune.backbones.network import NetworkBackbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate
from forcetune.irreps import parse_irreps
from forcetune.kernels.compiled.choice import choose_kernels, kernels_in_use
from forcetune.kernels.cueq import library
from forcetune.kernels.cueq.contraction import ContractionPolynomial
from forcetune.kernels.cueq.library import SegmentedPolynomial, cuequivariance_missing_reason
from forcetune.kernels.edge_plan import make_plan, with_plan
from forcetune.kernels.layers import Convolution, channelwise_paths
from forcetune.kernels.recording import record
from forcetune.kernels.symmetric_contraction import SymmetricContraction
from forcetune.kernels.tensors import TensorSource
from sevennet_models import RECIPES, backbone_of, structures
from sevennet_oracle import UnavailableError, skip_or_raise
from systems import backbone, cluster, crystal, frames_of, perturb

VERSIONS = ("cuequivariance==0.13.0", "cuequivariance-torch==0.13.0")
NEEDED = {"opt-einsum": "opt_einsum", "networkx": "networkx", "sympy": "sympy"}
FOLDER_VARIABLE = "FORCETUNE_CUEQUIVARIANCE"

absent = importlib.util.find_spec("cuequivariance_torch") is None
needs_it = pytest.mark.skipif(absent, reason="cuequivariance is not installed; a process of its own runs this test")

MACE: dict[str, dict[str, Any]] = {
    "default": {},
    "low order": {"max_ell": 1, "correlation": 2, "hidden_irreps": "4x0e+4x1o"},
    "scalars": {"max_ell": 2, "correlation": 3, "hidden_irreps": "4x0e"},
    "float32": {"max_ell": 1, "correlation": 2, "hidden_irreps": "4x0e+4x1o", "dtype": torch.float32},
}


@pytest.mark.skipif(not absent, reason="cuequivariance is installed: the tests run in this process")
def test_in_an_environment_of_its_own(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    named, cache = os.environ.get(FOLDER_VARIABLE), getattr(request.config, "cache", None)
    folder = Path(named) if named else tmp_path if cache is None else Path(cache.mkdir("cuequivariance"))
    target = folder / "-".join(one.replace("==", "-") for one in VERSIONS)
    with FileLock(folder / "install.lock"):
        if not (target / "cuequivariance_torch").is_dir():
            requirements = [
                *VERSIONS,
                *(name for name, module in NEEDED.items() if not importlib.util.find_spec(module)),
            ]
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            done = subprocess.run([*command, "--target", str(target), *requirements], capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                skip_or_raise(UnavailableError(f"cuequivariance cannot be installed here: {last}"))
    package, tests = Path(forcetune.__file__).parents[1], Path(__file__).parents[1]
    paths = [str(target), str(package), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(
        command,
        cwd=tests.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert done.stdout.count("PASSED") >= 20 and "test_mace_is_the_same" in done.stdout


@pytest.mark.skipif(not absent, reason="cuequivariance is installed")
def test_without_it_it_is_refused() -> None:
    with pytest.raises(InputError, match=r"cuequivariance is not installed \(pip install 'forcetune\[cueq\]'\)"):
        forcetune.load("mini", kernels="cuequivariance")


def results(model: NetworkBackbone, batch: Batch) -> list[torch.Tensor]:
    """Energies, forces and stress, and the gradients of a loss by everything that is trained."""
    parameters = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    actual = model.predict(batch, stress=True, create_graph=True)
    assert actual.stress is not None
    loss = actual.energy.square().mean() + actual.forces.square().sum() + actual.stress.square().sum()
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    zeros = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(parameters, grads, strict=True)]
    return [actual.energy, actual.forces, actual.stress, *zeros]


def assert_equal(model: NetworkBackbone, batch: Batch) -> None:
    """Within 1e-10 of the largest value in float64, in float32 within 1e-3."""
    tolerance = 1e-10 if model.dtype == torch.float64 else 1e-3
    choose_kernels(model.model, "torch")
    expected = results(model, batch)
    choose_kernels(model.model, "cuequivariance")
    assert kernels_in_use(model.model) == "cuequivariance"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its fallback is chosen, and not fallen back to
        actual = results(model, batch)
    floor = 1e-6 * max(float(value.detach().abs().max()) for value in expected[3:] if value.numel())
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        scale = max(float(other.detach().abs().max()), floor) if other.numel() else 1.0
        assert torch.allclose(one, other, rtol=0, atol=tolerance * scale)
    assert floor > 0 and (all if batch.n_edges else any)(polynomials(model))


def polynomials(model: NetworkBackbone) -> list[int]:
    """How many polynomials each layer that has one has built."""
    parts = [
        getattr(module, "polynomial", None) or getattr(module, "_polynomial", None) for module in model.model.modules()
    ]
    return [len(part._modules) for part in parts if isinstance(part, SegmentedPolynomial)]


@needs_it
@pytest.mark.parametrize(
    "name, adapter", [("default", "mmea"), *((one, two) for one in list(MACE)[1:] for two in ("mmea", "elora", "full"))]
)
def test_mace_is_the_same(name: str, adapter: str) -> None:
    model = backbone(**MACE[name])
    perturb(attach(model, method(adapter)))
    batch = collate(build_graphs(model, frames_of(cluster(), cluster()[:1], crystal())))
    assert_equal(model, batch.to(dtype=model.dtype))


@needs_it
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.species != "univ"][:4])
def test_sevennet_is_the_same(name: str) -> None:
    recipe = RECIPES[name]
    model = backbone_of(recipe)
    perturb(attach(model, method("elora")))
    batch = collate(build_graphs(model, frames_of(*structures(recipe.symbols)[:2])))
    assert_equal(model, batch.to(dtype=model.dtype))


@needs_it
def test_atoms_without_neighbors() -> None:
    model = backbone(**MACE["low order"])
    perturb(attach(model, method("mmea")))
    assert_equal(model, collate(build_graphs(model, frames_of(cluster()[:1], cluster()[1:2]))))


@needs_it
def test_a_prediction_can_be_recorded_and_a_model_copied() -> None:
    model = backbone(**MACE["low order"])
    batch = build_graphs(model, frames_of(crystal()))[0]
    expected = model.predict(batch).forces
    choose_kernels(model.model, "cuequivariance")
    model.predict(batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.model))):
        network = other if isinstance(other, torch.nn.Module) else other.model
        assert kernels_in_use(network) == "cuequivariance"
    twin = copy.deepcopy(model)
    assert not any(polynomials(twin)) and all(polynomials(model))
    torch.testing.assert_close(twin.predict(batch).forces, expected, rtol=0, atol=1e-11)

    species = torch.tensor([model.elements.index(number) for number in batch.numbers.tolist()])
    plan = make_plan(batch.edge_index, batch.unit_shifts, species)

    def step(positions: torch.Tensor) -> list[torch.Tensor | None]:
        with with_plan(model, plan):
            return [model.predict(replace(batch, positions=positions)).forces]

    played = record(step, [batch.positions], [])
    (forces,) = played(batch.positions + 0.0)
    torch.testing.assert_close(forces, expected, rtol=0, atol=1e-11)


# ---- what a GPU is given ---------------------------------------------------------------------------------------------


def fallback(polynomial: Any) -> Any:
    return importlib.import_module("cuequivariance_torch").SegmentedPolynomial(polynomial, method="naive")


def assert_fit_for_gpus(polynomial: Any, extent: int) -> None:
    """What the library's kernel ``uniform_1d`` asks for before it runs."""
    squeezed = polynomial.flatten_coefficient_modes().squeeze_modes()
    for operand in squeezed.operands:
        assert operand.ndim in (0, 1) and operand.all_same_segment_shape()
        assert operand.ndim == 0 or operand.segment_shape == (extent,)
    assert all(product.coefficient_subscripts == "" for _, product in squeezed.operations)


@needs_it
@pytest.mark.parametrize(
    "irreps, extent",
    [("8x0e+8x1o+8x2e", 8), ("4x0e+2x1o+2x1e", 2), ("6x0e+4x1o", 2)],
    ids=["one", "several", "odd"],
)
def test_the_convolution_as_gpus_compute_it(irreps: str, extent: int) -> None:
    """Channels in pieces of one length and one coefficient a path are the same polynomial of the same tensors."""
    paths, middle = channelwise_paths(irreps, "1x0e+1x1o+1x2e", irreps)
    layer = Convolution(irreps, "1x0e+1x1o+1x2e", paths, middle, TensorSource(None))
    cue = importlib.import_module("cuequivariance")
    whole, pieces = layer.polynomial.build(cue), layer.polynomial.build_uniform(cue)
    assert [one.size for one in whole.operands] == [one.size for one in pieces.operands]
    assert_fit_for_gpus(pieces, extent)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(5, one.size, generator=generator, dtype=torch.float64) for one in whole.inputs]
    (expected,), (actual,) = fallback(whole)(inputs), fallback(pieces)(inputs)
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@needs_it
def test_the_contraction_as_gpus_compute_it() -> None:
    irreps = "4x0e+4x1o"
    layer = SymmetricContraction(irreps, irreps, 3, 2, TensorSource(None))
    polynomial = ContractionPolynomial(layer.coefficients.form, parse_irreps(irreps)[0].multiplicity)
    built = polynomial.build_uniform(importlib.import_module("cuequivariance"))
    assert_fit_for_gpus(built, 4)
    assert len(built.operations) == 3 and built.inputs[0].num_segments == len(polynomial.terms) > 10


@needs_it
def test_a_gpu_without_its_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuequivariance_missing_reason("cpu") is None
    reason = cuequivariance_missing_reason("cuda")
    if importlib.util.find_spec("cuequivariance_ops_torch") is None:
        assert reason is not None and "cuequivariance-ops-torch-cu12" in reason
    cuequivariance_missing_reason.cache_clear()
    monkeypatch.setattr(importlib.import_module("cuequivariance_torch"), "__version__", "0.5.1")
    old = library.cuequivariance_missing_reason("cpu")
    cuequivariance_missing_reason.cache_clear()
    assert old is not None and "0.5.1 is too old" in old
