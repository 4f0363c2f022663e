"""Weights with which a tokenizer's codes are analytic, in closed form: nothing is distilled.

A fresh tokenizer knows nothing, and its codes are noise that encoder and decoder first have to
agree on. Here the encoder begins at `components.encode_analytic` and the decoder at
`Components.decode`, so training begins at pictures.

All channels of the encoder come in pairs (x, -x), so that layer norm and group norm find the mean 0
and only scale. The pairs are, in order, the leading components of a patch, the constant of the
merging keys, one free pair per bit, and positions (`stems.PlainStem`). Keys read the leading
components and the constant, so tokens merge as patches do; tokens that merge are averaged, as mean
patches are. Attention and MLPs write nothing but for the last MLP, which writes each bit as a
triangular wave of its component: it is 0 at the borders at which the Gray code flips that bit.

Shape letters: D bits, P numbers of a patch, Z borders.
"""

import itertools
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mergevq.config.parts import NUM_KEYS
from mergevq.nn.blocks import EncoderBlock
from mergevq.tokenizer.analytic.components import KEY_OFFSET, Components
from mergevq.tokenizer.decoders.patch import PatchDecoder
from mergevq.tokenizer.encoder import Encoder
from mergevq.tokenizer.reducers.merge import MergeBlock
from mergevq.tokenizer.stems import PlainStem

_SHARPNESS = 40.0
"""Slope inside the GELUs that bend a wave, so that each is straight where the wave crosses 0."""


class Wave(NamedTuple):
    """A bit as a function of a component."""

    component: int
    """Number of the component."""
    borders: Float[Tensor, "z"]
    """Ascending places at which the bit flips; below the first it is -1."""


class _Bend(NamedTuple):
    """A hidden unit of a wave: `slope * gelu(s * direction * (x - place)) / s` with a sharp s."""

    slope: float
    direction: float
    place: float


def waves(components: Components) -> list[Wave]:
    """Where each bit of analytic codes flips, in the order of the bits."""
    found = []
    for component, place in components.bits:
        levels = components.levels[component]
        middles = (levels[1:] + levels[:-1]) / 2
        num_bits = len(levels).bit_length() - 1
        # The Gray codes of n - 1 and n differ in the bit that is the lowest one set in n.
        lowest = num_bits - 1 - place
        found.append(Wave(component, middles[(1 << lowest) - 1 :: 2 << lowest].clone()))
    return found


@torch.no_grad()
def start_from_components(encoder: Encoder, components: Components) -> int:
    """Set an encoder to analytic codes.

    In float32 its codes are those of the mean patches of its own groups. With reducer `merge` its
    groups are those of `encode_analytic` but where two similarities are equal to the last digits.

    Args:
        encoder: a fresh one, with a patch stem without norm; a run with this start is
            checked for the rest (`TokenizerRun.init_codes`).
        components: of as many bits, and of patches of its size.

    Returns:
        Hidden units of the last MLP that are taken.

    Raises:
        ValueError: the encoder has too few channels or hidden units for these components.
    """
    config = encoder.config
    if not isinstance(encoder.stem, PlainStem):
        raise ValueError("an analytic start needs a patch stem without norm: model.stem.norm False")
    num_carried = config.num_carried
    last_used = max(component for component, _ in components.bits)
    if last_used >= num_carried or num_carried < NUM_KEYS:
        raise ValueError(
            f"model.stem.width ({config.dim}) leaves room for {num_carried} components, and bits "
            f"are of the first {max(last_used + 1, NUM_KEYS)}; widen it, or take fewer bits "
            f"({config.quantizer.dim})"
        )
    constant, first_bit = 2 * num_carried, 2 * num_carried + 2
    _fill_stem(encoder.stem, components, num_carried)
    blocks = [cast("MergeBlock | EncoderBlock", block) for block in encoder.reducer.blocks]
    for block in blocks:
        if isinstance(block, MergeBlock):
            _fill_keys(block, constant)
        for part in (block.attn.proj, block.mlp.fc2):
            part.weight.zero_()
            part.bias.zero_()
    encoder.to_latents.weight.zero_()
    encoder.to_latents.bias.zero_()
    for bit in range(config.quantizer.dim):
        # silu(x) - silu(-x) = x.
        encoder.to_latents.weight[bit, first_bit + 2 * bit] = 1
        encoder.to_latents.weight[bit, first_bit + 2 * bit + 1] = -1
    return _write_waves(blocks[-1], components, constant, first_bit)


def _fill_stem(stem: PlainStem, components: Components, num_carried: int) -> None:
    """Let the convolution give the leading components and the constant, each with its negative."""
    conv = stem.conv
    conv.weight.zero_()
    bias = torch.zeros(conv.out_channels)
    patch = (3, components.patch_size, components.patch_size)
    basis = components.basis[:, :num_carried]
    offset = components.mean @ basis
    end = 2 * num_carried
    conv.weight[0:end:2] = basis.mT.unflatten(1, patch)
    conv.weight[1:end:2] = -basis.mT.unflatten(1, patch)
    bias[0:end:2], bias[1:end:2] = -offset, offset
    bias[end], bias[end + 1] = KEY_OFFSET, -KEY_OFFSET
    cast("Tensor", conv.bias).copy_(bias)


