"""A recipe for 128-pixel images."""

from dataclasses import replace

from mergevq.config.parts import CnnDecoder, CnnStem, Merge, Unmerge
from mergevq.config.recipes.imagenet256 import imagenet256_g, imagenet256_gr, imagenet256_r
from mergevq.config.recipes.tiny64 import tiny64_gr
from mergevq.config.tokenizer import KeptConfig, TokenizerConfig, with_cnn
from mergevq.config.training import TokenizerRun


def images128_gr() -> TokenizerRun:
    """Your own images at 128 pixels, version G+R: f=8, 144 of 256 tokens.

    Hardware and time: not measured, 100,000 steps of 64 images. Expected: not measured.
    """
    run = tiny64_gr()
    return replace(
        run,
        model=TokenizerConfig(
            image_size=128,
            stem=CnnStem(channel_mult=(1, 2, 4, 4), num_res_blocks=2),
            reducer=Merge(num_layers=8, num_heads=4, layer_scale=0.1),
            expander=Unmerge(dim=256),
            decoder=CnnDecoder(
                channel_mult=(1, 2, 4, 4),
                num_res_blocks=2,
                num_layers=8,
                num_heads=4,
                layer_scale=0.1,
            ),
            num_kept=144,
        ),
        teacher=replace(run.teacher, view_size=96, num_prototypes=1024),
        optim=replace(run.optim, lr=2e-4, warmup_steps=1000),
        loss=replace(
            run.loss,
            perceptual_trunk="vgg",
            discriminator_channels=64,
            discriminator_start_step=0,
            adversarial_start_step=5000,
            adversarial_ramp_steps=5000,
        ),
        train=replace(run.train, num_steps=100_000),
        out="runs/images128_gr",
    )


def imagenet128_gr() -> TokenizerRun:
    """ImageNet at 128 pixels for 30 epochs, version G+R: f=8, 144 of 256 tokens.

    The paper's short schedule, of which Table 4 is by the size of its numbers. Each of its rows
    trains on one K (256, 196, 144, 100, 64, 36): `--kept.candidates K --model.num-kept K`.
    Hardware and time: not measured, 150,000 steps of 256 images. Expected: rFID 3.07, linear probe
    51.0 at 144 tokens; 8.94 and 52.1 at 36 (paper, Table 4).
    """
    run = imagenet256_gr()
    return replace(
        run,
        model=replace(with_cnn(run.model, channel_mult=(1, 2, 4, 8)), image_size=128),
        kept=KeptConfig(candidates=(144,)),
        # As many cells in the view as 224 pixels have where a cell is 16 wide.
        teacher=replace(run.teacher, view_size=112),
        # 30 epochs of 1,281,167 images at batch 256.
        train=replace(run.train, num_steps=150_000, eval_num_kept=(36, 64, 100, 144, 196, 256)),
        out="runs/imagenet128_gr",
    )


def imagenet128_g() -> TokenizerRun:
    """ImageNet at 128 pixels for 30 epochs, version G: f=8, 144 of 256 tokens.

    As `imagenet128_gr`, in the alignment of version G. Hardware and time: not measured, 150,000
    steps of 256 images. Expected: rFID 2.03 at 144 tokens, 4.74 at 64 (paper, Table 4).
    """
    run, full = imagenet128_gr(), imagenet256_g()
    return replace(
        run,
        loss=full.loss,
        teacher=replace(run.teacher, num_head_layers=2),
        out="runs/imagenet128_g",
    )


def imagenet128_r() -> TokenizerRun:
    """ImageNet at 128 pixels for 30 epochs, version R: patches of 8 pixels, 36 of 256 tokens.

    As `imagenet128_gr`. Hardware and time: not measured, 150,000 steps of 256 images. Expected:
    linear probe 54.3 at 36 tokens, 52.5 at 144 (paper, Table 4).
    """
    run, full = imagenet128_gr(), imagenet256_r()
    return replace(
        run,
        model=replace(
            full.model,
            image_size=128,
            stem=replace(full.model.stem, patch_size=8),
            decoder=run.model.decoder,
        ),
        kept=KeptConfig(candidates=(36,)),
        loss=full.loss,
        init_vit=full.init_vit,
        optim=full.optim,
        out="runs/imagenet128_r",
    )
