"""The low-rank update: its equation and its factors."""

from __future__ import annotations

import torch

from forcetune.adapters.updates.low_rank import LowRank
from forcetune.backbones.protocol import Site, WeightPath


def test_equation_of_elora() -> None:
    """W' = W + (α / r) A B; for contractions A is divided by the number of couplings, too."""
    paths = (WeightPath("0e->0e", 0, (3, 4)), WeightPath("order3", 12, (2, 5, 3), by_element=(1, 2, 15)))
    site = Site("a.weight", "a", "weight", "a", "contraction", paths)
    weight = torch.linspace(-1, 1, 42, dtype=torch.float64)
    part = LowRank(rank=2, alpha=6.0).build(site, weight)
    assert torch.equal(part(weight), weight)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    change = (part(weight) - weight).detach()
    flat, product = change[:12].view(3, 4), part.A["0e->0e"] @ part.B["0e->0e"]
    torch.testing.assert_close(flat, (3.0 * product).detach(), rtol=1e-12, atol=1e-13)
    # 5 couplings
    product = torch.einsum("ekr,rc->ekc", part.A["order3"], part.B["order3"])
    torch.testing.assert_close(change[12:].view(2, 5, 3), (3.0 / 5 * product).detach(), rtol=1e-12, atol=1e-13)


def test_rows_of_absent_elements_do_not_change() -> None:
    paths = (
        WeightPath("0e*0e->0e", 0, (6, 4), by_element=(2, 3, 4)),
        WeightPath("order2", 24, (3, 2, 4), by_element=(1, 3, 8)),
    )
    site = Site("a.weight", "a", "weight", "a", "tensor_product", paths)
    weight = torch.ones(48, dtype=torch.float64)
    part = LowRank(rank=2).build(site, weight)
    part.leave_elements([1], 3)
    with torch.no_grad():
        for factor in part.B.values():
            factor.fill_(1.0)
    change = (part(weight) - weight).detach()
    moved = [change[:24].view(2, 3, 4).abs().sum((0, 2)) > 0, change[24:].view(3, 8).abs().sum(1) > 0]
    assert [row.tolist() for row in moved] == [[True, False, True]] * 2
