"""``forcetune mace-train``: command lines of MMEA's and mace's guides, losses as mace computes them, refusals."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.io import read, write

from forcetune.backbones.protocol import Prediction
from forcetune.cli.mace_train.equivalent import fit_line, fit_yaml
from forcetune.cli.mace_train.parsing import parse_arguments
from forcetune.cli.mace_train.translate import Translation, translate
from forcetune.config import LossConfig, load_config
from forcetune.errors import InputError
from forcetune.frames.dataset import read_dataset
from forcetune.frames.references import average
from forcetune.graphs.graph import Batch, build_graph, collate
from forcetune.training.losses import compute_loss
from systems import crystal, frames_of, labelled, write_labelled, write_model
from terminal import Command

MMEA = """
    --name="rmd17-Aspirin" --train_file="repro_data/dataset/dataset_rmd17/revised_aspirin/train.xyz"
    --valid_fraction=0.5 --test_file="repro_data/dataset/dataset_rmd17/revised_aspirin/test.xyz" --E0s="average"
    --model="MACE" --loss="ef" --num_interactions=2 --num_channels=128 --max_L=1 --correlation=3 --r_max=5.0 --lr=0.005
    --forces_weight=1000 --energy_weight=1 --weight_decay=1e-8 --clip_grad=100 --batch_size=5 --valid_batch_size=5
    --max_num_epochs=500 --scheduler_patience=5 --ema --ema_decay=0.995 --swa --start_swa=400 --error_table="TotalMAE"
    --default_dtype="float64" --device=cuda --seed=123 --save_cpu --energy_key="REF_energy" --forces_key="REF_forces"
    --foundation_model="repro_data/foundation_model/MACE-OFF23_medium.model"
"""
NAIVE = """
    --name="MACE" --foundation_model="small" --multiheads_finetuning=False --train_file="train.xyz"
    --valid_fraction=0.05 --test_file="test.xyz" --energy_weight=10.0 --forces_weight=10.0 --E0s="estimated" --lr=0.001
    --weight_decay=0.0 --scaling="rms_forces_scaling" --batch_size=2 --max_num_epochs=6 --ema --ema_decay=0.999
    --amsgrad --clip_grad=1.0 --default_dtype="float64" --device=cuda --seed=3
"""
REPLAY = """
    --name mymodel_finetuned --pt_train_file selected_configs.xyz --train_file train.xyz --valid_fraction 0.05
    --foundation_model model.model --energy_weight 1.0 --forces_weight 100.0 --swa --swa_energy_weight 10.0
    --swa_forces_weight 100.0 --E0s foundation
"""
HEADS = """
    --name mymodel_finetuned --foundation_model model.model --multiheads_finetuning True
    --heads "{'target_head': {'train_file': 'train.xyz', 'E0s': 'e0s.json'},
    'pt_head': {'train_file': 'selected_configs.xyz', 'E0s': 'foundation'}}"
    --atomic_numbers "[1, 6, 7, 8]" --energy_weight 1.0 --forces_weight 100.0
