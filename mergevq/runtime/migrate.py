"""Records of format 1, read as the format of today.

Format 1 had one flat class of settings for a tokenizer, one for a generator and one for sampling,
and other names for some weights. Runs of the beginning of format 2 had one class for all teachers.
Nothing here builds a class of settings: records go in and come out as JSON.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

_PARTS_SINCE = 2
"""Format since which a tokenizer's settings name its parts."""
_DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "stem": "cnn",
    "channels": 64,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": 4,
    "patch_dim": 768,
    "patch_norm": True,
    "num_layers": 12,
    "num_heads": 8,
    "position_embedding": False,
    "layer_scale": 1e-5,
    "transformer_norm_eps": 1e-6,
    "patch_norm_eps": 1e-5,
    "merge_shape": "linear",
    "num_kept": 144,
    "kept_range": None,
    "num_bits": 18,
    "num_decoder_layers": 12,
    "decoder": "cnn",
    "patch_decoder": {},
    "num_decoder_heads": 8,
    "source_dim": 384,
    "num_source_layers": 2,
    "num_source_heads": 8,
}
"""Settings of a tokenizer in format 1; a record may lack those that have their defaults."""
_RENAMED = (
    ("encoder.blocks.", "encoder.reducer.blocks."),
    ("source_predictor.", "expander.predictor."),
)
"""Beginnings of weights' names in format 1 and now."""
_GENERATOR_DEFAULTS: dict[str, Any] = {
    "order": "merge",
    "num_head_layers": 1,
    "window": 2,
    "merge_groups": "code",
    "rotate_instruction": True,
    "num_bits": 18,
    "factor_bits": [9, 9],
    "flex_attention": False,
}
"""Settings of a generator in format 1 that are in other places now."""
_ORDERS: dict[str, dict[str, str]] = {
    "raster": {},
    "merge": {"window": "window", "merge_groups": "groups", "flex_attention": "flex_attention"},
    "random": {"rotate_instruction": "rotate_instruction"},
    "anchor": {},
}
"""Orders of format 1, and the settings of each by their names then and now."""
_OF_ORDERS = ("window", "merge_groups", "flex_attention", "rotate_instruction")
_TEACHERS = {
    "none": (),
    "labels": ("num_head_layers", "label_smoothing"),
    "self": (
        *("view_size", "num_head_layers", "num_prototypes", "momentum"),
        *("student_temperature", "teacher_temperature"),
    ),
    "huggingface": ("view_size", "teacher_size", "num_head_layers"),
}
"""Kinds of teachers from before they were a union, and the settings that each had use for."""
_FEATURE_LOSSES = {
    "kl": ("temperature",),
    "dino": ("student_temperature", "teacher_temperature"),
    "cosine": (),
}
"""Losses against frozen models then, and the settings of each."""
_AFTER_THE_TOKENS = (
    "num_kept",
    "kept_range",
    "num_decoder_layers",
    "decoder",
    "patch_decoder",
    "num_decoder_heads",
    "source_dim",
    "num_source_layers",
    "num_source_heads",
)
"""Settings of a tokenizer of format 1 that decide no token."""
_LATER_SETTINGS = ("transformer_norm_eps", "patch_norm_eps", "patch_norm")
"""Settings that the records of the oldest tokenizers lack; those tokenizers have their defaults."""


def is_old(record: Mapping[str, Any]) -> bool:
    """Whether a record was written before tokenizers had parts."""
    return record["format_version"] < _PARTS_SINCE


