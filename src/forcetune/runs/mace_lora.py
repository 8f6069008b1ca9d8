"""Checkpoints of ``mace_run_train --lora True`` as adapters of method ``lora``.

mace-torch 0.3.16 (``mace.modules.lora``) puts two factors beside the weight of every linear layer, dense layer and
layer of the radial perceptrons: W + (α / r) A B. It merges them into the model that it saves (``NAME.model``), where
they can no longer be separated from the base; checkpoints (``checkpoints/NAME_run-SEED_epoch-N.pt``) have base and
factors apart.

For an equivariant linear layer A goes from the input to r copies of each irrep and B from there to the output, each
with e3nn's normalisation of its own: with 1 / √m_in and 1 / √r where the layer itself has 1 / √m_in, so that inside
the layer's normalisation ΔW = (α / r) A B / √r. Of layers that are no equivariant ones, ΔW = (α / r) A B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor

from forcetune.adapters.adapter import Adapter, parameter_at
from forcetune.adapters.attach import attach
from forcetune.adapters.config import AdapterConfig
from forcetune.adapters.file import save_adapter
from forcetune.adapters.methods import method
from forcetune.adapters.updates import WeightUpdate
from forcetune.adapters.updates.low_rank import LowRankWeight
from forcetune.backbones.loading import load
from forcetune.backbones.protocol import Backbone, Site
from forcetune.backbones.safe_unpickle.reader import Record, read_inert
from forcetune.errors import InputError
from forcetune.irreps import Block, parse_irreps
from forcetune.utils.files import as_path

SAME = 1e-5
"""Relative difference up to which two weights are the same: checkpoints may be in float32."""
_A, _B, _BASE = "lora_A", "lora_B", "base.weight"


def convert_mace_lora(
    checkpoint: str | Path, output: str | Path, *, model: str | Path, alpha: float = 1.0, trust: bool = False
) -> AdapterConfig:
    """Write the LoRA factors in a checkpoint of mace as an adapter folder.

    Args:
        checkpoint: ``checkpoints/NAME_run-SEED_epoch-N.pt`` of ``mace_run_train --lora True``.
        output: the adapter folder to write.
        model: the foundation model that the run started from, by name or path.
        alpha: ``--lora_alpha`` of the run, which the checkpoint does not have.
        trust: as of :func:`forcetune.backbones.loading.load`.

    Raises:
        InputError: no such checkpoint, one without factors, of another foundation model, or with tensors that are
            not finite or not of the model's shapes.
    """
    state = _read_state(as_path(str(checkpoint)))
    factors = dict(_list_factors(state, checkpoint))
    if not factors:
        raise InputError(
            f"{checkpoint}: has no LoRA factors; only checkpoints of mace_run_train --lora True do. A model that was "
            "trained without is used by its path."
        )
    numbers = _read_elements(state, checkpoint)
    energies = _tensor(state, "atomic_energies_fn.atomic_energies", checkpoint).reshape(-1)
    if len(energies) != len(numbers):
        raise InputError(f"{checkpoint}: has several heads, of which an adapter has one; train one head.")
    backbone = load(model, elements=numbers, dtype="float64", device="cpu", trust=trust)
    by_name = {site.module: site for site in backbone.sites() if site.parameter == "weight"}
    unknown = sorted(set(factors) - set(by_name))
    if unknown:
        raise InputError(
            f"{checkpoint}: has factors at {unknown[0]}, where {model} has no layer that forcetune trains; they cannot "
            "be an adapter of it."
        )
    _check_base(state, backbone, checkpoint, model)
    ranks = {_rank(by_name[name], a) for name, (a, _) in factors.items()}
    if len(ranks) > 1 or 0 in ranks:
        raise InputError(f"{checkpoint}: its factors do not have one rank on the layers of {model}; name its base.")
    rank = ranks.pop()
    adapter = attach(backbone, method("lora", rank=rank, alpha=float(alpha)))
    for name, pair in factors.items():
        _set_factors(adapter, by_name[name], pair, rank, checkpoint)
    shift = _extra_shift(state, backbone, checkpoint)
    backbone.set_reference_energies(
        {number: float(energy) + shift for number, energy in zip(numbers, energies, strict=True)}
    )
    return save_adapter(backbone, output)


def _read_state(path: Path) -> Mapping[str, Any]:
    """The model's tensors in a checkpoint, which runs no code.

    Raises:
        InputError: it is no checkpoint of mace.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a checkpoint such as checkpoints/NAME_run-123_epoch-10.pt.")
    content = read_inert(path)
    if isinstance(content, Record):
        raise InputError(
            f"{path}: is a whole model, into which mace merges --lora before it is saved, so that its factors "
            "cannot be separated; name the checkpoint (checkpoints/NAME_run-SEED_epoch-N.pt), or use the model."
        )
    state = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise InputError(f"{path}: is no checkpoint of mace_run_train (model, optimizer, lr_scheduler).")
    return state


