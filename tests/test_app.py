"""The web page: what stands behind each tab, each tab built and asked once by a stand-in for
gradio, and once by gradio itself where it is installed."""

import contextlib
import os
import socket
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq import app
from mergevq.checkpoint import tokens_hash
from mergevq.config import TokenizerConfig
from mergevq.config_generator import GeneratorConfig
from mergevq.data import to_tensor
from mergevq.decoding import load_picture
from mergevq.generation import load_pair
from mergevq.generator import Generator
from mergevq.images import open_images
from mergevq.tokenizer import Tokenizer

CPU = torch.device("cpu")


class Component(contextlib.nullcontext):
    """Stands for any part of a page: remembers what it was made with and what it calls."""

    def __init__(self, page, kind, values, settings):
        super().__init__(self)
        self.page, self.kind, self.values, self.settings = page, kind, values, settings

    def _listen(self, function, inputs, outputs, api_name):
        if api_name:
            self.page.calls[api_name] = (function, inputs, outputs)

    click = release = _listen


class Page(ModuleType):
    """A `gradio` that only remembers what a page is made of."""

    class Error(Exception):
        """What a page shows when its input is wrong."""

    def __init__(self):
        super().__init__("gradio")
        self.components, self.calls = [], {}
        boxes, shown = ("Blocks", "Tab", "Row"), ("Markdown", "Image", "Gallery")
        for kind in (*boxes, *shown, "Button", "Dropdown", "Number", "Slider"):
            setattr(self, kind, self._maker(kind))

    def _maker(self, kind):
        def make(*values, **settings):
            self.components.append(Component(self, kind, values, settings))
            return self.components[-1]

        return make

    def of_kind(self, kind):
        return [component for component in self.components if component.kind == kind]

    def ask(self, api_name, *values):
        """Call what a button calls, with as many values as it has inputs."""
        function, inputs, outputs = self.calls[api_name]
        assert len(values) == len(inputs)
        answer = function(*values)
        assert not isinstance(outputs, list) or len(answer) == len(outputs)
        return answer


