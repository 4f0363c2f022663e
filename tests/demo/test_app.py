"""The web page itself, asked by a real client."""

import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergevq.cli.main import main
from mergevq.data.images import open_images
from mergevq.data.prepare import load_picture
from mergevq.demo import app, tabs
from mergevq.demo.neighbours import index, nearest
from mergevq.runtime.environment import bundled_model
from mergevq.tokenizer.codec import reconstruct_image
from mergevq.tokenizer.tokenizer import Tokenizer

# Gradio's own warnings are not ours to mend.
PAGE = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def _left_open():
    """Collect the sockets and loops that gradio leaves open; elsewhere they count as errors."""
    yield
    with warnings.catch_warnings(action="ignore"):
        gc.collect()


def test_the_page_needs_its_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(RuntimeError, match=r'gradio, which is not .* pip install "gradio>=6" '):
        app.build_page(folder / "tokenizer", device="cpu", folder=tmp_path)


def test_the_largest_picture_of_the_data_can_be_chosen(folder, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the web page needs the demo extra")
    opened = []

    def seen(path, **kwargs):
        opened.append((path, kwargs))
        raise ValueError("far enough")

    monkeypatch.setattr(app, "open_images", seen)
    arguments = ["demo", "--model", str(folder / "tokenizer"), "--data", "pictures"]
    port = ["--port", str(free_port())]
    for more in (["--max-pixels", "1234"], []):
        with pytest.raises(ValueError, match="far enough"):
            main([*arguments, *port, *more])
    assert opened == [("pictures", {"max_pixels": n}) for n in (1234, 89_478_485)]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def serving(tokenizer, *, generator=(), data=None):
    """A page and a client for it."""
    with app.serve(
        tokenizer, generator=generator, data=data, device="cpu", port=free_port()
    ) as page:
        yield page, client_of(page)


def client_of(page):
    client = pytest.importorskip("gradio_client")
    return client.Client(page.local_url, verbose=False, analytics_enabled=False)


@pytest.fixture(scope="module")
def served(folder):
    """A page of three tabs, where the environment would have it open to all and report."""
    pytest.importorskip("gradio", reason="the web page needs the demo extra")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
        patch.setenv("GRADIO_ALLOWED_PATHS", "/")
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
        with serving(
            folder / "tokenizer",
            generator=(folder / "merge", folder / "random"),
            data=str(folder / "pictures"),
        ) as (page, client):
            yield page, client
        assert os.environ["GRADIO_SERVER_NAME"] == "0.0.0.0"
        assert "GRADIO_TEMP_DIR" not in os.environ


@pytest.fixture
def client(served):
    return served[1]


def uploaded(path):
    """A file as a client sends it."""
    return pytest.importorskip("gradio_client").handle_file(str(path))


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size, image.convert("RGB").tobytes()


@PAGE
@pytest.mark.slow
def test_every_tab_answers(client, folder):
    picture = uploaded(folder / "pictures" / "cat" / "0.png")
    *pictures, drawing, text, times, _ = client.predict(picture, 5, api_name="/reconstruct")
    assert [pixels(path)[0] for path in pictures] == [(256, 256)] * 4
    assert text.startswith("5 of 16 tokens")
    assert "5 groups of 16 cells" in drawing
    assert "ms" in times
    both = client.predict("dog", 2, 3, 0, api_name="/sample")
    for samples in both:
        assert [pixels(sample["image"])[0] for sample in samples] == [(256, 256)] * 3
    both = client.predict("all in turn", 1, 2, 0, api_name="/sample")
    assert [len(samples) for samples in both] == [2, 2]
    *both, text = client.predict("cat", 2, 3, 0, api_name="/caches")
    assert [len(samples) for samples in both] == [3, 3]
    assert "3 of 3 pictures are the same" in text
    (left, right), text = client.predict(picture, 4, 16, api_name="/compare")
    assert pixels(left) != pixels(right)
    assert text.startswith("Left: 4 of 16 tokens, 43 bits")
    found = client.predict(picture, 2, api_name="/neighbours")
    assert found[0]["caption"] == "cat 1.000"


def shaded(size):
    """Pixels of every channel that differ everywhere."""
    width, height = size
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(noise).resize((4 * width, 4 * height), Image.Resampling.BICUBIC)


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    shaded((8, 5)).convert("RGB").save(path, exif=exif)


def sixteen_bits(path):
    grey = np.asarray(shaded((6, 6)).convert("L")).astype(np.uint16)
    Image.fromarray(grey * 200 + 77).save(path)


def transparent_palette(path):
    shaded((6, 6)).convert("RGB").quantize(8).save(path, transparency=3)


KINDS = {
    "transparent.png": lambda path: shaded((6, 6)).save(path),
    "grey-transparent.png": lambda path: shaded((6, 6)).convert("LA").save(path),
    "palette.png": transparent_palette,
    "palette.gif": transparent_palette,
    "sixteen.png": sixteen_bits,
    "sixteen.tif": sixteen_bits,
    "rotated.jpg": rotated,
    "print.jpg": lambda path: shaded((6, 6)).convert("CMYK").save(path),
    "black-and-white.png": lambda path: shaded((6, 6)).convert("1").save(path),
    "plain.webp": lambda path: shaded((7, 6)).save(path, lossless=True),
}


@PAGE
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, name in enumerate(KINDS)],
)
def test_the_page_sees_the_pixels_that_the_command_line_sees(
    client, tokenizer, folder, tmp_path, name
):
    KINDS[name](tmp_path / name)
    picture = load_picture(tmp_path / name)
    wanted = reconstruct_image(tokenizer, picture, 5, size_policy="resize")
    *shown, _, _, text, _, _ = client.predict(uploaded(tmp_path / name), 5, api_name="/reconstruct")
    expected = (wanted.original, wanted.given, wanted.recovered)
    for path, image in zip(shown, expected, strict=True):
        factor = 256 // max(image.size)
        large = image.resize(
            (factor * image.width, factor * image.height), Image.Resampling.NEAREST
        )
        assert pixels(path) == (large.size, large.tobytes())
    assert f"PSNR {wanted.psnr_given:.2f} dB" in text
    neighbours = index(tokenizer, open_images(str(folder / "pictures")))
    found = client.predict(uploaded(tmp_path / name), 8, api_name="/neighbours")
    assert [entry["caption"] for entry in found] == [
        caption for _, caption in nearest(tokenizer, neighbours, picture, 8)
    ]


