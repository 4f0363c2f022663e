"""The report as a file: complete in itself, well formed, and faithful to what it was given."""

import base64
import io
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mergevq.config import LossConfig, TokenizerRun
from mergevq.report import (
    Curve,
    Highlight,
    Panel,
    Picture,
    Section,
    Table,
    bar_plot,
    curves_by_kept,
    generator_panels,
    has_plots,
    line_plot,
    log_curve,
    loss_panels,
    tokenizer_panels,
    write_curves,
    write_report,
)

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Elements, their attributes and text; every element must be closed in order."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.texts = [], [], {}
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def noise(width=6, height=4, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def written(tmp_path, *sections, text="", highlights=()):
    path = tmp_path / "new" / "report.html"
    files = write_report(path, sections, title="A < B", text=text, highlights=highlights)
    return Page(path.read_text(encoding="utf-8")), files


def curve_pixels(plot, colour):
    """Pixels of about that colour."""
    return (np.abs(np.asarray(plot).astype(int) - colour).sum(-1) < 30).sum()


BLUE = (0x24, 0x57, 0xD6)
ORANGE = (0xD9, 0x73, 0x0D)

# ---------------------------------------------------------------------------------------- page


def test_the_page_and_the_files_hold_the_same_pixels(tmp_path):
    image = noise()
    section = Section(title="S", pictures=[Picture(name="noise", image=image, caption="c")])
    page, files = written(tmp_path, section)
    assert files == [tmp_path / "new" / "noise.png"]
    (source,) = [attributes["src"] for attributes in page.all("img")]
    inside = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
    assert inside.tobytes() == Image.open(files[0]).tobytes() == image.tobytes()


def test_a_page_needs_nothing_from_elsewhere(tmp_path):
    picture = Picture(name="noise", image=noise(), caption="c")
    page, _ = written(tmp_path, Section(title="S", pictures=[picture]), Section(title="T"))
    links = [value for _, found in page.elements for name, value in found.items() if name == "href"]
    assert links == ["#section-0", "#section-1"]
    assert all(attributes["src"].startswith("data:") for attributes in page.all("img"))
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe"})
    assert "url(" not in "".join(page.texts["style"])
    assert "@import" not in "".join(page.texts["style"])


def test_a_page_has_a_night_side_and_fits_a_phone(tmp_path):
    page, _ = written(tmp_path, Section(title="S"))
    assert "prefers-color-scheme: dark" in "".join(page.texts["style"])
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
        "meta"
    )


def test_every_jump_has_its_target(tmp_path):
    page, _ = written(tmp_path, Section(title="S"), Section(title="T"))
    targets = [f"#{attributes['id']}" for attributes in page.all("section")]
    assert [attributes["href"] for attributes in page.all("a")] == targets


def test_text_is_text_and_not_markup(tmp_path):
    section = Section(
        title="<b>",
        text="1 < 2\n\n& so on",
        tables=[Table(header=["", "<i>"], rows=[["<u>", '"x"']], caption="<s>")],
        pictures=[Picture(name="p", image=noise(), caption='a "quoted" <em>')],
    )
    page, _ = written(tmp_path, section, text="<p>", highlights=[Highlight(value="<1", label="&")])
    assert {tag for tag, _ in page.elements}.isdisjoint({"b", "i", "u", "s", "em"})
    assert page.texts["h1"] == ["A < B"]
    assert page.texts["h2"] == ["<b>"]
    assert page.texts["p"] == ["<p>", "1 < 2", "& so on"]
    assert page.texts["td"] == ['"x"']
    assert page.texts["th"] == ["<i>", "<u>"]
    assert (page.texts["dd"], page.texts["dt"]) == (["<1"], ["&"])
    assert page.all("img")[0]["alt"] == 'a "quoted" <em>'


