"""Weights from elsewhere: the authors' MergeVQ checkpoints and DINOv2 transformer blocks.

Source: Li et al. 2025, "MergeVQ" (arXiv:2504.00999) and the authors' public code; Xu et al. 2023,
"Initializing Models with Larger Ones" (weight selection, arXiv:2311.18823).
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from mergevq.checkpoint import load_strict, resolve
from mergevq.config import TokenizerConfig
from mergevq.teachers import AlignmentHead
from mergevq.tokenizer import Tokenizer

State = dict[str, Tensor]

# The authors' names on the left, ours on the right, per network; applied in order.
_BLOCK_NAMES = (
    (r"^attn\.blocks\.", "blocks."),
    (r"^attn\.cls_token$", "class_token"),
    (r"^attn\.pos_embed\.", "position."),
    (r"\.nin_shortcut\.", ".shortcut."),
)

# Names of a ViT on the left: timm's, those in transformers' files, those in its memory since 5.0.
_VIT_NAMES = (
    (r"^(?:dinov2\.)?encoder\.layer\.", "blocks."),
    (r"^(?:(?:dinov2\.)?embeddings\.)?cls_token$", "class_token"),
    (r"\.attention\.attention\.([qkv])(?:uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)


class Official(NamedTuple):
    """A model in our modules."""

    tokenizer: Tokenizer
    """Encoder and decoder loaded; the source predictor, which they do not have, is random."""
    alignment_head: AlignmentHead | None
    """The head on the class token; None when the state has none."""


def load_official(state: State, config: TokenizerConfig) -> Official:
    """Put a state dict of the authors' code into our modules.

    Args:
        state: names as in their model (`encoder.conv_in.weight`, ..); discriminator, perceptual
            network, EMA copies and quantizer buffers in it are left out.
        config: the same architecture; `official_config` reads one off a state dict.

    Raises:
        ValueError: names or shapes do not fit the configuration.
    """
    tokenizer = Tokenizer(config)
    converted = {f"encoder.{k}": v for k, v in _encoder(_part(state, "encoder"), config).items()}
    converted |= {f"decoder.{k}": v for k, v in _decoder(_part(state, "decoder"), config).items()}
    predictor = tokenizer.source_predictor.state_dict()
    converted |= {f"source_predictor.{k}": v for k, v in predictor.items()}
    load_strict(tokenizer, converted)
    return Official(tokenizer.eval(), _alignment_head(_part(state, "encoder.dist_head")))


def official_config(
    state: State, *, image_size: int, num_kept: int, num_heads: int, num_decoder_heads: int
) -> TokenizerConfig:
    """Read the architecture off the shapes of an official state dict.

    Args:
        state: as in `load_official`.
        image_size: side of its training images in pixels; shapes do not tell.
        num_kept: its nominal K; shapes do not tell.
        num_heads: of the encoder's attention; shapes do not tell. The authors' evaluation files
            for version R omit the head dimension and so load 8 heads for 12, silently.
        num_decoder_heads: of the decoder's; 8 in every version.
    """
    encoder, decoder = _part(state, "encoder"), _part(state, "decoder")
    levels = range(1 + max(int(name.split(".")[1]) for name in decoder if name[:3] == "up."))
    channels = decoder["conv_out.weight"].shape[1]
    widths = [decoder[f"up.{level}.block.0.conv1.weight"].shape[0] for level in levels]
    # The finest level's multiple may not be 1, so the base width comes from the encoder's stem.
    patch = "conv_in.0.weight" in encoder
    channels = channels if patch else encoder["conv_in.weight"].shape[0]
    config = TokenizerConfig(
        image_size=image_size,
        stem="patch" if patch else "cnn",
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=_count(decoder, r"^up\.0\.block\.(\d+)\."),
        patch_dim=encoder["conv_in.0.weight"].shape[0] if patch else 768,
        num_layers=_count(encoder, r"^attn\.blocks\.(\d+)\."),
        num_heads=num_heads,
        num_kept=num_kept,
        num_bits=encoder["conv_out.weight"].shape[0],
        num_decoder_layers=_count(decoder, r"^attn\.blocks\.(\d+)\."),
        num_decoder_heads=num_decoder_heads,
    )
    return config


def read_official(path: str | Path) -> State:
    """Read a state dict from safetensors, a plain torch file or a Lightning `.ckpt`.

    Torch files are read with `weights_only`: no code in them can run. When the file holds averaged
    weights (`model_ema.*`) they are taken, as the authors' evaluation does.

    Raises:
        ValueError: the file holds no encoder.
    """
    state = read_state(path)
    state = state.get("state_dict", state)
    averaged = _averaged(state)
    state = averaged or state
    if not any(name.startswith("encoder.") for name in state):
        raise ValueError(
            f"{path} holds no 'encoder.' weights but {sorted(state)[:5]}; it is not a checkpoint "
            "of the authors' tokenizer"
        )
    return state


def read_state(path: str | Path) -> dict[str, Any]:
    """What a safetensors or torch file holds; no code in it can run."""
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def select_weights(source: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Take evenly spread entries of a larger tensor along every dimension (weight selection).

    Where the larger size is a multiple of the smaller, every n-th entry; else the nearest to an
    even spacing from the first to the last.

    Raises:
        ValueError: the source is smaller than the target in some dimension.
    """
    if source.ndim != len(shape) or any(a < b for a, b in zip(source.shape, shape, strict=True)):
        raise ValueError(
            f"weights of shape {tuple(source.shape)} cannot fill {shape}: selection only shrinks; "
            "start from a larger model"
        )
    for dim, size in enumerate(shape):
        total = source.shape[dim]
        if total % size == 0:
            chosen = torch.arange(size) * (total // size)
        else:
            chosen = torch.linspace(0, total - 1, size).round().long()
        source = source.index_select(dim, chosen)
    return source


def read_vit(path: str | Path) -> State:
    """State dict of a ViT: a folder with `model.safetensors`, or its Hugging Face name."""
    return load_file(resolve(path) / "model.safetensors")


def initialize_from_dinov2(tokenizer: Tokenizer, state: State) -> None:
    """Fill the encoder's transformer blocks and class token from a larger DINOv2 ViT.

    LayerScale gains are taken too. Patch embedding, positions and final norm are not used.

    Args:
        tokenizer: changed in place.
        state: of `transformers.Dinov2Model` or of timm's `vit_*_dinov2`.

    Raises:
        ValueError: the ViT is smaller than the encoder, or its names are not known.
    """
    blocks = _dinov2_blocks(state)
    own = tokenizer.encoder.state_dict()
    wanted = [name for name in own if name.startswith(("blocks.", "class_token"))]
    missing = sorted(set(wanted) - set(blocks))
    if missing:
        raise ValueError(f"the ViT lacks {missing[:4]}; {len(missing)} of {len(wanted)} names")
    with torch.no_grad():
        for name in wanted:
            own[name].copy_(select_weights(blocks[name], tuple(own[name].shape)))


def _part(state: State, prefix: str) -> State:
    """Entries below a prefix, without it."""
    return {k[len(prefix) + 1 :]: v for k, v in state.items() if k.startswith(f"{prefix}.")}


def _count(state: State, pattern: str) -> int:
    """One more than the largest number a pattern captures in the names."""
    return 1 + max(int(m[1]) for m in (re.match(pattern, name) for name in state) if m)


def _rename(name: str) -> str:
    """Names that change alike in encoder and decoder."""
    for pattern, replacement in _BLOCK_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _encoder(state: State, config: TokenizerConfig) -> State:
    """The authors' encoder in our names."""
    converted = {}
    for name, tensor in state.items():
        if name.startswith("dist_head."):
            continue
        if match := re.match(r"down\.(\d+)\.(block\.(\d+)|downsample)\.(.*)", name):
            level, _, block, rest = match.groups()
            first = 1 + int(level) * (config.num_res_blocks + 1)
            position = first + (config.num_res_blocks if block is None else int(block))
            new = f"stem.{position}.{rest}".replace("nin_shortcut", "shortcut")
        elif name.startswith("conv_in."):
            new = name.replace("conv_in.", "stem." if config.stem == "patch" else "stem.0.")
        elif name.startswith("conv_out."):
            new = name.replace("conv_out.", "to_latents.")
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        else:
            new = _rename(name).replace("norm_out.", "norm.")
        converted[new] = tensor.flatten() if new == "class_token" else tensor
    return converted


def _decoder(state: State, config: TokenizerConfig) -> State:
    """The authors' decoder in our names; our levels run from coarse to fine."""
    last = len(config.channel_mult) - 1
    converted = {}
    for name, tensor in state.items():
        if match := re.match(r"up\.(\d+)\.(block\.\d+|upsample)\.(.*)", name):
            level, part, rest = match.groups()
            part = part.replace("block.", "blocks.")
            new = _rename(f"levels.{last - int(level)}.{part}.{rest}").replace(
                "upsample.conv1", "upsample.conv"
            )
            if part == "upsample":
                # Theirs has the 2x2 block outermost in the channels, pixel_shuffle innermost.
                tensor = tensor.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)
        elif match := re.match(r"adaptive\.(\d+)\.(gamma|beta)\.(.*)", name):
            level, part, rest = match.groups()
            part = {"gamma": "gain", "beta": "shift"}[part]
            new = f"levels.{last - int(level)}.norm.{part}.{rest}"
        else:
            new = _rename(name)
        converted[new] = tensor
    return converted


