"""Sheets of pictures: their size, and where each picture stands."""

import numpy as np
import PIL.Image

from emu_jax.evaluate.sheet import RIGHT, WRONG, sheet


def test_pictures_stand_row_by_row():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    pictures = [np.full((8, 8, 3), colour, np.uint8) for colour in colours]
    page = sheet(pictures, ["red", "a green one", ""], columns=2, colours=[RIGHT, WRONG, RIGHT], inches=1.0, dpi=50)
    assert page.size == (100, 145) and page.mode == "RGB"
    pixels = np.asarray(page).astype(int)
    found = [np.argwhere(np.abs(pixels - colour).sum(-1) < 30).mean(0).round(-1).tolist() for colour in colours]
    print(found)
    (top, left), (same, right), (bottom, below) = found
    assert abs(top - same) <= 10 and top < 70 < bottom and left < 50 < right and below < 50


def test_pil_pictures_are_taken():
    picture = PIL.Image.new("RGB", (4, 4), "blue")
    assert sheet([picture], ["one"], columns=1).size == (120, 156)
