import itertools

import pytest
import torch

from mergevq.config.generator import (
    GeneratorConfig,
    sized,
)
from mergevq.generator.build import build_generator
from mergevq.generator.orders.anchored import legal_gaps
from mergevq.generator.orders.random import slot_positions
from mergevq.generator.seams import Sequences
from tests.support.generators import (
    FIGURE_6,
    ORDERS,
    TINY,
    changed,
    loss_of,
    tiny_batch,
    tiny_generator,
)

IMAGENET = GeneratorConfig(num_classes=1000, num_kept=144, kept_candidates=(144, 196, 256))


def num_parameters(config):
    """All that is trained: embeddings, blocks, head and norms."""
    with torch.device("meta"):
        model = build_generator(config)
    return sum(parameter.numel() for parameter in model.parameters())


def joint(logits, row=0, token=0):
    """Log-probabilities of the parts of one token, each given the parts it was computed with."""
    return [part[row, token].log_softmax(-1) for part in logits]


# ------------------------------------------------------------------------------------- sizes


def test_large_has_the_authors_count():
    # Method: 24 + 2 blocks of 1024 with 6 + 12 bits is 343.57M; we have a row for no class and
    # no bias anywhere.
    config = changed(sized(IMAGENET, "L"), order="raster", kept_candidates=(), sizes=(2**6, 2**12))
    block = 4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024
    tables = 2 * (2**6 + 2**12) * 1024 + 1001 * 1024
    assert num_parameters(config) == 26 * block + tables + 1024
    assert num_parameters(config) == pytest.approx(343.57e6, rel=1e-5)


@pytest.mark.parametrize(
    ("size", "millions"),
    [("tiny", 1.7), ("small", 17.1), ("B", 108.5), ("L", 337.2), ("XL", 775.9), ("XXL", 1420.2)],
)
def test_sizes_are_what_their_names_promise(size, millions):
    count = num_parameters(sized(IMAGENET, size))
    assert count == pytest.approx(millions * 1e6, rel=2e-3)


@pytest.mark.parametrize(
    ("order", "extra"),
    [("merge", 3 * 384), ("random", 4 * 384), ("anchor", 3 * 384 + 2 * 256 * 384)],
)
def test_orders_differ_only_by_what_they_need(order, extra):
    raster = num_parameters(changed(IMAGENET, order="raster", kept_candidates=()))
    assert num_parameters(changed(IMAGENET, order=order)) == raster + extra


@pytest.mark.parametrize("dim", [384, 768, 1024, 1280, 1536])
def test_hidden_width_follows_llamagen(dim):
    expected = {384: 1024, 768: 2048, 1024: 2816, 1280: 3584, 1536: 4096}[dim]
    assert GeneratorConfig(dim=dim, num_heads=4).hidden_dim == expected


