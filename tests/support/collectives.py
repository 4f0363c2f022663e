"""Collectives that a rank starts, but those that average gradients and gather shards."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_CALLS = ["all_reduce", "all_gather", "broadcast", "broadcast_object_list", "barrier", "reduce"]


class _Functional(TorchDispatchMode):
    """Notes those of distributed tensors, which are operators."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(each.__name__ == "DTensor" for each in types):
            # Becomes operators on shards first, which come here again.
            return NotImplemented
        if func.name().startswith("_c10d_functional::all_reduce"):
            self.found.append(_place())
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The function of the package that is running, by its module, or nothing."""
    frames = [each for each in traceback.extract_stack() if "/mergevq/" in each.filename]
    frames = [each for each in frames if not each.filename.endswith("runtime/distributed.py")]
    if not frames:
        return ""
    last = frames[-1]
    return f"{last.filename.rsplit('/mergevq/', 1)[1].removesuffix('.py')}.{last.name}"


@contextmanager
def collectives() -> Iterator[list[str]]:
    """Functions that start those inside, in turn.

    Data parallel starts its own below Python, and sharding uses others.
    """
    found: list[str] = []

    def noting(call):
        def noted(*args, **kwargs):
            found.append(_place())
            return call(*args, **kwargs)

        return noted

    with pytest.MonkeyPatch.context() as patch, _Functional(found):
        for name in _CALLS:
            patch.setattr(dist, name, noting(getattr(dist, name)))
        yield found