def _list_factors(state: Mapping[str, Any], source: str | Path) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Name of a layer with A and B: flat ones of an equivariant layer, or matrices with the product ΔW as stored.

    Raises:
        InputError: factors that are not finite, or neither both flat nor both matrices.
    """
    for key, value in state.items():
        for ending in (f".{_A}.weight", f".{_A}"):
            name, other = key.removesuffix(ending), f"{key.removesuffix(ending)}{ending.replace(_A, _B)}"
            if not (key.endswith(ending) and isinstance(value, Tensor) and isinstance(state.get(other), Tensor)):
                continue
            a, b = _tensor(state, key, source).double(), _tensor(state, other, source).double()
            if a.ndim != b.ndim or a.ndim not in (1, 2):
                raise InputError(f"{source}: {key} and its counterpart do not have the shape of factors.")
            # of a dense layer of PyTorch, whose weight is (out, in), ΔW = B A
            yield name, ((b, a) if a.ndim == 2 and ending.endswith("weight") else (a, b))


def _tensor(state: Mapping[str, Any], key: str, source: str | Path) -> Tensor:
    """
    Raises:
        InputError: the checkpoint does not have it, or it is empty or not finite.
    """
    value = state.get(key)
    if not isinstance(value, Tensor):
        raise InputError(f"{source}: has no {key}; this is no checkpoint of mace_run_train.")
    if value.numel() == 0:
        raise InputError(f"{source}: its {key} is empty; the file is damaged, so name another checkpoint of the run.")
    if not bool(torch.isfinite(value).all()):
        raise InputError(
            f"{source}: its {key} is not finite, as of a run that diverged; name a checkpoint of an earlier epoch."
        )
    return value


def _read_elements(state: Mapping[str, Any], source: str | Path) -> list[int]:
    """Atomic numbers of the model in a checkpoint.

    Raises:
        InputError: it has none, or something else.
    """
    values = _tensor(state, "atomic_numbers", source).reshape(-1).tolist()
    for index, value in enumerate(values):
        if value != int(value) or not 0 < value < len(chemical_symbols) or value in values[:index]:
            raise InputError(
                f"{source}: its atomic_numbers hold {value:g}, which is no element or there twice; the file is "
                "damaged, so name another checkpoint of the run."
            )
    return [int(value) for value in values]


def _rank(site: Site, a: Tensor) -> int:
    """Columns of A; a flat one has as many for every input of an irrep that is an output, too."""
    if a.ndim == 2:
        return int(a.shape[1])
    inputs = _shared_channels(site, _inputs(site))
    return a.numel() // inputs if inputs and a.numel() % inputs == 0 else 0


def _inputs(site: Site) -> tuple[Block, ...]:
    return parse_irreps(site.irreps_in or "")


def _outputs(site: Site) -> tuple[Block, ...]:
    return parse_irreps(site.irreps_out or "")


def _shared(site: Site) -> set[tuple[int, str]]:
    """Irreps, by order and parity, that are both in and out."""
    inputs, outputs = _inputs(site), _outputs(site)
    return {(block.order, block.parity) for block in inputs} & {(block.order, block.parity) for block in outputs}


def _shared_channels(site: Site, blocks: tuple[Block, ...]) -> int:
    """Channels of the blocks whose irrep is both in and out."""
    shared = _shared(site)
    return sum(block.multiplicity for block in blocks if (block.order, block.parity) in shared)


def _check_base(state: Mapping[str, Any], backbone: Backbone, checkpoint: str | Path, model: str | Path) -> None:
    """
    Raises:
        InputError: a weight of the checkpoint is not that of the foundation model.
    """
    for site in backbone.sites():
        weight = parameter_at(backbone.model, site).detach().reshape(-1)
        stored = state.get(f"{site.module}.{_BASE}", state.get(site.name))
        if not isinstance(stored, Tensor) or stored.numel() != weight.numel():
            raise InputError(f"{checkpoint}: has no weight {site.name} as {model} has; name the base of this run.")
        difference = torch.linalg.vector_norm(stored.double().reshape(-1) - weight)
        # written so that a weight that is no number is refused, too
        if not bool(difference <= SAME * torch.linalg.vector_norm(weight)):
            raise InputError(
                f"{checkpoint}: its weight {site.name} is not that of {model}, so this run started from another model; "
                "name that one."
            )
    base_scale = backbone.model.state_dict().get("scale_shift.scale")
    if base_scale is None and "scale_shift.scale" not in state:
        return
    scale = _tensor(state, "scale_shift.scale", checkpoint)
    if (
        base_scale is None
        or scale.numel() != base_scale.numel()
        or not torch.allclose(scale.double().reshape(-1), base_scale.double().reshape(-1))
    ):
        raise InputError(f"{checkpoint}: scales energies otherwise than {model}; name the base of this run.")


def _extra_shift(state: Mapping[str, Any], backbone: Backbone, checkpoint: str | Path) -> float:
    """What the checkpoint adds to every atom's energy beyond the foundation model, eV.

    Raises:
        InputError: it has no such number, or several.
    """
    base_shift = backbone.model.state_dict().get("scale_shift.shift")
    if base_shift is None:
        return 0.0
    shift = _tensor(state, "scale_shift.shift", checkpoint)
    if shift.numel() != 1 or base_shift.numel() != 1:
        raise InputError(f"{checkpoint}: has energy shifts of several heads, an adapter that of one; train one head.")
    return float(shift.double()) - float(base_shift.double())


def _set_factors(adapter: Adapter, site: Site, pair: tuple[Tensor, Tensor], rank: int, checkpoint: str | Path) -> None:
    """Put A and B of a layer into the adapter.

    Raises:
        InputError: they do not have its shapes.
    """
    part = adapter.part(site, WeightUpdate)
    assert isinstance(part, LowRankWeight)
    if pair[1].ndim == 1 and pair[1].numel() != rank * _shared_channels(site, _outputs(site)):
        raise InputError(f"{checkpoint}: the factors at {site.name} do not have the shape of the layer.")
    blocks = dict(_split_factors(site, pair, rank))
    for path in site.paths:
        a, b = blocks.get(path.start, (None, None))
        if a is None or b is None:
            continue  # mace leaves irreps without a counterpart alone, as B = 0 does
        if part.A[path.name].shape != a.shape or part.B[path.name].shape != b.shape:
            raise InputError(f"{checkpoint}: the factors at {site.name} do not have the shape of the layer.")
        with torch.no_grad():
            part.A[path.name].copy_(a)
            part.B[path.name].copy_(b)


def _split_factors(site: Site, pair: tuple[Tensor, Tensor], rank: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Start of a path in the flat weight → its A and B inside the layer's normalisation."""
    a, b = pair
    if a.ndim == 2:
        yield 0, (a, b)
        return
    inputs, outputs, shared = _inputs(site), _outputs(site), _shared(site)
    middle = sorted(shared, key=lambda irrep: (irrep[0], 1 if irrep[1] == "e" else -1))
    a_blocks: dict[int, Tensor] = {}
    start = 0
    for index, block in enumerate(inputs):
        if (block.order, block.parity) in shared:
            a_blocks[index] = a[start : (start := start + block.multiplicity * rank)].view(block.multiplicity, rank)
    b_blocks: dict[int, Tensor] = {}
    start = 0
    for irrep in middle:
        for index, block in enumerate(outputs):
            if (block.order, block.parity) == irrep:
                width = block.multiplicity
                b_blocks[index] = b[start : (start := start + rank * width)].view(rank, width)
    start = 0
    for i, source in enumerate(inputs):
        for j, target in enumerate(outputs):
            if (source.order, source.parity) == (target.order, target.parity):
                yield start, (a_blocks[i], b_blocks[j] / math.sqrt(rank))
                start += source.multiplicity * target.multiplicity