def _alignment_head(state: State) -> AlignmentHead | None:
    """The head on the class token, from its 2 or 3 linear layers."""
    if not state:
        return None
    last = max(int(name.split(".")[0]) for name in state)
    num_layers = sum(name.endswith(".weight") and v.ndim == 2 for name, v in state.items())
    head = AlignmentHead(
        state["0.weight"].shape[1], state[f"{last}.weight"].shape[0], 3 if num_layers == 3 else 2
    )
    load_strict(head, {f"layers.{name}": tensor for name, tensor in state.items()})
    return head.eval()


def _averaged(state: dict[str, Any]) -> State:
    """Averaged weights of a Lightning file, whose names have lost their dots; {} without any."""
    names = {name.replace(".", ""): name for name in state if not name.startswith("model_ema.")}
    shadow = _part(state, "model_ema")
    return {names[k]: v for k, v in shadow.items() if k in names}


def _dinov2_blocks(state: State) -> State:
    """A DINOv2 state dict in our encoder's names."""
    converted = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in _VIT_NAMES:
            new = re.sub(pattern, replacement, new)
        converted[new] = tensor.flatten() if new == "class_token" else tensor
    for query in [name for name in converted if ".attn.q." in name]:
        names = [query.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(name in converted for name in names):
            joint = query.replace(".attn.q.", ".attn.qkv.")
            converted[joint] = torch.cat([converted.pop(name) for name in names])
    return converted
