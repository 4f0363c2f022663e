"""Arms that cannot be compared are refused before anything is loaded."""

from dataclasses import replace
from pathlib import Path

import pytest

from mergevq.config.contest import Arm, ContestSettings
from mergevq.config.recipes.digits import digits32, digits32_pool

MERGE = Arm(name="merge", run=digits32())


def changed(name, section, **values):
    """Another arm, with some settings of a section changed."""
    run = digits32_pool()
    return Arm(name=name, run=replace(run, **{section: replace(getattr(run, section), **values)}))


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", " a"])
def test_an_arm_is_called_as_a_folder_may_be(name):
    with pytest.raises(ValueError, match=r"arm \(.*\) must have a name"):
        Arm(name=name, run=digits32())


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (changed("b", "train", num_steps=3), r"train.num_steps of b \(3\) must be that of merge"),
        (changed("b", "train", batch_size=3), r"train.batch_size of b \(3\)"),
        (changed("b", "data", val_fraction=0.3), r"data.val_fraction of b \(0.3\)"),
        (changed("b", "data", path="other"), r"data.path of b \(other\)"),
        (changed("b", "train", max_minutes=1.0), r"train.max_minutes of b \(1.0\) must be none"),
        (changed("merge", "train"), r"arms \(merge, merge\) must all be different"),
    ],
)
def test_training_and_held_out_images_are_the_same(arm, message):
    with pytest.raises(ValueError, match=message):
        ContestSettings(arms=(MERGE, arm))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arms": ()}, r"arms \(\) must name at least one"),
        ({"seeds": ()}, r"seeds \(\) must have at least one"),
        ({"seeds": (1, 1)}, r"seeds \(1, 1\) must all be different"),
        ({"bits": (0,)}, r"bits \(0,\) must all be between 1 and"),
        ({"against": "pool"}, r"against \(pool\) must be one of the arms: merge"),
    ],
)
def test_a_comparison_has_arms_seeds_and_a_control_among_them(given, message):
    with pytest.raises(ValueError, match=message):
        ContestSettings(**{"arms": (MERGE,)} | given)


def test_a_run_has_the_seed_the_images_and_a_folder_of_its_own():
    pool = changed("pool", "data", path="elsewhere")
    settings = ContestSettings(arms=(MERGE, pool), data="given", out="out", seeds=(4, 7))
    run = settings.run_of(pool, 7)
    assert (run.train.seed, run.data.path, run.out) == (7, "given", str(Path("out/pool/7")))
    assert run.model == pool.run.model
