"""Two gloo processes must compute what one process computes on the joint batch."""

import os
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mergevq.runtime import distributed
from mergevq.runtime.distributed import World
from tests.support.collectives import collectives as counted
from tests.support.ranks import run_on_ranks

CPU = torch.device("cpu")
BATCH = torch.linspace(-1, 2, 12).reshape(4, 3).sin()
NUM_ROWS = (3, 0)


class Small(nn.Module):
    """A linear layer and a buffer, different on every rank until they are wrapped."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 2, generator=generator))
        self.register_buffer("offset", torch.full((2,), float(seed)))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight + self.offset


def nonlinear_loss(outputs: Tensor) -> Tensor:
    """A mean over the batch plus a function of the batch mean, so ranks depend on each other."""
    average = distributed.joint_mean(outputs.mean(0))
    return (average**3).sum() + outputs.square().mean()


def collectives(rank: int) -> dict[str, object]:
    values = torch.tensor([1.0, 2.0]) * (rank + 1)
    values.requires_grad_()
    own = [torch.tensor([rank, 2**23 - rank]), values, torch.tensor(0.5), torch.zeros(0, 3)]
    with counted() as calls:
        summed = distributed.sums(own)
    rows = torch.arange(NUM_ROWS[rank] * 2).reshape(-1, 2)
    return {
        "mean": distributed.mean(values),
        "sum": distributed.sum(torch.tensor([rank + 1, 10])),
        "sums": summed,
        "num_collectives": len(calls),
        "has_gradient": [each.requires_grad for each in (*summed, distributed.mean(values))],
        "input_after_sum": values.detach(),
        "gathered": distributed.gather(rows),
        "gathered_equal": distributed.gather(values.detach().expand(2, -1).T, equal=True),
        "gathered_scalars": distributed.gather(torch.full((2,), float(rank))),
        "broadcast": distributed.broadcast_object({"path": f"from rank {rank}"}),
        "is_main": distributed.is_main(),
    }


def data_parallel(rank: int) -> dict[str, object]:
    share = BATCH.chunk(2)[rank]
    unwrapped = Small(seed=rank)
    model = distributed.wrap(unwrapped)
    nonlinear_loss(model(share)).backward()
    gradient = unwrapped.weight.grad.clone()
    unwrapped.zero_grad()
    with distributed.no_sync(model, active=True):
        model(share).square().mean().backward()
    alone = unwrapped.weight.grad.clone()
    with distributed.no_sync(model, active=False):
        model(share).mean().backward()
    return {
        "state": unwrapped.state_dict(),
        "gradient": gradient,
        "alone": alone,
        "accumulated": unwrapped.weight.grad.clone(),
    }


def second_group(rank: int) -> Tensor:
    """Result of a second group, when one rank is there long before the other."""
    time.sleep(1.0 * rank)
    distributed.init(CPU, timeout_seconds=15)
    total = distributed.sum(torch.tensor([rank + 1]))
    distributed.barrier()
    distributed.shutdown()
    return total


def run_rank(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    world = distributed.init(CPU, timeout_seconds=60)
    result = collectives(rank) | data_parallel(rank)
    distributed.barrier()
    distributed.shutdown()
    result |= {"rank": world.rank, "world_size": world.world_size}
    result["active_after_shutdown"] = distributed.is_active()
    result["second_group"] = second_group(rank)
    torch.save(result, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Results of each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    # As torchrun does: the store that ranks meet in is there before and after any group.
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    run_on_ranks(run_rank, store.port, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_every_rank_knows_its_place(ranks):
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert [rank["is_main"] for rank in ranks] == [True, False]
    assert not any(rank["active_after_shutdown"] for rank in ranks)


def test_a_second_group_is_not_led_to_the_first_ones_addresses(ranks):
    assert [rank["second_group"].tolist() for rank in ranks] == [[3], [3]]


def test_mean_and_sum_are_over_ranks_and_the_same_on_each(ranks):
    for rank in ranks:
        assert rank["mean"].tolist() == [1.5, 3.0]
        assert rank["sum"].tolist() == [3, 20]


def test_sum_leaves_its_input_alone(ranks):
    assert ranks[0]["input_after_sum"].tolist() == [1.0, 2.0]


def test_several_tensors_are_summed_in_one_collective(ranks):
    for rank in ranks:
        assert [each.tolist() for each in rank["sums"]] == [[1, 2**24 - 1], [3.0, 6.0], 1.0, []]
        assert [each.dtype for each in rank["sums"][:2]] == [torch.int64, torch.float32]
        assert [tuple(each.shape) for each in rank["sums"][2:]] == [(), (0, 3)]
        assert rank["num_collectives"] == 1
        assert not any(rank["has_gradient"])


def test_gather_joins_ragged_rows_in_rank_order(ranks):
    for rank in ranks:
        assert rank["gathered"].tolist() == [[0, 1], [2, 3], [4, 5]]
        assert rank["gathered_scalars"].tolist() == [0, 0, 1, 1]


def test_gather_joins_equally_many_rows_without_counting_them(ranks):
    for rank in ranks:
        joined = torch.cat([each["input_after_sum"] for each in ranks])
        assert torch.equal(rank["gathered_equal"], joined[:, None].expand(-1, 2))


def test_broadcast_gives_every_rank_the_main_value(ranks):
    assert [rank["broadcast"] for rank in ranks] == [{"path": "from rank 0"}] * 2


def test_wrapping_starts_every_rank_from_the_main_weights_and_buffers(ranks):
    expected = Small(seed=0).state_dict()
    for rank in ranks:
        torch.testing.assert_close(rank["state"], expected, rtol=0, atol=0)


def test_gradient_through_the_joint_mean_is_that_of_one_process_with_the_joint_batch(ranks):
    model = Small(seed=0)
    nonlinear_loss(model(BATCH)).backward()
    for rank in ranks:
        torch.testing.assert_close(rank["gradient"], model.weight.grad, rtol=1e-6, atol=1e-6)


def test_no_sync_keeps_gradients_local_until_a_synchronized_backward(ranks):
    assert not torch.equal(ranks[0]["alone"], ranks[1]["alone"])
    model = Small(seed=0)
    (model(BATCH).square().mean() + model(BATCH).mean()).backward()
    for rank in ranks:
        torch.testing.assert_close(rank["accumulated"], model.weight.grad, rtol=1e-6, atol=1e-6)


def test_one_process_starts_no_group_and_every_collective_is_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = distributed.init(CPU)
    tensor, module = torch.ones(2, 3), nn.Linear(2, 2)
    distributed.barrier()
    distributed.shutdown()
    assert world == World(rank=0, world_size=1, local_rank=0, device=CPU)
    assert not distributed.is_active()
    assert distributed.is_main()
    assert distributed.joint_mean(tensor) is tensor
    (summed,) = distributed.sums([tensor])
    gathered = distributed.gather(tensor)
    for same in (distributed.mean(tensor), distributed.sum(tensor), summed, gathered):
        assert torch.equal(same, tensor)
    assert distributed.broadcast_object("here") == "here"
    assert distributed.wrap(module) is module


def test_a_world_size_without_torchruns_variables_is_an_error(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2 but RANK, .* is not set; start with"):
        distributed.init(CPU)


@pytest.mark.parametrize(
    ("device", "message"),
    [("mps", r"device \(mps\) can be used by one process"), ("cuda", r"local rank \(99\) must be")],
)
def test_a_device_that_ranks_cannot_share_is_an_error(monkeypatch, device, message):
    values = {"WORLD_SIZE": "100", "RANK": "99", "LOCAL_RANK": "99"}
    for name, value in (values | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.init(torch.device(device))


def test_a_batch_is_cut_evenly_or_refused_with_the_nearest_that_fit():
    world = World(rank=0, world_size=4, local_rank=0, device=CPU)
    assert distributed.local_batch(64, world) == 16
    assert distributed.local_batch(64, world, accumulation=2) == 8
    with pytest.raises(ValueError, match=r"batch_size \(10\) must be .* of 4, 4 processes; use 8"):
        distributed.local_batch(10, world)
    with pytest.raises(ValueError, match=r"multiple of 12, 4 processes times accumulation \(3\)"):
        distributed.local_batch(64, world, accumulation=3)


def test_a_failure_says_on_which_rank_and_at_which_step():
    world = World(rank=1, world_size=2, local_rank=1, device=CPU)
    with pytest.raises(RuntimeError) as caught, distributed.located(world, step=17):
        raise RuntimeError("timed out")
    assert caught.value.__notes__ == ["on rank 1 of 2, at step 17"]


# ------------------------------------------------------------------- more ranks than two


def descend(model: nn.Module, wrapped: nn.Module, steps: range, rank: int) -> None:
    """Steps of gradient descent on data that follow from step and rank."""
    for step in steps:
        inputs = torch.randn(8, 37, generator=torch.Generator().manual_seed(100 * step + rank))
        model.zero_grad()
        wrapped(inputs).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad


def run_stopped_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    distributed.init(CPU, timeout_seconds=60)
    results = []
    for parts in ([range(6)], [range(3), range(3, 6)]):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(37, 37) for _ in range(6)))
        for steps in parts:
            wrapped = distributed.wrap(model)
            assert all(parameter.grad is None for parameter in model.parameters())
            descend(model, wrapped, steps, rank)
        results.append(torch.cat([each.detach().flatten() for each in model.parameters()]))
    distributed.shutdown()
    torch.save(results, Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_what_is_wrapped_again_goes_on_with_the_same_bits_on_three_ranks(tmp_path):
    """Two ranks add in one order only; three round by the place of a gradient in its buffer."""
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    torch.multiprocessing.spawn(run_stopped_rank, args=(store.port, str(tmp_path)), nprocs=3)
    for rank in range(3):
        whole, stopped = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(whole, stopped)
