"""A tokenizer of ours in the names of the authors' code."""

import re

_BLOCKS = (
    (r"^(reducer\.)?blocks\.", "attn.blocks."),
    (r"^class_token$", "attn.cls_token"),
    (r"^position\.", "attn.pos_embed."),
    (r"\.shortcut\.", ".nin_shortcut."),
)


def official_state(tokenizer):
    """Encoder and decoder as a state dict that `tokenizer.interop.load_official` understands."""
    config = tokenizer.config
    state = {}
    for name, tensor in tokenizer.encoder.state_dict().items():
        state[f"encoder.{_encoder_name(name, config)}"] = tensor
    for name, tensor in tokenizer.decoder.state_dict().items():
        if ".upsample." in name:
            tensor = tensor.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)
        state[f"decoder.{_decoder_name(name, config)}"] = tensor
    state["encoder.attn.cls_token"] = state["encoder.attn.cls_token"][None, None]
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def _renamed(name):
    for pattern, replacement in _BLOCKS:
        name = re.sub(pattern, replacement, name)
    return name


def _encoder_name(name, config):
    if config.stem.kind == "patch":
        name = re.sub(r"^stem\.", "conv_in.", name)
    if match := re.match(r"stem\.(\d+)\.(.*)", name):
        position, rest = int(match[1]) - 1, match[2].replace("shortcut", "nin_shortcut")
        if position < 0:
            return f"conv_in.{rest}"
        level, block = divmod(position, config.stem.num_res_blocks + 1)
        part = "downsample" if block == config.stem.num_res_blocks else f"block.{block}"
        return f"down.{level}.{part}.{rest}"
    name = re.sub(r"^to_latents\.", "conv_out.", re.sub(r"^norm\.", "norm_out.", name))
    return _renamed(name)


def _decoder_name(name, config):
    last = len(config.decoder.channel_mult) - 1
    if match := re.match(r"levels\.(\d+)\.(blocks\.\d+|upsample|norm)\.(.*)", name):
        level, part, rest = last - int(match[1]), match[2], match[3]
        if part == "norm":
            rest = rest.replace("gain.", "gamma.").replace("shift.", "beta.")
            return f"adaptive.{level}.{rest}"
        rest = rest.replace("conv.", "conv1.") if part == "upsample" else rest
        return _renamed(f"up.{level}.{part.replace('blocks', 'block')}.{rest}")
    return _renamed(name)
