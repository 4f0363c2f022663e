"""A generator and one that drafts for it: both have the same sequences, or are refused."""

from dataclasses import replace

import pytest

from mergevq.config.parts.heads import Bits, Independent, Subindices
from mergevq.config.parts.orders import Anchored, Masked, Merge, Raster
from mergevq.generator.build import build_generator
from mergevq.generator.drafts.pairing import require_same_sequences, with_draft
from tests.support.generators import TINY

NAMES = ("large", "small")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"order": Raster()}, "order (raster, there merge)"),
        ({"grid_size": (4, 4)}, "grid ((4, 4), there (3, 4))"),
        ({"kept_candidates": (5, 6)}, "K ((5, 6), there (5, 7))"),
        ({"num_classes": 4}, "number of classes (4, there 3)"),
        (
            {"head": Subindices(sizes=(8, 4))},
            "head (Subindices(kind='subindices', sizes=(8, 4), num_layers=1), there "
            "Subindices(kind='subindices', sizes=(4, 8), num_layers=1))",
        ),
        ({"head": Independent(sizes=(4, 8))}, "head (Independent("),
        ({"head": Bits(sizes=(2,) * 5)}, "head (Bits("),
    ],
)
def test_other_sequences_are_refused_by_both_names(changes, wanted):
    config = replace(TINY, order=Merge())
    with pytest.raises(ValueError, match="differs in") as raised:
        require_same_sequences(config, replace(config, **changes), names=NAMES)
    message = str(raised.value)
    assert message.startswith("the generator in small cannot draft for that in large")
    assert wanted in message


def test_depth_and_width_are_no_difference():
    config = replace(TINY, order=Merge())
    head = replace(config.head, num_layers=2)
    small = replace(config, order=Merge(window=0), head=head, dim=16, num_layers=1, ffn_dim=8)
    require_same_sequences(config, small, names=NAMES)


def test_a_pair_shares_weights_and_is_saved_without_its_draft():
    model = build_generator(TINY)
    draft = build_generator(replace(TINY, num_layers=1))
    both = with_draft(model, draft)
    assert model.drafter is None
    assert both.drafter is not None
    assert both.drafter.network is draft.network
    assert both.network is model.network
    assert both.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("order", [Anchored(), Masked()])
def test_orders_that_cannot_be_drafted_are_refused(order):
    model = build_generator(replace(TINY, order=order))
    with pytest.raises(ValueError, match=f"order '{order.kind}'"):
        with_draft(model, model)
