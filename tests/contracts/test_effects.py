"""Every setting of every run has an effect, or is named here with the reason why it has none.

A small run is done twice, the second time with one setting changed: what it writes and measures
must differ. Settings are read off their classes, so that a new one without an effect fails. A run
that refuses the change has seen it, so that counts as well.
"""

import hashlib
import json
import typing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mergevq.config.evaluation import (
    GenerationSettings,
    ReconstructionSettings,
    RobustnessSettings,
    Subject,
)
from mergevq.config.generator import (
    SampleRun,
    SamplingSettings,
)
from mergevq.config.objective import SelfDistillation
from mergevq.config.probing import FeatureConfig, FinetuneConfig, KnnConfig, LinearConfig, ProbeRun
from mergevq.config.recipes.digits import digits32, digits32_ar
from mergevq.config.records import GuidanceSettings
from mergevq.config.training import DataConfig, GeneratorRun, SourceRun, TokenizerRun, TokensConfig
from mergevq.evaluate.generation import evaluate_generation
from mergevq.evaluate.guidance_sweep import evaluate_guidance
from mergevq.evaluate.probe import linear
from mergevq.evaluate.probe import run as probing
from mergevq.evaluate.reconstruction import evaluate_reconstruction
from mergevq.evaluate.robustness.run import evaluate_robustness
from mergevq.generator.build import load_generator, save_generator
from mergevq.metrics.lpips import Perceptual
from mergevq.metrics.references import make_reference
from mergevq.runtime.artefacts import tokens_hash
from mergevq.tokenizer.encode import encode
from mergevq.training import fit
from mergevq.training import generator as training_generator
from mergevq.training import tokenizer as train_tokenizer
from mergevq.training.posthoc import source as train_source
from tests.support.leaves import changed, leaf_kinds, replaced, with_parts_of
from tests.support.small import shrink, shrink_generator

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

# ------------------------------------------------------------------------------ small bases

TRAIN = {
    "num_steps": 4,
    "log_every": 1,
    "eval_every": 2,
    "image_every": 2,
    "save_every": 2,
    "keep_last": 1,
    "precision": "float32",
    "device": "cpu",
}


def tokenizer_run(folder):
    """All parts take part: an adversary, and a teacher that is an average of the encoder."""
    small = shrink(digits32())
    return replace(
        small,
        data=DataConfig(path=str(folder / "images"), val_fraction=0.3, num_workers=0),
        loss=replace(
            small.loss,
            adversarial_weight=0.1,
            adversarial_start_step=1,
            adversarial_ramp_steps=1,
            discriminator_channels=8,
        ),
        teacher=SelfDistillation(view_size=24, num_head_layers=2, num_prototypes=16),
        optim=replace(small.optim, warmup_steps=1),
        train=replace(small.train, **TRAIN),
    )


def generator_run(folder):
    """A generator of order `merge`, guided so much that pictures show settings of sampling."""
    small = shrink_generator(digits32_ar())
    return replace(
        small,
        tokens=TokensConfig(
            path=str(folder / "tokens"), tokenizer=str(folder / "tokenizer"), val_fraction=0.3
        ),
        optim=replace(small.optim, warmup_steps=1, lr=3e-2),
        train=replace(small.train, **TRAIN),
        sampling=SamplingSettings(guidance_scale=8.0),
    )


def source_run(folder):
    return SourceRun(
        tokenizer=str(folder / "tokenizer"),
        tokens=str(folder / "tokens"),
        generator=str(folder / "random"),
        num_passes=3,
        num_steps=3,
        batch_size=4,
        num_eval_images=4,
        val_fraction=0.3,
        num_kept=(16, 24),
        optim=replace(SourceRun().optim, ema_decay=0.5),
        precision="float32",
        device="cpu",
    )


def probe_run(method):
    def make(folder):
        return ProbeRun(
            model=str(folder / "tokenizer"),
            out="",
            method=method,
            data=DataConfig(path=str(folder / "images"), val_fraction=0.3, num_workers=0),
            features=FeatureConfig(num_kept=(16,), stages=("merged",), pools=("mean",), pca_dim=3),
            device="cpu",
        )

    return make


def subject(folder):
    return Subject(
        model=str(folder / "tokenizer"),
        data=str(folder / "images"),
        lpips=str(folder / "lpips"),
        lpips_trunk="squeeze",
        extractor=str(folder / "colours.pt"),
        max_images=8,
        device="cpu",
        num_workers=0,
    )


