"""The parts of Emu that get a gradient from a run's documents; a trainable part without any is refused at start.

The encoder and the Causal Transformer get theirs through an image's input embeddings, from labels after the image.
`model.stop_target_inputs` stops the gradient of inputs that are regression targets.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from emu_jax.data.samples import Samples
from emu_jax.data.sequence import TokenizedDocument
from emu_jax.errors import UserError
from emu_jax.models.emu import EmuConfig

MEASURED_RECORDS = 64  # of each source
ENCODERS = ("vision", "causal")


def check_reach(trained: Collection[str], samples: Samples, model: EmuConfig) -> None:
    """Checks that some document gives a gradient to each trained part (`groups.part_of`).

    Args:
      samples: samples of the run's sources; some records of each are read.

    Raises:
      UserError: a part has no gradient.
    """
    records = (samples.measure(source, MEASURED_RECORDS) for source in range(len(samples.lengths)))
    documents = [document for source in records for record in source for document in record]
    found = {part for document in documents for part in reached(document, model)}
    missing = [part for part in (*ENCODERS, "llama") if part in trained and part not in found]
    if not missing:
        return
    part = missing[0]
    if part == "llama":
        why, mend = "none has a label with a weight above 0", "see the weights of config.data and config.model"
    elif not any(document.images for document in documents):
        why, mend = "none shows an image", f"set config.optimizer.learning_rate.{part}=0 to freeze it"
    elif all((document.visual_weights > 0).any() for document in documents if document.images):
        why = "all their images are predicted, and model.stop_target_inputs keeps the gradient out of those"
        mend = "set config.data.predicted_share below 1, so that the images of some are read"
    else:
        why = "no label follows an image that is read"
        mend = "see config.data.pairs and the weights of the losses"
    raise UserError(
        f"config.optimizer.learning_rate.{part} is above 0, but no document gives {part} a gradient: of "
        f"{len(documents)} documents, {why}; {mend}"
    )


def reached(document: TokenizedDocument, model: EmuConfig) -> set[str]:
    """The parts to which a document gives a gradient."""
    labels = np.zeros(len(document), bool)
    if model.text_loss_weight:
        labels |= document.text_weights > 0
    if model.regression_loss_weight:
        labels |= document.visual_weights > 0
    if not labels.any():
        return set()
    live = document.slots >= 0
    if model.stop_target_inputs:
        live &= document.visual_weights == 0
    # A label at position t is predicted from the inputs before t.
    reads = live.any() and labels[np.argmax(live) + 1 :].any()
    return {"llama", *ENCODERS} if reads else {"llama"}
