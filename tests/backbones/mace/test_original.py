"""Trained weights put back into the file that a model was read from."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms

import forcetune
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.original import changes_to_whole, write_into_original
from forcetune.graphs.graph import build_graph
from forcetune.kernels.tensors import UnfitError
from models import Evaluation, assert_same, evaluate, make_mace, structure
from systems import frames_of, perturb

ELEMENTS = (1, 6, 7, 8, 16)


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, **options: Any) -> Any:
    model = make_mace(elements=ELEMENTS, **options)
    torch.save(model, path)
    return model


def predicted(backbone: MaceBackbone, atoms: Atoms) -> Evaluation:
    graph = build_graph(frames_of(atoms)[0], backbone.cutoff, backbone.dtype)
    prediction = backbone.predict(graph, stress=True).detached()
    assert prediction.stress is not None
    return Evaluation(prediction.energy[0], prediction.forces, prediction.stress[0])


def trained(path: Path, elements: Sequence[int] | None = None, head: str | None = None) -> MaceBackbone:
    """The model with other numbers in every parameter and reference energy."""
    backbone = MaceBackbone.load(path, elements=elements, head=head)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    backbone.set_reference_energies({z: -2.0 * z for z in backbone.elements})
    return backbone


KINDS: dict[str, dict[str, Any]] = {
    "scale_shift": {},
    "plain": {"kind": "MACE", "gate": None},
    "heads": {"heads": ("pt_head", "Default", "mp")},
    "agnostic_product": {"use_agnostic_product": True},
    "density": {
        "first": "RealAgnosticDensityInteractionBlock",
        "later": "RealAgnosticDensityResidualInteractionBlock",
    },
    "nonlinear": {
        "first": "RealAgnosticResidualNonLinearInteractionBlock",
        "later": "RealAgnosticResidualNonLinearInteractionBlock",
        "readout": "NonLinearBiasReadoutBlock",
        "heads": ("a", "b"),
    },
    "trainable_bessel": {"trainable_bessel": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_file_computes_what_the_trained_part_does(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "base.model", **KINDS[kind])
    heads = KINDS[kind].get("heads", ("Default",))
    few = (1, 8, 16)
    part = trained(tmp_path / "base.model", few, heads[-1] if len(heads) > 1 else None)
    assert part.save_into_source(tmp_path / "tuned.model")
    whole = torch.load(tmp_path / "tuned.model", weights_only=False)
    atoms = structure(few)
    assert_same(evaluate(whole, atoms, head=len(heads) - 1), predicted(part, atoms), tolerance=1e-11)
    before, after = members(tmp_path / "base.model"), members(tmp_path / "tuned.model")
    assert list(before) == list(after)
    changed = {name.split("/", 1)[1] for name in before if before[name] != after[name]}
    assert changed and all(name.startswith("data/") for name in changed)


def test_elements_and_heads_that_were_not_trained_stay(tmp_path: Path) -> None:
    model = write(tmp_path / "base.model", heads=("a", "b"))
    part = MaceBackbone.load(tmp_path / "base.model", elements=(1, 8), head="b")
    # what only belongs to an element or head: its embedding, its contraction, its reference energy, its readout
    with torch.no_grad():
        part.model.node_embedding.linear.weight += 0.5
        part.model.readouts[0].linear.weight += 0.5
    part.set_reference_energies({1: -13.0})
    assert part.save_into_source(tmp_path / "tuned.model")
    whole = torch.load(tmp_path / "tuned.model", weights_only=False)
    others = structure((6, 7, 16))
    assert_same(evaluate(whole, others, head=0), evaluate(model, others, head=0))
    atoms = structure((1, 8))
    assert_same(evaluate(whole, atoms, head=1), predicted(part, atoms), tolerance=1e-11)
    expected = model.atomic_energies_fn.atomic_energies.clone()
    expected[1, 0] = -13.0
    assert torch.equal(whole.atomic_energies_fn.atomic_energies, expected)


def test_an_adapter_on_one_of_several_heads_merges_into_the_file(tmp_path: Path) -> None:
    write(tmp_path / "base.model", heads=("a", "b"))
    backbone = MaceBackbone.load(tmp_path / "base.model", head="b")
    perturb(forcetune.attach(backbone, forcetune.method("elora")))
    forcetune.save_adapter(backbone, tmp_path / "adapter")
    forcetune.merge(tmp_path / "adapter", tmp_path / "tuned.model", model=tmp_path / "base.model")
    whole = torch.load(tmp_path / "tuned.model", weights_only=False)
    assert whole.heads == ["a", "b"]
    atoms = structure((1, 8))
    assert_same(evaluate(whole, atoms, head=1), predicted(backbone, atoms), tolerance=1e-11)


def test_nothing_trained_gives_the_same_numbers(tmp_path: Path) -> None:
    write(tmp_path / "base.model", heads=("a", "b"))
    part = MaceBackbone.load(tmp_path / "base.model", elements=(1, 8), head="a")
    assert part.save_into_source(tmp_path / "again.model")
    assert members(tmp_path / "base.model") == members(tmp_path / "again.model")


def test_members_begin_where_torch_lets_them(tmp_path: Path) -> None:
    """At multiples of 64 bytes, so that the file can be mapped to memory."""
    write(tmp_path / "base.model")
    assert trained(tmp_path / "base.model").save_into_source(tmp_path / "tuned.model")
    mapped = torch.load(tmp_path / "tuned.model", weights_only=False, mmap=True)
    content = (tmp_path / "tuned.model").read_bytes()
    with zipfile.ZipFile(tmp_path / "tuned.model") as archive:
        for member in archive.infolist():
            name, extra = np.frombuffer(content, "<u2", 2, member.header_offset + 26)
            assert (member.header_offset + 30 + int(name) + int(extra)) % 64 == 0
    assert torch.equal(
        mapped.node_embedding.linear.weight,
        torch.load(tmp_path / "tuned.model", weights_only=False).node_embedding.linear.weight,
    )


def test_a_float32_file_stays_one(tmp_path: Path) -> None:
    write(tmp_path / "base.model", dtype=torch.float32)
    part = trained(tmp_path / "base.model", (1, 8))
    assert part.dtype == torch.float64
    assert part.save_into_source(tmp_path / "tuned.model")
    whole = torch.load(tmp_path / "tuned.model", weights_only=False)
    assert whole.node_embedding.linear.weight.dtype == torch.float32
    atoms = structure((1, 8))
    assert_same(evaluate(whole.double(), atoms), predicted(part, atoms), tolerance=1e-4)


def test_reference_energies_that_the_files_precision_would_round_are_not_put_there(tmp_path: Path) -> None:
    write(tmp_path / "base.model", dtype=torch.float32)
    part = trained(tmp_path / "base.model")
    part.set_reference_energies({16: -10831.0864})
    assert not part.save_into_source(tmp_path / "tuned.model")
    assert not (tmp_path / "tuned.model").exists()


def test_weights_that_share_memory_are_refused(tmp_path: Path) -> None:
    model = make_mace(elements=ELEMENTS)
    first, second = (model.interactions[k].linear_up for k in (0, 1))
    count = first.weight.numel()
    second.weight.data[:count].copy_(first.weight.data)
    first.weight.data = second.weight.data[:count]
    torch.save(model, tmp_path / "base.model")
    part = trained(tmp_path / "base.model")
    tensors = part.content.tensors
    with pytest.raises(UnfitError, match="share their memory"):
        write_into_original(tmp_path / "base.model", tmp_path / "t.model", tensors, head="Default", numbers=ELEMENTS)
    assert not part.save_into_source(tmp_path / "t.model")
    assert not (tmp_path / "t.model").exists()


def test_changes_undo_scaling_and_order() -> None:
    whole = {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
    trained = {"weight": torch.tensor([50.0, 7.0, 10.0])}
    changed = changes_to_whole(whole, lambda t: {"weight": 10 * t["weight"].flatten()[[4, 2, 0]]}, trained)
    assert torch.equal(changed["weight"], torch.tensor([[1.0, 2.0], [0.7, 4.0], [5.0, 6.0]]))
    assert torch.equal(whole["weight"][1], torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("precision", [None, "float32"])
def test_merge_writes_the_bases_file_unless_another_precision_is_asked_for(
    precision: str | None, tmp_path: Path
) -> None:
    write(tmp_path / "base.model")
    backbone = forcetune.load(str(tmp_path / "base.model"), elements=(1, 8))
    perturb(forcetune.attach(backbone, forcetune.method("elora")))
    forcetune.save_adapter(backbone, tmp_path / "adapter")
    forcetune.merge(tmp_path / "adapter", tmp_path / "tuned.model", model=tmp_path / "base.model", dtype=precision)
    merged = torch.load(tmp_path / "tuned.model", weights_only=False)
    assert merged.node_embedding.linear.weight.dtype == (torch.float32 if precision else torch.float64)
    assert [int(z) for z in merged.atomic_numbers] == ([1, 8] if precision else list(ELEMENTS))
