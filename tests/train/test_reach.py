"""What a config trains gets a gradient from every kind of document with images; a part that gets none is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs import models
from emu_jax.config import load_config
from emu_jax.data.document import Document, Image, Text
from emu_jax.data.sequence import tokenize_document
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.models.emu import EmuConfig
from emu_jax.train.reach import reached
from emu_jax.train.tasks.task import make_task
from tests.train import tiny
from tests.train.gradients import CONFIGS, ENCODERS, kinds_of, norms, write_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    return write_sources(tmp_path_factory.mktemp("sources"))


# The others differ from these in numbers alone, or freeze what these train; each compiles programs of its own.
FIRST = ("quickstart", "ablations/base", "pretrain:14b", "instruct:mini")
NAMES = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_gets_a_gradient(name, sources):
    for kind in kinds_of(name):
        for part, norm in norms(CONFIGS[name], kind, sources[kind]).items():
            where = f"{name}, {kind}, {part}: {norm}"
            if norm is None:
                assert part in ENCODERS and (name.startswith("instruct") or ("frozen" in name and part == "vision")), (
                    where
                )
            elif kind == "text" and part in ENCODERS:
                assert norm == 0.0, where
            else:
                assert norm > 1e-6, where


TOKENIZER = Tokenizer.train(["a red cat"], vocab_size=40, model_type="word")
IMAGE = Image(np.zeros((1, 1, 3), np.uint8), "p")
CAPTION, DRAWING = Document((IMAGE, Text("a cat"))), Document((Text("a cat"), IMAGE))
ALL, LLAMA = {"llama", "vision", "causal"}, {"llama"}


@pytest.mark.parametrize(
    ("document", "switches", "expected"),
    [
        (CAPTION, {}, ALL),
        (CAPTION, {"stop_target_inputs": True}, LLAMA),
        (CAPTION.read_only(), {"stop_target_inputs": True}, ALL),
        (CAPTION.read_only(), {"text_loss_weight": 0.0}, set()),
        (DRAWING, {}, ALL),  # an <image> is predicted from those before it, and </s> from all
        (DRAWING, {"stop_target_inputs": True}, LLAMA),
        (Document((Text("a cat"),)), {}, LLAMA),
        (CAPTION, {"regression_loss_weight": 0.0, "text_loss_weight": 0.0}, set()),
    ],
)
def test_parts_that_a_document_reaches(document, switches, expected):
    fields = models.debug()
    fields.update({"stop_target_inputs": False, **switches})
    [sequence] = tokenize_document(document, TOKENIZER, queries=2, row_tokens=32, row_images=1)
    assert reached(sequence, EmuConfig.from_dict(fields)) == expected


def _experiment(source: Path, **model) -> None:
    config = load_config(tiny.__file__, [f"--config.data.source={source}"])
    config.model.update(model)
    make_task(config)[1].stream.close()


def test_a_config_that_teaches_a_part_nothing_is_refused(tmp_path, documents):
    """Documents whose images are all predicted, with inputs stopped; and documents without images."""
    stories = tmp_path / "stories.jsonl"
    image = {"image": str(documents.parent / "red-bar.png")}
    stories.write_text("\n".join([json.dumps({"parts": [{"text": "a bar"}, image]})] * 20), encoding="utf-8")
    expected = r"learning_rate\.vision is above 0, but no document gives vision a gradient: of \d+ documents, "
    with pytest.raises(UserError, match=expected + r"all their images are predicted, and model\.stop_target_inputs"):
        _experiment(stories, stop_target_inputs=True)
    _experiment(stories, stop_target_inputs=False)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join([json.dumps({"parts": [{"text": "a bar"}]})] * 20), encoding="utf-8")
    with pytest.raises(
        UserError, match=expected + r"none shows an image; set config\.optimizer\.learning_rate\.vision=0"
    ):
        _experiment(texts)
    with pytest.raises(UserError, match=r"learning_rate\.vision is above 0, .* no label follows an image"):
        _experiment(tiny.pairs(documents), text_loss_weight=0.0, regression_loss_weight=4.0, stop_target_inputs=True)
