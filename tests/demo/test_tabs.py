"""The tabs of the web page in a browser, on a desk and on a phone; slow, and only where one is."""

import hashlib
import io
import logging
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergevq.demo import app, draw_tabs
from tests.support.browser import WIDTHS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PATIENCE = 60_000
"""Milliseconds that an answer may take."""


@pytest.fixture(scope="module")
def served(folder):
    """A page with all tabs, of which the terminal stays empty."""
    pytest.importorskip("gradio", reason="the web page needs the demo extra")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with app.serve(
        folder / "tokenizer",
        generator=(folder / "merge", folder / "random"),
        data=str(folder / "pictures"),
        device="cpu",
        port=port,
    ) as page:
        yield page.local_url


@pytest.fixture(params=WIDTHS)
def page(request, browser, served):
    """The page when its first answer is there; nothing may come from elsewhere."""
    page = browser.new_page(viewport={"width": WIDTHS[request.param], "height": 900})
    page.set_default_timeout(PATIENCE)
    elsewhere = []
    page.on("request", lambda each: elsewhere.append(each.url))
    page.goto(served)
    page.locator(".merge-map svg").wait_for()
    yield page
    page.close()
    assert [url for url in elsewhere if not url.startswith((served, "data:", "blob:"))] == []


def tab(page, name):
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel").and_(page.locator(":visible"))


def pixels(locator):
    """The pixels that are seen, as an array; a picture may be replaced while it is taken."""
    playwright = pytest.importorskip("playwright.sync_api")
    end = time.monotonic() + PATIENCE / 1000
    while True:
        try:
            taken = locator.screenshot()
        except playwright.Error as error:
            if "not attached" not in str(error) or time.monotonic() > end:
                raise
            continue
        return np.asarray(Image.open(io.BytesIO(taken)).convert("RGB"), dtype=int)


def until(holds, seconds=60):
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.1)


def settled(locator):
    """The pixels that are seen once they stay the same."""
    before = pixels(locator)
    while True:
        time.sleep(0.4)
        after = pixels(locator)
        if before.shape == after.shape and np.array_equal(before, after):
            return after
        before = after


def drop(panel, path):
    panel.locator(".dropped input[type=file]").first.set_input_files(str(path))


def clear(panel):
    panel.get_by_label("Clear").or_(panel.get_by_label("Remove Image")).first.click()


def image_of(panel, label):
    return panel.locator(".still", has_text=label).locator("img")


