"""Options of ``forcetune learn``: dynamics that look for structures to label, labels, rounds of training."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from forcetune.config.section import Section, Switch


class LearnConfig(Section):
    """The loop of dynamics, selection, labels and training."""

    start: list[str] = Field(
        default=[], description="Files or globs of the structures that dynamics start from; every frame is one start."
    )
    labeller: str | None = Field(
        default=None,
        description="What makes the ASE calculator that labels: package.module:name or file.py:name, called with "
        "learn.labeller_options.",
    )
    labeller_options: dict[str, Any] = Field(
        default={}, description="Keyword arguments of the labeller, such as {method: GFN2-xTB}."
    )
    check: Switch = Field(
        default="on",
        description="`on` computes one training frame with the labeller first and stops where its label there is "
        "another: the level of theory must be that of the training frames.",
    )
    rounds: int = Field(default=5, ge=1, description="Most rounds of dynamics, labels and training.")
    labels: int | None = Field(
        default=None, ge=1, description="Most labels of all rounds together, failed ones included."
    )
    batch: int = Field(default=10, ge=1, description="Most labels a round.")
    target_forces: float | None = Field(
        default=None,
        gt=0,
        description="Force error (mean absolute, meV/Å) at which it ends: on the test frames, or without any on the "
        "new frames of a round before they are trained on.",
    )
    epochs: int | None = Field(
        default=None, ge=1, description="Epochs of every round after the first fit; those of that fit when not given."
    )
    forces_std: float | None = Field(
        default=None,
        gt=0,
        description="Bound of the uncertainty, eV/Å: structures with a larger calibrated standard deviation of the "
        "force on some atom are collected. When not given: 1.5 times what 95 % of the validation frames stay below "
        "in the first fit.",
    )
    stop: float = Field(default=2.0, ge=1, description="Dynamics end where the uncertainty is so many times its bound.")
    novelty: float | None = Field(
        default=3.0,
        gt=0,
        description="Dynamics end where the surroundings of an atom are so many times as far from those in the "
        "training frames as is usual among them; null does not look.",
    )
    largest_force: float = Field(
        default=50.0,
        gt=0,
        description="eV/Å: dynamics end at a larger force on an atom, and a label with one is left out.",
    )
    apart: float = Field(
        default=0.1,
        ge=0,
        description="Least distance between structures that are labelled, as `forcetune select --apart` measures it: "
        "two random ones are about 1.4 apart.",
    )
    strategy: Literal["farthest", "determinant", "random"] = Field(
        default="farthest", description="How structures are chosen of what was collected, as in `forcetune select`."
    )
    failures: int = Field(default=5, ge=0, description="Labels of a round that may fail before everything stops.")
    walkers: int = Field(default=4, ge=1, description="Dynamics a round, which take turns with the start structures.")
    picoseconds: float = Field(default=2.0, gt=0, description="Length of dynamics.")
    timestep: float = Field(default=0.5, gt=0, le=10, description="Time step, fs.")
    temperature: float = Field(default=300.0, gt=0, description="Temperature at which dynamics start, K.")
    final_temperature: float | None = Field(
        default=None, gt=0, description="Temperature to which it rises evenly, K; the same when not given."
    )
    friction: float = Field(default=0.02, gt=0, description="Friction of the Langevin thermostat, 1/fs.")
    every: int = Field(default=10, ge=1, description="Steps between two looks at the uncertainty.")

    @model_validator(mode="after")
    def _consistent(self) -> LearnConfig:
        if self.every * self.timestep > 1000 * self.picoseconds:
            raise ValueError(
                "every: dynamics of learn.picoseconds would end before the first look; give fewer steps between looks"
            )
        return self
