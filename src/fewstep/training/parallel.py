r"""Data-parallel training: each process takes a part of every batch, gradients are averaged by torch.

With :math:`B_r` of the B samples of a batch at process r, the gradient is :math:`\sum_r (B_r / B) \, g_r`: that
of the whole batch in one process, up to the order of its sums.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.base.processes import Processes, processes
from fewstep.training.ranks import watching

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Team:
    """The processes that train one network together; alone, everything is as it is without them.

    Attributes:
        own: This process among them.
        batch_size: The samples of a batch of all processes.
        device: The device of this process, through which they exchange tensors.
    """

    own: Processes
    batch_size: int
    device: torch.device = CPU

    @property
    def rows(self) -> slice:
        """The part of each batch that this process takes."""
        return self.part(self.batch_size)

    def part(self, n: int) -> slice:
        """Returns the part of n rows that this process takes."""
        rank, count = self.own.rank, self.own.count
        return slice(n * rank // count, n * (rank + 1) // count)

    @property
    def share(self) -> float:
        """This process's share of a batch."""
        return (self.rows.stop - self.rows.start) / self.batch_size

    def parallel(self, network: nn.Module, device: torch.device) -> Any:
        """Returns the network with gradients that are averaged over the processes."""
        if not self.own.several:
            return network
        ids = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=ids)

    def without_exchange(self, parallel: Any) -> AbstractContextManager[object]:
        """Within the block gradients are added up in this process only; they are exchanged after the next block."""
        return parallel.no_sync() if self.own.several else nullcontext()

    def scaled(self, loss: Tensor) -> Tensor:
        """Returns the loss whose averaged gradient is that of the whole batch: torch divides by the count."""
        return loss * (self.share * self.own.count) if self.own.several else loss

    def total(self, losses: Tensor) -> Tensor:
        """Returns the losses of whole batches; all processes must ask at the same steps."""
        if not self.own.several:
            return losses
        summed = losses * self.share
        torch.distributed.all_reduce(summed)
        return summed

    def summed(self, tensor: Tensor) -> Tensor:
        """Returns the sum of the tensors of all processes."""
        if not self.own.several:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(tensor.device)

    def gathered(self, own: Tensor, n: int, dim: int = 0) -> Tensor:
        """Returns all n rows, of which each process has its :meth:`part`; all of them get the same."""
        if not self.own.several:
            return own
        shape = [*own.shape[:dim], n, *own.shape[dim + 1 :]]
        whole = torch.zeros(shape, dtype=own.dtype, device=own.device)
        rows = self.part(n)
        whole.narrow(dim, rows.start, rows.stop - rows.start).copy_(own.detach())
        return self.summed(whole)

    def of_first(self, tensor: Tensor) -> Tensor:
        """Returns the tensor of the first process: another kind of device may round otherwise."""
        return self.summed(tensor if self.own.first else torch.zeros_like(tensor))

    def any(self, value: bool) -> bool:
        """Returns whether something holds in any process; it waits for all of them."""
        return bool(self.summed(torch.tensor([int(value)])))

    def check_step(self, step: int, device: torch.device) -> None:
        """Raises if the processes start at different steps: they do not see the same folder."""
        if not self.own.several:
            return
        steps = torch.tensor([step, -step], device=device)
        torch.distributed.all_reduce(steps, op=torch.distributed.ReduceOp.MAX)
        if int(steps[0]) != step or -int(steps[1]) != step:
            raise ValueError(
                f"the processes start at different steps, {-int(steps[1])} to {int(steps[0])}; all of them "
                "must see the same folder of the run"
            )


ALONE = Team(Processes(), 1)
"""One process, whatever the launch."""


def check_address(own: Processes) -> None:
    """Raises unless the address of the first of several processes is known."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if own.several and missing:
        raise ValueError(
            f"training in {own.count} processes needs {' and '.join(missing)}, the address of the first "
            "one; torchrun and accelerate launch set them, with srun set them yourself"
        )


@contextmanager
def team(
    batch_size: int, device: torch.device, folder: str | Path | None = None
) -> Iterator[Team]:
    """Connects the processes of this launch (``torchrun``, ``accelerate launch``, ``srun``), if there are several.

    They stay connected until the process ends, as with accelerate; a later team uses the same connection.

    Arguments:
        batch_size: The samples of a batch of all processes.
        device: The device of this one.
        folder: The folder of the run, in which each process watches whether the others are alive.

    Raises:
        ValueError: If a process would have no sample, or the address of the first process is not known; and a
            :class:`~fewstep.training.ranks.LostRank`, in the block, if another process is gone.
    """
    own = processes()
    if not own.several:
        yield Team(own, batch_size, device)
        return
    if batch_size < own.count:
        raise ValueError(f"a batch of {batch_size} cannot be split among {own.count} processes")
    starts = not torch.distributed.is_initialized()
    if starts:
        check_address(own)
    with watching(folder) as ranks:
        if starts:
            backend = "nccl" if device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, rank=own.rank, world_size=own.count)
        keep_connected()
        if ranks is not None:
            ranks.connected()
        yield Team(own, batch_size, device)


def keep_connected() -> None:
    """Keeps the connection of the processes until this one ends, without its destructor.

    Gloo's joins threads that may never end: once in hundreds of runs a process hung there after its work. A
    reference that is never given back prevents that, also when the interpreter ends.
    """
    if torch.distributed.is_initialized():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(torch.distributed.group.WORLD))
