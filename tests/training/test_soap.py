"""Schedule-free SOAP: against its formulas, against Adam where no basis is turned, path by path, and resumed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

from forcetune.adapters.attach import attach, detach
from forcetune.adapters.methods import method
from forcetune.config import TrainingConfig
from forcetune.training.optimizers import make_optimizer
from forcetune.training.soap import BASIS_DECAY, FLOOR, SHIFT, Block, ScheduleFreeSoap, path_blocks, whole_block
from systems import backbone

RATE, WARMUP = 0.02, 4
EXACT = {"rtol": 1e-11, "atol": 1e-13}
CLOSE = {"rtol": 1e-7, "atol": 1e-9}
"""Where bases are computed in another order: what rounding turns grows with the gap between eigenvalues."""


def random_tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def optimizer_of(parameters: Sequence[nn.Parameter], decay: float = 0.0, **options: Any) -> ScheduleFreeSoap:
    blocks = options.pop("blocks", {parameter: whole_block(parameter) for parameter in parameters})
    groups = [{"params": list(parameters), "lr": RATE, "weight_decay": decay}]
    made = ScheduleFreeSoap(groups, RATE, blocks=blocks, warmup_steps=WARMUP, **options)
    made.train()
    return made


def go(optimizer: Any, parameters: Sequence[nn.Parameter], steps: range) -> None:
    """Steps with gradients that depend on the parameters, as those of a loss do, and on the step."""
    for step in steps:
        for index, parameter in enumerate(parameters):
            parameter.grad = parameter.detach() - random_tensor(100 * step + index, *parameter.shape)
        optimizer.step()


@pytest.mark.parametrize(("sizes", "largest"), [((5, 5), 16), ((6, 4), 16), ((6, 4), 5), ((4, 6), 5), ((6, 4), 3)])
def test_steps_are_those_of_the_formulas(sizes: tuple[int, int], largest: int) -> None:
    """Written out for one matrix; sides above ``largest`` keep their axes."""
    parameter = nn.Parameter(random_tensor(0, *sizes))
    start = parameter.detach().clone()
    optimizer = optimizer_of([parameter], max_basis_size=largest, decay=0.1)
    go(optimizer, [parameter], range(1, 25))
    optimizer.eval()

    means = [torch.zeros(size, size, dtype=torch.float64) for size in sizes]
    bases = [torch.eye(size, dtype=torch.float64) for size in sizes]
    square = torch.zeros(*sizes, dtype=torch.float64)
    z, x, total = start.clone(), start.clone(), 0.0
    for step in range(1, 25):
        y = 0.1 * z + 0.9 * x
        gradient = y - random_tensor(100 * step, *sizes)
        for side, outer in enumerate((gradient @ gradient.T, gradient.T @ gradient)):
            if sizes[side] <= largest:
                means[side] = BASIS_DECAY * means[side] + (1 - BASIS_DECAY) * outer
                if step in (1, 2, 4, 7, 10, 20):
                    shifted = means[side] + SHIFT * means[side].trace() / sizes[side] * torch.eye(sizes[side])
                    bases[side] = torch.linalg.qr(shifted @ bases[side]).Q
        turned = bases[0].T @ gradient @ bases[1]
        square = 0.999 * square + 0.001 * turned**2
        root = (square / (1 - 0.999**step)).sqrt()
        scaled = turned / (root + FLOOR * torch.finfo(root.dtype).eps * root.max() + 1e-8)
        direction = bases[0] @ scaled @ bases[1].T + 0.1 * y
        rate = RATE * min(1.0, step / WARMUP)
        total += rate**2
        z = z - rate * direction
        x = x + (rate**2 / total) * (z - x)
    torch.testing.assert_close(parameter.detach(), x, **CLOSE)


def test_without_bases_it_is_schedule_free_adam() -> None:
    ours = [nn.Parameter(random_tensor(1, 6, 4)), nn.Parameter(random_tensor(2, 5))]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    reference = schedulefree.AdamWScheduleFree(theirs, lr=RATE, weight_decay=0.2, warmup_steps=WARMUP)
    reference.train()
    optimizer = optimizer_of(ours, decay=0.2, max_basis_size=1)
    for first in (1, 8):  # averages in between, as validation has it
        go(optimizer, ours, range(first, first + 7))
        go(reference, theirs, range(first, first + 7))
        for one in (optimizer, reference):
            one.eval()
        for own, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own.detach(), other.detach(), rtol=1e-9, atol=1e-10)
        for one in (optimizer, reference):
            one.train()


def test_blocks_of_a_flat_weight_are_matrices_of_their_own() -> None:
    """The paths of a weight in one parameter step as parameters of their own do; what no path covers has its axes."""
    first, second, rest = random_tensor(3, 6, 4), random_tensor(4, 4, 3), random_tensor(5, 2)
    whole = nn.Parameter(torch.cat([first.reshape(-1), second.reshape(-1), rest]))
    apart = [nn.Parameter(part.clone()) for part in (first, second, rest)]
    blocks = {whole: (Block(0, 6, 4), Block(24, 4, 3))}
    flat, single = optimizer_of([whole], blocks=blocks), optimizer_of(apart)
    for step in range(1, 13):
        gradients = [random_tensor(10 * step + index, *part.shape) for index, part in enumerate(apart)]
        whole.grad = torch.cat([gradient.reshape(-1) for gradient in gradients])
        for part, gradient in zip(apart, gradients, strict=True):
            part.grad = gradient
        flat.step()
        single.step()
    expected = torch.cat([part.detach().reshape(-1) for part in apart])
    torch.testing.assert_close(whole.detach(), expected, **CLOSE)


def test_bases_become_eigenvectors() -> None:
    parameter = nn.Parameter(torch.zeros(8, 3, dtype=torch.float64))
    turn = torch.linalg.qr(random_tensor(6, 8, 8)).Q
    sizes = torch.logspace(1, -2, 8, dtype=torch.float64)[:, None]
    optimizer = optimizer_of([parameter])
    for step in range(1, 401):
        parameter.grad = turn @ (sizes * random_tensor(step, 8, 3))
        optimizer.step()
    state = optimizer.state[parameter]
    basis, mean = state["8x3/left/basis"][0], state["8x3/left/mean"][0]
    torch.testing.assert_close(basis.T @ basis, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    # the average goes on between two turns; its largest eigenvectors are far apart, and come first
    leading = torch.linalg.eigh(mean).eigenvectors.flip(1)[:, :3]
    assert float((leading.T @ basis[:, :3]).abs().diagonal().min()) > 0.99
    assert float((turn.T @ basis).abs().diagonal()[:3].min()) > 0.9


@pytest.mark.parametrize("name", ["full", "elora", "mmea", "sparse"])
def test_every_parameter_of_a_method_has_its_matrices(name: str) -> None:
    """Those of a weight's layout one for each path, none overlapping; the rest as they are."""
    model = backbone()
    adapter = attach(model, method(name))
    config = TrainingConfig.model_validate({"optimizer": "soap", "ema": None})
    optimizer = make_optimizer(adapter, config, 1e-3, 10)
    assert isinstance(optimizer, ScheduleFreeSoap)
    of_weights = dict(adapter.parameter_paths())
    assert any(len(optimizer.blocks[parameter]) > 1 for parameter in of_weights) == (name == "full")
    for parameter in adapter.parameters():
        blocks = optimizer.blocks[parameter]
        if parameter in of_weights:
            assert blocks == path_blocks(of_weights[parameter])
        else:
            assert len(blocks) == (parameter.ndim > 1 and parameter.numel() > 0)
        places = sorted((block.start, block.start + block.rows * block.columns) for block in blocks)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
        assert not places or places[-1][1] <= parameter.numel()
    detach(model)


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    parameters = [nn.Parameter(random_tensor(seed, 5, 5)) for seed in (7, 8)]
    optimizer = optimizer_of(parameters)
    go(optimizer, parameters, range(1, 9))
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    again = ScheduleFreeSoap(
        [{"params": copies, "lr": RATE}],
        RATE,
        blocks={parameter: whole_block(parameter) for parameter in copies},
        warmup_steps=WARMUP,
    )
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(optimizer, parameters, range(9, 25))
    go(again, copies, range(9, 25))
    for one in (optimizer, again):
        one.eval()
    assert all(torch.equal(own, other) for own, other in zip(parameters, copies, strict=True))


