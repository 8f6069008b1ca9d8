"""Parts that were traced into lists of operations: read back as layers, and refused where they do anything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.check import check_node
from forcetune.backbones.mace.content import build_network, content_from_node
from forcetune.backbones.mace.module_spec import Node, node_from_record
from forcetune.backbones.mace.network import MaceNetwork
from forcetune.backbones.mace.traced_contraction import CODE
from forcetune.backbones.mace.traced_parts import traced_part
from forcetune.backbones.safe_unpickle.reader import Record, read_inert
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import collate
from forcetune.kernels.tensors import UnfitError
from models import make_mace, oracle, structure
from systems import frames_of

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
        hidden = torch.tensordot(rows, self.linear_1.weight.reshape((INPUTS, HIDDEN)), dims=([1], [0]))  # pyright: ignore[reportArgumentType]
        hidden = hidden.permute(0, 2, 1).reshape(x.shape[0], HIDDEN).narrow(-1, self.first, HIDDEN)
        hidden = self.function(hidden).mul(FACTOR).reshape(x.shape[0], HIDDEN, 1)
        out = torch.tensordot(hidden, self.linear_2.weight.reshape((HIDDEN, HEADS)), dims=([1], [0]))  # pyright: ignore[reportArgumentType]
        return (out * self.after).permute(0, 2, 1).reshape(x.shape[0], HEADS)


class Activation(nn.Module):
    def forward(self, x):  # an annotation would become part of the graph
        return nn.functional.silu(x.narrow(-1, 0, HIDDEN)).mul(FACTOR)


def record_of(module: nn.Module, folder: Path) -> Record:
    """As a file of torch.save has it."""
    torch.save(fx.symbolic_trace(module), folder / "traced.pt")
    record = read_inert(folder / "traced.pt")
    assert isinstance(record, Record) and record.name == "reduce_graph_module"
    return record


def activation_of(node: Node) -> Node:
    return node.child("acts.0")


def test_a_readout_is_read_back(tmp_path: Path) -> None:
    module = Readout()
    node = traced_part(record_of(module, tmp_path))
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
    node = traced_part(record_of(Activation(), tmp_path))
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
        traced_part(record_of(Readout(**changes), tmp_path))


def test_other_graphs_are_refused(tmp_path: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.something = nn.Linear(2, 2)

        def forward(self, x):  # an annotation would become part of the graph
            return self.something(x)

    with pytest.raises(UnfitError, match="prepare"):
        traced_part(record_of(Other(), tmp_path))


@pytest.mark.parametrize("code", ["", "x = 1", "def f(x):\n    while x:\n        pass\n", "def f(x:\n", "x" * 30_000])
def test_code_that_is_no_list_of_operations_is_refused(code: str, tmp_path: Path) -> None:
    record = record_of(Activation(), tmp_path)
    record.args[0]["_code"] = code
    with pytest.raises(UnfitError):
        traced_part(record)


# ---- contractions, as mace's prepare traces them since 0.3.15 ------------------------------------------------------


def prepared(**options: Any) -> Any:
    """A model of mace whose contractions and last activation are graphs."""
    from mace.tools.compile import disable_e3nn_codegen, simplify

    with disable_e3nn_codegen():
        model = make_mace(**options)
    return simplify(model)


KINDS: dict[str, dict[str, Any]] = {
    "order 2": {},
    "order 3": {"correlation": 3, "hidden_irreps": "4x0e+4x1o"},
    "agnostic": {"use_agnostic_product": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_models_are_read_back(kind: str, tmp_path: Path) -> None:
    model = prepared(**KINDS[kind])
    torch.save(model, tmp_path / "prepared.model")
    actual = MaceBackbone.load(tmp_path / "prepared.model")
    assert isinstance(actual, MaceBackbone)
    graphs = collate(build_graphs(actual, frames_of(structure((1, 6, 7, 8)))))
    mine, theirs = actual.predict(graphs).detached(), oracle(model).predict(graphs).detached()
    torch.testing.assert_close(mine.energy, theirs.energy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.forces, theirs.forces, rtol=1e-11, atol=1e-11)


def contraction_with(changes: Callable[[str], str], folder: Path) -> tuple[Node, MaceNetwork]:
    """A model whose first contraction was traced to something else."""
    model = prepared()
    torch.save(model, folder / "prepared.model")
    node = node_from_record(read_inert(folder / "prepared.model"), traced_part)
    network = build_network(content_from_node(node))
    contraction = node.child("products.0.symmetric_contractions")
    code = contraction.attributes[CODE]
    contraction.attributes[CODE] = changes(code)
    assert contraction.attributes[CODE] != code
    return node, network


TAMPERED: dict[str, tuple[Callable[[str], str], str]] = {
    "a part is left out": (lambda code: code.replace("add = tensordot_3 + tensordot_1", "add = tensordot_1"), "else"),
    "another function": (lambda code: code.replace("torch.cat(", "torch.sum("), "unknown operation"),
    "code of its own": (lambda code: code.replace("torch.functional.einsum(", "__import__('os').system("), "unknown"),
    "a huge result": (lambda code: code.replace("dims = ((1,), (0,))", "dims = ((), ())"), "larger|unknown"),
    "no function": (lambda code: "x = y", "unknown way"),
    "no code": (lambda code: "def forward(self, x, y:", "unknown way"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_contractions_that_compute_something_else_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = TAMPERED[case]
    node, network = contraction_with(changes, tmp_path)
    with pytest.raises(UnfitError, match=message):
        check_node(node, network)
