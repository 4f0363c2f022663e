"""Spearman's rho and its significance are those of textbooks; records are paired by tokenizer."""

import itertools
import json

import pytest

from mergevq.cli.main import main
from mergevq.config.evaluation import CorrelationSettings
from mergevq.config.records import CorrelationRecord
from mergevq.evaluate.robustness.correlation import (
    evaluate_correlation,
    smallest_significant,
    spearman,
)
from tests.support.records import assert_declared


def test_rho_of_a_hand_case():
    # Ranks 1 2 3 4 5 and 2 1 4 3 5: squared differences 4, so 1 - 6 * 4 / (5 * 24) = 0.8.
    assert spearman([1, 2, 30, 44, 45], [0.2, 0.1, 0.4, 0.3, 9]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], [9, 4, -1]) == pytest.approx(-1)


def test_equal_values_share_their_rank():
    # Ranks 1, 2.5, 2.5 and 1, 2, 3: covariance 1.5, variances 1.5 and 2.
    assert spearman([1, 5, 5], [1, 2, 3]) == pytest.approx(1.5 / 3**0.5)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1, 2], [1, 2], "2 and 2 numbers must be as many, and at least 3"),
        ([1, 2, 3], [1, 2, 3, 4], "3 and 4 numbers"),
        ([1, 1, 1], [1, 2, 3], "no order to correlate"),
        ([1, 2, float("nan")], [1, 2, 3], "must be finite"),
    ],
)
def test_what_has_no_order_is_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        spearman(first, second)


def test_few_tokenizers_are_never_significant_and_more_are_as_in_the_tables():
    assert smallest_significant(3) is None
    assert smallest_significant(4) is None
    # Two-sided critical values for 0.05, as tables of Spearman's rho print them.
    table = {5: 1.0, 6: 0.886, 7: 0.786, 8: 0.738, 9: 0.700, 10: 0.648}
    assert {n: round(smallest_significant(n), 3) for n in table} == table
    # 1.95996 of a standard normal.
    assert smallest_significant(26) == pytest.approx(1.95996 / 5, abs=1e-5)


def test_significance_is_the_share_of_all_orders():
    rhos = [spearman(range(6), list(order)) for order in itertools.permutations(range(6))]
    least = smallest_significant(6)
    assert sum(abs(rho) >= least - 1e-9 for rho in rhos) / len(rhos) < 0.05
    below = max(abs(rho) for rho in rhos if abs(rho) < least - 1e-9)
    assert sum(abs(rho) >= below - 1e-9 for rho in rhos) / len(rhos) >= 0.05


EXTRACTOR = {"name": "net", "path": "net.pt", "sha256": "e" * 64, "dim": 5}


def write(folder, number, **changes):
    """Both evaluations of one tokenizer: pFID orders as gFID does, rFID the other way round."""
    tokenizer = f"{number}" * 64
    robust = {
        "format_version": 2,
        "kind": "robustness evaluation",
        "model": {"hash": tokenizer},
        "extractor": EXTRACTOR,
        "results": [
            {"fraction": 0.5, "metrics": {"psnr": 1.0, "frechet_net": 99.0}},
            {"fraction": 0.0, "source": "recovered", "metrics": {"frechet_net": 98.0}},
            {"fraction": 0.0, "groups": "random", "metrics": {"frechet_net": 97.0}},
            {"fraction": 0.0, "metrics": {"psnr": 1.0, "frechet_net": 10.0 - number}},
        ],
        "metrics": {"perturbed_frechet_net": 20.0 + number},
    }
    generated = {
        "format_version": 2,
        "kind": "generation evaluation",
        "tokenizer": tokenizer,
        "extractor": EXTRACTOR,
        "metrics": {"frechet_net": 30.0 + number},
    }
    paths = []
    for record in (robust, generated):
        path = folder / f"{record['kind'].split()[0]}-{number}"
        path.mkdir(parents=True)
        text = json.dumps(record | changes.get(record["kind"].split()[0], {}))
        (path / "evaluation.json").write_text(text)
        paths.append(str(path))
    return paths


def test_records_are_paired_by_tokenizer_and_printed(tmp_path, capsys):
    paths = [path for number in (3, 1, 2, 5, 4) for path in write(tmp_path, number)]
    paths[1], paths[4] = paths[4], paths[1]
    assert main(["evaluate", "correlation", *paths, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert_declared(record, CorrelationRecord)
    assert record["metrics"] == {
        "rho_perturbed_generation": pytest.approx(1),
        "rho_reconstruction_generation": pytest.approx(-1),
    }
    assert record["smallest_significant"] == 1.0
    first = record["tokenizers"][0]
    assert (first["reconstruction"], first["perturbed"], first["generation"]) == (7, 23, 33)
    printed = capsys.readouterr().out
    assert "5 tokenizers: significant from |rho| 1.000 (p < 0.05, two-sided)" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"robustness": {"metrics": {}}}, "has no perturbed_frechet_net: evaluate robustness with"),
        ({"robustness": {"extractor": None}}, "evaluate again with --extractor"),
        ({"generation": {"extractor": EXTRACTOR | {"sha256": "f" * 64}}}, "another file"),
        ({"generation": {"tokenizer": "1" * 64}}, "are both of tokenizer 111"),
        ({"generation": {"tokenizer": "7" * 64}}, "only evaluation of tokenizer"),
        ({"generation": {"tokenizer": None}}, "samples that were given"),
        ({"generation": {"kind": "probe"}}, "is no evaluation of robustness or of generation"),
    ],
)
def test_records_that_do_not_fit_are_refused(tmp_path, changes, message):
    paths = [*write(tmp_path, 1), *write(tmp_path, 2), *write(tmp_path, 3, **changes)]
    with pytest.raises(ValueError, match=message):
        evaluate_correlation(CorrelationSettings(records=tuple(paths), out=str(tmp_path / "out")))


def test_two_tokenizers_are_too_few(tmp_path):
    paths = (*write(tmp_path, 1), *write(tmp_path, 2))
    with pytest.raises(ValueError, match="at least 3"):
        evaluate_correlation(CorrelationSettings(records=paths, out=str(tmp_path / "out")))
