"""The documentation in a browser, on a desk and on a phone; slow, and only where one is."""

import functools
import http.server
import io
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.browser import WIDTHS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).resolve().parents[1]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Keep the terminal empty."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the built site; a link or a heading that is not there ends the build."""
    pytest.importorskip("material", reason="the site is built with mkdocs-material")
    pytest.importorskip("mkdocstrings", reason="the reference is made with mkdocstrings")
    folder = tmp_path_factory.mktemp("documentation") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def served(site):
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(params=WIDTHS)
def page(request, browser, served):
    """A page on which nothing comes from elsewhere, nothing is missing and no script fails."""
    page = browser.new_page(viewport={"width": WIDTHS[request.param], "height": 900})
    wrong = []
    page.on(
        "request", lambda each: each.url.startswith((served, "data:")) or wrong.append(each.url)
    )
    page.on("response", lambda each: each.status < 400 or wrong.append(each.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    page.close()
    assert wrong == []


def pages(site):
    """Addresses of all pages."""
    found = sorted(path.parent.relative_to(site) for path in site.rglob("index.html"))
    return ["" if str(path) == "." else f"{path}/" for path in found]


def shown(page):
    """The window as pixels."""
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)


def test_every_page_has_its_text_and_pictures_and_fits_the_width(page, served, site):
    found = pages(site)
    assert len(found) > 20
    for address in found:
        page.goto(f"{served}/{address}")
        assert page.locator("article h1").first.inner_text().strip(), address
        for picture in page.locator("article img").all():
            picture.scroll_into_view_if_needed()
            width = picture.evaluate("each => each.decode().then(() => each.naturalWidth)")
            assert width > 0, (address, picture.get_attribute("src"))
        # Tables and code scroll by themselves; the page does not.
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address


def test_a_word_is_searched_for_and_its_page_opened(page, served):
    page.goto(served)
    before = shown(page)
    opener = page.locator("label.md-header__button[for=__search]")
    (opener if opener.is_visible() else page.locator("input.md-search__input")).click()
    page.locator("input.md-search__input").fill("source map")
    result = page.locator("a.md-search-result__link").first
    result.wait_for()
    assert np.abs(shown(page) - before).mean() > 1
    result.click()
    page.wait_for_url(lambda url: url.rstrip("/") != served)
    assert "source" in page.locator("article").inner_text().lower()


def test_dark_is_dark(browser, served):
    levels = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(served)
        page.locator("article h1").first.wait_for()
        levels[scheme] = shown(page).mean()
        page.close()
    assert levels["dark"] < 128 < levels["light"]
