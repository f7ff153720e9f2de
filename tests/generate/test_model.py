"""The public face: mixed prompts, one result a prompt, and arguments that cannot work."""

import numpy as np
import pytest
from PIL import Image

from emu_jax import Emu
from emu_jax.errors import UserError


@pytest.fixture(scope="module")
def model(trained) -> Emu:
    return Emu.load(trained)


IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def test_every_kind_of_image_is_the_same_image(model, tmp_path):
    file = tmp_path / "image.png"
    Image.fromarray(IMAGE).save(file)
    mean, std = (np.asarray(x, np.float32) for x in (model.config.pixel_mean, model.config.pixel_std))
    normalised = ((IMAGE / np.float32(255.0)) - mean) / std
    results = [
        model.generate_text([[image, "a"]])[0]
        for image in (IMAGE, Image.fromarray(IMAGE), file, normalised.astype(np.float32))
    ]
    assert len({tuple(r.token_ids) for r in results}) == 1
    np.testing.assert_allclose([r.score for r in results], results[0].score, rtol=1e-5)
    np.testing.assert_allclose(
        model.encode_images(normalised[None].astype(np.float32)), model.encode_images(IMAGE[None]), atol=1e-4
    )


@pytest.mark.long
def test_one_result_a_prompt_whatever_the_mixture(model):
    prompts = [["a red bar"], [IMAGE, "then", IMAGE], [IMAGE]]
    together = model.generate_text(prompts, num_beams=3, max_new_tokens=6)
    alone = [model.generate_text([prompt], num_beams=3, max_new_tokens=6)[0] for prompt in prompts]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    embeddings = model.generate_embeddings(prompts)
    assert embeddings.shape == (3, model.config.causal.queries, model.config.llama.width)
    np.testing.assert_allclose(embeddings[1], model.generate_embeddings(prompts[1:2])[0], atol=1e-4)


def test_candidates_score_what_their_tokens_cost(model):
    scores = model.score_candidates([IMAGE, "a"], ["red bar", "blue cross", "red bar"])
    assert scores.shape == (3,)
    assert scores[0] == pytest.approx(scores[2], rel=1e-6)
    assert (scores > 0).all()


def test_sampling_depends_on_the_seed_alone(model):
    def sample(seed):
        return model.generate_text([["a"]] * 4, temperature=1.5, seed=seed, max_new_tokens=8)

    one, again, other = (tuple(tuple(r.token_ids) for r in sample(seed)) for seed in (0, 0, 1))
    assert one == again != other
    assert len(set(one)) > 1, "rows of one batch draw separately"


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts: expected a list of prompts"),
        ([[]], {}, "prompt 0 is empty; give it a text or an image"),
        (["a"], {}, r"prompt 0: expected a list of texts and images, got one str; wrap it in \[\]"),
        ([["a"], [3]], {}, "prompt 1: expected a text, a PIL image, an array or a pathlib.Path, got int"),
        ([["a <image> b"]], {}, "prompt 0: a text spells <image>; pass images as list items instead"),
        ([[IMAGE.astype(np.float32)[:8]]], {}, r"a normalised image must be \[16, 16, 3\] for this model"),
        ([["a"]], {"max_new_tokens": 500}, "500 new ones exceed the model's context of 128"),
        ([["a"]], {"top_p": 0.0}, "top_p=0.0; expected temperature >= 0 and 0 < top_p <= 1"),
        ([["a"]], {"num_beams": 0}, "num_beams=0, max_new_tokens=20; expected at least 1 of each"),
    ],
)
def test_arguments_that_cannot_work(model, prompts, options, message):
    with pytest.raises(UserError, match=message):
        model.generate_text(prompts, **options)
