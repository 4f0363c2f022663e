"""Parts of a network that keep their own precision under autocast."""

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> torch.autocast:
    """Context in which nothing is rounded to fewer bits than tensor and weights have."""
    # On the meta device, where products are counted, there is no autocast.
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)
