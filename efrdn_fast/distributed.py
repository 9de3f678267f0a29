"""Several processes under `torchrun`: one global batch, global BatchNorm statistics, shards.

Every process trains on its share of the batch. The mean loss over equal shares is the mean over
the batch, DistributedDataParallel averages the gradients, and `GlobalBatchNorm` makes the forward
pass that of one process; so the weights are those of a single process but for rounding.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .blocks import BatchNorm

__all__ = ["GlobalBatchNorm", "World", "all_reduce", "globalize", "process_group", "world"]


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started; alone when it did not."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def device(self, name: str | None) -> str | None:
        """`name`, but this process's own GPU where "cuda" or nothing is asked for."""
        if self.size > 1 and name in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return name

    def shard(self, items: list) -> list:
        """This process's items: every `size`-th one from `rank` on."""
        return items[self.rank :: self.size]

    def owns(self, name: str) -> bool:
        """Whether this process does the item called `name`; does not depend on other items."""
        return zlib.crc32(os.fsencode(name)) % self.size == self.rank

    def total(self, *values: float) -> list[float]:
        """Sum of every value over the processes, the same in all of them."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(tensor)
        return tensor.tolist()

    def merge(self, items: list) -> list:
        """Undo `shard`: the items of all processes, in their order."""
        if self.size == 1:
            return items
        parts: list[list] = [[]] * self.size
        dist.all_gather_object(parts, items)
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def world() -> World:
    """Read torchrun's RANK, WORLD_SIZE and LOCAL_RANK.

    Raises:
        ValueError: They are not the numbers of one process of a group.
    """
    if "WORLD_SIZE" not in os.environ:
        return World()
    try:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        found = World(*(int(os.environ.get(name, "0")) for name in names))
    except ValueError as error:
        raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}") from None
    if not 0 <= found.rank < found.size:
        raise ValueError(f"RANK is {found.rank}, but WORLD_SIZE {found.size}")
    return found


@contextmanager
def process_group(device: str | torch.device = "cpu") -> Iterator[World]:
    """Join the processes that torchrun started (NCCL on CUDA, else gloo), and leave at the end."""
    here = world()
    if here.size == 1 or dist.is_initialized():
        yield here
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(here.local_rank)
        device = torch.device("cuda", here.local_rank)
        dist.init_process_group("nccl", device_id=device, **_store_of_this_attempt(here))
    else:
        dist.init_process_group("gloo", **_store_of_this_attempt(here))
    try:
        yield here
    finally:
        dist.destroy_process_group()


def _store_of_this_attempt(here: World) -> dict[str, Any]:
    """Keep the addresses of workers that died out of sight of those that torchrun restarted.

    torchrun's agent serves one key-value store to all attempts, under the same keys. On one machine
    every worker has the same count of restarts, which sets the attempts apart; agents of several
    machines count apart, so there docs/training.md names torchrun's own switch.
    """
    env = os.environ
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or env.get("LOCAL_WORLD_SIZE") != str(here.size):
        return {}
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    attempt = f"attempt {env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return {
        **{"store": dist.PrefixStore(attempt, store), "rank": here.rank},
        "world_size": here.size,
    }


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


class _AllReduce(torch.autograd.Function):
    """Sum over the processes. Each process's input reaches every output, so the gradient is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def all_reduce(x: Tensor) -> Tensor:
    """Differentiable sum of `x` over the processes, on CPU and CUDA."""
    return _AllReduce.apply(x)


class GlobalBatchNorm(BatchNorm):
    """BatchNorm over the batches of all processes, which must be equally large.

    Mean and variance of every process travel in one all-reduce and are combined without
    subtracting large numbers (Chan et al., 1979). Evaluation mode is that of `BatchNorm`.
    """

    def forward(self, x: Tensor, use: int = 0) -> Tensor:
        if not self.training:
            return super().forward(x, use)
        exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var, mean = torch.var_mean(exact, dim=(0, 2, 3), correction=0)
        table = exact.new_zeros(dist.get_world_size(), 2, len(mean))
        table[dist.get_rank()] = torch.stack((mean, var))
        means, variances = all_reduce(table).unbind(1)  # [processes, C]
        mean = means.mean(dim=0)
        var = (variances + (means - mean).square()).mean(dim=0)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.running_mean[use].lerp_(mean, self.momentum)
            self.running_var[use].lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shape = (1, -1, 1, 1)
        y = (exact - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def globalize(net: nn.Module) -> nn.Module:
    """Make every `BatchNorm` of `net` a `GlobalBatchNorm` with the same tensors; returns `net`."""
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if type(child) is BatchNorm:
                uses, channels = child.running_mean.shape
                norm = GlobalBatchNorm(channels, uses, child.eps, child.momentum)
                norm.weight, norm.bias = child.weight, child.bias
                norm.running_mean, norm.running_var = child.running_mean, child.running_var
                setattr(parent, name, norm.train(child.training))
    return net