def fits(page):
    """Whether nothing has to be scrolled to the side for."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def set_slider(panel, label, value):
    panel.get_by_label(re.compile(f"number input for {label}", re.IGNORECASE)).first.fill(
        str(value)
    )


def test_tokens_come_at_once_and_the_last_value_of_the_slider_stays(page, folder):
    panel = tab(page, "Tokens")
    assert fits(page)
    sizes = {
        tuple(round(panel_image.bounding_box()[side]) for side in ("width", "height"))
        for panel_image in panel.locator(".still img").all()
    }
    drawn = panel.locator(".merge-map svg").bounding_box()
    sizes.add((round(drawn["width"]), round(drawn["height"])))
    # One scale, but for a rounded pixel.
    assert np.ptp(list(sizes)) <= 1
    before = settled(image_of(panel, "given source"))
    clear(panel)
    drop(panel, folder / "pictures" / "dog" / "6.png")
    until(lambda: not np.array_equal(pixels(image_of(panel, "given source")), before))
    for value in (4, 16, 5, 15, 7, 12, 9, 6, 14, 8):
        set_slider(panel, "tokens", value)
    panel.get_by_text("8 of 16 tokens").wait_for()
    time.sleep(2)
    assert panel.get_by_text("8 of 16 tokens").count() == 1
    # The page scrolled: a pointer that lies on the map names a group there.
    page.mouse.move(0, 0)
    assert "8 groups of 16 cells" in panel.locator(".merge-map output").inner_text()
    with page.expect_download() as download:
        panel.get_by_text("Download the tokens").click()
    assert download.value.suggested_filename == "picture_8.mvq"
    assert Path(download.value.path()).read_bytes()[1:4] == b"MVQ"


def test_a_group_is_highlighted_and_named_by_pointer_and_by_key(page):
    panel = tab(page, "Tokens")
    svg, said = panel.locator(".merge-map svg"), panel.locator(".merge-map output")
    svg.scroll_into_view_if_needed()
    plain, words = settled(svg), said.inner_text()
    # The group that opens first has the cell in the corner.
    svg.locator(".group").first.hover(position={"x": 5, "y": 5})
    assert re.match(r"Group 1 of 6: \d+ cells? became one token", said.inner_text())
    assert not np.array_equal(settled(svg), plain)
    page.mouse.move(1, 1)
    until(lambda: said.inner_text() == words)
    svg.focus()
    for number in (1, 2):
        page.keyboard.press("ArrowRight")
        assert said.inner_text().startswith(f"Group {number} of 6")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert said.inner_text().startswith("Group 6 of 6")
    page.keyboard.press("Escape")
    assert said.inner_text() == words


def test_a_wrong_file_is_one_sentence_and_nothing_in_the_terminal(
    page, folder, tmp_path, capfd, caplog
):
    panel = tab(page, "Tokens")
    (tmp_path / "words.png").write_text("no picture", encoding="utf-8")
    capfd.readouterr()
    clear(panel)
    drop(panel, tmp_path / "words.png")
    said = page.get_by_text("image words.png cannot be read")
    said.first.wait_for()
    assert said.count() == 1
    assert page.get_by_text("no picture was given").count() == 0
    # Nothing of the picture before stays beside the sentence.
    until(lambda: panel.locator(".still img").count() == 0)
    assert panel.get_by_text("tokens. ").count() == 0
    assert "Traceback" not in page.content()
    assert capfd.readouterr() == ("", "")
    assert [each for each in caplog.records if each.levelno >= logging.ERROR] == []
    # And the page goes on.
    clear(panel)
    drop(panel, folder / "pictures" / "cat" / "2.png")
    set_slider(panel, "tokens", 11)
    panel.get_by_text("11 of 16 tokens").wait_for()


def sources(panel):
    """Addresses of the pictures in galleries."""
    return [each.get_attribute("src") for each in panel.locator(".pictures img").all()]


def test_pictures_are_generated_step_by_step_in_two_orders(page, monkeypatch):
    draw = draw_tabs.draw

    def slowly(*values):
        for pictures in draw(*values):
            time.sleep(0.3)
            yield pictures

    monkeypatch.setattr(draw_tabs, "draw", slowly)
    panel = tab(page, "Generate")
    assert fits(page)
    set_slider(panel, "pictures", 2)
    panel.get_by_role("button", name="Generate").click()
    seen = set()

    def several():
        seen.add(hashlib.sha256("".join(map(str, sources(panel))).encode()).hexdigest())
        return len(seen) > 5

    until(several)
    until(lambda: len(sources(panel)) == 4)
    for order in ("merge", "random"):
        assert panel.get_by_text(f"order '{order}'").count() == 1
    assert fits(page)


def test_a_compressed_cache_is_seen_beside_a_full_one(page):
    panel = tab(page, "Generate")
    set_slider(panel, "pictures", 2)
    panel.get_by_role("button", name="Compare caches").click()
    panel.get_by_text("2 of 2 pictures are the same").wait_for()

    def drawn():
        return [page.request.get(each).body() for each in sources(panel)]

    # Galleries show one look after the other, not always both the same.
    until(lambda: len(found := drawn()) == 4 and found[:2] == found[2:])
    first, second, *_ = drawn()
    assert first != second
    assert fits(page)


def test_a_generation_can_be_stopped(page, monkeypatch):
    draw, shown = draw_tabs.draw, []

    def slowly(*values):
        for pictures in draw(*values):
            shown.append(len(pictures))
            time.sleep(0.5)
            yield pictures

    monkeypatch.setattr(draw_tabs, "draw", slowly)
    panel = tab(page, "Generate")
    panel.get_by_role("button", name="Generate").click()
    until(lambda: len(shown) >= 2)
    panel.get_by_role("button", name="Stop", exact=True).click()
    time.sleep(2)
    stopped = len(shown)
    time.sleep(2)
    # Six looks of one order and eight of the other make 14.
    assert len(shown) == stopped < 13


def test_the_painted_part_is_made_anew(page):
    panel = tab(page, "Edit")
    assert fits(page)
    panel.get_by_role("button", name="Make anew").click()
    page.get_by_text("the mask leaves all tokens").first.wait_for()
    canvas = panel.locator(".editor canvas").first
    canvas.scroll_into_view_if_needed()
    settled(canvas)
    box = canvas.bounding_box()
    left, top = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(left - 40, top)
    page.mouse.down()
    page.mouse.move(left + 40, top, steps=10)
    page.mouse.up()
    set_slider(panel, "pictures", 2)
    panel.get_by_role("button", name="Make anew").click()
    until(lambda: len(sources(panel)) == 2)
    before = sources(panel)
    panel.get_by_label("seed").fill("7")
    panel.get_by_role("button", name="Make anew").click()
    until(lambda: len(sources(panel)) == 2 and sources(panel) != before)


def test_like_pictures_are_found(page, folder):
    panel = tab(page, "Search")
    clear(panel)
    drop(panel, folder / "pictures" / "dog" / "6.png")
    set_slider(panel, "neighbours", 3)
    panel.get_by_role("button", name="Find").click()
    until(lambda: len(sources(panel)) == 3)
    panel.get_by_text("dog 1.000").first.wait_for()
    assert fits(page)


def test_two_numbers_of_tokens_are_laid_over_each_other(page, folder):
    panel = tab(page, "Compare")
    assert fits(page)
    swipe = panel.locator(".swipe")
    panel.get_by_text("Left: 4 of 16 tokens").wait_for()
    before = settled(swipe)
    set_slider(panel, "tokens on the left", 16)
    panel.get_by_text("Left: 16 of 16 tokens").wait_for()
    until(lambda: not np.array_equal(pixels(swipe), before))
    before = settled(swipe)
    panel.locator(".specimens button").nth(1).click()
    until(lambda: not np.array_equal(pixels(swipe), before))


def test_every_control_has_a_label_and_dark_is_dark(browser, served):
    page = browser.new_page(color_scheme="dark", viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.goto(served)
    page.locator(".merge-map svg").wait_for()
    assert pixels(page.locator("body"))[:40, :40].mean() < 64
    for name in ("Tokens", "Generate", "Edit", "Search", "Compare"):
        panel = tab(page, name)
        for control in panel.locator("input:visible, select:visible, [role=slider]:visible").all():
            named = control.evaluate(
                "(e) => e.ariaLabel || e.labels?.[0]?.innerText || e.closest('label')?.innerText"
                " || document.getElementById(e.getAttribute('aria-labelledby'))?.innerText"
            )
            assert named, control.evaluate("(e) => e.outerHTML")
    page.close()
