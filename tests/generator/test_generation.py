"""Samples in a folder: decoded by their order, refused to strangers, and made again bit by bit."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.cli.main import main
from mergevq.config.base import BUNDLED_GENERATOR, BUNDLED_TOKENIZER
from mergevq.config.generator import (
    Drafted,
    GeneratorConfig,
    OneByOne,
    SampleRun,
    SamplingSettings,
    Several,
)
from mergevq.config.parts.heads import (
    Subindices,
)
from mergevq.data.layouts import Source
from mergevq.generator import writing
from mergevq.generator.build import build_generator, load_generator, save_generator, saved_generator
from mergevq.generator.generation import (
    class_labels,
    decode_sampled,
    generate,
    known_tokenizer,
    load_pair,
    masked_origin,
)
from mergevq.generator.sampling import Sampled
from mergevq.generator.writing import make_again, write_samples
from mergevq.runtime.artefacts import load_model, model_hash, save_model, tokens_hash
from mergevq.runtime.environment import bundled_models
from mergevq.tokenizer.seams import Given
from mergevq.tokenizer.tokenizer import Tokenizer
from mergevq.training.generator import train
from tests.support.generators import KINDS, ORDERS
from tests.support.parts import tokenizer_config
from tests.training.test_generator import small, small_tokenizer, write_tokens

CPU = torch.device("cpu")


def scattered(module, seed):
    """Random weights large enough that sampling is neither uniform nor certain."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=numbers)
            parameter.copy_(noise * 0.2 + (parameter == 1))
    return module.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tokenizer of 16 pixels and 4 x 4 cells, and a generator for each order."""
    directory = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer(
        tokenizer_config(
            image_size=16,
            channels=8,
            channel_mult=(1, 1, 1),
            num_res_blocks=1,
            num_layers=2,
            num_heads=2,
            num_kept=6,
            num_bits=4,
            num_decoder_layers=1,
            num_decoder_heads=2,
            source_dim=16,
            num_source_layers=1,
            num_source_heads=2,
        )
    )
    scattered(tokenizer, 0).save_pretrained(directory / "tokenizer")
    for order in ORDERS:
        config = GeneratorConfig(
            order=KINDS[order](),
            dim=32,
            num_layers=2,
            num_heads=2,
            ffn_dim=64,
            num_classes=10,
            grid_size=(4, 4),
            num_kept=16 if order == "raster" else 6,
            kept_candidates=() if order == "raster" else (6, 8),
            head=Subindices(sizes=(4, 4)),
        )
        names = [f"digit {number}" for number in range(10)]
        save_generator(
            scattered(build_generator(config), 1),
            directory / order,
            tokenizer=tokens_hash(directory / "tokenizer"),
            class_names=names,
        )
    return directory


def run_of(folder, order="merge", **changes):
    given = {"model": str(folder / order), "tokenizer": str(folder / "tokenizer"), "device": "cpu"}
    return SampleRun(**given | {"num_images": 5, "batch_size": 2} | changes)


def pixels(image):
    return np.asarray(image).copy()


def read(path):
    with Image.open(path) as image:
        return pixels(image)


def sample(folder, out, *options, order="merge"):
    models = ["--generator", str(folder / order), "--model", str(folder / "tokenizer")]
    return main(["sample", *models, "--out", str(out), "--device", "cpu", *options])


# -------------------------------------------------------------------------------- decoding

# Several at once go through other kernels than one, which round about ten times as coarsely.


@pytest.mark.parametrize("order", ["raster", "merge"])
def test_all_cells_are_decoded_as_they_are(folder, order):
    pair = load_pair(folder / order, folder / "tokenizer", CPU)
    sampled, images = generate(pair, run_of(folder, order), [0, 1])
    codes = ((sampled.indices[..., None] >> torch.arange(4)) & 1) * 2.0 - 1
    expected = pair.tokenizer.decoder(Given(codes, (4, 4), codes)).clamp(-1, 1)
    torch.testing.assert_close(images, expected.detach(), rtol=0, atol=1e-3)


def test_kept_tokens_get_the_source_that_is_recovered(folder):
    pair = load_pair(folder / "random", folder / "tokenizer", CPU)
    sampled, images = generate(pair, run_of(folder, "random"), [0, 1])
    source = pair.tokenizer.recover(sampled.indices, (4, 4))
    expected = pair.tokenizer.decode(sampled.indices, source, (4, 4)).clamp(-1, 1)
    torch.testing.assert_close(images, expected.detach(), rtol=0, atol=1e-3)


def test_anchors_are_obeyed(folder):
    pair = load_pair(folder / "anchor", folder / "tokenizer", CPU)
    sampled, images = generate(pair, run_of(folder, "anchor"), [0, 1])
    source = pair.tokenizer.recover(sampled.indices, (4, 4), sampled.anchors)
    assert torch.equal(source.index.gather(1, sampled.anchors), torch.arange(6).expand(2, -1))
    expected = pair.tokenizer.decode(sampled.indices, source, (4, 4)).clamp(-1, 1)
    torch.testing.assert_close(images, expected.detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_kept", [16, 6])
def test_an_image_is_decoded_the_same_in_any_batch_and_at_any_place(folder, num_kept):
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    indices = torch.randint(16, (19, num_kept), generator=torch.Generator().manual_seed(0))

    def decoded(rows):
        return decode_sampled(tokenizer, Sampled(indices[rows], None, None, 1, 1), (4, 4))

    whole = decoded(range(19))
    for rows in ([18], [3, 4, 5], range(11), torch.randperm(19).tolist()):
        assert torch.equal(decoded(rows), whole[rows])
    for row in range(19):
        source = tokenizer.recover(indices[row : row + 1], (4, 4))
        if num_kept == 16:
            source = Source(torch.arange(16)[None], 16)
        expected = tokenizer.decode(indices[row : row + 1], source, (4, 4)).clamp(-1, 1)
        torch.testing.assert_close(whole[row : row + 1], expected, rtol=0, atol=1e-3)


def test_small_images_are_decoded_several_at_once_and_large_ones_alone(folder, monkeypatch):
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    sizes, decode = [], tokenizer.decode

    def counting(tokens, *args):
        sizes.append(len(tokens))
        return decode(tokens, *args)

    monkeypatch.setattr(tokenizer, "decode", counting)
    for side in (4, 16, 32):
        indices = torch.zeros(3, side**2, dtype=torch.int64)
        decode_sampled(tokenizer, Sampled(indices, None, None, 1, 1), (side, side))
    assert sizes == [8, 4, 1, 1, 1]


# ------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    "order", ["random", *(pytest.param(o, marks=pytest.mark.slow) for o in ORDERS if o != "random")]
)
def test_an_image_is_made_again_from_the_sidecar(folder, tmp_path, order):
    num_steps = 3 if order == "random" else None
    settings = SamplingSettings(
        guidance_scale=2.0, passes=OneByOne() if num_steps is None else Several(num_steps=num_steps)
    )
    run = run_of(folder, order, settings=settings)
    written = write_samples(run, tmp_path / "out")
    assert [path.name for path in written.images] == [f"{k:06d}.png" for k in range(5)]
    assert written.grid.is_file()
    (again,) = make_again(tmp_path / "out/samples.json", [3])
    assert np.array_equal(pixels(again), read(tmp_path / "out/000003.png"))
    assert len({read(path).tobytes() for path in written.images}) > 1


@pytest.mark.slow
def test_drafts_give_the_same_files_in_fewer_passes(folder, tmp_path):
    run = run_of(folder, "merge")
    plain = write_samples(run, tmp_path / "plain")
    assert plain.tokens_per_pass == 1
    drafted = replace(run, settings=replace(run.settings, passes=Drafted()))
    written = write_samples(drafted, tmp_path / "drafted")
    assert written.tokens_per_pass is not None
    assert written.tokens_per_pass > 1
    for ours, theirs in zip(written.images, plain.images, strict=True):
        assert np.array_equal(read(ours), read(theirs))
    (again,) = make_again(tmp_path / "drafted/samples.json", [3])
    assert np.array_equal(pixels(again), read(plain.images[3]))
    assert write_samples(drafted, tmp_path / "drafted").tokens_per_pass is None


def test_a_smaller_generator_drafts_the_same_files(folder, tmp_path, capsys):
    options = ["--num", "3", "--batch-size", "1"]
    assert sample(folder, tmp_path / "plain", *options) == 0
    assert "in each pass" not in capsys.readouterr().out
    # Itself as the smaller one: of 16 tokens the first has a pass of its own, then three in each.
    options += ["--draft", "model", "--draft-generator", str(folder / "merge")]
    assert sample(folder, tmp_path / "out", *options, "--num-drafted", "2") == 0
    printed = capsys.readouterr().out
    assert "2.67 tokens in each pass, 1.67 of them drafted; 6.0 passes for a batch" in printed
    for number in range(3):
        name = f"{number:06d}.png"
        assert np.array_equal(read(tmp_path / "out" / name), read(tmp_path / "plain" / name))
    record = json.loads((tmp_path / "out/samples.json").read_text())
    assert record["draft_generator"] == model_hash(folder / "merge")
    (again,) = make_again(tmp_path / "out/samples.json", [2])
    assert np.array_equal(pixels(again), read(tmp_path / "out/000002.png"))


def test_a_draft_of_other_tokens_is_refused_and_both_are_named(folder, tmp_path, capsys):
    strange = tmp_path / "strange"
    save_generator(load_generator(folder / "merge"), strange, tokenizer="0123")
    own = tokens_hash(folder / "tokenizer")
    for draft, wanted in (
        (strange, f"{strange} was trained on tokens of tokenizer 0123 and this is {own}"),
        (folder / "raster", f"{folder / 'raster'} cannot draft for that in {folder / 'merge'}"),
    ):
        options = ["--draft", "model", "--draft-generator", str(draft)]
        assert sample(folder, tmp_path / "out", *options) == 1
        assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_stopped_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    run, calls = run_of(folder), []

    def stopped(pair, run, image_ids, origin=None):
        calls.append(image_ids)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(pair, run, image_ids, origin)

    write_samples(run, tmp_path / "whole")
    monkeypatch.setattr(writing, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_samples(run, tmp_path / "out")
    (tmp_path / "out/000001.png").unlink()
    written = write_samples(run, tmp_path / "out")
    assert (calls[2:], written.num_made) == ([[0, 1], [2, 3], [4]], 4)
    whole, again = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")}
        for name in ("whole", "out")
    )
    assert whole == again
    assert len(whole) == 6
    assert write_samples(run, tmp_path / "out").num_made == 0
    assert len(calls) == 5


def test_only_the_same_run_goes_on_in_a_folder(folder, tmp_path):
    run = run_of(folder)
    write_samples(run, tmp_path / "out")
    with pytest.raises(ValueError, match=r"another run, which differs in seed \(0, now 1\)"):
        write_samples(replace(run, seed=1), tmp_path / "out")
    with pytest.raises(ValueError, match=r"another run, which differs in num_images \(5, now 6\)"):
        write_samples(replace(run, num_images=6), tmp_path / "out")
    (tmp_path / "out/000004.png").write_bytes((tmp_path / "out/000003.png").read_bytes())
    with pytest.raises(ValueError, match=r"000004.png is not the picture that was made"):
        write_samples(run, tmp_path / "out")
    (tmp_path / "out/samples.json").unlink()
    with pytest.raises(ValueError, match=r"is not empty and holds no samples.json"):
        write_samples(run, tmp_path / "out")


def test_the_sidecar_says_what_each_image_is(folder, tmp_path):
    run = run_of(folder, classes=(3, 7), seed=5)
    write_samples(run, tmp_path / "out")
    record = json.loads((tmp_path / "out/samples.json").read_text())
    assert [image["class"] for image in record["images"]] == [3, 7, 3, 7, 3]
    assert record["images"][1]["class_name"] == "digit 7"
    assert len({image["seed"] for image in record["images"]}) == 5
    assert record["generator"] == model_hash(folder / "merge")
    assert record["tokenizer"] == model_hash(folder / "tokenizer")
    assert record["run"]["seed"] == 5
    assert record["logit_error"] is None


def test_settings_of_several_parts_come_back_from_the_sidecar(folder, tmp_path):
    settings = SamplingSettings(temperature=(1.0, 0.5), top_k=(0, 2), guidance_interval=(0.1, 0.9))
    write_samples(run_of(folder, settings=settings), tmp_path / "out")
    (again,) = make_again(tmp_path / "out/samples.json", [4])
    assert np.array_equal(pixels(again), read(tmp_path / "out/000004.png"))


def test_an_image_depends_on_its_number_alone(folder, tmp_path):
    write_samples(run_of(folder, classes=(4,)), tmp_path / "few")
    write_samples(run_of(folder, classes=(4,), num_images=7, batch_size=7), tmp_path / "many")
    for name in ("000000.png", "000004.png"):
        assert np.array_equal(read(tmp_path / "few" / name), read(tmp_path / "many" / name))


def test_images_are_not_made_again_by_another_generator(folder, tmp_path):
    own = tmp_path / "own"
    generator = load_generator(folder / "merge")
    save_generator(generator, own, tokenizer=tokens_hash(folder / "tokenizer"))
    write_samples(run_of(folder, model=str(own)), tmp_path / "out")
    with torch.no_grad():
        generator.network.head.norm.weight[0] += 1
    save_generator(generator, own, tokenizer=tokens_hash(folder / "tokenizer"))
    with pytest.raises(ValueError, match=r"generator is .* and was"):
        make_again(tmp_path / "out/samples.json", [3])


def test_only_images_that_were_made_can_be_made_again(folder, tmp_path):
    write_samples(run_of(folder), tmp_path / "out")
    with pytest.raises(ValueError, match=r"image \(5\) must be between 0 and 4"):
        make_again(tmp_path / "out/samples.json", [5])
    with pytest.raises(ValueError, match="holds no samples but generator"):
        make_again(folder / "merge/config.json", [0])


@pytest.mark.parametrize(
    "weights", [*(pytest.param(w, marks=pytest.mark.slow) for w in ("fp16", "bf16")), "int8"]
)
def test_lighter_weights_say_what_they_cost_and_can_be_repeated(folder, tmp_path, weights):
    written = write_samples(run_of(folder, weights=weights), tmp_path / "out")
    assert written.logit_error is not None
    assert 0 < written.logit_error < 0.2
    (again,) = make_again(tmp_path / "out/samples.json", [3])
    assert np.array_equal(pixels(again), read(tmp_path / "out/000003.png"))


# --------------------------------------------------------------------------------- refusals


def test_another_tokenizer_is_refused(folder, tmp_path):
    other = Tokenizer.from_pretrained(folder / "tokenizer")
    with torch.no_grad():
        other.encoder.to_latents.weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained on tokens of tokenizer"):
        load_pair(folder / "merge", tmp_path / "other", CPU)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_class_that_does_not_exist_names_those_that_do(folder, label):
    run = run_of(folder, classes=(3, label))
    with pytest.raises(ValueError, match=r"must be between 0 and 9: .* 10 classes"):
        class_labels(run, 10, [0])


def test_no_class_can_be_asked_of_a_generator_without(folder):
    assert class_labels(run_of(folder), 0, [0, 1, 2]).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="without classes"):
        class_labels(run_of(folder, classes=(0,)), 0, [0])


# ------------------------------------------------------------------------------ in-painting


@pytest.fixture
def picture(tmp_path):
    """A random image and a mask whose right half is white."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, 12:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def test_tokens_stay_that_no_white_touches(folder, picture):
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    with Image.open(picture / "image.png") as image, Image.open(picture / "mask.png") as mask:
        origin = masked_origin(tokenizer, image.convert("RGB"), mask.convert("RGB"), 12)
    right_column = origin.source.index[0].reshape(4, 4)[:, 3]
    touched = torch.isin(torch.arange(12), right_column)
    assert torch.equal(origin.keep[0], ~touched)
    assert origin.keep.any()


