"""The whole configuration of a run, and the defaults that follow from other options."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from forcetune.config.data import DataConfig, ModelConfig, ReferenceConfig, ReplayConfig
from forcetune.config.learn import LearnConfig
from forcetune.config.method import MagnetismConfig, MethodConfig
from forcetune.config.section import Section, ThreeWaySwitch, as_names, explain
from forcetune.config.training import (
    DEFAULT_STEPS,
    FEWEST_EPOCHS,
    MOST_EPOCHS,
    SCHEDULE_FREE,
    ScheduleConfig,
    TrainingConfig,
)
from forcetune.errors import InputError
from forcetune.utils.files import write_text
from forcetune.utils.option_defaults import (
    LOSS,
    RECORD,
    SECOND_LOSS,
    get_value,
    is_given,
    make_record,
    set_value,
    with_given_as_in,
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
    phonons: ThreeWaySwitch = Field(
        default="auto",
        description="Phonon frequencies of a crystal before and after training, by phonopy: of the "
        "crystal nearest to equilibrium. auto: if phonopy is installed and a frame qualifies whose displaced "
        "supercells have at most 15,000 atoms together; on: required, otherwise the fit is refused.",
    )
    trackers: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], BeforeValidator(as_names)] = Field(
        default=[],
        description="Programs that also show the numbers of every epoch, each of which needs its package: tensorboard "
        "(in the run folder), wandb, mlflow.",
    )
    project: str = Field(
        default="forcetune", min_length=1, description="Project of wandb, experiment of mlflow that the run belongs to."
    )
    tensorboard: bool = Field(default=False, description="The same as `trackers` with tensorboard in it.")

    @property
    def all_trackers(self) -> list[str]:
        """Trackers without repetition, ``tensorboard`` of older configurations included."""
        return list(dict.fromkeys([*self.trackers, *(["tensorboard"] if self.tensorboard else [])]))


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
    learn: LearnConfig = Field(default=LearnConfig())

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        training = self.training
        if training.optimizer in SCHEDULE_FREE:
            named = f"schedule-free {SCHEDULE_FREE[training.optimizer]}"
            if self._gives_average:
                raise ValueError(f"training.ema: {named} averages by itself; leave ema out or set it to null")
            if self._gives_schedule:
                raise ValueError(f"training.schedule: {named} takes warmup_epochs only")
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
        hessian = max(training.loss.hessian, training.second_stage.loss.hessian)
        if self.data.hessian_key == "none" and hessian > 0:
            raise ValueError("training.loss.hessian needs Hessian labels, but data.hessian_key is none")
        if training.refine is not None and hessian > 0:
            raise ValueError("training.refine minimizes a loss without Hessians; leave it or training.loss.hessian out")
        if training.loss.moments > 0 and self.magnetism.layer == "off":
            raise ValueError("training.loss.moments needs a magnetic layer; set magnetism.layer (--magnetic)")
        magforces = max(training.loss.magforces_weight, training.second_stage.loss.magforces_weight)
        if magforces > 0 and self.magnetism.layer != "spin":
            raise ValueError("training.loss.magforces needs a spin layer; set magnetism.layer=spin (--magnetic)")
        if self.data.magforces_key not in ("auto", "none") and self.magnetism.layer != "spin":
            raise ValueError("data.magforces_key names labels of a spin layer; set magnetism.layer=spin (--magnetic)")
        if magforces > 0 and self.data.magforces_key == "none":
            raise ValueError("training.loss.magforces needs labels of magnetic forces, but data.magforces_key is none")
        return self

    @property
    def _gives_average(self) -> bool:
        return self.training.ema is not None and "ema" in self.training.model_fields_set

    @property
    def _gives_schedule(self) -> bool:
        return self.training.schedule.model_copy(update={"warmup_epochs": 0}) != ScheduleConfig()

    @property
    def reason_for_adam(self) -> str | None:
        """What the run has that schedule-free SOAP does not go with, in words; None where it does.

        It has an average and a schedule of its own: another one asks for an optimizer that takes it, and a second
        stage, whose rate is lower, is a schedule, too. With a magnetic layer its energies are worse
        (docs/evidence.md).
        """
        if self._gives_average or self._gives_schedule:
            return "a schedule or ema is given"
        if self.training.second_stage.start is not None:
            return "there is a second stage"
        return None if self.magnetism.layer == "off" else "there is a magnetic layer"

    def choose_optimizer(self, method_optimizer: str) -> str:
        """The optimizer that was given, or the method's; Adam instead of SOAP where there is a reason."""
        if self.training.optimizer is not None:
            return self.training.optimizer
        return "adam" if method_optimizer == "soap" and self.reason_for_adam else method_optimizer

    def with_method_defaults(self, learning_rate: float, optimizer: str) -> RunConfig:
        """With the method's own learning rate and optimizer where none was given, and what follows from them.

        These values do not count as given: another method has others.

        Raises:
            InputError: an option that was given does not go with the method's optimizer.
        """
        values = self.model_dump()
        for name, value in self._defaults(learning_rate, optimizer).items():
            # a default that stands in a stored configuration repeats that run, even if it has changed since
            if not is_given(self, name) and get_value(values, name) in plain_defaults(name):
                set_value(values, name, value)
        try:
            return with_given_as_in(RunConfig.model_validate(values), self)
        except ValidationError as error:
            raise InputError(explain(error)) from error

    def with_default_epochs(self, n_frames: int) -> RunConfig:
        """With as many epochs as suit the number of training frames, where none were given.

        Args:
            n_frames: training frames.
        """
        training = self.training
        if is_given(self, "training.epochs") or training.epochs != MOST_EPOCHS:
            return self
        if training.second_stage.start or training.batch_atoms or training.batch_edges:
            return self
        steps_per_epoch = math.ceil(n_frames / training.batch_size)
        fewest = max(FEWEST_EPOCHS, training.valid_every, 2 * training.schedule.warmup_epochs)
        epochs = min(MOST_EPOCHS, max(fewest, DEFAULT_STEPS // steps_per_epoch))
        return self._with_training(epochs=epochs)

    def with_default_rate(self, learning_rate: float) -> RunConfig:
        """With another learning rate where none was given, as a foundation model wants it."""
        return self if is_given(self, "training.learning_rate") else self._with_training(learning_rate=learning_rate)

    def _with_training(self, **values: Any) -> RunConfig:
        """With these values, which do not count as given."""
        changed = self.training.model_copy(update=values)
        return with_given_as_in(self.model_copy(update={"training": changed}), self)

    def _defaults(self, learning_rate: float, optimizer: str) -> dict[str, Any]:
        """Defaults that follow from other options, by dotted name."""
        training = self.training
        values: dict[str, Any] = {"training.learning_rate": learning_rate, "training.optimizer": optimizer}
        if (training.optimizer or optimizer) in SCHEDULE_FREE:
            values["training.ema"] = None
        if self.magnetism.layer != "off":
            # Huber, all terms alike, energies per atom: as published for the spin-aware layer
            loss = {"energy": 1.0, "forces": 1.0, "moments": 1.0, "form": "huber", "energy_per_atom": True}
            values |= {f"{LOSS}.{name}": value for name, value in loss.items()}
            if training.second_stage.start is not None:
                values |= {f"{SECOND_LOSS}.{name}": value for name, value in (loss | {"energy": 10.0}).items()}
        return values

    def require_no_learning(self) -> None:
        """
        Raises:
            InputError: there are options that a single run has no use for.
        """
        if "learn" in self.model_fields_set:
            raise InputError("learn: these options are those of `forcetune learn`; leave the section out here.")

    def save(self, path: str | Path) -> None:
        """Write the complete configuration as YAML, atomically; :func:`load_config` knows which options were given."""
        content = self.model_dump(mode="json") | {RECORD: make_record(self)}
        # said of one call: whoever starts from this file later has not allowed anything to be replaced
        content["output"]["overwrite"] = False
        if "learn" not in self.model_fields_set:
            del content["learn"]
        write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def plain_defaults(name: str) -> tuple[Any, Any]:
    """The default of an option by itself: in the whole configuration, and in its section alone."""
    section: Any = RunConfig(data=DataConfig(train=["-"]))
    *sections, last = name.split(".")
    for key in sections:
        section = getattr(section, key)
    return getattr(section, last), type(section).model_fields[last].default
