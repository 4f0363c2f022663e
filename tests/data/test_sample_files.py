"""Pictures of a run are those with a digest in its list, and no others."""

import hashlib

import pytest
from PIL import Image

from mergevq.data.sample_files import SUMS, SampleFiles, is_sample_folder

NAMES = ["0.png", "1.png"]


def picture(grey):
    return Image.new("RGB", (3, 2), (grey, grey, grey))


def test_a_picture_comes_back_and_its_digest_is_that_of_its_file(tmp_path):
    assert not is_sample_folder(tmp_path)
    files = SampleFiles(tmp_path, NAMES)
    assert not files.has(1)
    files.save(1, picture(7))
    assert is_sample_folder(tmp_path)
    digest = hashlib.sha256((tmp_path / "1.png").read_bytes()).hexdigest()
    assert (tmp_path / SUMS).read_text() == f"{digest}  1.png\n"
    again = SampleFiles(tmp_path, NAMES)
    assert [again.has(number) for number in range(2)] == [False, True]
    assert again.read(1).tobytes() == picture(7).tobytes()


def test_without_names_the_pictures_are_all_that_were_made_by_any_rank(tmp_path):
    for rank, name in ((0, "0.png"), (1, "1.png")):
        SampleFiles(tmp_path, [name], rank=rank).save(0, picture(rank))
    assert (tmp_path / f"{SUMS}.1").is_file()
    files = SampleFiles(tmp_path)
    assert (len(files), files.names) == (2, NAMES)


def test_a_file_that_nobody_made_here_is_a_stranger_and_a_changed_one_is_refused(tmp_path):
    files = SampleFiles(tmp_path, NAMES)
    files.save(0, picture(0))
    picture(1).save(tmp_path / "cat.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    assert files.strangers() == ["cat.jpg"]
    picture(1).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"0\.png is not the picture that was made"):
        files.read(0)


def test_a_line_cut_in_half_costs_one_picture_only(tmp_path):
    files = SampleFiles(tmp_path, NAMES)
    files.save(0, picture(0))
    whole = (tmp_path / SUMS).read_bytes()
    (tmp_path / SUMS).write_bytes(whole[:40])
    again = SampleFiles(tmp_path, NAMES)
    again.save(1, picture(1))
    assert [SampleFiles(tmp_path, NAMES).has(number) for number in range(2)] == [False, True]


def test_a_picture_made_again_may_have_either_digest(tmp_path):
    files = SampleFiles(tmp_path, NAMES)
    files.save(0, picture(0))
    files.save(0, picture(1))
    assert SampleFiles(tmp_path, NAMES).read(0).tobytes() == picture(1).tobytes()
