"""The interaction layer of NequIP (Batzner et al., Nat. Commun. 2022) and of its relatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from forcetune.irreps import Block, irreps_text, parse_irreps
from forcetune.kernels.features import Features
from forcetune.kernels.layers import Convolution, EquivariantLinear, GatedActivation, TensorPath, sorted_blocks
from forcetune.kernels.site import Site, WeightPath
from forcetune.kernels.step import Step, can_train
from forcetune.kernels.tensors import TensorSource, register


def shifted_softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ) − log 2."""
    return functional.softplus(x) - math.log(2.0)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "ssp": shifted_softplus,
    "sigmoid": torch.sigmoid,
    "elu": functional.elu,
}


class ModalLinear(EquivariantLinear):
    """A linear layer whose even scalars also get a vector that belongs to the modality.

    A modality (a level of theory) enters such a layer as further one-hot inputs. Of one modality nothing is left of
    them but a row of the weight, ``modality``, which is added with the layer's normalisation.

    Args:
        irreps_in, irreps_out: without the modality.
        source: of ``weight`` and ``modality``.
        modalities: that there were; the normalisation counts them.
        biases, kind, further_inputs: as :class:`EquivariantLinear`.

    Attributes:
        scalars: the output block that has the modality.
        scalar_inputs: even scalars that lead to it, all modalities included.
    """

    modality: Tensor

    def __init__(
        self,
        irreps_in: str,
        irreps_out: str,
        source: TensorSource,
        *,
        modalities: int,
        biases: bool = False,
        kind: str = "linear",
        further_inputs: int = 0,
    ) -> None:
        counted = modalities + further_inputs
        super().__init__(irreps_in, irreps_out, source, biases=biases, kind=kind, further_inputs=counted)
        outputs = parse_irreps(irreps_out)
        self.scalars = next(index for index, block in enumerate(outputs) if block.is_even_scalar)
        scalars = sum(b.multiplicity for b in parse_irreps(irreps_in) if b.is_even_scalar)
        self.scalar_inputs = scalars + counted
        self.modality_factor = 1 / math.sqrt(self.scalar_inputs)
        register(self, "modality", source.take("modality", (outputs[self.scalars].multiplicity,), torch.zeros))

    def forward(self, features: Features) -> Features:
        outputs = super().forward(features)
        blocks = list(outputs.blocks)
        blocks[self.scalars] = blocks[self.scalars] + self.modality * self.modality_factor
        return Features(blocks, geometric=outputs.geometric, trains=outputs.trains)

    def sites(self, name: str) -> Iterator[Site]:
        yield from super().sites(name)
        path = WeightPath("modality", 0, tuple(self.modality.shape))
        yield Site(f"{name}.modality", name, "modality", name, "modality", (path,))


def interact(
    features: Features,
    step: Step,
    *,
    self_connection: Callable[[Features], Features] | None,
    before: Callable[[Features], Features],
    radial: nn.Module,
    convolution: Convolution,
    denominator: Tensor | None,
    after: Callable[[Features], Features],
    gate: GatedActivation,
) -> Features:
    """One layer: linear, convolution over the neighbours, linear, self-connection, gate.

    Args:
        features: of the atoms.
        step: of this pass.
        self_connection: of the features that come in.
        before, after: linear layers around the convolution.
        radial: weights of the paths.
        denominator: of the sums over neighbours, (1,); None where ``before`` has divided already.
        gate: the activation.
    """
    skip = None if self_connection is None else self_connection(step.of_atoms(features))
    weights = radial(step.radial)
    if step.cutoff is not None:
        weights = weights * step.cutoff
    message = convolution(step, weights, before(features), can_train(radial))
    message = after(message if denominator is None else message.scaled(1 / denominator))
    return gate(message if skip is None else message.plus(skip))


def in_order_of_inputs(paths: Sequence[TensorPath], irreps_mid: str) -> list[TensorPath]:
    """Paths, and with them radial weights, by input, harmonic and order of the output, as nequip makes them.

    Args:
        paths: and
        irreps_mid: as :func:`~forcetune.kernels.layers.channelwise_paths` gives them.
    """
    outputs = parse_irreps(irreps_mid)
    return sorted(paths, key=lambda path: (path.source, path.harmonic, outputs[path.target].order))


def product_irreps(
    irreps_in: str, harmonics: str, *, highest: int, only_even: bool, multiplicity: int | None = None
) -> str:
    """Irreps of the full tensor product of features and harmonics, sorted and merged.

    Args:
        irreps_in: of the features.
        harmonics: of the directions.
        highest: order that is kept.
        only_even: whether odd irreps are dropped.
        multiplicity: of each irrep; None counts paths.
    """
    counts: dict[tuple[int, bool], int] = {}
    for block in parse_irreps(irreps_in):
        for harmonic in parse_irreps(harmonics):
            even = (block.parity == "e") == (harmonic.parity == "e")
            for order in range(abs(block.order - harmonic.order), block.order + harmonic.order + 1):
                counts[order, even] = counts.get((order, even), 0) + block.multiplicity * harmonic.multiplicity
    blocks = [
        Block(count if multiplicity is None else multiplicity, order, "e" if even else "o", 0)
        for (order, even), count in counts.items()
        if order <= highest and (even or not only_even)
    ]
    return irreps_text(sorted_blocks(blocks))
