"""Weights from elsewhere: the authors' MergeVQ checkpoints and DINOv2 transformer blocks.

Source: Li et al. 2025, "MergeVQ" (arXiv:2504.00999) and the authors' public code; Xu et al. 2023,
"Initializing Models with Larger Ones" (weight selection, arXiv:2311.18823).
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergevq.config.parts import CnnDecoder, CnnStem, Lfq, Merge, PatchStem
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.runtime.artefacts import build_for, resolve
from mergevq.runtime.files import (
    mistaken_for_weights,
    read_tensors,
    require_regular,
    require_weights,
)
from mergevq.tokenizer.build import build_expander, build_quantizer
from mergevq.tokenizer.losses.teachers import AlignmentHead
from mergevq.tokenizer.tokenizer import Tokenizer

State = dict[str, Tensor]

_TRANSFORMER_NORM_EPS = 1e-5
"""Added to the variance in the layer norms of the authors' transformer blocks."""
_PATCH_NORM_EPS = 1e-6
"""Added to the variance in the norm of their patch stem."""

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
    converted = {f"encoder.{k}": v for k, v in _encoder(_part(state, "encoder"), config).items()}
    converted |= {f"decoder.{k}": v for k, v in _decoder(_part(state, "decoder"), config).items()}
    predictor = build_expander(config, build_quantizer(config.quantizer)).state_dict()
    converted |= {f"expander.{k}": v for k, v in predictor.items()}
    tokenizer = Tokenizer.from_weights(config, converted)
    return Official(tokenizer.eval(), _alignment_head(_part(state, "encoder.dist_head")))


def official_config(
    state: State,
    *,
    image_size: int,
    num_kept: int,
    num_heads: int,
    num_decoder_heads: int | None = None,
) -> TokenizerConfig:
    """Read the architecture off the shapes of an official state dict.

    What is added to a variance is as in the authors' code.

    Args:
        state: as in `load_official`.
        image_size: side of its training images in pixels; shapes do not tell.
        num_kept: its nominal K; shapes do not tell.
        num_heads: of the encoder's attention; shapes do not tell. The authors' evaluation files
            for version R omit the head dimension and so load 8 heads for 12, silently.
        num_decoder_heads: of the decoder's; None is as in the versions the authors have: 12 where
            the decoder is 768 wide (d96), else 8.

    Raises:
        ValueError: it is not a state of the authors' architecture.
    """
    encoder, decoder = _part(state, "encoder"), _part(state, "decoder")
    levels = range(_count(decoder, r"^up\.(\d+)\."))
    channels = _shape(decoder, "conv_out.weight", 4)[1]
    widths = [_shape(decoder, f"up.{level}.block.0.conv1.weight", 4)[0] for level in levels]
    # The finest level's multiple may not be 1, so the base width comes from the encoder's stem.
    patch = "conv_in.0.weight" in encoder
    if num_decoder_heads is None:
        num_decoder_heads = 12 if widths[-1:] == [768] else 8
    channels = channels if patch else _shape(encoder, "conv_in.weight", 4)[0]
    cnn = CnnDecoder(
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=_count(decoder, r"^up\.0\.block\.(\d+)\."),
        num_layers=_count(decoder, r"^attn\.blocks\.(\d+)\."),
        num_heads=num_decoder_heads,
        norm_eps=_TRANSFORMER_NORM_EPS,
    )
    stem = CnnStem(
        channels=channels, channel_mult=cnn.channel_mult, num_res_blocks=cnn.num_res_blocks
    )
    if patch:
        stem = PatchStem(
            width=_shape(encoder, "conv_in.0.weight", 4)[0],
            patch_size=stem.patch_size,
            norm_eps=_PATCH_NORM_EPS,
            num_groups=cnn.num_groups,
        )
    return TokenizerConfig(
        image_size=image_size,
        stem=stem,
        reducer=Merge(
            num_layers=_count(encoder, r"^attn\.blocks\.(\d+)\."),
            num_heads=num_heads,
            norm_eps=_TRANSFORMER_NORM_EPS,
        ),
        quantizer=Lfq(num_bits=_shape(encoder, "conv_out.weight")[0]),
        decoder=cnn,
        num_kept=num_kept,
    )


def read_official(path: str | Path) -> State:
    """Read a state dict from safetensors, a plain torch file or a Lightning `.ckpt`.

    Torch files are read with `weights_only`: no code in them can run. When the file holds averaged
    weights (`model_ema.*`) they are taken, as the authors' evaluation does.

    Raises:
        ValueError: the file cannot be read, holds no encoder, or weights that are not finite.
    """
    state = read_state(path)
    averaged = _averaged(state)
    state = averaged or state
    if not any(name.startswith("encoder.") for name in state):
        raise ValueError(
            f"{path} holds no 'encoder.' weights but {sorted(state)[:5]}; it is not a checkpoint "
            "of the authors' tokenizer"
        )
    require_weights(
        {name: v for name, v in state.items() if name.startswith(("encoder.", "decoder."))},
        where=path,
    )
    return state


def read_state(path: str | Path) -> State:
    """The tensors in a safetensors or torch file; no code in it can run.

    Of a Lightning file they are its `state_dict`.

    Raises:
        ValueError: the file cannot be read, or holds no state dict of plain tensors.
    """
    path = Path(path)
    require_regular(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if reason := mistaken_for_weights(path):
        raise ValueError(f"{path} holds no weights: {reason}")
    found = _unpickled(path)
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} holds no state dict, but a {type(found).__name__}")
    state = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    for name, tensor in state.items():
        if not _is_plain(tensor):
            raise ValueError(f"{path} is damaged: {name} does not have its values in the file")
    return state