def test_a_mask_must_be_as_large_as_its_image_and_white_somewhere(folder, picture):
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    image, black = Image.new("RGB", (16, 16)), Image.new("RGB", (16, 16))
    with pytest.raises(ValueError, match=r"mask \(8 x 8\) must be as large as the image"):
        masked_origin(tokenizer, image, Image.new("RGB", (8, 8)), 6)
    with pytest.raises(ValueError, match="leaves all tokens"):
        masked_origin(tokenizer, image, black, 6)


def test_in_painting_keeps_tokens_and_their_places(folder, picture):
    run = run_of(
        folder,
        "random",
        num_kept=8,
        keep_from=str(picture / "image.png"),
        mask=str(picture / "mask.png"),
    )
    pair = load_pair(folder / "random", folder / "tokenizer", CPU)
    with Image.open(picture / "image.png") as image, Image.open(picture / "mask.png") as mask:
        origin = masked_origin(pair.tokenizer, image.convert("RGB"), mask.convert("RGB"), 8)
    sampled, images = generate(pair, run, [0, 1, 2], origin)
    kept = origin.keep[0]
    assert torch.equal(sampled.indices[:, kept], origin.indices[:, kept].expand(3, -1))
    index = origin.source.index.expand(3, -1)
    expected = pair.tokenizer.decode(sampled.indices, Source(index, 8), (4, 4)).clamp(-1, 1)
    torch.testing.assert_close(images, expected.detach(), rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------ the command


def test_the_command_writes_images_and_makes_one_again(folder, tmp_path, capsys):
    options = ["--classes", "3,7", "--num", "5", "--guidance", "4", "--batch-size", "2"]
    options += ["--guidance-schedule", "power", "--guidance-power", "0.5"]
    options += ["--temperature", "1.0", "0.8", "--top-k", "3"]
    assert sample(folder, tmp_path / "out", *options) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [*(f"{k:06d}.png" for k in range(5)), "SHA256SUMS", "grid.png", "samples.json"]
    assert "grid: " in capsys.readouterr().out
    sidecar = str(tmp_path / "out/samples.json")
    again = ["sample", "--again", sidecar, "--images", "3", "--out", str(tmp_path / "again")]
    assert main(again) == 0
    first, second = (read(tmp_path / name / "000003.png") for name in ("out", "again"))
    assert np.array_equal(first, second)
    settings = json.loads((tmp_path / "out/samples.json").read_text())["run"]["settings"]
    assert (settings["guidance_schedule"], settings["guidance_power"]) == ("power", 0.5)
    assert main(again) == 1
    assert "is there already" in capsys.readouterr().err


def test_the_command_in_paints(folder, picture, capsys):
    options = ["--keep-from", str(picture / "image.png"), "--mask", str(picture / "mask.png")]
    options += ["--num", "2", "--num-kept", "8", "--steps", "2"]
    assert sample(folder, picture / "out", *options, order="random") == 0
    assert (picture / "out/000001.png").is_file()
    assert sample(folder, picture / "merge", *options, order="merge") == 1
    assert "order 'random'" in capsys.readouterr().err
    assert not (picture / "merge").exists()


def test_the_command_prints_what_8_bits_cost(folder, tmp_path, capsys):
    assert sample(folder, tmp_path / "out", "--num", "2", "--weights", "int8") == 0
    assert "int8 weights: logits are off by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--classes", "3,12"], "class (12) must be between 0 and 9"),
        (["--classes", "three"], "classes (three) must be whole numbers"),
        (["--num-kept", "7"], "--num-kept (7) must be one of those trained on"),
        (["--guidance", "-1"], "--guidance (-1.0) must be between 0"),
    ],
)
def test_the_command_refuses_what_cannot_be_and_writes_nothing(
    folder, tmp_path, capsys, options, wanted
):
    assert sample(folder, tmp_path / "out", *options) == 1
    assert wanted in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_a_folder_with_something_in_it_is_left_alone(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert sample(folder, tmp_path / "out") == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def generator_of(folder, directory, path):
    """A generator that says where its tokenizer was; None says nothing."""
    extra = {"tokenizer": tokens_hash(folder / "tokenizer"), "class_names": []}
    extra |= {} if path is None else {"tokenizer_path": str(path)}
    saved = load_model(folder / "merge", kind="generator")
    config = saved_generator(saved).config
    save_model(directory, saved.state, config, kind="generator", extra=extra)
    return directory


def test_the_tokenizer_is_found_where_training_had_it(folder, tmp_path, capsys):
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    model = generator_of(folder, tmp_path / "model", tmp_path / "tokenizer")
    command = ["sample", "--generator", str(model), "--num", "2", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out/samples.json").read_text())
    assert record["run"]["tokenizer"] == str(tmp_path / "tokenizer")
    # Another tokenizer in its place, or none, is noticed, and the option named.
    other = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    with torch.no_grad():
        other.encoder.to_latents.weight[0] += 1
    other.save_pretrained(tmp_path / "tokenizer")
    for found in ("trained on tokens of tokenizer", "no directory"):
        assert main([*command, "--out", str(tmp_path / "again")]) == 1
        printed = capsys.readouterr().err
        assert found in printed
        assert "name it with --model" in printed
        shutil.rmtree(tmp_path / "tokenizer", ignore_errors=True)
    assert not (tmp_path / "again").exists()


def test_the_directory_of_a_run_is_not_its_model(folder, tmp_path, capsys):
    model = generator_of(folder, tmp_path / "run" / "model", None)
    assert (
        main(["sample", "--generator", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 1
    )
    assert f"did you mean {model}?" in capsys.readouterr().err


def test_a_generator_that_does_not_know_its_tokenizer_says_so(folder, tmp_path):
    model = generator_of(folder, tmp_path / "model", None)
    with pytest.raises(ValueError, match=r"does not say where .* name it with --model"):
        known_tokenizer(model)


def test_training_leaves_word_of_the_tokenizer(tmp_path):
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_tokens(tmp_path / "tokens", tokens_hash(tmp_path / "tokenizer"))
    run = small(tmp_path, num_steps=1, image_every=2)
    model = train(replace(run, out=str(tmp_path / "run")))
    assert known_tokenizer(model) == str(tmp_path / "tokenizer")


@pytest.mark.parametrize("name", [each.name for each in bundled_models() if "_" in each.name])
def test_a_generator_of_the_package_finds_its_tokenizer_there(name):
    assert known_tokenizer(name) == name.partition("_")[0]


@pytest.mark.slow
def test_sampling_needs_no_model_of_ones_own(tmp_path, capsys):
    assert main(["sample", "--num", "1", "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out/samples.json").read_text())
    assert record["run"]["model"] == BUNDLED_GENERATOR
    assert record["run"]["tokenizer"] == BUNDLED_TOKENIZER
    assert "1 images" in capsys.readouterr().out


@pytest.mark.parametrize("names", [3, [1] * 10, ["one"], {"a": 1}])
def test_class_names_that_are_not_one_for_each_class_are_refused(folder, tmp_path, names):
    shutil.copytree(folder / "merge", tmp_path / "model")
    record = json.loads((tmp_path / "model/config.json").read_text())
    record["extra"]["class_names"] = names
    (tmp_path / "model/config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"class_names of the generator in .* (must be|has 1)"):
        load_pair(tmp_path / "model", folder / "tokenizer", CPU)