"""
LEAST = ("--name", "a", "--train_file", "train.xyz", "--foundation_model", "mini")


@pytest.fixture(autouse=True)
def _without_mmea_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MMEA_RANK", "MMEA_STD", "MMEA_PHI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def translated(*words: str) -> Translation:
    return translate(parse_arguments(words))


def values(translation: Translation, *names: str) -> list[Any]:
    selected = []
    for name in names:
        value: Any = translation.config
        for part in name.split("."):
            value = getattr(value, part)
        selected.append(value)
    return selected


def test_the_mmea_command_line_is_the_published_run(here: Path) -> None:
    translation = translated(*shlex.split(MMEA))
    config = translation.config
    assert config.method.name == "mmea"
    assert config.method.options() == {}
    assert (config.data.valid, config.data.split_seed, config.training.seed) == (0.5, 123, 123)
    training = config.training
    assert (training.epochs, training.batch_size, training.learning_rate, training.weight_decay) == (500, 5, 5e-3, 1e-8)
    assert (training.ema, training.clip, training.optimizer) == (0.995, 100.0, "adam")
    assert training.loss.model_copy(update={"stress": None}) == LossConfig()
    assert training.loss.stress == 0.0
    second = training.second_stage
    assert (second.start, second.learning_rate) == (401, 1e-3)
    assert (second.loss.energy, second.loss.forces, second.loss.energy_per_atom) == (1000.0, 100.0, True)
    assert (training.schedule.name, training.schedule.factor, training.schedule.patience) == ("plateau", 0.8, 5)
    assert config.references.mode == "average"
    assert config.output.run == "rmd17-Aspirin_run-123"
    assert translation.error_table == "TotalMAE"
    notes = " ".join(translation.notes)
    for flag in ("--loss ef", "--r_max", "--num_channels", "--max_L", "--save_cpu", "--valid_batch_size"):
        assert flag in notes


def test_the_mmea_command_line_runs(command: Command, here: Path) -> None:
    """As it stands, in the folders of the MMEA repository, but for the number of epochs, and with a small model."""
    folder = here / "repro_data" / "dataset" / "dataset_rmd17" / "revised_aspirin"
    folder.mkdir(parents=True)
    (here / "repro_data" / "foundation_model").mkdir()
    write_labelled(folder / "train.xyz", count=12)
    write_labelled(folder / "test.xyz", count=4, seed=7)
    write_model(here / "repro_data" / "foundation_model" / "MACE-OFF23_medium.model")
    words = shlex.split(MMEA.replace("epochs=500", "epochs=4").replace("start_swa=400", "start_swa=2"))
    code, out, err = command("mace-train", *words)
    assert code == 0, err
    assert "forcetune fit repro_data/dataset/dataset_rmd17/revised_aspirin/train.xyz --valid 0.5" in out
    assert "TotalMAE" in out
    assert "rmd17-Aspirin.model is not written: gates of mmea do not merge" in out
    results = json.loads((here / "rmd17-Aspirin_run-123" / "results.json").read_text(encoding="utf-8"))
    assert results["status"] == "finished"
    assert results["data"]["train"]["n_frames"] == 6
    after = results["errors"]["test"]["after"]
    labels = np.concatenate([atoms.arrays["REF_forces"] for atoms in labelled(4, seed=7)])
    row = next(line for line in out[out.index("TotalMAE") :].splitlines() if line.strip().startswith("test")).split()
    relative = 0.1 * after["forces_mae_mev_per_ang"] / np.abs(labels).mean()
    expected = (after["energy_mae_mev"], after["forces_mae_mev_per_ang"], relative)
    assert [float(number) for number in row[1:]] == pytest.approx(expected, abs=0.006)

    code, out, err = command("mace-train", *words)
    assert code == 2
    assert "is not empty" in err


def test_the_data_of_the_mmea_code_are_split_and_referenced_as_published(here: Path, reference_data: Path) -> None:
    """Their log of this command names the number of frames, and E0 of H, C and O by least squares on 50 of them."""
    folder = here / "repro_data" / "dataset" / "dataset_rmd17"
    folder.mkdir(parents=True)
    (folder / "revised_aspirin").symlink_to(reference_data / "rmd17" / "aspirin", target_is_directory=True)
    config = translated(*shlex.split(MMEA)).config
    dataset = read_dataset(config.data)
    assert [len(dataset.train.frames), len(dataset.valid.frames), len(dataset.tests["test"].frames)] == [50, 50, 1000]
    published = {1: -875.4152837800568, 6: -984.8421942525647, 8: -437.7076418900285}
    energies = average(dataset.train.frames, dict.fromkeys(published, 0.0))
    assert energies == pytest.approx(published, rel=1e-10)


def test_the_naive_command_of_maces_guide(here: Path) -> None:
    translation = translated(*shlex.split(NAIVE))
    assert values(translation, "model.model", "references.mode", "data.valid") == ["mace-mp-0-small", "estimate", 0.05]
    assert values(translation, "training.learning_rate", "training.weight_decay", "training.ema") == [1e-3, 0.0, 0.999]
    loss = translation.config.training.loss
    assert (loss.energy, loss.forces, loss.stress, loss.form, loss.energy_per_atom) == (10, 10, 0, "mse", True)
    assert values(translation, "training.seed", "data.split_seed", "training.clip", "output.run") == [
        3,
        3,
        1.0,
        "MACE_run-3",
    ]
    assert values(translation, "replay.data", "training.second_stage.start") == [[], None]
    assert any("--scaling" in note for note in translation.notes)
    assert any("--amsgrad" in note for note in translation.notes)


def test_the_replay_command_of_maces_guide(here: Path) -> None:
    write_labelled(here / "train.xyz", count=4)
    write_labelled(here / "selected_configs.xyz", count=60, seed=2)
    translation = translated(*shlex.split(REPLAY))
    # 4 frames to train on, as 5 % of them are none, and 57 of 60 to replay: t / q = 0.1 / (4 / 57), so twice as often
    assert translation.config.replay.data == ["selected_configs.xyz"]
    assert (translation.config.replay.labels, translation.config.replay.ratio) == ("file", pytest.approx(57 / 8))
    assert values(translation, "training.epochs", "training.valid_every", "training.second_stage.start") == [
        4096,
        2,
        3073,
    ]
    assert values(translation, "training.learning_rate", "training.ema", "references.mode") == [1e-4, 0.99999, "model"]
    loss, second = translation.config.training.loss, translation.config.training.second_stage.loss
    # no frame has stress, whose terms mace leaves at zero
    assert (loss.form, loss.energy, loss.forces, loss.stress, loss.energy_per_atom) == ("universal", 1, 100, 0, True)
    assert (second.form, second.energy, second.forces, second.stress) == ("universal", 10, 100, 0)
    assert any("no training frame has stress" in note for note in translation.notes)

    # with a file of its own for validation, mace trains on all 60
    translation = translated(*shlex.split(REPLAY), "--pt_valid_file", "other.xyz")
    assert translation.config.replay.ratio == pytest.approx(60 / 8)
    assert not any("--pt_valid_file" in note for note in translation.notes)
    assert any("--pt_valid_file" in note for note in translated(*LEAST, "--pt_valid_file", "other.xyz").notes)

    more = "--pseudolabel_replay True --force_mh_ft_lr True --weight_pt 3 --num_samples_pt 100"
    translation = translated(*shlex.split(f"{REPLAY} {more}"))
    assert values(translation, "replay.labels", "replay.weight", "training.learning_rate") == ["base", 3.0, 0.01]
    assert translation.config.training.ema is None
    assert any("--num_samples_pt" in note for note in translation.notes)


def test_replay_runs(command: Command, here: Path) -> None:
    write_labelled(here / "train.xyz", count=12)
    write_labelled(here / "selected_configs.xyz", count=16, seed=2)
    write_model(here / "model.model")
    code, out, err = command("mace-train", *shlex.split(REPLAY), "--max_num_epochs", "2", "--batch_size", "4")
    assert code == 0, err
    assert "PerAtomRMSEstressvirials" in out
    results = json.loads((here / "mymodel_finetuned_run-123" / "results.json").read_text(encoding="utf-8"))
    assert results["status"] == "finished"


def test_heads_of_maces_guide(here: Path) -> None:
    write_labelled(here / "train.xyz", count=4)
    write_labelled(here / "selected_configs.xyz", count=20, seed=2)
    (here / "e0s.json").write_text('{"1": -13.6, "6": -1029.5, "7": -1484.0, "8": -2042.0}', encoding="utf-8")
    translation = translated(*shlex.split(HEADS))
    assert translation.config.references.table == {"H": -13.6, "C": -1029.5, "N": -1484.0, "O": -2042.0}
    assert values(translation, "data.train", "replay.data") == [["train.xyz"], ["selected_configs.xyz"]]
    assert translation.config.model.elements == ["H", "C", "N", "O"]
    assert translation.config.replay.ratio == pytest.approx(18 / 4)
    own_file = HEADS.replace("'E0s': 'foundation'", "'E0s': 'foundation', 'valid_file': 'other.xyz'")
    assert translated(*shlex.split(own_file)).config.replay.ratio == pytest.approx(20 / 4)
    keys = "{'dft': {'train_file': ['train.xyz'], 'info_keys': {'energy': 'E'}, 'arrays_keys': {'forces': 'F'}}}"
    translation = translated("--name", "a", "--foundation_model", "mini", "--heads", keys, "--E0s", "average")
    assert values(translation, "data.train", "data.energy_key", "data.forces_key") == [["train.xyz"], "E", "F"]


def test_lora_of_maces_guide_writes_the_plain_model(command: Command, here: Path) -> None:
    write_labelled(here / "train.xyz")
    write_model(here / "base.model")
    code, out, err = command(
        *("mace-train", "--name", "tuned", "--foundation_model", "base.model", "--lora", "True", "--lora_rank", "2"),
        *("--train_file", "train.xyz", "--E0s", "average", "--max_num_epochs", "2", "--model_dir", "models"),
        *("--multiheads_finetuning", "False", "--error_table", "PerAtomMAE"),
    )
    assert code == 0, err
    assert "PerAtomMAE" in out
    model = here / "models" / "tuned.model"
    assert str(Path("models") / "tuned.model") in out
    config = load_config(here / "tuned_run-123" / "config.yaml")
    assert (config.method.name, config.method.options()) == ("lora", {"rank": 2, "alpha": 1.0})
    import forcetune

    atoms = read(here / "train.xyz")
    assert isinstance(atoms, Atoms)
    energies = []
    for source in (here / "tuned_run-123", model):
        atoms.calc = forcetune.calculator(str(source))
        energies.append(atoms.get_potential_energy())
    assert energies[0] == pytest.approx(energies[1], rel=1e-8)


def test_a_model_that_cannot_be_written_ends_with_an_error(command: Command, here: Path) -> None:
    write_labelled(here / "train.xyz")
    write_model(here / "base.model")
    (here / "models").write_text("a file, where a folder should be", encoding="utf-8")
    code, out, err = command(
        *("mace-train", "--name", "tuned", "--foundation_model", "base.model", "--lora", "True"),
        *("--train_file", "train.xyz", "--E0s", "average", "--max_num_epochs", "1", "--model_dir", "models"),
    )
    assert code == 1
    model = Path("models") / "tuned.model"
    assert f"{model}: is not written" in err
    assert f"forcetune merge tuned_run-123 --output {model}" in err
    assert "is not written" not in out
    assert json.loads((here / "tuned_run-123" / "results.json").read_text(encoding="utf-8"))["status"] == "finished"


def test_yaml_as_mace_takes_it(here: Path) -> None:
    content = {
        "name": "water",
        "train_file": "train.xyz",
        "foundation_model": "medium_off",
        "loss": "universal",
        "swa": True,
        "ema": False,
        "E0s": {1: -13.6, 8: -2042.0},
        "max_num_epochs": 8,
        "stress_weight": 5,
        "eval_interval": 2,
        "scheduler_patience": 7,
        "stage_two_energy_weight": 3.0,
        "wandb_log_hypers": ["lr"],
        "clip_grad": None,
        "heads": None,
    }
    (here / "mace.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    translation = translated("--config", "mace.yaml", "--max_num_epochs", "20", "--clip_grad", "None")
    assert values(translation, "model.model", "training.epochs", "training.ema") == ["mace-off23-medium", 20, None]
    assert translation.config.references.table == {"H": -13.6, "O": -2042.0}
    assert values(translation, "training.loss.stress", "training.loss.form", "training.clip") == [
        5.0,
        "universal",
        None,
    ]
    assert values(translation, "training.second_stage.start", "training.second_stage.loss.energy") == [16, 3.0]
    assert values(translation, "training.valid_every", "training.schedule.patience") == [2, 3]
    assert any("--wandb_log_hypers" in note for note in translation.notes)
    (here / "mace.yaml").write_text("name: a\nlearning_rate: 1\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"mace.yaml: mace 0.3.16 has no option 'learning_rate'"):
        translated("--config", "mace.yaml")


def test_yaml_errors_name_the_line(here: Path) -> None:
    (here / "mace.yaml").write_text("name: a\nlr: [1\nema: true\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"mace.yaml: is not valid YAML \(line 3\); write options as `name: value`"):
        translated("--config", "mace.yaml")


def test_wandb_is_a_tracker(here: Path) -> None:
    translation = translated(*LEAST, "--wandb", "--wandb_project", "water", "--wandb_entity", "group")
    assert values(translation, "output.trackers", "output.project") == [["wandb"], "water"]
    assert any("--wandb_entity" in note and "WANDB_ENTITY" in note for note in translation.notes)
    assert values(translated(*LEAST, "--wandb"), "output.trackers", "output.project") == [["wandb"], "forcetune"]
    translation = translated(*LEAST, "--wandb_project", "water")
    assert values(translation, "output.trackers", "output.project") == [[], "forcetune"]
    assert "--wandb_project: ignored without --wandb, as in mace" in translation.notes


def test_kernels_of_nvidia_are_named(here: Path) -> None:
    notes = translated(*LEAST, "--enable_cueq", "True").notes
    assert any("--enable_cueq" in note and "--set model.kernels=cuequivariance" in note for note in notes)


def test_a_folder_with_the_name_of_a_model_is_no_model(here: Path) -> None:
    (here / "medium_off").mkdir()
    assert translated(*LEAST, "--foundation_model", "medium_off").config.model.model == "mace-off23-medium"


@pytest.mark.parametrize("words", [MMEA, NAIVE + " --freeze 5 --set training.ema=null --clip_grad None"])
def test_the_printed_command_and_yaml_do_the_same(command: Command, here: Path, words: str) -> None:
    translation = translated(*shlex.split(words))
    (here / "run.yaml").write_text(fit_yaml(translation.options), encoding="utf-8")
    assert load_config(here / "run.yaml") == translation.config
    program, name, *line = shlex.split(fit_line(translation.options))
    assert (program, name) == ("forcetune", "fit")
    # the command line itself checks the configuration before it looks for files
    settings: list[str] = []
    import forcetune.runs.fit as fitting

    seen: list[Any] = []
    patch = pytest.MonkeyPatch()
    patch.setattr(fitting, "run_fit", lambda config, **_: seen.append(config))
    try:
        command("fit", *line, *settings)
    except AttributeError:
        pass  # nothing was run that could be printed
    finally:
        patch.undo()
    assert seen == [translation.config]


class Reference(dict[str, Any]):
    """A batch as the losses of mace read it."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "name", ["weighted", "forces_only", "stress", "virials", "huber", "universal", "l1l2energyforces"]
)
def test_losses_are_those_of_mace(name: str, stage: int) -> None:
    """Some forces are so large that ``universal`` has all of its four regimes."""
    pytest.importorskip("mace")
    from mace.tools.scripts_utils import get_loss_fn

    if (name, stage) == ("forces_only", 2):
        return  # mace has no such stage
    words = ["--swa", "--huber_delta", "0.03", "--virials_weight", "5", "--swa_virials_weight", "70"]
    for prefix, values in (("", ("2", "30", "400")), ("swa_", ("3", "50", "600"))):
        for quantity, value in zip(("energy", "forces", "stress"), values, strict=True):
            words += [f"--{prefix}{quantity}_weight", value]
    if name == "forces_only":
        words.remove("--swa")
    arguments = parse_arguments([*LEAST, "--E0s", "average", "--loss", name, *words])
    training = translate(arguments).config.training
    config = training.loss if stage == 1 else training.second_stage.loss
    batch, prediction = labels_and_prediction()
    volume = torch.linalg.det(batch.cell).abs().view(-1, 1, 1)
    ones = torch.ones(2, dtype=torch.float64)
    names = ("weight", "energy_weight", "forces_weight", "stress_weight", "virials_weight")
    labels = {"energy": batch.energy, "forces": batch.forces, "stress": batch.stress}
    reference = Reference(labels, virials=-volume * batch.stress, ptr=batch.ptr, **dict.fromkeys(names, ones))
    assert prediction.stress is not None
    predicted = {"energy": prediction.energy, "forces": prediction.forces, "stress": prediction.stress}
    predicted["virials"] = -volume * prediction.stress
    keys = ("energy_weight", "forces_weight", "stress_weight", "virials_weight")
    prefix = "" if stage == 1 else "swa_"
    kept = name if stage == 1 or name in ("stress", "virials", "universal") else "weighted"
    theirs = argparse.Namespace(
        loss=kept, huber_delta=arguments["huber_delta"], **{key: arguments[f"{prefix}{key}"] for key in keys}
    )
    expected = get_loss_fn(theirs, False, False)(reference, predicted, ddp=False)
    assert float(compute_loss(config, prediction, batch)) == pytest.approx(float(expected), rel=1e-7)


