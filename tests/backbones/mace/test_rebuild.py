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
from torch import nn

from forcetune.backbones.mace.library import import_mace
from forcetune.backbones.mace.rebuild import (
    MaceArchitecture,
    architecture_of,
    build,
    fingerprint,
    read_mace,
    read_plain,
    save_mace,
    save_plain,
)
from forcetune.errors import ForcetuneWarning, InputError
from models import assert_same, evaluate, make_mace, structure

KINDS: dict[str, dict[str, Any]] = {
    "scale_shift": {},
    "plain": {"kind": "MACE"},
    "heads": {"heads": ("pt_head", "Default", "mp")},
    "plain_heads": {"kind": "MACE", "heads": ("a", "b")},
    "agnostic_product": {"use_agnostic_product": True},
    "density": {
        "first": "RealAgnosticDensityInteractionBlock",
        "later": "RealAgnosticDensityResidualInteractionBlock",
    },
    "residual_first": {"first": "RealAgnosticResidualInteractionBlock"},
    "nonlinear": {
        "first": "RealAgnosticResidualNonLinearInteractionBlock",
        "later": "RealAgnosticResidualNonLinearInteractionBlock",
        "readout": "NonLinearBiasReadoutBlock",
        "use_agnostic_product": True,
        "heads": ("a", "b"),
        "apply_cutoff": False,
        "edge_irreps": "4x0e+4x1o",
        "use_edge_irreps_first": True,
    },
    "attention": {"later": "RealAgnosticAttResidualInteractionBlock"},
    "repulsion": {"pair_repulsion": True, "distance_transform": "Agnesi"},
    "soft": {"distance_transform": "Soft", "radial_type": "gaussian"},
    "chebyshev": {"radial_type": "chebyshev", "gate": "tanh"},
    "third_order": {"correlation": 3, "hidden_irreps": "4x0e+4x1o"},
    "mixed_order": {"correlation": [3, 2], "hidden_irreps": "4x0e"},
    "first_order": {"correlation": 1, "gate": None},
    "trainable_bessel": {"trainable_bessel": True},
    "scalars": {"hidden_irreps": "8x0e", "gate": "abs"},
    "order_two": {"hidden_irreps": "4x0e+4x1o+4x2e", "max_ell": 3},
    "pseudo_scalars": {"hidden_irreps": "4x0e+4x0o+4x1o+4x1e"},
    "three_layers": {"num_interactions": 3, "keep_last_layer_irreps": True},
    "one_layer": {"num_interactions": 1},
    "last_readout": {"use_last_readout_only": True},
    "so3": {"use_so3": True, "hidden_irreps": "4x0e+4x1e"},
    "float32": {"dtype": torch.float32},
    "many_elements": {"elements": tuple(range(1, 90)), "hidden_irreps": "4x0e"},
}


