"""Where layers get their tensors from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from forcetune.kernels.tensors import TensorSource, UnfitError, register


def stored() -> dict[str, torch.Tensor]:
    return {
        "a.weight": nn.Parameter(torch.arange(6.0).view(2, 3)),
        "a.b.size": torch.tensor(4),
        "a.empty": torch.zeros(0),
        "c": torch.ones(2, dtype=torch.float64),
    }


def test_stored_tensors_are_taken_by_name_and_shape() -> None:
    tensors = stored()
    source = TensorSource(tensors)
    inner = source.within("a")
    assert not source.fresh and not inner.draws
    assert inner.take("weight", (2, 3), torch.randn) is tensors["a.weight"]
    assert int(inner.within("b").take("size", ())) == 4
    assert source.left_over() == ["a.empty", "c"]
    assert inner.optional("empty") is tensors["a.empty"] and inner.optional("nothing") is None
    assert source.left_over() == ["c"]


def test_what_is_missing_or_has_another_shape_is_named() -> None:
    source = TensorSource(stored()).within("a")
    with pytest.raises(UnfitError, match=r"it has no a\.bias"):
        source.take("bias", (3,), torch.randn)
    with pytest.raises(UnfitError, match=r"shape of a.weight differs .*: \(2, 3\) and \(3, 2\)"):
        source.take("weight", (3, 2), torch.randn)
    assert source.take("weight", None).shape == (2, 3)
    with pytest.raises(UnfitError, match=r"it has no a\.weight"):
        TensorSource(None).within("a").take("weight", (2,))


def test_new_tensors_are_drawn_in_float64() -> None:
    source = TensorSource(None)
    assert source.fresh and source.draws and source.left_over() == [] and source.optional("x") is None
    weight = source.take("weight", (2, 3), torch.randn)
    assert isinstance(weight, nn.Parameter) and weight.dtype == torch.float64 and weight.shape == (2, 3)
    buffer = source.take("r_max", (), torch.tensor(5.0), parameter=False)
    assert not isinstance(buffer, nn.Parameter) and buffer.dtype == torch.float64
    assert source.take("count", (), torch.tensor(3), parameter=False).dtype == torch.int64


def test_weights_are_drawn_again_and_everything_else_is_kept() -> None:
    tensors = stored()
    source = TensorSource(tensors, redraw=True).within("a")
    assert source.draws and not source.fresh
    drawn = source.take("weight", (2, 3), torch.randn)
    assert isinstance(drawn, nn.Parameter) and drawn.dtype == torch.float32
    assert not torch.equal(drawn, tensors["a.weight"])
    assert source.within("b").take("size", (), torch.randn) is tensors["a.b.size"]
    frequencies = torch.tensor([1.0, 2.0])
    kept = TensorSource({"w": nn.Parameter(frequencies.clone())}, redraw=True)
    assert torch.equal(kept.take("w", (2,), 3 * frequencies), frequencies)


def test_constants_are_found_by_layer() -> None:
    source = TensorSource({}, {"a.tp._w3j_1_1_0": torch.ones(3, 3, 1)})
    coupling = source.within("a").within("tp").constant("_w3j_1_1_0")
    assert coupling is not None and coupling.dtype == torch.float64
    assert source.constant("_w3j_1_1_0") is None


def test_modules_get_copies() -> None:
    module, tensors = nn.Module(), stored()
    register(module, "weight", tensors["a.weight"])
    register(module, "c", tensors["c"])
    assert isinstance(module.weight, nn.Parameter) and module.weight.requires_grad
    assert dict(module.named_buffers()).keys() == {"c"}
    with torch.no_grad():
        module.weight.zero_()
    assert float(tensors["a.weight"].detach().abs().sum()) > 0
