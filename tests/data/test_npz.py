"""Arrays of strangers' archives: declared sizes are checked before anything is read."""

import io
import zipfile

import numpy as np
import pytest

from mergevq.data.npz import MAX_TEXT_LENGTH, array_names, open_array, read_array, read_text


def archive(path, **members):
    """An archive of raw members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return path


def header(shape, dtype="<f8"):
    """The start of an array file that declares a shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_and_texts_come_back_as_numpy_wrote_them(tmp_path, compressed, order):
    values = np.asarray(np.arange(6.0).reshape(2, 3), order=order)
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "a.npz", values=values, name=np.array("Gr\xf6\xdfe"))
    assert array_names(tmp_path / "a.npz") == {"values", "name"}
    assert (read_array(tmp_path / "a.npz", "values", num_dims=2, max_side=3) == values).all()
    assert read_text(tmp_path / "a.npz", "name") == "Gr\xf6\xdfe"


def test_values_are_read_piece_by_piece(tmp_path):
    np.savez(tmp_path / "a.npz", values=np.arange(4, dtype=np.uint8))
    array = open_array(tmp_path / "a.npz", "values")
    assert (array.shape, array.dtype) == ((4,), np.uint8)
    assert [array.read(3), array.read(3)] == [b"\0\1\2", b"\3"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (header((2**40,)), "8796093022208 bytes, and the archive has 0"),
        (header((3,)) + bytes(8), "24 bytes, and the archive has 8"),
        (header((1,)) + bytes(16), "8 bytes, and the archive has 16"),
        (header((-1,)), "impossible shape"),
        (header((1,), "|O") + bytes(8), "pickled objects"),
        (b"no array", "is not an .npz file of plain arrays"),
    ],
)
def test_what_is_declared_and_what_is_there_have_to_agree(tmp_path, data, said):
    with pytest.raises(ValueError, match=said):
        open_array(archive(tmp_path / "a.npz", a=data), "a")


@pytest.mark.parametrize(
    ("values", "num_dims", "max_side"),
    [
        (np.zeros((2, 3)), 1, 9),
        (np.zeros((2, 3)), 2, 2),
        (np.zeros(4), 1, 3),
        (np.zeros(2, dtype=complex), 1, 3),
        (np.array(["text"]), 1, 3),
    ],
)
def test_other_types_and_shapes_are_refused_with_both(tmp_path, values, num_dims, max_side):
    np.savez(tmp_path / "a.npz", a=values)
    with pytest.raises(ValueError, match=rf"must be of {num_dims} .*sides of at most {max_side}"):
        read_array(tmp_path / "a.npz", "a", num_dims=num_dims, max_side=max_side)


def test_rows_are_bounded_by_their_bytes_alone(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros((50, 2)))
    assert read_array(tmp_path / "a.npz", "a", num_dims=2, max_side=2).shape == (50, 2)


def test_a_text_has_a_longest_length(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.array("x" * (MAX_TEXT_LENGTH + 1)), b=np.zeros(2))
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"one text of at most {MAX_TEXT_LENGTH} characters"):
            read_text(tmp_path / "a.npz", name)


def test_what_is_missing_or_no_archive_is_one_line(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(1))
    (tmp_path / "b.npz").write_bytes(b"<html>")
    for name, array in (("a.npz", "b"), ("b.npz", "a"), ("c.npz", "a")):
        with pytest.raises(ValueError, match=name) as caught:
            open_array(tmp_path / name, array)
        assert "\n" not in str(caught.value)
