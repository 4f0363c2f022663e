"""The report as a file: complete in itself, well formed, and faithful to what it was given."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mergevq.report.page import Highlight, Picture, Section, Table, write_report

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