# ---------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 36}, r"dim \(36\) must be a multiple of 4 times num_heads \(2\)"),
        ({"num_kv_heads": 3}, r"num_heads \(2\) must be a multiple of num_kv_heads \(3\)"),
        ({"sizes": (1, 8)}, r"sizes \(1, 8\) must all be between 2"),
        ({"kept_candidates": (5, 13)}, r"num_kept \(13\) must be between 1 and the 12 cells"),
        ({"kept_candidates": (7,)}, r"num_kept \(5\) must be one of kept_candidates \(7,\)"),
        ({"kept_candidates": ()}, r"num_kept \(5\) must be one of kept_candidates \(\)"),
        ({"num_head_layers": 0}, r"num_layers \(0\) must be between 1"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must be at least 0 and below 1"),
        ({"window": -1}, r"window \(-1\) must be between 0 and"),
        ({"grid_size": (0, 4)}, r"grid_size \(0, 4\) must all be between 1"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(TINY, **changes)


# ------------------------------------------------------------------------------- probabilities


def test_sub_indices_have_a_joint_distribution_that_sums_to_one():
    model = tiny_generator("raster")
    given = tiny_batch("raster", batch=1)
    total = 0.0
    for code in range(TINY.num_codes):
        given.indices[0, 3] = code
        parts = model.parts(given)[0, 3]
        first, second = joint(model.logits(given), token=3)
        total += (first[parts[0]] + second[parts[1]]).exp().item()
    assert total == pytest.approx(1, abs=1e-5)


def test_the_second_sub_index_is_conditioned_on_the_first():
    model, given = tiny_generator("raster"), tiny_batch("raster", batch=1)
    first, second = model.logits(given)
    given.indices[0, -1] ^= 1
    first_after, second_after = model.logits(given)
    assert torch.equal(first, first_after)
    assert not torch.isclose(second[0, -1], second_after[0, -1]).any()


@pytest.mark.parametrize("num_kept", [1, 2, 3, 4])
@pytest.mark.parametrize("gap_in_bits", [False, True])
def test_likelihood_of_anchors_and_codes_sums_to_one(num_kept, gap_in_bits):
    changes = {"sizes": (2, 2), "grid_size": (2, 2), "gap_in_bits": gap_in_bits}
    changes |= {"num_kept": num_kept, "kept_candidates": (num_kept,)}
    model = tiny_generator("anchor", **changes)
    anchors = [(0, *later) for later in itertools.combinations(range(1, 4), num_kept - 1)]
    codes = itertools.product(range(4), repeat=num_kept)
    sequences = list(itertools.product(anchors, codes))
    given = Sequences(
        torch.tensor([code for _, code in sequences]),
        torch.full((len(sequences),), 2),
        num_kept,
        anchors=torch.tensor([anchor for anchor, _ in sequences]),
    )
    likelihood = model.log_likelihood(given)
    assert likelihood.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("order", ["raster", "merge", "random"])
def test_likelihood_of_codes_sums_to_one(order):
    changes = {"sizes": (2, 2), "grid_size": (1, 3), "num_kept": 3}
    model = tiny_generator(order, **changes, kept_candidates=(3,))
    sequences = torch.tensor(list(itertools.product(range(4), repeat=3)))
    extra = {"slots": torch.tensor([[2, 0, 1]]).expand(64, -1)} if order == "random" else {}
    labels = torch.zeros(64, dtype=torch.int64)
    likelihood = model.log_likelihood(Sequences(sequences, labels, 3, **extra))
    assert likelihood.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_legal_gaps_leave_room_for_the_tokens_left():
    # 6 cells, 3 tokens: after an anchor at 2 the second may open at 3 or 4, the third at 3, 4, 5.
    previous, tokens = torch.tensor([[0, 2, 2]]), torch.tensor([0, 1, 2])
    legal = legal_gaps(previous, tokens, num_kept=3, num_tokens=6)[0]
    assert [row.nonzero()[:, 0].tolist() for row in legal] == [[0], [1, 2], [1, 2, 3]]


# -------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("order", ORDERS)
def test_an_untrained_generator_knows_nothing(order):
    model = build_generator(changed(TINY, order=order, label_smoothing=0.0)).eval()
    loss = loss_of(model, tiny_batch(order))
    subindices = torch.tensor([4.0, 8.0]).log()
    torch.testing.assert_close(loss.parts[-2:], subindices)
    torch.testing.assert_close(loss.nll, loss.parts.sum())
    torch.testing.assert_close(loss.total, loss.parts.sum())


def test_an_untrained_anchor_is_uniform_over_legal_gaps():
    model = build_generator(changed(TINY, order="anchor")).eval()
    given = tiny_batch("anchor", batch=1)
    given = given._replace(anchors=torch.tensor([[0, 3, 4, 9, 11]]))
    # 12 cells, 5 tokens: of the anchors after 0, 3, 4 and 9 there are 8, 6, 6 and 2.
    expected = torch.tensor([1.0, 8.0, 6.0, 6.0, 2.0]).log().mean()
    torch.testing.assert_close(loss_of(model, given).parts[0], expected)


@pytest.mark.parametrize("order", ["raster", "merge", "anchor"])
def test_loss_is_the_likelihood_of_a_token(order):
    model = tiny_generator(order)
    given = tiny_batch(order)
    length = given.indices.shape[1]
    expected = -model.log_likelihood(given).mean() / length
    torch.testing.assert_close(loss_of(model, given).nll, expected)


def test_label_smoothing_is_that_of_pytorch():
    model = tiny_generator("raster", label_smoothing=0.2)
    given = tiny_batch("raster")
    targets = model.parts(given)
    expected = [
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets[..., part].flatten(), label_smoothing=0.2
        )
        for part, logits in enumerate(model.logits(given))
    ]
    torch.testing.assert_close(loss_of(model, given).parts, torch.stack(expected))


def test_random_order_is_the_numbers_alone():
    model, given = tiny_generator("random"), tiny_batch("random")
    first = loss_of(model, given).total
    second = loss_of(model, given, step=1).total
    again = loss_of(model, given).total
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_labels_are_dropped_in_training_only():
    model, given = tiny_generator("raster", dropout=0.0, class_dropout=0.999), tiny_batch("raster")
    no_class = given._replace(class_label=torch.full((4,), model.config.null_class))
    kept = loss_of(model, given).total
    model.train()
    dropped = loss_of(model, given).total
    unconditional = loss_of(model, no_class).total
    assert torch.equal(dropped, unconditional)
    assert not torch.isclose(kept, dropped)


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_reach_every_parameter(order):
    model = tiny_generator(order, qk_norm=True).train()
    given = tiny_batch(order, num_codes=20)
    loss_of(model, given).total.backward()
    missing = [name for name, weight in model.named_parameters() if weight.grad is None]
    # With one K in the batch only that row of the table is used, but the table has a gradient.
    assert missing == []
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())