def reconstruction_settings(folder):
    return ReconstructionSettings(
        subject=subject(folder), out="", num_shown=2, num_baseline_images=2
    )


def robustness_settings(folder):
    return RobustnessSettings(subject=subject(folder), out="", fractions=(0.0, 0.5))


def generation_settings(folder):
    return GenerationSettings(
        reference=str(folder / "reference.npz"),
        extractor=str(folder / "colours.pt"),
        out="",
        data=str(folder / "images"),
        num_looked_up=2,
        batch_size=4,
        device="cpu",
        run=SampleRun(
            model=str(folder / "merge"),
            tokenizer=str(folder / "tokenizer"),
            num_images=6,
            batch_size=3,
            device="cpu",
            settings=SamplingSettings(guidance_scale=8.0),
        ),
    )


def guidance_settings(folder):
    return GuidanceSettings(evaluation=generation_settings(folder), stop=9.0, step=0.5)


LINEAR = LinearConfig(rates=(1e-2, 1e-1), num_epochs=3, batch_size=8)
FINETUNE = FinetuneConfig(num_epochs=2, batch_size=4, precision="float32", linear=LINEAR)


class Kind(typing.NamedTuple):
    """One kind of run."""

    base: object
    """Makes the run, from the folder of the material."""
    do: object
    """Does it; what it returns is compared too."""
    leaves: dict
    """Type by name of each setting."""
    out: str = "out"
    """Name of the setting that says where it writes."""


def with_part(cls, name, part):
    """The settings of a class of which one has one of several classes."""
    inside = {f"{name}.{leaf}": kind for leaf, kind in leaf_kinds(part).items()}
    return leaf_kinds(cls, skip=(name,)) | inside


KINDS = {
    "tokenizer": Kind(tokenizer_run, train_tokenizer.train, leaf_kinds(TokenizerRun)),
    "generator": Kind(generator_run, training_generator.train, leaf_kinds(GeneratorRun)),
    "source": Kind(source_run, train_source.finetune_source, leaf_kinds(SourceRun)),
    "linear": Kind(probe_run(LINEAR), probing.probe, with_part(ProbeRun, "method", LinearConfig)),
    "knn": Kind(
        probe_run(KnnConfig(num_neighbours=(3,), temperature=1.0)),
        probing.probe,
        with_part(ProbeRun, "method", KnnConfig),
    ),
    "finetune": Kind(
        probe_run(FINETUNE), probing.probe, with_part(ProbeRun, "method", FinetuneConfig)
    ),
    "reconstruction": Kind(
        reconstruction_settings, evaluate_reconstruction, leaf_kinds(ReconstructionSettings)
    ),
    "robustness": Kind(robustness_settings, evaluate_robustness, leaf_kinds(RobustnessSettings)),
    "generation": Kind(
        generation_settings, evaluate_generation, with_part(GenerationSettings, "run", SampleRun)
    ),
    "guidance": Kind(
        guidance_settings,
        evaluate_guidance,
        # What a sweep has beside the settings of each evaluation, which are above.
        leaf_kinds(GuidanceSettings, skip=("evaluation",))
        | {"evaluation.out": str, "evaluation.run.settings.guidance_scale": float},
        out="evaluation.out",
    ),
}

# ------------------------------------------------------------------- what a setting needs, or lacks

