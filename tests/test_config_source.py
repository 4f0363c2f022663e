import pytest

from mergevq.config_source import SourceRun


def test_the_optimizer_is_the_papers():
    optim = SourceRun().optim
    assert (optim.lr, optim.betas, optim.weight_decay) == (1e-4, (0.9, 0.95), 1e-2)
    assert (optim.schedule, optim.clip_norm, SourceRun().batch_size) == ("step", None, 256)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_replaced", 1.0), ("max_replaced", -0.1), ("val_fraction", 0.0), ("num_passes", 0)],
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be"):
        SourceRun(**{name: value})
