"""Options of the frames, the foundation model and the reference energies."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from forcetune.config.section import Names, Section, Switch, ThreeWaySwitch, as_word
from forcetune.errors import warn


class DataConfig(Section):
    """Which frames, and under which keys their labels stand."""

    train: list[str] = Field(min_length=1, description="Training files or globs; everything ASE reads.")
    valid: list[str] | float | int = Field(
        default=0.1,
        description="Validation files, or the fraction (below 1; at least one frame) or count (1 or more) split off "
        "the training frames.",
    )
    train_only: list[str] = Field(
        default=[],
        description="Further training files or globs, added after the split: no validation frame comes from them.",
    )
    train_frames: int | None = Field(
        default=None,
        ge=1,
        description="Train on so many of the training frames only, chosen at random after those for validation.",
    )
    train_frames_seed: int = Field(default=0, ge=0, description="Seed of that choice; smaller sets lie in larger ones.")
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
    magforces_key: str = Field(
        default="auto",
        description="Key of magnetic forces −∂E/∂m (atoms × 3), eV/μB; looked for only with a magnetic layer, `none` "
        "ignores them.",
    )
    hessian_key: str = Field(
        default="auto", description="Key of Hessians (3 atoms × 3 atoms), eV/Å²; `none` ignores them."
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

    kernels: Literal["auto", "compiled", "torch", "triton", "cuequivariance"] = Field(
        default="auto",
        description="What computes convolutions and contractions: `compiled` loops for this processor (llvmlite), "
        "which in predictions take radial weights from splines that are within 1e-13 of the network, `torch` "
        "operations, `triton` kernels of forcetune's own for NVIDIA GPUs (forcetune[triton]; tested by Triton's "
        "interpreter, never run on a GPU), `cuequivariance`'s kernels for these (forcetune[cueq]), or `auto`, compiled "
        "on a CPU where llvmlite is installed.",
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