def test_a_picture_is_shown_at_its_scale(tmp_path):
    picture = Picture(name="p", image=noise(width=60, height=40), caption="c", scale=0.5)
    page, _ = written(tmp_path, Section(title="S", pictures=[picture]))
    (shown,) = page.all("img")
    assert (shown["width"], shown["height"]) == ("30", "20")
    assert page.all("figure") == [{"style": "flex: 1 1 30px; max-width: min(100%, 60px)"}]


def test_numbers_stay_on_one_line_and_large_pictures_stay_readable(tmp_path):
    table = Table(header=["", "K = 10"], rows=[["PSNR", "20.48"], ["Command", "long " * 30]])
    picture = Picture(name="p", image=noise(width=900, height=40), caption="c")
    write_report(
        tmp_path / "r.html",
        [Section(title="s", tables=[table], pictures=[picture])],
        title="t",
    )
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert '<td class="short">20.48</td>' in page
    assert '<th scope="col" class="short">K = 10</th>' in page
    assert "<td>long " in page
    assert "min-width: min(900px, 520px)" in page
    assert ".short { white-space: nowrap; }" in page


def test_pictures_of_one_name_are_refused_before_anything_is_written(tmp_path):
    picture = Picture(name="p", image=noise(), caption="c")
    sections = [Section(title=title, pictures=[picture]) for title in "ab"]
    with pytest.raises(ValueError, match=r"picture names \['p'\] must each be used once"):
        write_report(tmp_path / "report.html", sections, title="t")
    assert list(tmp_path.iterdir()) == []


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match=r"row \['a'\] must have as many texts as the header"):
        Table(header=["", "x"], rows=[["a"]])


# --------------------------------------------------------------------------------------- plots


def test_a_missing_value_leaves_a_gap():
    def drawn(middle):
        curve = Curve(x=range(5), y=[0.0, 1.0, middle, 1.0, 0.0])
        return curve_pixels(line_plot([Panel(title="t", curves=[curve])], x_label="x"), BLUE)

    assert 0 < drawn(None) < 0.8 * drawn(1.0)


def test_curves_have_their_own_colours():
    curves = [Curve(x=[0, 1], y=[i, i], colour=i, label=str(i)) for i in (0, 1)]
    plot = line_plot([Panel(title="t", curves=curves)], x_label="x")
    assert curve_pixels(plot, BLUE) > 100
    assert curve_pixels(plot, ORANGE) > 100


def test_panels_fill_rows():
    panel = Panel(title="t", curves=[Curve(x=[0, 1], y=[0, 1])])
    one, three = (line_plot([panel] * num, x_label="x") for num in (1, 3))
    assert three.size == (2 * one.width, 2 * one.height)


def test_bars_are_as_high_as_their_values():
    full, half = (
        curve_pixels(bar_plot([p] * 4, title="t", x_label="x", y_range=(0.0, 1.0)), BLUE)
        for p in (1.0, 0.5)
    )
    assert half == pytest.approx(full / 2, rel=0.03)


def test_the_reference_is_drawn_only_when_there_is_one():
    plots = [
        bar_plot([0.2], title="t", x_label="x", y_range=(0.0, 1.0), reference=reference)
        for reference in (None, 0.5)
    ]
    counts = [curve_pixels(plot, ORANGE) for plot in plots]
    assert counts[0] == 0
    assert counts[1] > 100


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


def test_a_curve_of_nothing_finite_is_drawn_as_an_empty_panel(tmp_path):
    curve = Curve(x=[1, 2], y=[None, float("nan")])
    write_curves(tmp_path / "curves.png", [Panel(title="t", curves=[curve])])
    assert (tmp_path / "curves.png").is_file()


def test_what_cannot_be_drawn_is_said_with_what_to_install(tmp_path, monkeypatch, caplog):
    assert has_plots(tmp_path / "curves.png")
    assert caplog.text == ""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not has_plots(tmp_path / "curves.png")
    assert f"{tmp_path}/curves.png is written: drawing plots needs matplotlib" in caplog.text
