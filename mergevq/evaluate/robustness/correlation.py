"""Whether wrong tokens foretell samples: rank correlation over tokenizers.

Of each tokenizer there are three distances: of its reconstructions (rFID), of images with wrong
tokens (pFID), and of samples of a generator of its tokens (gFID). The claim is that pFID orders
tokenizers as gFID does, and better than rFID.

Source: Qiu et al. 2025, "Robust Latent Matters: Boosting Image Generation with Sampling Error
Synthesis", section 3 (arXiv:2503.08354). The distribution of rho: Kendall, "Rank Correlation
Methods", 1948, chapter 5.

Shape letters: N tokenizers.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergevq.config.evaluation import CorrelationSettings
from mergevq.config.records import CorrelatedTokenizer, CorrelationRecord
from mergevq.evaluate.subject import RECORD, evaluation_record, json_numbers, require_fresh
from mergevq.runtime import distributed
from mergevq.runtime.device import resolve_device
from mergevq.runtime.files import read_json, write_json
from mergevq.runtime.settings import to_json

LEAST_TOKENIZERS = 3
_MOST_EXACT = 12
"""Tokenizers up to which all orders are counted; of more, rho is taken for normal."""


def evaluate_correlation(settings: CorrelationSettings) -> CorrelationRecord:
    """Pair the records by tokenizer, correlate, and write the numbers.

    Raises:
        ValueError: records do not fit together, lack a distance, or are of fewer than three
            tokenizers.
    """
    out = Path(settings.out)
    require_fresh(out)
    paths = [path / RECORD if path.is_dir() else path for path in map(Path, settings.records)]
    records = {str(path): read_json(path) for path in paths}
    name = _distance_name(records)
    world = distributed.World(rank=0, world_size=1, local_rank=0, device=resolve_device("cpu"))
    tokenizers = paired(records, name)
    perturbed, reconstructed, generated = (
        [each[kind] for each in tokenizers]
        for kind in ("perturbed", "reconstruction", "generation")
    )
    record: CorrelationRecord = {
        "kind": "correlation evaluation",
        "settings": to_json(settings),
        **evaluation_record(world),
        "extractor": next(iter(records.values()))["extractor"],
        "distance": name,
        "tokenizers": tokenizers,
        "smallest_significant": smallest_significant(len(tokenizers)),
        **json_numbers(
            {
                "rho_perturbed_generation": spearman(perturbed, generated),
                "rho_reconstruction_generation": spearman(reconstructed, generated),
            }
        ),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD, record)
    return record


def _distance_name(records: dict[str, Any]) -> str:
    """The name of the one Frechet distance that all records have.

    Raises:
        ValueError: a record is of another kind, has no extractor, or has another one.
    """
    first = ""
    for path, record in records.items():
        if record.get("kind") not in {"robustness evaluation", "generation evaluation"}:
            raise ValueError(
                f"{path} is no evaluation of robustness or of generation; give directories that "
                "`mergevq evaluate robustness` and `mergevq evaluate generation` wrote"
            )
        if record["extractor"] is None:
            raise ValueError(f"{path} has no Frechet distance: evaluate again with --extractor")
        first = first or path
        if record["extractor"]["sha256"] != records[first]["extractor"]["sha256"]:
            raise ValueError(
                f"{path} is of extractor {record['extractor']['name']} and {first} of "
                f"{records[first]['extractor']['name']}, another file: distances of two networks "
                "have no common order; evaluate again with one --extractor"
            )
    names = [name for record in records.values() for name in _names(record)]
    return next((name for name in names if name == "fid" or name.startswith("frechet_")), "fid")


def _names(record: dict[str, Any]) -> list[str]:
    """Names of the metrics of a record."""
    return list((record.get("results") or [record])[0]["metrics"])


def paired(records: dict[str, Any], name: str) -> list[CorrelatedTokenizer]:
    """The distances of each tokenizer, of one record of either kind.

    Args:
        records: by path.
        name: of the distance.

    Raises:
        ValueError: a tokenizer has one record only, or two of a kind; or a record lacks a distance.
    """
    found: dict[str, dict[str, str]] = {}
    for path, record in records.items():
        kind = record["kind"]
        is_robustness = kind == "robustness evaluation"
        tokenizer = record["model"]["hash"] if is_robustness else record["tokenizer"]
        if tokenizer is None:
            raise ValueError(f"{path} is of samples that were given: their tokenizer is not known")
        others = found.setdefault(tokenizer, {})
        if kind in others:
            raise ValueError(
                f"{path} and {others[kind]} are both of tokenizer {tokenizer[:12]}: give one "
                f"{kind} for each"
            )
        others[kind] = path
    tokenizers: list[CorrelatedTokenizer] = []
    for tokenizer, kinds in found.items():
        if len(kinds) < 2:
            (path,) = kinds.values()
            raise ValueError(
                f"{path} is the only evaluation of tokenizer {tokenizer[:12]}: it needs one of "
                "robustness and one of generation, or leave it out"
            )
        paths = [kinds["robustness evaluation"], kinds["generation evaluation"]]
        robust, generated = (records[path] for path in paths)
        plain = [each["metrics"] for each in robust["results"] if _is_plain(each)]
        tokenizers.append(
            {
                "tokenizer": tokenizer,
                "reconstruction": _number(plain[0] if plain else {}, name, paths[0]),
                "perturbed": _number(robust["metrics"], f"perturbed_{name}", paths[0]),
                "generation": _number(generated["metrics"], name, paths[1]),
                "records": paths,
            }
        )
    return tokenizers


def _is_plain(result: dict[str, Any]) -> bool:
    """Whether a result is of reconstructions, with the given map and nothing wrong."""
    # Evaluations of earlier versions have no wrong maps.
    source, groups = result.get("source", "given"), result.get("groups")
    return result["fraction"] == 0 and source == "given" and groups is None


def _number(metrics: dict[str, float | None], name: str, path: str) -> float:
    """A metric of a record.

    Raises:
        ValueError: the record has no such number.
    """
    value = metrics.get(name)
    if value is None:
        raise ValueError(
            f"{path} has no {name}: evaluate robustness with its own --fractions and without "
            "--radius, and generation with the same --extractor"
        )
    return value


# ------------------------------------------------------------------------------------- the ranks


def spearman(first: Sequence[float | int], second: Sequence[float | int]) -> float:
    """Spearman's rho: the correlation of the ranks, of which equal values share the mean.

    Args:
        first: a number for each tokenizer.
        second: another.

    Raises:
        ValueError: there are fewer than three, not as many of both, one is not finite, or all
            numbers are equal, so that they have no order.
    """
    if len(first) != len(second) or len(first) < LEAST_TOKENIZERS:
        raise ValueError(
            f"{len(first)} and {len(second)} numbers must be as many, and at least "
            f"{LEAST_TOKENIZERS}: two tokenizers are always in the same order or in the opposite "
            "one; evaluate more of them"
        )
    ranks = [_ranks(np.array(values, dtype=np.float64)) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    spread = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    if spread == 0:
        raise ValueError("the numbers of all tokenizers are equal: they have no order to correlate")
    return float((centred[0] * centred[1]).sum()) / spread


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values have the mean of theirs."""
    if not np.isfinite(values).all():
        raise ValueError(f"{values.tolist()} must be finite to have an order")
    below = (values < values[:, None]).sum(1)
    return below + ((values == values[:, None]).sum(1) + 1) / 2