@PAGE
def test_the_slider_does_not_run_the_stem_again(client, folder, monkeypatch):
    calls, embed = [], Tokenizer.embed

    def counting(tokenizer, image):
        calls.append(1)
        return embed(tokenizer, image)

    monkeypatch.setattr(Tokenizer, "embed", counting)
    picture = uploaded(folder / "pictures" / "dog" / "6.png")
    shown = [client.predict(picture, k, api_name="/reconstruct") for k in (5, 9, 16)]
    assert len(calls) == 1
    assert len({one[4] for one in shown}) == 3


@PAGE
def test_wrong_input_is_shown_on_the_page(client, folder, tmp_path):
    with pytest.raises(Exception, match="no picture was given"):
        client.predict(None, 2, api_name="/neighbours")
    # A picture that was taken away takes its answer with it.
    assert client.predict(None, 5, api_name="/reconstruct")[:7] == (*[None] * 4, "", "", "")
    picture = uploaded(folder / "pictures" / "cat" / "0.png")
    with pytest.raises(Exception, match="3 is less than minimum value 4"):
        client.predict(picture, 3, api_name="/reconstruct")
    # Words, a program for a printer, and more pixels than any command reads.
    (tmp_path / "words.png").write_text("no picture", encoding="utf-8")
    shaded((6, 6)).convert("RGB").save(tmp_path / "program.png", format="EPS")
    Image.new("1", (10_000, 9_000)).save(tmp_path / "vast.png")
    for tab, number in (("/reconstruct", 5), ("/neighbours", 2)):
        for name, problem in (
            ("words", "no image format"),
            ("program", "no image format"),
            ("vast", "10,000 x 9,000 are 90,000,000 pixels"),
        ):
            with pytest.raises(Exception, match=rf"image {name}\.png cannot be read: {problem}"):
                client.predict(uploaded(tmp_path / f"{name}.png"), number, api_name=tab)


