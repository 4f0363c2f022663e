"""The command that describes the machine: `mergevq doctor`; and the known extras."""

import os
import platform
import warnings
from typing import TYPE_CHECKING

from mergevq.cli.tables import print_table
from mergevq.runtime.environment import EXTRAS, install_command, installed_version, missing

if TYPE_CHECKING:
    import torch


def doctor() -> None:
    """Print what this machine and installation offer, for a bug report or before a long run."""
    import torch

    from mergevq.metrics.lpips import TRUNKS, cache_folder
    from mergevq.runtime.device import resolve_device

    core = ("mergevq", "torch", "numpy", "pillow", "safetensors", "tyro", "jaxtyping", "tqdm")
    versions = {name: installed_version(name) or "not installed" for name in core}
    system = {"python": platform.python_version(), "system": platform.platform()}
    print_table("versions", system | versions)
    devices = {name: _describe_device(name) for name in ("cpu", "cuda", "mps")}
    print_table("devices", devices | {"auto": resolve_device("auto").type})
    backends = {
        name: ", ".join(_attention_backends(torch.device(name)))
        for name, description in devices.items()
        if description != "none"
    }
    print_table("attention backends, with the bias of merged sizes", backends)
    print_table("extras", {name: _describe_extra(name) for name in EXTRAS})
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    writable = "writable" if os.access(existing, os.W_OK) else "NOT writable"
    weights = {
        f"lpips {trunk}": "found" if (folder / f"lpips_{trunk}.safetensors").is_file() else "none"
        for trunk in TRUNKS
    }
    print_table("cache", {str(folder): writable} | weights)


def _describe_extra(extra: str) -> str:
    """Whether an extra is installed, and how to install it if not."""
    absent = missing(extra)
    return f"without {', '.join(absent)}: {install_command(extra)}" if absent else "installed"


def _describe_device(name: str) -> str:
    """Describe a kind of device on this machine, and the precision it would train in."""
    import torch

    from mergevq.runtime.device import resolve_device, resolve_precision

    try:
        device = resolve_device(name)
    except ValueError:
        return "none"
    precision = "float32" if resolve_precision("auto", device) is None else "bf16"
    if name == "cpu":
        return f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {precision}"
    if name == "mps":
        return f"{platform.machine()}, {precision}"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{', '.join(names)}, {precision}"


def _attention_backends(device: "torch.device") -> list[str]:
    """Kernels of scaled dot-product attention that run with an additive bias."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from mergevq.runtime.device import resolve_precision

    dtype = resolve_precision("auto", device)
    query = torch.zeros(1, 1, 16, 64, device=device, dtype=dtype)
    bias = torch.zeros(1, 1, 1, 16, device=device, dtype=dtype)
    usable = []
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("math", SDPBackend.MATH),
    ):
        try:
            with warnings.catch_warnings(action="ignore"), sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(query, query, query, bias)
        except RuntimeError:
            continue
        usable.append(name)
    return usable
