"""A ratio that fell by more than a fifth on the same kind of machine fails the check."""

import json

import pytest

from benchmarks import ratios
from benchmarks.entry import Entry, Pair, Ratio, measure


def work(amount):
    return lambda: sum(range(amount))


def agree(plain, ours):
    assert plain >= ours


ENTRY = Entry("sums", lambda: Pair(work(20_000), work(10_000), agree))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(ratios, "KEPT", tmp_path / "ratios.json")
    monkeypatch.setattr(ratios, "ENTRIES", (ENTRY,))
    return ratios.KEPT


def test_both_ways_take_turns_and_have_to_agree():
    found = measure(ENTRY, 1)
    assert found.num_turns == 1
    assert 0 < found.minimum == found.median == found.maximum
    assert found.plain_ms / found.ours_ms == pytest.approx(found.median)
    with pytest.raises(AssertionError):
        measure(Entry("wrong", lambda: Pair(work(1), work(100), agree)), 1)


@pytest.mark.parametrize(("before", "fell"), [(2.0, 0), (2.49, 0), (2.51, 1), (None, 0)])
def test_a_ratio_may_lose_a_fifth_and_no_more(kept, monkeypatch, before, fell):
    now = Ratio(2.0, 2.0, 2.0, 1.0, 0.5, 1)
    monkeypatch.setattr(ratios, "measure", lambda *_: now)
    if before is not None:
        ratios.write({"sums": now._replace(median=before)})
    assert ratios.main(["--check", "sums"]) == fell


def test_ratios_of_another_machine_are_not_compared(kept, monkeypatch, capsys):
    high = Ratio(9.0, 9.0, 9.0, 1.0, 0.1, 1)
    ratios.write({"sums": high})
    kept.write_text(kept.read_text().replace(ratios.machine(), "another machine"))
    monkeypatch.setattr(ratios, "measure", lambda *_: high._replace(median=2.0))
    assert ratios.main(["--check"]) == 0
    assert "nothing is kept for" in capsys.readouterr().out
    assert ratios.main(["--write"]) == 0
    found = json.loads(kept.read_text())
    assert found["another machine"]["sums"]["median"] == 9.0
    assert found[ratios.machine()]["sums"]["median"] == 2.0
    assert ratios.main(["--check"]) == 0


def test_a_name_of_no_entry_lists_those_that_are(kept):
    with pytest.raises(SystemExit, match=r"contains any of \['rat'\]; there are\n  sums"):
        ratios.main(["rat"])
