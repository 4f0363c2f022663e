"""Steps of one shape: the tokens of steps that grow, without a read, a copy or another shape."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mergevq.config.generator import OneByOne, SamplingSettings
from mergevq.config.parts.heads import Bits, Independent
from mergevq.generator.decoding import SequenceDecoder
from mergevq.generator.static.decoder import StaticDecoder, capture, token_decoder
from mergevq.runtime import device
from tests.support.generators import tiny_generator
from tests.support.reads import unreadable_device
from tests.support.sampling import run

GUIDED = SamplingSettings(guidance_scale=3.0)
RAMPED = replace(GUIDED, guidance_schedule="linear", top_k=3, temperature=0.9)
FREE = replace(GUIDED, passes=OneByOne(budget=False), top_p=0.9)
ORDERS = {
    "raster": {},
    "raster with targets": {"annealing": (0.2, 0.4)},
    "merge": {},
    "merge without a window": {"window": 0},
    "merge with a wide window": {"window": 5},
    "anchor": {},
    "anchor in bits": {"gap_in_bits": True},
    "raster of grouped heads": {"num_kv_heads": 1},
    "merge of grouped heads": {"num_kv_heads": 1},
    "merge of independent parts": {"head": Independent(sizes=(4, 8))},
}


def model_of(name: str):
    return tiny_generator(name.split()[0], **ORDERS[name])


def decoder(make, model, settings, device="cpu"):
    num_kept = model.config.num_kept
    draws = model.draws(0, range(4), num_kept, settings)
    labels = torch.tensor([0, 1, 2, 0], device=device)
    targets = getattr(model.order, "targets", None)
    return make(model.network, model.order, labels, num_kept, draws, settings, targets)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, RAMPED) for name in ORDERS),
        *(("merge", each) for each in (SamplingSettings(), GUIDED, FREE)),
    ],
)
def test_tokens_are_those_of_steps_that_grow(name, settings):
    """States to 1e-4: a sum over masked slots is rounded otherwise than a shorter one."""
    model = model_of(name)
    with torch.no_grad():
        grows, stays = (decoder(each, model, settings) for each in (SequenceDecoder, StaticDecoder))
        for each in (grows, stays):
            each.seek(0)
        assert grows.num_steps == stays.num_steps
        for step in range(grows.num_steps):
            assert torch.equal(grows.known(), stays.known())
            torch.testing.assert_close(grows.states, stays.states, rtol=1e-4, atol=1e-4)
            for each in (grows, stays):
                each.step()
            assert torch.equal(grows.parts(), stays.parts()), step
    assert all(stays.finite)


def test_a_decoder_goes_on_from_any_step_and_begins_again():
    model = model_of("merge")
    with torch.no_grad():
        stays = decoder(StaticDecoder, model, GUIDED)
        for _ in range(2):
            stays.seek(0)
            for _ in range(stays.num_steps):
                stays.step()
            whole = stays.parts().clone()
        stays.seek(3, whole)
        assert torch.equal(stays.parts(), whole[:, :3])
        stays.step()
    assert stays.num_done == 4


@pytest.mark.parametrize("name", ORDERS)
def test_a_step_reads_and_sends_nothing(name):
    with unreadable_device() as unreadable:
        model = model_of(name).to(unreadable.device)
        stays = decoder(StaticDecoder, model, RAMPED, unreadable.device)
        stays.seek(0)
        unreadable.copies.clear()
        unreadable.sent.clear()
        stays.step()
        stays.step()
        assert unreadable.copies == unreadable.sent == []
        with pytest.raises(NotImplementedError, match="meta"):
            stays.parts().tolist()


class Calls(TorchDispatchMode):
    """Operators that run, with the shapes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
        shapes = [tuple(each.shape) for each in tensors if isinstance(each, torch.Tensor)]
        self.seen.append((func.name(), shapes))
        return result


@pytest.mark.parametrize("name", ORDERS)
def test_every_step_has_the_same_operators_of_the_same_shapes(name):
    model, steps = model_of(name), []
    with torch.no_grad():
        stays = decoder(StaticDecoder, model, RAMPED)
        stays.seek(0)
        for _ in range(stays.num_steps):
            with Calls() as calls:
                stays.step()
            steps.append(calls.seen)
    assert len(steps[0]) > 50
    assert all(step == steps[0] for step in steps[1:])


@pytest.mark.slow
def test_one_graph_serves_all_steps():
    torch._dynamo.reset()
    model, count = model_of("merge"), 0

    def backend(graph, _):
        nonlocal count
        count += 1
        return graph

    with torch.no_grad():
        grows, stays = (decoder(each, model, FREE) for each in (SequenceDecoder, StaticDecoder))
        for each in (grows, stays):
            each.seek(0)
        # Checks of shapes are of the first calls, and cannot be compiled.
        for _ in range(stays.num_steps):
            stays.step()
        stays.seek(0)
        take = torch.compile(stays._advance, backend=backend, fullgraph=True)
        for _ in range(grows.num_steps):
            grows.step()
            take()
    assert count == 1
    assert torch.equal(grows.parts(), stays.tokens)


def test_cpus_grow_and_gpus_stay(monkeypatch):
    model = model_of("raster")
    assert isinstance(decoder(token_decoder, model, GUIDED), SequenceDecoder)
    tokens = run(model, [0, 1], GUIDED).indices
    monkeypatch.setattr(device, "_CAPTURED", {"cpu"})
    assert isinstance(decoder(token_decoder, model, GUIDED), StaticDecoder)
    assert torch.equal(run(model, [0, 1], GUIDED).indices, tokens)
    bits = tiny_generator("raster", head=Bits(sizes=(2,) * 5))
    assert isinstance(decoder(token_decoder, bits, GUIDED), SequenceDecoder)


def test_a_state_that_is_not_finite_is_an_error(monkeypatch):
    monkeypatch.setattr(device, "_CAPTURED", {"cpu"})
    model = model_of("merge")
    model.network.blocks[0].ffn.down.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        run(model, [0, 1], GUIDED)


def test_capturing_is_left_out_where_there_are_no_graphs():
    def step() -> None:
        """Do nothing."""

    assert capture(step, torch.device("cpu")) is step


@pytest.fixture
def cuda(monkeypatch):
    """Calls that are made of CUDA, which is not here."""
    done: list[str] = []

    @contextmanager
    def entered(name):
        done.append(f"begin {name}")
        yield
        done.append(f"end {name}")

    stream = SimpleNamespace(wait_stream=lambda _: done.append("wait"))
    graph = SimpleNamespace(replay=lambda: done.append("replay"))
    for name, value in {
        "CUDAGraph": lambda: graph,
        "Stream": lambda _: stream,
        "current_stream": lambda _: stream,
        "stream": lambda _: entered("stream"),
        "graph": lambda _: entered("graph"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return done


_ASIDE = ["wait", "begin stream", "step", "end stream", "wait"]


def test_a_captured_step_warms_up_is_captured_once_and_replayed(cuda):
    take = capture(lambda: cuda.append("step"), torch.device("cuda"))
    for _ in range(5):
        take()
    assert cuda == [*_ASIDE * 3, "begin graph", "step", "end graph", "replay", "replay"]


def test_a_step_that_cannot_be_captured_is_launched_each_time(cuda, monkeypatch, caplog):
    @contextmanager
    def refused(_graph):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    take = capture(lambda: cuda.append("step"), torch.device("cuda"))
    for _ in range(5):
        take()
    # Nothing runs while it is captured, so the step of the failed capture is taken after it.
    assert cuda == [*_ASIDE * 3, "step", "step", "step"]
    assert "could not be captured (operation not permitted" in caplog.text
