"""Several processes training one model; the only user of `torch.distributed`.

Launched by `torchrun`, every rank calls `init` once and passes the `World` it gets to whoever needs
to know its place. A single process never starts a process group: there each collective below is the
identity, so code that calls them reads the same with one process and with many.

Every collective must be reached by all ranks, in the same order: none belongs in a branch that
depends on a rank's own data.
"""

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among all processes of the run."""

    rank: int
    """Position among all processes, in [0, world_size)."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Position among the processes of this machine: the number of its GPU."""
    device: torch.device
    """Where this process computes."""


def init(device: torch.device, *, timeout_seconds: float = 1800.0) -> World:
    """Take this process's place in the run, and start the process group if there are several.

    Args:
        device: kind of device to compute on; with several processes a GPU gets the local rank as
            its number, with one process the device is used as it is.
        timeout_seconds: how long a rank waits for the others in any collective.

    A device that several processes cannot share, or too few of them, is a ValueError; a launcher
    that left out one of torchrun's variables is a RuntimeError.
    """
    environment = os.environ
    world_size = int(environment.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return World(rank=0, world_size=1, local_rank=0, device=device)
    _require_torchrun(environment, world_size)
    local_rank = int(environment["LOCAL_RANK"])
    device = _own_device(device, local_rank)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        # Counts and flags stay on the CPU in any run, so gloo is there beside nccl.
        "cpu:gloo,cuda:nccl" if on_gpu and dist.is_nccl_available() else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if on_gpu else None,
    )
    rank = int(environment["RANK"])
    return World(rank=rank, world_size=world_size, local_rank=local_rank, device=device)


def shutdown() -> None:
    """Leave the process group; nothing to do with one process."""
    if is_active():
        dist.destroy_process_group()


def is_active() -> bool:
    """Whether a process group is running: several processes, between `init` and `shutdown`."""
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Whether this process is the one that writes files and logs."""
    return not is_active() or dist.get_rank() == 0


def local_batch(batch_size: int, world: World, *, accumulation: int = 1) -> int:
    """Images per process and per accumulated part.

    Args:
        batch_size: images per optimizer step, over all ranks and parts.
        world: its size divides the batch.
        accumulation: parts each rank's share is cut into.

    Raises:
        ValueError: the batch cannot be cut evenly, which would weight some images more than others.
    """
    num_parts = world.world_size * accumulation
    if batch_size % num_parts:
        factors = f"{world.world_size} processes"
        if accumulation > 1:
            factors += f" times accumulation ({accumulation})"
        below = batch_size // num_parts * num_parts
        choices = f"{below} or {below + num_parts}" if below else f"{num_parts}"
        raise ValueError(
            f"batch_size ({batch_size}) must be a multiple of {num_parts}, {factors}; use {choices}"
        )
    return batch_size // num_parts


# --------------------------------------------------------------------------------- collectives


class _Sum(torch.autograd.Function):
    """Sum over ranks, whose gradient is the sum over ranks.

    What a rank adds reaches the loss of every rank, so its gradient collects from every rank.
    """

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:  # noqa: ARG004 - autograd's signature
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return _Sum.apply(gradients[0])


# The name follows torch: the function is written `distributed.sum(..)` where it is used.
def sum(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:  # noqa: A001
    """Sum over ranks of a tensor of the same shape everywhere; the result is the same on all.

    Differentiable: if each rank backpropagates its own loss, every gradient is that of the sum of
    the ranks' losses.
    """
    if not is_active():
        return tensor
    return _Sum.apply(tensor)


def mean(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Average over ranks of a tensor of the same shape everywhere; the result is the same on all.

    Where each rank averages over its own equal share of a batch, this is the average over the joint
    batch. It is differentiable, and after data parallel has averaged the ranks' gradients they are
    those of one process holding the joint batch.
    """
    if not is_active():
        return tensor
    return sum(tensor) / dist.get_world_size()


def gather(tensor: Shaped[Tensor, "rows *rest"]) -> Shaped[Tensor, "all_rows *rest"]:
    """Rows of all ranks in rank order, on every rank; without gradient.

    Ranks may hold different numbers of rows, zero included; all else must agree.
    """
    tensor = tensor.detach()
    if not is_active():
        return tensor
    counts = tensor.new_zeros(dist.get_world_size(), dtype=torch.int64)
    counts[dist.get_rank()] = tensor.shape[0]
    dist.all_reduce(counts)
    num_rows = counts.tolist()
    # Collectives need equal shapes, so short ranks send filler that is cut off again.
    padded = tensor.new_zeros(max(num_rows), *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    received = [torch.empty_like(padded) for _ in num_rows]
    dist.all_gather(received, padded)
    return torch.cat([rows[:num] for rows, num in zip(received, num_rows, strict=True)])


def barrier() -> None:
    """Wait until every rank is here."""
    if is_active():
        dist.barrier()


def broadcast_object(value: Any) -> Any:  # noqa: ANN401 - any picklable value
    """The main process's value, on every rank; for paths, seeds and decisions, not for tensors."""
    if not is_active():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


@contextmanager
def located(world: World, step: int) -> Iterator[None]:
    """Add rank and step to whatever fails inside, such as a collective that timed out."""
    try:
        yield
    except Exception as error:
        error.add_note(f"on rank {world.rank} of {world.world_size}, at step {step}")
        raise


# ------------------------------------------------------------------------------- data parallel


def wrap(module: nn.Module) -> nn.Module:
    """Average the module's gradients over ranks in every backward pass.

    Parameters and buffers start as the main process's. Buffers are left alone from then on:
    overwriting them before each forward pass would invalidate a graph that still needs them, and
    statistics kept in buffers are reduced where they are made. With one process the module itself.

    Every trainable parameter must take part in every backward pass; one that does not is an error.
    """
    if not is_active():
        return module
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)
    # torch 2.13 renamed the option and warns about the old name; drop the test with torch 2.12.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    leave_buffers: dict[str, Any] = {
        "forward_sync_buffers" if renamed else "broadcast_buffers": False
    }
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **leave_buffers)


def unwrap(module: nn.Module) -> nn.Module:
    """The module that was given to `wrap`."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def no_sync(module: nn.Module, *, active: bool) -> AbstractContextManager[None]:
    """While `active`, gradients stay on their rank: for all accumulated parts but the last.

    The forward pass belongs inside too; data parallel decides there what backward will do.
    """
    if active and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    """The device of this rank, made current.

    Raises:
        ValueError: several processes cannot share the device, or there are too few.
    """
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(
            f"device ({device.type}) can be used by one process only; use cuda or cpu with torchrun"
        )
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices:
        raise ValueError(
            f"local rank ({local_rank}) must be below the number of GPUs ({num_devices}); start "
            f"torchrun with --nproc-per-node {num_devices}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _require_torchrun(environment: Mapping[str, str], world_size: int) -> None:
    """Check that the launcher said everything.

    Raises:
        RuntimeError: a variable is missing.
    """
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environment]
    if missing:
        raise RuntimeError(
            f"WORLD_SIZE is {world_size} but {', '.join(missing)} is not set; start with "
            f"`torchrun --nproc-per-node {world_size} -m mergevq ..`, or unset WORLD_SIZE"
        )
