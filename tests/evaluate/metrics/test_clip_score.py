"""CLIP scores with a tiny CLIP of random weights, against transformers' own similarity."""

import numpy as np
import pytest
import torch
import transformers

from emu_jax.data.clip_scores import ClipScorer
from emu_jax.errors import UserError
from emu_jax.evaluate.metrics.drawings import clip_score
from tests.data.test_clip_scores import clip  # noqa: F401  (a fixture)


def test_clip_score_is_the_mean_similarity(clip):  # noqa: F811
    images = [np.random.default_rng(n).integers(0, 256, (8, 8, 3), np.uint8) for n in range(6)]
    texts = ["red cat", "blue dog", "cat", "dog", "red red", "blue"]
    model = transformers.CLIPModel.from_pretrained(clip)
    pixels = (np.stack(images).transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25
    words = transformers.CLIPTokenizer.from_pretrained(clip)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(pixel_values=torch.tensor(pixels, dtype=torch.float32), **words).logits_per_image
        cosines = (logits / model.logit_scale.exp()).diagonal().numpy()
    assert (cosines < 0).any() and (cosines > 0).any()
    figure = clip_score(ClipScorer(clip), images, texts)
    assert figure.value == pytest.approx(np.maximum(100 * cosines, 0).mean(), abs=1e-3)
    assert figure.interval[0] < figure.value < figure.interval[1] and figure.count == 6


def test_one_text_an_image(clip):  # noqa: F811
    with pytest.raises(UserError, match="1 images and 2 texts; expected one text an image"):
        clip_score(ClipScorer(clip), [np.zeros((8, 8, 3), np.uint8)], ["cat", "dog"])
