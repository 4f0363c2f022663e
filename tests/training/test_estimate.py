import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mergevq.config.generator import (
    GeneratorConfig,
)
from mergevq.config.objective import Labels, LossConfig
from mergevq.config.parts.heads import (
    Subindices,
)
from mergevq.config.parts.orders import (
    Raster,
)
from mergevq.config.recipes import TOKENIZER_RECIPES
from mergevq.config.tokenizer import KeptConfig
from mergevq.config.training import DataConfig, TokenizerRun, TokenizerTrainConfig
from mergevq.data.tokens.dataset import open_tokens
from mergevq.generator.build import build_generator
from mergevq.runtime.artefacts import tokens_hash
from mergevq.tokenizer.reducers.matching import merge_schedule
from mergevq.tokenizer.seams import Given
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.estimate import MemoryTracker, _time, count_products, describe, estimate
from mergevq.training.generator_step import fitted_config
from tests.support.parts import tokenizer_config
from tests.training.test_generator import small, small_tokenizer, write_tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _short_measurements():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergevq.training.estimate._TIMED_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over 40 images of noise in two classes."""
    tmp_path = tmp_path_factory.mktemp("estimate")
    for number in range(40):
        folder = tmp_path / "data" / ("even", "odd")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return TokenizerRun(
        model=tokenizer_config(
            image_size=16,
            channels=16,
            channel_mult=(1, 2),
            num_res_blocks=1,
            num_layers=2,
            num_heads=2,
            num_kept=20,
            num_bits=6,
            num_decoder_layers=1,
            num_decoder_heads=2,
            source_dim=16,
            num_source_heads=2,
        ),
        kept=KeptConfig(candidates=(20, 40)),
        data=DataConfig(path=str(tmp_path / "data"), val_fraction=0.2),
        loss=LossConfig(perceptual_weight=0.0, adversarial_weight=0.0),
        teacher=Labels(),
        train=TokenizerTrainConfig(batch_size=16, precision="float32", device="cpu"),
        out=str(tmp_path / "run"),
    )


@pytest.fixture(scope="module")
def found(run):
    return estimate(run)


# --------------------------------------------------------------------------------- tracker


def test_a_tensor_counts_until_it_is_freed():
    with MemoryTracker(CPU) as memory:
        first = torch.zeros(1000)
        second = first + 1
        assert memory.live == 8000
        del first
        assert memory.live == 4000
        del second
        assert memory.live == 0
    assert memory.peak == 8000


def test_a_view_costs_nothing_and_keeps_its_base():
    with MemoryTracker(CPU) as memory:
        base = torch.zeros(1000)
        view = base[500:]
        assert memory.live == 4000
        del base
        assert memory.live == 4000
        del view
        assert memory.live == 0


def test_what_a_backward_pass_needs_stays_until_it_is_done():
    weight = torch.ones(1000, requires_grad=True)
    with MemoryTracker(CPU) as memory:
        loss = weight.sin().exp().sum()
        # The output of exp is saved for its gradient; the sine's is not, its input was there.
        assert memory.live == 4000 + 4
        loss.backward()
        assert memory.live == 4000 + 4  # The gradient has taken its place.


def test_tensors_of_other_devices_do_not_count():
    with MemoryTracker(torch.device("meta")) as memory:
        on_cpu = torch.zeros(1000)
    assert memory.live == 0
    assert on_cpu.numel() == 1000


# -------------------------------------------------------------------------------- estimate


@pytest.mark.slow
def test_the_parameters_are_those_of_the_networks(run, found):
    tokenizer = Tokenizer(run.model)
    sizes = {
        "encoder": sum(weight.numel() for weight in tokenizer.encoder.parameters()),
        "decoder": sum(weight.numel() for weight in tokenizer.decoder.parameters()),
        "source predictor": sum(w.numel() for w in tokenizer.expander.parameters()),
    }
    assert sizes.items() <= found.num_parameters.items()
    assert found.num_parameters.keys() - sizes.keys() == {"alignment head"}


def test_the_data_are_counted(found):
    assert found.num_train_images + found.num_val_images == 40
    assert found.num_classes == 2


@pytest.mark.slow
def test_extrapolated_memory_is_what_is_then_used(run, found, monkeypatch):
    monkeypatch.setattr("mergevq.training.estimate._TRACKED_IMAGES", 16)
    assert found.memory_bytes == pytest.approx(estimate(run).memory_bytes, rel=0.1)


@pytest.mark.slow
def test_memory_is_for_the_largest_number_of_tokens(run, found):
    only_small = replace(run, kept=KeptConfig(candidates=(20,)))
    assert found.memory_bytes > estimate(only_small).memory_bytes


@pytest.mark.slow
def test_checkpointing_saves_memory(run, found):
    less = replace(run, train=replace(run.train, checkpointing=True))
    assert estimate(less).memory_bytes < 0.8 * found.memory_bytes


def test_speed_is_measured_with_no_more_images_than_are_there_at_once(run):
    adversary = replace(run.loss, adversarial_weight=0.1)
    parts = replace(run.train, batch_size=6, accumulation=2)
    found = estimate(replace(run, loss=adversary, train=parts))
    assert found.pass_images == found.timed_images == 3
    assert found.images_per_second > 0
    assert "discriminator" in found.num_parameters


def test_nothing_is_written(run, found):
    assert not Path(run.out).exists()


def test_a_run_that_cannot_start_says_why(run):
    absent = replace(run, data=replace(run.data, path="nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        estimate(absent)


# --------------------------------------------------------------------------------- products


def as_in_the_table(model, name, passes, lengths):
    """10^9 operations as the paper's counter has them, which is that of fvcore.

    It counts a multiply-add as one, knows nothing of attention's kernel, and takes 5 operations
    for each normalised value.
    """
    part = getattr(model, name)
    normalised = []
    norms = [each for each in part.modules() if isinstance(each, nn.LayerNorm | nn.GroupNorm)]
    for norm in norms:
        norm.register_forward_hook(lambda _norm, _inputs, out: normalised.append(out.numel()))
    passes()
    width = model.config.dim if name == "encoder" else model.config.decoder.width
    attention = sum(2 * length**2 * width for length in lengths)
    products = count_products(model.config)[name]
    return (products - attention + 5 * sum(normalised)) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "encoder", "decoder"),
    # The encoder of version R has 9.5 there, which none of the schedules of merging gives.
    [
        ("imagenet256_g", 97.5, 169.2),
        ("imagenet256_gr", 46.4, 65.6),
        ("imagenet256_r", 10.9, 65.6),
    ],
)
def test_products_are_those_of_the_papers_table(recipe, encoder, decoder):
    config = TOKENIZER_RECIPES[recipe]().model
    with torch.device("meta"), torch.no_grad():
        model = Tokenizer(config)
        image = torch.empty(1, 3, 256, 256)
        codes = torch.empty(1, config.num_tokens, 18)
        left = [config.num_tokens + 1]
        for count in merge_schedule(config.num_tokens, config.num_kept, 12)[:-1]:
            left.append(left[-1] - count)
        counted = (
            as_in_the_table(model, "encoder", lambda: model.encoder(image, config.num_kept), left),
            as_in_the_table(
                model,
                "decoder",
                lambda: model.decoder(Given(codes, (config.grid_size,) * 2, codes)),
                [config.num_tokens] * 12,
            ),
        )
    assert counted == pytest.approx((encoder, decoder), abs=0.11)


def test_products_of_a_generator_by_hand():
    config = GeneratorConfig(
        order=Raster(),
        dim=32,
        num_layers=2,
        num_heads=2,
        grid_size=(4, 4),
        num_kept=16,
        kept_candidates=(16,),
        head=Subindices(sizes=(8, 8)),
    )
    products = count_products(config)
    # 17 inputs: class, K and 15 cells. Attention has 4 matrices of 32 x 32, the feed-forward layer
    # 3 of 32 x 256, and 17 inputs attend to 17 twice over 32 channels.
    block = 17 * (4 * 32 * 32 + 3 * 32 * config.hidden_dim) + 2 * 17 * 17 * 32
    assert products["blocks"] == 2 * block
    # 16 states, two parts: one block on two inputs, and an output of 8 values for each part.
    head = 2 * (4 * 32 * 32 + 3 * 32 * config.hidden_dim) + 2 * 2 * 2 * 32 + 2 * 32 * 8
    assert products["head"] == 16 * head


def test_a_dry_run_shows_the_products(run, found):
    assert found.products == count_products(run.model)
    line = describe(run, found)["products"]
    assert "multiply-adds of a forward pass of one image at 20 tokens" in line
    assert f"{found.products['decoder'] / 1e9:.3g} decoder" in line


# ------------------------------------------------------------------------------- generators


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A random tokenizer and tokens that say they are its own."""
    folder = tmp_path_factory.mktemp("material")
    small_tokenizer().save_pretrained(folder / "tokenizer")
    write_tokens(folder / "tokens", tokens_hash(folder / "tokenizer"))
    return folder


