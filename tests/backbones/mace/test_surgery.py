"""One head of several, some elements of the table: smaller models with the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.content import MaceContent, build_network
from forcetune.backbones.mace.reading import read_module, read_plain
from forcetune.backbones.mace.surgery import cut_elements, select_head
from forcetune.backbones.mace.writing import write_plain
from forcetune.backbones.network import NetworkBackbone
from forcetune.backbones.protocol import Base, Prediction
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import collate
from models import make_mace, oracle, structure
from systems import frames_of

NONLINEAR: dict[str, Any] = {
    "first": "RealAgnosticResidualNonLinearInteractionBlock",
    "later": "RealAgnosticResidualNonLinearInteractionBlock",
    "apply_cutoff": False,
    "use_agnostic_product": True,
    "readout": "NonLinearBiasReadoutBlock",
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"kind": "MACE"},
    "residual": {"first": "RealAgnosticResidualInteractionBlock"},
    "density": {
        "first": "RealAgnosticDensityInteractionBlock",
        "later": "RealAgnosticDensityResidualInteractionBlock",
    },
    "nonlinear": NONLINEAR,
    "agnostic": {"use_agnostic_product": True},
    "repulsion": {"pair_repulsion": True, "distance_transform": "Agnesi"},
    "third_order": {"correlation": 3, "hidden_irreps": "4x0e+4x1o"},
    "order_two": {"hidden_irreps": "4x0e+4x1o+4x2e"},
    "scalars": {"hidden_irreps": "8x0e"},
    "one_layer": {"num_interactions": 1},
    "three_layers": {"num_interactions": 3},
    "trainable_bessel": {"trainable_bessel": True},
    "bias_readout": {"readout": "NonLinearBiasReadoutBlock", "mlp_irreps": "3x0e"},
}


def predicted(model: MaceContent | NetworkBackbone, elements: tuple[int, ...] = (1, 6, 7, 8)) -> Prediction:
    backbone = model
    if isinstance(model, MaceContent):
        backbone = MaceBackbone(build_network(model), Base("cut", "", "", "unknown"))
    assert isinstance(backbone, NetworkBackbone)
    return backbone.predict(collate(build_graphs(backbone, frames_of(structure(elements)))), stress=True).detached()


def assert_same(actual: Prediction, expected: Prediction, tolerance: float = 1e-12) -> None:
    for name, one, other in zip(Prediction._fields, actual[:3], expected[:3], strict=False):
        assert one is not None and other is not None
        assert float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max())), name


def parameters(content: MaceContent) -> set[str]:
    return {name for name, tensor in content.tensors.items() if isinstance(tensor, torch.nn.Parameter)}


@pytest.mark.parametrize("kind", KINDS)
def test_one_head_gives_what_it_gave_among_several(kind: str) -> None:
    heads = ("first", "second", "third")
    model = make_mace(heads=heads, **KINDS[kind])
    content = read_module(model)
    energies = set()
    for head in heads[1:]:
        single = select_head(content, head)
        assert single.architecture.heads == (head,)
        assert parameters(single) == parameters(content)
        assert_same(predicted(single), predicted(oracle(model, head=head)))
        energies.add(round(float(predicted(single).energy), 6))
    assert len(energies) == 2


def mix_heads(readout: Any, heads: int, head: int) -> None:
    """Make mace's readout mask the features of other heads behind its middle layer only, as 0.3.14 did."""

    def forward(x: Tensor, heads_of_atoms: Tensor | None = None) -> Tensor:
        hidden = readout.non_linearity(readout.linear_mid(readout.non_linearity(readout.linear_1(x))))
        parts = hidden.unflatten(1, (heads, -1))
        own = torch.arange(heads).view(1, heads, 1) == head
        return readout.linear_2((parts * own).flatten(1))

    readout.forward = forward


def test_mixed_heads_of_mace_0_3_14_give_that_versions_energies(tmp_path: Path) -> None:
    heads = ("first", "second", "third")
    model = make_mace(heads=heads, **NONLINEAR)
    content = read_module(model)
    mixed = replace(content, architecture=replace(content.architecture, mixed_heads=3))
    for index, head in enumerate(heads):
        single = select_head(mixed, head)
        theirs = oracle(model, head=head)
        otherwise = predicted(theirs)
        mix_heads(theirs.model.readouts[-1], len(heads), index)
        expected = predicted(theirs)
        assert float((expected.energy - otherwise.energy).abs()) > 1e-4
        assert_same(predicted(single), expected)
        write_plain(single, tmp_path / "single.safetensors")
        assert_same(predicted(read_plain(tmp_path / "single.safetensors")), expected)


def test_a_network_of_several_heads_refuses_to_choose_one() -> None:
    content = read_module(make_mace(heads=("pt_head", "mp")))
    whole = MaceBackbone(build_network(content), Base("whole", "", "", "unknown"))
    with pytest.raises(InputError, match=r"has the heads pt_head, mp; choose one first"):
        predicted(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_elements_give_the_same_numbers(kind: str) -> None:
    model = make_mace(elements=(1, 6, 7, 8, 17, 26), **KINDS[kind])
    content = read_module(model)
    cut = cut_elements(content, [26, 8, 1, 8])
    assert cut.architecture.atomic_numbers == (1, 8, 26)
    assert cut.tensors["atomic_numbers"].tolist() == [1, 8, 26]
    assert parameters(cut) == parameters(content)
    assert_same(predicted(cut, (26, 1, 8)), predicted(oracle(model), (26, 1, 8)))


def test_a_table_of_all_elements_is_cut_to_one() -> None:
    model = make_mace(elements=tuple(range(1, 90)), hidden_irreps="4x0e")
    assert_same(predicted(cut_elements(read_module(model), {29}), (29,)), predicted(oracle(model), (29,)))


def test_elements_are_cut_again() -> None:
    content = read_module(make_mace(elements=(1, 6, 7, 8, 17, 26)))
    twice = cut_elements(cut_elements(content, [1, 6, 8]), [1, 8])
    assert_same(predicted(twice, (1, 8)), predicted(cut_elements(content, [1, 8]), (1, 8)), 1e-14)


def test_head_and_elements_together_survive_a_file(tmp_path: Path) -> None:
    model = make_mace(heads=("a", "b"), pair_repulsion=True)
    cut = cut_elements(select_head(read_module(model), "b"), [6, 8])
    assert_same(predicted(cut, (6, 8)), predicted(oracle(model, head="b"), (6, 8)))
    write_plain(cut, tmp_path / "a.safetensors")
    again = read_plain(tmp_path / "a.safetensors")
    assert_same(predicted(again, (6, 8)), predicted(cut, (6, 8)), 1e-15)
    assert again.fingerprint == cut.fingerprint


def test_surgery_leaves_the_model_alone() -> None:
    content = read_module(make_mace(heads=("a", "b")))
    before = content.fingerprint
    network = build_network(cut_elements(select_head(content, "a"), [1, 6]))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert content.fingerprint == before
    assert all(parameter.requires_grad for parameter in network.parameters() if parameter.ndim)


def test_the_only_head_may_be_selected() -> None:
    content = read_module(make_mace())
    assert select_head(content, "Default").fingerprint == content.fingerprint


def test_unknown_heads_and_elements_are_refused() -> None:
    content = read_module(make_mace(heads=("pt_head", "mp")))
    with pytest.raises(InputError, match="it has pt_head, mp"):
        select_head(content, "omol")
    with pytest.raises(InputError, match="atomic numbers 79"):
        cut_elements(content, [1, 79])
    with pytest.raises(InputError, match="needs an element"):
        cut_elements(content, [])
