"""Every option of every command reaches the library, as it was given and alone.

Options are read off the signatures and the settings, so that a new one is tested without a line
here. Each is changed on a command line that is parsed as a user's is, and the library's functions
are replaced by others that only note what they are given.
"""

import contextlib
import dataclasses
import inspect
import pkgutil
import re
import typing
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import tyro

from mergevq.cli import train
from mergevq.cli.main import COMMANDS, GROUPS, main
from mergevq.config.recipes import RECIPES
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.config.training import DecoderRun, GeneratorRun, TokenizerRun
from tests.support.leaves import (
    ABSENT,
    bare,
    changed,
    leaf_kinds,
    others,
    replaced,
    value_at,
    with_parts_of,
)

ALL = {(name,): command for name, command in COMMANDS.items() if name != "train"} | {
    (group, name): command for group, members in GROUPS.items() for name, command in members.items()
}
STOP = object()
"""Result of a function that does all: the command ends there."""
TOKENIZER = SimpleNamespace(config=SimpleNamespace(image_size=8, patch_size=2, grid_size=4))
TOKENIZER.to = lambda _: TOKENIZER
PRINTED = {("parts",), ("completion",)}
"""Commands that only print what is known without the library: their own tests have them."""
LIBRARY = {
    "quickstart": {"demo.quickstart.quickstart": STOP},
    "reconstruct": {
        "tokenizer.tokenizer.Tokenizer.from_pretrained": TOKENIZER,
        "runtime.device.resolve_device": None,
        "data.prepare.load_picture": SimpleNamespace(size=(8, 8)),
        "tokenizer.codec.embed_image": None,
        "tokenizer.codec.reconstruct_image": None,
        "tokenizer.codec.full_pictures": {},
        "tokenizer.codec.reconstruction_figure": None,
    },
    "compress": {
        "tokenizer.compressed.PictureCodec.from_pretrained": "a codec",
        "runtime.device.resolve_device": None,
        "metrics.lpips.load_perceptual": None,
        "data.prepare.load_picture": None,
        "tokenizer.compressed.compress_image": None,
        "runtime.files.write_bytes": None,
    },
    "decompress": {
        "tokenizer.compressed.PictureCodec.from_pretrained": "a codec",
        "runtime.device.resolve_device": None,
        "data.prepare.read_bounded": b"a file",
        "tokenizer.compressed.decompress_image": None,
    },
    "encode": {"tokenizer.encode.encode": STOP},
    "quantize": {"training.posthoc.quantize.quantize": STOP},
    "publish": {
        "report.publication.write_publication": lambda _, __, ___, out: out,
        "report.publication.upload": "owner/name@1f2e",
    },
    "sample": {
        "generator.writing.make_again": lambda _, images: [SimpleNamespace(save=str)] * len(images),
        "generator.writing.write_samples": STOP,
    },
    "convert": {
        "tokenizer.interop.read_official": None,
        "tokenizer.interop.official_config": TokenizerConfig(),
        "tokenizer.interop.load_official": None,
        "metrics.lpips.convert_perceptual_files": None,
    },
    "demo": {"demo.app.serve": STOP},
    "compare": {"training.contest.run.compare": STOP},
    "finetune-source": {"training.posthoc.source.finetune_source": STOP},
    "finetune-decoder": {"training.posthoc.decoder.finetune_decoder": STOP},
    "evaluate reconstruction": {"evaluate.reconstruction.evaluate_reconstruction": STOP},
    "evaluate robustness": {"evaluate.robustness.run.evaluate_robustness": STOP},
    "evaluate correlation": {"evaluate.robustness.correlation.evaluate_correlation": STOP},
    "evaluate text": {"evaluate.content.text.evaluate_text": STOP},
    "evaluate masks": {"evaluate.content.masks.evaluate_masks": STOP},
    "evaluate reference": {"metrics.references.make_reference": STOP},
    "evaluate generation": {"evaluate.generation.evaluate_generation": STOP},
    "evaluate guidance": {"evaluate.guidance_sweep.evaluate_guidance": STOP},
    "evaluate selftest": {"evaluate.selftest.check_metrics": STOP},
    "probe linear": {"evaluate.probe.run.probe": STOP},
    "probe knn": {"evaluate.probe.run.probe": STOP},
    "probe finetune": {"evaluate.probe.run.probe": STOP},
    "export onnx": {"generator.export.folder.export_folder": STOP},
    "export pt2": {"generator.export.folder.export_folder": STOP},
    "export web": {"demo.site.site.write_site": STOP},
    "bench tokenizer": {
        "training.bench.tokenizer.bench_tokenizer": [],
        "training.bench.tokenizer.profile_train_step": [],
        "runtime.files.write_json": None,
    },
    "bench generator": {
        "runtime.device.resolve_device": None,
        "generator.bench.size_config": "an architecture",
        "generator.bench.grid_config": "an architecture on a grid",
        "training.bench.tokenizer.load_reference": None,
        "generator.bench.bench_generator": [],
        "runtime.files.write_json": None,
    },
    "bench gpu": {
        "generator.bench.size_config": "an architecture",
        "generator.bench.grid_config": "an architecture on a grid",
        "training.bench.tokenizer.load_reference": None,
        "training.bench.device.bench_device": STOP,
    },
}
"""Functions that do a command's work, and what they return instead; None is anything."""
SILENT = {
    "reconstruct": ("cli.images._result_line",),
    "compress": ("cli.compress._compressed_line",),
    "demo": ("cli.main.signal.signal",),
    "bench tokenizer": ("training.bench.tokenizer.conditions", "training.bench.tokenizer.record"),
    "bench generator": ("generator.bench.record",),
}
"""Functions that only write down what was asked for, which is not yet doing it."""
GIVEN = {
    "reconstruct": {"images": (Path("a.png"),)},
    "compress": {"images": (Path("a.png"),)},
    "decompress": {"files": (Path("a.mvq"),)},
    "sample": {"generator": "a-generator", "model": "a-tokenizer"},
    "convert": {"checkpoint": Path("a.ckpt"), "image_size": 8, "num_kept": 3, "num_heads": 2},
    "evaluate generation": {"generator": "a-generator", "model": "a-tokenizer"},
    "evaluate guidance": {"generator": "a-generator", "model": "a-tokenizer"},
    "evaluate reference": {"kind": "generation"},
    "compare": {"arms": ("digits32",)},
    "finetune-source": {
        "model": "a-tokenizer",
        "tokens": "a-folder",
        "generator": "a-generator",
    },
    "finetune-decoder": {"model": "a-tokenizer", "generator": "a-generator"},
    "quantize": {"model": "a-tokenizer"},
    "bench tokenizer": {"out": Path("bench.json"), "reference": Path("plain.py")},
    "bench generator": {"out": Path("bench.json"), "reference": Path("plain.py")},
    "bench gpu": {"out": Path("bench.json"), "reference": Path("plain.py")},
}
"""Without these a command has nothing to do."""
SAMPLING = ("sample", "evaluate generation", "evaluate guidance")
"""Commands that have the options of sampling."""
NEEDS = {
    ("sample", "keep_from"): {"keep_from": Path("a.png"), "mask": Path("b.png")},
    ("sample", "mask"): {"keep_from": Path("a.png"), "mask": Path("b.png")},
    ("sample", "images"): {"again": Path("samples.json")},
    ("evaluate robustness", "joint"): {"map_fractions": ("0.2",)},
    **{
        (command, name): {"classifier": Path("classes.pt")}
        for command, name in (
            ("evaluate generation", "classifier_outputs"),
            ("evaluate guidance", "classifier_outputs"),
        )
    },
    **{
        ("compress", name): {"quality": ("lpips", 0.25)}
        for name in ("lpips_weights", "lpips_trunk")
    },
    **{
        (command, name): {"steps": 4} for command in SAMPLING for name in ("schedule", "confidence")
    },
    **{(command, "num_drafted"): {"draft": "left"} for command in SAMPLING},
    **{
        (command, "draft_generator"): {"draft": "model", "draft_generator": "a-small-one"}
        for command in SAMPLING
    },
}
"""Options that go with others."""
WITHOUT = {("evaluate generation", "samples"): ("generator", "model")}
"""Options that do not go with others, which are left out."""
VALUES = {
    ("evaluate guidance", "guidance"): ("1.5", 1.5),
    ("evaluate guidance", "stop"): ("2.5", 2.5),
    ("evaluate guidance", "step"): ("0.25", 0.25),
    ("evaluate robustness", "fractions"): (("0.25", "0.75"), (0.25, 0.75)),
    ("evaluate robustness", "map_fractions"): (("0.2", "0.7"), (0.2, 0.7)),
    ("reconstruct", "out"): (Path("other"), "other/a.png"),
    ("compress", "out"): (Path("other"), "other/a.mvq"),
    ("compress", "quality"): (("bits_per_pixel", 0.5), 0.5),
    ("decompress", "out"): (Path("other"), "other/a.png"),
    ("sample", "classes"): ("2,1", (2, 1)),
    ("finetune-source", "precision"): ("float32", "float32"),
    ("finetune-source", "device"): ("cpu", "cpu"),
    ("finetune-source", "recipe"): ("imagenet256_gr_source", "imagenet256_gr_source"),
    **{(f"export {form}", "num_kept"): ("3,5", (3, 5)) for form in ("onnx", "pt2", "web")},
    ("compare", "arms"): ("digits32_pool", "digits32_pool"),
    ("compare", "settings"): ("train.num-steps=3", 3),
    ("compare", "against"): ("digits32", "digits32"),
    ("bench tokenizer", "recipe"): ("digits32", "digits32"),
    ("bench generator", "recipe"): ("digits32_ar", "digits32_ar"),
    ("bench generator", "grid_tokens"): ("64", 64),
    ("bench generator", "batch_sizes"): ("3,5", (3, 5)),
    ("bench gpu", "recipes"): ("digits32", "digits32"),
    ("bench gpu", "batch_sizes"): ("3,5", (3, 5)),
}
"""Values on the command line, and in the library, where an option's type is not enough."""
CALLED = {
    "guidance": {
        **dict.fromkeys(SAMPLING, "guidance_scale"),
        "bench generator": "guidance",
    },
    "confidence": "confidence_temperature",
    "num": "num_images",
    "show": "num_shown",
    "baseline_images": "num_baseline_images",
    "features": "num_features",
    "neighbours": "num_looked_up",
    "npz": "write_array",
    "lpips": {"bench tokenizer": "perceptual_path", "finetune-decoder": "perceptual_path"},
    "lpips_trunk": {"evaluate selftest": "trunk", "compress": "trunk"},
    "k": "num_neighbours",
    "data": {
        "probe linear": "path",
        "probe knn": "path",
        "probe finetune": "path",
        "finetune-decoder": "path",
    },
    "val_data": dict.fromkeys(
        ("probe linear", "probe knn", "probe finetune", "finetune-decoder"), "val_path"
    ),
    "val_images": "num_eval_images",
    "image_batch_size": "batch_size",
    "linear_epochs": "num_epochs",
    "images": {"bench tokenizer": "batch_size", "sample": "image_ids"},
    "model": {
        **dict.fromkeys(("reconstruct", "compress", "decompress"), "path"),
        **dict.fromkeys(("sample", "finetune-source", "finetune-decoder"), "tokenizer"),
        **dict.fromkeys(("evaluate generation", "evaluate guidance"), "tokenizer"),
    },
    "lpips_weights": "path",
    "quality": {"compress": "bits_per_pixel"},
    "checkpoint": "path",
    "generator": {
        "sample": "model",
        "evaluate generation": "model",
        "evaluate guidance": "model",
    },
    "grid_tokens": "num_cells",
    "out": {
        "convert": "0",
        "reconstruct": "0",
        "compress": "path",
        "decompress": "0",
        "bench tokenizer": "path",
        "bench generator": "path",
    },
    "reference": {"bench generator": "path", "bench gpu": "path"},
    "device": {
        "bench generator": "name",
        "reconstruct": "name",
        "compress": "name",
        "decompress": "name",
    },
}
"""Settings of the library that are not called as the option is, with or without `num_`."""
MORE = {
    ("publish", "out"): "what is written there is uploaded",
    ("reconstruct", "images"): "pictures are called after them",
    ("compress", "images"): "files are called after them",
    ("decompress", "files"): "pictures are called after them",
    ("decompress", "max_pixels"): "so many bytes are read of a file",
    ("reconstruct", "num_kept"): "a picture has a row for each",
    ("sample", "again"): "it says all but which, so another function makes the images",
    ("evaluate generation", "samples"): "they stand instead of what samples",
    ("evaluate reference", "kind"): "of one kind alone features are kept",
    **{
        (command, name): "they are another kind of passes"
        for command in SAMPLING
        for name in ("steps", "draft")
    },
}
"""Options that change more than one setting of the library, and why."""
OTHERWISE = {
    ("publish", "dry_run"): "it calls one function less",
    ("convert", "lpips"): "it stands instead of a checkpoint, as two files",
    ("finetune-source", "recipe"): "it is a name for many settings",
    ("compare", "arms"): "each is a name for many settings",
    ("compare", "settings"): "each is a setting of every arm",
    ("bench tokenizer", "recipe"): "it is a name for many settings",
    ("bench tokenizer", "profile"): "it calls one more function",
    ("bench generator", "recipe"): "it stands instead of a size",
    ("bench gpu", "recipes"): "each is a name for many settings",
    ("bench gpu", "images"): "it is a setting of each recipe",
    ("bench gpu", "device"): "it is a setting of each recipe",
}
"""Options that reach the library as something else, and why."""