def _unpickled(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    """Content of a torch file.

    Raises:
        ValueError: it holds objects besides tensors, or is no torch file.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                claimed = sum(entry.file_size for entry in archive.infolist())
            if claimed > path.stat().st_size:
                raise ValueError(f"it would unpack to {claimed} bytes, and torch packs nothing")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} holds Python objects ({unsafe[1]}) besides weights, as files of Lightning "
                "do; loading those could run code, so they are not loaded. If you trust the file, "
                'take out its weights with: python -c "import torch; torch.save(torch.load('
                f"'{path}', map_location='cpu', weights_only=False)['state_dict'], 'weights.pt')\""
            ) from None
        raise ValueError(f"{path} is not a torch file, or is damaged") from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a torch file, or is damaged: {reason}") from error


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's values are all in memory, each once: not sparse, expanded or missing."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


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
    """State dict of a ViT: a folder with `model.safetensors`, or a model on Hugging Face.

    Raises:
        ValueError: it is not there, cannot be read, or has weights that are not finite.
    """
    file = resolve(path) / "model.safetensors"
    state = read_tensors(file)
    require_weights(state, where=file)
    return state


def initialize_from_dinov2(tokenizer: Tokenizer, state: State) -> None:
    """Fill the encoder's transformer blocks and class token from a larger DINOv2 ViT.

    LayerScale gains are taken too. Patch embedding, positions and final norm are not used.

    Args:
        tokenizer: changed in place.
        state: of `transformers.Dinov2Model` or of timm's `vit_*_dinov2`.

    Raises:
        ValueError: the ViT is smaller than the encoder, or its names are not known.
    """
    blocks = {
        re.sub(r"^blocks\.", "reducer.blocks.", k): v for k, v in _dinov2_blocks(state).items()
    }
    own = tokenizer.encoder.state_dict()
    wanted = [name for name in own if name.startswith(("reducer.blocks.", "class_token"))]
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
    """One more than the largest number a pattern captures in the names; 0 without any."""
    matches = [re.match(pattern, name) for name in state]
    return max((1 + int(match[1]) for match in matches if match), default=0)


def _shape(state: State, name: str, ndim: int | None = None) -> tuple[int, ...]:
    """Shape of a weight of the authors' architecture.

    Raises:
        ValueError: there is no such weight, or it has another number of dimensions.
    """
    shape = tuple(state[name].shape) if name in state else ()
    if not shape or min(shape) < 1 or len(shape) != (ndim or len(shape)):
        raise ValueError(
            f"{name} has the shape {shape} and must have {ndim or 'two or four'} dimensions; it is "
            "not a checkpoint of the authors' tokenizer"
        )
    return shape


def _rename(name: str) -> str:
    """Names that change alike in encoder and decoder."""
    for pattern, replacement in _BLOCK_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _encoder(state: State, config: TokenizerConfig) -> State:
    """The authors' encoder in our names."""
    num_blocks = None if isinstance(config.stem, PatchStem) else config.stem.num_res_blocks
    converted = {}
    for name, tensor in state.items():
        if name.startswith("dist_head."):
            continue
        if match := re.match(r"down\.(\d+)\.(block\.(\d+)|downsample)\.(.*)", name):
            level, _, block, rest = match.groups()
            first = 1 + int(level) * ((num_blocks or 0) + 1)
            position = first + ((num_blocks or 0) if block is None else int(block))
            new = f"stem.{position}.{rest}".replace("nin_shortcut", "shortcut")
        elif name.startswith("conv_in."):
            new = name.replace(
                "conv_in.", "stem." if isinstance(config.stem, PatchStem) else "stem.0."
            )
        elif name.startswith("conv_out."):
            new = name.replace("conv_out.", "to_latents.")
            tensor = tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor
        else:
            new = re.sub(r"^blocks\.", "reducer.blocks.", _rename(name))
            new = new.replace("norm_out.", "norm.")
        converted[new] = tensor.flatten() if new == "class_token" else tensor
    return converted


def _decoder(state: State, config: TokenizerConfig) -> State:
    """The authors' decoder in our names; our levels run from coarse to fine."""
    if not isinstance(config.decoder, CnnDecoder):
        raise ValueError(
            f"the authors' decoder is a CNN, not model.decoder.kind {config.decoder.kind}"
        )
    last = len(config.decoder.channel_mult) - 1
    converted = {}
    for name, tensor in state.items():
        if match := re.match(r"up\.(\d+)\.(block\.\d+|upsample)\.(.*)", name):
            level, part, rest = match.groups()
            part = part.replace("block.", "blocks.")
            new = _rename(f"levels.{last - int(level)}.{part}.{rest}").replace(
                "upsample.conv1", "upsample.conv"
            )
            if part == "upsample" and tensor.ndim > 0 and tensor.shape[0] % 4 == 0:
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
    """The head on the class token, from its 2 or 3 linear layers.

    Raises:
        ValueError: it is another architecture.
    """
    if not state:
        return None
    last = _count(state, r"^(\d+)\.") - 1
    num_layers = sum(name.endswith(".weight") and v.ndim == 2 for name, v in state.items())
    dim, out_dim = _shape(state, "0.weight", 2)[1], _shape(state, f"{last}.weight", 2)[0]
    weights = {f"layers.{name}": tensor for name, tensor in state.items()}
    head = build_for(
        lambda: AlignmentHead(dim, out_dim, 3 if num_layers == 3 else 2), weights, layers={}
    )
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
        parts = [converted[name] for name in names if name in converted]
        if len(parts) == 3 and len({part.shape for part in parts}) == 1:
            joint = query.replace(".attn.q.", ".attn.qkv.")
            converted[joint] = torch.cat([converted.pop(name) for name in names])
    return converted