PLAIN = {"model.stem[patch].norm": False, "model.stem[patch].width": 96}
GAUSSIAN = {"kept.distribution": "gaussian"}
HUB = {"teacher[huggingface].path": "@dinov2", "teacher[huggingface].teacher_size": 28}
SCRIPT = {"teacher[torchscript].path": "@colours.pt", "teacher[torchscript].teacher_size": 28}
FROZEN = {
    leaf: needs
    for kind, needs in (("huggingface", HUB), ("torchscript", SCRIPT))
    for leaf in leaf_kinds(TokenizerRun)
    if leaf.startswith(f"teacher[{kind}].")
}
PERCEPTUAL = {
    "loss.perceptual_weight": 1.0,
    "loss.perceptual_trunk": "squeeze",
    "loss.perceptual_path": "@lpips",
}
RANDOM = {"model.order.kind": "random"}
MASKED = {"model.order.kind": "masked"}
SPLIT = {"model.order[masked].visible_weight": 0.0}
ENAT = SPLIT | {"model.order[masked].disentangle": True}
RASTER = {
    "model.order.kind": "raster",
    "model.num_kept": 64,
    "model.kept_candidates": (64,),
    "kept.candidates": (64,),
}
OPTIM = {
    "optim.milestones": {"optim.schedule": "step"},
    "optim.final_lr_ratio": {"optim.schedule": "cosine"},
}
OVERFLOW = {"optim.lr": 1000.0, "optim.clip_norm": None, "train.num_steps": 12}
OVERFLOW |= {f"train.{name}_every": 12 for name in ("eval", "image", "save")}
KEPT = {
    "kept.rate": {"kept.distribution": "exponential"},
    "kept.mean": GAUSSIAN,
    "kept.std": GAUSSIAN,
    "kept.floor": GAUSSIAN,
}
VISION = {"distillation[semantic].teacher[huggingface].path": "@dinov2"}
STARTED = {"init_from": "@tokenizer"}
PERTURB = {"regularizer[perturb].image_share": 1.0}
NEEDS = {
    "tokenizer": {
        **OPTIM,
        **KEPT,
        # Of a few images a tenth may be none; of 8 bits 100 and 108 near codes are one radius.
        **{
            f"regularizer[perturb].{name}": PERTURB
            for name in ("token_share", "num_near", "fall", "final_ratio")
        },
        **{
            f"model.condition[class].{name}": {"model.condition[class].num_classes": 2}
            for name in ("num_classes", "sees", "dropout")
        },
        "model.stem[patch].norm_eps": {"model.stem[patch].position_embedding": True},
        "init_codes": PLAIN,
        "loss.recovered_start_step": {"loss.recovered_share": 0.5},
        **FROZEN,
        **{
            f"distillation[semantic].teacher[huggingface].{name}": VISION
            for name in ("path", "teacher_size")
        },
        **{
            f"distillation[preserve].{name}": STARTED
            for name in ("preserve_weight", "beta", "every")
        },
        "loss.perceptual_weight": PERCEPTUAL,
        "loss.perceptual_trunk": PERCEPTUAL,
        "loss.perceptual_path": PERCEPTUAL,
        "loss.gram.weight": PERCEPTUAL,
        "loss.gram.num_taps": PERCEPTUAL | {"loss.gram.weight": 1.0},
        "train.save_every": {"train.keep_last": 4},
        # A finished run keeps one checkpoint more than that, so there must be three.
        "train.keep_last": {"train.save_every": 1},
        "train.max_nonfinite": OVERFLOW,
    },
    "generator": {
        **OPTIM,
        **KEPT,
        "model.kept_candidates": RASTER,
        "model.order[raster].annealing": RASTER,
        "model.order[masked].disentangle": SPLIT,
        "model.order[masked].num_decoder_layers": ENAT,
        "model.order[masked].reuse": ENAT,
        "model.head[bits].visible_weight": {"model.head[bits].masking": "mixed"},
        "sampling.passes.kind": RANDOM,
        "sampling.passes[several].num_steps": RANDOM,
        "sampling.passes[several].schedule": MASKED,
        "sampling.passes[several].confidence_temperature": MASKED,
        "sampling.bits_order": {
            "model.head[bits].masking": "mixed",
            "sampling.passes[one].budget": False,
        },
        "sampling.guidance_power": {"sampling.guidance_schedule": "power"},
        "train.save_every": {"train.keep_last": 4},
        # A finished run keeps one checkpoint more than that, so there must be three.
        "train.keep_last": {"train.save_every": 1},
        "train.max_nonfinite": OVERFLOW,
    },
    "source": OPTIM,
    "robustness": {"joint": {"map_fractions": (0.5,)}},
    "generation": {
        "run.settings.bits_order": {
            "run.model": "@bits",
            "run.settings.passes[one].budget": False,
        },
        "run.settings.guidance_power": {"run.settings.guidance_schedule": "power"},
        "run.settings.passes.kind": {"run.model": "@random"},
        "run.settings.passes[several].num_steps": {"run.model": "@random"},
        "run.settings.passes[several].schedule": {"run.model": "@masked"},
        "run.settings.passes[several].confidence_temperature": {"run.model": "@masked"},
        "run.keep_from": {"run.model": "@random", "run.keep_from": "@a.png", "run.mask": "@b.png"},
        "run.mask": {"run.model": "@random", "run.keep_from": "@a.png", "run.mask": "@b.png"},
    },
}
"""Changes to the base without which a setting has no meaning."""
TOO_FEW = 44 * 36 - 1
"""Pixels, for the pictures below."""
VALUES = {
    "tokenizer": {
        "train.precision": "bf16",
        "model.image_size": 24,
        "optim.ema_decay": 0.05,
        "train.num_eval_images": 2,
        "train.max_nonfinite": 2,
        "model.reducer[merge].norm_eps": 0.01,
        "model.decoder[cnn].norm_eps": 0.01,
        "model.stem[patch].norm_eps": 0.01,
        "model.quantizer[grouped_lfq].num_bits": 16,
        "model.quantizer[grouped_lfq].group_bits": 4,
        "model.quantizer[scales].scales": (1, 3, 8),
        "model.decoder[patch].blocks": "ac",
        "model.decoder[patch].bit_components": (0, 1, 2, 3) * 2,
        "regularizer[perturb].image_share": 1.0,
        "regularizer[perturb].num_near": 400,
        "model.condition[class].dropout": 0.9,
        "kept.rate": 0.01,
        "kept.mean": 9.0,
        "kept.std": 90.0,
        "kept.floor": 9.0,
        "data.path": "@others",
        "data.val_path": "@others",
        "data.max_pixels": TOO_FEW,
        "loss.perceptual_path": "@lpips-2",
        "teacher[huggingface].path": "@dinov2-2",
        "teacher[huggingface].teacher_size": 42,
        "teacher[torchscript].path": "@colours-2.pt",
        "teacher[torchscript].loss[dino].teacher_temperature": 90.0,
        "distillation[semantic].teacher[huggingface].path": "@dinov2-2",
        "distillation[semantic].teacher[huggingface].teacher_size": 42,
        "distillation[semantic].teacher[tokenizer].path": "@tokenizer-2",
        "distillation[semantic].teacher[tokenizer].layer": 1,
        "distillation[preserve].every": 2,
        "init_from": "@tokenizer",
        "init_vit": "@dinov2",
        "optim.milestones": (0.5, 0.75),
        "optim.base_batch_size": 8,
        "train.max_minutes": 1e-6,
    },
    "generator": {
        "train.precision": "bf16",
        "model.num_kept": 24,
        "model.head[subindices].sizes": (4, 64),
        "model.head[independent].sizes": (4, 64),
        "model.head[bits].sizes": (4,) * 4,
        "model.head[bits].schedule": (4, 4),
        "optim.ema_decay": 0.05,
        "train.eval_num_kept": (24,),
        "train.max_nonfinite": 2,
        "kept.rate": 0.01,
        "kept.mean": -9.0,
        "kept.std": 90.0,
        "kept.floor": 9.0,
        "model.kept_candidates": (),
        "tokens.path": "@tokens-2",
        "tokens.tokenizer": "@tokenizer-2",
        "init_from": "@merge",
        "optim.milestones": (0.5, 0.75),
        "optim.base_batch_size": 8,
        "train.max_minutes": 1e-6,
    },
    "source": {
        "precision": "bf16",
        "tokenizer": "@tokenizer-2",
        "tokens": "@tokens-2",
        "generator": "@random-2",
        "optim.milestones": (0.34, 0.67),
        "optim.base_batch_size": 8,
        "num_kept": (16,),
        "num_passes": 16,
        "optim.schedule": "cosine",
        "optim.ema_decay": 0.05,
        "optim.clip_norm": 1e-3,
    },
}
PROBE_VALUES = {
    "model": "@tokenizer-2",
    "data.path": "@others",
    "data.val_path": "@others",
    "data.max_pixels": TOO_FEW,
    "features.num_kept": (24,),
    "features.layers": (1, 2),
    "max_images": 8,
    "features.pixel_side": 8,
    "precision": "bf16",
    "method.precision": "bf16",
    "method.held_out_fraction": 0.5,
    "method.linear.held_out_fraction": 0.5,
    "method.linear.batch_size": None,
    "method.clip_norm": 1e-3,
    "method.erasing": 1.0,
}
SUBJECT_VALUES = {
    "subject.precision": "bf16",
    "subject.model": "@tokenizer-2",
    "subject.data": "@others",
    "subject.max_pixels": TOO_FEW,
    "subject.lpips": "@lpips-2",
    "subject.extractor": "@colours-2.pt",
    "reference": "@pairs.npz",
}
VALUES |= dict.fromkeys(("linear", "knn", "finetune"), PROBE_VALUES)
VALUES["linear"] = PROBE_VALUES | {"method.batch_size": None}
VALUES |= dict.fromkeys(("reconstruction", "robustness"), SUBJECT_VALUES)
VALUES["generation"] = {
    "reference": "@reference-2.npz",
    "extractor": "@colours-2.pt",
    "classifier": "@colours.pt",
    "data": "@others",
    "val_data": "@others",
    "max_pixels": TOO_FEW,
    "samples": "@others",
    "run.model": "@merge-2",
    "run.tokenizer": "@tokenizer-2",
    "run.classes": (1,),
    "run.num_kept": 24,
    "run.keep_from": "@b.png",
    "run.mask": "@a.png",
}
VALUES["guidance"] = {"stop": 8.5, "evaluation.run.settings.guidance_scale": 8.5}
"""Values to change to, where the first value that comes to mind would not do."""
TOGETHER = {
    ("tokenizer", "model.stem[patch].patch_size"): {
        "model.stem[patch].patch_size": 8,
        "model.decoder.kind": "patch",
        "model.image_size": 64,
    },
    ("tokenizer", "distillation[semantic].teacher.kind"): VISION,
    ("generator", "model.grid_size"): {"model.grid_size": (4, 16)},
    ("generation", "samples"): {"samples": "@others", "run": None},
    ("generation", "classifier_outputs"): {
        "classifier": "@colours.pt",
        "classifier_outputs": (2, 0),
    },
}
"""Changes that need another beside them."""
_WORKERS = "loads in other processes, and loads the same"
_DEVICE = "says where, and this machine may have one place"
_AT_ONCE = "says how many images at once, and each is measured alone"
_PLACE = "says where, and all of these runs are read from there"
_DRAFT = "gives the same images in other passes: generator/drafts"
NO_EFFECT = {
    ("tokenizer", "model.kept_range"): "training writes it",
    ("tokenizer", "model.quantizer[dimensions].channel_order"): "numbers parts: test_dimensions",
    **{
        ("tokenizer", f"model.condition[text].{name}"): "is refused: texts come from Python"
        for name in ("dim", "num_embeddings", "num_bytes", "sees", "dropout")
    },
    ("tokenizer", "data.num_workers"): _WORKERS,
    ("tokenizer", "data.reduced_jpeg"): "is for larger photographs: data/test_batches",
    ("tokenizer", "data.cache"): "keeps the same pixels elsewhere: data/test_cached",
    ("tokenizer", "train.device"): _DEVICE,
    ("tokenizer", "train.checkpointing"): "saves memory, which test_estimate measures",
    ("generator", "model.order[merge].flex_attention"): "is for CUDA",
    ("generator", "model.order[holistic].num_holistic"): "is the tokens': orders/test_holistic",
    ("generator", "model.order[scale].scales"): "is the tokenizer's: orders/test_scale",
    ("generator", "model.order[scale].code_dim"): "is the tokenizer's: orders/test_scale",
    ("generator", "train.device"): _DEVICE,
    ("generator", "parallel"): "is for several processes",
    ("generator", "train.checkpointing"): "saves memory",
    ("tokenizer", "train.compile"): "saves time",
    ("source", "device"): _DEVICE,
    **{(kind, "data.num_workers"): _WORKERS for kind in ("linear", "knn", "finetune")},
    **{(kind, "device"): _DEVICE for kind in ("linear", "knn", "finetune", "generation")},
    **{(kind, each.out): _PLACE for kind, each in KINDS.items()},
    **{
        (kind, f"data.{name}"): "is refused: probes see centre squares of whole pictures"
        for kind in ("linear", "knn", "finetune")
        for name in ("crop", "flip", "cache", "reduced_jpeg")
    },
    **{(kind, "features.batch_size"): _AT_ONCE for kind in ("linear", "knn", "finetune")},
    **{(kind, "subject.batch_size"): _AT_ONCE for kind in ("reconstruction", "robustness")},
    ("generation", "batch_size"): _AT_ONCE,
    ("generation", "run.batch_size"): _AT_ONCE,
    ("finetune", "features.stages"): "fine-tuning has a stage of its own",
    ("finetune", "features.pools"): "fine-tuning has a pool of its own",
    ("finetune", "features.layers"): "fine-tuning trains all blocks",
    **{
        (kind, f"subject.{name}"): reason
        for kind in ("reconstruction", "robustness")
        for name, reason in (("device", _DEVICE), ("num_workers", _WORKERS))
    },
    ("generation", "run.device"): _DEVICE,
    ("generation", "run.draft_generator"): _DRAFT,
    **{
        (kind, f"{where}.passes[drafted].{name}"): _DRAFT
        for kind, where in (("generator", "sampling"), ("generation", "run.settings"))
        for name in ("draft", "num_drafted")
    },
}
"""Settings that change no number and no file, and why."""


