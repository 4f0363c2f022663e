"""Training of a decoder: a resumed run is the same run, and the tokenizer stays as it is."""

import json
from dataclasses import replace

import pytest
import torch

from mergevq.cli.main import main
from mergevq.config.parts import PixelFlow
from mergevq.config.parts.flows import Times
from mergevq.config.recipes.decoders import digits32_prefix_flow
from mergevq.config.recipes.digits import digits32, digits32_tail_drop
from mergevq.data.batches import Batch
from mergevq.nn.flow import flow_loss, mix
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import model_hash, tokens_hash
from mergevq.runtime.checkpoints import load_state
from mergevq.runtime.random import BatchNumbers
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.decoder.run import train
from mergevq.training.decoder.step import build, draw_times, flow_config
from tests.support.parts import small_part
from tests.support.small import shrink, shrink_decoder

pytest.importorskip("sklearn")

WORLD = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
SCALE = (torch.zeros(3), torch.ones(3))
TOKENIZERS = {"source": digits32, "ordered": digits32_tail_drop}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A random tokenizer of each layout."""
    folder = tmp_path_factory.mktemp("material")
    for name, recipe in TOKENIZERS.items():
        torch.manual_seed(0)
        Tokenizer(shrink(recipe()).model).save_pretrained(folder / name)
    return folder


def small(material, name="source", **train_settings):
    run = shrink_decoder(digits32_prefix_flow())
    loop = replace(run.train, precision="float32", **train_settings)
    return replace(run, tokenizer=str(material / name), train=loop)


def built(run):
    return build(run, WORLD, Tokenizer.from_pretrained(run.tokenizer), SCALE)


def batch(size=4):
    image = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(image, torch.zeros(size, dtype=torch.int64), None, None, torch.arange(size))


def equal(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_a_resumed_run_is_bit_equal_and_leaves_the_tokenizer_as_it_was(material, tmp_path):
    before = model_hash(material / "source")
    whole = replace(small(material, num_steps=4, save_every=4), out=str(tmp_path / "whole"))
    model = train(whole)
    run = replace(small(material, num_steps=4), out=str(tmp_path / "cut"))
    train(replace(run, train=replace(run.train, num_steps=2)))
    train(run, resume=True)
    first, second = (
        load_state(tmp_path / name / "checkpoints/step-00000004/state") for name in ("whole", "cut")
    )
    first["budget"] = second["budget"]
    assert equal(first, second)
    assert model_hash(material / "source") == before
    log = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert {"val_loss@16", "psnr@16", "psnr_recovered@16"} <= log[-1].keys()
    assert (tmp_path / "whole/images/step-00000004.png").is_file()
    record = json.loads((model / "config.json").read_text())
    assert record["extra"]["tokenizer"] == tokens_hash(material / "source")
    assert Tokenizer.from_pretrained(material / "source", decoder=model).flow is not None


def test_a_run_is_not_resumed_with_another_tokenizer(material, tmp_path):
    run = replace(small(material, num_steps=1), out=str(tmp_path / "run"))
    train(run)
    other = shrink(digits32()).model
    torch.manual_seed(9)
    Tokenizer(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on tokens of tokenizer"):
        train(replace(run, tokenizer=str(tmp_path / "other")), resume=True)


def pixel(run):
    """The same run with patches that do not see each other."""
    return replace(run, decoder=small_part(PixelFlow))


def test_several_draws_are_the_mean_of_losses_of_one(material):
    learner = built(pixel(small(material)))
    numbers = BatchNumbers(seed=0, step=0, num_rows=4, rows=slice(None))
    image, network = batch().image, learner.state.network
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shown = learner.shown(image, 16, numbers)
    loss = learner.loss(network, image, shown, numbers)
    apart = []
    for draw in range(2):
        noise = numbers.normal(f"noise {draw}", *image.shape[1:])
        time = draw_times(learner.run.times, numbers, draw)
        apart.append(flow_loss(network(mix(image, noise, time), time, shown), image, noise))
    torch.testing.assert_close(loss, torch.stack(apart).mean())


def test_patches_that_do_not_see_each_other_train_and_need_a_map(material):
    learner = built(pixel(small(material)))
    learner.step(batch())
    assert [n for n, p in learner.state.network.named_parameters() if p.grad is None] == []
    with pytest.raises(ValueError, match="pixel_flow needs tokens with a source map"):
        built(pixel(small(material, "ordered")))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_accumulation_equals_the_whole_batch_and_every_parameter_has_a_gradient(material, name):
    gradients = []
    for accumulation in (1, 2):
        learner = built(small(material, name, accumulation=accumulation))
        learner.step(batch())
        assert [n for n, p in learner.state.network.named_parameters() if p.grad is None] == []
        gradients.append([p.grad.clone() for p in learner.state.network.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_images_show_as_many_tokens_as_the_law_says(material):
    learner = built(small(material, "ordered"))
    numbers = BatchNumbers(seed=0, step=0, num_rows=32, rows=slice(None))
    shown = learner.shown(batch(32).image, 16, numbers)
    assert sorted(shown.lengths.tolist()) == sorted([*range(1, 17)] * 2)
    assert shown.is_null.dtype == torch.bool
    everything = replace(learner.run, decoder=replace(learner.run.decoder, lengths="all"))
    shown = built(everything).shown(batch(32).image, 16, numbers)
    assert shown.lengths.tolist() == [16] * 32


@pytest.mark.parametrize(
    ("law", "low", "high"), [("uniform", 0.1, 0.1), ("logit_normal", 0.014, 0.014)]
)
def test_times_have_their_law_and_its_shift(law, low, high):
    numbers = BatchNumbers(seed=0, step=0, num_rows=10_000, rows=slice(None))
    drawn = draw_times(Times(law=law), numbers)
    assert float((drawn < 0.1).float().mean()) == pytest.approx(low, abs=1e-3)
    assert float((drawn > 0.9).float().mean()) == pytest.approx(high, abs=1e-3)
    shifted = draw_times(Times(law=law, shift=3.0), numbers)
    torch.testing.assert_close(shifted, 3 * drawn / (1 + 2 * drawn))


def test_noise_is_that_of_the_whole_batch():
    whole, part = (
        BatchNumbers(seed=0, step=3, num_rows=6, rows=rows).normal("noise", 2)
        for rows in (slice(None), slice(2, 4))
    )
    assert torch.equal(whole[2:4], part)


def test_a_step_that_is_not_finite_is_skipped(material):
    learner = built(small(material))
    before = {n: p.clone() for n, p in learner.state.network.named_parameters()}
    learner.state.network.std.zero_()
    learner.step(batch())
    assert learner.state.guard.num_in_a_row == 1
    assert all(torch.equal(before[n], p) for n, p in learner.state.network.named_parameters())


def test_what_does_not_fit_the_tokenizer_is_refused(material):
    run, config = small(material), shrink(digits32()).model
    patch = replace(run, decoder=replace(run.decoder, patch_size=3))
    with pytest.raises(ValueError, match=r"decoder.patch_size \(3\) must divide the 4 pixels"):
        flow_config(patch, config)
    with pytest.raises(ValueError, match="num_kept"):
        built(replace(run, num_kept=(65,)))
    with pytest.raises(ValueError, match=r"must be 1 with decoder\.null_share 0"):
        replace(
            run,
            decoder=replace(run.decoder, null_share=0.0),
            solution=replace(run.solution, guidance_scale=2.0),
        )


@pytest.mark.slow
def test_a_decoder_is_trained_and_used_from_the_command_line(material, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--tokenizer", str(material / "source"), "--num-kept", "16", "--out", "run"]
    few = ["--train.num-steps", "1", "--train.batch-size", "4", "--train.num-eval-images", "4"]
    sizes = ["--decoder.dim", "16", "--solution.num-steps", "1", "--train.eval-num-kept", "16"]
    assert main(["train", "digits32_prefix_flow", *arguments, *few, *sizes]) == 0
    models = ["--model", str(material / "source"), "--decoder", "run/model"]
    evaluated = ["--max-images", "4", "--data", "digits", "--baseline-images", "0"]
    assert main(["evaluate", "reconstruction", *models, *evaluated, "--num-workers", "0"]) == 0
    (found,) = tmp_path.glob("run/images/*.png")
    assert main(["reconstruct", str(found), *models, "--num-kept", "16"]) == 0
