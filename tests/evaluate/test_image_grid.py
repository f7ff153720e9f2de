"""Sheets of images: their size, and where each image stands."""

import numpy as np
import PIL.Image

from emu_jax.evaluate.image_grid import RIGHT, WRONG, sheet


def test_images_stand_row_by_row():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    images = [np.full((8, 8, 3), colour, np.uint8) for colour in colours]
    page = sheet(images, ["red", "a green one", ""], columns=2, colours=[RIGHT, WRONG, RIGHT], inches=1.0, dpi=100)
    assert page.size == (200, 236) and page.mode == "RGB"
    pixels = np.asarray(page).astype(int)
    found = [np.argwhere(np.abs(pixels - colour).sum(-1) < 30).mean(0).round(-1).tolist() for colour in colours]
    print(found)
    assert found == [[70, 50], [70, 150], [190, 50]]  # row and column of their middles


def test_pil_images_are_taken():
    image = PIL.Image.new("RGB", (4, 4), "blue")
    assert sheet([image], [""], columns=1).size == (120, 124)


def test_long_titles_make_room_and_end():
    image = np.zeros((4, 4, 3), np.uint8)
    short, long, longer = (sheet([image], ["word " * count], columns=1).height for count in (3, 12, 100))
    print(short, long, longer)
    assert short < long < longer == round(80 * (1.5 + 5 * 0.13 + 0.05))


def test_any_text_is_a_title(recwarn):
    """What a model writes: formulas that are none, and letters that the font lacks."""
    images = [np.zeros((4, 4, 3), np.uint8)] * 2
    assert sheet(images, ["costs $5 and \\frac{", "$x^$ 日本語 \x15"]).width > 0
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
