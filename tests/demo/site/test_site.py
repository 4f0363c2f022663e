"""The exported page, in a real browser where one is found."""

import base64
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergevq.config.recipes.digits import digits32
from mergevq.data.prepare import to_tensor
from mergevq.demo.site import site
from mergevq.demo.site.site import PAGE, RUNTIME_FILES, RUNTIME_VERSION, write_site
from mergevq.metrics.image import psnr
from mergevq.runtime.environment import bundled_model
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.evaluations import write_tokenizer
from tests.support.export import export, size_of
from tests.support.leaves import replaced
from tests.support.small import shrink

COUNTS = (12, 20, 32)


def write_runtime(folder, version=RUNTIME_VERSION):
    folder.mkdir()
    for name in RUNTIME_FILES:
        (folder / name).write_text(f"/*!\n * ONNX Runtime Web v{version}\n */\n")
    return folder


def test_a_folder_without_the_runtime_is_refused_by_the_names_that_it_lacks(tmp_path):
    runtime = write_runtime(tmp_path / "runtime")
    (runtime / RUNTIME_FILES[2]).unlink()
    with pytest.raises(ValueError, match=r"lacks ort-wasm-simd-threaded\.wasm; give the folder"):
        write_site("digits32", tmp_path / "site", runtime=runtime)
    assert not (tmp_path / "site").exists()


def test_a_runtime_of_another_version_is_refused_by_both_numbers(tmp_path):
    runtime = write_runtime(tmp_path / "runtime", "1.17.0")
    with pytest.raises(ValueError, match=rf"version 1\.17\.0 and must be {RUNTIME_VERSION}"):
        write_site("digits32", tmp_path / "site", runtime=runtime)


def test_without_npm_there_is_another_way(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"npm, which is not installed; .* --runtime FOLDER"):
        write_site("digits32", tmp_path / "site")


def test_an_error_of_npm_is_one_line(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "npm error code ENOTFOUND\nnpm error more\n")
    monkeypatch.setattr(shutil, "which", lambda _: "npm")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"\(npm error code ENOTFOUND\); give the folder"):
        write_site("digits32", tmp_path / "site")


def test_a_package_with_other_bytes_is_refused(tmp_path, monkeypatch):
    def pack(command, cwd, **_):
        (cwd / "a.tgz").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, json.dumps([{"filename": "a.tgz"}]), "")

    monkeypatch.setattr(shutil, "which", lambda _: "npm")
    monkeypatch.setattr(subprocess, "run", pack)
    with pytest.raises(RuntimeError, match=r"has the SHA-512 .* and must have .*another file"):
        write_site("digits32", tmp_path / "site")