# ------------------------------------------------------------------------------------ material


class Colours(nn.Module):
    """Five features of an image, and the softmax of three of them as classes."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        means = images.mean([2, 3]) * self.scale
        if return_features:
            return torch.cat([means, images.std([2, 3])[:, :2]], 1)
        return torch.softmax(means / 16, -1)


def pictures(folder, count, first_seed):
    """Smooth pictures of two classes, wider than high."""
    for number in range(count):
        place = folder / ("even", "odd")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(first_seed + number).integers(0, 256, (4, 5, 3), np.uint8)
        image = Image.fromarray(coarse).resize((44, 36), Image.Resampling.BICUBIC)
        image.save(place / f"{number:03d}.png")


def vision_model(folder, seed):
    """A tiny random DINOv2 in the format of the real one."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(seed)
    model = Dinov2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


def perceptual_weights(folder, seed):
    """Random weights of two trunks."""
    folder.mkdir()
    for trunk in ("squeeze", "alex"):
        numbers = torch.Generator().manual_seed(seed)
        state = {
            name: torch.rand(tensor.shape, generator=numbers) * 0.1
            for name, tensor in Perceptual(trunk).state_dict().items()
        }
        save_file(state, folder / f"lpips_{trunk}.safetensors")


def scatter(directory, tokenizer, seed):
    """Let a generator of a few steps tell its inputs apart as a trained one does."""
    generator = load_generator(directory)
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=numbers))
    save_generator(
        generator, directory, tokenizer=tokens_hash(tokenizer), class_names=("even", "odd")
    )


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Two of everything that a setting names."""
    folder = tmp_path_factory.mktemp("material")
    with pytest.MonkeyPatch.context() as patch:
        without_plots(patch)
        for number, suffix in enumerate(("", "-2")):
            pictures(folder / ("images", "others")[number], 16, 50 * number)
            vision_model(folder / f"dinov2{suffix}", number)
            perceptual_weights(folder / f"lpips{suffix}", number)
            torch.jit.script(Colours(scale=1.0 + number)).save(folder / f"colours{suffix}.pt")
            small = replaced(
                tokenizer_run(folder),
                {"out": str(folder / f"run{suffix}"), "train.seed": number, "optim.lr": 1e-2},
            )
            train_tokenizer.train(small).rename(folder / f"tokenizer{suffix}")
            encode(
                folder / f"tokenizer{suffix}",
                str(folder / "images"),
                folder / f"tokens{suffix}",
                num_kept=(16, 24, 64),
                num_workers=0,
                device="cpu",
            )
            for name in ("merge", "random", "masked", "bits"):
                # All of the first tokenizer, so that one may stand in the other's place.
                made = {"train.seed": number, "train.num_steps": 8}
                made["model.head.kind" if name == "bits" else "model.order.kind"] = name
                made["out"] = str(folder / f"run-{name}{suffix}")
                done = training_generator.train(replaced(generator_run(folder), made))
                scatter(done, folder / "tokenizer", number)
                done.rename(folder / f"{name}{suffix}")
            make_reference(
                str(folder / ("images", "others")[number]),
                folder / f"reference{suffix}.npz",
                "generation",
                extractor=folder / "colours.pt",
                image_size=32,
                num_features=12,
                batch_size=4,
                device="cpu",
            )
    make_reference(
        str(folder / "images"),
        folder / "pairs.npz",
        "reconstruction",
        extractor=folder / "colours.pt",
        image_size=32,
        max_images=8,
        batch_size=4,
        device="cpu",
    )
    Image.open(folder / "images/even/000.png").save(folder / "a.png")
    half = np.zeros((36, 44, 3), np.uint8)
    half[:18] = 255
    Image.fromarray(half).save(folder / "b.png")
    return folder


# -------------------------------------------------------------------------------------- outcomes


OWN_WORDS = {"run.json", "config.json", "probe.json", "evaluation.json"}
"""Files that repeat the settings."""
ECHOES = {"settings", "run", "environment", "command", "path", "array", "config"}
"""Entries that repeat the settings, or say where and when."""


def without_plots(patch):
    """Curves take longer than the steps."""
    patch.setattr(fit, "has_plots", lambda _: False)


def numbers_of(value):
    """A record without the settings that it repeats, and without its times."""
    if isinstance(value, dict):
        return {
            name: numbers_of(part)
            for name, part in value.items()
            if name not in ECHOES and not name.endswith("_per_second")
        }
    if isinstance(value, list | tuple):
        return [numbers_of(part) for part in value]
    return None if isinstance(value, Path) else value


def contents(path):
    """Numbers of a log, or a digest of any other file."""
    if path.name == "metrics.jsonl":
        return [numbers_of(json.loads(line)) for line in path.read_text().splitlines()]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(kind, settings, out):
    """All that a run measures and writes; a refusal in its own words."""
    scores = []
    accuracy = linear.accuracy

    def seen(values, *args, **kwargs):
        scores.append(hashlib.sha256(values.numpy().tobytes()).hexdigest())
        return accuracy(values, *args, **kwargs)

    returned = None
    with pytest.MonkeyPatch.context() as patch:
        without_plots(patch)
        # Shares of a few images hardly move, where the scores do.
        patch.setattr(probing, "accuracy", seen)
        try:
            returned = numbers_of(KINDS[kind].do(replaced(settings, {KINDS[kind].out: str(out)})))
        except ValueError as error:
            returned = str(error)
        except RuntimeError as error:
            # A refusal that training comes to; any other is a fault of the run, not an effect.
            if "not finite" not in str(error):
                raise
            returned = str(error)
    files = {
        str(path.relative_to(out)): contents(path)
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in OWN_WORDS
    }
    return {"returned": returned, "scores": scores, "files": files}


@pytest.fixture(scope="module")
def before(material, tmp_path_factory):
    """The outcome of a base by kind of run and of what was changed for the setting's sake."""
    known = {}

    def find(kind, needs, leaf=""):
        base = replaced(KINDS[kind].base(material), in_folder(material, needs))
        base = with_parts_of(base, leaf)
        key = kind, repr(base)
        if key not in known:
            known[key] = base, outcome(kind, base, tmp_path_factory.mktemp("base") / "out")
        return known[key]

    return find


