"""Graphs on disk are the graphs in memory, and so are their batches."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from forcetune.errors import InputError
from forcetune.frames.frame import LabelKeys
from forcetune.frames.read import read_frames
from forcetune.frames.store.stored_frames import StoredFrames
from forcetune.frames.store.streaming import stream_frames
from forcetune.graphs import stored_graphs as stored
from forcetune.graphs.graph import Batch, build_graph
from forcetune.graphs.loader import BatchLoader
from forcetune.graphs.stored_graphs import StoredGraphs, any_label, measure_graphs, stored_graphs
from frames.formats import write_xyz
from systems import cluster, crystal

CUTOFF = 3.0


def structures(folder: Path, count: int = 40) -> Path:
    """Molecules of different size and crystals, some with energy, forces and stress."""
    atoms_list = []
    for index in range(count):
        atoms = crystal(seed=index) if index % 4 == 0 else cluster(atoms=1 + index % 9, seed=index)
        if index % 3:
            atoms.info["REF_energy"] = float(index)
            atoms.arrays["REF_forces"] = np.full((len(atoms), 3), float(index))
        if index % 8 == 4:
            atoms.info["REF_stress"] = np.full((3, 3), float(index))
        atoms_list.append(atoms)
    # its atoms lie many cells away from the first
    atoms_list[0].positions += 1e5 * atoms_list[0].cell.array[0]
    return write_xyz(folder / "a.xyz", atoms_list)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return structures(tmp_path)


def frames_on_disk(path: Path) -> StoredFrames:
    asked = LabelKeys(*["auto"] * len(LabelKeys._fields))
    stream = stream_frames([str(path)], asked, (), "data", folder=path.parent / "store", workers=0).frames
    assert isinstance(stream, StoredFrames)
    return stream


def assert_equal(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        assert ours.dtype == theirs.dtype, field.name
        assert torch.equal(ours.nan_to_num(1e9), theirs.nan_to_num(1e9)), field.name


@pytest.mark.filterwarnings("ignore::forcetune.errors.ForcetuneWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_graphs_are_the_same(path: Path, dtype: torch.dtype) -> None:
    expected = [build_graph(frame, CUTOFF, dtype) for frame in read_frames(path, require=()).frames]
    stored = stored_graphs(frames_on_disk(path), CUTOFF, dtype, workers=2 * (dtype == torch.float64))
    assert len(stored) == len(expected) == 40
    for one, other in zip(expected, stored, strict=True):
        assert_equal(one, other)
    assert_equal(stored[-3], expected[-3])
    for one, other in zip(expected[5:20:3], stored[5:20:3], strict=True):
        assert_equal(one, other)
    for one, other in zip([expected[i] for i in (7, 3, 7)], stored.take(np.array([7, 3, 7])), strict=True):
        assert_equal(one, other)
    assert np.array_equal(measure_graphs(expected), measure_graphs(stored))
    for name in ("energy", "forces", "stress"):
        assert any_label(stored, name)
        assert any_label(stored[:1], name) == any_label(expected[:1], name) is False


@pytest.mark.filterwarnings("ignore::forcetune.errors.ForcetuneWarning")
def test_batches_are_the_same(path: Path) -> None:
    expected = [build_graph(frame, CUTOFF) for frame in read_frames(path, require=()).frames]
    stored = stored_graphs(frames_on_disk(path), CUTOFF, torch.float64)
    replay = [graph.weighted(0.5) for graph in expected[:5]]
    for options in (
        {"batch_size": 7},
        {"batch_size": 7, "shuffle": True, "seed": 3},
        {"batch_size": 1, "batch_edges": 400, "shuffle": True},
        {"batch_size": 6, "shuffle": True, "replay": replay, "replay_ratio": 0.5},
    ):
        loaders = [BatchLoader(graphs, **options) for graphs in (expected, stored)]
        for epoch in (0, 3):
            for loader in loaders:
                loader.epoch = epoch
            for one, other in zip(*loaders, strict=True):
                assert_equal(one, other)


@pytest.mark.filterwarnings("ignore::forcetune.errors.ForcetuneWarning")
def test_neighbours_are_found_once_for_a_cutoff(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = frames_on_disk(path)
    stored_graphs(frames, CUTOFF, torch.float64)

    def fail(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(stored, "search_store", fail)
    half = stored_graphs(frames[::2], CUTOFF, torch.float32)
    assert isinstance(half, StoredGraphs) and len(half) == 20
    with pytest.raises(AssertionError, match="searched again"):
        stored_graphs(frames, CUTOFF + 1, torch.float64)


def test_a_frame_without_a_cell_is_told(tmp_path: Path) -> None:
    broken = cluster(atoms=3)
    broken.pbc = True
    path = write_xyz(tmp_path / "a.xyz", [cluster(atoms=2), broken])
    with pytest.raises(InputError, match=r"a\.xyz, frame 1: periodic, but its lattice vectors are zero"):
        stored_graphs(frames_on_disk(path), CUTOFF, torch.float64)
    assert [place.name[:7] for place in (tmp_path / "store").iterdir()] == ["frames-"]
