"""Predictions for one structure that moves, as recorded operations."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from forcetune.adapters.attach import get_adapter
from forcetune.backbones.protocol import Backbone, Prediction
from forcetune.graphs.graph import Batch
from forcetune.kernels.edge_plan import with_plan
from forcetune.kernels.padding import Layout, build_layout, fitted, list_tensors, plan_with
from forcetune.kernels.recording import CompileError, Recording, record

COMPILED_AFTER = 30
"""Predictions for the same atoms, one after the other, from which on they are recorded: it takes as long as ten."""

MOST_EDGES = 4000
"""With more of them operations take so long that what goes on in between hardly counts."""

SLACK = 2
"""Neighbours that an atom may gain before a new recording is needed."""

CHECKED = 2
"""Predictions that are compared with those of the model itself."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""eV/Å, eV/Å³ and eV; of the largest force, component of the stress or the energy without E0 where these exceed 1."""


class CompiledPrediction:
    """Energies, forces and stress of structures, recorded where the same atoms come again and again, as in dynamics.

    What was recorded is forgotten when the adapter or the reference energies change, or weights are replaced or written
    to. What goes past PyTorch's own books is not noticed: writing into ``weight.data``, hooks, other attributes.

    Attributes:
        eager_reason: why nothing will be recorded, or None.
        recording: what is played, once there is one.
    """

    def __init__(self, backbone: Backbone, *, wanted: bool = True) -> None:
        """
        Args:
            backbone: with or without an adapter.
            wanted: record at all.
        """
        self.backbone = backbone
        self.eager_reason = None if wanted else "it is not wanted"
        self.recording: Recording | None = None
        self._key: Any = None
        self._seen: deque[Batch] = deque(maxlen=4 * COMPILED_AFTER)
        self._since = 0
        self._layout: Layout | None = None
        self._checks = 0
        self._owners: tuple[Any, Any] = (None, None)
        self._weights: list[tuple[dict[str, Any], str]] = []
        self._held: list[Any] = []

    def __reduce__(self) -> Any:
        # recordings can be neither copied nor pickled, and are quickly made again
        return _again, (self.backbone, self.eager_reason)

    def predict(self, batch: Batch, *, stress: bool) -> Prediction:
        """Of one structure, without gradients; as :meth:`Backbone.predict`."""
        if self.eager_reason is None:
            try:
                prediction = self._played(batch, stress)
            except CompileError as error:
                self.eager_reason, self.recording, prediction = str(error), None, None
            if prediction is not None:
                return prediction
        return self._eager(batch, stress)

    def _eager(self, batch: Batch, stress: bool) -> Prediction:
        return self.backbone.predict(batch, stress=stress).detached()

    def _played(self, batch: Batch, stress: bool) -> Prediction | None:
        if not 0 < batch.n_edges <= MOST_EDGES or not _is_covered(self.backbone):
            return None
        key = (batch.numbers.tolist(), stress, self._state())
        if key != self._key:
            self._key, self.recording, self._since = key, None, 0
            self._seen.clear()
        if self.recording is None:
            self._seen.append(batch)
            self._since += 1
            if self._since < COMPILED_AFTER:
                return None
            backbone = self.backbone
            self._layout = build_layout(
                list(self._seen), 1, backbone.elements, backbone.cutoff, bool(backbone.paired), slack=SLACK
            )
        assert self._layout is not None
        fit = fitted(batch, self._layout, self.backbone.elements)
        if fit is None:
            # atoms have come closer than ever: see how it goes on before the next recording
            self.recording, self._since = None, 0
            self._seen.append(batch)
            return None
        inputs = [*list_tensors(fit[0]), *list_tensors(fit[1])]
        if self.recording is None:
            self.recording, self._checks = self._record(*fit, inputs, stress), CHECKED
        energy, forces, *others = self.recording(*inputs)
        prediction = Prediction(
            energy[:1],
            forces[: batch.n_atoms],
            others[0][:1] if stress else None,
            energies=others[-1][: batch.n_atoms] if len(others) > stress else None,
        )
        if self._checks:
            self._check(prediction, self._eager(batch, stress), batch)
            self._checks -= 1
        return prediction

    def _record(self, full: Batch, plan: Any, inputs: list[Tensor], stress: bool) -> Recording:
        n_batch = len(list_tensors(full))

        def step(*values: Tensor) -> list[Tensor | None]:
            with with_plan(self.backbone, plan_with(plan, values[n_batch:])):
                prediction = self.backbone.predict(Batch(*values[:n_batch]), stress=stress)
            stresses = [prediction.stress] if stress else []
            energies = [] if prediction.energies is None else [prediction.energies]
            return [prediction.energy, prediction.forces, *stresses, *energies]

        return record(step, inputs, [])

    def _check(self, mine: Prediction, eager: Prediction, batch: Batch) -> None:
        energies = self.backbone.reference_energies
        reference = sum(energies[number] for number in batch.numbers.tolist())
        pairs = [(mine.forces, eager.forces), (mine.energy - reference, eager.energy - reference)]
        if mine.stress is not None and eager.stress is not None:
            pairs.append((mine.stress, eager.stress))
        if mine.energies is not None and eager.energies is not None:
            own = mine.energies.new_tensor([energies[number] for number in batch.numbers.tolist()])
            pairs.append((mine.energies - own, eager.energies - own))
        for one, two in pairs:
            far = float((one - two).abs().max())
            if not far <= TOLERANCE[self.backbone.dtype] * max(1.0, float(two.abs().max())):
                raise CompileError(f"what was recorded is {far:.1e} off")

    def _state(self) -> tuple[Any, ...]:
        """Changes when the model, its adapter or a weight does."""
        backbone, adapter = self.backbone, get_adapter(self.backbone)
        if backbone.model is not self._owners[0] or adapter is not self._owners[1]:
            self._owners = (backbone.model, adapter)
            self._weights = [
                place
                for module in backbone.model.modules()
                for weights in (module._parameters, module._buffers)
                for place in _list_places(weights)
            ]
        enabled = adapter is not None and adapter.enabled
        weights: list[Any] = [weights.get(name) for weights, name in self._weights]
        states = [None if weight is None else (weight.data_ptr(), weight._version) for weight in weights]
        # addresses tell weights apart for as long as no others can get them
        self._held = weights
        return (*self._owners, enabled, tuple(backbone.reference_energies.values()), states)


def _list_places(weights: Any) -> list[tuple[dict[str, Any], str]]:
    # those of TorchScript's modules are in no dictionary, and cannot be replaced
    places = weights if isinstance(weights, dict) else dict(weights.items())
    return [(places, name) for name, weight in places.items() if weight is not None]


def _again(backbone: Backbone, eager_reason: str | None) -> CompiledPrediction:
    compiled = CompiledPrediction(backbone)
    compiled.eager_reason = eager_reason
    return compiled


def _is_covered(backbone: Backbone) -> bool:
    return backbone.device.type == "cpu" and backbone.extension is None and backbone.paired is not None