def in_folder(material, changes):
    """With the names of material, which begin with @, as paths."""
    return {
        name: str(material / value[1:]) if str(value).startswith("@") else value
        for name, value in changes.items()
    }


CASES = [
    (kind, leaf)
    for kind, each in KINDS.items()
    for leaf in each.leaves
    if (kind, leaf) not in NO_EFFECT
]


@pytest.mark.parametrize(("kind", "leaf"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_setting_has_an_effect(kind, leaf, material, before, tmp_path):
    base, old = before(kind, NEEDS.get(kind, {}).get(leaf, {}), leaf)
    if (kind, leaf) in TOGETHER:
        new = replaced(base, in_folder(material, TOGETHER[kind, leaf]))
    elif leaf in VALUES.get(kind, {}):
        new = replaced(base, in_folder(material, {leaf: VALUES[kind][leaf]}))
    else:
        new = changed(base, leaf, KINDS[kind].leaves[leaf])
    assert new != base
    assert outcome(kind, new, tmp_path / "out") != old, f"{leaf} has no effect"


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_run_has_the_same_outcome(kind, before, tmp_path):
    base, old = before(kind, {})
    again = outcome(kind, base, tmp_path / "out")
    assert again == old
    assert again["files"]
    assert not isinstance(again["returned"], str), "a run that is refused tells nothing"


def test_no_entry_outlives_its_setting():
    there = {(kind, leaf) for kind, each in KINDS.items() for leaf in each.leaves}
    assert set(NO_EFFECT) | set(TOGETHER) <= there
    assert {(kind, leaf) for kind, leaves in NEEDS.items() for leaf in leaves} <= there
