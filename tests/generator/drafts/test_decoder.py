"""Drafts that are checked several in a pass: the samples are those of one token in each pass."""

from dataclasses import replace

import pytest
import torch

from mergevq.config.generator import Drafted, OneByOne, SamplingSettings, check_sampling
from mergevq.config.parts.heads import Bits, Independent
from mergevq.config.parts.orders import Anchored, Masked, Merge, Ordered, Random, Raster, Stream
from mergevq.generator.build import build_generator
from mergevq.generator.cache import RowCache
from mergevq.generator.decoding import prefill, put_in
from mergevq.generator.drafts.decoder import DraftDecoder
from mergevq.generator.drafts.pairing import with_draft
from mergevq.generator.sampling import guided, run, sample, sample_in_steps
from mergevq.generator.weights import as_weights
from tests.support.generators import TINY

DRAFTS = ("previous", "left", "above")
MODEL = Drafted(draft="model", num_drafted=3)
CELLS = TINY.num_tokens
CASES = {
    "raster": {},
    "targets": {"order": Raster(annealing=(0.5, 0.75))},
    "merge": {"order": Merge()},
    "no window": {"order": Merge(window=0)},
    "bits": {"head": Bits(sizes=(2,) * 5)},
    "independent": {"head": Independent(sizes=(4, 8))},
    "grouped": {"num_kv_heads": 1},
}


def built(order=None, head=None, seed=1, spread=0.3, **changes):
    """A generator with random weights, in evaluation mode."""
    model = build_generator(
        replace(TINY, order=order or Raster(), head=head or TINY.head, **changes)
    )
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=numbers) * spread + (weight == 1))
    return model.eval()


def paired(*, spread=0.3, **changes):
    """A generator, and the same one with a smaller one that drafts for it."""
    small = {"dim": 16, "num_layers": 1, "num_heads": 1, "ffn_dim": 24, "num_kv_heads": None}
    model = built(**changes, spread=spread)
    return model, with_draft(model, built(**changes | small, seed=2, spread=spread))


def sampled(model, passes, ids=range(3), **changes):
    ids = list(ids)
    return sample(
        model,
        labels=torch.tensor(ids) % model.config.num_classes,
        num_kept=5,
        seed=3,
        image_ids=ids,
        settings=replace(SamplingSettings(**changes), passes=passes),
    )


def decoder_of(model, passes, rows=3, **changes):
    settings = replace(SamplingSettings(**changes), passes=passes)
    draws = model.draws(3, range(rows), 5, settings)
    return model.decoder(torch.arange(rows), 5, draws, settings)


@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_of_one_token_a_pass(case):
    model = built(**CASES[case])
    rising = {"guidance_scale": 3.0, "guidance_schedule": "linear", "top_k": 5}
    for changes, passes in (({}, Drafted(num_drafted=3)), (rising, Drafted(num_drafted=40))):
        plain = sampled(model, OneByOne(), **changes)
        found = sampled(model, passes, **changes)
        assert torch.equal(found.indices, plain.indices)
        assert found.num_forward <= plain.num_forward
        if plain.source_index is not None:
            assert torch.equal(found.source_index, plain.source_index)


@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_without_the_model_that_drafts(case):
    model, drafted = paired(**CASES[case])
    rising = {"guidance_scale": 3.0, "guidance_schedule": "linear", "top_k": 3}
    rising["guidance_interval"] = (0.0, 0.7)
    parts = len(model.config.part_sizes)
    warm = {"temperature": (0.5,) * (parts - 1) + (1.5,), "top_p": 0.9}
    for changes, count in (({}, 3), (rising, 40), (warm, 1)):
        plain = sampled(model, OneByOne(), **changes)
        found = sampled(drafted, replace(MODEL, num_drafted=count), **changes)
        assert torch.equal(found.indices, plain.indices)
        assert found.num_forward <= plain.num_forward


