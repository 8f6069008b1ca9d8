from __future__ import annotations

from typing import Any

import pytest
import torch

from forcetune.backbones.mace.rebuild import architecture_of, fingerprint, read_plain, save_plain
from forcetune.backbones.mace.surgery import cut_elements, select_head
from forcetune.errors import InputError
from models import assert_same, evaluate, make_mace, structure

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
    "attention": {"later": "RealAgnosticAttResidualInteractionBlock"},
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


@pytest.mark.parametrize("kind", KINDS)
def test_one_head_gives_what_it_gave_among_several(kind: str) -> None:
    heads = ("first", "second", "third")
    model = make_mace(heads=heads, **KINDS[kind])
    atoms = structure()
    energies = set()
    for index, head in list(enumerate(heads))[1:]:
        single: Any = select_head(model, head)
        assert single.heads == [head]
        assert_same(evaluate(single, atoms), evaluate(model, atoms, head=index), 2e-12)
        assert architecture_of(single).heads == (head,)
        energies.add(round(evaluate(single, atoms).energy.item(), 6))
    assert len(energies) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_elements_give_the_same_numbers(kind: str) -> None:
    model = make_mace(elements=(1, 6, 7, 8, 17, 26), **KINDS[kind])
    atoms = structure((26, 1, 8))
    cut: Any = cut_elements(model, [26, 8, 1, 8])
    assert cut.atomic_numbers.tolist() == [1, 8, 26]
    assert_same(evaluate(cut, atoms), evaluate(model, atoms), 2e-12)
    assert {n for n, _ in cut.named_parameters()} == {n for n, _ in model.named_parameters()}


def test_a_table_of_all_elements_is_cut_to_one() -> None:
    model = make_mace(elements=tuple(range(1, 90)), hidden_irreps="4x0e")
    atoms = structure((29,))
    assert_same(evaluate(cut_elements(model, {29}), atoms), evaluate(model, atoms), 2e-12)


def test_head_and_elements_together_survive_a_file(tmp_path: Any) -> None:
    model = make_mace(heads=("a", "b"), pair_repulsion=True)
    cut = cut_elements(select_head(model, "b"), [6, 8])
    atoms = structure((6, 8))
    assert_same(evaluate(cut, atoms), evaluate(model, atoms, head=1), 2e-12)
    save_plain(cut, tmp_path / "a.safetensors")
    again = read_plain(tmp_path / "a.safetensors")
    assert_same(evaluate(again, atoms), evaluate(cut, atoms))
    assert fingerprint(again) == fingerprint(cut)


def test_surgery_leaves_the_model_alone() -> None:
    model = make_mace(heads=("a", "b"))
    before = fingerprint(model)
    cut: Any = cut_elements(select_head(model, "a"), [1, 6])
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.zero_()
    assert fingerprint(model) == before
    assert all(parameter.requires_grad for parameter in cut.parameters() if parameter.ndim)


def test_the_only_head_may_be_selected() -> None:
    model = make_mace()
    assert fingerprint(select_head(model, "Default")) == fingerprint(model)


def test_unknown_heads_and_elements_are_refused() -> None:
    model = make_mace(heads=("pt_head", "mp"))
    with pytest.raises(InputError, match="it has pt_head, mp"):
        select_head(model, "omol")
    with pytest.raises(InputError, match="atomic numbers 79"):
        cut_elements(model, [1, 79])
    with pytest.raises(InputError, match="needs an element"):
        cut_elements(model, [])
    with pytest.raises(InputError, match="cannot be cut"):
        cut_elements(torch.nn.Linear(2, 2), [1])
