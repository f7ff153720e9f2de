"""CLIP scores against a direct computation with a tiny CLIP of random weights, and the rule that uses them."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as PIL
from safetensors.torch import load_file, save_file

from emu_jax.data.clip_scores import ClipScorer, match
from emu_jax.data.document import Text
from emu_jax.data.raw.reader import RawDocument, Reject
from emu_jax.data.raw.readers.html import Html
from emu_jax.data.raw.readers.mmc4 import Mmc4
from emu_jax.data.raw.readers.obelics import Obelics
from emu_jax.errors import UserError

SIZE = 8
WORDS = ["red", "blue", "cat", "dog"]
LETTERS = sorted(set("".join(WORDS)))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A folder of CLIP weights: letters and no merges are its vocabulary."""
    folder = tmp_path_factory.mktemp("clip")
    vocabulary = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": SIZE},
                "crop_size": {"height": SIZE, "width": SIZE},
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.25, 0.25, 0.25],
            }
        )
    )
    width = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    config = transformers.CLIPConfig(
        text_config=width | ends | {"vocab_size": len(vocabulary), "max_position_embeddings": 12, "projection_dim": 6},
        vision_config=width | {"image_size": SIZE, "patch_size": 4, "projection_dim": 6},
        projection_dim=6,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # published initial weights would make all vectors alike
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def _pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def _png(seed: int) -> bytes:
    stream = io.BytesIO()
    PIL.fromarray(_pixels(seed)).save(stream, "png")
    return stream.getvalue()


def _direct(clip: str, seeds, texts) -> np.ndarray:
    """Cosines [P, T], an image and a text at a time, from tokens spelt out and pixels normalised by hand."""
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    start, end = 2 * len(LETTERS), 2 * len(LETTERS) + 1
    rows = []
    for seed in seeds:
        pixels = torch.tensor((_pixels(seed) / 255.0 - 0.5) / 0.25, dtype=torch.float32).permute(2, 0, 1)[None]
        row = []
        for text in texts:
            ids = [LETTERS.index(letter) for letter in text]
            ids[-1] += len(LETTERS)  # the letter that ends a word
            ids = [start, *ids, end]
            with torch.inference_mode():
                got = model(input_ids=torch.tensor([ids]), pixel_values=pixels)
            row.append(float(got.image_embeds[0] @ got.text_embeds[0]))
        rows.append(row)
    return np.array(rows)


def test_against_a_direct_computation(clip):
    scorer = ClipScorer(clip)
    images, texts = scorer.embed_images(map(_pixels, range(3))), scorer.embed_texts(WORDS)
    assert (images.shape, texts.shape, images.dtype) == ((3, 6), (4, 6), np.float32)
    expected = _direct(clip, range(3), WORDS)
    assert expected.std() > 0.1  # the weights tell them apart
    np.testing.assert_allclose(images @ texts.T, expected, atol=1e-5)


def test_batches_and_long_texts(clip):
    scorer = ClipScorer(clip)
    texts = [WORDS[number % 4] for number in range(70)]
    np.testing.assert_allclose(scorer.embed_texts(texts), scorer.embed_texts(WORDS)[np.arange(70) % 4], atol=1e-5)
    assert scorer.embed_texts(["red " * 50]).shape == (1, 6)  # cut to what the model takes
    assert scorer.embed_texts([]).shape == scorer.embed_images([]).shape == (0, 6)


def test_match():
    np.testing.assert_array_equal(match(np.array([[0.9, 0.8], [0.7, 0.1]])), [1, 0])  # 0.8 + 0.7 beats 0.9 + 0.1
    np.testing.assert_array_equal(match(np.array([[0.9, 0.8], [0.7, 0.1], [0.3, 0.2]])), [1, 0, 0])
    np.testing.assert_array_equal(match(np.array([[0.1, 0.2, 0.3]])), [2])


def test_weights_that_cannot_be_used(clip, tmp_path):
    with pytest.raises(UserError, match=r"no config.json there; expected a folder of CLIP weights"):
        ClipScorer(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match=r"cannot be loaded \(.*\); expected CLIP weights"):
        ClipScorer(str(tmp_path))
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, text_projection.weight the first"):
        ClipScorer(str(tmp_path))


def test_without_transformers(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError, match=r"^CLIP scores need torch and transformers 5; run `pip install 'emu-jax\[clip\]'`$"
    ):
        ClipScorer(clip)


# ---------------------------------------------------------------- readers


def _all(path, reader):
    return [got for shard in reader.shards(str(path)) for got in reader.read(shard)]


def test_a_page(clip, tmp_path):
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(_png(seed))
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "a.html").write_text("<p>red<img src=0.png>cat<img src=bad.png><img src=1.png>dog<img src=2.png>")
    # Each with the text behind it; the last one with the last text.
    scores = _direct(clip, range(3), WORDS)[[0, 1, 2], [2, 3, 3]]
    least = float(np.sort(scores)[:2].mean())  # between the lowest and the others
    lowest = int(scores.argmin())
    got = _all(tmp_path, Html(clip=clip, min_similarity=least))
    rejects = [(reject.key, reject.reason) for reject in got if isinstance(reject, Reject)]
    number = [0, 2, 3][lowest]
    assert rejects == [("a.html#1", "unreadable_image"), (f"a.html#{number}", "low_similarity")]
    images = [part for part in got[-1].parts if not isinstance(part, Text)]
    assert [image.data for image in images] == [_png(seed) for seed in range(3) if seed != lowest]
    np.testing.assert_allclose([image.score for image in images], np.delete(scores, lowest), atol=1e-5)
    assert [part.text for part in got[-1].parts if isinstance(part, Text)] == ["red", "cat", "dog"]


def test_obelics(clip, tmp_path):
    (tmp_path / "0.png").write_bytes(_png(0))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"images": ["0.png", None], "texts": [None, "red"]}))
    (got,) = _all(tmp_path, Obelics(images=".", clip=clip, min_similarity=-1))
    np.testing.assert_allclose(got.parts[0].score, _direct(clip, [0], ["red"])[0, 0], atol=1e-5)
    got = _all(tmp_path, Obelics(images=".", clip=clip, min_similarity=1))
    assert [reject.reason for reject in got] == ["low_similarity", "no_image"]


def test_mmc4_without_scores(clip, tmp_path):
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(_png(seed))
    infos = [{"image_name": f"{seed}.png"} for seed in range(3)]
    record = {"text_list": WORDS, "image_info": [*infos, {"image_name": "0.png", "matched_text_index": 1}]}
    (tmp_path / "docs.jsonl").write_text(json.dumps(record) + "\n")
    (got,) = _all(tmp_path, Mmc4(images=".", clip=clip, min_similarity=-1))
    assert isinstance(got, RawDocument)
    scores = _direct(clip, [0, 1, 2, 0], WORDS)
    places = [*match(scores)[:3], 1]
    expected = []
    for place, word in enumerate(WORDS):
        expected += [(_png([0, 1, 2, 0][n]), scores[n, place]) for n in range(4) if places[n] == place]
        expected.append((word, None))
    assert [part.text if isinstance(part, Text) else part.data for part in got.parts] == [data for data, _ in expected]
    got_scores = [part.score for part in got.parts if not isinstance(part, Text)]
    np.testing.assert_allclose(got_scores, [score for _, score in expected if score is not None], atol=1e-5)