class Reached(BaseException):
    """The command has come to where its work begins."""


# -------------------------------------------------------------------------------- what is given


class Option(typing.NamedTuple):
    """One option of a command."""

    kind: object
    default: object
    required: bool


def options_of(command):
    """Every option by name, those of groups of options among them."""
    found = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        kind = bare(parameter.annotation)
        if dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind, include_extras=True)
            items = {field.name: (hints[field.name], field) for field in dataclasses.fields(kind)}
        else:
            items = {name: (parameter.annotation, parameter)}
        for each, (hint, item) in items.items():
            required = item.default in (inspect.Parameter.empty, dataclasses.MISSING)
            found[each] = Option(hint, None if required else item.default, required)
    return found


def annotations(kind):
    return getattr(kind, "__metadata__", ())


def in_commas(kind):
    return any(getattr(each, "metavar", None) == "K,K,.." for each in annotations(kind))


def words(name, kind, value):
    """The option as it is typed."""
    if any(mark in annotations(kind) for mark in annotations(tyro.conf.Positional[int])):
        return [str(each) for each in (value if isinstance(value, tuple) else (value,))]
    # The kind of a part is not typed with each of its settings.
    option = re.sub(r"\[.*?\]", "", name).replace("_", "-")
    if isinstance(value, bool):
        section, dot, last = option.rpartition(".")
        return [f"--{option}" if value else f"--{section}{dot}no-{last}"]
    if in_commas(kind):
        return [f"--{option}", ",".join(map(str, value))]
    return [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]


