"""Models from files and into them: the same numbers, and nothing that a file says is run or passed over."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import nn

import forcetune
from forcetune.adapters.attach import attach
from forcetune.adapters.methods import method
from forcetune.backbones.loading import load
from forcetune.backbones.mace.architecture import MaceArchitecture
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.construction import build
from forcetune.backbones.mace.content import MaceContent
from forcetune.backbones.mace.library import import_mace
from forcetune.backbones.mace.reading import read_content, read_module, read_plain
from forcetune.backbones.mace.writing import write_model, write_plain
from forcetune.backbones.network import NetworkBackbone
from forcetune.backbones.protocol import Prediction
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import collate
from models import ARCHITECTURES, make_mace, oracle, structure
from systems import backbone, frames_of, perturb
from systems import write_model as write_mace

EXACT = 1e-11


def predicted(model: NetworkBackbone, elements: tuple[int, ...] = (1, 6, 7, 8)) -> Prediction:
    return model.predict(collate(build_graphs(model, frames_of(structure(elements)))), stress=True).detached()


def assert_same(actual: Prediction, expected: Prediction, tolerance: float = EXACT) -> None:
    for name, one, other in zip(Prediction._fields, actual[:3], expected[:3], strict=False):
        assert one is not None and other is not None
        assert torch.isfinite(one).all()
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max()), name


def parameters(content: MaceContent) -> set[str]:
    return {name for name, tensor in content.tensors.items() if isinstance(tensor, nn.Parameter)}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_file_is_read_as_torch_loads_it(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if dtype is torch.float32 and kind not in ("scale-shift", "nonlinear residual", "soft, Gaussians", "odd scalars"):
        pytest.skip("precision is a matter of tensors")
    model = make_mace(**ARCHITECTURES[kind], dtype=dtype)
    torch.save(model, tmp_path / "a.model")
    content, pickled = read_content(tmp_path / "a.model"), torch.load(tmp_path / "a.model", weights_only=False)
    assert content.dtype == dtype
    assert content.architecture == read_module(pickled).architecture == read_module(model).architecture
    assert content.fingerprint == read_module(pickled).fingerprint == read_module(model).fingerprint
    stored = pickled.state_dict()
    assert all(tensor.dtype == stored[name].dtype for name, tensor in content.tensors.items())
    assert parameters(content) == {name for name, _ in pickled.named_parameters()}
    actual = load(tmp_path / "a.model", device="cpu")
    assert_same(predicted(actual), predicted(MaceBackbone.from_module(model)), 1e-15)
    assert_same(predicted(actual), predicted(oracle(pickled)))


@pytest.mark.parametrize("kind", ["plain", "nonlinear, all options", "scale-shift"])
def test_heads_of_a_file(kind: str, tmp_path: Path) -> None:
    heads = ("pt_head", "Default", "mp")
    model = make_mace(**ARCHITECTURES[kind], heads=heads)
    torch.save(model, tmp_path / "a.model")
    assert read_content(tmp_path / "a.model").architecture.heads == heads
    for head in heads:
        assert_same(predicted(load(tmp_path / "a.model", head=head, device="cpu")), predicted(oracle(model, head=head)))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_models_survive_both_kinds_of_file(kind: str, tmp_path: Path) -> None:
    model = backbone(**ARCHITECTURES[kind])
    expected = predicted(model)
    for name in ("a.model", "a.safetensors"):
        model.save(tmp_path / name)
        content = read_content(tmp_path / name)
        assert content.fingerprint == model.content.fingerprint
        assert parameters(content) == parameters(model.content)
        assert_same(predicted(load(tmp_path / name, device="cpu")), expected, 1e-15)
    pickled = torch.load(tmp_path / "a.model", weights_only=False)
    assert_same(predicted(oracle(pickled)), expected)


@pytest.mark.parametrize("suffix", ["model", "safetensors"])
def test_several_heads_survive_both_kinds_of_file(suffix: str, tmp_path: Path) -> None:
    model = make_mace(heads=("one", "two"), dtype=torch.float32)
    write_model(read_module(model), tmp_path / f"a.{suffix}")
    content = read_content(tmp_path / f"a.{suffix}")
    assert content.fingerprint == read_module(model).fingerprint and content.dtype == torch.float32
    actual = load(tmp_path / f"a.{suffix}", head="two", device="cpu")
    assert_same(predicted(actual), predicted(oracle(model, head="two")))


def test_basis_of_the_contraction_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_mace()
    import mace.modules.symmetric_contraction as library

    full = library.U_matrix_real

    def reduced(**arguments: Any) -> list[torch.Tensor]:
        coupling = full(**arguments)[-1]
        columns = coupling.shape[-1]
        generator = torch.Generator().manual_seed(columns)
        mixing = torch.randn(columns, (columns + 1) // 2, generator=generator, dtype=coupling.dtype)
        return [coupling @ mixing]

    with monkeypatch.context() as patch:
        patch.setattr(library, "U_matrix_real", reduced)
        model: Any = make_mace(correlation=3, hidden_irreps="4x0e+4x1o")
    torch.save(model, tmp_path / "a.model")
    actual: Any = load(tmp_path / "a.model", device="cpu")
    assert actual.model.products[0].symmetric_contractions.contractions[0].weights_max.shape[1] < 23
    assert_same(predicted(actual), predicted(oracle(model)))
    actual.save(tmp_path / "b.model")
    assert_same(predicted(oracle(torch.load(tmp_path / "b.model", weights_only=False))), predicted(actual))
    assert library.U_matrix_real is full


def test_a_model_turned_from_float32_keeps_its_rounded_constants(tmp_path: Path) -> None:
    model = make_mace(dtype=torch.float32, max_ell=3).double()
    torch.save(model, tmp_path / "a.model")
    actual = load(tmp_path / "a.model", device="cpu")
    expected = predicted(oracle(model))
    assert_same(predicted(actual), expected)
    for name in ("b.model", "b.safetensors"):
        actual.save(tmp_path / name)
        assert_same(predicted(load(tmp_path / name, device="cpu")), expected)
    assert_same(predicted(oracle(torch.load(tmp_path / "b.model", weights_only=False))), expected)
    exact = predicted(MaceBackbone.from_module(make_mace(dtype=torch.float32, max_ell=3)))
    assert read_module(model).fingerprint == read_module(make_mace(dtype=torch.float32, max_ell=3)).fingerprint
    assert_same(predicted(actual), exact, 1e-5)


def test_charges_that_earlier_versions_rounded_stay_so(tmp_path: Path) -> None:
    """Plain files without a word on charges were computed with products of charges in float32."""
    model = backbone(pair_repulsion=True)
    write_plain(replace(model.content, rounded_charges=True), tmp_path / "rounded.safetensors")
    rounded = load(tmp_path / "rounded.safetensors", device="cpu")
    close = frames_of(Atoms("NO", [[0, 0, 0], [0.3, 0.4, 0.5]]))  # closer than their radii, where charges count
    one, other = (actual.predict(collate(build_graphs(actual, close))).forces for actual in (rounded, model))
    assert 0 < float((one - other).abs().max()) < 1e-6 * float(other.abs().max())
    rounded.save(tmp_path / "again.safetensors")
    assert_same(predicted(load(tmp_path / "again.safetensors", device="cpu")), predicted(rounded), 1e-15)
    rounded.save(tmp_path / "again.model")
    assert_same(predicted(rounded.read_back(tmp_path / "again.model")), predicted(rounded), 1e-15)
    assert_same(predicted(load(tmp_path / "again.model", device="cpu")), predicted(model), 1e-15)


def _without_new_attributes(model: Any) -> None:
    for name in ("heads", "apply_cutoff", "use_reduced_cg", "use_so3", "use_agnostic_product", "edge_irreps"):
        delattr(model, name)
    for name in ("lammps_mliap", "use_last_readout_only", "use_edge_irreps_first"):
        delattr(model, name)
    del model.radial_embedding.apply_cutoff
    for block in model.interactions:
        del block.cueq_config, block.oeq_config, block.edge_irreps
        del block.reshape.cueq_config
    for product in model.products:
        del product.cueq_config, product.use_agnostic_product
        for contraction in product.symmetric_contractions.contractions:
            for name in [name for name in contraction._buffers if name.endswith("_zeroed")]:
                delattr(contraction, name)
    del model.readouts[-1].num_heads


def _with_float_exponent(model: Any) -> None:
    model.radial_embedding.cutoff_fn.p = model.radial_embedding.cutoff_fn.p.double()


def _with_flat_scales(model: Any) -> None:
    model.scale_shift.scale = model.scale_shift.scale[0].clone()
    model.scale_shift.shift = model.scale_shift.shift[0].clone()
    model.atomic_energies_fn.atomic_energies = model.atomic_energies_fn.atomic_energies[0].clone()


def _with_numpy_neighbours(model: Any) -> None:
    for block in model.interactions:
        block.avg_num_neighbors = np.float64(6.25)


def _with_couplings_of_the_other_sign(model: Any) -> None:
    """3j symbols are those of the library that was installed; e3nn changed some signs."""
    for name, tensor in model.named_buffers():
        if "_w3j_1_1_1" in name:
            tensor.neg_()


AGES = [
    _without_new_attributes,
    _with_float_exponent,
    _with_flat_scales,
    _with_numpy_neighbours,
    _with_couplings_of_the_other_sign,
]


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("irreps", ["8x0e+8x1o", "4x0e+4x1o+4x1e"])
def test_models_of_older_versions(age: Callable[[Any], None], irreps: str, tmp_path: Path) -> None:
    model = make_mace(hidden_irreps=irreps)
    age(model)
    torch.save(model, tmp_path / "a.model")
    pickled = torch.load(tmp_path / "a.model", weights_only=False)
    content = read_content(tmp_path / "a.model")
    assert content.architecture.heads == ("Default",)
    assert content.fingerprint == read_module(pickled).fingerprint
    assert content.tensors["radial_embedding.cutoff_fn.p"].dtype == pickled.radial_embedding.cutoff_fn.p.dtype
    actual = load(tmp_path / "a.model", device="cpu")
    assert_same(predicted(actual), predicted(oracle(pickled)))
    for name in ("b.model", "b.safetensors"):
        actual.save(tmp_path / name)
        assert_same(predicted(load(tmp_path / name, device="cpu")), predicted(actual), 1e-15)
    assert_same(predicted(oracle(torch.load(tmp_path / "b.model", weights_only=False))), predicted(actual))


def test_what_torch_compile_gives_is_read_as_what_is_in_it(tmp_path: Path) -> None:
    model = make_mace()
    compiled = torch.compile(model)
    actual = MaceBackbone.from_module(compiled)  # pyright: ignore[reportArgumentType]
    assert isinstance(actual, MaceBackbone)
    assert_same(predicted(actual), predicted(oracle(model)))


def test_reading_leaves_the_random_state_and_the_default_dtype(tmp_path: Path) -> None:
    write_mace(tmp_path / "a.model")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load(tmp_path / "a.model", device="cpu").save(tmp_path / "b.model")
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_default_dtype() is torch.float32


def test_fingerprint_tells_models_apart() -> None:
    def fingerprint(model: nn.Module) -> str:
        return read_module(model).fingerprint

    model: Any = make_mace()
    same = fingerprint(model)
    assert fingerprint(make_mace()) == same
    assert fingerprint(make_mace(seed=1)) != same
    assert fingerprint(make_mace(avg_num_neighbors=8.0)) != same
    model.products[0].symmetric_contractions.contractions[0].U_matrix_2 *= 1.0001
    assert fingerprint(model) != same


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architecture_survives_json_and_is_built_by_mace(kind: str) -> None:
    architecture = read_module(make_mace(**ARCHITECTURES[kind], heads=("a", "b"))).architecture
    again = MaceArchitecture.from_json(architecture.to_json())
    assert again == architecture
    assert read_module(build(again)).architecture == architecture


def test_architectures_that_make_no_sense_are_refused() -> None:
    architecture = read_module(make_mace(hidden_irreps="4x0e")).architecture
    with pytest.raises(InputError, match="unknown keys colour"):
        MaceArchitecture.from_json(json.dumps({"colour": 1}))
    with pytest.raises(InputError, match="makes no sense"):
        build(replace(architecture, hidden_irreps="100000000x0e"))


class _Marker:
    """Pickles into a call of ``os.system`` that touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.path}",)


