"""Helpers that the tests of `mergevq.tokenizer.tokenizer` share."""

from tests.support.parts import tokenizer_config

# 64 tokens of an image of 32 pixels, in each of the paper's three versions.
G = tokenizer_config(
    image_size=32,
    channels=8,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    num_layers=6,
    num_heads=2,
    layer_scale=0.5,
    num_kept=20,
    num_bits=6,
    num_decoder_layers=1,
    num_decoder_heads=2,
    source_dim=16,
    num_source_heads=2,
)