@pytest.mark.parametrize("order", [Raster(annealing=(0.5, 0.75)), Merge(), Merge(window=0)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_model_drafts_all_of_its_own_tokens_right(order, scale):
    model = built(order)
    own = with_draft(model, model)
    for count in (1, 4):
        found = sampled(own, Drafted(draft="model", num_drafted=count), guidance_scale=scale)
        # One token without a draft, then all drafts and the token after them in each pass.
        assert found.num_forward == 1 + -(-(CELLS - 1) // (count + 1))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_model_drafts_what_it_would_sample_after_the_right_tokens(guidance):
    """Count passes by the definition: its own tokens after those known, read anew each time."""
    # Small weights, so that both models are near to uniform and often choose alike.
    model, drafted = paired(order=Raster(), spread=0.1)
    settings = SamplingSettings(guidance_scale=guidance)
    all_passes = []
    for number in range(3):
        ids = [number]
        draws = model.draws(3, ids, 5, settings)
        plain = sampled(model, OneByOne(), ids, guidance_scale=guidance).indices
        right = model.network.codes(plain)
        known, passes = 1, 1
        while known < CELLS:
            count = min(MODEL.num_drafted, CELLS - 1 - known)
            drafts = continued(drafted.drafter, number, right[:, :known], count, draws, settings)
            wrong = (drafts != right[:, known : known + count]).any(-1)[0].tolist()
            known += (wrong.index(True) if True in wrong else count) + 1
            passes += 1
        found = sampled(drafted, MODEL, ids, guidance_scale=guidance)
        assert torch.equal(found.indices, plain)
        assert found.num_forward == passes
        all_passes.append(passes)
    assert CELLS // 4 < min(all_passes) < CELLS
    together = sampled(drafted, MODEL, guidance_scale=guidance)
    # Each image goes on by itself; the batch is done with the last of them.
    assert together.num_forward == max(all_passes)


def continued(drafter, number, known, count, draws, settings):
    """Tokens that a drafter samples after some, from an empty cache."""
    network, order = drafter
    labels = torch.tensor([number % 3])
    plain = replace(settings, passes=OneByOne())
    decoder = order.decoder(network, labels, 5, draws, plain)
    states = prefill(network, decoder.cache, decoder.rows, 5)
    tokens = list(known.unbind(1))
    for cell in range(known.shape[1] + count):
        if cell == len(tokens):
            scale = decoder.scales[cell]
            tokens.append(network.choose(states, draws.uniforms[:, cell], scale, plain).parts)
        parts = tokens[cell].repeat(len(decoder.rows), 1)
        turns = order.turns(decoder.cache, parts, cell)
        if cell + 1 < CELLS:
            states = put_in(network, decoder.cache, parts, turns)
    return torch.stack(tokens, 1)[:, known.shape[1] :]


def test_a_model_that_drafts_is_missed():
    with pytest.raises(ValueError, match=r"passes.draft \(model\) needs a second"):
        sampled(built(), MODEL)


@pytest.mark.parametrize("order", [Raster(), Merge()])
def test_a_hundred_images_are_the_same_in_batches_of_any_size(order):
    model, drafted = paired(order=order)
    plain = sampled(model, OneByOne(), range(100)).indices
    for passes in (Drafted(num_drafted=5), replace(MODEL, num_drafted=5)):
        assert torch.equal(sampled(drafted, passes, range(100)).indices, plain)
        for ids in ([7], [99, 3, 50]):
            assert torch.equal(sampled(drafted, passes, ids).indices, plain[ids])


def test_samples_without_a_budget_and_by_confidence_are_the_same_too():
    model, drafted = paired(order=Merge())
    plain = sampled(model, OneByOne(budget=False)).indices
    assert torch.equal(sampled(model, Drafted(budget=False)).indices, plain)
    assert torch.equal(sampled(drafted, replace(MODEL, budget=False)).indices, plain)
    assert max(len(set(row.tolist())) for row in plain) > 5
    held = sampled(model, Drafted()).indices
    assert max(len(set(row.tolist())) for row in held) == 5
    model, drafted = paired(head=Bits(sizes=(2,) * 5))
    plain = sampled(model, OneByOne(), bits_order="confidence")
    for passes in (Drafted(), MODEL):
        found = sampled(drafted, passes, bits_order="confidence")
        assert torch.equal(found.indices, plain.indices)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_lighter_weights_are_drafted_for_too(weights):
    model = as_weights(built(), weights)
    assert sampled(model, Drafted()).indices.shape == (3, CELLS)
    drafted = with_draft(model, as_weights(built(seed=2, num_layers=1), weights))
    assert sampled(drafted, MODEL).indices.shape == (3, CELLS)


def test_the_most_likely_value_of_equal_cells_is_drafted_right_at_once():
    # Outputs of zero: temperature 0 takes value 0 everywhere, which every draft copies.
    model = build_generator(replace(TINY, order=Raster())).eval()
    for draft in DRAFTS:
        found = sampled(model, Drafted(draft=draft, num_drafted=4), temperature=0.0)
        assert not found.indices.any()
        # One token without a draft, then five in each pass.
        assert found.num_forward == 1 + -(-(CELLS - 1) // 5)


@pytest.mark.parametrize("draft", DRAFTS)
def test_passes_are_those_that_right_drafts_save(draft):
    """Count by the definition, from the images alone, image by image."""
    model, count = built(), 3
    columns = TINY.grid_size[1]
    for number in range(2):
        plain = sampled(model, OneByOne(), [number]).indices[0].tolist()
        draws = model.draws(3, [number], 5, SamplingSettings())
        decoder = model.decoder(
            torch.tensor([number % 3]),
            5,
            draws,
            SamplingSettings(passes=Drafted(draft=draft, num_drafted=count)),
        )
        run(decoder)
        assert model.sampled(decoder).indices[0].tolist() == plain
        if draft == "previous":
            assert decoder.num_steps <= CELLS
            continue
        passes, known = 1, 1
        while known < CELLS:
            drafts = list(plain[:known])
            for cell in range(known, min(known + count, CELLS - 1)):
                left, above = cell % columns > 0, cell >= columns
                up = above and (draft == "above" or not left)
                drafts.append(drafts[cell - (columns if up else 1)])
            right = 0
            while known + right < len(drafts) and drafts[known + right] == plain[known + right]:
                right += 1
            known, passes = known + right + 1, passes + 1
        assert decoder.num_steps == passes


def test_choices_after_a_wrong_draft_are_the_next_draft():
    model = built()
    decoder = decoder_of(model, Drafted(num_drafted=4), rows=1)
    decoder.seek(0)
    decoder.step()
    decoder.step()
    length, filled = int(decoder.lengths), int(decoder.filled)
    before = decoder.tokens[0, length:filled].clone()
    assert filled == 6
    assert length < filled
    decoder._draft(filled - length + 1)
    assert torch.equal(decoder.tokens[0, length:filled], before)
    assert torch.equal(decoder.tokens[0, filled], decoder.tokens[0, filled - 1])


@pytest.mark.parametrize("passes", [Drafted(), MODEL])
def test_a_decoder_goes_on_from_any_step_and_shows_what_all_images_have(passes):
    # Small weights, near to uniform: both models choose alike now and then.
    _, drafted = paired(spread=0.1)
    decoder = decoder_of(drafted, passes)
    assert isinstance(decoder, DraftDecoder)
    assert decoder.num_steps == CELLS
    run(decoder)
    whole = decoder.parts().clone()
    assert whole.shape == (3, CELLS, 2)
    assert decoder.num_steps < CELLS
    decoder.step()
    assert torch.equal(decoder.parts(), whole)
    decoder.seek(5, whole)
    assert (decoder.num_steps, decoder.parts().shape[1]) == (CELLS, 5)
    run(decoder)
    assert torch.equal(decoder.parts(), whole)
    shown = list(
        sample_in_steps(
            drafted,
            labels=torch.arange(3),
            num_kept=5,
            seed=3,
            image_ids=range(3),
            settings=SamplingSettings(passes=passes),
            every=1,
        )
    )
    assert len(shown) == shown[-1].sampled.num_forward
    assert [each.share for each in shown] == sorted(each.share for each in shown)
    assert shown[-1].share == 1
    for each in shown:
        count = each.known.shape[1]
        assert torch.equal(each.sampled.indices, shown[-1].sampled.indices[:, :count])


def test_rows_of_a_cache_write_and_see_their_own_slots():
    numbers = torch.Generator().manual_seed(0)
    cache = RowCache(TINY, batch=2, num_slots=6, device=torch.device("cpu"), dtype=torch.float32)
    prefix = torch.randn(3, 2, 2, 2, 16, generator=numbers)
    later = torch.randn(3, 2, 2, 2, 16, generator=numbers)
    cache.reset()
    cache.attend(0, *prefix, None)
    slots = torch.tensor([[2, 3], [1, 2]])
    cache.put_at(slots, 4)
    seen = torch.arange(4) <= slots[..., None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    found = cache.attend(0, *later, mask)
    query, key, value = later
    for row, first in enumerate((2, 1)):
        keys = torch.cat([prefix[1][row][:, :first], key[row]], 1)
        values = torch.cat([prefix[2][row][:, :first], value[row]], 1)
        for number in range(2):
            end = first + number + 1
            weights = (query[row][:, number, None] @ keys[:, :end].mT / 4).softmax(-1)
            expected = (weights @ values[:, :end])[:, 0]
            torch.testing.assert_close(found[row][:, number], expected)


def test_guidance_of_each_row_is_that_of_one_scale():
    conditional, unconditional = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    scales = [1.0, 2.5, 0.1]
    found = guided(conditional, unconditional, torch.tensor(scales)[:, None])
    for row, scale in enumerate(scales):
        assert torch.equal(found[row], guided(conditional, unconditional, scale)[row])
    assert torch.equal(found[0], conditional[0])


def test_orders_without_neighbours_before_are_refused():
    for order in (Anchored(), Random(), Masked(), Stream(), Ordered()):
        with pytest.raises(ValueError, match=r"passes.kind \(drafted\) must be 'one' in order"):
            check_sampling(replace(TINY, order=order), SamplingSettings(passes=Drafted()))
    with pytest.raises(ValueError, match=r"num_drafted \(0\) must be"):
        Drafted(num_drafted=0)


def test_broken_weights_do_not_sample():
    model = built()
    with torch.no_grad():
        model.network.blocks[0].ffn.down.weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="states or logits are not finite"):
        sampled(model, Drafted())
