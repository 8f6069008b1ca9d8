"""The symmetric contraction of MACE: products of node features up to some order, with weights for each species."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forcetune.irreps import Block, irreps_text, parse_irreps
from forcetune.kernels.compiled import contraction as compiled
from forcetune.kernels.compiled.choice import Kernels, takes_compiled, takes_triton
from forcetune.kernels.compiled.sparse_form import SparseForm
from forcetune.kernels.contraction import arranged, fold, polynomial
from forcetune.kernels.cueq.contraction import ContractionPolynomial
from forcetune.kernels.features import Features
from forcetune.kernels.harmonics import reflection_labels, wigner_3j
from forcetune.kernels.layers import layout_for
from forcetune.kernels.polynomial import BilinearForm, bilinear_form
from forcetune.kernels.site import Site, WeightPath
from forcetune.kernels.step import Step, can_train
from forcetune.kernels.tensors import Draw, TensorSource, UnfitError, register
from forcetune.kernels.triton import contraction as triton

_MIDDLE_ORDER = 12  # intermediate irreps of products of four are natural ones below this order


def product_couplings(irreps_in: str, irrep_out: str, order: int) -> Tensor:
    """All couplings of a product of equal features to one irrep, one after another factor (MACE, eq. 10).

    Args:
        irreps_in: one copy of each irrep of the features, M components together.
        irrep_out: such as ``1o``.
        order: number of factors.

    Returns:
        (2 l + 1, M, …, M, couplings), without the first dimension for scalars; one coupling of zeros where there is
        none. The couplings span, and for more than two factors repeat, the symmetric ones.
    """
    (target,) = parse_irreps(irrep_out)
    tables = [table for irrep, table in _products(irreps_in, order, order == 4) if irrep == target.irrep]
    size = sum(block.dim for block in parse_irreps(irreps_in))
    none = torch.zeros(target.dim, *order * [size], 1, dtype=torch.float64)
    stacked = torch.stack(tables, dim=-1) if tables else none
    return stacked if target.dim > 1 else stacked.squeeze(0)


@functools.lru_cache(maxsize=8)
def _products(irreps_in: str, order: int, natural_only: bool) -> tuple[tuple[str, Tensor], ...]:
    """Every way to couple so many factors, from left to right; products are sorted by the irrep that results.

    Args:
        irreps_in, order: as :func:`product_couplings`.
        natural_only: leave out products, intermediate ones too, whose parity is not that of their order.
    """
    blocks = [block._replace(multiplicity=1, start=0) for block in parse_irreps(irreps_in)]
    starts = [sum(block.dim for block in blocks[:index]) for index in range(len(blocks))]
    size = sum(block.dim for block in blocks)
    products: list[tuple[Block, Tensor]] = []
    if order == 1:
        identity = torch.eye(size, dtype=torch.float64)
        return tuple((block.irrep, identity[s : s + block.dim]) for block, s in zip(blocks, starts, strict=True))
    for irrep, left in _products(irreps_in, order - 1, natural_only):
        (before,) = parse_irreps(irrep)
        for block, start in zip(blocks, starts, strict=True):
            parity = "e" if before.parity == block.parity else "o"
            for result in range(abs(before.order - block.order), before.order + block.order + 1):
                natural = (parity == "e") == (result % 2 == 0)
                if natural_only and not (natural and result < _MIDDLE_ORDER):
                    continue
                coupling = wigner_3j(result, before.order, block.order) * math.sqrt(2 * result + 1)
                joined = torch.einsum("jk,ijl->ikl", left.flatten(1), coupling)
                whole = torch.zeros(2 * result + 1, *order * [size], dtype=torch.float64)
                whole[..., start : start + block.dim] = joined.view(2 * result + 1, *(order - 1) * [size], block.dim)
                products.append((Block(1, result, parity, 0), whole))
    products.sort(key=lambda entry: (entry[0].order, entry[0].parity == "e"))
    return tuple((block.irrep, table) for block, table in products)


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """Asks a contraction for its weights of these species, as the forward pass of this step sees them."""

    present: Tensor


class Contraction(nn.Module):
    """The couplings and weights of one output irrep.

    Args:
        irreps_in: one copy of each irrep of the features.
        irrep_out: such as ``1o``.
        order: highest number of factors.
        n_species: rows of the weights.
        channels: of the features.
        source: of ``U_matrix_ν``, ``weights_max`` (highest order) and ``weights.k`` (order − 1 − k).
    """

    def __init__(
        self, irreps_in: str, irrep_out: str, order: int, n_species: int, channels: int, source: TensorSource
    ) -> None:
        super().__init__()
        self.irreps_in, self.order = irreps_in, order
        size = sum(block.dim for block in parse_irreps(irreps_in))
        dim = parse_irreps(irrep_out)[0].dim
        couplings: dict[int, int] = {}
        self.zeroed: set[str] = set()
        self.weights = nn.ParameterList()
        for nu in range(1, order + 1):
            drawn = product_couplings(irreps_in, irrep_out, nu) if source.fresh else None
            tensor = source.take(f"U_matrix_{nu}", None, drawn, parameter=False)
            couplings[nu] = tensor.shape[-1] if tensor.ndim else 0
            if tuple(tensor.shape) != ((dim,) if dim > 1 else ()) + (size,) * nu + (couplings[nu],):
                raise UnfitError(f"its U_matrix_{nu} has shape {tuple(tensor.shape)}, which couples other features")
            register(self, f"U_matrix_{nu}", tensor)
        for nu in range(order, 0, -1):
            name = "max" if nu == order else str(order - 1 - nu)
            shape = (n_species, couplings[nu], channels)
            inner = source if nu == order else source.within("weights")
            weight = inner.take("weights_max" if nu == order else name, shape, _scaled(couplings[nu]))
            flag = source.optional(f"weights_{name}_zeroed")
            # where no coupling exists the weight does nothing, and the library holds it at zero
            if bool(flag) if flag is not None else not self.couplings(nu).any():
                self.zeroed.add(name)
            value = nn.Parameter(weight.detach().cpu().clone(), requires_grad=name not in self.zeroed)
            if nu == order:
                self.weights_max = value
            else:
                self.weights.append(value)

    def couplings(self, nu: int) -> Tensor:
        """U of one order."""
        return self.get_buffer(f"U_matrix_{nu}")

    def forward(self, request: WeightRequest) -> list[Tensor]:
        """Weights of all orders from the first, (species, couplings, channels) each."""
        return [*reversed([self.weights[k] for k in range(len(self.weights))]), self.weights_max]

    def sites(self, name: str) -> Iterator[Site]:
        def site(owner: str, parameter: str, nu: int, kind: str, weight: Tensor) -> Site:
            elements, *rest = weight.shape
            path = WeightPath(f"order{nu}", 0, tuple(weight.shape), by_element=(1, elements, math.prod(rest)))
            return Site(f"{owner}.{parameter}", owner, parameter, name, kind, (path,))

        if "max" not in self.zeroed:
            yield site(name, "weights_max", self.order, "contraction", self.weights_max)
        for k in range(self.order - 1):
            if str(k) not in self.zeroed:
                yield site(f"{name}.weights", str(k), self.order - 1 - k, "contraction_lower", self.weights[k])


def _scaled(couplings: int) -> Draw:
    return lambda shape: torch.randn(shape) / couplings


class Coefficients:
    """The folded coefficients of a symmetric contraction; those of frozen weights are kept."""

    def __init__(self, form: BilinearForm) -> None:
        self.form = form
        self._kept: dict[int, _Folded] = {}

    @functools.cached_property
    def sparse(self) -> SparseForm:
        """The terms that are not 0."""
        return SparseForm(self.form)

    @functools.cached_property
    def tables(self) -> triton.TermTables:
        """The same terms as Triton's kernels read them."""
        return triton.TermTables(self.sparse)

    def fold(self, weights: list[list[Tensor]], present: Tensor, lanes: int = 0) -> list[Tensor]:
        """For each segment (species present, channels, rows, columns); one species for a product without species.

        With ``lanes``, those of :attr:`sparse` as one tensor instead, as its ``fold`` returns them.
        """
        agnostic = len(weights[0][0]) == 1
        flat = [weight for orders in weights for weight in orders]
        if any(weight.requires_grad for weight in flat):
            return self._folded(weights, None if agnostic else present, lanes)
        folded = self._kept.get(lanes)  # other threads may put theirs in its place
        if folded is None or not folded.belongs_to(flat, present):
            with torch.no_grad():
                coefficients = self._folded(weights, None if agnostic else present, lanes)
            self._kept[lanes] = folded = _Folded(flat, [_state(weight) for weight in flat], present, coefficients)
        return folded.coefficients

    def _folded(self, weights: list[list[Tensor]], present: Tensor | None, lanes: int) -> list[Tensor]:
        joined = [torch.cat(orders, dim=1) if len(orders) > 1 else orders[0] for orders in weights]
        chosen = joined if present is None else [weight.index_select(0, present) for weight in joined]
        return [self.sparse.fold(chosen, lanes)] if lanes else fold(self.form, chosen)

    def __reduce__(self) -> tuple[Any, ...]:
        return Coefficients, (self.form,)


