import struct
import zipfile

import numpy as np
import pytest
import torch

from mergevq.image_arrays import ImageArray, ImageArrayWriter


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
    with pytest.raises(ValueError, match=r"text\.npz holds no images"):
        ImageArray(tmp_path / "text.npz")
    with pytest.raises(ValueError, match=r"there is no file .*nowhere"):
        ImageArray(tmp_path / "nowhere.npz")


def write_forged(path, shape, content, version=b"\x01\x00"):
    """An array whose header says something else than is there."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY" + version + size + text.encode() + content)
    return path


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("(2, 2, 2, 3)", "has 4 bytes too few"),
        ("(1, 2, 1, 3)", "has 14 bytes too many"),
        ("(1099511627776, 2, 2, 3)", "bytes too few"),
        ("(1, 65536, 65536, 3)", "65,536 x 65,536 pixels, more than the 4,194,304"),
        ("(-1, 2, 2, 3)", "must be uint8 of"),
        ("(0, 2, 2, 3)", "must be uint8 of"),
        ("None", "has no readable header"),
        ("(" * 50, "has no readable header"),
    ],
)
def test_a_header_that_lies_is_refused_before_pixels_are_read(tmp_path, shape, message):
    path = write_forged(tmp_path / "a.npz", shape, bytes(20))
    with pytest.raises(ValueError, match=rf"a\.npz: arr_0 .*{message}"):
        ImageArray(path)


def test_a_later_version_of_the_format_is_refused(tmp_path):
    path = write_forged(tmp_path / "a.npz", "(1, 1, 1, 3)", bytes(3), version=b"\x02\x00")
    with pytest.raises(ValueError, match=r"arr_0 has no readable header: it is of a later version"):
        ImageArray(path)


def test_a_damaged_archive_is_named_while_it_is_read(tmp_path, pixels):
    path = write(tmp_path / "a.npz", pixels.repeat(40, 1, 1, 1), num_images=200)
    data = bytearray(path.read_bytes())
    data[9000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npz is damaged: Bad CRC"):
        list(ImageArray(path).batches(5))


def test_an_array_behind_a_link_to_a_device_is_refused(tmp_path):
    (tmp_path / "a.npz").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"a\.npz must be a regular file"):
        ImageArray(tmp_path / "a.npz")