SMALL = TokenizerConfig(
    image_size=16,
    channels=8,
    channel_mult=(1, 1, 1),
    num_res_blocks=1,
    num_layers=2,
    num_heads=2,
    num_kept=6,
    num_bits=4,
    num_decoder_layers=1,
    num_decoder_heads=2,
    source_dim=16,
    num_source_layers=1,
    num_source_heads=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tokenizer, a generator of its tokens and eight pictures of two classes."""
    directory = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    Tokenizer(SMALL).eval().save_pretrained(directory / "tokenizer")
    generator = Generator(
        GeneratorConfig(
            order="merge",
            dim=32,
            num_layers=1,
            num_heads=2,
            ffn_dim=32,
            num_classes=2,
            grid_size=(4, 4),
            num_kept=6,
            kept_candidates=(6,),
            num_bits=4,
            factor_bits=(2, 2),
        )
    )
    generator.eval().save_pretrained(
        directory / "generator",
        tokenizer=tokens_hash(directory / "tokenizer"),
        class_names=["cat", "dog"],
    )
    colours = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    for number, pixels in enumerate(colours):
        place = directory / "pictures" / ("cat" if number < 4 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((16, 16)).save(place / f"{number}.png")
    return directory


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder / "tokenizer").eval()


def test_a_picture_comes_back_enlarged_with_its_numbers(tokenizer, folder):
    picture = load_picture(folder / "pictures" / "cat" / "0.png")
    shown = app.reconstruct(tokenizer, picture, 5)
    assert {shown.original.size, shown.merge_map.size, shown.given.size} == {(256, 256)}
    assert shown.original.resize((16, 16), Image.Resampling.NEAREST).tobytes() == (
        picture.tobytes()
    )
    assert shown.text.startswith("5 of 16 tokens. 20 bits of tokens")


def test_the_number_of_tokens_matters(tokenizer, folder):
    picture = load_picture(folder / "pictures" / "dog" / "5.png")
    few, all_of_them = (app.reconstruct(tokenizer, picture, k) for k in (4, 16))
    assert few.merge_map.tobytes() != all_of_them.merge_map.tobytes()


def test_what_is_wrong_is_said(tokenizer, folder):
    with pytest.raises(ValueError, match="no picture was given"):
        app.reconstruct(tokenizer, None, 6)
    neighbours = app.index(tokenizer, open_images(str(folder / "pictures")))
    picture = load_picture(folder / "pictures" / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"count \(9\) must be between 1 and the 8 images"):
        app.nearest(tokenizer, neighbours, picture, 9)
    pair = load_pair(folder / "generator", folder / "tokenizer", CPU)
    with pytest.raises(ValueError, match=r"class \(cow\) must be one of cat, dog"):
        app.draw(pair, "cow", 2.0, 1, 0)


def test_a_picture_is_its_own_nearest_neighbour(tokenizer, folder):
    neighbours = app.index(tokenizer, open_images(str(folder / "pictures")))
    for name, label in (("cat/2.png", "cat"), ("dog/6.png", "dog")):
        picture = load_picture(folder / "pictures" / name)
        found = app.nearest(tokenizer, neighbours, picture, 3)
        assert len(found) == 3
        assert found[0][1] == f"{label} 1.000"
        nearest = to_tensor(found[0][0].resize((16, 16), Image.Resampling.NEAREST))
        assert torch.equal(nearest, to_tensor(picture))


def test_samples_depend_on_class_and_seed(folder):
    pair = load_pair(folder / "generator", folder / "tokenizer", CPU)
    assert app.class_choices(pair) == ["cat", "dog"]
    first = [image.tobytes() for image in app.draw(pair, "dog", 2.0, 3, 0)]
    again = [image.tobytes() for image in app.draw(pair, "dog", 2.0, 3, 0)]
    other = [image.tobytes() for image in app.draw(pair, "dog", 2.0, 3, 1)]
    assert len(first) == 3
    assert first == again != other


def test_the_models_of_the_package_belong_together_and_draw_digits():
    pair = load_pair(app.TOY / "generator", app.TOY / "tokenizer", CPU)
    assert app.class_choices(pair) == list("0123456789")
    zero, one = (app.draw(pair, name, 2.0, 1, 0)[0].convert("L") for name in ("0", "1"))
    # A nought is dark in the middle, where a one is light.
    assert zero.getpixel((128, 128)) < 64
    assert one.getpixel((128, 128)) > 128


def test_the_page_needs_its_extra(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(RuntimeError, match=r'gradio, which is not .* pip install "gradio>=6" '):
        app.build_page(folder / "tokenizer", generator=None, data=None, device="cpu")


@pytest.fixture
def page(monkeypatch):
    """A page being made, on a machine without a network that would like to report."""
    stand_in = Page()
    monkeypatch.setitem(sys.modules, "gradio", stand_in)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.setattr(socket, "socket", None)
    return stand_in


def test_every_tab_is_built_and_answers(folder, page):
    app.build_page(
        folder / "tokenizer",
        generator=folder / "generator",
        data=str(folder / "pictures"),
        device="cpu",
    )
    tabs = [tab.values[0] for tab in page.of_kind("Tab")]
    assert tabs == ["Reconstruct", "Sample", "Neighbours"]
    assert set(page.calls) == {"reconstruct", "sample", "neighbours"}
    picture = load_picture(folder / "pictures" / "cat" / "0.png")
    *pictures, text = page.ask("reconstruct", picture, 5.0)
    assert {shown.size for shown in pictures} == {(256, 256)}
    assert text.startswith("5 of 16 tokens")
    assert len(page.ask("sample", "dog", 2, 3, 0)) == 3
    assert page.ask("sample", "all in turn", 1, 2, 0)[0].size == (256, 256)
    assert page.ask("neighbours", picture, 2)[0][1] == "cat 1.000"


def test_sliders_offer_what_is_legal(folder, page):
    app.build_page(
        folder / "tokenizer",
        generator=folder / "generator",
        data=str(folder / "pictures"),
        device="cpu",
    )
    sliders = {slider.settings["label"]: slider.values for slider in page.of_kind("Slider")}
    # Two layers leave at least 4 of 16 tokens; there are eight pictures.
    assert (sliders["tokens"], sliders["neighbours"]) == ((4, 16), (1, 8))
    (classes,) = page.of_kind("Dropdown")
    assert classes.values == (["all in turn", "cat", "dog"],)


def test_wrong_input_is_shown_on_the_page(folder, page):
    app.build_page(folder / "tokenizer", generator=None, data=None, device="cpu")
    assert set(page.calls) == {"reconstruct"}
    with pytest.raises(page.Error, match="no picture was given"):
        page.ask("reconstruct", None, 5)
    picture = load_picture(folder / "pictures" / "cat" / "0.png")
    with pytest.raises(page.Error, match="num_kept"):
        page.ask("reconstruct", picture, 3)


def test_the_page_reports_to_nobody(folder, page):
    app.build_page(folder / "tokenizer", generator=None, data=None, device="cpu")
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert page.of_kind("Blocks")[0].settings["analytics_enabled"] is False


def test_the_page_of_the_package_has_every_tab_and_knows_its_digits(page):
    pytest.importorskip("sklearn")
    app.build_page(None, generator=None, data=None, device="cpu")
    assert set(page.calls) == {"reconstruct", "sample", "neighbours"}
    picture = open_images("digits").read(0)
    found = page.ask("neighbours", picture, 8)
    assert found[0][1] == "0 1.000"
    assert {name.split()[0] for _, name in found} == {"0"}
    assert page.ask("reconstruct", picture, 20)[-1].startswith("20 of 64 tokens")
    assert len(page.ask("sample", "3", 2, 1, 0)) == 1


def test_without_scikit_learn_the_page_of_the_package_has_no_neighbours(page, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    app.build_page(None, generator=None, data=None, device="cpu")
    assert set(page.calls) == {"reconstruct", "sample"}
    assert "pip install matplotlib scikit-learn" in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_every_tab_answers(folder):
    pytest.importorskip("gradio", reason="the web page needs the demo extra")
    client = pytest.importorskip("gradio_client")
    page = app.build_page(
        folder / "tokenizer",
        generator=folder / "generator",
        data=str(folder / "pictures"),
        device="cpu",
    )
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, inbrowser=False)
    try:
        asked = client.Client(address, verbose=False)
        picture = client.handle_file(str(folder / "pictures" / "cat" / "0.png"))
        *pictures, text = asked.predict(picture, 5, api_name="/reconstruct")
        assert len(pictures) == 4
        assert text.startswith("5 of 16 tokens")
        samples = asked.predict("dog", 2, 3, 0, api_name="/sample")
        assert len(samples) == 3
        found = asked.predict(picture, 2, api_name="/neighbours")
        assert found[0]["caption"] == "cat 1.000"
        with pytest.raises(Exception, match="no picture was given"):
            asked.predict(None, 5, api_name="/reconstruct")
    finally:
        page.close()