def test_the_files_of_the_runtime_come_out_of_the_package_and_no_others(tmp_path, monkeypatch):
    source, folder = write_runtime(tmp_path / "dist"), tmp_path / "out"
    (source / "ort.webgpu.mjs").write_text("large")
    folder.mkdir()
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        archive.add(source, "package/dist")
    digest = hashlib.sha512((tmp_path / "a.tgz").read_bytes()).digest()
    monkeypatch.setattr(site, "RUNTIME_INTEGRITY", base64.b64encode(digest).decode())
    monkeypatch.setattr(shutil, "which", lambda _: "npm")
    fetched = json.dumps([{"filename": str(tmp_path / "a.tgz")}])
    done = subprocess.CompletedProcess([], 0, fetched, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    site._place_runtime(folder, None)
    assert {path.name for path in folder.iterdir()} == set(RUNTIME_FILES)


def test_a_model_without_source_maps_has_no_page(tmp_path):
    config = replaced(shrink(digits32()), {"model.reducer.kind": "queries"}).model
    model = write_tokenizer(tmp_path / "model", config)
    with pytest.raises(ValueError, match=r"reducer\.kind \(queries\) must be merge"):
        write_site(str(model), tmp_path / "site", runtime=tmp_path)


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds other files"):
        write_site("digits32", tmp_path, runtime=tmp_path)


def test_the_page_asks_no_other_place_for_anything():
    folder = Path(site.__file__).parent
    for name in PAGE:
        text = (folder / name).read_text(encoding="utf-8")
        assert "://" not in text
    assert "default-src 'self'" in (folder / "index.html").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------- a real browser


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Address of a site of the bundled digits, on a plain server."""
    if shutil.which("npm") is None:
        pytest.skip("no npm to fetch onnxruntime-web with")
    folder = tmp_path_factory.mktemp("web") / "site"
    counts = ",".join(map(str, COUNTS))
    written = export("web", "digits32", "--out", folder, "--num-kept", counts)
    if "npm could not fetch" in written.stderr:
        pytest.skip(written.stderr)
    assert written.returncode == 0, written.stderr
    assert size_of(folder) < 40e6
    weights = bundled_model("digits32") / "model.safetensors"
    assert size_of(folder / "model") < 2.5 * weights.stat().st_size
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    server = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}/"
    for _ in range(100):
        try:
            urllib.request.urlopen(address).close()
            break
        except OSError:
            time.sleep(0.1)
    yield address
    server.terminate()
    server.wait()


def digit_picture(path):
    """A picture of the model's size, so that a browser has nothing to resize."""
    noise = np.random.default_rng(0)
    coarse = Image.fromarray(noise.integers(0, 256, (6, 6, 3), np.uint8))
    coarse.resize((32, 32), Image.Resampling.BICUBIC).save(path)
    return path


def shown(page, name):
    return page.evaluate(f"document.getElementById('{name}').toDataURL()")


def wait_for(page, kept):
    # The page's policy forbids what `wait_for_function` would evaluate.
    page.locator("#status", has_text=f"Done: {kept} of").wait_for(timeout=120_000)


def saved_tokens(page):
    with page.expect_download() as download:
        page.click("#save")
    with open(download.value.path(), encoding="utf-8") as file:
        return json.load(file)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_a_browser_gives_the_tokens_of_the_library(served, browser, tmp_path, width, height):
    page = browser.new_page(viewport={"width": width, "height": height})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served)
    wait_for(page, 20)
    before = shown(page, "map")
    picture = digit_picture(tmp_path / "picture.png")
    page.set_input_files("#file", picture)
    for _ in range(100):
        if shown(page, "map") != before:
            break
        page.wait_for_timeout(100)
    wait_for(page, 20)
    tokenizer = Tokenizer.from_pretrained("digits32", precision="float32")
    image = to_tensor(Image.open(picture))[None]
    pictures = []
    for place, kept in enumerate(COUNTS):
        page.fill("#kept", str(place))
        wait_for(page, kept)
        found = saved_tokens(page)
        encoded = tokenizer.encode(image, kept)
        assert found["indices"] == encoded.indices[0].tolist()
        assert found["source"] == encoded.source.index[0].tolist()
        inferred = tokenizer.recover(encoded.indices)
        assert found["recovered"] == inferred.index[0].tolist()
        for name, layout in (("given", encoded.layout), ("recovered", inferred)):
            wanted = float(psnr(image, tokenizer.decode(encoded.indices, layout))[0])
            text = page.text_content(f"#psnr-{name}")
            assert float(text.removesuffix(" dB")) == pytest.approx(wanted, abs=0.02)
        pictures.append((shown(page, "map"), shown(page, "given")))
    assert len(set(pictures)) == len(COUNTS)
    page.hover("#map", position={"x": 5, "y": 5})
    size = found["source"].count(0)
    cells = f"{size} cell" if size == 1 else f"{size} cells"
    assert page.text_content("#group") == f"token 1 of {kept}: {cells}"
    assert shown(page, "map") != pictures[-1][0]
    page.focus("#map")
    page.keyboard.press("ArrowDown")
    assert page.text_content("#group").startswith("token ")
    wrong = tmp_path / "notes.txt"
    wrong.write_text("no picture")
    page.set_input_files("#file", wrong)
    page.wait_for_selector("#problem:not([hidden])")
    problem = page.text_content("#problem")
    assert problem == (
        "notes.txt is not a picture that this browser can read; choose a PNG, JPEG or WebP file."
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert {url for url in asked if not url.startswith((served, "data:", "blob:"))} == set()
    assert said == []
    page.close()
