"""Reconstruct a picture from an export of `mergevq export onnx`, with neither torch nor mergevq.

    mergevq export onnx digits32 --out exported
    python examples/onnx_only.py exported picture.png --out again.png

Needs onnxruntime, numpy and Pillow. Left to right in the result: the picture at the model's size,
decoded with the given source map, and with the one recovered from the tokens alone.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def main() -> None:
    """Read the options, reconstruct, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="export of a tokenizer")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--num-kept", type=int, help="one of the exported K; default: the first")
    parser.add_argument("--out", type=Path, default=Path("again.png"))
    options = parser.parse_args()
    record = json.loads((options.folder / "export.json").read_text(encoding="utf-8"))
    num_kept = options.num_kept or record["num_kept"][0]
    if num_kept not in record["num_kept"]:
        parser.error(f"--num-kept {num_kept} must be one of {record['num_kept']}")
    picture = middle_square(Image.open(options.picture).convert("RGB"), record["image_size"])
    image = to_array(picture)[None]
    encode, decode = (session(options.folder, name) for name in (f"encoder_{num_kept}", "decoder"))
    recover = session(options.folder, "recovery")
    indices, source = encode.run(["indices", "source"], {"image": image})
    (inferred,) = recover.run(["source"], {"indices": indices})
    shown = [picture]
    for name, index in (("given", source), ("recovered", inferred)):
        (decoded,) = decode.run(["image"], {"indices": indices, "source": index})
        shown.append(to_picture(decoded[0]))
        print(f"{name} source: {psnr(shown[0], shown[-1]):.2f} dB")
    print(f"tokens: {' '.join(map(str, indices[0]))}")
    sheet = Image.new("RGB", (picture.width * len(shown), picture.height))
    for number, each in enumerate(shown):
        sheet.paste(each, (number * picture.width, 0))
    sheet.save(options.out)
    print(f"saved: {options.out}")


def session(folder: Path, name: str) -> onnxruntime.InferenceSession:
    """A graph of the export, on the CPU."""
    return onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])


def middle_square(picture: Image.Image, side: int) -> Image.Image:
    """The largest square in the middle, resized."""
    width, height = picture.size
    square = min(width, height)
    left, top = (width - square) // 2, (height - square) // 2
    box = (left, top, left + square, top + square)
    return picture.resize((side, side), Image.Resampling.BICUBIC, box=box)


def to_array(picture: Image.Image) -> np.ndarray:
    """Pixels in [-1, 1], channels first."""
    return np.asarray(picture, np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1)


def to_picture(image: np.ndarray) -> Image.Image:
    """The inverse of `to_array`, rounded to bytes."""
    pixels = np.rint((image.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 2, 0))


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio, in dB."""
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return float(10 * np.log10(255**2 / np.mean(difference**2)))


if __name__ == "__main__":
    main()
