"""The run configuration: every option once, shared by YAML, command line and Python.

All models are frozen and refuse unknown keys, so a mistyped option is an error and never silently ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from forcetune.errors import InputError, warn
from forcetune.utils.files import write_text
from forcetune.utils.option_defaults import (
    LOSS,
    RECORD,
    SECOND_LOSS,
    is_given,
    leaf_names,
    record_of,
    remove_value,
    set_value,
    take_record,
    value_of,
    with_given_as_in,
    with_unset,
)
from forcetune.utils.parsing import parse_yaml, short

LARGEST_SEED = 2**63 - 1
LARGEST_RANK = 1024
LARGEST_CHANNELS = 4096

SpinInputs = Literal["auto", "initial", "unit", "directions", "moments"]


def as_word(value: Any) -> Any:
    """YAML 1.1 reads ``on`` and ``off`` as true and false; people mean the words."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _as_names(value: Any) -> Any:
    """Names separated by commas, as on the command line, are a list."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_names)]
Layer = Annotated[Literal["off", "spin", "magnitude"], BeforeValidator(as_word)]
Switch = Annotated[Literal["on", "off"], BeforeValidator(as_word)]
ThreeWaySwitch = Annotated[Literal["auto", "on", "off"], BeforeValidator(as_word)]


class Section(BaseModel):
    """A part of the configuration: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Section):
    """Which frames, and under which keys their labels stand."""

    train: list[str] = Field(min_length=1, description="Training files or globs; everything ASE reads.")
    valid: list[str] | float | int = Field(
        default=0.1,
        description="Validation files, or the fraction (below 1; at least one frame) or count (1 or more) split off "
        "the training frames.",
    )
    test: list[str] = Field(default=[], description="Test files; evaluated before and after, never trained on.")
    energy_key: str = Field(
        default="auto",
        description="Key of the energy; `auto` detects it, `calculator` takes ASE results, `none` trains on forces "
        "alone.",
    )
    forces_key: str = Field(default="auto", description="Key of the forces; `none` trains on energies alone.")
    stress_key: str = Field(default="auto", description="Key of the stress or virial; `none` ignores it.")
    moments_key: str = Field(
        default="auto", description="Key of magnetic moments; looked for only with a magnetic layer."
    )
    spins_key: str = Field(
        default="auto", description="Key of the magnetic state that the spin layer is given; `none` ignores it."
    )
    type_map: Names = Field(
        default=[],
        description="Elements of the types of atoms that MTP's .cfg and deepmd data without type_map.raw number, type "
        "0 first; separated by commas on the command line.",
    )
    split_seed: int = Field(
        default=123, ge=0, description="Seed of the split; 123 with 0.5 is the published rMD17 few-shot split."
    )

    doctor: Switch = Field(
        default="on",
        description="`on` examines frames and labels before the training as `forcetune doctor` does and stops at "
        "errors; `off` trains on them as they are.",
    )
    stream: ThreeWaySwitch = Field(
        default="auto",
        description="`on` keeps frames and graphs on disk instead of in memory, with the same result; `auto` does so "
        "for files of 256 MiB and more together.",
    )
    store: str | None = Field(
        default=None,
        description="Folder for streamed frames and graphs, which later runs find again; by default in the cache "
        "(FORCETUNE_HOME). It may be removed between runs.",
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        le=256,
        description="Processes that read streamed files and search neighbours; as many as there are cores, at most 8, "
        "when not given, and 0 for none.",
    )

    @model_validator(mode="after")
    def _positive_split(self) -> DataConfig:
        if not isinstance(self.valid, list) and self.valid <= 0:
            raise ValueError("valid must be files, a fraction between 0 and 1, or a count of frames")
        return self


