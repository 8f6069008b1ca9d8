"""The weights of the loss that depend on which labels the training frames have."""

from __future__ import annotations

from collections.abc import Collection

from forcetune.config import LossConfig, TrainingConfig

STRESS_PER_FORCES = {"mse": 100.0, "huber": 10.0, "mae": 10.0, "universal": 10.0, "l1l2": 10.0}
"""Weight of stress over that of forces, for each form of the loss.

Errors of stress, in eV/Å³, are ten to a hundred times smaller than those of forces, in eV/Å, so that squares need a
larger factor than absolute values. With 100 SevenNet-0 tunes best (`benchmarks/transfer.py`, 40 frames of an alloy and
of silicon: with 1000 forces are 6 to 15 % worse and stress 20 to 30 % better, with 10 both are worse); it is also about
the square of the volume of an atom in Å³, by which stress becomes an energy. 10 for Huber is what mace's foundation
models were trained with (``--loss universal``, forces 10, stress 100); mace's ``--loss stress`` has squares with a
hundredth of the weight of forces, where stress counts for next to nothing.
"""


def default_stress_weight(loss: LossConfig, magnetic: bool = False) -> float:
    """Weight of the stress term where training frames have stress and none was set.

    Args:
        loss: its form, and the weight of the forces, which is also that of virials for each atom.
        magnetic: whether the run has a magnetic layer, which weighs all terms alike.
    """
    if magnetic:
        return 1.0
    return (1.0 if loss.stress_per_atom else STRESS_PER_FORCES[loss.form]) * loss.forces


def weighs_hessians(config: TrainingConfig) -> bool:
    """Whether the loss of some stage has a Hessian term."""
    return config.loss.hessian > 0 or (config.second_stage.start is not None and config.second_stage.loss.hessian > 0)


def settle(config: TrainingConfig, labelled: Collection[str], magnetic: bool = False) -> TrainingConfig:
    """The configuration with a weight for every term: 0 where no training frame has the label.

    Args:
        config: of the run; weights of stress and magnetic forces that were not given are None.
        labelled: names of the labels that some training frame has; magnetic forces only where a layer predicts them.
        magnetic: a run with a magnetic layer weighs all terms alike.
    """

    def settled(loss: LossConfig) -> LossConfig:
        changed = {name: 0.0 for name in ("energy", "forces") if name not in labelled}
        stress = loss.stress
        if stress is None:
            stress = default_stress_weight(loss, magnetic) if "stress" in labelled else 0.0
        magforces = loss.magforces
        if magforces is None:
            magforces = 1.0 if "magforces" in labelled else 0.0
        return loss.model_copy(update=changed | {"stress": stress, "magforces": magforces})

    second = config.second_stage
    return config.model_copy(
        update={
            "loss": settled(config.loss),
            "second_stage": second.model_copy(update={"loss": settled(second.loss)}),
        }
    )