def _fill_keys(block: MergeBlock, constant: int) -> None:
    """Let each head's key be the leading components and the constant; queries and values stay."""
    attention = block.attn
    dim = attention.proj.in_features
    head_dim = dim // attention.num_heads
    keys, bias = attention.qkv.weight[dim : 2 * dim], attention.qkv.bias[dim : 2 * dim]
    keys.zero_()
    bias.zero_()
    for head in range(attention.num_heads):
        for place, channel in enumerate([*range(0, 2 * NUM_KEYS, 2), constant]):
            keys[head * head_dim + place, channel] = 1


def _write_waves(
    block: MergeBlock | EncoderBlock, components: Components, constant: int, first_bit: int
) -> int:
    """Let a block's MLP write the wave of each bit into the bit's pair of channels.

    Returns:
        Hidden units taken, the first ones.

    Raises:
        ValueError: there are not as many.
    """
    bits = [(wave, _height(wave, components), _bends(wave)) for wave in waves(components)]
    fc1, fc2, gain = block.mlp.fc1, block.mlp.fc2, block.ls2.gamma
    needed = sum(len(bends) for _, _, bends in bits)
    if needed > fc1.out_features:
        raise ValueError(
            f"the waves of {len(bits)} bits need {needed} hidden units, and the MLP has "
            f"{fc1.out_features}, 4 for each of model.stem.width; widen it, or take fewer bits"
        )
    unit = 0
    for bit, (wave, height, bends) in enumerate(bits):
        channel = first_bit + 2 * bit
        for bend in bends:
            slope = bend.direction * _SHARPNESS
            fc1.weight[unit] = 0
            fc1.bias[unit] = 0
            # The place is measured in constants, as the norm scales them with the component.
            fc1.weight[unit, 2 * wave.component] = slope
            fc1.weight[unit, constant] = -slope * bend.place / KEY_OFFSET
            share = bend.slope / (_SHARPNESS * height)
            fc2.weight[channel, unit] = share / gain[channel]
            fc2.weight[channel + 1, unit] = -share / gain[channel + 1]
            unit += 1
    return unit


def _bends(wave: Wave) -> list[_Bend]:
    """Hidden units whose sum rises through the first border, falls through the second, and so on.

    The first two make the straight line x - border: gelu(x) - gelu(-x) = x.
    """
    first = float(wave.borders[0])
    bends = [_Bend(1.0, 1.0, first), _Bend(-1.0, -1.0, first)]
    tops = ((wave.borders[1:] + wave.borders[:-1]) / 2).tolist()
    return bends + [_Bend(2.0 if i % 2 else -2.0, 1.0, top) for i, top in enumerate(tops)]


def _height(wave: Wave, components: Components) -> float:
    """A typical height of a wave, by which it is divided so that all bits' are about as high.

    Raises:
        ValueError: the component hardly varies, so the wave has none.
    """
    gaps = wave.borders.diff()
    gaps = gaps[gaps > 0]
    height = gaps.median() / 2 if len(gaps) else components.levels[wave.component].abs().mean()
    if not height > 0:
        raise ValueError(
            f"component {wave.component} of the images' patches has the one level "
            f"{float(components.levels[wave.component][0]):g} and was given a bit: the images are "
            "too much alike for an analytic start; set init_codes to random"
        )
    return float(height)


@torch.no_grad()
def start_decoder_from_components(decoder: PatchDecoder, components: Components) -> None:
    """Let a decoder give what `Components.decode` gives, and its blocks add nothing yet.

    Args:
        decoder: a fresh one, whose `bit_components` are those of the components.
        components: of as many bits, and of patches of its size.

    Raises:
        ValueError: the decoder has no way from products of bits to pixels.
    """
    if decoder.skip is None:
        raise ValueError(
            "an analytic start needs a decoder with decoder.bit_components: "
            f"{[component for component, _ in components.bits]}"
        )
    decoder.conv_out.weight.zero_()
    cast("Tensor", decoder.conv_out.bias).zero_()
    linear = decoder.skip.linear
    weight = torch.zeros(linear.out_features, linear.in_features)
    bias = components.mean.clone()
    rows = {subset: row for row, subset in enumerate(decoder.skip.subsets)}
    for group in dict.fromkeys(_group(components, component) for component, _ in components.bits):
        direction = components.basis[:, components.bits[group[0]][0]]
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(group))))
        codes = torch.ones(len(signs), len(components.bits))
        codes[:, list(group)] = signs
        # Whatever the other components are at, the projection leaves it out.
        values = (components.decode(codes) - components.mean) @ direction
        for subset in (subset for subset in rows if set(subset) <= set(group)):
            # Products of signs are orthogonal: the mean of a function times one is its coefficient.
            coefficient = (values * codes[:, list(subset)].prod(-1)).mean()
            weight[:, rows[subset]] = coefficient * direction
        # Levels need not have the mean 0 over all signs.
        bias = bias + values.mean() * direction
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def _group(components: Components, component: int) -> tuple[int, ...]:
    """Bits of a component, the most significant one first."""
    return tuple(bit for bit, (other, _) in enumerate(components.bits) if other == component)
