"""Several processes that train one model, each with a part of every batch; ``torchrun`` starts them, on any nodes.

A batch is that of one process, cut into parts; the loss is divided by what the whole batch holds, and gradients are
summed. So nothing depends on the number of processes but rounding.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from forcetune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

# PyTorch takes a second to import, and the command line asks for its place before it knows what to do.

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Place:
    """A process among the others: its number, how many there are, and its number on its node."""

    rank: int
    count: int
    local_rank: int

    @property
    def leads(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0


def place() -> Place:
    """Of this process, as ``torchrun`` tells; alone otherwise."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Place(0, 1, 0)
    return Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


@contextmanager
def together() -> Iterator[Place]:
    """Within this context the processes can reach each other: by NCCL where there are GPUs, else by Gloo."""
    import torch
    import torch.distributed as dist

    here = place()
    if here.count == 1 or dist.is_initialized():
        yield here
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(here.local_rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield here
    finally:
        dist.destroy_process_group()


def joined() -> bool:
    """Whether this process works together with others now."""
    if place().count == 1:
        return False
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without a gradient."""
    if not joined():
        return value
    import torch.distributed as dist

    result = value.detach().clone()
    dist.all_reduce(result)
    return result


def share(value: Tensor) -> Tensor:
    """The part of a value, the same in all processes, that this one adds to a sum over all of them."""
    return value / place().count if joined() else value


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its sum over all processes, in one message."""
    if not joined():
        return
    import torch
    import torch.distributed as dist

    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def wait() -> None:
    """Until every process is here."""
    if joined():
        import torch.distributed as dist

        dist.barrier()


def made_once(path: Path, make: Callable[[], None]) -> None:
    """Have ``make`` make what stands at ``path``, complete from the moment it is there, unless it is there already.

    One process of each node makes it, and the others wait: without messages, which would give up after some minutes.

    Raises:
        InputError: the folder of ``path`` cannot be looked into.
    """
    if place().local_rank == 0 and not _there(path):
        make()
    while not _there(path):
        time.sleep(0.1)


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be looked into ({error.strerror}); choose another folder.") from error


def select_part(items: Sequence[Item]) -> Sequence[Item]:
    """What this process has of ``items``: every n-th."""
    here = place()
    return items[here.rank :: here.count] if joined() else items


def collected(items: Sequence[Item]) -> list[Item]:
    """The items of all processes, by process."""
    if not joined():
        return list(items)
    import torch.distributed as dist

    objects: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(objects, list(items))
    return [item for part in objects for item in part]