def _state(weight: Tensor) -> tuple[int, int]:
    """Changes with its values, written in place or given as other memory."""
    return weight._version, weight.data_ptr()


@dataclass(frozen=True, slots=True)
class _Folded:
    """Coefficients, and what they were folded from."""

    weights: list[Tensor]
    states: list[tuple[int, int]]
    present: Tensor
    coefficients: list[Tensor]

    def belongs_to(self, weights: list[Tensor], present: Tensor) -> bool:
        same = len(weights) == len(self.weights) and all(map(operator.is_, weights, self.weights))
        if not same or [_state(weight) for weight in weights] != self.states:
            return False
        return self.present is present or (present.device.type == "cpu" and torch.equal(self.present, present))


class SymmetricContraction(nn.Module):
    """Σ_ν Σ_η w_ν[η] U_ν[η] x … x for each output irrep (MACE, eq. 10 and 11), as bilinear forms of few monomials.

    Args:
        irreps_in: of the features, each irrep with the same multiplicity.
        irreps_out: with that multiplicity too.
        order: highest number of factors.
        n_species: 1 for weights that all species share.
        source: of ``contractions.k``.

    Attributes:
        kernels: that compute it.
    """

    kernels: Kernels = "auto"

    def __init__(self, irreps_in: str, irreps_out: str, order: int, n_species: int, source: TensorSource) -> None:
        super().__init__()
        inputs, outputs = parse_irreps(irreps_in), parse_irreps(irreps_out)
        channels = {block.multiplicity for block in (*inputs, *outputs)}
        if len(channels) != 1:
            raise UnfitError(f"its contraction from {irreps_in} to {irreps_out} has several numbers of channels")
        single = irreps_text([block._replace(multiplicity=1) for block in inputs])
        width, inner = inputs[0].multiplicity, source.within("contractions")
        self.contractions = nn.ModuleList(
            Contraction(single, f"1x{block.irrep}", order, n_species, width, inner.within(k))
            for k, block in enumerate(outputs)
        )
        self.irreps_in, self.irreps_out = irreps_text(inputs), irreps_text(outputs)
        self.layout = layout_for(outputs)
        self._labels = reflection_labels(inputs)
        self._kept: Coefficients | None = None
        self._polynomial: ContractionPolynomial | None = None

    @property
    def coefficients(self) -> Coefficients:
        """Arranged when they are first asked for, which takes a moment for high orders."""
        if self._kept is None:
            tables = [
                [contraction.couplings(nu) for nu in range(1, contraction.order + 1)]
                for contraction in self.contractions
                if isinstance(contraction, Contraction)
            ]
            self._kept = Coefficients(bilinear_form(tables, self._labels))
        return self._kept

    def forward(self, features: Features, step: Step) -> Features:
        plan, folded = step.plan, self.coefficients
        request = WeightRequest(plan.present)
        weights = [contraction(request) for contraction in self.contractions]
        trains = features.trains or can_train(self)
        if self.kernels == "cuequivariance":
            if self._polynomial is None:
                self._polynomial = ContractionPolynomial(folded.form, features.blocks[0].shape[2])
            blocks = self._polynomial.contract(plan, weights, features.blocks)
            return Features(blocks, geometric=True, trains=trains)
        lanes, on_triton = 0, takes_triton(self.kernels, features.blocks[0])
        if on_triton:
            lanes = features.blocks[0].shape[2]
        elif takes_compiled(self.kernels, features.blocks[0]):
            lanes = compiled.count_lanes(features.blocks[0].shape[2], features.blocks[0].dtype)
        coefficients = folded.fold(weights, plan.present, lanes)
        if on_triton:
            blocks = triton.contract(
                *(folded.tables, folded.sparse, plan, features.blocks, coefficients[0]),
                phase=step.phase,
                trains=features.trains,
            )
            return Features(blocks, geometric=True, trains=trains)
        counts = plan.counts if len(coefficients[0]) == len(plan.counts) else (plan.n_atoms,)
        if lanes:
            blocks = compiled.polynomial(
                folded.sparse, features.blocks, coefficients[0], counts, phase=step.phase, trains=features.trains
            )
            return Features(blocks, geometric=True, trains=trains)
        x = arranged(features.blocks, folded.form.order)
        out = polynomial(folded.form, x, coefficients, counts, phase=step.phase, trains=features.trains)
        parts = [part.permute(2, 0, 1) for part in out.split(folded.form.dims)]
        return Features(parts, geometric=True, trains=trains)