def labels_and_prediction() -> tuple[Batch, Prediction]:
    """Random labels of two frames, and a prediction near them."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.as_tensor(random.normal(size=shape))

    graphs = []
    for frame in frames_of(crystal(), crystal(seed=7)[:6]):
        forces = draw(len(frame), 3)
        forces[:4] *= torch.tensor([1.0, 150.0, 250.0, 350.0], dtype=torch.float64)[:, None] / forces[:4].norm(
            dim=1, keepdim=True
        )
        graphs.append(replace(build_graph(frame, 4.0), energy=draw(1), forces=forces, stress=draw(1, 3, 3)))
    batch = collate(graphs)
    prediction = Prediction(
        batch.energy + 0.05 * draw(2),
        batch.forces + 0.05 * draw(*batch.forces.shape),
        batch.stress + 0.05 * draw(2, 3, 3),
    )
    return batch, prediction


@pytest.mark.parametrize("name", ["weighted", "stress", "virials", "universal"])
def test_weights_of_labels_count_as_in_mace(name: str) -> None:
    pytest.importorskip("mace")
    from mace.tools.scripts_utils import get_loss_fn

    arguments = parse_arguments([*LEAST, "--E0s", "average", "--loss", name])
    batch, prediction = labels_and_prediction()
    energy, forces, stress = torch.tensor([[2.0, 0.5], [1.5, 3.0], [4.0, 0.25]], dtype=torch.float64)
    batch = replace(batch, file_weights=torch.stack((energy, forces, stress, torch.ones(2)), dim=1))
    volume = torch.linalg.det(batch.cell).abs().view(-1, 1, 1)
    assert prediction.stress is not None
    reference = Reference(
        energy=batch.energy, forces=batch.forces, stress=batch.stress, virials=-volume * batch.stress, ptr=batch.ptr
    )
    reference |= {"weight": torch.ones(2), "energy_weight": energy, "forces_weight": forces}
    reference |= {"stress_weight": stress, "virials_weight": stress}
    predicted = {"energy": prediction.energy, "forces": prediction.forces, "stress": prediction.stress}
    predicted["virials"] = -volume * prediction.stress
    keys = ("energy_weight", "forces_weight", "stress_weight", "virials_weight", "huber_delta")
    theirs = argparse.Namespace(loss=name, **{key: arguments[key] for key in keys})
    expected = get_loss_fn(theirs, False, False)(reference, predicted, ddp=False)
    loss = translate(arguments).config.training.loss
    assert float(compute_loss(loss, prediction, batch)) == pytest.approx(float(expected), rel=1e-7)


def test_a_key_of_virials(here: Path) -> None:
    translation = translated(*LEAST, "--loss", "virials", "--virials_key", "my_virial", "--virials_weight", "3")
    assert values(translation, "data.stress_key", "training.loss.stress") == ["my_virial", 3.0]
    assert translation.config.training.loss.stress_per_atom
    with pytest.raises(InputError, match="--virials_key 'w': virials are recognised by `virial`"):
        translated(*LEAST, "--loss", "virials", "--virials_key", "w")
    translation = translated(*LEAST, "--virials_key", "my_virial")
    assert translation.config.data.stress_key == "auto"
    assert "--virials_key: ignored without --loss virials, as in mace" in translation.notes


def test_reference_energies(here: Path) -> None:
    (here / "statistics.json").write_text(
        json.dumps({"atomic_energies": "{1: -13.6, 8: -2040.0}", "atomic_numbers": "[1, 8]", "mean": 0.0, "std": 1.0}),
        encoding="utf-8",
    )
    assert translated(*LEAST).config.references.mode == "isolated"
    assert translated(*LEAST, "--E0s", "foundation").config.references.mode == "model"
    translation = translated(*LEAST, "--statistics_file", "statistics.json")
    assert translation.config.references.table == {"H": -13.6, "O": -2040.0}
    assert translation.config.model.elements == ["H", "O"]
    isolated = Atoms("H", info={"REF_energy": -13.6, "config_type": "IsolatedAtom"})
    isolated.arrays["REF_forces"] = np.zeros((1, 3))
    write(here / "train.xyz", [isolated, *labelled(4)], format="extxyz")
    translation = translated(*LEAST, "--E0s", "average")
    assert translation.config.references.mode == "isolated"
    assert any("IsolatedAtom" in note for note in translation.notes)


def test_frozen_parts_and_gates(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from forcetune.adapters.methods import build_method
    from systems import backbone

    sites = backbone().sites()
    for number, parts in (
        (1, {"interactions", "products", "readouts"}),
        (5, {"products", "readouts"}),
        (6, {"readouts"}),
    ):
        translation = translated(*LEAST, "--freeze", str(number))
        method = build_method(translation.config.method)
        assert translation.config.method.name == "full"
        assert {site.name.split(".")[0] for site in sites if method.updates_at(site)} == parts
    assert translated(*LEAST, "--freeze", "5", "--method", "elora").config.method.name == "elora"
    assert translated(*LEAST, "--freeze", "-1").config.method.target is None
    monkeypatch.setenv("MMEA_RANK", "32")
    monkeypatch.setenv("MMEA_STD", "0.001")
    assert translated(*LEAST).config.method.options() == {"rank": 32, "shift_init": 0.001}
    translation = translated(*LEAST, "--mmea_init", "zero")
    assert translation.config.method.options() == {"rank": 32, "shift_init": 0.0}
    assert "MMEA_STD=0.001 in the environment: ignored, as --mmea_init zero wins" in translation.notes
    assert "MMEA_RANK=32: taken from the environment, as the MMEA code does" in translation.notes
    for words, winner in ((("--rank", "8"), "--rank 8"), (("--set", "method.rank=8"), "--set method.rank=…")):
        translation = translated(*LEAST, *words)
        assert translation.config.method.options() == {"rank": 8, "shift_init": 0.001}
        assert f"MMEA_RANK=32 in the environment: ignored, as {winner} wins" in translation.notes


def test_restart_latest_resumes_and_refuses_another_run(command: Command, here: Path) -> None:
    write_labelled(here / "train.xyz")
    write_model(here / "base.model")
    words = ["mace-train", "--name", "a", "--train_file", "train.xyz", "--foundation_model", "base.model"]
    words += ["--E0s", "average", "--max_num_epochs", "3", "--restart_latest"]
    code, _, err = command(*words)
    assert code == 0, err
    run = here / "a_run-123"
    config = run / "config.yaml"
    code, _, err = command(*words, "--lr", "0.5")
    assert code == 2
    assert "began with training.learning_rate=0.01, this call has 0.5" in err
    code, _, err = command(*words)
    assert code == 2
    assert "this run is finished" in err
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    (run / "results.json").write_text(json.dumps(results | {"status": "interrupted"}), encoding="utf-8")
    before = config.read_text(encoding="utf-8")
    code, _, err = command(*words)
    assert code == 0, err
    assert json.loads((run / "results.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert config.read_text(encoding="utf-8") == before