def _irreps(options: dict[str, Any]) -> dict[str, Any]:
    import_mace()
    from e3nn import o3

    return {name: o3.Irreps(v) if name == "edge_irreps" else v for name, v in options.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_rebuilt_model_gives_what_the_pickled_one_does(kind: str, tmp_path: Path) -> None:
    model = make_mace(**_irreps(KINDS[kind]))
    torch.save(model, tmp_path / "a.model")
    pickled = torch.load(tmp_path / "a.model", weights_only=False)
    rebuilt: Any = read_mace(tmp_path / "a.model", trust=False)
    heads = list(KINDS[kind].get("heads", ("Default",)))
    for head in range(len(heads)):
        assert_same(evaluate(rebuilt, structure(), head=head), evaluate(pickled, structure(), head=head))
    assert fingerprint(rebuilt) == fingerprint(pickled) == fingerprint(model)
    assert rebuilt.heads == heads
    expected = {name: tensor.dtype for name, tensor in pickled.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in rebuilt.state_dict().items()} == expected
    assert {n for n, _ in rebuilt.named_parameters()} == {n for n, _ in pickled.named_parameters()}


@pytest.mark.parametrize("kind", ["heads", "nonlinear", "repulsion", "trainable_bessel", "float32", "third_order"])
def test_models_survive_both_kinds_of_file(kind: str, tmp_path: Path) -> None:
    model = make_mace(**_irreps(KINDS[kind]))
    save_mace(model, tmp_path / "a.model")
    save_plain(model, tmp_path / "a.safetensors")
    expected = evaluate(model, structure())
    names = {name for name, _ in model.named_parameters()}
    for found in (read_mace(tmp_path / "a.model"), read_mace(tmp_path / "a.safetensors")):
        assert_same(evaluate(found, structure()), expected)
        assert fingerprint(found) == fingerprint(model)
        assert {name for name, _ in found.named_parameters()} == names


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
    rebuilt: Any = read_mace(tmp_path / "a.model")
    assert rebuilt.products[0].symmetric_contractions.contractions[0].weights_max.shape[1] < 23
    assert_same(evaluate(rebuilt, structure()), evaluate(model, structure()))
    assert library.U_matrix_real is full


def test_a_model_turned_from_float32_keeps_its_rounded_constants(tmp_path: Path) -> None:
    model = make_mace(dtype=torch.float32, max_ell=3).double()
    torch.save(model, tmp_path / "a.model")
    rebuilt = read_mace(tmp_path / "a.model")
    assert_same(evaluate(rebuilt, structure()), evaluate(model, structure()))
    save_plain(rebuilt, tmp_path / "a.safetensors")
    assert_same(evaluate(read_plain(tmp_path / "a.safetensors"), structure()), evaluate(model, structure()))
    assert fingerprint(model) == fingerprint(make_mace(dtype=torch.float32, max_ell=3))


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


@pytest.mark.parametrize(
    "age", [_without_new_attributes, _with_float_exponent, _with_flat_scales, _with_numpy_neighbours]
)
def test_models_of_older_versions(age: Callable[[Any], None], tmp_path: Path) -> None:
    model = make_mace()
    age(model)
    torch.save(model, tmp_path / "a.model")
    pickled = torch.load(tmp_path / "a.model", weights_only=False)
    rebuilt: Any = read_mace(tmp_path / "a.model")
    assert_same(evaluate(rebuilt, structure()), evaluate(pickled, structure()))
    assert fingerprint(rebuilt) == fingerprint(pickled)
    assert rebuilt.heads == ["Default"]
    assert rebuilt.radial_embedding.cutoff_fn.p.dtype == pickled.radial_embedding.cutoff_fn.p.dtype


def test_reading_leaves_the_random_state_and_the_default_dtype(tmp_path: Path) -> None:
    torch.save(make_mace(), tmp_path / "a.model")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    read_mace(tmp_path / "a.model")
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_default_dtype() is torch.float32


def test_fingerprint_tells_models_apart() -> None:
    model: Any = make_mace()
    same = fingerprint(model)
    assert fingerprint(make_mace()) == same
    assert fingerprint(make_mace(seed=1)) != same
    assert fingerprint(make_mace(avg_num_neighbors=8.0)) != same
    model.products[0].symmetric_contractions.contractions[0].U_matrix_2 *= 1.0001
    assert fingerprint(model) != same


def test_architecture_survives_json_and_builds() -> None:
    architecture = architecture_of(make_mace(heads=("a", "b"), correlation=[3, 2], hidden_irreps="4x0e"))
    again = MaceArchitecture.from_json(architecture.to_json())
    assert again == architecture
    assert architecture_of(build(again)) == architecture
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


@pytest.mark.parametrize("place", ["whole", "attribute", "module", "graph", "hook", "state"])
def test_commands_in_a_file_are_not_run(place: str, tmp_path: Path) -> None:
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
    if place == "attribute":  # ignored: nothing in the library reads it
        read_mace(tmp_path / "a.model")
    else:
        with pytest.raises(InputError, match=r"a\.model"):
            read_mace(tmp_path / "a.model")
    assert not marker.exists()


def test_trust_loads_what_cannot_be_rebuilt(tmp_path: Path) -> None:
    model: Any = make_mace()
    model.radial_embedding.bessel_fn.num_basis = 6
    model.readouts[0] = nn.Identity()
    torch.save(model, tmp_path / "a.model")
    with pytest.raises(InputError, match="--trust"):
        read_mace(tmp_path / "a.model")
    with pytest.warns(ForcetuneWarning, match="pickled code"):
        loaded: Any = read_mace(tmp_path / "a.model", trust=True)
    assert isinstance(loaded.readouts[0], nn.Identity)
    save_mace(loaded, tmp_path / "b.model")
    assert fingerprint(torch.load(tmp_path / "b.model", weights_only=False)) == fingerprint(loaded)


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
        read_mace(tmp_path / "a.model")


def test_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a-lammps.pt")
    with pytest.raises(InputError, match="TorchScript"):
        read_mace(tmp_path / "a-lammps.pt")


def _wrong_activation(model: Any) -> None:
    model.interactions[0].conv_tp_weights.layer0.act.f = torch.tanh


def _wrong_path_weight(model: Any) -> None:
    linear = model.interactions[0].linear
    linear.instructions = [entry._replace(path_weight=2.0) for entry in linear.instructions]


def _wrong_shape(model: Any) -> None:
    model.interactions[0].linear.weight = nn.Parameter(torch.zeros(7, dtype=torch.float64))


def _surplus_tensor(model: Any) -> None:
    model.register_buffer("field", torch.ones(3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_wrong_activation, "layer0.act has f = 'tanh'"),
        (_wrong_path_weight, "instructions"),
        (_wrong_shape, "shape of interactions.0.linear.weight"),
        (_surplus_tensor, "no place for its tensor field"),
    ],
)
def test_models_that_compute_something_else_are_refused(
    change: Callable[[Any], None], words: str, tmp_path: Path
) -> None:
    model = make_mace()
    change(model)
    torch.save(model, tmp_path / "a.model")
    with pytest.raises(InputError, match=words):
        read_mace(tmp_path / "a.model")


def test_damaged_plain_files_are_refused(tmp_path: Path) -> None:
    save_plain(make_mace(hidden_irreps="4x0e"), tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.safetensors").write_bytes(b"")
    for name in ("b", "c", "missing"):
        with pytest.raises(InputError, match=rf"{name}\.safetensors"):
            read_mace(tmp_path / f"{name}.safetensors")


def test_save_leaves_adapters_and_hooks_out(tmp_path: Path) -> None:
    model: Any = make_mace()
    expected = evaluate(model, structure())
    model.add_module("forcetune_adapter", nn.Linear(2, 2))
    model.interactions[0].register_forward_hook(lambda *_: None)
    save_mace(model, tmp_path / "a.model")
    again: Any = read_mace(tmp_path / "a.model")
    assert not hasattr(again, "forcetune_adapter")
    assert_same(evaluate(again, structure()), expected)


def test_saved_model_is_read_by_the_calculator_of_mace_alone(tmp_path: Path) -> None:
    model = make_mace()
    atoms = structure()
    expected = evaluate(model, atoms)
    save_mace(model, tmp_path / "a.model")
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
    assert float(run.stdout.split()[-1]) == pytest.approx(expected.energy.item(), abs=1e-6)
    assert np.abs(np.load(tmp_path / "forces.npy") - expected.forces.numpy()).max() < 1e-6