class _Scripted:
    """Pickles into the call that restores a ``torch.fx`` graph by executing its source."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        from torch.fx.graph_module import reduce_graph_module

        source = f"import pathlib\npathlib.Path({str(self.path)!r}).touch()\ndef forward(self): pass\n"
        return reduce_graph_module, ({"_code": source, "_modules": {}}, "")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("whole", "it holds a system where a module should be"),
        ("attribute", "has extra = .*, which forcetune does not know"),
        ("module", "it holds a system where a module should be"),
        ("graph", "traced"),
        ("hook", "code of the file's own"),
        ("state", "a checkpoint or another table"),
    ],
)
def test_commands_in_a_file_are_not_run(place: str, words: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    model: Any = make_mace()
    content: Any = model
    if place == "whole":
        content = _Marker(marker)
    elif place == "attribute":
        model.extra = _Marker(marker)
    elif place == "module":
        model._modules["extra"] = _Marker(marker)
    elif place == "graph":
        model._modules["radial_embedding"] = _Scripted(marker)
    elif place == "hook":
        model._forward_hooks[0] = _Marker(marker)
    else:
        content = {"model": model, "more": [{"deep": (_Marker(marker),)}]}
    torch.save(content, tmp_path / "a.model")
    with pytest.raises(InputError, match=rf"a\.model.*{words}"):
        load(tmp_path / "a.model", device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda model: model.state_dict(), "state dict"),
        (lambda model: {"model": model.state_dict(), "epoch": 3}, "checkpoint"),
        (lambda model: nn.Linear(2, 2), "it is a Linear"),
        (lambda model: [1, 2], "a list"),
    ],
)
def test_other_files_are_refused(content: Callable[[nn.Module], Any], words: str, tmp_path: Path) -> None:
    torch.save(content(make_mace()), tmp_path / "a.model")
    with pytest.raises(InputError, match=words):
        load(tmp_path / "a.model", device="cpu")


def test_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a-lammps.pt")
    with pytest.raises(InputError, match="TorchScript"):
        load(tmp_path / "a-lammps.pt", device="cpu")


def test_damaged_plain_files_are_refused(tmp_path: Path) -> None:
    write_plain(read_module(make_mace(hidden_irreps="4x0e")), tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.safetensors").write_bytes(b"")
    for name in ("b", "c", "missing"):
        with pytest.raises(InputError, match=rf"{name}\.safetensors"):
            read_plain(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("suffix", ["model", "safetensors"])
def test_adapters_are_not_written(suffix: str, tmp_path: Path) -> None:
    model = backbone()
    expected = predicted(model)
    perturb(attach(model, method("mmea")))
    assert float((predicted(model).forces - expected.forces).abs().max()) > 1e-6
    model.save(tmp_path / f"a.{suffix}")
    actual: Any = load(tmp_path / f"a.{suffix}", device="cpu")
    assert not hasattr(actual.model, "forcetune_adapter")
    assert_same(predicted(actual), expected, 1e-15)
    assert actual.base.fingerprint == backbone().base.fingerprint


def test_saved_model_is_read_by_the_calculator_of_mace_alone(tmp_path: Path) -> None:
    atoms = structure()
    model = backbone()
    expected = predicted(model)
    model.save(tmp_path / "a.model")
    atoms.write(tmp_path / "a.xyz", format="extxyz")
    np.save(tmp_path / "positions.npy", atoms.positions)
    program = (
        "import sys, torch, numpy\n"
        "torch.serialization.add_safe_globals([slice])\n"
        "from ase.io import read\n"
        "from mace.calculators import MACECalculator\n"
        "atoms = read('a.xyz'); atoms.positions = numpy.load('positions.npy')\n"
        "atoms.calc = MACECalculator(model_paths='a.model', default_dtype='float64')\n"
        "print(repr(float(atoms.get_potential_energy())))\n"
        "numpy.save('forces.npy', atoms.get_forces())\n"
        "assert not any(name.startswith('forcetune') for name in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert float(run.stdout.split()[-1]) == pytest.approx(float(expected.energy), abs=1e-6)
    assert np.abs(np.load(tmp_path / "forces.npy") - expected.forces.numpy()).max() < 1e-6


def test_scratch_weights_are_distributed_as_mace_draws_them() -> None:
    """Every parameter's root mean square over seeds; those that start as constants are those constants."""
    options = ARCHITECTURES["nonlinear residual"] | {"hidden_irreps": "16x0e+16x1o", "trainable_bessel": True}
    model = backbone(**options)
    drawn = [model.fresh_weights(seed) for seed in range(4)]
    made = [dict(build(model.content.architecture).named_parameters()) for _ in range(1)]
    theirs = made[0]
    assert set(drawn[0]) == {name for name, _ in model.model.named_parameters()}
    for name, value in drawn[0].items():
        assert value.dtype == torch.float64
        assert torch.equal(value, model.fresh_weights(0)[name])
        if name not in theirs:
            continue  # Bessel frequencies are a buffer in what mace makes, and stay
        expected = theirs[name].detach().double()
        if torch.equal(value, drawn[1][name]):  # starts as a constant
            assert torch.allclose(value, expected), name
        elif expected.numel() > 200:
            size = torch.cat([one[name].flatten() for one in drawn]).square().mean().sqrt()
            assert float(size) == pytest.approx(float(expected.square().mean().sqrt()), rel=0.25), name
            assert not torch.equal(value, drawn[1][name])


def test_names_paths_and_backbones_all_name_a_model(tmp_path: Path) -> None:
    write_mace(tmp_path / "a.model")
    assert isinstance(forcetune.load(tmp_path / "a.model"), MaceBackbone)
    assert isinstance(forcetune.load("mini"), MaceBackbone)