@functools.cache
def smallest_significant(num_tokenizers: int, level: float = 0.05) -> float | None:
    """The least absolute rho that chance reaches in less than so many cases, of either sign.

    Up to 12 tokenizers all orders are counted; of more, rho is taken for normal with a variance of
    1 / (N - 1).

    Args:
        num_tokenizers: N, without equal values.
        level: of significance, two-sided.

    Returns:
        None if not even a perfect order is significant, as of four tokenizers.
    """
    if num_tokenizers > _MOST_EXACT:
        # Normal quantile by bisection: the error function has no inverse in the standard library.
        low, high = 0.0, 40.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if math.erfc(middle / 2**0.5) < level else (middle, high)
        return high / math.sqrt(num_tokenizers - 1)
    counts = _squared_differences(num_tokenizers)
    squares = np.flatnonzero(counts)
    rho = 1 - 6 * squares / (num_tokenizers * (num_tokenizers**2 - 1))
    chance = np.array([counts[squares][np.abs(rho) >= abs(r) - 1e-9].sum() for r in rho])
    likely = chance / math.factorial(num_tokenizers)
    return float(np.abs(rho)[likely < level].min()) if (likely < level).any() else None


def _squared_differences(num_items: int) -> np.ndarray:
    """Number of orders of N items by their sum of squared differences of rank."""
    most = num_items * (num_items**2 - 1) // 3
    counts = np.zeros((2**num_items, most + 1), dtype=np.int64)
    counts[0, 0] = 1
    # An item after the other takes one of the ranks that are left; a mask has those taken.
    for taken in range(2**num_items - 1):
        item = taken.bit_count()
        for rank in range(num_items):
            if not taken >> rank & 1:
                step = (item - rank) ** 2
                counts[taken | 1 << rank, step:] += counts[taken, : most + 1 - step]
    return counts[-1]
