"""Data parallelism under torchrun: one coalesced all-reduce of gradients after each network's backward.

Instead of DistributedDataParallel's hooks, whose buckets fight a step compiled as one graph, the
gradients are flattened and summed once. Every process computes the mean loss over its rows; weighted
by their share of the batch, the sum is the gradient of the whole batch's mean loss.

Batch normalisation and minibatch statistics see a process's own rows only: with them, several
processes train like smaller batches, not like one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ganexport.errors import GanExportError, UsageError


class LostProcessError(GanExportError):
    """Another process of the job is gone; this one cannot go on alone."""

    exit_code = 1


class Group:
    """The processes of a job; a group of one does nothing.

    Attributes:
        rank: This process, from 0; process 0 writes and reports.
        world: How many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world

    @classmethod
    def from_environment(cls) -> Group:
        """Join the job that torchrun described in the environment; a group of one without it.

        Raises:
            UsageError: The environment is incomplete.
            LostProcessError: The others could not be reached.
        """
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            return cls()
        try:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        except ValueError:
            raise UsageError("RANK and WORLD_SIZE in the environment must be numbers, as torchrun sets them") from None
        if world == 1:
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        try:
            # With a list of both, tensors on either device can be reduced.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(backend, rank=rank, world_size=world)
        except (RuntimeError, ValueError) as error:
            raise LostProcessError(f"joining the other processes failed: {str(error).splitlines()[0]}") from None
        return cls(rank, world)

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the job."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def average_gradients(self, parameters: Sequence[nn.Parameter], share: float, flag: bool = False) -> bool:
        """Replace the gradients by their weighted sum over all processes.

        Args:
            parameters: In the same order everywhere.
            share: This process's rows over the batch's rows.
            flag: A wish of this process that travels along (to stop).

        Returns:
            Whether any process raised its flag.

        Raises:
            LostProcessError: Another process is gone.
        """
        if self.world == 1:
            return flag
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        device = gradients[0].device
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])  # [all elements]
        flat = torch.cat([flat.mul_(share), torch.tensor([float(flag)], device=device)])
        self._reduce(flat)
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view(gradient.shape))
            start += gradient.numel()
        return bool(flat[-1] > 0)

    def average(self, values: Tensor, share: float) -> Tensor:
        """Weighted sum of a small tensor over all processes."""
        if self.world == 1:
            return values
        total = values * share
        self._reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        try:
            torch.distributed.all_gather_object(found, value)
        except RuntimeError as error:
            raise self._lost(error) from None
        return found

    def share_weights(self, modules: Sequence[nn.Module]) -> None:
        """Give every process the weights and buffers of process 0."""
        if self.world == 1:
            return
        try:
            for module in modules:
                for tensor in module.state_dict().values():
                    torch.distributed.broadcast(tensor, src=0)
        except RuntimeError as error:
            raise self._lost(error) from None

    def barrier(self) -> None:
        """Wait for all processes."""
        self.gather(None)

    def _reduce(self, tensor: Tensor) -> None:
        try:
            torch.distributed.all_reduce(tensor)
        except RuntimeError as error:
            raise self._lost(error) from None

    def _lost(self, error: RuntimeError) -> LostProcessError:
        reason = (str(error).strip().splitlines() or ["connection closed"])[0][:160]
        return LostProcessError(
            f"process {self.rank}: another process of this job is gone ({reason}); "
            "start the job again with --resume to go on from the last checkpoint"
        )
