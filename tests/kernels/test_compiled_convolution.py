"""Compiled loops against PyTorch's operations, and their derivatives against finite differences."""

from __future__ import annotations

import itertools
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
from torch import Tensor

from convolutions import PATHS, plan_for, tensors
from forcetune.irreps import parse_irreps
from forcetune.kernels.compiled import choice, convolution, convolution_code, machine, threads
from forcetune.kernels.compiled.convolution_form import Shape
from forcetune.kernels.convolution import convolve as reference
from forcetune.kernels.edge_plan import make_plan
from forcetune.kernels.layers import Convolution, channelwise_paths
from forcetune.kernels.phase import Phase
from forcetune.kernels.tensors import TensorSource

pytestmark = pytest.mark.skipif(choice.missing_reason() is not None, reason="there are no compiled kernels")

SYSTEMS = ("cluster", "crystal", "one way", "no edges")


def derivatives(out: list[Tensor], flat: list[Tensor]) -> list[Tensor]:
    """Outputs, the gradients of a scalar of them, and the gradients of a scalar of these."""
    gradients = torch.autograd.grad(
        sum((part**2).sum() for part in out), flat, create_graph=True, allow_unused=True, materialize_grads=True
    )
    mixed = sum((g * torch.linspace(-1, 2, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in gradients)
    again = torch.autograd.grad(mixed + out[0].sum(), flat, allow_unused=True, materialize_grads=True)
    return [*out, *gradients, *again]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        scale = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        assert torch.allclose(one, other, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_equals_the_operations(name: str, paired: bool, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "thread_count", lambda _: count)
    plan, _ = plan_for(name, paired=paired)
    radial, angular, features = tensors(plan)
    flat = [radial, *angular, *features]
    actual = derivatives([*convolution.convolve(PATHS, plan, radial, torch.cat(angular, dim=1), features)], flat)
    assert_close(actual, derivatives([*reference(PATHS, plan, radial, angular, features)], flat), 1e-13)


IRREPS = {
    "mace": ("8x0e+8x1o", "1x0e+1x1o+1x2e+1x3o", "0e+1o+2e+3o"),
    "sevennet": ("32x0e+16x1o+8x2e", "1x0e+1x1o+1x2e", "0e+1o+2e"),
    "nequip": ("4x0e+4x0o+2x1e+6x1o+3x2e+2x2o", "1x0e+1x1o+1x2e", "0e+0o+1e+1o+2e+2o"),
    "high": ("2x0e+2x3o+2x4e", "1x0e+1x1o+1x4e", "0e+3o+4e"),
}


@pytest.mark.parametrize("irreps", list(IRREPS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_shape_of_paths(irreps: str, dtype: torch.dtype) -> None:
    inputs, harmonics, targets = IRREPS[irreps]
    paths, irreps_mid = channelwise_paths(inputs, harmonics, targets)
    layer = Convolution(inputs, harmonics, paths, irreps_mid, TensorSource(None))
    plan, _ = plan_for("crystal")
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    radial = random(plan.n_pairs, layer.weight_numel)
    angular = random(plan.n_pairs, sum(layer.widths))
    features = [random(plan.n_atoms, block.dim, block.multiplicity) for block in parse_irreps(inputs)]
    flat = [radial, angular, *features]
    actual = derivatives([*convolution.convolve(layer.structure, plan, radial, angular, features)], flat)
    parts = angular.split(layer.widths, dim=1)
    expected = derivatives([*reference(layer.structure, plan, radial, parts, features)], flat)
    assert_close(actual, expected, 1e-13 if dtype == torch.float64 else 1e-5)


def test_derivatives_are_those_of_finite_differences() -> None:
    index = torch.tensor([[1, 2, 0, 2, 0, 1], [0, 0, 1, 1, 2, 2]])
    plan = make_plan(index, torch.zeros(6, 3), torch.tensor([0, 1, 0]))
    radial, angular, features = tensors(plan)
    joined = torch.cat(angular, dim=1).detach().requires_grad_()

    def function(*flat: Tensor) -> tuple[Tensor, ...]:
        return convolution.convolve(PATHS, plan, flat[0], flat[1], flat[2:])

    assert torch.autograd.gradcheck(function, (radial, joined, *features))
    assert torch.autograd.gradgradcheck(function, (radial, joined, *features))


def test_inputs_that_are_not_contiguous_have_all_derivatives() -> None:
    plan, _ = plan_for("cluster")
    radial, angular, features = tensors(plan)
    flat = [radial, *angular, *features]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in features]
    strided = torch.stack((radial, radial), dim=2)[:, :, 0]
    actual = derivatives([*convolution.convolve(PATHS, plan, strided, torch.cat(angular, dim=1), turned)], flat)
    assert_close(actual, derivatives([*reference(PATHS, plan, radial, angular, features)], flat), 1e-13)


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=4)))
def test_only_what_is_wanted_is_computed(wanted: tuple[bool, ...]) -> None:
    plan, _ = plan_for("cluster")
    radial, angular, features = tensors(plan)
    values = [radial.detach(), torch.cat(angular, dim=1).detach(), *(x.detach() for x in features)]
    setting = convolution.Setting(convolution.flat_paths(PATHS), plan, Phase(), True, (True, True))
    outer = [torch.randn(plan.n_atoms, *shape, dtype=torch.float64) for shape in PATHS.groups]
    whole = setting.pull(outer, values, [True] * 4)
    actual = setting.pull(outer, values, wanted)
    for one, other, want in zip(actual, whole, wanted, strict=True):
        assert (one is not None) == want
        assert one is None or other is None or torch.allclose(one, other, rtol=1e-13, atol=1e-13)


def test_code_is_kept_on_disk_and_made_again_where_it_is_damaged(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCETUNE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "_MACHINES", {})
    written: list[str] = []
    text = "define void @nothing(ptr %table, i64 %first, i64 %last) {\n  ret void\n}\n"

    def write() -> str:
        written.append(text)
        return text

    def load() -> None:
        machine._MACHINES.clear()
        assert machine.compiled("a test", write).address("nothing") != 0

    load()
    load()
    assert len(written) == 1
    (file,) = (tmp_path / "kernels").glob("*.o")
    content = bytearray(file.read_bytes())
    content[8] ^= 1
    file.write_bytes(bytes(content))
    load()
    assert len(written) == 2
    load()
    assert len(written) == 2


@pytest.mark.parametrize("wanted", [None, (True, True, True)])
@pytest.mark.parametrize("moved", [None, (True, True, True)])
@pytest.mark.parametrize("splined", [False, True])
def test_memory_is_asked_for_ahead(
    wanted: tuple[bool, ...] | None, moved: tuple[bool, ...] | None, splined: bool
) -> None:
    """Couplings of 3 × 5 numbers take 2 lines and one that may be cut, radial weights of 8 channels 1 and one."""
    own = machine.Target("double", 8, 32)
    shape = Shape(3, 5, 8, False, moved, wanted, splined)  # pyright: ignore[reportArgumentType]
    asked = convolution_code.write(shape, own).text().count("llvm.prefetch")
    assert asked == (1 if moved is None else 2) * (3 + (0 if splined else 2))


def test_ranges_have_equal_weights() -> None:
    before = np.concatenate(([0], np.cumsum([1, 1, 1, 9, 1, 1, 1, 1])))
    bounds = threads.balanced(before, 2)
    assert bounds[0] == 0 and bounds[-1] == 8 and bounds == sorted(bounds)
    assert threads.balanced(before, 1) == [0, 8]
    assert threads.balanced(np.zeros(4), 3) == [0, 0, 0, 3]
