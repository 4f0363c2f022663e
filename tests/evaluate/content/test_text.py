"""Readings are scored by their definitions, beside a ceiling and a floor."""

import json
import sys

import pytest
import torch

from mergevq.cli.main import main
from mergevq.cli.tables import text_table
from mergevq.config.evaluation import Reconstructor, TextSettings
from mergevq.config.records import TextRecord
from mergevq.data.prepare import to_tensor
from mergevq.evaluate.content import text
from mergevq.evaluate.content.passes import Passes, Way, degraded
from mergevq.evaluate.content.text import (
    bucket_of,
    cut_out,
    evaluate_text,
    one_minus_ned,
    read_words,
    scores,
    text_rows,
)
from mergevq.evaluate.content.words import Word, rendered
from mergevq.metrics.image import to_uint8
from mergevq.metrics.references import ImageHashes
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.evaluations import CONFIG, write_tokenizer
from tests.support.records import assert_declared


class Memory:
    """Reads the pictures that it has seen by the nearest of them, and nothing where all is grey."""

    def __init__(self, pictures):
        self.record = {"name": "memory", "version": "1", "sha256": "0" * 64}
        self.known = []
        for picture in pictures:
            pixels = to_uint8(to_tensor(picture.image))
            self.known += [(cut_out(pixels, word).float(), word.text) for word in picture.words]

    def read(self, images):
        return [self.read_one(image.float()) for image in images]

    def read_one(self, image):
        if image.std() < 1:
            return ""
        alike = [known for known in self.known if known[0].shape == image.shape]
        far = [float((known - image).abs().mean()) for known, _ in alike]
        return alike[far.index(min(far))][1] if alike else ""


GREY = Way(4, "given")
WAYS = [Way(8, "given"), GREY]