@pytest.mark.parametrize("order", ORDERS)
def test_checkpointing_changes_no_gradient(order):
    model = tiny_generator(order).train()
    gradients = []
    for enabled in (False, True):
        model.network.checkpointing = enabled
        torch.manual_seed(0)
        loss = loss_of(model, tiny_batch(order)).total
        gradients.append(torch.autograd.grad(loss, model.network.blocks[0].attention.qkv.weight)[0])
    assert torch.equal(*gradients)


def test_autocast_gives_a_float32_loss():
    model, given = tiny_generator("merge", qk_norm=True), tiny_batch("merge")
    expected = loss_of(model, given).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, given).total
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_every_weight_is_initialised(order):
    model = build_generator(changed(TINY, order=order, qk_norm=True))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.reset_parameters(torch.Generator().manual_seed(0))
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


# ------------------------------------------------------------------------------------ orders


@pytest.mark.parametrize("order", ["raster", "merge", "anchor"])
def test_a_token_depends_on_those_before_it_alone(order):
    model, given = tiny_generator(order), tiny_batch(order, num_codes=20)
    before = model.logits(given)
    given.indices[:, 2] ^= 7
    after = model.logits(given)
    for part, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(old[:, :2], new[:, :2])
        finite = torch.isfinite(old[:, 3:])
        assert not torch.isclose(old[:, 3:][finite], new[:, 3:][finite]).all(), part


@pytest.mark.parametrize("order", ORDERS)
def test_class_and_number_of_tokens_matter(order):
    model, given = tiny_generator(order), tiny_batch(order)
    seven = tiny_batch(order, num_kept=7)
    last = model.logits(given)[-1]
    other_class = model.logits(given._replace(class_label=3 - given.class_label))[-1]
    assert not torch.isclose(last, other_class).any()
    assert model.logits(seven)[-1].shape[1] == (7 if order in {"random", "anchor"} else 12)
    if order in {"raster", "merge"}:
        other_k = model.logits(given._replace(num_kept=7))[-1]
        assert not torch.isclose(last, other_k).any()


def test_figure_6_holds_among_input_tokens_after_the_prefix():
    model = tiny_generator("merge", grid_size=(2, 5))
    codes = torch.tensor([[1, 1, 3, 3, 5, 5, 5, 8, 8, 9]])
    label = torch.tensor([2])
    mask = torch.ones(11, 11).tril()
    mask[2:, 2:] = FIGURE_6
    inputs = torch.cat(
        [
            model.network.embed_prefix(label, 5),
            model.network.embed(model.network.codes(codes[:, :9])),
        ],
        1,
    )
    positions = torch.cat([torch.zeros(2, 2), model.network.cell_positions()[:9]])
    states = model.network.transform(
        inputs, model.network.turns(positions[None]), mask[None].bool()
    )[0, 1:]
    given = Sequences(codes, label, 5)
    expected = model.network.part_logits(states[None], model.parts(given))[0]
    torch.testing.assert_close(model.logits(given)[0], expected)


def test_merge_without_duplicates_is_raster():
    codes = torch.randperm(32)[:12][None]
    label = torch.zeros(1, dtype=torch.int64)
    for merged, plain in zip(
        tiny_generator("merge").logits(Sequences(codes, label, 5)),
        tiny_generator("raster").logits(Sequences(codes, label, 5)),
        strict=True,
    ):
        torch.testing.assert_close(merged, plain)


def test_merge_with_a_full_window_is_raster():
    given = tiny_batch("merge")
    wide = tiny_generator("merge", window=12).logits(given)
    plain = tiny_generator("raster").logits(given)
    torch.testing.assert_close(wide, plain)


