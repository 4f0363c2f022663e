"""Tests of `mergevq.training.panels`."""

from PIL import Image

from mergevq.config.objective import LossConfig
from mergevq.config.parts import Bernoulli
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.config.training import TokenizerRun
from mergevq.report.plots import Panel
from mergevq.training.panels import (
    curves_by_kept,
    generator_panels,
    log_curve,
    loss_panels,
    tokenizer_panels,
    write_curves,
)

# ----------------------------------------------------------------------------- how training goes

LOG = [
    {"step": 0, "loss": 3.0, "reconstruction": 2.0, "source": 0.0, "psnr@100": 9.0, "psnr@20": 8.0},
    {"step": 10, "loss": None, "reconstruction": 1.0, "source": 0.0, "nonfinite": ["loss"]},
    {"step": 19, "loss": 1.0, "reconstruction": 0.5, "psnr@20": 8.5, "psnr_recovered@20": 7.0},
]


def titles(panels):
    return [panel.title for panel in panels if any(curve.x for curve in panel.curves)]


def test_a_curve_has_a_point_for_every_line_that_names_the_number():
    curve = log_curve(LOG, "loss", label="a", colour=3)
    # After its first step a run has done one.
    assert (list(curve.x), list(curve.y)) == ([1, 11, 20], [3.0, None, 1.0])
    assert (curve.label, curve.colour) == ("a", 3)
    assert list(log_curve(LOG, "psnr").x) == []


def test_numbers_at_several_k_are_a_curve_each_in_the_order_of_the_numbers():
    curves = curves_by_kept(LOG, "psnr")
    assert [(curve.label, list(curve.x), curve.colour) for curve in curves] == [
        ("K = 20", [1, 20], 0),
        ("K = 100", [1], 1),
    ]


def test_only_terms_that_have_a_weight_and_are_not_0_are_shown():
    run = TokenizerRun(loss=LossConfig(source_weight=1.0))
    assert titles(loss_panels(run, LOG)) == ["Loss", "Reconstruction"]
    run = TokenizerRun(loss=LossConfig(reconstruction_weight=0.0))
    assert titles(loss_panels(run, LOG)) == ["Loss"]


def test_a_term_that_only_one_kind_of_quantizer_has_is_shown_like_any_other():
    log = [{"step": 0, "loss": 1.0, "entropy": -1.0, "confidence": 0.2}]
    run = TokenizerRun(model=TokenizerConfig(quantizer=Bernoulli()))
    assert titles(loss_panels(run, log)) == ["Loss", "Entropy", "Confidence"]
    run = TokenizerRun(model=TokenizerConfig(quantizer=Bernoulli(confidence_weight=0.0)))
    assert titles(loss_panels(run, log)) == ["Loss", "Entropy"]
    assert titles(loss_panels(TokenizerRun(), log)) == ["Loss", "Entropy"]


def test_the_curves_of_a_tokenizer_are_losses_quality_codes_and_rate():
    numbers = ("codebook_usage", "perplexity", "min_bit_prob", "max_bit_prob", "lr")
    numbers += ("discriminator_loss",)
    log = [*LOG, {"step": 20} | dict.fromkeys(numbers, 0.5)]
    assert titles(tokenizer_panels(TokenizerRun(), log)) == [
        "Loss",
        "Reconstruction",
        "Discriminator loss",
        "PSNR, given source (dB)",
        "PSNR, recovered source (dB)",
        "Share of codes in use",
        "Perplexity",
        "Share of ones, by bit",
        "Learning rate",
    ]


def test_the_curves_of_a_generator_are_losses_likelihood_and_rate():
    log = [{"step": 0, "loss": 2.0, "nll": 1.5, "loss_anchor": 0.5, "val_nll@9": 1.6, "lr": 0.1}]
    panels = generator_panels(log)
    assert titles(panels) == [
        "Loss",
        "Loss anchor",
        "Nats a token, training",
        "Nats a token, held out",
        "Learning rate",
    ]


def test_curves_are_drawn_without_the_panels_that_have_no_point(tmp_path):
    path = tmp_path / "curves.png"
    write_curves(path, [Panel(title="empty", curves=[])])
    assert not path.exists()
    full = Panel(title="full", curves=[log_curve(LOG, "loss")])
    write_curves(path, [full, Panel(title="empty", curves=[log_curve(LOG, "lr")])])
    one = path.read_bytes()
    write_curves(path, [full])
    assert path.read_bytes() == one
    write_curves(path, [full, full])
    with Image.open(path) as two:
        assert two.width > 800
