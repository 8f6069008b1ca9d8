"""Everything before the training of a run: frames are read and examined, the model is loaded and the adapter attached.

Nothing is written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers
from rich.console import Console
from rich.progress import Progress

from forcetune.adapters.attach import get_adapter
from forcetune.adapters.file import start_from
from forcetune.adapters.magnetic import with_magnetism
from forcetune.adapters.methods import Method
from forcetune.backbones.loading import asked_of_loaded, load, with_loaded
from forcetune.backbones.protocol import Backbone
from forcetune.config import RunConfig
from forcetune.config.training import MOST_EPOCHS
from forcetune.deployment import phonons
from forcetune.deployment.loading import BASE_NAME, adapter_folder
from forcetune.diagnostics.run_checks import check_frames, check_predictions
from forcetune.errors import InputError, warn
from forcetune.evaluation.metrics import Predictions, build_graphs, check_elements, check_finite, predict
from forcetune.evaluation.streamed import (
    StreamedPredictions,
    predict_streamed,
    shown,
    shown_frames,
)
from forcetune.frames.dataset import Dataset, read_dataset
from forcetune.frames.frame import FloatArray, Frame
from forcetune.frames.isolated import compare_isolated
from forcetune.frames.labels import NONE
from forcetune.frames.references import ReferenceEnergies, reference_energies
from forcetune.graphs.graph import Batch
from forcetune.graphs.stored_graphs import StoredGraphs, any_label
from forcetune.runs.console import say_adapter, say_data, say_isolated, say_kernels, say_optimizer, say_weights
from forcetune.runs.folder import ANCHOR
from forcetune.runs.method_defaults import choose_rate
from forcetune.runs.results import ParameterSummary
from forcetune.runs.summaries import (
    summarize_parameters,
)
from forcetune.training.anchor import Anchor, AnchorFrames, anchor_key, make_anchor, read_anchor, read_anchor_frames
from forcetune.training.initialization import attach_for_training
from forcetune.training.label_weights import settle, weighs_hessians
from forcetune.training.penalty import check_penalty, unpenalized_parts
from forcetune.training.replay import Replay, ReplayFrames, data_hash, prepare_replay, read_replay
from forcetune.training.train import check_trainable_labels
from forcetune.utils.option_defaults import is_given
from forcetune.utils.processes import worker_count


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """What a run has before its training begins.

    Attributes:
        dataset, graphs: frames, and the graph of each, by split.
        backbone: with the adapter attached and the run's reference energies.
        references, model_references: of the run, and of the foundation model.
        before: predictions of the foundation model with the run's reference energies.
        parameters: description of what is trained.
        replay_frames, replay: as they were read, and ready for the training; None without replay.
        data: hash of the frames trained on.
        anchor: what the penalty compares with; None without one.
        anchor_key: hash of what it depends on.
        crystal: whose phonons are computed after training; None for none.
    """

    dataset: Dataset
    backbone: Backbone
    graphs: dict[str, Sequence[Batch]]
    references: ReferenceEnergies
    model_references: dict[int, float]
    before: dict[str, Predictions | StreamedPredictions]
    parameters: ParameterSummary
    replay_frames: ReplayFrames | None
    replay: Replay | None
    data: str
    anchor: Anchor | None
    anchor_key: str
    crystal: Frame | None


class Preparation:
    """The steps before the training.

    Attributes:
        config: of the run; a loaded model may change what it says about it.
        method: with the magnetic layer that the configuration asks for.
        training: its options with a weight for every term of the loss.
        takes_rate: whether the foundation model's default learning rate counts, as none was given.
        stores_base: whether the run folder keeps the foundation model, which no name or path gives.
    """

    def __init__(self, config: RunConfig, method: Method, console: Console, *, takes_rate: bool = False) -> None:
        self.config = config
        self.method = method
        self.console = console
        self.training = config.training
        self.takes_rate = takes_rate
        self.stores_base = False

    def prepare(self, backbone: Backbone | None, checkpoint: Mapping[str, Any] | None = None) -> PreparedRun:
        """Everything before the training; nothing is written."""
        dataset = self._read()
        self.method = with_magnetism(self.method, self.config.magnetism, dataset.train.keys, dataset.train.frames)
        replay = read_replay(self.config.replay, self.config.data)
        named = read_anchor_frames(self.config.training.penalty, self.config.data.type_map)
        say_data(self.console, dataset, replay, self.config.replay)
        say_optimizer(self.console, self.config, self.method)
        self._settle_epochs(len(dataset.train.frames))
        crystal = self._crystal(dataset)
        others = [frames.elements for frames in (replay, named) if frames is not None]
        backbone = self._load([*dataset.elements, *itertools.chain(*others)], backbone)
        check_penalty(self.config.training.penalty, self.method, backbone.sites())
        if self.takes_rate:
            self.config = self.config.with_default_rate(choose_rate(self.config, self.method, backbone.learning_rates))
        examined = self.config.data.doctor == "on"
        if examined:
            self._examine(dataset, backbone)
        graphs = {name: self._graphs(backbone, name, part.frames) for name, part in dataset.splits.items()}
        self._settle_weights(graphs["train"], dataset)
        check_trainable_labels(self.training, graphs["train"])
        raw = {
            name: predict_split(self.console, backbone, graphs[name], f"{name}, before", finite=True) for name in graphs
        }
        for name, part in dataset.splits.items():
            if isinstance(predictions := raw[name], Predictions):
                check_finite(predictions, part.frames)
        if examined:
            check_predictions(shown_frames(dataset.train.frames, raw["train"]), shown(raw["train"]))
        model_references = backbone.reference_energies
        references = self._references(dataset, raw["train"].energy, model_references)
        if checkpoint is not None:
            references = replace(references, energies=checkpoint["reference_energies"])
        shift = {z: references.energies[z] - model_references[z] for z in model_references}
        # errors of streamed training frames are those of a sample, before and after
        raw["train"] = shown(raw["train"])
        before = {name: predictions.shifted(shift) for name, predictions in raw.items()}
        prepared = None
        if replay is not None:
            prepared = prepare_replay(replay, self.config.replay, self.training, backbone, references.energies)
        elements = {*dataset.train.elements, *(replay.trained_elements if replay else ())}
        adapter = attach_for_training(
            backbone, self.method, self.training, graphs["train"], references.energies, elements
        )
        if self.training.start_from is not None:
            start_from(adapter, backbone, _start_folder(self.training.start_from))
        backbone.set_reference_energies(references.energies)
        say_adapter(self.console, self.method, backbone, adapter)
        parameters = summarize_parameters(adapter)
        data = data_hash(dataset.train.sha256, *(None if one is None else one.sha256 for one in (replay, named)))
        key = anchor_key(self.training, backbone.base.fingerprint, data, self.method.to_json())
        anchor = self._anchor(backbone, named or _known_frames(dataset, replay), key)
        return PreparedRun(
            dataset,
            backbone,
            graphs,
            references,
            model_references,
            before,
            parameters,
            replay,
            prepared,
            data,
            anchor,
            key,
            crystal,
        )

    def _crystal(self, dataset: Dataset) -> Frame | None:
        """Whose phonons are computed after training.

        Raises:
            InputError: they are asked for and cannot be.
        """
        wish = self.config.output.phonons
        layered = self.config.magnetism.layer != "off"
        if wish == "off" or (wish == "auto" and (layered or not phonons.is_installed())):
            return None
        if layered:
            raise InputError("output.phonons: is on, but models with a magnetic layer have none; set it to off.")
        if wish == "auto":
            return phonons.choose_crystal(dataset)
        if not phonons.is_installed():
            raise InputError("output.phonons: is on, and needs phonopy: pip install 'forcetune[phonons]'.")
        crystal = phonons.choose_crystal(dataset, math.inf)
        if crystal is None:
            raise InputError(
                f"output.phonons: is on, but no frame is a crystal (periodic, no vacuum) with forces below "
                f"{phonons.NEAR_EQUILIBRIUM} eV/Å; add the relaxed crystal to the frames, or set it to off."
            )
        return crystal

    def _anchor(self, backbone: Backbone, frames: AnchorFrames, key: str) -> Anchor | None:
        """What the penalty compares with: that of the run folder, where the run is resumed, or made here."""
        penalty = self.training.penalty
        if not penalty.is_set:
            return None
        free = unpenalized_parts(penalty, self.method, backbone.sites())
        if free is not None:
            self.console.print(f"penalty: {free}", highlight=False)
        anchor = read_anchor(Path(self.config.output.run) / ANCHOR, key, backbone.device)
        if anchor is None:
            with self.console.status("what the penalty compares with"):
                anchor = make_anchor(backbone, self.training, frames)
        if anchor.n_frames:
            self.console.print(f"penalty: compared on {anchor.n_frames} {anchor.source}", highlight=False)
        return anchor

    def _references(
        self, dataset: Dataset, model_energies: FloatArray, model_references: dict[int, float]
    ) -> ReferenceEnergies:
        """Reference energies of the run, printed with what they and isolated atoms in the files leave unexplained."""
        mode, table = self.config.references.mode, self.config.references.table
        if mode in ("estimate", "average") and self.config.data.energy_key == NONE:
            mode = "model"
        references = reference_energies(
            mode,
            dataset.train.frames,
            dataset.isolated,
            model_energies,
            model_references,
            None if table is None else {**table},
        )
        if references.offset_before_mev_per_atom is not None:
            self.console.print(
                f"reference energies ({references.mode}): mean offset {references.offset_before_mev_per_atom:,.1f} → "
                f"{references.offset_after_mev_per_atom:.1f} meV/atom",
                highlight=False,
            )
        isolated = compare_isolated(dataset.isolated, dataset.train.frames, model_energies, model_references)
        say_isolated(self.console, isolated, references)
        return references

    def _settle_epochs(self, n_frames: int) -> None:
        """How long the run is, where nobody said it."""
        self.config = self.config.with_default_epochs(n_frames)
        training = self.config.training
        if not is_given(self.config, "training.epochs") and training.epochs != MOST_EPOCHS:
            self.console.print(
                f"epochs: {training.epochs}, as {n_frames} frames make {math.ceil(n_frames / training.batch_size)} "
                "steps each; --epochs sets another number",
                highlight=False,
            )

    def _settle_weights(self, graphs: Sequence[Batch], dataset: Dataset) -> None:
        """Weights of the loss for the labels there are, and a line about what is not trained on."""
        data = self.config.data
        # energies and forces that are missing although no key is `none` are a mistake, which is reported later
        labelled = {label for label in ("energy", "forces") if getattr(data, f"{label}_key") != NONE}
        if any_label(graphs, "stress"):
            labelled.add("stress")
        if any_label(graphs, "magforces"):
            if self.config.magnetism.layer == "spin":
                labelled.add("magforces")
            else:
                warn("The training frames have magnetic forces, which a layer of magnitudes alone does not predict.")
        if _has_hessians(dataset, weighs_hessians(self.config.training)):
            labelled.add("hessian")
        self.training = settle(self.config.training, labelled, self.config.magnetism.layer != "off")
        say_weights(self.console, self.config.training, self.training, labelled)

    def _load(self, elements: Sequence[int], backbone: Backbone | None) -> Backbone:
        model = self.config.model
        if "model" not in model.model_fields_set and backbone is None:
            self.console.print(
                "no model named: starting from mini, the small one in this package (H, C, N, O, F, S, Cl at GFN2-xTB); "
                "`forcetune models` lists larger ones for --model",
                highlight=False,
            )
        wanted = self._element_table(elements)
        if backbone is None:
            loaded = load(
                model.model,
                head=model.head,
                elements=wanted,
                dtype=model.dtype,
                device=model.device,
                trust=model.trust,
                kernels=model.kernels,
            )
        else:
            loaded = self._take(backbone, wanted)
        say_kernels(self.console, loaded)
        return loaded

    def _element_table(self, elements: Sequence[int]) -> list[int] | None:
        """What the element table is cut to, for frames with these elements; None keeps it whole.

        Raises:
            InputError: an element that was asked for is none.
        """
        asked = self.config.model.elements
        if isinstance(asked, str):
            return sorted(set(elements)) if asked == "data" else None
        unknown = [symbol for symbol in asked if symbol not in atomic_numbers]
        if unknown:
            raise InputError(
                f"model.elements: {unknown[0]!r} is not an element symbol; write symbols such as [H, C, O]."
            )
        return sorted({atomic_numbers[symbol] for symbol in asked})

    def _take(self, backbone: Backbone, elements: Sequence[int] | None) -> Backbone:
        """A loaded model for this run; its element table is cut only where that was asked for.

        Raises:
            InputError: it carries an adapter, or is not what the configuration asks for.
        """
        model = self.config.model
        wanted = elements if "elements" in model.model_fields_set else None
        loaded = load(backbone, elements=wanted, **asked_of_loaded(model))
        if get_adapter(loaded) is not None:
            raise InputError("this model already carries an adapter; detach it first.")
        self.config, self.stores_base = with_loaded(self.config, loaded, Path(self.config.output.run) / BASE_NAME)
        return loaded

    def _examine(self, dataset: Dataset, backbone: Backbone) -> None:
        """What can be seen in the frames alone."""
        for part in dataset.splits.values():
            check_elements(backbone, part.frames)
        sets = {name: part.frames for name, part in dataset.splits.items()}
        with counting(self.console, "frames", sum(map(len, sets.values()))) as advance:
            check_frames(sets, backbone.cutoff, progress=lambda: advance(1))

    def _read(self) -> Dataset:
        with counting(self.console, "frames read") as advance:
            return read_dataset(self.config.data, self.config.magnetism, advance)

    def _graphs(self, backbone: Backbone, name: str, frames: Sequence[Frame]) -> Sequence[Batch]:
        with counting(self.console, f"{name}, neighbours", len(frames)) as advance:
            return build_graphs(backbone, frames, advance, worker_count(self.config.data.workers))


def _has_hessians(dataset: Dataset, needed: bool) -> bool:
    """Whether training frames have Hessian labels.

    Raises:
        InputError: the loss needs them, and none has, or they are on disk.
    """
    key = dataset.train.keys.hessian
    if dataset.streamed and needed:
        raise InputError(
            "training.loss.hessian: streamed frames have no Hessians; set data.stream=off, or the weight to 0."
        )
    present = key is not None if dataset.streamed else any(frame.hessian is not None for frame in dataset.train.frames)
    if needed and not present:
        raise InputError(
            f"{dataset.train.files[0]}: the loss weighs Hessians, but no training frame has one; set data.hessian_key, "
            "or training.loss.hessian=0."
        )
    return present


def _start_folder(place: str) -> str | Path:
    """The adapter that a training starts from.

    Raises:
        InputError: there is none at this place.
    """
    folder = adapter_folder(place)
    if folder is None:
        raise InputError(f"training.start_from: {place} is no run or adapter folder.")
    return folder


def _known_frames(dataset: Dataset, replay: ReplayFrames | None) -> AnchorFrames:
    """What a penalty looks at where it names no frames."""
    if replay is not None:
        return AnchorFrames(replay.frames, "replay frames")
    return AnchorFrames(dataset.train.frames, "training frames")


def predict_split(
    console: Console, backbone: Backbone, graphs: Sequence[Batch], label: str, *, finite: bool
) -> Predictions | StreamedPredictions:
    """Predictions; those of streamed frames, which are not looked at again, are checked here if they must be."""
    with counting(console, label, len(graphs)) as advance:
        if isinstance(graphs, StoredGraphs):
            return predict_streamed(backbone, graphs, advance, finite=finite)
        return predict(backbone, graphs, progress=advance)


@contextmanager
def counting(console: Console, label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar while something is done to frames, and what moves it on."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)
