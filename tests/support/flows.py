"""Small flow decoders with weights that are no first ones, and tokens for them."""

import torch

from mergevq.config.parts import PrefixFlow
from mergevq.config.parts.flows import FlowConfig, Solution, Times
from mergevq.data.layouts import Ordered, Source, canonicalize
from mergevq.tokenizer.flows.decoder import FlowNetwork
from mergevq.tokenizer.flows.tokens import Shown

CODE_DIM, NUM_KEPT, GRID = 6, 5, (4, 4)
LAYOUTS = ("ordered", "source")


def flow_config(layout="ordered", decoder=None, **solution):
    """A decoder of cells of 4 pixels."""
    return FlowConfig(
        decoder=decoder or PrefixFlow(patch_size=2, dim=16, num_layers=2, num_heads=2),
        times=Times(),
        solution=Solution(**{"num_steps": 3, **solution}),
        code_dim=CODE_DIM,
        num_slots=8 if layout == "ordered" else None,
        cell_size=4,
    )


def network_of(config):
    """A network in which everything has an effect."""
    torch.manual_seed(0)
    network = FlowNetwork(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def layout_of(kind, num_images=3, num_kept=NUM_KEPT):
    """Places of tokens: their order, or a random source map for each image."""
    if kind == "ordered":
        return Ordered(num_kept)
    numbers = torch.Generator().manual_seed(1)
    index = torch.randint(num_kept, (num_images, 16), generator=numbers)
    index[:, :num_kept] = torch.arange(num_kept)
    return canonicalize(Source(index, num_kept)).source


def shown_of(kind, num_images=3, **shown):
    """Tokens of some images."""
    codes = torch.randn(num_images, NUM_KEPT, CODE_DIM, generator=torch.Generator().manual_seed(2))
    return Shown(codes, layout_of(kind, num_images), GRID, **shown)
