"""What all commands print and set."""

import os

import pytest

from mergevq.terminal import let_threads_sleep, print_table


def test_a_table_has_a_title_and_two_columns(capsys):
    print_table("versions", {"torch": "2.13", "a_very_long_name": "1"})
    assert capsys.readouterr().out == "versions\n  torch          2.13\n  a_very_long_name 1\n"


def test_the_users_choice_of_waiting_stays(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize("chosen", [None, "PASSIVE"])
def test_threads_sleep_soon_and_not_at_once(monkeypatch, chosen):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        # Set first, so that the test's own changes are taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if chosen is not None:
        os.environ["OMP_WAIT_POLICY"] = chosen
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["GOMP_SPINCOUNT"] == "2000"
