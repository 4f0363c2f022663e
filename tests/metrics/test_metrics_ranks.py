"""Accumulators fed on two gloo processes must give what one process gives for all items."""

import os
import socket
import warnings
from pathlib import Path

import pytest
import torch

from mergevq.data.codes import CodeSpec
from mergevq.metrics.codes import CodebookUsage, SharedUsage
from mergevq.metrics.frechet import FrechetStatistics
from mergevq.metrics.image import Mean
from mergevq.metrics.sets import Rows
from mergevq.runtime import distributed
from tests.support.collectives import collectives
from tests.support.ranks import run_on_ranks

VALUES = torch.linspace(-1, 2, 9).sin()
FEATURES = torch.linspace(0, 9, 27).reshape(9, 3).sin() + 100
INDICES = torch.arange(9) * 5 % 16


def accumulated(ranks_items):
    """Every accumulator, fed with some of the items."""
    mean, usage = Mean("l1"), CodebookUsage(CodeSpec(sizes=(16,), dim=4, is_binary=True))
    statistics, rows = FrechetStatistics(3), Rows("features")
    for items in ranks_items:
        positions = torch.tensor(items)
        mean.update(VALUES[positions])
        usage.update(INDICES[positions, None])
        statistics.update(FEATURES[positions])
        rows.update(FEATURES[positions], positions)
    statistics = statistics.compute()
    counted = usage.compute()
    return {
        "mean": torch.tensor([*mean.compute()], dtype=torch.float64),
        "codebook": torch.tensor([counted.num_tokens, counted.num_distinct, counted.perplexity]),
        "bit_probs": counted.bit_probs,
        "feature_mean": statistics.mean,
        "covariance": statistics.covariance,
        "num_samples": torch.tensor(statistics.num_samples),
        "rows": rows.compute(),
    }


BATCHES = torch.randint(16, (8, 10, 3, 1), generator=torch.Generator().manual_seed(0))
WINDOWS = (16, 50, 10_000)


def windows(size, own):
    """Usage after each of some batches, of which a rank sees its own images; then once resumed."""
    usage, resumed = (SharedUsage(CodeSpec(sizes=(16,), dim=4), size) for _ in range(2))
    found = []
    with collectives() as calls:
        for number, batch in enumerate(BATCHES):
            usage.update(own(batch)[:, : 1 + number % 3])
    assert calls == []
    found.append(usage.compute().num_tokens)
    for batch in BATCHES[:3]:
        usage.update(own(batch))
    resumed.update(own(BATCHES[5]))
    resumed.load_state_dict(usage.state_dict())
    for each in (usage, resumed):
        each.update(own(BATCHES[0]))
        found += [each.state_dict()["tokens"], each.compute().perplexity]
    return found


def run_rank(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init(torch.device("cpu"), timeout_seconds=60)
    uneven = accumulated([[0, 2, 4], [6], [8]] if rank == 0 else [[1, 3], [5, 7]])
    alone = accumulated([list(range(9))] if rank == 0 else [])
    shared = [windows(size, lambda batch: batch.chunk(2)[rank]) for size in WINDOWS]
    distributed.barrier()
    distributed.shutdown()
    found = {"uneven": uneven, "alone": alone, "shared": shared}
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_on_ranks(run_rank, port, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_measure_what_one_process_measures(ranks):
    expected = accumulated([list(range(9))])
    for measured in ranks:
        torch.testing.assert_close(measured["uneven"], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(measured["alone"], expected, rtol=1e-12, atol=1e-12)


def test_a_window_that_ranks_share_is_that_of_one_process(ranks):
    expected = [windows(size, lambda batch: batch) for size in WINDOWS]
    assert [each[0] for each in expected] == [16, 50, 150]
    assert all(torch.equal(each[1], each[3]) for each in expected)
    for measured in ranks:
        for found, wanted in zip(measured["shared"], expected, strict=True):
            assert [found[0], found[2], found[4]] == [wanted[0], wanted[2], wanted[4]]
            assert torch.equal(found[1], wanted[1])
            assert torch.equal(found[3], wanted[3])
