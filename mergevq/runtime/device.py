"""Devices, precision, memory layout and deterministic algorithms: each is decided here alone."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from mergevq.config.base import Precision, check_choice

_MEMORY = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")
_CAPTURED = {"cuda"}
_FUSED = {"cpu", "cuda"}
_STEPS_BETWEEN_READS = {"cuda": 10}


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` is cuda, else mps, else cpu.

    Raises:
        ValueError: this machine or this build of torch does not have it.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    usable = [device for device, there in available.items() if there]
    if name == "auto":
        return torch.device(usable[0])
    if name not in usable:
        raise ValueError(
            f"device ({name}) must be one that torch {torch.__version__} has on this machine: "
            f"auto or {' or '.join(usable)}"
        )
    return torch.device(name)


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to; None computes in float32.

    `auto` is bf16 where the device multiplies it in hardware, else float32. What is asked for by
    name is given, even where it is emulated and slow.

    Raises:
        ValueError: there is no such precision.
    """
    check_choice("precision", precision, Precision)
    if precision == "auto":
        return torch.bfloat16 if _has_bf16(device) else None
    return {"bf16": torch.bfloat16, "float16": torch.float16, "float32": None}[precision]


def precision_name(dtype: torch.dtype | None) -> Precision:
    """The name of a dtype of `resolve_precision`."""
    names: dict[torch.dtype | None, Precision] = {
        torch.bfloat16: "bf16",
        torch.float16: "float16",
        None: "float32",
    }
    return names[dtype]


def layout_for(device: torch.device, dtype: torch.dtype | None) -> torch.memory_format:
    """The memory layout of images and convolutions that is fastest for a dtype to autocast to.

    In float32 on a CPU that is the contiguous one: there torch's backward pass of group norm is
    many times slower in channels_last.
    """
    is_plain = device.type not in {"cpu", "cuda"} or (device.type == "cpu" and dtype is None)
    return torch.contiguous_format if is_plain else torch.channels_last


def lay_out(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Move a module to a device, in the layout for what it will be autocast to."""
    layout = layout_for(device, dtype)
    module.to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]


def compile_in_place(
    modules: Iterable[nn.Module | None], backend: str = "inductor", *, num_graphs: int = 8
) -> None:
    """Let calls of modules run compiled; their parameters keep their names.

    Numbers that are no tensors, as K is, are constants of a graph: each has one of its own.

    Args:
        modules: each becomes a graph for every combination of such numbers it is called with, in
            training and, of what validation calls, without gradients; None is left out.
        backend: of `torch.compile`.
        num_graphs: most of one module; beyond so many it would run as it is.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, num_graphs)
    for module in filter(None, modules):
        module.compile(backend=backend, dynamic=False)


def _has_bf16(device: torch.device) -> bool:
    """Whether bf16 products are native, and so faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return False  # mps: generations differ, and torch has no way to ask


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a GPU, or for this process beside a CPU; None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not _MEMORY.is_file():
        return None
    lines = _MEMORY.read_text(encoding="ascii").splitlines()
    available = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    # A container may have less than the machine.
    limits = [_CONTAINER / name for name in ("memory.max", "memory.current")]
    if all(limit.is_file() for limit in limits):
        most, used = (limit.read_text(encoding="ascii").strip() for limit in limits)
        available += [int(most) - int(used)] if most.isdecimal() else []
    return min(available, default=None)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; to a GPU from pinned memory, else the host would wait for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def steps_between_reads(device: torch.device) -> int:
    """Training steps after which the host reads whether they were finite.

    A GPU would be waited for, and a CPU is not; on other devices torch has no optimizer that skips
    a step by itself, so the host has to.
    """
    return _STEPS_BETWEEN_READS.get(device.type, 1)


def decodes_in_one_shape(device: torch.device) -> bool:
    """Whether a token is decoded in a step whose shapes stay, and which is captured as a graph.

    A GPU waits for launches of its hundreds of kernels; a CPU for memory, of which it reads less
    where views grow.
    """
    return device.type in _CAPTURED


def has_fused_optimizers(device: torch.device) -> bool:
    """Whether torch updates all weights there in one kernel, which skips a step if told to."""
    return device.type in _FUSED


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Let a GPU sum in one order every time, where it can; a CPU always does."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=before, warn_only=only_warned)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Multiply float32 as float32 in a block, where a GPU was told to round it to TF32 first."""
    with _products_of_float32(device, "highest"):
        yield


@contextmanager
def rounded_float32(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Let a GPU round float32 to TF32 in products of a block, if others are in `dtype` anyway.

    None, where everything is asked for in float32, leaves all as it is.
    """
    with _products_of_float32(device, None if dtype is None else "high"):
        yield


@contextmanager
def _products_of_float32(device: torch.device, precision: str | None) -> Iterator[None]:
    """Have torch multiply float32 on a GPU in this way in a block; None is as it is."""
    if device.type != "cuda" or precision is None:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Mixed precision in a block: products in `dtype`; everything in float32 for None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def decoded_at_once(num_pixels: int, device: torch.device) -> int:
    """Images that are decoded together: a CPU gains from more of them only where they are small.

    Of 32 x 32 pixels 8, of 64 x 64 pixels 4, from 128 x 128 on 1, and on other devices 16.
    """
    return max(1, min(8, 2**14 // num_pixels)) if device.type == "cpu" else 16