class ModelConfig(Section):
    """The foundation model and how it is run."""

    model: str = Field(default="mini", description="Name of a model (`forcetune models`) or a path.")
    head: str | None = Field(default=None, description="Head, or modality, of a model that has several; needed then.")
    elements: Literal["data", "keep"] | list[str] = Field(
        default="data",
        description="`data` cuts the element table to the elements of the frames, `keep` leaves it whole, a list of "
        "symbols cuts it to these.",
    )
    dtype: Literal["float64", "float32"] = Field(
        default="float64", description="Precision of the model during training."
    )
    device: str = Field(default="auto", description="`cpu`, `cuda`, `cuda:1` …; `auto` takes a GPU if there is one.")
    trust: bool = Field(
        default=False, description="Allow a model file to run its own code where it cannot be rebuilt without."
    )
    kernels: Literal["auto", "compiled", "torch"] = Field(
        default="auto",
        description="What computes convolutions and contractions: `compiled` loops for this processor (llvmlite), "
        "`torch` operations, or `auto`, compiled on a CPU where llvmlite is installed.",
    )

    @model_validator(mode="before")
    @classmethod
    def _renamed_options(cls, section: Any) -> Any:
        """``off`` stands in the configuration of earlier runs."""
        if not isinstance(section, dict) or as_word(section.get("kernels")) != "off":
            return section
        warn("model.kernels=off is an option of earlier versions; it is read as torch.")
        return {**section, "kernels": "torch"}


class ReferenceConfig(Section):
    """Reference energies (E0): the energy of each isolated element at the level of theory of the data."""

    mode: Literal["estimate", "model", "isolated", "average", "table"] = Field(
        default="estimate",
        description="`estimate`: least squares on the foundation model's residuals; `model`: keep its own; `isolated`: "
        "isolated atoms among the training frames; `average`: least squares on the labels; `table`: references.table.",
    )
    table: dict[str, float] | None = Field(default=None, description="Element symbol to eV, for mode `table`.")

    @model_validator(mode="after")
    def _table_with_its_mode(self) -> ReferenceConfig:
        if (self.mode == "table") != (self.table is not None):
            raise ValueError("references.table and references.mode=table go together")
        return self


class MethodConfig(Section):
    """What is trained. Options a method has no use for are refused by it."""

    name: str = Field(
        default="mmea",
        description="mmea, mmea-pure, elora, sparse, sparse-h, gain, lora, adapter, full, freeze, bias, readout, "
        "scratch; a label of your own with `table`.",
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST_RANK,
        description="Rank of the gate (mmea) or of the low-rank update (elora); 16.",
    )
    alpha: float | None = Field(
        default=None, gt=0, description="Scale of the low-rank update: W + (alpha / rank) A B; the rank."
    )
    cap_rank: bool | None = Field(
        default=None, description="Cap the rank at what a path can use; off gives the published counts."
    )
    norms: bool | None = Field(
        default=None, description="Low rank: train the norm of each output channel apart from its direction (DoRA)."
    )
    init: Literal["normal", "gradient"] | None = Field(
        default=None, description="Low rank: start at random, or along the gradient of the first batches."
    )
    budget: int | None = Field(
        default=None, ge=1, description="elora: share so many trained parameters among the paths by their gradient."
    )
    skip: bool | None = Field(default=None, description="Gates on the skip connections, too, which know the element.")
    layers: int | None = Field(default=None, ge=1, description="Interaction layers that are trained (freeze); 1.")
    gain: Literal["exp", "linear"] | None = Field(default=None, description="Gain of the gate: exp(x) or 1 + x.")
    activation: bool | None = Field(default=None, description="SiLU in the gate's bottleneck (ablation).")
    shift: bool | None = Field(default=None, description="The gate's additive shift of even scalars (ablation).")
    modulation: bool | None = Field(
        default=None, description="The gate's multiplicative gain of other channels (ablation)."
    )
    shared_bottleneck: bool | None = Field(
        default=None, description="One bottleneck for shift and gain (ablation: separate ones)."
    )
    shared_gain: bool | None = Field(default=None, description="One gain for all channels of an order (ablation).")
    shift_init: float | None = Field(
        default=None, ge=0, description="Standard deviation of the shift's initial weights; 0 starts at identity."
    )
    wrap: Literal["all", "linears", "tensor_products"] | None = Field(
        default=None, description="Layers that a sparse update acts on."
    )
    threshold_decay: float | None = Field(
        default=None, ge=0, description="Decay of a sparse update's thresholds: more decay, fewer changed weights."
    )
    per_path: bool | None = Field(default=None, description="One threshold for each path of a layer (sparse).")
    per_element: bool | None = Field(default=None, description="Contractions have a gain for each element (gain).")
    target: str | list[str] | None = Field(
        default=None,
        description="Only sites whose name matches this regular expression, or ends with one of these names.",
    )

    table: dict[str, list[dict[str, Any]]] | None = Field(
        default=None,
        description="A method of your own: kinds of sites with their updates, such as "
        "{linear: [{update: Gate, rank: 8}, {update: SoftThreshold}]}.",
    )

    def options(self) -> dict[str, Any]:
        """The options that were given, without name, target and table."""
        return self.model_dump(exclude={"name", "target", "table"}, exclude_none=True)