def typed(given, options):
    """A command line; what is positional comes first."""
    lines = [words(name, options[name].kind, value) for name, value in given.items()]
    lines.sort(key=lambda line: line[:1] >= ["--"] and line[0].startswith("--"))
    return [word for line in lines for word in line]


def another(command, name, option, base):
    """A value to give to an option, and what has to reach the library."""
    if (command, name) in VALUES:
        return VALUES[command, name]
    if in_commas(option.kind):
        return (12, 14), (12, 14)
    value = next(iter(others(option.kind, base.get(name, option.default), name)))
    return value, value


# ------------------------------------------------------------------------------ what is reached


def plain(value):
    """As it compares: paths are text, one of several is that one."""
    if isinstance(value, mock.Mock):
        return re.sub(r" id='\d+'", "", repr(value))
    if isinstance(value, list | tuple):
        parts = tuple(map(plain, value))
        return parts[0] if len(parts) == 1 else parts
    return str(value) if isinstance(value, Path) else value


def flat(key, value):
    """The settings in a value by dotted name."""
    if dataclasses.is_dataclass(value):
        return {f"{key}.{leaf}": plain(value_at(value, leaf)) for leaf in leaves_of(value)}
    return {key: plain(value)}


def leaves_of(value):
    for field in dataclasses.fields(value):
        inside = getattr(value, field.name)
        if dataclasses.is_dataclass(inside):
            yield from (f"{field.name}.{leaf}" for leaf in leaves_of(inside))
        else:
            yield field.name


