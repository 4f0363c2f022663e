"""Where numbers are read from the device, which a GPU would be waited for; seen on CPUs too."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mergevq.runtime import device

_READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select"}


class _Reads(TorchDispatchMode):
    """Notes operators that read."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in _READS:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Names of all reads inside, in turn."""
    names: list[str] = []
    tolist = torch.Tensor.tolist

    def noted(tensor: torch.Tensor) -> object:
        # On CPUs this is no operator.
        names.append("tolist")
        return tolist(tensor)

    with pytest.MonkeyPatch.context() as patch, _Reads(names):
        patch.setattr(torch.Tensor, "tolist", noted)
        yield names


class Unreadable(NamedTuple):
    """A device of which the host cannot read a number: torch refuses, with an error."""

    device: torch.device
    copies: list[str]
    """Where the host waited for a copy to the device."""
    sent: list[str]
    """Where it sent a copy without waiting."""


class _Copies(TorchDispatchMode):
    """Notes copies from the host to a device, and which of them the host waits for."""

    def __init__(self, copies: list[str], sent: list[str]) -> None:
        super().__init__()
        self.copies, self.sent = copies, sent

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        match func.name():
            case "aten::_to_copy":
                target, source = kwargs.get("device") or args[0].device, args[0].device
                waits = not kwargs.get("non_blocking", False)
            case "aten::copy_":
                target, source = args[0].device, args[1].device
                waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            case _:
                return func(*args, **kwargs)
        if (source.type, target.type) == ("cpu", "meta"):
            (self.copies if waits else self.sent).append(_place())
        return func(*args, **kwargs)


def _place() -> str:
    """The line of the package that is running, or of its test."""
    frames = traceback.extract_stack()
    own = [each for each in frames if "/mergevq/" in each.filename] or frames[:1]
    return f"{own[-1].filename}:{own[-1].lineno} {own[-1].line}"


@contextmanager
def unreadable_device() -> Iterator[Unreadable]:
    """The meta device, which has shapes and no numbers, told to be one that trains as GPUs do."""
    autocast = torch.autocast

    class Autocast(autocast):
        def __init__(self, device_type: str, *args, **kwargs) -> None:
            super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    copies: list[str] = []
    sent: list[str] = []
    make = torch.tensor

    def made(*args: object, **kwargs: object) -> torch.Tensor:
        if torch.device(kwargs.get("device") or "cpu").type == "meta":
            copies.append(_place())
        return make(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, _Copies(copies, sent):
        patch.setattr(torch, "autocast", Autocast)
        # Made on the host, and then copied.
        patch.setattr(torch, "tensor", made)
        # Where its name leads to has a class of the same name.
        optimizer = sys.modules["torch.optim.optimizer"]
        patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
        patch.setattr(device, "_FUSED", {"cpu", "meta"})
        patch.setitem(device._STEPS_BETWEEN_READS, "meta", 10)
        yield Unreadable(torch.device("meta"), copies, sent)