class MagnetismConfig(Section):
    """A magnetic layer beside the updates of any method.

    With it the loss is Huber by default, energies per atom, and energy, forces, stress and moments weigh 1 each; in a
    second stage energies weigh 10. Stress counts where training frames have it.
    """

    layer: Layer = Field(
        default="off",
        description="`spin`: moments as vectors and their energy of exchange; `magnitude`: |μ| only, without energy.",
    )
    inputs: SpinInputs = Field(
        default="auto",
        description="The magnetic state given to the spin layer: `initial` spins of the file or `unit` vectors "
        "along them, `directions` of the moments, the `moments` themselves; `auto`: the file's spins where it has "
        "them, as `unit` if they are, otherwise directions.",
    )
    spin_orbit: bool = Field(default=False, description="Terms that couple the spins to directions in space.")
    channels: int = Field(default=64, ge=1, le=LARGEST_CHANNELS, description="Width of the layer's perceptrons.")
    radial: int = Field(default=8, ge=1, le=64, description="Radial functions of the layer.")
    learning_rate: float = Field(
        default=5e-3, gt=0, lt=1e6, description="Of the layer, which starts from nothing, whatever that of the run is."
    )


class LossConfig(Section):
    """Weights and form of the loss."""

    energy: float = Field(default=1.0, ge=0, description="Weight of the energy term.")
    forces: float = Field(default=1000.0, ge=0, description="Weight of the force term.")
    stress: float | None = Field(
        default=None,
        ge=0,
        description="Weight of the stress term. When not given: 1000 times that of the forces (10 times for huber and "
        "mae; 1 with a magnetic layer) where training frames have stress labels; 0 leaves these labels out.",
    )
    moments: float = Field(default=0.0, ge=0, description="Weight of the moment term; needs a magnetic layer.")
    form: Literal["mse", "huber", "mae"] = Field(default="mse", description="Form of every term.")
    huber_delta: float = Field(default=0.01, gt=0, description="Where Huber turns linear, in the unit of each term.")
    energy_per_atom: bool = Field(
        default=False, description="Energy error divided by the number of atoms before the loss."
    )

    @property
    def stress_weight(self) -> float:
        """Weight of the stress term; 0 until :func:`forcetune.training.label_weights.settle` chose one."""
        return self.stress or 0.0


class SecondStageLossConfig(LossConfig):
    """Weights and form of the second stage's loss; what is not given has the defaults of this section."""

    energy: float = Field(default=1000.0, ge=0, description="Weight of the energy term.")
    forces: float = Field(default=100.0, ge=0, description="Weight of the force term.")
    energy_per_atom: bool = Field(
        default=True, description="Energy error divided by the number of atoms before the loss."
    )


def _of_second_stage(value: Any) -> Any:
    """A first stage's loss given in Python stands for the options that were given to it."""
    if isinstance(value, LossConfig) and not isinstance(value, SecondStageLossConfig):
        return value.model_dump(exclude_unset=True)
    return value


class SecondStageConfig(Section):
    """A last part of the training with other weights and learning rate."""

    start: int | None = Field(
        default=None, ge=1, description="Epoch (counted from 1) at which it starts; none by default."
    )
    loss: Annotated[SecondStageLossConfig, BeforeValidator(_of_second_stage)] = Field(
        default=SecondStageLossConfig(), description="Its loss."
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="Its learning rate.")