@pytest.mark.parametrize(
    ("order", "length"),
    # Class, K, and all tokens but the last: 64 cells, or 24 tokens, with instructions or without.
    [("raster", 65), ("merge", 65), ("random", 49), ("anchor", 25)],
)
def test_a_generator_is_described_by_what_it_will_do(material, tmp_path, order, length):
    run = small(material, order, num_steps=90, batch_size=6, accumulation=2)
    run = replace(run, out=str(tmp_path / "run"))
    found = estimate(run)
    generator = build_generator(fitted_config(run, open_tokens(run.tokens.path).record))
    assert sum(found.num_parameters.values()) == sum(p.numel() for p in generator.parameters())
    assert found.num_parameters["head"] == sum(
        p.numel() for p in generator.network.head.parameters()
    )
    assert found.sequence_length == length
    assert (found.num_train_images, found.num_val_images, found.num_classes) == (18, 6, 3)
    assert found.pass_images == found.timed_images == 3
    lines = describe(run, found)
    assert lines["steps"] == "90 of 6 sequences: every sequence 30 times"
    assert f"{length} inputs" in lines["sequence"]
    assert "sequences per second" in lines["speed"]
    assert not (tmp_path / "run").exists()


def test_extrapolated_memory_of_a_generator_is_what_is_then_used(material, monkeypatch):
    run = small(material, "merge", batch_size=16)
    found = estimate(run)
    monkeypatch.setattr("mergevq.training.estimate._TRACKED_IMAGES", 16)
    assert found.memory_bytes == pytest.approx(estimate(run).memory_bytes, rel=0.1)


