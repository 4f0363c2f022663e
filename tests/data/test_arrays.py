import numpy as np
import pytest
import torch

from mergevq.data.arrays import ImageArray, ImageArrayWriter


@pytest.fixture
def pixels(generator):
    return torch.randint(0, 256, (5, 3, 4, 6), generator=generator, dtype=torch.uint8)


def write(path, pixels, num_images=5):
    with ImageArrayWriter(path, num_images, (4, 6)) as array:
        for part in pixels.split(2):
            array.write(part)
    return path


def test_numpy_reads_what_is_written(tmp_path, pixels):
    with np.load(write(tmp_path / "samples.npz", pixels)) as archive:
        assert archive.files == ["arr_0"]
        found = archive["arr_0"]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, pixels.permute(0, 2, 3, 1).numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read_in_any_batches(tmp_path, pixels, save):
    save(tmp_path / "samples.npz", pixels.permute(0, 2, 3, 1).contiguous().numpy(), mu=np.zeros(2))
    array = ImageArray(tmp_path / "samples.npz")
    assert (len(array), array.size) == (5, (4, 6))
    for batch_size in (1, 2, 9):
        assert torch.equal(torch.cat(list(array.batches(batch_size))), pixels)


def test_missing_images_are_an_error_and_leave_no_file(tmp_path, pixels):
    with pytest.raises(ValueError, match="1 images are missing"):
        write(tmp_path / "samples.npz", pixels, num_images=6)
    assert list(tmp_path.iterdir()) == []


def test_an_error_on_the_way_is_not_hidden(tmp_path):
    with (
        pytest.raises(RuntimeError, match="first"),
        ImageArrayWriter(tmp_path / "samples.npz", 2, (4, 6)),
    ):
        raise RuntimeError("first")
    assert list(tmp_path.iterdir()) == []


def test_what_holds_no_images_is_named(tmp_path):
    np.savez(tmp_path / "mu.npz", mu=np.zeros(2))
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 6, 3)))
    (tmp_path / "text.npz").write_text("none")
    with pytest.raises(ValueError, match=r"mu\.npz holds no images"):
        ImageArray(tmp_path / "mu.npz")
    with pytest.raises(ValueError, match=r"float64 of shape \(2, 4, 6, 3\) and must be uint8"):
        ImageArray(tmp_path / "floats.npz")
    with pytest.raises(ValueError, match=r"text\.npz is not an .npz file"):
        ImageArray(tmp_path / "text.npz")
    with pytest.raises(ValueError, match=r"no file .*nowhere"):
        ImageArray(tmp_path / "nowhere.npz")
