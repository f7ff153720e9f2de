"""Which parts of Emu the documents of a run can teach: a part without any gradient is refused before the run begins.

The encoder and the Causal Transformer learn through an image's input embeddings, from what is learnt behind them. An
input whose gradient is stopped (`model.stop_target_inputs`, at regression targets) passes nothing on.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from emu_jax.data.samples import Samples
from emu_jax.data.sequence import TokenizedDocument
from emu_jax.errors import UserError
from emu_jax.models.emu import EmuConfig

LOOKED_AT = 64  # records of a source
ENCODERS = ("vision", "causal")


def check_reach(trained: Collection[str], samples: Samples, model: EmuConfig) -> None:
    """Raises unless a document reaches each of the parts that are trained (`groups.PARTS`).

    Args:
      samples: of the run's sources; some records of each are looked at.

    Raises:
      UserError: a part that nothing teaches, by name.
    """
    records = (samples.measure(source, LOOKED_AT) for source in range(len(samples.lengths)))
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
        why = "nothing that is learnt follows an image that is read"
        mend = "see config.data.pairs and the weights of the losses"
    raise UserError(
        f"config.optimizer.learning_rate.{part} is above 0, but no document gives {part} a gradient: of "
        f"{len(documents)} documents, {why}; {mend}"
    )


def reached(document: TokenizedDocument, model: EmuConfig) -> set[str]:
    """The parts that get a gradient from a document."""
    learnt = np.zeros(len(document), bool)
    if model.text_loss_weight:
        learnt |= document.text_weights > 0
    if model.regression_loss_weight:
        learnt |= document.visual_weights > 0
    if not learnt.any():
        return set()
    live = document.slots >= 0
    if model.stop_target_inputs:
        live &= document.visual_weights == 0
    # A label at position t is predicted from the inputs before t.
    reads = live.any() and learnt[np.argmax(live) + 1 :].any()
    return {"llama", *ENCODERS} if reads else {"llama"}