def test_a_generator_that_cannot_start_says_why(material):
    run = small(material)
    absent = replace(run, tokens=replace(run.tokens, path="nowhere"))
    with pytest.raises(ValueError, match="nowhere holds no tokens"):
        estimate(absent)


# ------------------------------------------------------------------------------------- speed


def test_speed_is_measured_over_several_steps(monkeypatch):
    monkeypatch.setattr("mergevq.training.estimate._TIMED_SECONDS", 0.2)
    calls = []

    def step():
        calls.append(1)
        time.sleep(0.03)

    seconds, cpu_seconds = _time(step, CPU)
    assert len(calls) >= 5
    assert seconds >= 0.03
    # Asleep it has no processor, as while another process has it.
    assert cpu_seconds < 0.5 * seconds


def test_a_processor_that_others_have_too_is_told(run, found):
    long = replace(run, train=replace(run.train, num_steps=3600, batch_size=1))
    own = found._replace(images_per_second=1.0, cpu_share=0.97)
    assert "processor" not in describe(long, own)
    assert "processor" not in describe(long, own._replace(cpu_share=None))
    shared = describe(long, own._replace(cpu_share=0.25))
    assert shared["time"] == "1 h 0 min at that speed"
    assert "for 25% of the time" in shared["processor"]
    assert "about 0 h 15 min alone" in shared["processor"]


def test_a_limit_on_time_is_told_where_it_is_the_shorter(run, found):
    long = replace(run, train=replace(run.train, num_steps=3600, batch_size=1, max_minutes=20.0))
    limited = describe(long, found._replace(images_per_second=1.0))
    assert limited["time"] == (
        "1 h 0 min at that speed; it ends after train.max_minutes (0 h 20 min), its schedules with "
        "it"
    )
    short = describe(long, found._replace(images_per_second=10.0))
    assert short["time"] == "0 h 6 min at that speed"
