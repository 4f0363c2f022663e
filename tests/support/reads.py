"""Where numbers are read from the device, which a GPU would be waited for; seen on CPUs too."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
