"""Images beside one another with a line of text above each, as one image: what notebooks show.

In: images uint8 [H, W, 3] or PIL's, and titles. Out: a PIL image, which notebooks display as it is, whatever the
plotting backend.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
import PIL.Image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RIGHT, WRONG = "green", "firebrick"
LETTERS = 13  # of a title on an inch
LINES = 5  # of a title, at most
LINE = 0.13  # inches


def sheet(
    images: Sequence[np.ndarray | PIL.Image.Image],
    titles: Sequence[str],
    *,
    columns: int = 6,
    colours: Sequence[str] = (),
    inches: float = 1.5,
    dpi: int = 80,
) -> PIL.Image.Image:
    """A grid of images, row by row.

    Args:
      titles: one for each image.
      colours: colours of the titles (default: black).
      inches: side of an image, at `dpi` dots an inch.
    """
    rows = -(-len(images) // columns)
    texts = [textwrap.wrap(title, round(LETTERS * inches), max_lines=LINES, placeholder=" …") for title in titles]
    height = inches + LINE * max(map(len, texts), default=0) + 0.05
    figure = Figure(figsize=(inches * columns, height * rows), dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    colours = colours or ["black"] * len(images)
    for place, (image, text, colour) in enumerate(zip(images, texts, colours, strict=True)):
        row, column = divmod(place, columns)
        bottom = 1 - (height * row + height) / (height * rows)
        axis = figure.add_axes((column / columns, bottom, 0.96 / columns, 0.98 * inches / (height * rows)))
        axis.set_axis_off()
        axis.imshow(np.asarray(image))
        # A model's text is no formula, whatever signs it has.
        axis.set_title("\n".join(text), fontsize=7, color=colour, pad=2, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # a letter that the font lacks
        canvas.draw()
    return PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
