"""Messages summed at receivers against the plain sum over edges, and derivatives against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convolutions import PATHS, plan_for, tensors
from forcetune.kernels import edge_plan as plans
from forcetune.kernels.convolution import convolve
from forcetune.kernels.edge_plan import Plan, make_plan
from forcetune.kernels.linear import Block, equivariant_linear, species_linear


def plainly(plan: Plan, edge_index: Tensor, radial: Tensor, angular: list[Tensor], x: list[Tensor]) -> list[Tensor]:
    """The sum over edges as it is written."""
    sender, receiver = plan.place[edge_index]
    against = (plan.sender[plan.edge_pair] != sender) | (plan.receiver[plan.edge_pair] != receiver)
    against |= (plan.edge_of_pair[plan.edge_pair] != torch.arange(plan.n_edges)) & (sender == receiver)
    against |= plan.edge_of_pair[plan.edge_pair] != torch.arange(plan.n_edges)
    out = [radial.new_zeros(plan.n_atoms, *shape) for shape in PATHS.groups]
    weights = radial[plan.edge_pair].split(PATHS.channels, dim=1)
    for path, weight, turned in zip(PATHS.paths, weights, angular, strict=True):
        sign = torch.where(against & path.odd, -1.0, 1.0).to(radial.dtype)
        matrix = (turned[plan.edge_pair] * sign[:, None]).view(-1, path.dim_in, path.dim_out)
        message = torch.einsum("ec,emk,emc->ekc", weight, matrix, x[path.source][sender])
        columns = slice(path.column, path.column + path.channels)
        out[path.group][:, :, columns] = out[path.group][:, :, columns].index_add(0, receiver, message)
    return out


@pytest.mark.parametrize("name", ["cluster", "crystal", "one way", "no edges"])
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_equals_the_plain_sum(name: str, paired: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "CPU_CHUNK", chunk)
    plan, edges = plan_for(name, paired=paired)
    inputs = tensors(plan)
    flat = [inputs[0], *inputs[1], *inputs[2]]

    def derivatives(out: list[Tensor]) -> list[Tensor]:
        gradients = torch.autograd.grad(
            sum((part**2).sum() for part in out), flat, create_graph=True, allow_unused=True, materialize_grads=True
        )
        mixed = sum((g * torch.linspace(-1, 2, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in gradients)
        again = torch.autograd.grad(mixed + out[0].sum(), flat, allow_unused=True, materialize_grads=True)
        return [*out, *gradients, *again]

    actual = derivatives(list(convolve(PATHS, plan, *inputs)))
    for one, other in zip(actual, derivatives(plainly(plan, edges, *inputs)), strict=True):
        scale = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        assert torch.allclose(one, other, rtol=0, atol=1e-12 * scale)


def test_derivatives_are_those_of_finite_differences() -> None:
    index = torch.tensor([[1, 2, 0, 2, 0, 1], [0, 0, 1, 1, 2, 2]])
    plan = make_plan(index, torch.zeros(6, 3), torch.tensor([0, 1, 0]))
    radial, angular, features = tensors(plan)

    def function(*flat: Tensor) -> tuple[Tensor, ...]:
        return convolve(PATHS, plan, flat[0], flat[1:5], flat[5:])

    assert torch.autograd.gradcheck(function, (radial, *angular, *features))
    assert torch.autograd.gradgradcheck(function, (radial, *angular, *features))


def test_pairs_share_an_edge_and_its_reverse() -> None:
    plan, edges = plan_for("crystal")
    assert 2 * plan.n_pairs == plan.n_edges == edges.shape[1]
    assert plan_for("crystal", paired=False)[0].n_pairs == plan.n_edges
    assert sum(plan.counts) == plan.n_atoms
    assert torch.equal(plan.order[plan.place], torch.arange(plan.n_atoms))
    slots = torch.cat([chunk.oriented for chunk in plan.chunks])
    assert torch.equal(slots[slots < 2 * plan.n_pairs].sort()[0], torch.arange(2 * plan.n_pairs))


def test_linear_layers_by_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(4, 1, 3, generator=generator), torch.randn(4, 3, 2, generator=generator)]
    weight = torch.randn(3 * 2 * 5 + 2 * 2 * 4, generator=generator)
    blocks = [Block(0, 0, 0, 3, 5, 0, 0.5), Block(1, 1, 0, 2, 4, 30, 2.0)]
    species = [0, 0, 1, 1]
    outputs = species_linear(blocks, weight, 2, inputs, ((1, 5), (3, 4)), torch.tensor([0, 1]), [2, 2])
    for block, x, out in zip(blocks, inputs, outputs, strict=True):
        size = block.fan_in * 2 * block.fan_out
        matrices = weight[block.start : block.start + size].view(block.fan_in, 2, block.fan_out) * block.factor
        expected = torch.stack([x[atom] @ matrices[:, kind] for atom, kind in enumerate(species)])
        assert torch.allclose(out, expected, atol=1e-6)
    plain = equivariant_linear([Block(0, 1, 1, 2, 4, 0, 1.0)], weight[:8], inputs, ((3, 2), (1, 4)))
    assert torch.equal(plain[0], torch.zeros(4, 3, 2))
    assert torch.allclose(plain[1], inputs[0][:, :, 1:] @ weight[:8].view(2, 4), atol=1e-6)
