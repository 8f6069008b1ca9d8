"""float32 where it is enough: products in full precision, and sums of energies in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ase.build import bulk
from torch.utils._python_dispatch import TorchDispatchMode

import forcetune
from forcetune.backbones.protocol import Prediction
from forcetune.evaluation.metrics import build_graphs
from forcetune.kernels.precision import full_precision
from simulations import water_box
from systems import backbone, frames_of

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv"}


class TF32(TorchDispatchMode):
    """Rounds the factors of float32 matrix products to ten bits, as tensor cores do where it is allowed.

    Attributes:
        products: how many there were.
        allowed: whether PyTorch's settings allowed it at each of them.
    """

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.always = always
        self.products = 0
        self.allowed: set[bool] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func.overloadpacket).removeprefix("aten.") in PRODUCTS:
            self.products += 1
            allowed = torch.backends.cuda.matmul.allow_tf32
            self.allowed.add(bool(allowed))
            if self.always or allowed:
                args = [rounded(one) for one in args]
        return func(*args, **(kwargs or {}))


def rounded(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return value
    return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).view(value.shape)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def predicted(dtype: str, mode: TF32 | None) -> Prediction:
    model = forcetune.load("mini", elements=[1, 8], dtype=dtype, kernels="torch", device="cpu")
    batch = build_graphs(model, frames_of(water_box(1)))[0].to(dtype=getattr(torch, dtype))
    if mode is None:
        return model.predict(batch)
    with mode:
        return model.predict(batch)


def error(one: Prediction, other: Prediction) -> float:
    return float((one.forces.double() - other.forces.double()).abs().max())


def test_tf32_would_spoil_forces_and_is_kept_out() -> None:
    """Acted out on the CPU: what it would do, and that a process that allows it gets forces without it."""
    exact = predicted("float64", None)
    plain = error(predicted("float32", None), exact)
    always = TF32(always=True)
    spoilt = error(predicted("float32", always), exact)
    assert always.products > 20 and spoilt > 50 * plain and spoilt > 1e-3
    torch.set_float32_matmul_precision("high")
    where_allowed = TF32(always=False)
    assert error(predicted("float32", where_allowed), exact) == plain
    assert where_allowed.products == always.products and where_allowed.allowed == {False}
    assert torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "high"


def test_settings_come_back() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    for before in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(before)
        with pytest.raises(KeyError), full_precision():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
            raise KeyError
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="since PyTorch 2.9")
def test_the_newer_setting_comes_back() -> None:
    matmul: Any = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = "tf32"
    with full_precision():
        assert matmul.fp32_precision == "ieee" and not matmul.allow_tf32
    assert matmul.fp32_precision == "tf32"


def test_energies_of_many_atoms_are_summed_in_float64() -> None:
    """In float32 a sum over thousands of atoms would be off by far more than its terms are."""
    model = backbone(max_ell=1, correlation=1, hidden_irreps="4x0e", elements=(29,), dtype=torch.float32)
    atoms = bulk("Cu", "fcc", a=3.6, cubic=True).repeat((4, 4, 4))
    atoms.rattle(0.1, seed=1)
    batch = build_graphs(model, frames_of(atoms))[0].to(dtype=torch.float32)
    prediction = model.predict(batch)
    assert prediction.energies is not None and prediction.energy.dtype == torch.float64
    assert float(prediction.energy) == pytest.approx(float(prediction.energies.sum()), rel=1e-14)
