"""Checkpoints of mace's --lora as adapters: the same energies as mace's own layers and as the model that it merges."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import read

import forcetune
from forcetune.adapters.config import read_adapter_config
from forcetune.errors import InputError
from forcetune.runs.mace_lora import convert_mace_lora
from models import make_mace
from systems import cluster, crystal, write_labelled, write_model
from terminal import Command

pytest.importorskip("mace")
ALPHA = 3
KINDS: dict[str, dict[str, Any]] = {
    "scale-shift": {},
    "plain, up to 2e": {"kind": "MACE", "hidden_irreps": "6x0e+6x1o+6x2e", "correlation": 3, "max_ell": 3},
    "odd scalars": {"hidden_irreps": "6x0e+6x0o+6x1o+6x1e"},
    "scalars only": {"hidden_irreps": "8x0e"},
    "density": {
        "first": "RealAgnosticDensityInteractionBlock",
        "later": "RealAgnosticDensityResidualInteractionBlock",
    },
}


def write_checkpoint(path: Path, merged: Path, rank: int = 2, **options: Any) -> None:
    """What mace writes with random factors: the checkpoint, and the model with the factors merged."""
    from mace.modules.lora import inject_LoRAs, merge_lora_weights

    model = make_mace(**options)
    model = inject_LoRAs(model, rank=rank, alpha=ALPHA)
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))
        model.get_buffer("atomic_energies_fn.atomic_energies").add_(0.25)
    torch.save({"model": model.state_dict(), "optimizer": {}, "lr_scheduler": {"best": np.float64(1.0)}}, path)
    torch.save(merge_lora_weights(model), merged)


def predicted(atoms: Atoms, calculator: Any) -> tuple[float, np.ndarray]:
    atoms = atoms.copy()
    atoms.calc = calculator
    return atoms.get_potential_energy(), atoms.get_forces()


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_the_merged_model(tmp_path: Path, kind: str) -> None:
    options = KINDS[kind]
    base = write_model(tmp_path / "base.model", **options)
    checkpoint, merged, adapter = tmp_path / "run_epoch-3.pt", tmp_path / "merged.model", tmp_path / "adapter"
    write_checkpoint(checkpoint, merged, **options)
    config = convert_mace_lora(checkpoint, adapter, model=base, alpha=ALPHA)
    assert config.method["name"] == "lora"
    assert {(update["rank"], update["alpha"]) for kind in config.method["table"].values() for update in kind} == {
        (2, 3)
    }
    for atoms in (cluster(), crystal()):
        energy, forces = predicted(atoms, forcetune.calculator(base, adapter=adapter))
        expected, expected_forces = predicted(atoms, forcetune.calculator(merged))
        assert energy == pytest.approx(expected, rel=1e-10)
        np.testing.assert_allclose(forces, expected_forces, atol=1e-10 * abs(expected_forces).max())
    plain, _ = predicted(cluster(), forcetune.calculator(base))
    assert abs(plain - predicted(cluster(), forcetune.calculator(base, adapter=adapter))[0]) > 1e-3


def test_what_cannot_be_an_adapter_is_refused(command: Command, tmp_path: Path) -> None:
    base, other = write_model(tmp_path / "base.model"), write_model(tmp_path / "other.model", seed=5)
    checkpoint, merged, adapter = tmp_path / "run_epoch-3.pt", tmp_path / "merged.model", tmp_path / "adapter"
    write_checkpoint(checkpoint, merged)
    code, out, err = command("import-lora", checkpoint, "--model", base, "--alpha", ALPHA, "-o", adapter)
    assert code == 0, err
    assert read_adapter_config(adapter).method["name"] == "lora"
    assert str(adapter) in out
    code, _, err = command("import-lora", merged, "--model", base, "-o", adapter)
    assert code == 2
    assert "is a whole model, into which mace merges --lora" in err
    code, _, err = command("import-lora", checkpoint, "--model", other, "-o", adapter)
    assert code == 2
    assert "started from another model" in err
    torch.save({"model": make_mace().state_dict(), "optimizer": {}, "lr_scheduler": {}}, checkpoint)
    with pytest.raises(InputError, match="has no LoRA factors"):
        convert_mace_lora(checkpoint, adapter, model=base)
    with pytest.raises(InputError, match="no such file"):
        convert_mace_lora(tmp_path / "nothing.pt", adapter, model=base)


def test_damaged_tensors_are_refused(command: Command, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.model")
    checkpoint, damaged, adapter = tmp_path / "run_epoch-3.pt", tmp_path / "damaged.pt", tmp_path / "adapter"
    write_checkpoint(checkpoint, tmp_path / "merged.model")
    state = torch.load(checkpoint, weights_only=False)["model"]
    flat = next(key for key in state if key.endswith("lora_B.weight") and state[key].ndim == 1)
    weight = next(key for key in state if key.endswith("base.weight"))
    energies, scale, shift = "atomic_energies_fn.atomic_energies", "scale_shift.scale", "scale_shift.shift"
    cases: list[tuple[str, torch.Tensor, str]] = [
        (flat, state[flat] * math.nan, f"its {flat} is not finite"),
        (flat, torch.cat([state[flat], state[flat][:1]]), "do not have the shape of the layer"),
        (flat, state[flat][:-1], "do not have the shape of the layer"),
        (flat, state[flat][None], "do not have the shape of factors"),
        (weight, state[weight] * math.nan, "started from another model"),
        (energies, state[energies] * math.nan, f"its {energies} is not finite"),
        (scale, state[scale].reshape(-1)[:0], f"its {scale} is empty"),
        (shift, state[shift].reshape(-1)[:0], f"its {shift} is empty"),
        ("atomic_numbers", state["atomic_numbers"] * 0 + 400, "atomic_numbers hold 400"),
    ]
    for key, value, message in cases:
        torch.save({"model": {**state, key: value}, "optimizer": {}, "lr_scheduler": {}}, damaged)
        with pytest.raises(InputError, match=re.escape(message)):
            convert_mace_lora(damaged, adapter, model=base, alpha=ALPHA)
        assert not adapter.exists()
    code, _, err = command("import-lora", checkpoint, "--model", base, "--alpha", "inf", "-o", adapter)
    assert code == 2
    assert "not a finite number" in err


@pytest.mark.slow
def test_a_run_of_mace_itself(tmp_path: Path) -> None:
    """Fine-tuned on three of the model's four elements, by the program that users call."""
    base = write_model(tmp_path / "base.model")
    write_labelled(tmp_path / "train.xyz")
    words = "--name lo --foundation_model base.model --multiheads_finetuning False --train_file train.xyz --E0s average"
    words += " --valid_fraction 0.25 --lora True --lora_rank 2 --lora_alpha 3 --lr 0.05 --max_num_epochs 2 --ema"
    program = "from mace.cli.run_train import main; main()"
    subprocess.run(
        [sys.executable, "-c", program, *words.split(), "--batch_size", "3", "--device", "cpu", "--plot", "False"],
        check=True,
        cwd=tmp_path,
        capture_output=True,
        env=os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    )
    checkpoint = next((tmp_path / "checkpoints").glob("*.pt"))
    adapter = tmp_path / "adapter"
    convert_mace_lora(checkpoint, adapter, model=base, alpha=ALPHA)
    atoms = read(tmp_path / "train.xyz")
    assert isinstance(atoms, Atoms)
    energy, forces = predicted(atoms, forcetune.calculator(base, adapter=adapter))
    expected, expected_forces = predicted(atoms, forcetune.calculator(tmp_path / "lo.model"))
    assert energy == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(forces, expected_forces, atol=1e-10)