@PAGE
def test_the_page_is_of_this_machine_whatever_the_environment_says(served):
    page, client = served
    httpx = pytest.importorskip("httpx")
    assert (page.server_name, page.share, page.allowed_paths) == ("127.0.0.1", False, [])
    for host, status in (("127.0.0.1:1", 200), ("localhost", 200), ("elsewhere.org", 400)):
        assert httpx.get(client.src, headers={"host": host}).status_code == status
    assert page.analytics_enabled is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    buttons = [block.buttons for block in page.blocks.values() if hasattr(block, "columns")]
    assert buttons
    assert not any("share" in each for each in buttons)


@PAGE
def test_a_file_that_is_too_large_is_not_kept(served, tmp_path):
    _, client = served
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(app._MAX_FILE_SIZE + 1)
    with pytest.raises(Exception, match=r"413|exceed"):
        client.predict(uploaded(tmp_path / "large.png"), 5, api_name="/reconstruct")
    kept = [path for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 2**20 for path in kept)


@PAGE
def test_pictures_lie_in_a_private_folder_and_end_with_the_page(folder):
    with serving(folder / "tokenizer") as (page, client):
        place = Path(os.environ["GRADIO_TEMP_DIR"])
        assert place.stat().st_mode & 0o777 == 0o700
        before = {path for path in place.rglob("*") if path.is_file()}
        client.predict(uploaded(folder / "pictures" / "dog" / "5.png"), 5, api_name="/reconstruct")
        kept = {path for path in place.rglob("*") if path.is_file()} - before
        # Four pictures, the tokens, and the picture that was sent; gradio deletes those it knows.
        assert len(kept) == 6
        assert kept <= {Path(path) for known in page.temp_file_sets for path in known}
        assert page.delete_cache == (60, 3600)
    assert not place.exists()


@PAGE
def test_more_requests_than_may_wait_are_turned_away(folder, monkeypatch):
    """And the others are answered."""
    asked, go_on = threading.Event(), threading.Event()
    answer = tabs.show

    def slow(*values):
        asked.set()
        assert go_on.wait(60)
        return answer(*values)

    monkeypatch.setattr(tabs, "show", slow)
    monkeypatch.setattr(app, "_MAX_WAITING", 2)
    with serving(folder / "tokenizer") as (_, client):
        picture = uploaded(folder / "pictures" / "dog" / "5.png")
        client.submit(picture, 5, api_name="/reconstruct")
        assert asked.wait(60)
        others = [client.submit(picture, 5, api_name="/reconstruct") for _ in range(4)]
        deadline = time.monotonic() + 60
        while sum(job.done() for job in others) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        go_on.set()
        refused = [error for job in others if (error := job.exception(timeout=60)) is not None]
    assert len(refused) == 2
    assert "queue is full" in str(refused[0]).lower()


