"""Chats about held-out images: what is asked, and images that are drawn in answers."""

import dataclasses

import pytest

from emu_jax import Emu
from emu_jax.data import embedded_chats
from emu_jax.evaluate.quickstart.chat import begun_images, conversations
from tests.train import tiny


@pytest.fixture(scope="module")
def drawer(instructed, drawing) -> Emu:
    """It begins an image wherever it answers; the paper's system message is longer than the small model's context."""
    model = Emu.load(instructed, decoder=drawing).merged()
    config = dataclasses.replace(model.config, llama=dataclasses.replace(model.config.llama, context=1024))
    return tiny.that_draws(Emu(config, model.params, model.statistics, model.tokenizer, model.decoder))


def test_a_conversation_ends_with_another_one_s_image(drawer):
    first, second = conversations(drawer, count=2)
    asked = [exchange.question for exchange in first.exchanges]
    assert asked[:2] == [embedded_chats.NAME_ASKS[0], embedded_chats.TONE_ASKS]
    assert asked[-1] == embedded_chats.draw(second.example)
    assert [exchange.drawn is not None for exchange in first.exchanges] == [False, False, False, True]


def test_images_that_are_begun_are_counted(drawer):
    figures = begun_images(drawer)
    assert [figure.count for figure in figures.values()] == [140, 140]
    assert min(figure.value for figure in figures.values()) > 0.9, figures  # after a few prompts the other sign wins
    mute = dataclasses.replace(drawer.config, learn_image_token=False)  # [IMG] ends no text of its own accord
    figures = begun_images(Emu(mute, drawer.params, drawer.statistics, drawer.tokenizer))
    assert [figure.value for figure in figures.values()] == [0.0, 0.0]