def test_groups_of_the_source_hide_what_the_tokenizer_merged():
    given = tiny_batch("merge", num_codes=20)
    by_source = tiny_generator("merge", groups="source")
    apart = torch.arange(12).expand(4, -1)
    together = torch.zeros_like(apart)
    plain = tiny_generator("raster").logits(given)
    torch.testing.assert_close(by_source.logits(given._replace(source_index=apart)), plain)
    assert not torch.isclose(
        by_source.logits(given._replace(source_index=together))[0], plain[0]
    ).all()
    with pytest.raises(ValueError, match="needs source_index"):
        by_source.logits(given)


def test_random_order_sees_what_was_decoded_before_and_nothing_else():
    model = tiny_generator("random")
    given = tiny_batch("random", batch=1, num_codes=20)
    given = given._replace(slots=torch.tensor([[3, 0, 4, 1, 2]]))
    before = model.logits(given)[0][0]
    given.indices[0, 4] ^= 7
    after = model.logits(given)[0][0]
    same = torch.isclose(before, after).all(-1)
    assert same.tolist() == [True, False, False, True, True]


def test_slots_know_where_they_are():
    model, given = tiny_generator("random"), tiny_batch("random", batch=1)
    given.indices[:] = 3
    given = given._replace(slots=torch.arange(5)[None])
    reverse = given._replace(slots=given.slots.flip(1))
    assert not torch.isclose(model.logits(given)[0], model.logits(reverse)[0]).any()


def test_slots_are_the_cells_near_which_they_open():
    model = tiny_generator("random", kept_candidates=(5, 6, 12))
    assert torch.equal(slot_positions(model.network, 12), model.network.cell_positions())
    # Six slots of twelve cells in rows of four: every second cell.
    expected = [[1, 1], [1, 3], [2, 1], [2, 3], [3, 1], [3, 3]]
    assert slot_positions(model.network, 6).tolist() == expected
    assert len(slot_positions(model.network, 5).unique(dim=0)) == 5


def test_instructions_are_one_vector_turned_by_its_slot():
    model = tiny_generator("random")
    positions = slot_positions(model.network, 5)[None]
    instructions = model.order.embed_instruction(model.network, positions)
    lengths = instructions.unflatten(-1, (-1, 2)).norm(dim=-1)
    expected = model.order.instruction.unflatten(-1, (-1, 2)).norm(dim=-1)
    torch.testing.assert_close(lengths, expected.expand_as(lengths))
    assert not torch.isclose(instructions[:, 0], instructions[:, 4]).all()
    plain = tiny_generator("random", rotate_instruction=False)
    instructions = plain.order.embed_instruction(plain.network, positions)
    assert torch.equal(instructions[0, 4], plain.order.instruction)


# ------------------------------------------------------------------------------------ errors

SEVEN = torch.arange(7).expand(4, -1)


@pytest.mark.parametrize(
    ("order", "changes", "message"),
    [
        (
            "raster",
            {"indices": torch.full((4, 12), 32)},
            r"indices \(32 to 32\) .* between 0 and 31",
        ),
        ("raster", {"indices": torch.full((4, 12), -1)}, r"indices \(-1 to -1\) must be between 0"),
        (
            "raster",
            {"class_label": torch.full((4,), 4)},
            r"class_label \(4 to 4\) .* 0 and 3, which",
        ),
        ("merge", {"num_kept": 6}, r"num_kept \(6\) must be one of those trained on: \(5, 7\)"),
        ("merge", {"indices": torch.zeros(4, 5).long()}, "sequence of 5 tokens must have 12: all"),
        (
            "anchor",
            {"indices": torch.zeros(4, 7).long(), "anchors": SEVEN},
            "of 7 tokens must have 5: the kept",
        ),
        ("random", {"slots": None}, "order 'random' needs slots"),
        ("anchor", {"anchors": None}, "order 'anchor' needs anchors"),
        ("anchor", {"anchors": torch.tensor([[0, 1, 2, 3, 12]] * 4)}, r"anchors \(0 to 12\) .* 11"),
        (
            "anchor",
            {"anchors": torch.tensor([[0, 1, 3, 2, 4]] * 4)},
            "start at cell 0 and increase",
        ),
        (
            "anchor",
            {"anchors": torch.tensor([[1, 2, 3, 4, 5]] * 4)},
            "start at cell 0 and increase",
        ),
    ],
)
def test_what_does_not_fit_is_named(order, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_generator(order).logits(tiny_batch(order)._replace(**changes))
