"""What forcetune does not compute is refused by name, in a file and in memory."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from forcetune.backbones.loading import load
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.trusted import LibraryMace
from forcetune.errors import InputError
from models import NONLINEAR, make_mace

GATED: dict[str, Any] = {"first": NONLINEAR, "later": NONLINEAR, "readout": "NonLinearBiasReadoutBlock"}
Change = Callable[[Any], None]


def _set(path: str, value: Any) -> Change:
    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value)

    return change


def _paths(path: str, **values: Any) -> Change:
    """Every path of a layer of e3nn with other values."""

    def change(model: Any) -> None:
        layer = model.get_submodule(path)
        layer.instructions = [entry._replace(**values) for entry in layer.instructions]

    return change


def _reversed_paths(model: Any) -> None:
    layer = model.interactions[1].conv_tp
    layer.instructions = layer.instructions[::-1]


def _wrong_shape(model: Any) -> None:
    model.interactions[0].linear.weight = nn.Parameter(torch.zeros(7, dtype=torch.float64))


def _surplus_tensor(model: Any) -> None:
    model.register_buffer("field", torch.ones(3))


def _missing_tensor(model: Any) -> None:
    del model.products[0].linear.weight


def _no_readout(model: Any) -> None:
    model.readouts[0] = nn.Identity()


def _other_couplings(model: Any) -> None:
    contraction = model.products[0].symmetric_contractions.contractions[0]
    contraction.U_matrix_2 = contraction.U_matrix_2.permute(2, 0, 1).contiguous()


def _other_symbols(model: Any) -> None:
    for name, tensor in model.named_buffers():
        if "_w3j_1_2_1" in name:
            tensor.mul_(2)


def _another_layer(model: Any) -> None:
    model.interactions[0].conv_tp_weights.net.append(nn.SiLU())


def _hook(model: Any) -> None:
    model.interactions[0].register_forward_hook(print)


def _irreps(path: str, name: str, text: str) -> Change:
    def change(model: Any) -> None:
        from e3nn import o3

        setattr(model.get_submodule(path), name, o3.Irreps(text))

    return change


REFUSED: dict[str, tuple[dict[str, Any], Change, str]] = {
    "activation of a radial layer": (
        {},
        _set("interactions.0.conv_tp_weights.layer0.act.f", torch.tanh),
        "interactions.0.conv_tp_weights.layer0.act has f = 'tanh' where 'silu' was expected",
    ),
    "a function from elsewhere": (
        {},
        _set("interactions.0.conv_tp_weights.layer1.act.f", operator.neg),
        "act has f = '_operator.neg'",
    ),
    "no activation": ({}, _set("interactions.0.conv_tp_weights.layer0.act", None), "none where there should be one"),
    "factor that is left out": ({}, _set("readouts.1.non_linearity.acts.0._is_id", True), "_is_id = True"),
    "gate of the readout": (
        {},
        _set("readouts.1.non_linearity.acts.0.f", torch.nn.functional.logsigmoid),
        "its gate is log_sigmoid, which is none of silu, tanh",
    ),
    "factor of a path": ({}, _paths("interactions.0.linear", path_weight=2.0), "interactions.0.linear has .*factors"),
    "factor of a convolution": ({}, _paths("interactions.1.conv_tp", path_weight=2.0), "interactions.1.conv_tp has pa"),
    "order of paths": ({}, _reversed_paths, "interactions.1.conv_tp has paths"),
    "factor of a skip connection": ({}, _paths("interactions.1.skip_tp", path_weight=2.0), "interactions.1.skip_tp"),
    "mode of a skip connection": ({}, _paths("interactions.1.skip_tp", connection_mode="uvu"), "interactions.1.skip"),
    "factor of a bias": (GATED, _paths("readouts.1.linear_2", path_weight=2.0), "readouts.1.linear_2 has"),
    "shape": ({}, _wrong_shape, r"shape of interactions.0.linear.weight differs .*\(7,\)"),
    "surplus tensor": ({}, _surplus_tensor, "no place for its tensor field"),
    "missing tensor": ({}, _missing_tensor, "it has no products.0.linear.weight"),
    "unknown block": ({"later": "RealAgnosticAttResidualInteractionBlock"}, lambda _: None, "AttResidual"),
    "unknown readout": ({}, _no_readout, "readouts.0"),
    "unknown option of a block": (
        {},
        _set("interactions.1.use_magic", True),
        r"interactions.1 \(RealAgnosticResidualInteractionBlock\) has use_magic = True, which forcetune does not know",
    ),
    "unknown option of the model": (
        {},
        _set("dispersion", "d3"),
        r"the model \(ScaleShiftMACE\) has dispersion = 'd3'",
    ),
    "unknown private option": ({}, _set("products.0._mode", "fast"), "products.0 .* has _mode = 'fast'"),
    "couplings": ({}, _other_couplings, "U_matrix_2 has shape"),
    "3j symbols": ({}, _other_symbols, "_w3j_1_2_1 has other values"),
    "normalisation of harmonics": ({}, _set("spherical_harmonics.normalization", "norm"), "normalization = 'norm'"),
    "harmonics of a vector": ({}, _set("spherical_harmonics.normalize", False), "normalize = False"),
    "order of harmonics": ({}, _irreps("spherical_harmonics", "irreps_out", "1x0e+1x1o"), "irreps_out = '1x0e"),
    "irreps of a layer": ({}, _irreps("interactions.1.linear_up", "irreps_in", "8x0e+8x1e"), "irreps_in = '8x0e"),
    "no skip connection": ({}, _set("products.1.use_sc", False), "use_sc = False where True was expected"),
    "order of a contraction": (
        {},
        _set("products.0.symmetric_contractions.contractions.0.correlation", 3),
        "correlation = 3 where 2",
    ),
    "code instead of a method": ({}, _set("forward", functools.partial(print)), "code of the file's own attached"),
    "a hook": ({}, _hook, "interactions.0 has code of the file's own attached"),
    "irreps of the readout": ({"mlp_irreps": "4x0e"}, _irreps("readouts.1", "hidden_irreps", "2x0e+2x0o"), "readout"),
    "function of the gates": (
        GATED,
        _set("interactions.0.equivariant_nonlin._act_gate", torch.tanh),
        "equivariant_nonlin has _act_gate = 'tanh' where 'sigmoid' was expected",
    ),
    "functions of the gates exchanged": (
        GATED,
        _set("interactions.0.equivariant_nonlin._act_scalar", torch.sigmoid),
        "_act_scalar = 'sigmoid' where 'silu' was expected",
    ),
    "factor of the gates": (GATED, _set("interactions.1.equivariant_nonlin._gate_cst", 1.0), "_gate_cst = 1.0"),
    "order of the gates": (
        GATED,
        _set("interactions.1.equivariant_nonlin._gated_info", [(24, 24, 3, 8, 8), (48, 40, 5, 8, 0)]),
        "_gated_info",
    ),
    "layout": (GATED, _set("interactions.1.equivariant_nonlin._layout_is_ir_mul", True), "_layout_is_ir_mul = True"),
    "another layer": (GATED, _another_layer, "conv_tp_weights.net has the layers"),
    "another function": (GATED, _set("interactions.0.conv_tp_weights.net.2", nn.Tanh()), "Tanh"),
    "epsilon of a norm": (GATED, _set("interactions.0.conv_tp_weights.net.1.eps", 1e-3), "eps = 0.001"),
    "paths that are no paths": ({}, _set("interactions.0.linear.instructions", [(1,)]), "interactions.0.linear"),
    "paths of text": ({}, _set("interactions.0.conv_tp.instructions", ["ab"]), "interactions.0.conv_tp"),
    "other precision": ({}, lambda model: model.half(), "neither in float32 nor in float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_compute_something_else_are_refused(case: str, tmp_path: Path) -> None:
    options, change, words = REFUSED[case]
    model = make_mace(**options)
    change(model)
    torch.save(model, tmp_path / "a.model")
    with pytest.raises(InputError, match=rf"a\.model cannot be rebuilt: .*{words}.*--trust") as caught:
        load(tmp_path / "a.model", device="cpu")
    assert caught.value.exit_code == 2
    actual = MaceBackbone.from_module(model)
    assert isinstance(actual, LibraryMace) and actual.model is model
    assert actual.reason in str(caught.value)


@pytest.mark.parametrize("name", ["joint_embedding", "embedding_readout"])
def test_further_inputs_are_refused(name: str, tmp_path: Path) -> None:
    model = make_mace()
    model.add_module(name, nn.Linear(2, 2))
    torch.save(model, tmp_path / "a.model")
    with pytest.raises(InputError, match="further inputs such as charge or spin"):
        load(tmp_path / "a.model", device="cpu")