class ScheduleConfig(Section):
    """How the learning rate changes."""

    name: Literal["plateau", "cosine", "constant"] = Field(default="plateau", description="After warm-up.")
    warmup_epochs: int = Field(
        default=0, ge=0, description="Linear warm-up, counted in epochs but applied at every step."
    )
    factor: float = Field(default=0.8, gt=0, lt=1, description="plateau: factor of each reduction.")
    patience: int = Field(default=5, ge=0, description="plateau: validations without improvement before a reduction.")
    minimum: float = Field(default=1e-6, ge=0, description="Learning rate that is not gone below.")


class TrainingConfig(Section):
    """The optimisation. Defaults are those of the published MMEA runs."""

    epochs: int = Field(default=500, ge=1, description="Passes over the training frames.")
    batch_size: int = Field(default=5, ge=1, description="Frames a batch.")
    batch_atoms: int | None = Field(
        default=None, ge=1, description="Most atoms a batch; batches are then packed by this budget."
    )
    batch_edges: int | None = Field(
        default=None, ge=1, description="Most edges a batch; batches are then packed by this budget."
    )
    optimizer: Literal["adam", "adamw", "schedulefree"] | None = Field(
        default=None, description="Adam with amsgrad, AdamW, schedule-free AdamW; the method's own when not given."
    )
    learning_rate: float | None = Field(default=None, gt=0, description="The method's own default when not given.")
    weight_decay: float = Field(
        default=1e-8, ge=0, description="On linear and contraction sites; of sparse updates on all their sites."
    )
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(), description="Learning-rate schedule (not for schedule-free)."
    )
    loss: LossConfig = Field(default=LossConfig(), description="Loss.")
    second_stage: SecondStageConfig = Field(default=SecondStageConfig(), description="Second stage.")
    ema: float | None = Field(
        default=0.995, gt=0, lt=1, description="Decay of the moving average of trainable parameters; null for none."
    )
    clip: float | None = Field(default=100.0, gt=0, description="Largest norm of the gradient; null for no clipping.")
    valid_every: int = Field(default=1, ge=1, description="Validate every so many epochs.")
    early_stopping: int | None = Field(
        default=None,
        ge=1,
        description="Validations without improvement before the run stops, or before a second stage that is "
        "still to come begins.",
    )
    refine: int | None = Field(
        default=None, ge=1, description="At the end at most so many iterations of L-BFGS on all training frames."
    )
    compile: ThreeWaySwitch = Field(
        default="auto",
        description="Record the step as one graph without Python between its operations: `auto` in runs on a CPU that "
        "are long enough for it to pay, where it is possible; `on` also as a CUDA graph on a GPU.",
    )
    seed: int = Field(
        default=1, ge=0, le=LARGEST_SEED, description="Seed of initial values and of the order of frames."
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads; PyTorch's own choice when not given.")


class ReplayConfig(Section):
    """Frames of another kind mixed into the training, so that the model keeps what it knew."""

    data: list[str] = Field(default=[], description="Files or globs of replay frames; none, no replay.")
    labels: Literal["base", "file"] = Field(
        default="base",
        description="`base`: energies and forces of the foundation model itself, so that only structures are needed; "
        "`file`: the labels in the files, with reference energies of their own, estimated from the replay frames.",
    )
    ratio: float = Field(default=1.0, gt=0, le=100, description="Replay frames per training frame in every epoch.")
    weight: float = Field(
        default=1.0, gt=0, le=1000, description="Weight of a replay frame in the loss; a training frame has 1."
    )
    head: Literal["auto", "shared", "own"] = Field(
        default="auto",
        description="`shared`: replay frames are predicted as all others; `own`: with a further energy of each atom "
        "from its features, trained for them alone and not kept; `auto`: own for labels of files, shared for those of "
        "the model.",
    )


class OutputConfig(Section):
    """Where results go."""

    run: str = Field(default="run", description="The run folder; must not exist or be empty unless `overwrite`.")
    overwrite: bool = Field(default=False, description="Replace an existing run folder.")
    adapter_dtype: Literal["float32", "float64"] = Field(
        default="float32",
        description="Precision of the adapter file. The trained adapter is rounded to it before it is evaluated, "
        "so that the file gives the reported numbers exactly.",
    )
    forgetting: bool = Field(
        default=True,
        description="Measure after training what the model forgot: generic or replay frames, dimers, dynamics.",
    )
    tensorboard: bool = Field(default=False, description="Also log for TensorBoard, in the run folder.")


class RunConfig(Section):
    """Everything that decides a run."""

    data: DataConfig
    model: ModelConfig = Field(default=ModelConfig())
    references: ReferenceConfig = Field(default=ReferenceConfig())
    method: MethodConfig = Field(default=MethodConfig())
    magnetism: MagnetismConfig = Field(default=MagnetismConfig())
    training: TrainingConfig = Field(default=TrainingConfig())
    replay: ReplayConfig = Field(default=ReplayConfig())
    output: OutputConfig = Field(default=OutputConfig())

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        training = self.training
        if training.optimizer == "schedulefree" and training.ema is not None and "ema" in training.model_fields_set:
            raise ValueError("training.ema: schedule-free AdamW averages by itself; leave ema out or set it to null")
        if (
            training.optimizer == "schedulefree"
            and training.schedule.model_copy(update={"warmup_epochs": 0}) != ScheduleConfig()
        ):
            raise ValueError("training.schedule: schedule-free AdamW takes warmup_epochs only")
        if training.valid_every > training.epochs:
            raise ValueError("training.valid_every is larger than training.epochs, so no adapter could be chosen")
        if training.second_stage.start is not None and training.second_stage.start > training.epochs:
            raise ValueError("training.second_stage.start lies after the last epoch")
        last = training.epochs - training.epochs % training.valid_every
        if training.second_stage.start is not None and training.second_stage.start > last:
            raise ValueError(
                f"training.second_stage.start lies after the last validation (epoch {last}), so no adapter of that "
                "stage could be chosen; let it start earlier, or lower training.valid_every"
            )
        if self.data.stress_key == "none" and training.loss.stress_weight > 0:
            raise ValueError("training.loss.stress needs stress labels, but data.stress_key is none")
        if training.loss.moments > 0 and self.magnetism.layer == "off":
            raise ValueError("training.loss.moments needs a magnetic layer; set magnetism.layer (--magnetic)")
        return self

    def with_defaults_of(self, learning_rate: float, optimizer: str) -> RunConfig:
        """With the method's own learning rate and optimizer where none was given, and what follows from them.

        These values do not count as given: another method has others.

        Raises:
            InputError: an option that was given does not go with the method's optimizer.
        """
        values = self.model_dump()
        for name, value in self._defaults(learning_rate, optimizer).items():
            # a default that stands in a stored configuration repeats that run, even if it has changed since
            if not is_given(self, name) and value_of(values, name) in _plain_defaults(name):
                set_value(values, name, value)
        try:
            return with_given_as_in(RunConfig.model_validate(values), self)
        except ValidationError as error:
            raise InputError(_explain(error)) from error

    def _defaults(self, learning_rate: float, optimizer: str) -> dict[str, Any]:
        """Defaults that follow from other options, by dotted name."""
        training = self.training
        values: dict[str, Any] = {"training.learning_rate": learning_rate, "training.optimizer": optimizer}
        if (training.optimizer or optimizer) == "schedulefree":
            values["training.ema"] = None
        if self.magnetism.layer != "off":
            # Huber, all terms alike, energies per atom: as published for the spin-aware layer
            loss = {"energy": 1.0, "forces": 1.0, "moments": 1.0, "form": "huber", "energy_per_atom": True}
            values |= {f"{LOSS}.{name}": value for name, value in loss.items()}
            if training.second_stage.start is not None:
                values |= {f"{SECOND_LOSS}.{name}": value for name, value in (loss | {"energy": 10.0}).items()}
        return values

    def save(self, path: str | Path) -> None:
        """Write the complete configuration as YAML, atomically; :func:`load_config` knows which options were given."""
        content = self.model_dump(mode="json") | {RECORD: record_of(self)}
        write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _plain_defaults(name: str) -> tuple[Any, Any]:
    """The default of an option by itself: in the whole configuration, and in its section alone."""
    section: Any = RunConfig(data=DataConfig(train=["-"]))
    *sections, last = name.split(".")
    for key in sections:
        section = getattr(section, key)
    return getattr(section, last), type(section).model_fields[last].default


def parse_setting(text: str) -> tuple[list[str], Any]:
    """Parse ``section.key=value``; the value is read as YAML.

    Raises:
        InputError: no ``=``, or a value that is no YAML.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InputError(
            f"--set {short(text)}: write it as section.key=value, for example training.learning_rate=1e-3."
        )
    try:
        return _section_and_key(name), _number(parse_yaml(value))
    except yaml.YAMLError as error:
        raise InputError(f"--set {short(text)}: the value is not valid YAML.") from error


def _section_and_key(name: str) -> list[str]:
    """The parts of a dotted name.

    Raises:
        InputError: so many of them that it names nothing.
    """
    keys = name.strip().split(".")
    if len(keys) > 8:
        raise InputError(f"setting {short(name)}: name a section and a key, as in training.epochs.")
    return keys


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` as a string; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def load_config(
    path: str | Path | None = None,
    settings: Sequence[str] = (),
    given: dict[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Merge a YAML file, command-line options and ``--set`` settings, in rising priority, and check the result.

    Where the file is that of a run, a default that stands in it gives way when an option that it follows from changes
    (:mod:`forcetune.utils.option_defaults`).

    Args:
        path: YAML file, or None.
        settings: ``section.key=value`` texts.
        given: nested options from the command line; None values are left out.
        overrides: dotted name to value, as ``settings`` but from Python.

    Raises:
        InputError: unreadable file, unknown key or value out of range; names the key.
    """
    merged: dict[str, Any] = _read_yaml(path) if path is not None else {}
    source = f"{path}: " if path is not None else ""
    try:
        record = take_record(merged)
    except ValueError as error:
        raise InputError(f"{source}{error}.") from error
    _merge(merged, given or {})
    changes = [_nested(text, *parse_setting(text)) for text in settings]
    changes += [_nested(name, _section_and_key(name), value) for name, value in (overrides or {}).items()]
    for change in changes:
        _merge(merged, change, keep_none=True)
    unset: set[str] = set()
    if record is not None:
        now = {name for change in changes for name in leaf_names(change)}
        now |= {name for name in leaf_names(given or {}) if value_of(given or {}, name) is not None}
        for name in record.outdated(merged, now):
            whole, alone = _plain_defaults(name)
            if whole == alone:
                remove_value(merged, name)
            else:  # what is left of the section would not have the default
                set_value(merged, name, whole)
        unset = set(record.names) - now
    try:
        return with_unset(RunConfig.model_validate(merged), unset)
    except ValidationError as error:
        raise InputError(source + _explain(error)) from error


def _nested(text: str, keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A setting as nested mappings.

    Raises:
        InputError: it names no key of a section.
    """
    nested: Any = value
    for key in reversed(keys):
        nested = {key: nested}
    if not isinstance(nested, dict):
        raise InputError(f"setting {short(text)}: name a section and a key, as in training.epochs.")
    return nested


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else f" ({error})"
        raise InputError(f"{path}: is not valid YAML{where}.") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: a run configuration is a mapping with sections data, model, method, training, output."
        )
    return content


def _merge(target: dict[str, Any], source: dict[str, Any], keep_none: bool = False) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value, keep_none)
        elif isinstance(value, dict):
            target[key] = {}
            _merge(target[key], value, keep_none)
            if not target[key] and not keep_none:
                del target[key]
        elif value is not None or keep_none:
            target[key] = value


def _explain(error: ValidationError) -> str:
    """The first few problems in one line, each with its key."""
    problems = []
    for item in error.errors()[:3]:
        key = ".".join(
            str(part) for part in item["loc"] if not str(part).startswith(("list[", "literal[", "float", "int"))
        )
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "there is no such option"
        elif item["type"] == "missing":
            message = "is needed"
        given = (
            "" if item["type"] in ("missing", "extra_forbidden", "value_error") else f" (given: {short(item['input'])})"
        )
        problems.append(f"{key}: {message}{given}" if key else message)
    return "; ".join(problems) + "."
