"""Tests of `mergevq.metrics.codes`."""

import math
import re

import numpy as np
import pytest
import torch

from mergevq.config.training import TokenizerRun
from mergevq.data.codes import CodeSpec
from mergevq.metrics.codes import (
    Channels,
    CodebookStatistics,
    CodebookUsage,
    CollapseMonitor,
    codebook_statistics,
    source_accuracy,
)
from tests.support.reads import host_reads


def test_source_accuracy_is_the_share_of_cells_per_image():
    true = torch.tensor([[0, 1, 1, 2], [0, 0, 1, 1]])
    predicted = torch.tensor([[0, 1, 2, 2], [1, 1, 0, 1]])
    assert source_accuracy(predicted, true).tolist() == [0.75, 0.25]


def bits(num_bits):
    """Tokens of so many bits."""
    return CodeSpec(sizes=(2**num_bits,), dim=num_bits, is_binary=True)


def usage_of(indices, num_bits, batch_size=None):
    usage = CodebookUsage(bits(num_bits))
    for part in indices.split(batch_size or len(indices)):
        usage.update(part[..., None])
    return usage.compute()


def test_a_codebook_in_even_use_is_used_fully():
    statistics = usage_of(torch.arange(16), num_bits=4)
    assert (statistics.usage, statistics.attained, statistics.num_tokens) == (1.0, 1.0, 16)
    assert statistics.perplexity == pytest.approx(16)
    assert statistics.bit_probs.tolist() == [0.5] * 4
    assert statistics.bit_entropies.tolist() == [1.0] * 4
    assert statistics.num_dead_bits == 0


def test_codebook_statistics_by_hand():
    # Codes 0 (00), 1 (01), 1 (01), 1 (01) of two bits, lowest first.
    statistics = usage_of(torch.tensor([0, 1, 1, 1]), num_bits=2)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert (statistics.num_distinct, statistics.usage, statistics.attained) == (2, 0.5, 0.5)
    assert statistics.perplexity == pytest.approx(math.exp(entropy))
    assert statistics.bit_probs.tolist() == [0.75, 0.0]
    assert statistics.bit_entropies.tolist() == pytest.approx([entropy / math.log(2), 0.0])
    assert statistics.num_dead_bits == 1


def test_a_bit_that_is_always_one_is_dead_too():
    statistics = usage_of(torch.tensor([2, 3, 2, 3]), num_bits=2)
    assert statistics.bit_probs.tolist() == [0.5, 1.0]
    assert statistics.bit_entropies.tolist() == [1.0, 0.0]
    assert statistics.num_dead_bits == 1


def test_few_tokens_are_measured_against_what_they_can_reach():
    statistics = usage_of(torch.tensor([5, 5, 9, 200]), num_bits=8)
    assert statistics.usage == 3 / 256
    assert statistics.attained == 3 / 4


@pytest.mark.parametrize("batch_size", [1, 7, 64, 300, 1000])
def test_the_window_holds_exactly_the_last_tokens_whatever_the_batches(generator, batch_size):
    indices = torch.randint(0, 2**6, (1000,), generator=generator)
    indices[: 1000 - 64] = 63
    last = indices[-64:].numpy()
    statistics = usage_of(indices, num_bits=6, batch_size=batch_size)
    frequencies = np.unique(last, return_counts=True)[1] / 64
    assert statistics.num_tokens == 64
    assert statistics.num_distinct == len(frequencies) < 64
    perplexity = np.exp(-(frequencies * np.log(frequencies)).sum())
    assert statistics.perplexity == pytest.approx(perplexity)
    bits = (last[:, None] >> np.arange(6)) & 1
    assert statistics.bit_probs.tolist() == bits.mean(0).tolist()


def test_a_longer_window_remembers_more():
    usage = CodebookUsage(bits(2), window=6)
    usage.update(torch.tensor([[0, 1, 2], [3, 3, 3], [3, 3, 3]])[..., None])
    assert usage.compute().num_tokens == 6
    assert usage.compute().num_distinct == 1
    usage.update(torch.tensor([[0]]))
    assert usage.compute().bit_probs.tolist() == [5 / 6, 5 / 6]


