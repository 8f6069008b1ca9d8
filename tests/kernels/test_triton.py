"""Layers computed by Triton's kernels: values and every gradient as by PyTorch, and that they compile for GPUs.

Triton's interpreter takes the place of a GPU, which has to be said before Triton is imported, and Triton (a gigabyte)
is not part of the development environment: one test here runs the others in processes of their own, where Triton is
installed, where ``FORCETUNE_TRITON`` names a folder for it, or in CI.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import forcetune
from convolutions import PATHS, plan_for, tensors
from forcetune.adapters.attach import attach
from forcetune.adapters.methods import method
from forcetune.backbones.network import NetworkBackbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate
from forcetune.irreps import parse_irreps
from forcetune.kernels import contraction as contraction_reference
from forcetune.kernels.compiled.choice import choose_kernels, kernels_in_use
from forcetune.kernels.compiled.sparse_form import SparseForm
from forcetune.kernels.convolution import convolve as convolution_reference
from forcetune.kernels.edge_plan import make_plan, with_plan
from forcetune.kernels.harmonics import reflection_labels
from forcetune.kernels.layers import Convolution, channelwise_paths
from forcetune.kernels.padding import build_layout, fitted
from forcetune.kernels.polynomial import bilinear_form
from forcetune.kernels.symmetric_contraction import product_couplings
from forcetune.kernels.tensors import TensorSource
from forcetune.kernels.triton import contraction, convolution, convolution_code
from forcetune.kernels.triton.convolution_code import Flags, Shape
from forcetune.kernels.triton.library import kernel_from
from oracle_install import UnavailableError, install_beside
from sevennet_models import RECIPES, backbone_of
from sevennet_oracle import skip_or_raise
from systems import backbone, cluster, frames_of, perturb

VERSION = "triton==3.9.0"
FOLDER_VARIABLE = "FORCETUNE_TRITON"
ROOT = Path(__file__).parents[1]

absent = importlib.util.find_spec("triton") is None
interprets = not absent and os.environ.get("TRITON_INTERPRET") == "1"
USUAL = {
    "test_convolutions_equal_the_operations": 4,
    "test_channels_in_several_blocks_and_ghosts_behind_the_atoms": 1,
    "test_contractions_equal_the_operations": 3,
    "test_models_are_the_same": 2,
    "test_training_steps_by_tritons_kernels_stay_on_the_device": 2,
}
"""Tests that the interpreter runs always, and how many cases of them."""
SLOW = {
    "test_channels_in_several_blocks_and_ghosts_behind_the_atoms": 1,
    "test_models_are_the_same": 4,
    "test_a_padded_batch_in_float32": 1,
}
COMPILED = {"test_kernels_compile_for_gpus": 4, "test_contractions_compile_for_gpus": 3}

by_interpreter = pytest.mark.skipif(not interprets, reason="a process of its own runs this test by the interpreter")
by_compiler = pytest.mark.skipif(absent or interprets, reason="a process of its own runs this test by the compiler")


def installed(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Folders to search for Triton.

    Raises:
        UnavailableError: it is not installed and cannot be.
    """
    if not absent:
        return []
    named, cache = os.environ.get(FOLDER_VARIABLE), getattr(request.config, "cache", None)
    if sys.platform != "linux" or not (named or os.environ.get("CI")):
        pytest.skip(f"Triton is not installed (a gigabyte; {FOLDER_VARIABLE} names a folder to install it into)")
    folder = Path(named) if named else tmp_path if cache is None else Path(cache.mkdir("triton"))
    target = install_beside(folder, VERSION.replace("==", "-"), [VERSION], "triton", title="Triton")
    return [str(target)]


