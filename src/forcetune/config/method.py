"""Options of what is trained: the method and the magnetic layer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from forcetune.config.section import Section, as_word
from forcetune.utils.parsing import read_number

LARGEST_RANK = 1024
LARGEST_CHANNELS = 4096

SpinInputs = Literal["auto", "initial", "unit", "directions", "moments"]
Layer = Annotated[Literal["off", "spin", "magnitude"], BeforeValidator(as_word)]


class MethodConfig(Section):
    """What is trained.

    Beside these, a method has options of its own, such as ``rank``: they are the fields of the updates that it makes
    (:mod:`forcetune.adapters.updates`) and the parameters of its function in :mod:`forcetune.adapters.methods`, which
    check them and refuse those that they have no use for.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        default="elora",
        description="elora, mmea, mmea-pure, sparse, sparse-h, gain, lora, adapter, full, freeze, bias, modality, "
        "readout, scratch; a label of your own with `table`.",
    )
    target: str | list[str] | None = Field(
        default=None,
        description="Only sites whose name matches this regular expression, or ends with one of these names.",
    )
    table: dict[str, list[dict[str, Any]]] | None = Field(
        default=None,
        description="A method of your own: kinds of sites with their updates, such as "
        "{linear: [{update: Gate, rank: 8}, {update: SoftThreshold}]}.",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_unset_options(cls, section: Any) -> Any:
        """Options at null are not set; the configurations of earlier runs have all that there were.

        Methods take numbers as numbers only, and ``1e-3`` is still text when it comes from a YAML file.
        """
        if not isinstance(section, dict):
            return section
        return {
            name: value if name in cls.model_fields and name != "table" else _with_numbers(value)
            for name, value in section.items()
            if value is not None or name in cls.model_fields
        }

    def options(self) -> dict[str, Any]:
        """The method's own options."""
        return dict(self.model_extra or {})


def _with_numbers(value: Any) -> Any:
    """Options of a method, where no text is a number: words that are numbers in YAML 1.2 are read as these."""
    if isinstance(value, str):
        number = read_number(value)
        return value if number is None else number
    if isinstance(value, dict):
        return {name: _with_numbers(part) for name, part in value.items()}
    return [_with_numbers(part) for part in value] if isinstance(value, list) else value


class MagnetismConfig(Section):
    """A magnetic layer beside the updates of any method.

    With it the loss is Huber by default, energies per atom, and energy, forces, stress, moments and, with a spin
    layer, magnetic forces weigh 1 each; in a second stage energies weigh 10. Stress and magnetic forces count where
    training frames have them.
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
        default=2e-3, gt=0, lt=1e6, description="Of the layer, which starts from nothing, whatever that of the run is."
    )