@pytest.mark.parametrize("num_seen", [0, 5, 16, 23, 100])
def test_a_resumed_window_forgets_the_same_tokens(generator, num_seen):
    parts = torch.randint(0, 2**4, (num_seen + 7, 1), generator=generator)
    whole, resumed = CodebookUsage(bits(4)), CodebookUsage(bits(4))
    whole.update(parts[:num_seen])
    # What was there before is gone.
    resumed.update(torch.full((3, 1), 15))
    resumed.load_state_dict(whole.state_dict())
    for part in parts[num_seen:].split(3):
        whole.update(part)
        resumed.update(part)
        assert torch.equal(whole.state_dict()["tokens"], resumed.state_dict()["tokens"])
        assert whole.compute().perplexity == resumed.compute().perplexity
    assert whole.state_dict()["tokens"].tolist() == parts[-16:].tolist()


def test_a_window_shorter_than_the_codebook_is_refused():
    with pytest.raises(ValueError, match=r"window \(255\) must be at least 256 .* 256 codes"):
        CodebookUsage(bits(8), window=255)


def test_many_bits_are_counted_in_the_window_alone():
    usage = CodebookUsage(bits(63), window=2**24)
    usage.update(torch.tensor([[0], [2**62], [2**63 - 1]]))
    statistics = usage.compute()
    assert statistics.attained == 1.0
    assert statistics.bit_probs[0].item() == pytest.approx(1 / 3)
    assert statistics.bit_probs[62].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_the_codebook_is_named(index):
    usage = CodebookUsage(bits(2))
    usage.update(torch.zeros(10, 1, dtype=torch.int64))
    usage.update(torch.tensor([[0], [index]]))
    usage.update(torch.tensor([[7], [0]]))
    for read in (usage.compute, usage.state_dict):
        with pytest.raises(
            ValueError, match=rf"part 0 \({index}\) of token 11 must be in \[0, 4\)"
        ):
            read()
    saved = {"tokens": torch.tensor([[0], [index]])}
    with pytest.raises(ValueError, match=rf"part 0 \({index}\) of token 1 must be in"):
        usage.load_state_dict(saved)
    usage.load_state_dict({"tokens": torch.tensor([[0], [3]])})
    assert usage.compute().num_tokens == 2


def test_the_part_outside_the_codebook_is_named():
    usage = CodebookUsage(CodeSpec(sizes=(3, 5), dim=2))
    usage.update(torch.tensor([[[0, 4]], [[2, 5]]]))
    with pytest.raises(ValueError, match=r"part 1 \(5\) of token 1 must be in \[0, 5\)"):
        usage.compute()


def test_a_step_of_training_does_not_wait_for_the_counts(generator):
    usage = CodebookUsage(bits(4))
    with host_reads() as reads:
        for num_tokens in (3, 0, 40):
            usage.update(torch.randint(16, (num_tokens, 1), generator=generator))
    assert reads == []
    assert usage.compute().num_tokens == 16


def test_a_codebook_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="has seen no token"):
        CodebookUsage(bits(2)).compute()


def test_tokens_without_an_index_are_told_apart_by_their_parts(generator):
    sizes = (2**40, 2**40)
    wide = CodeSpec(sizes=sizes, dim=80, is_binary=True)
    usage = CodebookUsage(wide)
    low, high = torch.tensor([[0, 2**40 - 1]]), torch.tensor([[2**40 - 1, 0]])
    usage.update(torch.cat([low, high, low, low]))
    statistics = usage.compute()
    assert (statistics.num_tokens, statistics.num_distinct) == (4, 2)
    assert statistics.num_values == wide.num_values == 2**80
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert statistics.perplexity == pytest.approx(math.exp(entropy))
    assert statistics.bit_probs.tolist() == [0.25] * 40 + [0.75] * 40


@pytest.mark.parametrize(
    ("sizes", "is_binary"), [((4, 8), True), ((4, 8), False), ((3, 5, 2), False)]
)
def test_counting_rows_and_counting_indices_are_the_same(sizes, is_binary, generator):
    # Entries of a table are numbers without bits, however many there are.
    spec = CodeSpec(sizes=sizes, dim=2, is_binary=is_binary)
    parts = torch.stack([torch.randint(size, (50,), generator=generator) for size in sizes], -1)
    found = codebook_statistics(parts, spec)
    rows, counts = parts.unique(dim=0, return_counts=True)
    frequencies = counts.double() / 50
    assert found.num_distinct == len(rows)
    entropy = -(frequencies * frequencies.log()).sum()
    assert found.perplexity == pytest.approx(float(entropy.exp()))
    expected = [
        ((part >> bit) & 1).double().mean().item()
        for part, size in zip(parts.unbind(-1), sizes, strict=True)
        for bit in range(size.bit_length() - 1)
    ]
    assert found.bit_probs.tolist() == pytest.approx(expected if spec.is_binary else [])


