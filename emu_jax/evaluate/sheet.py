"""Pictures beside one another with a line of text above each, as one picture: what notebooks show.

In: pictures uint8 [H, W, 3] or PIL's, and titles. Out: a PIL image, which notebooks display as it is, whatever the
plotting backend.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import PIL.Image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RIGHT, WRONG = "green", "firebrick"


def sheet(
    pictures: Sequence[np.ndarray | PIL.Image.Image],
    titles: Sequence[str],
    *,
    columns: int = 6,
    colours: Sequence[str] = (),
    inches: float = 1.5,
    dpi: int = 80,
) -> PIL.Image.Image:
    """A grid of pictures, row by row.

    Args:
      titles: one a picture. colours: of the titles (default: black).
      inches: of a picture's side, at `dpi` dots an inch.
    """
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(inches * columns, (inches + 0.45) * rows), dpi=dpi, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    letters = round(inches * 14)
    colours = colours or ["black"] * len(pictures)
    for axis, picture, title, colour in zip(axes.flat, pictures, titles, colours, strict=False):
        axis.imshow(np.asarray(picture))
        axis.set_title(textwrap.fill(title, letters), fontsize=7, color=colour)
    canvas.draw()
    return PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