def migrate_model(record: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a model, its settings as they are named today.

    Raises:
        ValueError: a setting is not one of format 1.
    """
    migrate = {"tokenizer": migrate_tokenizer, "generator": migrate_generator}.get(record["kind"])
    if not is_old(record) or migrate is None:
        return dict(record)
    return {**record, "config": migrate(record["config"])}


def migrate_tokenizer(old: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a tokenizer of format 1 as those of its parts.

    Raises:
        ValueError: there was no such setting.
    """
    for name in old:
        if name not in _DEFAULTS:
            raise ValueError(f"{name} is not a setting of a tokenizer of format 1")
    values = {**_DEFAULTS, **old}
    levels = values["channel_mult"]
    if not isinstance(levels, list) or not isinstance(values["patch_decoder"], Mapping):
        raise ValueError(
            f"channel_mult ({levels!r}) must be a list, and patch_decoder an object of settings"
        )
    cnn = {name: values[name] for name in ("channels", "channel_mult", "num_res_blocks")}
    transformer = {"layer_scale": values["layer_scale"], "norm_eps": values["transformer_norm_eps"]}
    position = {"position_embedding": values["position_embedding"]}
    channels = values["channels"]
    stem = {"kind": "cnn", **cnn, **position}
    if values["stem"] == "patch":
        stem = {
            "kind": "patch",
            "width": values["patch_dim"],
            "patch_size": 2 ** min(len(levels) - 1, 62) if levels else 0,
            "norm": values["patch_norm"],
            "norm_eps": values["patch_norm_eps"],
            "num_groups": min(32, channels) if isinstance(channels, int) else channels,
            **position,
        }
    heads = {"num_heads": values["num_decoder_heads"]}
    decoder = {"kind": "cnn", **cnn, "num_layers": values["num_decoder_layers"], **heads}
    decoder |= transformer
    if values["decoder"] == "patch":
        decoder = {"kind": "patch", **heads, **values["patch_decoder"]}
    return {
        "image_size": values["image_size"],
        "stem": stem,
        "reducer": {
            "kind": "merge",
            "num_layers": values["num_layers"],
            "num_heads": values["num_heads"],
            "shape": values["merge_shape"],
            **transformer,
        },
        "quantizer": {"kind": "lfq", "num_bits": values["num_bits"]},
        "expander": {
            "kind": "unmerge",
            "dim": values["source_dim"],
            "num_layers": values["num_source_layers"],
            "num_heads": values["num_source_heads"],
        },
        "decoder": decoder,
        "num_kept": values["num_kept"],
        "kept_range": values["kept_range"],
    }


def migrate_generator(old: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a generator of format 1 with those of its order and head as parts.

    Raises:
        ValueError: there was no such order, or a setting has another type.
    """
    values = {**_GENERATOR_DEFAULTS, **old}
    order, bits = values.pop("order"), values.pop("factor_bits")
    given = {name: values.pop(name) for name in _OF_ORDERS}
    if order not in _ORDERS:
        raise ValueError(f"order ({order!r}) must be one of {', '.join(_ORDERS)}")
    if not isinstance(bits, list) or not all(type(n) is int and 1 <= n <= 63 for n in bits):
        raise ValueError(f"factor_bits ({bits!r}) must be a list of numbers of bits from 1 to 63")
    num_bits = values.pop("num_bits")
    if sum(bits) != num_bits:
        raise ValueError(f"factor_bits {tuple(bits)} must sum to num_bits ({num_bits})")
    head = {
        "kind": "subindices",
        "sizes": [2**n for n in bits],
        "num_layers": values.pop("num_head_layers"),
    }
    settings = {new: given[name] for name, new in _ORDERS[order].items()}
    return {"order": {"kind": order, **settings}, "head": head, **values}


def migrate_sampling(old: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of sampling of format 1, in which `passes` was a number of steps and a budget."""
    values = {"num_steps": None, "budget": True, **old}
    num_steps, budget = values.pop("num_steps"), values.pop("budget")
    passes = {"kind": "one", "budget": budget}
    if num_steps is not None:
        passes = {"kind": "several", "num_steps": num_steps}
    return {**values, "passes": passes}


def migrate_teacher(old: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a teacher from the time when one class had those of every kind."""
    kind = "huggingface" if old["kind"] == "dinov2" else old["kind"]
    if not {"momentum", "label_smoothing"} <= old.keys() or kind not in _TEACHERS:
        return dict(old)
    new = {name: old[name] for name in _TEACHERS[kind] if name in old}
    if kind == "huggingface":
        loss = str(old.get("loss", "kl"))
        settings = {name: old[name] for name in _FEATURE_LOSSES.get(loss, ()) if name in old}
        new |= {"loss": {"kind": loss, **settings}}
        new |= {"path": old["path"]} if old.get("path") else {}
    return {"kind": kind, **new}


def migrate_samples(record: Mapping[str, Any]) -> dict[str, Any]:
    """The `samples.json` of a run of sampling, its settings as they are named today.

    Raises:
        ValueError: its settings are no object.
    """
    run = record["run"]
    settings = run.get("settings", {})
    if not is_old(record):
        return dict(record)
    if not isinstance(settings, Mapping):
        raise ValueError(f"run.settings ({settings!r}) must be an object")
    return {**record, "run": {**run, "settings": migrate_sampling(settings)}}


def migrate_name(kind: str, name: str) -> str:
    """Name of a weight of format 1, of a tokenizer or a generator, as it is today."""
    if kind == "generator":
        return f"order.{name}" if name == "instruction" else f"network.{name}"
    for old, new in _RENAMED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def migrate_tokens(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a folder of tokens, whose `num_bits` are the size of the one part."""
    record = dict(record)
    num_bits = record.pop("num_bits", None)
    if num_bits is None:
        return record
    if type(num_bits) is not int or not 1 <= num_bits <= 63:
        raise ValueError(f"num_bits ({num_bits!r}) must be between 1 and 63")
    return {**record, "sizes": [2**num_bits]}


def old_tokens_identity(kind: str, config: Mapping[str, Any]) -> "hashlib._Hash":
    """Beginning of the hash of a tokenizer's tokens in format 1: its encoder's settings.

    Tokens and generators made with a tokenizer of format 1 stay valid by it.
    """
    settings = {n: v for n, v in config.items() if n not in _AFTER_THE_TOKENS}
    for name in _LATER_SETTINGS:
        if settings.get(name) == _DEFAULTS[name]:
            del settings[name]
    return hashlib.sha256(json.dumps([kind, settings], sort_keys=True).encode())


def is_encoder(name: str) -> bool:
    """Whether a weight decides a tokenizer's tokens."""
    return re.match(r"(encoder|quantizer)\.", name) is not None
