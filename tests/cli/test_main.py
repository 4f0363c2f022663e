import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.cli import images as cli_images
from mergevq.cli.main import COMMANDS, GROUPS, main
from mergevq.config.recipes import RECIPES
from mergevq.runtime.environment import EXTRAS, bundled_models
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.parts import tokenizer_config

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = shlex.split(
    "--model.image-size 16 --model.num-kept 20 "
    "--model.stem.channels 16 --model.stem.channel-mult 1 2 --model.stem.num-res-blocks 1 "
    "--model.reducer.num-layers 2 --model.reducer.num-heads 2 --model.quantizer.num-bits 6 "
    "--model.expander.dim 16 --model.expander.num-heads 2 "
    "--model.decoder.channels 16 --model.decoder.channel-mult 1 2 "
    "--model.decoder.num-res-blocks 1 --model.decoder.num-layers 1 --model.decoder.num-heads 2 "
    "--kept.candidates 20 40 --train.eval-num-kept 20 --train.num-steps 2 --train.batch-size 4 "
    "--train.num-eval-images 4 --train.device cpu --teacher.kind none"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of an untrained tokenizer: 16 pixels, patches of 2, K from 16 to 40."""
    torch.manual_seed(1)
    config = tokenizer_config(
        image_size=16,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        num_layers=3,
        num_heads=2,
        num_kept=20,
        kept_range=(16, 40),
        num_bits=6,
        num_decoder_layers=1,
        num_decoder_heads=2,
        source_dim=16,
        num_source_heads=2,
    )
    directory = tmp_path_factory.mktemp("model")
    Tokenizer(config).save_pretrained(directory)
    return directory


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, size in enumerate([(16, 16), (20, 12), (31, 17)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def reconstruct(images, model, tmp_path, *options):
    command = ["reconstruct", *map(str, images), "--model", str(model)]
    return main([*command, "--out", str(tmp_path / "out"), "--device", "cpu", *options])


# --------------------------------------------------------------------------- the command


def test_nothing_waits_for_torch_that_does_not_compute():
    commands = [
        ["--help"],
        ["recipes"],
        ["train", "--help"],
        ["train", "digits32", "--help"],
        ["train", "nope"],
        ["train", "digits32", "--model.num-kpt", "3"],
        ["train", "digits32", "--model.stem.kind", "patch", "--help"],
        ["parts"],
        ["parts", "quantizer"],
        ["reconstruct", "--help"],
        ["compress", "--help"],
        ["decompress", "--help"],
        ["encode", "--help"],
    ]
    # One process for all: what one command imports stays, and the first to import it is named.
    code = (
        "import sys\nfrom mergevq.cli.main import main\n"
        f"for arguments in {commands}:\n"
        " try: main(arguments)\n except SystemExit: pass\n"
        " if 'torch' in sys.modules: sys.exit('torch for ' + ' '.join(arguments))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=False, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_nothing_shows_six_commands_that_there_are(capsys):
    assert main([]) == 0
    shown = [
        line.split("  mergevq ")[1]
        for line in capsys.readouterr().out.splitlines()
        if "  mergevq " in line
    ]
    assert len(shown) == 6
    for line in shown:
        name, *rest = line.split()
        assert name in COMMANDS or rest[0] in GROUPS[name]


def test_models_of_the_package_are_listed_by_name(capsys):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    for each in bundled_models():
        assert f" {each.name} " in printed
    assert printed.count("\n* ") + printed.startswith("* ") == 3


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_lists_the_commands(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in printed


def test_an_unknown_command_lists_those_there_are(capsys):
    assert main(["trian"]) == 2
    printed = capsys.readouterr().err
    assert "no command 'trian'; did you mean 'train'?" in printed
    for name in COMMANDS:
        assert f"\n  {name} " in printed


@pytest.mark.parametrize("arguments", [["train"], ["train", "nope"]])
def test_an_unknown_recipe_lists_those_there_are(arguments, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    for name in RECIPES:
        assert f"\n  {name} " in printed


@pytest.mark.parametrize("arguments", [["recipes"], ["train", "--help"]])
def test_recipes_are_listed_with_what_they_are(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert f"\n  {name} " in printed
        assert recipe.__doc__.splitlines()[0] in printed


def test_a_misspelt_option_suggests_the_right_one(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "digits32", "--model.num-kpt", "3"])
    assert exit_.value.code == 2
    assert "--model.num-kept" in capsys.readouterr().err


def test_a_wrong_choice_lists_the_choices(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "digits32", "--loss.perceptual-trunk", "nope"])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert all(choice in printed for choice in ("vgg", "alex", "squeeze"))


def test_an_impossible_value_is_explained_in_our_words(capsys):
    assert main(["train", "digits32", "--model.num-kept", "3000"]) == 1
    said = capsys.readouterr().err
    assert "num-kept (3000) must be between 1 and the 64" in said
    assert said.count("\n") == 1


def test_help_of_a_recipe_says_what_its_fields_mean(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "digits32", "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert RECIPES["digits32"].__doc__.splitlines()[0] in printed
    for option in ("--out", "--resume", "--dry-run", "--model.num-kept", "--train.device"):
        assert option in printed
    assert "Optimizer steps." in printed


@pytest.mark.parametrize(
    "command",
    [[name] for name in COMMANDS if name != "train"]
    + [[group, name] for group, members in GROUPS.items() for name in members],
    ids=" ".join,
)
def test_help_shows_no_default_where_it_is_empty(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "(default: )" not in printed
    assert "-h, --help" in printed


def test_an_error_with_a_way_out_is_one_line(capsys, tmp_path):
    assert reconstruct([tmp_path / "absent.png"], tmp_path / "absent", tmp_path) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("mergevq: error: no directory ")
    assert printed.count("\n") == 1


def test_a_mistyped_recipe_is_told_the_nearest(capsys):
    assert main(["train", "digits33"]) == 2
    assert "did you mean 'digits32'" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mergevq ")


def test_a_large_picture_is_told_what_takes_less(model, capsys, tmp_path):
    Image.new("RGB", (48, 48)).save(tmp_path / "large.png")
    reconstruct([tmp_path / "large.png"], model, tmp_path, "--size-policy", "error")
    printed = capsys.readouterr().err
    assert "48 x 48 pixels are 576 tokens at once" in printed
    assert "--size-policy tile" in printed


def test_a_very_large_picture_is_told_what_is_quicker(model, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(cli_images._LARGE, "tile", 9)
    Image.new("RGB", (48, 48)).save(tmp_path / "large.png")
    reconstruct([tmp_path / "large.png"], model, tmp_path)
    printed = capsys.readouterr().err
    assert "48 x 48 pixels are 9 times those of a tile" in printed
    assert "--size-policy resize is quicker" in printed


def test_an_unreadable_picture_does_not_end_a_list(model, capsys, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    Image.new("RGB", (16, 16)).save(tmp_path / "good.png")
    pictures = [tmp_path / "bad.png", tmp_path / "good.png"]
    assert reconstruct(pictures, model, tmp_path, "--size-policy", "resize") == 1
    assert (tmp_path / "out" / "good.png").is_file()
    printed = capsys.readouterr().err
    assert "1 of 2 images could not be done" in printed
    assert "bad.png" in printed


def test_an_error_that_is_not_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(COMMANDS, "recipes", lambda: int("three"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["recipes"])


def test_an_interrupt_ends_with_the_code_of_one(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "recipes", interrupted)
    assert main(["recipes"]) == 130


@pytest.mark.parametrize(
    "words",
    [
        *("reconstruct", "compress", "decompress", "sample", "finetune-source", "finetune-decoder"),
        *("probe linear", "probe knn", "probe finetune"),
        *("evaluate correlation", "evaluate text", "evaluate masks"),
    ],
)
def test_what_one_process_does_is_not_done_by_several(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    assert main([*words.split(), "--help"]) == 1
    printed = capsys.readouterr().err
    assert f"mergevq {words} runs in one process, and there are 2 (WORLD_SIZE)" in printed
    assert not list(tmp_path.iterdir())


def test_what_several_processes_share_is_left_to_them(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in (["encode"], *(["evaluate", name] for name in GROUPS["evaluate"])):
        if words[-1] in {"selftest", "correlation", "text", "masks"}:
            continue
        with pytest.raises(SystemExit) as exit_:
            main([*words, "--help"])
        assert exit_.value.code == 0
    assert "WORLD_SIZE" not in capsys.readouterr().err


# ----------------------------------------------------------------------------- reconstruct


def test_reconstruct_writes_a_picture_for_every_image(images, model, tmp_path, capsys):
    paths = [images / "0.png", images / "1.png"]
    assert reconstruct(paths, model, tmp_path) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["0.png", "1.png"]
    with Image.open(tmp_path / "out" / "0.png") as figure:
        assert figure.width > 4 * 128
    printed = capsys.readouterr().out
    for wanted in ("20 of 64 tokens", "120 tokens +", "dB given source", "dB recovered source"):
        assert wanted in printed


@pytest.mark.parametrize("tokens", [["16", "24", "40"], ["16,24", "40"], ["16,24,40"]])
def test_several_numbers_of_tokens_are_several_rows(images, model, tmp_path, capsys, tokens):
    assert reconstruct([images / "0.png"], model, tmp_path, "--num-kept", *tokens) == 0
    printed = capsys.readouterr().out
    assert [f"{num_kept} of 64 tokens" in printed for num_kept in (16, 24, 40)] == [True] * 3
    with Image.open(tmp_path / "out" / "0.png") as figure:
        assert figure.height > 3 * 128


def test_tokens_that_are_no_numbers_are_an_error(images, model, tmp_path, capsys):
    assert reconstruct([images / "0.png"], model, tmp_path, "--num-kept", "16,many") == 1
    assert "--num-kept (16,many) must be whole numbers: --num-kept 16,20" in capsys.readouterr().err


def test_an_illegal_size_says_which_image_and_what_to_do(images, model, tmp_path, capsys):
    assert reconstruct([images / "2.png"], model, tmp_path, "--size-policy", "error") == 1
    printed = capsys.readouterr().err
    assert "2.png: image size (31 x 17)" in printed
    assert "'resize' or 'tile'" in printed


@pytest.mark.parametrize(
    ("policy", "wanted"), [("resize", ": 21 of 66 "), ("tile", ": 6 tiles x 20 of 64 ")]
)
def test_a_size_policy_makes_any_size_legal(images, model, tmp_path, capsys, policy, wanted):
    assert reconstruct([images / "2.png"], model, tmp_path, "--size-policy", policy) == 0
    printed = capsys.readouterr().out
    assert wanted in printed
    assert ("resized to" in printed and "17 x 31 given" in printed) == (policy == "resize")
    for name in ("given", "recovered"):
        (full,) = (tmp_path / "out/2").glob(f"{name}_*.png")
        with Image.open(full) as picture:
            assert picture.size == (17, 31)


def test_images_of_equal_names_do_not_overwrite_each_other(images, model, tmp_path):
    other = tmp_path / "0.jpg"
    Image.open(images / "0.png").save(other)
    assert reconstruct([images / "0.png", other], model, tmp_path) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["0-2.png", "0.png"]


def test_an_image_is_never_overwritten(images, model, capsys):
    before = (images / "0.png").read_bytes()
    command = ["reconstruct", str(images / "0.png"), "--model", str(model), "--out", str(images)]
    assert main(command) == 1
    assert "would overwrite" in capsys.readouterr().err
    assert (images / "0.png").read_bytes() == before


def test_reconstruct_wants_an_image(model, capsys):
    assert main(["reconstruct", "--model", str(model)]) == 1
    assert "at least one file" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_without_code(images, model, tmp_path, capsys):
    assert reconstruct([images / "0.png"], model, tmp_path, "--num-kept", "60") == 0
    lines = capsys.readouterr().err.splitlines()
    warned = [line for line in lines if line.startswith("mergevq: warning: num_kept (60) is")]
    assert len(warned) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_device_that_is_not_there_names_those_that_are(images, model, tmp_path, capsys):
    assert reconstruct([images / "0.png"], model, tmp_path, "--device", "cuda") == 1
    assert "auto or" in capsys.readouterr().err


@pytest.mark.parametrize(("chosen", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_unless_the_user_says_otherwise(
    images, model, tmp_path, monkeypatch, chosen, expected
):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    assert reconstruct([images / "0.png"], model, tmp_path) == 0
    assert os.environ["OMP_WAIT_POLICY"] == expected


# ------------------------------------------------------------------------- how errors are said


def test_a_picture_of_another_size_is_answered_with_the_option(images, model, tmp_path, capsys):
    assert reconstruct([images / "2.png"], model, tmp_path, "--size-policy", "error") == 1
    assert "--size-policy 'resize' or 'tile'" in capsys.readouterr().err


def test_an_out_that_is_a_file_is_told_with_a_way_out(images, model, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert reconstruct([images / "0.png"], model, tmp_path) == 1
    printed = capsys.readouterr().err
    assert f"{tmp_path / 'out'} needs a folder where there is a file" in printed
    assert "another place with --out" in printed
    assert printed.count("\n") == 1
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("words", [["--out=~/x"], ["--out", "~/x"]])
def test_a_tilde_is_the_users_folder_in_every_option(words, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    seen = []
    monkeypatch.setattr("mergevq.training.train.train", lambda run, **_: seen.append(run) or Path())
    main(["train", "digits32", *words, "--data.path=~/pictures"])
    assert seen[0].out == f"{tmp_path}/x"
    assert seen[0].data.path == f"{tmp_path}/pictures"


# ----------------------------------------------------------------------- the other commands


def test_doctor_says_what_a_report_needs(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    for wanted in ("python", "numpy", "cpu", "cuda", "mps", "math", "writable", "lpips vgg"):
        assert wanted in printed
    for extra in EXTRAS:
        assert f"\n  {extra} " in printed


def test_doctor_says_how_to_install_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(EXTRAS, "demo", ("pillow", "no-such-package"))
    main(["doctor"])
    printed = capsys.readouterr().out
    assert f"without no-such-package: {sys.executable} -m pip install pillow no-such" in printed


def test_doctor_knows_every_extra_of_the_project():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {k: tuple(v) for k, v in project["optional-dependencies"].items() if k != "dev"}
    assert wanted == EXTRAS


def test_convert_makes_a_model_of_an_official_checkpoint(shared, tmp_path, capsys):
    checkpoint = shared / "golden" / "official_hybrid.safetensors"
    options = ["--image-size", "64", "--num-kept", "144"]
    options += ["--num-heads", "4", "--num-decoder-heads", "4"]
    assert main(["convert", str(checkpoint), "--out", str(tmp_path / "model"), *options]) == 0
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.config.num_kept == 144
    assert tokenizer.quantizer.spec.bits == 18
    assert "untrained" in capsys.readouterr().out


def test_convert_needs_what_shapes_cannot_tell(tmp_path, capsys):
    (tmp_path / "theirs.ckpt").touch()
    assert main(["convert", str(tmp_path / "theirs.ckpt"), "--out", str(tmp_path / "model")]) == 1
    assert "--image-size, --num-kept and --num-heads, or --lpips" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ train


@pytest.mark.slow
def test_a_dry_run_says_what_a_run_would_take(images, tmp_path, capsys):
    data = ["--data.path", str(images), "--data.num-workers", "0"]
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", "digits32", *TINY, *data, *out, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for wanted in (
        "20 to 40 of 64",
        "6 bits",
        "2 of 4 images",
        "GiB",
        "images per second",
        "no labels",
    ):
        assert wanted in printed
    assert not (tmp_path / "run").exists()


def test_training_leaves_a_model_that_reconstructs(images, tmp_path, capsys):
    data = ["--data.path", str(images), "--data.num-workers", "0"]
    assert main(["train", "digits32", *TINY, *data, "--out", str(tmp_path / "run")]) == 0
    trained, title, *commands = capsys.readouterr().out.splitlines()
    model = trained.removeprefix("trained tokenizer: ")
    assert title == "next:"
    assert all(f"--model {model} --data {images}" in command for command in commands)
    assert reconstruct([images / "0.png"], model, tmp_path) == 0
    assert main(["train", "digits32", *TINY, *data, "--out", str(tmp_path / "run")]) == 1
    assert "--resume" in capsys.readouterr().err
