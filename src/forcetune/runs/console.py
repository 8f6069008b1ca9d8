"""What a run says before its training."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console

from forcetune.adapters.attach import Adapter
from forcetune.adapters.methods import Method
from forcetune.backbones.protocol import Backbone
from forcetune.config import ReplayConfig, RunConfig, TrainingConfig
from forcetune.errors import warn
from forcetune.evaluation.streamed import SHOWN
from forcetune.frames.dataset import Dataset
from forcetune.frames.isolated import IsolatedAtoms
from forcetune.frames.references import ReferenceEnergies
from forcetune.frames.store.stored_frames import StoredFrames
from forcetune.kernels.compiled.choice import kernels_in_use, missing_reason
from forcetune.training.label_weights import weighs_hessians
from forcetune.training.replay import ReplayFrames, has_own_head
from forcetune.utils.option_defaults import is_given


def say_data(console: Console, dataset: Dataset, replay: ReplayFrames | None, config: ReplayConfig) -> None:
    """Which frames a run has; a warning where errors are those of a sample."""
    for name, part in dataset.splits.items():
        keys = ", ".join(f"{label} from {key!r}" for label, key in part.keys._asdict().items() if key)
        console.print(f"{name}: {len(part.frames)} frames, {keys} ({', '.join(part.files)})", highlight=False)
    if isinstance(frames := dataset.train.frames, StoredFrames):
        place = frames.rows.folder.parent
        console.print(f"streamed: frames and graphs stay on disk in {place}, for later runs", highlight=False)
        if len(frames) > SHOWN:
            warn(
                f"Streamed data: errors of the training frames are those of {SHOWN:,} of {len(frames):,}, evenly "
                "spread; those of all other sets are of all frames, and plots show as many."
            )
    if replay is not None:
        labels = "its own predictions" if config.labels == "base" else "the labels in the files"
        counts = f"{len(replay.frames)} frames and {len(replay.held)} held out"
        head = ", a head of their own" if has_own_head(config) else ""
        console.print(f"replay: {counts}, {labels}{head} ({', '.join(replay.files)})", highlight=False)
    if dataset.isolated:
        console.print(f"isolated atoms: {len(dataset.isolated)}, not trained on", highlight=False)


def say_isolated(console: Console, isolated: IsolatedAtoms | None, references: ReferenceEnergies) -> None:
    """What isolated atoms among the training frames say; a warning where they do not fit the frames."""
    if isolated is None:
        return
    text = isolated.sentence(references.mode, references.offset_after_mev_per_atom)
    if isolated.disagree:
        warn(text)
    elif references.mode != "isolated":
        console.print(text, highlight=False)


def say_optimizer(console: Console, config: RunConfig, method: Method) -> None:
    """Without ``training.optimizer``: why it is not the method's, or that the learning rate may be another one's."""
    training = config.training
    if is_given(config, "training.optimizer"):
        return
    if training.optimizer != method.optimizer and config.reason_for_adam:
        console.print(
            f"optimizer: {training.optimizer}, as {config.reason_for_adam}, instead of {method.optimizer} "
            f"({method.name})",
            highlight=False,
        )
    usual = method.default_rate(training.optimizer)
    if training.optimizer == "soap" and is_given(config, "training.learning_rate") and training.learning_rate != usual:
        console.print(
            f"optimizer: soap with a learning rate of {training.learning_rate:g}; its own for {method.name} is "
            f"{usual:g}, and rates for adam are others (--optimizer adam)",
            highlight=False,
        )


def say_weights(console: Console, asked: TrainingConfig, settled: TrainingConfig, labelled: Collection[str]) -> None:
    """Which labels are trained on where that is not what the options say by themselves; a warning for unused labels."""
    loss = settled.loss
    for label, others in (("energy", "forces"), ("forces", "energies")):
        if label not in labelled:
            console.print(f"no {label} (data.{label}_key=none): trained on {others} alone", highlight=False)
    if "hessian" in labelled and not weighs_hessians(settled):
        warn("The training frames have Hessian labels that are not trained on: training.loss.hessian is 0.")
    if "magforces" in labelled:
        if loss.magforces_weight == 0:
            warn("The training frames have magnetic forces that are not trained on: training.loss.magforces is 0.")
        elif asked.loss.magforces is None:
            console.print(
                f"magnetic forces: trained on with weight {loss.magforces_weight:g} (training.loss.magforces; 0 leaves "
                "them out)",
                highlight=False,
            )
    if "stress" not in labelled:
        return
    if loss.stress_weight == 0:
        why = (
            "training.loss.stress is 0" if asked.loss.stress == 0 else "forces weigh nothing; set training.loss.stress"
        )
        warn(f"The training frames have stress labels that are not trained on: {why}.")
    elif asked.loss.stress is None:
        console.print(
            f"stress: trained on with weight {loss.stress_weight:g}, beside {loss.forces:g} of forces and "
            f"{loss.energy:g} of energies (training.loss.stress; 0 leaves it out)",
            highlight=False,
        )


def say_kernels(console: Console, backbone: Backbone) -> None:
    """What computes the model, and that the first use of compiled kernels may take a moment."""
    if kernels_in_use(backbone.model) == "compiled":
        console.print("computed by compiled kernels (compiled on first use, then cached)", highlight=False)
    elif backbone.device.type == "cpu" and (reason := missing_reason()) is not None:
        console.print(f"computed by PyTorch's operations: {reason}", highlight=False)


def say_adapter(console: Console, method: Method, backbone: Backbone, adapter: Adapter) -> None:
    """What is trained."""
    total = sum(site.numel for site in adapter.sites)
    console.print(
        f"{method.name} on {backbone.base.name}: {adapter.trainable:,} trained parameters "
        f"({100 * adapter.trainable / total:.1f} % of {total:,}), licence of the base: {backbone.base.licence}",
        highlight=False,
    )