@pytest.fixture(scope="module")
def through():
    """A tokenizer whose images come back as they are, and grey."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Passes, "reconstruct", lambda _, image, way, __: 0 * image if way == GREY else image
        )
        tokenizer = Tokenizer(CONFIG)
        yield Passes(tokenizer, {}, torch.device("cpu"), None, WAYS)


def test_edit_distance_is_by_the_longer_text():
    # One letter is another, and one is too many: 2 of 6.
    assert round(one_minus_ned("HOUSE", "H0USES"), 3) == 0.667
    assert one_minus_ned("HOUSE", "HOUSE") == 1
    assert one_minus_ned("", "HOUSE") == 0
    assert one_minus_ned("kitten", "sitting") == pytest.approx(4 / 7)
    assert one_minus_ned("AB", "BA") == 0


def test_case_counts():
    assert scores([("House", "HOUSE"), ("A", "A")])["text_exact"] == 0.5


@pytest.mark.parametrize(
    ("height", "bucket"),
    [(7.99, None), (8.0, 0), (9.99, 0), (10.0, 1), (13.99, 1), (14.0, 2), (19.99, 2), (20.0, None)],
)
def test_a_height_is_in_the_bucket_that_it_begins(height, bucket):
    assert bucket_of(height) == bucket


def test_a_word_is_cut_out_with_its_margin():
    pixels = torch.zeros(3, 40, 40, dtype=torch.uint8)
    pixels[:, 10:20, 5:25] = 255
    part = cut_out(pixels, Word("A", (5.5, 10.0, 24.2, 20.0)))
    # 24 pixels by 14, enlarged to 48 of height.
    assert part.shape == (3, 48, round(24 * 48 / 14))
    assert part[0, 24, 40] == 255
    assert part[0, 0, 0] == 0
    edge = cut_out(pixels, Word("A", (0.0, 30.0, 40.0, 40.0)))
    assert edge.shape == (3, 48, 160)


def test_a_degraded_image_is_smoother():
    flat = torch.full((3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(degraded(flat), flat)
    board = (torch.arange(64).view(8, 8) % 2 * 255).to(torch.uint8).expand(3, 8, 8)
    assert degraded(board).float().std() < 0.5 * board.float().std()


@pytest.fixture(scope="module")
def pictures():
    return list(rendered(24, 64, 0))


@pytest.fixture(scope="module")
def rows(pictures, through):
    read, shown = read_words(through, Memory(pictures), pictures, ImageHashes(), batch_size=10)
    assert len(shown) == 6
    assert [len(row) for row in shown] == [4] * 6
    return text_rows(read, WAYS)


def test_originals_as_they_are_reach_the_ceiling(rows):
    original, _, _, same, _ = rows
    assert [row["name"] for row in rows] == [
        *("original", "degraded", "wrong image", "reconstruction", "reconstruction")
    ]
    assert same["buckets"] == original["buckets"]
    assert same["num_kept"] == 8
    for bucket in same["buckets"]:
        assert bucket["refined"]["text_exact"] == 1.0
        assert bucket["refined"]["num_words"] == round(
            bucket["scores"]["text_exact"] * bucket["scores"]["num_words"]
        )


def test_grey_is_at_chance(rows):
    wrong, grey = rows[2], rows[4]
    assert grey["mean_exact"] <= wrong["mean_exact"] + 0.02
    assert grey["mean_1_minus_ned"] <= wrong["mean_1_minus_ned"] + 0.02


def test_words_are_counted_in_the_bucket_of_their_height(rows, pictures):
    heights = [word.height for each in pictures for word in each.words]
    counts = [bucket["scores"]["num_words"] for bucket in rows[0]["buckets"]]
    assert counts == [sum(low <= height < high for height in heights) for low, high in text.BUCKETS]


def test_the_mean_is_over_buckets_that_have_words():
    word = Word("AB", (0, 0, 9, 9))
    found = [
        text.Read(word, 0, ["AB", "AB"]),
        text.Read(word, 1, ["AX", "AB"]),
        text.Read(Word("CD", (0, 0, 9, 15)), 1, ["CD", ""]),
    ]
    original, worse, wrong = text_rows(found, [])
    assert [b["scores"]["text_exact"] for b in original["buckets"]] == [0.5, None, 1.0]
    assert (original["mean_exact"], worse["mean_exact"]) == (0.75, 0.5)
    # The text of the next word of another image: "AB" of the second one, then of the first.
    assert [b["scores"]["text_1_minus_ned"] for b in wrong["buckets"]] == [0.75, None, 0.0]
    refined = worse["buckets"][0]["refined"]
    assert refined == {"num_words": 1, "text_exact": 1.0, "text_1_minus_ned": 1.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("text") / "model")


def test_numbers_and_pictures_are_written(tmp_path, model, monkeypatch):
    monkeypatch.setattr(text, "RapidOcr", lambda: Memory(rendered(4, 64, 3)))
    settings = TextSettings(
        through=Reconstructor(model=str(model), num_kept=(32, 64), device="cpu"),
        out=str(tmp_path),
        image_size=64,
        max_images=4,
        seed=3,
    )
    record = evaluate_text(settings)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert_declared(written, TextRecord)
    assert written == json.loads(json.dumps(record))
    assert [(row["num_kept"], row["source"]) for row in record["rows"][3:]] == [
        *((32, "given"), (32, "recovered"), (64, "given"), (64, "recovered"))
    ]
    words = sum(bucket["scores"]["num_words"] for bucket in record["rows"][0]["buckets"])
    assert record["data"]["num_words"] == words + record["data"]["num_outside"]
    assert (tmp_path / "words.png").is_file()
    table = text_table(record)
    assert "reconstruction K = 32, recovered" in table
    assert "4 images of 64 pixels (rendered), memory 1" in table
    with pytest.raises(ValueError, match="is there already"):
        evaluate_text(settings)


def test_without_the_reader_one_line_says_how_to_get_it(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    assert main(["evaluate", "text", "--model", str(model), "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "reading text needs rapidocr, which is not installed: " in line
    assert "pip install" in line
    assert not (tmp_path / "out").exists()
