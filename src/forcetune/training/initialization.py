"""The start of an adapter, which may depend on what the loss asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from forcetune.adapters.attach import Adapter, attach
from forcetune.adapters.gradients import start_from_gradients, weight_gradients, within_budget
from forcetune.adapters.methods import Method
from forcetune.adapters.updates.low_rank import LowRankWeight
from forcetune.adapters.updates.soft_threshold import SparseWeight
from forcetune.backbones.protocol import Backbone
from forcetune.config import TrainingConfig
from forcetune.errors import InputError
from forcetune.graphs.graph import Batch, collate
from forcetune.graphs.loader import BatchLoader
from forcetune.magnetism.layer import SpinLayer
from forcetune.training.losses import compute_loss

FIRST_FRAMES = 100


def attach_for_training(
    backbone: Backbone,
    method: Method,
    config: TrainingConfig,
    graphs: Sequence[Batch],
    reference_energies: Mapping[int, float],
    elements: Collection[int],
) -> Adapter:
    """Attach ``method``; where its start depends on the gradient, that of the first :data:`FIRST_FRAMES` frames.

    Args:
        backbone: with its own reference energies, which it keeps.
        method: may have a budget, which is shared among the paths here.
        config: loss, batch size and seed.
        graphs: of the training frames, with labels.
        reference_energies: of the run, eV.
        elements: atomic numbers that anything is trained on; sparse and low-rank updates leave the others alone.

    Raises:
        InputError: as :func:`forcetune.adapters.attach.attach` and
            :func:`forcetune.adapters.gradients.within_budget`; a gradient is asked for of a loss of moments
            and magnetic forces alone.
    """
    if not method.needs_gradients:
        return _calibrated(_left_alone(attach(backbone, method, seed=config.seed), backbone, elements), graphs)
    model_references = backbone.reference_energies
    backbone.set_reference_energies(reference_energies)
    loader = BatchLoader(
        graphs[:FIRST_FRAMES],
        config.batch_size,
        batch_atoms=config.batch_atoms,
        batch_edges=config.batch_edges,
        device=backbone.device,
    )
    # the foundation model knows nothing magnetic yet
    loss = config.loss.model_copy(update={"moments": 0.0, "magforces": 0.0})
    if loss.energy == loss.forces == loss.stress_weight == 0:
        raise InputError(
            "a start from the gradient (method.init, method.budget) needs a loss of energies, forces or stresses; "
            "moments and magnetic forces alone have no gradient yet."
        )
    gradients = weight_gradients(
        backbone, loader, lambda prediction, batch: compute_loss(loss, prediction, batch), stress=loss.stress_weight > 0
    )
    backbone.set_reference_energies(model_references)
    if method.budget is not None:
        method = within_budget(method, backbone.sites(), gradients)
    adapter = attach(backbone, method, seed=config.seed)
    start_from_gradients(adapter, gradients)
    return _calibrated(_left_alone(adapter, backbone, elements), graphs)


def _left_alone(adapter: Adapter, backbone: Backbone, elements: Collection[int]) -> Adapter:
    """The same; sparse and low-rank updates do not change weights of elements that are in the model's table only."""
    absent = [index for index, number in enumerate(backbone.elements) if number not in elements]
    for _, part in adapter.trainable_parts():
        if isinstance(part, SparseWeight | LowRankWeight) and absent:
            part.leave_elements(absent, len(backbone.elements))
    return adapter


def _calibrated(adapter: Adapter, graphs: Sequence[Batch]) -> Adapter:
    """The same; a spin layer starts with moments of the right size."""
    layer = None if adapter.magnetic is None else adapter.magnetic.layer
    if isinstance(layer, SpinLayer):
        first = collate(graphs[:FIRST_FRAMES])
        layer.calibrate(first.spins, first.moments)
    return adapter