@PAGE
@pytest.mark.slow
@pytest.mark.parametrize("number", [10, 500])
def test_many_at_once_get_the_answers_that_one_alone_gets(served, folder, number):
    page, client = served
    files = [uploaded(path) for path in sorted((folder / "pictures").rglob("*.png"))[::4]]
    asks = [((file, kept), "/reconstruct") for file in files for kept in (4, 9)]
    asks += [(("dog", 2, 2, seed), "/sample") for seed in range(2)]
    asks += [((file, 3), "/neighbours") for file in files]
    num_clients = min(number // 3, 12)

    def answer(asking, ask):
        values, tab = ask
        shown = asking.predict(*values, api_name=tab)
        if tab == "/reconstruct":
            return [pixels(path) for path in shown[:4]], shown[4:6]
        shown = [each for shelf in shown for each in (shelf if tab == "/sample" else [shelf])]
        pictures = [each["image"] for each in shown]
        words = [each["caption"] for each in shown]
        return [pixels(path) for path in pictures], words

    alone = [answer(client, ask) for ask in asks]
    clients = [client_of(page) for _ in range(num_clients)]
    with ThreadPoolExecutor(max_workers=num_clients) as pool:
        # Neighbours in time ask the same thing of the same function.
        order = [ask // 2 % len(asks) for ask in range(number)]
        jobs = [
            pool.submit(answer, clients[turn % num_clients], asks[ask])
            for turn, ask in enumerate(order)
        ]
        for ask, job in zip(order, jobs, strict=True):
            assert job.result(timeout=600) == alone[ask]


@PAGE
def test_sliders_offer_what_is_legal(served):
    page, _ = served
    components = page.blocks.values()
    sliders = {
        block.label: (block.minimum, block.maximum)
        for block in components
        if type(block).__name__ == "Slider"
    }
    # Two layers leave at least 4 of 16 tokens; there are eight pictures.
    assert (sliders["tokens"], sliders["neighbours"]) == ((4, 16), (1, 8))
    classes, _ = (block for block in components if type(block).__name__ == "Dropdown")
    assert [name for name, _ in classes.choices] == ["all in turn", "cat", "dog"]


@pytest.mark.slow
@PAGE
def test_the_page_of_the_package_has_every_tab_and_knows_its_digits(tmp_path):
    pytest.importorskip("sklearn")
    open_images("digits").read(0).save(tmp_path / "digit.png")
    with serving("digits32", generator=("digits32_ar",), data="digits") as (_, client):
        found = client.predict(uploaded(tmp_path / "digit.png"), 8, api_name="/neighbours")
        assert found[0]["caption"] == "0 1.000"
        assert {entry["caption"].split()[0] for entry in found} == {"0"}
        shown = client.predict(uploaded(tmp_path / "digit.png"), 20, api_name="/reconstruct")
        assert shown[5].startswith("20 of 64 tokens")
        assert len(client.predict("3", 2, 1, 0, api_name="/sample")) == 1


@PAGE
def test_without_a_model_the_page_has_those_of_the_package(tmp_path):
    pytest.importorskip("gradio", reason="the web page needs the demo extra")
    page = app.build_page(None, device="cpu", folder=tmp_path)
    names = [block.label for block in page.blocks.values() if type(block).__name__ == "Tab"]
    assert names == ["Tokens", "Generate", "Edit", "Compare"]


def test_a_model_says_what_it_has_seen(folder, tmp_path):
    assert app.seen(bundled_model("digits32")) == "Tokenizer of handwritten digits, 32 pixels"
    assert app.seen(folder / "tokenizer") == "trained on pictures that its record does not name"
    place = tmp_path / "model"
    shutil.copytree(folder / "tokenizer", place)
    record = json.loads((place / "config.json").read_text())
    record["extra"] = {"made_from": {"num_images": 1797, "class_names": ["a", "b"]}}
    (place / "config.json").write_text(json.dumps(record))
    assert app.seen(place) == "trained on 1,797 images of 2 classes"
    # A stranger's card must be words, not a picture from elsewhere.
    (place / "README.md").write_text("# Cats ![x](http://elsewhere.org/x.png) <b>\nmore\n")
    assert app.seen(place) == "Cats x(http:elsewhere.orgx.png) b"


@PAGE
def test_a_tab_says_which_generator_it_needs(folder, tmp_path):
    pytest.importorskip("gradio", reason="the web page needs the demo extra")
    page = app.build_page(
        folder / "tokenizer",
        generator=(folder / "merge",),
        compare="digits32",
        device="cpu",
        folder=tmp_path,
    )
    said = [block.value for block in page.blocks.values() if type(block).__name__ == "Markdown"]
    assert any("by a generator of order `random`" in f"{text}" for text in said)
    labels = [getattr(block, "label", None) for block in page.blocks.values()]
    assert "tokens on the right, of the model to compare with" in labels


def test_a_port_that_cannot_be_had_is_said_before_anything_is_loaded(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ValueError, match=rf"port \({port}\) cannot be had \(.*\); try another"),
            app.serve(folder / "no such", device="cpu", port=port),
        ):
            pass
    with (
        pytest.raises(ValueError, match=r"port \(65536\) must be between 1 and 65535"),
        app.serve(None, device="cpu", port=65536),
    ):
        pass


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end_and_leaves_nothing(tmp_path):
    pytest.importorskip("gradio", reason="the web page needs the demo extra")
    port = free_port()
    command = [sys.executable, "-m", "mergevq", "demo", "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line == f"page: http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
        assert len(list(tmp_path.glob("mergevq-*"))) == 1
        process.terminate()
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert list(tmp_path.glob("mergevq-*")) == []
