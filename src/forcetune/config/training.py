"""Options of the optimisation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from forcetune.config.section import LARGEST_SEED, Section, ThreeWaySwitch

MOST_EPOCHS, FEWEST_EPOCHS, DEFAULT_STEPS = 500, 20, 10_000
"""Bounds of a run whose epochs are not given: the published 500 where frames are few, and so many steps otherwise."""
SCHEDULE_FREE = {"schedulefree": "AdamW", "soap": "SOAP"}
"""Optimizers that average by themselves and take no schedule but a warm-up, and their names in texts."""


class LossConfig(Section):
    """Weights and form of the loss."""

    energy: float = Field(default=1.0, ge=0, description="Weight of the energy term.")
    forces: float = Field(default=1000.0, ge=0, description="Weight of the force term.")
    stress: float | None = Field(
        default=None,
        ge=0,
        description="Weight of the stress term. When not given: 100 times that of the forces (10 times in "
        "forms other than mse; that of the forces with stress_per_atom; 1 with a magnetic layer) where training frames "
        "have stress labels; 0 leaves them out.",
    )
    moments: float = Field(default=0.0, ge=0, description="Weight of the moment term; needs a magnetic layer.")
    magforces: float | None = Field(
        default=None,
        ge=0,
        description="Weight of the term of magnetic forces; needs a spin layer. When not given: 1 with such a layer "
        "where training frames have these labels; 0 leaves them out.",
    )
    hessian: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the Hessian term, which takes force predictions for displaced copies of the frames that "
        "have such a label; 0 leaves these labels out.",
    )
    hessian_directions: int = Field(
        default=4,
        ge=1,
        description="Random directions in which each frame's Hessian is compared in a step, two predictions each.",
    )
    form: Literal["mse", "huber", "mae", "universal", "l1l2"] = Field(
        default="mse",
        description="Form of every term; `universal`: huber with a smaller delta for atoms with forces above 100 eV/Å, "
        "weights in the file inside; `l1l2`: mae with the length of each atom's force error.",
    )
    huber_delta: float = Field(default=0.01, gt=0, description="Where Huber turns linear, in the unit of each term.")
    energy_per_atom: bool = Field(
        default=False, description="Energy error divided by the number of atoms before the loss."
    )
    stress_per_atom: bool = Field(
        default=False,
        description="Stress error times the volume for each atom before the loss, which makes it a virial, eV.",
    )

    @property
    def stress_weight(self) -> float:
        """Weight of the stress term; 0 until :func:`forcetune.training.label_weights.settle` chose one."""
        return self.stress or 0.0

    @property
    def magforces_weight(self) -> float:
        """Weight of the term of magnetic forces; 0 until it was chosen, as that of stress."""
        return self.magforces or 0.0


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


class PenaltyConfig(Section):
    """What changing the foundation model costs beside the loss, so that less is forgotten without replay.

    Each option is the λ of a term λ/2 · (…); 0 leaves the term out. Only the effective change W' − W of a weight
    counts, so that a term means the same for every method.
    """

    l2sp: float = Field(
        default=0.0, ge=0, description="L2-SP (arXiv 1802.01483): Σ (W' − W)² over all weights that the method changes."
    )
    ewc: float = Field(
        default=0.0,
        ge=0,
        description="EWC (arXiv 1612.00796): Σ F (W' − W)² with the diagonal Fisher information F of the foundation "
        "model's energies and forces, weighed as in the loss; 1 is the second-order cost of replay with weight 1.",
    )
    gates: float = Field(
        default=0.0,
        ge=0,
        description="L2 on gates: squares of gain − 1, and of shifts in units of the output's r.m.s., summed over "
        "channels and averaged over atoms as the foundation model sees them.",
    )
    data: list[str] = Field(
        default=[],
        description="Files or globs of structures for `ewc` and `gates`, whose labels are not read; when not given, "
        "the replay frames, or the training frames where there is no replay.",
    )
    frames: int = Field(default=100, ge=1, description="Most frames that `ewc` and `gates` look at, chosen at random.")
    probes: int = Field(
        default=4, ge=1, le=10_000, description="Random directions in the outputs of each frame that estimate F."
    )

    @model_validator(mode="after")
    def _data_has_a_use(self) -> PenaltyConfig:
        if self.data and not self.needs_frames:
            raise ValueError("data names frames for ewc and gates; set one of them, or leave data out")
        return self

    @property
    def needs_frames(self) -> bool:
        """Whether a term depends on what the foundation model does on frames."""
        return self.ewc > 0 or self.gates > 0

    @property
    def is_set(self) -> bool:
        """Whether anything costs something."""
        return self.l2sp > 0 or self.needs_frames


class TrainingConfig(Section):
    """The optimisation. Apart from the optimizer, defaults are those of the published MMEA runs."""

    epochs: int = Field(
        default=MOST_EPOCHS,
        ge=1,
        description="Passes over the training frames; when not given, 500 or as many as 10,000 steps make, but at "
        "least 20 (500 with a second stage or with batches by budget).",
    )
    batch_size: int = Field(default=5, ge=1, description="Frames a batch.")
    batch_atoms: int | None = Field(
        default=None, ge=1, description="Most atoms a batch; batches are then packed by this budget."
    )
    batch_edges: int | None = Field(
        default=None, ge=1, description="Most edges a batch; batches are then packed by this budget."
    )
    optimizer: Literal["adam", "adamw", "schedulefree", "soap"] | None = Field(
        default=None,
        description="Adam with amsgrad, AdamW, schedule-free AdamW, schedule-free SOAP (Adam in the eigenbasis of each "
        "path's gradients). When not given, the method's own: soap for elora, mmea, mmea-pure, full and freeze (adam "
        "instead of it where another schedule than the plateau, ema or a second stage is given, and with a magnetic "
        "layer), schedulefree for sparse, adam for the others.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="When not given, the default of the method with the optimizer, or the foundation model's.",
    )
    weight_decay: float = Field(
        default=1e-8, ge=0, description="On linear and contraction sites; of sparse updates on all their sites."
    )
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(), description="Learning-rate schedule (not for schedule-free)."
    )
    loss: LossConfig = Field(default=LossConfig(), description="Loss.")
    second_stage: SecondStageConfig = Field(default=SecondStageConfig(), description="Second stage.")
    penalty: PenaltyConfig = Field(
        default=PenaltyConfig(), description="Cost of changing the foundation model, against forgetting."
    )
    ema: float | None = Field(
        default=0.995,
        gt=0,
        lt=1,
        description="Decay of the moving average of trainable parameters; null for none (not for schedule-free).",
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
    start_from: str | None = Field(
        default=None,
        description="Run or adapter folder, of the same foundation model and method, with whose values the training "
        "begins.",
    )
    seed: int = Field(
        default=1, ge=0, le=LARGEST_SEED, description="Seed of initial values and of the order of frames."
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads; PyTorch's own choice when not given.")