def test_it_steps_where_gradients_are_taken_only() -> None:
    parameter = nn.Parameter(random_tensor(9, 3, 3))
    optimizer = optimizer_of([parameter])
    optimizer.eval()
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="train"):
        optimizer.step()


def test_noise_without_a_gradient_is_no_step() -> None:
    """In single precision turning rounds off what Adam would make full steps of."""
    column, row = (random_tensor(seed, size).float() for seed, size in ((11, 64), (12, 16)))
    parameter = nn.Parameter(torch.zeros(64, 16))
    optimizer = optimizer_of([parameter])
    for _ in range(60):
        parameter.grad = torch.outer(column, row)
        optimizer.step()
    optimizer.eval()
    along = torch.outer(column, row) / (column.norm() * row.norm())
    moved = float((parameter.detach() * along).sum())
    across = float((parameter.detach() - moved * along).norm())
    assert moved < -0.1
    assert across < 0.05 * abs(moved)


@pytest.mark.parametrize("shape", [(12, 4), (12, 1), (8, 8)])
def test_rounding_of_gradients_stays_rounding(shape: tuple[int, int]) -> None:
    """Also where a basis has more directions than the gradients so far."""
    results = []
    for noise in (0.0, 1e-14):
        parameter = nn.Parameter(random_tensor(13, *shape))
        optimizer = optimizer_of([parameter])
        for step in range(1, 41):
            gradient = parameter.detach() - random_tensor(step, *shape)
            parameter.grad = gradient * (1 + noise * random_tensor(1000 + step, *shape))
            optimizer.step()
        optimizer.eval()
        results.append(parameter.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_parameter_without_a_gradient_waits(missing: int) -> None:
    """It stays where it is, the others step as ever, and its own history goes on afterwards."""
    parameters = [nn.Parameter(random_tensor(seed, 4, 4)) for seed in (14, 15, 16)]
    apart = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    together, single = optimizer_of(parameters), [optimizer_of([parameter]) for parameter in apart]
    for step in range(1, 10):
        gradients = [random_tensor(10 * step + index, 4, 4) for index in range(3)]
        for index, gradient in enumerate(gradients):
            waits = index == missing and step in (1, 5, 6)
            parameters[index].grad = None if waits else gradient
            apart[index].grad = None if waits else gradient
        before = parameters[missing].detach().clone()
        together.step()
        for one in single:
            one.step()
        assert torch.equal(before, parameters[missing].detach()) == (step in (1, 5, 6))
    for own, other in zip(parameters, apart, strict=True):
        torch.testing.assert_close(own.detach(), other.detach(), **CLOSE)


def test_any_layout_of_memory() -> None:
    turned, plain = nn.Parameter(random_tensor(17, 4, 6).T), nn.Parameter(random_tensor(17, 4, 6).T.contiguous())
    assert not turned.is_contiguous()
    for parameter in (turned, plain):
        optimizer = optimizer_of([parameter])
        go(optimizer, [parameter], range(1, 9))
    torch.testing.assert_close(turned.detach(), plain.detach(), **EXACT)


def test_averages_before_the_first_step_are_the_start() -> None:
    parameter = nn.Parameter(random_tensor(18, 4, 4))
    start, optimizer = parameter.detach().clone(), optimizer_of([parameter])
    for _ in range(2):
        optimizer.eval()
        optimizer.train()
    assert torch.equal(parameter.detach(), start)
    assert path_blocks(()) == whole_block(torch.zeros(3)) == whole_block(torch.zeros(3, 0)) == ()
