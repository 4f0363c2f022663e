"""Fixtures of all tests of training."""

import pytest

from mergevq.report import plots
from mergevq.training import fit


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Curves take longer than the steps of these runs; see `curves`."""
    monkeypatch.setattr(fit, "has_plots", lambda _: False)


@pytest.fixture
def curves(_no_curves, monkeypatch):
    """Runs that draw their curves as users' do."""
    monkeypatch.setattr(fit, "has_plots", plots.has_plots)
