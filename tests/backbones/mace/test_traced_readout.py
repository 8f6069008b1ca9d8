"""Readouts that were traced into lists of operations: read back as layers, and refused where they do anything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from forcetune.backbones.mace.module_spec import Node
from forcetune.backbones.mace.traced_readout import traced_readout
from forcetune.backbones.safe_unpickle.reader import Record, read_inert
from forcetune.kernels.tensors import UnfitError

INPUTS, HIDDEN, HEADS = 6, 4, 3
FACTOR = 1.6791767923989418


class Weighted(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64))


class Readout(nn.Module):
    """The operations of mace's nonlinear readout: products of flat weights with scaled features, SiLU between them."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Weighted(INPUTS * HIDDEN), Weighted(HIDDEN * HEADS)
        self.before = changes.get("before", 1 / math.sqrt(INPUTS))
        self.after = changes.get("after", 1 / math.sqrt(HIDDEN))
        self.function: Callable[[Tensor], Tensor] = changes.get("function", nn.functional.silu)
        self.first = changes.get("first", 0)

    def forward(self, x):  # an annotation would become part of the graph
        rows = x.reshape(-1, INPUTS).reshape(x.shape[0], INPUTS, 1) * self.before
        hidden = torch.tensordot(rows, self.linear_1.weight.reshape((INPUTS, HIDDEN)), dims=((1,), (0,)))
        hidden = hidden.permute(0, 2, 1).reshape(x.shape[0], HIDDEN).narrow(-1, self.first, HIDDEN)
        hidden = self.function(hidden).mul(FACTOR).reshape(x.shape[0], HIDDEN, 1)
        out = torch.tensordot(hidden, self.linear_2.weight.reshape((HIDDEN, HEADS)), dims=((1,), (0,)))
        return (out * self.after).permute(0, 2, 1).reshape(x.shape[0], HEADS)


class Activation(nn.Module):
    def forward(self, x):  # an annotation would become part of the graph
        return nn.functional.silu(x.narrow(-1, 0, HIDDEN)).mul(FACTOR)


def record_of(module: nn.Module, folder: Path) -> Record:
    """As a file of torch.save has it."""
    torch.save(fx.symbolic_trace(module), folder / "traced.pt")
    found = read_inert(folder / "traced.pt")
    assert isinstance(found, Record) and found.name == "reduce_graph_module"
    return found


def activation_of(node: Node) -> Node:
    return node.child("acts.0")


def test_a_readout_is_read_back(tmp_path: Path) -> None:
    module = Readout()
    node = traced_readout(record_of(module, tmp_path))
    assert (node.kind, node.attributes["hidden_irreps"], node.attributes["num_heads"]) == (
        "NonLinearReadoutBlock",
        "4x0e",
        3,
    )
    for name, irreps in (("linear_1", ("6x0e", "4x0e")), ("linear_2", ("4x0e", "3x0e"))):
        layer = node.child(name)
        assert (layer.attributes["irreps_in"], layer.attributes["irreps_out"]) == irreps
        assert torch.equal(layer.tensors["weight"], getattr(module, name).weight)
    function = activation_of(node.child("non_linearity"))
    assert function.attributes["f"].name == "silu"
    assert function.attributes["cst"] == pytest.approx(FACTOR, rel=1e-12)
    assert not function.attributes["_is_id"]


def test_an_activation_is_read_back(tmp_path: Path) -> None:
    node = traced_readout(record_of(Activation(), tmp_path))
    assert (node.kind, node.attributes["irreps_in"]) == ("Activation", "4x0e")
    function = activation_of(node)
    assert (function.attributes["f"].name, function.attributes["cst"]) == ("silu", FACTOR)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another factor before": ({"before": 0.5}, "other factors"),
    "some features only": ({"first": 1}, "some features only"),
    "an unknown function": ({"function": torch.sin}, "does not know"),
    "no activation": ({"function": lambda x: x}, "other factors|unknown"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_readouts_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UnfitError, match=message):
        traced_readout(record_of(Readout(**changes), tmp_path))


def test_other_graphs_are_refused(tmp_path: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.something = nn.Linear(2, 2)

        def forward(self, x):  # an annotation would become part of the graph
            return self.something(x)

    with pytest.raises(UnfitError, match="prepare"):
        traced_readout(record_of(Other(), tmp_path))


@pytest.mark.parametrize("code", ["", "x = 1", "def f(x):\n    while x:\n        pass\n", "def f(x:\n", "x" * 30_000])
def test_code_that_is_no_list_of_operations_is_refused(code: str, tmp_path: Path) -> None:
    record = record_of(Activation(), tmp_path)
    record.args[0]["_code"] = code
    with pytest.raises(UnfitError):
        traced_readout(record)
