"""Several processes training one model; the only user of `torch.distributed`.

Launched by `torchrun`, every rank calls `init` once and passes the `World` it gets to whoever needs
to know its place. A single process never starts a process group: there each collective below is the
identity, so code that calls them reads the same with one process and with many.

Every collective must be reached by all ranks, in the same order: none belongs in a branch that
depends on a rank's own data.

What cuts tensors into shards is imported where it is used: it takes two seconds to load.
"""

import inspect
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


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
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    # torchrun's store outlives a group. Under the same keys a second group would find the first
    # one's addresses, and ranks would wait for ports that are closed.
    number = store.add(f"mergevq/groups of rank {rank}", 1)
    dist.init_process_group(
        # Counts and flags stay on the CPU in any run, so gloo is there beside nccl.
        "cpu:gloo,cuda:nccl" if on_gpu and dist.is_nccl_available() else "gloo",
        store=PrefixStore(f"mergevq/group {number}", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )
    return World(rank=rank, world_size=world_size, local_rank=local_rank, device=device)


def shutdown() -> None:
    """Leave the process group; nothing to do with one process."""
    if is_active():
        dist.destroy_process_group()


def is_active() -> bool:
    """Whether a process group is running: several processes, between `init` and `shutdown`."""
    return dist.is_available() and dist.is_initialized()


def place() -> tuple[int, int]:
    """Rank of this process, and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if is_active() else (0, 1)


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


class _JointMean(torch.autograd.Function):
    """Average over ranks, whose gradient is that of this rank's loss."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:  # noqa: ARG004 - autograd's signature
        return sum(tensor) / dist.get_world_size()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return gradients[0]


# The name follows torch: the function is written `runtime.distributed.sum(..)` where it is used.
def sum(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:  # noqa: A001
    """Sum over ranks of a tensor of the same shape everywhere, the same on all.

    It has no gradient.
    """
    tensor = tensor.detach()
    if not is_active():
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over ranks of several tensors in one collective, as `sum` of each; without gradient.

    They are added in float32: whole numbers are exact up to 2**24.

    Args:
        tensors: as many of the same shapes on every rank.
    """
    tensors = [tensor.detach() for tensor in tensors]
    if not is_active() or not tensors:
        return tensors
    flat = torch.cat([tensor.float().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    pairs = zip(pieces, tensors, strict=True)
    return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in pairs]


def mean(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Average over ranks of a tensor of the same shape everywhere, the same on all.

    Where each rank averages over its own equal share of a batch, this is the average over the joint
    batch; without gradient.
    """
    return sum(tensor) / place()[1]


def joint_mean(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`mean`, with a gradient: for a loss of nothing else, which is the same on every rank.

    As every rank then has the same gradient, none is sent. After data parallel has averaged the
    ranks' gradients they are those of one process holding the joint batch. Of a loss in which it
    meets what is a rank's own, they would be wrong.
    """
    return _JointMean.apply(tensor) if is_active() else tensor


def gather(
    tensor: Shaped[Tensor, "rows *rest"], *, equal: bool = False
) -> Shaped[Tensor, "all_rows *rest"]:
    """Rows of all ranks in rank order, on every rank; without gradient.

    Args:
        tensor: of this rank; ranks may hold different numbers of rows, zero included, and all else
            must agree.
        equal: all ranks hold equally many, so that nobody has to wait for counts.
    """
    tensor = tensor.detach()
    if not is_active():
        return tensor
    if equal:
        tensor = tensor.contiguous()
        received = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(received, tensor)
        return torch.cat(received)
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
    A gradient is rounded by its place among all, which is the same in every step: a resumed run has
    the bits of one that was not stopped, on any number of ranks.
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
    wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True, **leave_buffers)
    _settle(wrapped, module)
    return wrapped


def _settle(wrapped: nn.Module, module: nn.Module) -> None:
    """Let data parallel lay gradients out for good, by a backward pass of zeros.

    It does so after the first pass, in the order in which gradients came. More than two ranks add
    the parts of a buffer in an order that depends on the place, so the first step of a run, and
    that of a resumed one, would be rounded otherwise than all others.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.forward = lambda: torch.stack([each.sum().float() for each in trained]).sum() * 0
    wrapped().backward()
    del module.forward
    module.zero_grad(set_to_none=True)


def no_sync(module: nn.Module, *, active: bool) -> AbstractContextManager[None]:
    """While `active`, gradients stay on their rank: for all accumulated parts but the last.

    The forward pass belongs inside too; data parallel decides there what backward will do.
    """
    if active and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    if active and is_sharded(module):
        return _no_reduction(cast("FSDPModule", module))
    return nullcontext()


@contextmanager
def _no_reduction(module: "FSDPModule") -> Iterator[None]:
    """Inside, gradients of a sharded module stay whole on their rank."""
    module.set_requires_gradient_sync(requires_gradient_sync=False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(requires_gradient_sync=True)


# ------------------------------------------------------------------------------------- sharding


def shard(
    module: nn.Module,
    units: Iterable[nn.Module],
    *,
    device: torch.device,
    dtype: torch.dtype | None,
) -> nn.Module:
    """Move a module to a device in parts, one on each rank; its gradients are averaged.

    From then on its parameters, and all that is made like them (gradients, moments, averages), are
    distributed tensors. It has to be run by calling it, on all ranks equally often, with or without
    gradients. With one process the module is moved and stays whole.

    Args:
        module: with the same weights on every rank; changed in place.
        units: its modules of which only one at a time is put together, in forward and backward.
        device: of this rank.
        dtype: of autocast, to which the units' weights are rounded before they are sent; None
            sends them as they are. Gradients are averaged in float32.
    """
    if not is_active():
        return module.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Activations are left to autocast. It would keep its rounded copies of weights, of the whole
    # module, until the backward pass; weights that come rounded are not copied.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    # By default the outermost parameters stay together after a forward pass, and averages that are
    # swapped in would not be seen.
    whole_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=whole_policy)
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has cut the module into parts."""
    if not is_active():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards, on every rank; any other tensor itself."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor where it is whole."""
    if not _is_shard(tensor):
        return tensor
    return tensor.to_local()


def shard_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, cut as another one is."""
    if not _is_shard(model):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None
    )


def save_shards(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Write tensors, each rank its own shards, as safetensors; every rank calls it."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    with _alone_without_warning():
        save(dict(tensors), storage_writer=writer, no_dist=not is_active())


def load_shards(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Fill tensors with what `save_shards` wrote, whatever its number of ranks was.

    Either all are whole, and a rank may call it alone, or some are sharded, and every rank calls.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(directory))
    sharded = any(map(_is_shard, tensors.values()))
    with _alone_without_warning():
        load(dict(tensors), storage_reader=reader, no_dist=not sharded)


def saved_shards(directory: Path) -> dict[str, Tensor]:
    """Unfilled tensors, whole and on the CPU, for what `save_shards` wrote."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(directory)).read_metadata()
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


@contextmanager
def _alone_without_warning() -> Iterator[None]:
    """Inside, torch does not warn that one process reads or writes, which it was told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _is_shard(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether a rank has only its part of a tensor."""
    if not is_active():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


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