class Library:
    """Stands for the functions of one command, and notes what they are given."""

    def __init__(self, command):
        self.calls = []
        self.results = mock.MagicMock()
        self.targets = LIBRARY[command]

    def function(self, target):
        """In place of one function."""
        signature = inspect.signature(pkgutil.resolve_name(f"mergevq.{target}"))
        result = self.targets[target]

        def noted(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self.calls.append((target, bound.arguments))
            if result is STOP:
                raise Reached
            if result is None:
                # Its own calls are noted too, as of a page that is launched.
                return getattr(self.results, target)
            return result(*args, **kwargs) if callable(result) else result

        return noted

    def found(self):
        """Values by function and dotted name of a setting, several of them where they differ."""
        of_results = [
            (name, dict(enumerate(args)) | kwargs)
            for name, args, kwargs in self.results.mock_calls
            if not name.rpartition(".")[2].startswith("__")
        ]
        found = {}
        for name, arguments in self.calls + of_results:
            for parameter, value in arguments.items():
                for key, leaf in flat(f"{name}.{parameter}", value).items():
                    seen = found.setdefault(key, [])
                    if leaf not in seen:
                        seen.append(leaf)
        return {key: plain(values) for key, values in found.items()}


KNOWN = {}
"""Outcomes of command lines by command and words: most options start from the same one."""


def reached_once(monkeypatch, command, arguments):
    """All that a command gives to the library, as an earlier test found it."""
    key = (command, *arguments)
    if key not in KNOWN:
        KNOWN[key] = reached(monkeypatch, command, arguments)
    return KNOWN[key]


def reached(monkeypatch, command, arguments):
    """All that a command gives to the library."""
    library = Library(command)
    with monkeypatch.context() as patch, contextlib.suppress(Reached):
        for target in LIBRARY[command]:
            patch.setattr(f"mergevq.{target}", library.function(target))
        for target in SILENT.get(command, ()):
            patch.setattr(f"mergevq.{target}", mock.MagicMock(return_value={}))
        assert main([*command.split(), *arguments]) == 0
    return library.found()


def differences(first, second):
    missing = object()
    return {
        key: second.get(key)
        for key in first.keys() | second.keys()
        if first.get(key, missing) != second.get(key, missing)
    }


def names_in_library(command, name):
    """Names that the option's setting may have in the library."""
    called = CALLED.get(name, name)
    if isinstance(called, dict):
        called = called.get(command, name)
    return {called, f"num_{called}"}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("plain.py", "other-reference"):
        Path(name).touch()
    monkeypatch.delenv("WORLD_SIZE", raising=False)


CASES = [
    (" ".join(name), option)
    for name, command in ALL.items()
    if name not in PRINTED
    for option in options_of(command)
]


@pytest.mark.parametrize(("command", "name"), CASES, ids=[f"{c} {n}" for c, n in CASES])
def test_an_option_reaches_the_library_and_changes_nothing_else(command, name, monkeypatch):
    if command == "demo":
        pytest.importorskip("gradio")
    options = options_of(ALL[tuple(command.split())])
    base = {
        each: others(option.kind, None, f"given-{each}")[0]
        for each, option in options.items()
        if option.required
    }
    base |= GIVEN.get(command, {}) | NEEDS.get((command, name), {})
    value, wanted = another(command, name, options[name], base)
    before = reached_once(monkeypatch, command, typed(base, options))
    left_out = WITHOUT.get((command, name), ())
    given = {each: old for each, old in base.items() if each not in left_out} | {name: value}
    after = reached(monkeypatch, command, typed(given, options))
    changes = differences(before, after)
    assert changes, f"--{name} changes nothing"
    if (command, name) in OTHERWISE:
        return
    assert plain(wanted) in changes.values(), f"{wanted} does not arrive"
    if (command, name) in MORE:
        return
    known = names_in_library(command, name)
    strange = [key for key in changes if re.split(r"[.\[]", key)[-1] not in known]
    assert not strange, f"--{name} changes more than {known}"
    assert set(changes.values()) == {plain(wanted)}


@pytest.mark.parametrize("table", [MORE, OTHERWISE, NEEDS, WITHOUT, VALUES])
def test_no_entry_outlives_its_option(table):
    assert set(table) <= set(CASES)


def test_every_command_is_one_of_these():
    without_options = {("recipes",), ("doctor",), ("models",)}
    assert {name for name, command in ALL.items() if not options_of(command)} == without_options
    assert {" ".join(name) for name in set(ALL) - without_options - PRINTED} == set(LIBRARY)


# ------------------------------------------------------------------------------------- training


TRAIN = {
    "digits32": (TokenizerRun, "training.train.train"),
    "digits32_ar": (GeneratorRun, "training.train.train"),
    "digits32_prefix_flow": (DecoderRun, "training.train.train"),
}
TRAIN_VALUES = {
    ("digits32", "model.stem[patch].patch_size"): {
        "model.stem[patch].patch_size": 8,
        "model.image_size": 64,
        "model.decoder.kind": "patch",
    },
    ("digits32", "model.decoder[patch].blocks"): {"model.decoder[patch].blocks": "ac"},
    ("digits32", "model.decoder[patch].bit_components"): {
        "model.decoder[patch].bit_components": (0, 0, 1, 2, 3, 4, 5, 6)
    },
    ("digits32", "model.quantizer[dimensions].channel_order"): {
        "model.quantizer[dimensions].channel_order": (1, 0, 2, 3, 4, 5, 6, 7)
    },
    ("digits32", "model.quantizer[scales].scales"): {"model.quantizer[scales].scales": (1, 3, 8)},
    ("digits32_ar", "model.order[scale].scales"): {"model.order[scale].scales": (1, 3, 8)},
    ("digits32", "init_codes"): {
        "init_codes": "components",
        "model.stem[patch].norm": False,
        "model.stem[patch].width": 64,
    },
    ("digits32", "model.image_size"): {"model.image_size": 36},
    ("digits32_ar", "model.head[bits].schedule"): {"model.head[bits].schedule": (3, 5)},
    ("digits32_ar", "model.order[raster].annealing"): {
        "model.order[raster].annealing": (0.25, 0.5),
        "model.num_kept": 64,
        "model.kept_candidates": (64,),
        "kept.candidates": (64,),
        "train.eval_num_kept": (64,),
    },
    ("digits32_ar", "model.order[masked].disentangle"): {
        "model.order[masked].disentangle": True,
        "model.order[masked].visible_weight": 0.0,
    },
    ("digits32_ar", "model.order[masked].reuse"): {
        "model.order[masked].disentangle": True,
        "model.order[masked].visible_weight": 0.0,
        "model.order[masked].reuse": True,
    },
    ("digits32_ar", "sampling.passes.kind"): {
        "model.order.kind": "random",
        "sampling.passes.kind": "several",
    },
    **{
        ("digits32_ar", f"sampling.passes[several].{name}"): {
            "model.order.kind": "masked",
            f"sampling.passes[several].{name}": value,
        }
        for name, value in (
            ("num_steps", 5),
            ("schedule", "arccos"),
            ("confidence_temperature", 2.25),
        )
    },
    ("digits32_ar", "model.num_kept"): {"model.num_kept": 16},
    ("digits32_ar", "train.eval_num_kept"): {"train.eval_num_kept": (16, 24)},
    ("digits32", "loss.gram.weight"): {"loss.gram.weight": 0.25, "loss.perceptual_weight": 0.5},
}
"""Changes that a recipe bears, where the first ones that come to mind are refused."""


def trained(monkeypatch, target, arguments):
    """Arguments that training is called with."""
    seen = []

    def noted(*args, **kwargs):
        seen.append((args, kwargs))
        raise Reached

    with monkeypatch.context() as patch:
        patch.setattr(f"mergevq.{target}", noted)
        with pytest.raises(Reached):
            main(["train", *arguments])
    return seen[0]


def together(recipe):
    """Runs of a recipe with settings changed, as many at once as go together: each with its names.

    No two settings of a run have the same new value, unless it is a flag, so that settings that
    were mixed up differ.
    """
    kinds, run = leaf_kinds(TRAIN[recipe][0]), RECIPES[recipe]()
    found = []
    for leaf, kind in kinds.items():
        for group in found:
            if grown := with_one_more(recipe, run, *group, leaf, kind):
                found[found.index(group)] = grown
                break
        else:
            alone = with_one_more(recipe, run, run, {}, leaf, kind)
            assert alone, f"{leaf} has no other value that {recipe} bears: name one"
            found.append(alone)
    return found


def with_one_more(recipe, run, changed_run, values, leaf, kind):
    """The changed run and its settings with another one; None if they do not go together."""
    try:
        if (recipe, leaf) in TRAIN_VALUES:
            new = replaced(changed_run, TRAIN_VALUES[recipe, leaf])
        else:
            new = changed(with_parts_of(changed_run, leaf), leaf, kind)
    except (ValueError, AssertionError):
        return None
    value = value_at(new, leaf)
    if value in {ABSENT, value_at(run, leaf)}:
        return None
    if any(value_at(new, name) != old for name, old in values.items()):
        return None
    if not isinstance(value, bool) and value in values.values():
        return None
    return new, values | {leaf: value}


@pytest.mark.parametrize("recipe", TRAIN)
def test_each_setting_of_a_recipe_reaches_training_and_changes_nothing_else(recipe, monkeypatch):
    cls, target = TRAIN[recipe]
    kinds, run = leaf_kinds(cls), RECIPES[recipe]()
    groups = together(recipe)
    assert {leaf for _, values in groups for leaf in values} == set(kinds)
    for wanted, _ in groups:
        changes = {
            name: value
            for name in kinds
            if (value := value_at(wanted, name)) not in {ABSENT, value_at(run, name)}
        }
        arguments = [w for name, value in changes.items() for w in words(name, kinds[name], value)]
        (found,), options = trained(monkeypatch, target, [recipe, *arguments])
        wrong = [name for name in kinds if value_at(found, name) != value_at(wanted, name)]
        assert (wrong, found, options) == ([], wanted, {"resume": False})


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_reaches_training_as_it_is(recipe, monkeypatch):
    assert trained(monkeypatch, "training.train.train", [recipe]) == (
        (RECIPES[recipe](),),
        {"resume": False},
    )


@pytest.mark.parametrize("recipe", TRAIN)
def test_how_a_recipe_is_run_reaches_the_library(recipe, monkeypatch):
    target, run = TRAIN[recipe][1], RECIPES[recipe]()
    assert trained(monkeypatch, target, [recipe, "--resume"]) == ((run,), {"resume": True})
    if isinstance(run, DecoderRun):
        assert main(["train", recipe, "--dry-run"]) == 1
    else:
        dry = trained(monkeypatch, "training.estimate.estimate", [recipe, "--dry-run"])
        assert dry == ((run,), {})
    ways = {field.name for field in dataclasses.fields(train._TrainOptions)} - {"run"}
    assert ways == {"resume", "dry_run"}, "test the new option here"