def test_a_checkpoint_of_indices_is_read():
    spec = CodeSpec(sizes=(3, 3), dim=2)
    usage = CodebookUsage(spec)
    usage.load_state_dict({"tokens": torch.tensor([0, 8, 5])})
    assert torch.equal(usage.state_dict()["tokens"], torch.tensor([[0, 0], [2, 2], [2, 1]]))


# ----------------------------------------------------------------------------------- collapse


def report(num_distinct=200, bit_prob=0.5):
    probs = torch.full((8,), 0.5, dtype=torch.float64)
    probs[3] = bit_prob
    return CodebookStatistics(
        num_tokens=1000,
        num_distinct=num_distinct,
        num_values=256,
        perplexity=100.0,
        bit_probs=probs,
    )


def test_a_constant_encoder_is_reported_once():
    monitor = CollapseMonitor(num_reports=3)
    constant = usage_of(torch.full((256,), 5), num_bits=8)
    texts = [monitor.update(constant) for _ in range(10)]
    assert [index for index, text in enumerate(texts) if text] == [2]
    assert "1 codes occur in 256 tokens" in texts[2]
    assert "[0, 1, 2, 3, 4, 5, 6, 7] are nearly constant" in texts[2]


def test_every_setting_that_the_warning_names_exists():
    text = CollapseMonitor(num_reports=1).update(report(num_distinct=1, bit_prob=0.0))
    advice = re.split(r", | or ", text.rpartition("; ")[2])
    assert len(advice) >= 2
    for measure in advice:
        found = re.fullmatch(r"(?:raise|lower) ([a-z]+)\.([a-z_]+)", measure)
        assert found, measure
        assert hasattr(getattr(TokenizerRun(), found[1]), found[2]), measure


def test_a_resumed_monitor_counts_on_and_does_not_warn_twice():
    monitor, texts = CollapseMonitor(num_reports=3), []
    for _ in range(6):
        resumed = CollapseMonitor(num_reports=3)
        resumed.load_state_dict(monitor.state_dict())
        monitor = resumed
        texts.append(monitor.update(report(1)))
    assert [bool(text) for text in texts] == [False, False, True, False, False, False]


def test_a_healthy_codebook_is_never_reported():
    monitor = CollapseMonitor(num_reports=1)
    assert [monitor.update(report()) for _ in range(5)] == [None] * 5


def test_low_usage_alone_is_a_collapse_below_five_percent():
    # 13 of 256 codes are 5.08 %, 12 are 4.7 %.
    assert CollapseMonitor(num_reports=1).update(report(num_distinct=13)) is None
    text = CollapseMonitor(num_reports=1).update(report(num_distinct=12))
    assert "4.7 %" in text
    assert "nearly constant" not in text


def test_one_constant_bit_alone_is_a_collapse():
    # An entropy of 0.1 bit belongs to a probability of about 0.01299.
    assert CollapseMonitor(num_reports=1).update(report(bit_prob=0.0131)) is None
    text = CollapseMonitor(num_reports=1).update(report(bit_prob=0.0129))
    assert "bits [3] are nearly constant" in text
    assert "codes occur" not in text


def test_a_recovery_starts_the_count_again():
    monitor = CollapseMonitor(num_reports=2)
    reports = [report(1), report(), report(1), report(1)]
    assert [bool(monitor.update(item)) for item in reports] == [False, False, False, True]


def test_a_codebook_that_no_window_can_hold_is_counted_over_a_fixed_number_of_tokens():
    # 2 MiB; as long as its codes a window of 32 bits would take 32 GiB.
    usage = CodebookUsage(bits(32))
    assert len(usage.window) == 2**18
    usage.update(torch.tensor([[0], [2**32 - 1], [0]]))
    assert usage.compute().num_distinct == 2
    with pytest.raises(ValueError, match=rf"window \(255\) must be at least {2**18} tokens"):
        CodebookUsage(bits(32), window=255)


def test_real_numbers_by_hand_in_any_batches():
    codes = torch.tensor([[1.0, 0.0], [3.0, 0.1], [5.0, 0.0], [7.0, 0.1]])
    for batch_size in (1, 3, 4):
        channels = Channels(2)
        for some in codes.split(batch_size):
            channels.update(some[None])
        found = channels.compute()
        assert found.mean.tolist() == pytest.approx([4.0, 0.05])
        assert found.variance.tolist() == pytest.approx([5.0, 0.0025])
        assert (found.num_tokens, found.num_active) == (4, 1)


def test_real_numbers_without_tokens_are_an_error():
    with pytest.raises(ValueError, match="have seen no token"):
        Channels(2).compute()
