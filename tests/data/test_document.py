"""A document keeps its parts in order and cannot change after it was read."""

import dataclasses

import numpy as np
import pytest

from emu_jax.data.document import Document, Image, Text


def test_parts_keep_their_order_and_weights_default_to_one():
    image = Image(np.zeros((2, 2, 3), np.uint8), "a")
    document = Document((Text("before"), image, Text("after")))
    assert document.parts == (Text("before"), image, Text("after"))
    assert (document.text_weight, document.visual_weight) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("value", "field"),
    [(Text("a"), "text"), (Image(np.zeros((1, 1, 3), np.uint8), "a"), "key"), (Document(()), "parts")],
)
def test_parts_are_frozen(value, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, "changed")