@pytest.mark.skipif(interprets, reason="this is that process")
@pytest.mark.parametrize(
    "way, selection, expected",
    [
        ("interpreter", "not slow", USUAL),
        pytest.param("interpreter", "slow", SLOW, marks=pytest.mark.slow),
        pytest.param("compiler", "slow", COMPILED, marks=pytest.mark.slow),
    ],
)
def test_in_a_process_of_its_own(
    way: str, selection: str, expected: dict[str, int], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The usual tests are run by the interpreter; slow ones, too, and by the compiler, with ``-m slow``."""
    if os.environ.get("FORCETUNE_TRITON_PROCESS"):
        pytest.skip("this is that process")
    try:
        folders = installed(request, tmp_path)
    except UnavailableError as reason:
        skip_or_raise(reason)
        return
    paths = [str(Path(forcetune.__file__).parents[1]), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    chosen = {"TRITON_INTERPRET": "1"} if way == "interpreter" else {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", selection),
            __file__,
            f"{ROOT}/training/test_devices.py::test_training_steps_by_tritons_kernels_stay_on_the_device",
        ],
        cwd=ROOT.parent,
        env=environment
        | {
            "PYTHONPATH": os.pathsep.join([*folders, *paths]),
            "FORCETUNE_TRITON_PROCESS": way,
            "TRITON_DEFAULT_FP_FUSION": "1",
        }
        | chosen,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    passed = re.findall(r"^PASSED \S+::(\w+)", done.stdout, re.MULTILINE)
    assert {name: passed.count(name) for name in expected} == expected


@pytest.mark.skipif(interprets, reason="Triton's interpreter computes on a CPU")
def test_on_a_cpu_it_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"Triton's kernels are for CUDA devices, not for cpu; or use model\.kernels=auto"
    ):
        forcetune.load("mini", kernels="triton", device="cpu")


# ---- operators -------------------------------------------------------------------------------------------------------


def derivatives(out: list[Tensor], flat: list[Tensor], again: list[Tensor]) -> list[Tensor]:
    """Outputs, the gradients of a scalar of them, and the gradients of a scalar of these."""
    gradients = torch.autograd.grad(
        sum((part**2).sum() for part in out), flat, create_graph=True, allow_unused=True, materialize_grads=True
    )
    mixed = sum((g * torch.linspace(-1, 2, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in gradients)
    second = torch.autograd.grad(mixed + out[0].sum(), again, allow_unused=True, materialize_grads=True)
    return [*out, *gradients, *second]


def assert_close(values: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(values, expected, strict=True):
        scale = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        assert torch.allclose(one, other, rtol=0, atol=tolerance * scale)


@by_interpreter
@pytest.mark.parametrize("name, paired", [("cluster", True), ("one way", True), ("one way", False), ("no edges", True)])
def test_convolutions_equal_the_operations(name: str, paired: bool) -> None:
    plan, _ = plan_for(name, paired=paired)
    radial, angular, features = tensors(plan)
    flat = [radial, *angular, *features]
    out = [*convolution.convolve(PATHS, plan, radial, torch.cat(angular, dim=1), features)]
    expected = [*convolution_reference(PATHS, plan, radial, angular, features)]
    assert_close(derivatives(out, flat, flat), derivatives(expected, flat, flat), 1e-13)


@by_interpreter
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_channels_in_several_blocks_and_ghosts_behind_the_atoms(dtype: torch.dtype) -> None:
    """Of 70 channels a warp treats 64 at once in float64; a sender that receives nothing stands behind the atoms."""
    inputs, harmonics = "70x0e+3x1o", "1x0e+1x1o"
    paths, middle = channelwise_paths(inputs, harmonics, "0e+1o")
    layer = Convolution(inputs, harmonics, paths, middle, TensorSource(None))
    index = torch.tensor([[1, 2, 0], [0, 0, 1]])
    plan = make_plan(index, torch.zeros(3, 3), torch.tensor([0, 1]), ghosts=1)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    radial, angular = random(plan.n_pairs, layer.weight_numel), random(plan.n_pairs, sum(layer.widths))
    features = [random(3, block.dim, block.multiplicity) for block in parse_irreps(inputs)]
    flat = [radial, angular, *features]
    out = [*convolution.convolve(layer.structure, plan, radial, angular, features)]
    parts = angular.split(layer.widths, dim=1)
    expected = [*convolution_reference(layer.structure, plan, radial, parts, features)]
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    assert_close(derivatives(out, flat, flat), derivatives(expected, flat, flat), tolerance)


def sparse_form(irreps: str, outputs: tuple[str, ...], order: int) -> tuple[Any, SparseForm]:
    tables = [[product_couplings(irreps, out, nu) for nu in range(1, order + 1)] for out in outputs]
    form = bilinear_form(tables, reflection_labels(parse_irreps(irreps)))
    return form, SparseForm(form)


@by_interpreter
@pytest.mark.parametrize("order, counts", [(1, (0, 2)), (2, (2, 3)), (3, (1,))])
def test_contractions_equal_the_operations(order: int, counts: tuple[int, ...]) -> None:
    irreps, outputs, channels = "1x0e+1x1o", ("1x0e", "1x1o"), 3
    form, sparse = sparse_form(irreps, outputs, order)
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    species = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    plan = make_plan(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3), species)
    present = [kind for kind, count in enumerate(counts) if count]
    x = [random(sum(counts), dim, channels) for dim in (1, 3)]
    weights = [random(len(present), basis.value.shape[1], channels) for basis in sparse.basis]
    tables = contraction.TermTables(sparse)
    out = [*contraction.contract(tables, sparse, plan, x, sparse.fold(weights, channels))]
    folded = contraction_reference.fold(form, weights)
    whole = contraction_reference.polynomial(
        form, contraction_reference.arranged(x, form.order), folded, [counts[kind] for kind in present]
    )
    expected = [part.permute(2, 0, 1) for part in whole.split(form.dims)]
    both = [*x, *weights]
    assert_close(derivatives(out, x, both), derivatives(expected, x, both), 1e-12)


# ---- models ----------------------------------------------------------------------------------------------------------


def small(name: str, dtype: torch.dtype = torch.float64) -> NetworkBackbone:
    if name == "MACE":
        return backbone(max_ell=1, correlation=2, hidden_irreps="2x0e+2x1o", elements=(1, 6), dtype=dtype)
    return backbone_of(RECIPES[next(one for one, recipe in RECIPES.items() if recipe.species != "univ")])


def batch_for(model: NetworkBackbone) -> Batch:
    """Three atoms, and one without neighbors."""
    two = [*model.elements, *model.elements][:2]
    atoms = cluster(two, 3)
    return collate(build_graphs(model, frames_of(atoms, atoms[:1]))).to(dtype=model.dtype)


def results(model: NetworkBackbone, batch: Batch) -> list[Tensor]:
    """Energies, forces and stress, and the gradients of a loss by everything that is trained."""
    parameters = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    prediction = model.predict(batch, stress=True, create_graph=True)
    assert prediction.stress is not None
    loss = prediction.energy.square().mean() + prediction.forces.square().sum() + prediction.stress.square().sum()
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return [prediction.energy, prediction.forces, prediction.stress, *grads]


def assert_same(values: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Within a tolerance of the largest value of each; gradients near 0 within that of a millionth of the largest."""
    floor = 1e-6 * max(float(value.detach().abs().max()) for value in expected[3:] if value.numel())
    assert floor > 0
    for one, other in zip(values, expected, strict=True):
        scale = max(float(other.detach().abs().max()), floor) if other.numel() else 1.0
        assert one.dtype == other.dtype and torch.allclose(one, other, rtol=0, atol=tolerance * scale)


@by_interpreter
@pytest.mark.parametrize(
    "name, adapter",
    [
        ("MACE", "mmea"),
        pytest.param("MACE", "elora", marks=pytest.mark.slow),
        pytest.param("MACE", "full", marks=pytest.mark.slow),
        pytest.param("SevenNet", "mmea", marks=pytest.mark.slow),
        ("SevenNet", "elora"),
        pytest.param("SevenNet", "full", marks=pytest.mark.slow),
    ],
)
def test_models_are_the_same(name: str, adapter: str) -> None:
    model = small(name)
    perturb(attach(model, method(adapter)))
    batch = batch_for(model)
    choose_kernels(model.model, "torch")
    expected = results(model, batch)
    choose_kernels(model.model, "triton")
    assert kernels_in_use(model.model) == "triton"
    assert_same(results(model, batch), expected, 1e-10)


@pytest.mark.slow
@by_interpreter
def test_a_padded_batch_in_float32() -> None:
    model = small("MACE", torch.float32)
    perturb(attach(model, method("mmea")))
    graphs = [graph.to(dtype=model.dtype) for graph in build_graphs(model, frames_of(cluster((1, 6), 3)))]
    layout = build_layout(graphs, 1, model.elements, model.cutoff, paired=True)
    padded = fitted(graphs[0], layout, model.elements)
    assert padded is not None and padded[0].n_atoms > graphs[0].n_atoms
    choose_kernels(model.model, "torch")
    with with_plan(model, padded[1]):
        expected = results(model, padded[0])
        choose_kernels(model.model, "triton")
        assert_same(results(model, padded[0]), expected, 1e-3)


# ---- the compiler ----------------------------------------------------------------------------------------------------


def compile_for(kernel: Any, constants: dict[str, Any], kind: str, capability: int, warps: int) -> int:
    """Compile a kernel for NVIDIA GPUs of a capability, and return the size of its machine code."""
    compiler, backends = importlib.import_module("triton.compiler"), importlib.import_module("triton.backends.compiler")
    integers = {"starts", "edges", "directions", "senders", "receivers", "kinds", "first_atom"}
    short = {"first_row", "rows", "columns", "first_use", "uses", "entries"}
    signature = {}
    for name in kernel.arg_names:
        one = (
            "i32"
            if name in ("n_pairs", "n_atoms")
            else "*i64"
            if name in integers
            else "*i32"
            if name in short
            else f"*{kind}"
        )
        signature[name] = "constexpr" if name in constants else one
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = importlib.import_module("triton").compile(
        source, target=backends.GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )
    return len(compiled.asm["cubin"])


@pytest.mark.slow
@by_compiler
@pytest.mark.parametrize("name", ["gather", "collect", "to_radial", "to_angular"])
def test_kernels_compile_for_gpus(name: str) -> None:
    inputs = "128x0e+64x1o"
    paths, middle = channelwise_paths(inputs, "1x0e+1x1o", "0e+1o")
    layer = Convolution(inputs, "1x0e+1x1o", paths, middle, TensorSource(None))
    product = convolution.tensor_product(tuple(convolution.flat_paths(layer.structure)))
    chosen = {"collect": product.from_source(1), "to_angular": product.members[-1:]}
    members = chosen.get(name) or next(group for group in product.together if group[0].path.channels == 64)
    cases: list[tuple[Flags | None, str, int]] = [(None, "fp32", 80), ((True,) * 4, "fp64", 90)]
    for moved, kind, capability in cases:
        shape: Shape = product.shape(members, moved)
        kernel = kernel_from(name, convolution._WRITERS[name](shape))
        constants = {"BLOCK": convolution.channel_block(shape.channels, 8)}
        constants = {"PAIRS": convolution.PAIRS, "BLOCK": 2} if name == "to_angular" else constants
        assert compile_for(kernel, constants, kind, capability, 2 if name == "to_angular" else 1) > 1000
    assert sum(member.path.dim_out for member in members) <= convolution_code.MOST_SUMS


@pytest.mark.slow
@by_compiler
@pytest.mark.parametrize("name", ["value", "to_features", "to_coefficients"])
def test_contractions_compile_for_gpus(name: str) -> None:
    kernels = importlib.import_module("forcetune.kernels.triton.contraction_kernels")
    sizes = {"terms": 61, "size": 10, "outputs": 4, "channels": 128, "ATOMS": contraction.ATOMS, "BLOCK": 64}
    kernel = getattr(kernels, name)
    for moved, kind, capability in ((False, "fp32", 80), (True, "fp64", 90)):
        constants = {one: value for one, value in (sizes | {"moved": moved}).items() if one in kernel.arg_names}
        assert compile_for(kernel, constants, kind, capability, 1) > 1000
