"""The prompts, literally, as the reference's evaluation code and the third party's copy have them."""

import numpy as np
import pytest

from emu_jax.data.system_messages import IMAGE_SYSTEM
from emu_jax.evaluate.benchmarks import visdial, vizwiz
from emu_jax.evaluate.prompts import ModelCall, Prompt, caption, caption_of, short_answer, vqa
from emu_jax.evaluate.question import Question
from emu_jax.generate.candidates import CandidateScores

IMAGE = np.zeros((2, 2, 3), np.uint8)
SHOWN = np.ones((2, 2, 3), np.uint8)
QUESTION = Question("1", (IMAGE,), text="what is on the lawn?", answers=("dog",))
EXAMPLE = Question("2", (SHOWN,), text="what colour is it?", answers=("blue", "red", "red"))
ONE_PHRASE = (
    "based on the content of the image and common sense, please provide an accurate answer consisting of only one word "
    "or phrase."
)


def _spelt(call: ModelCall) -> str:
    """A call's parts as one line."""
    names = {id(IMAGE): "<image>", id(SHOWN): "<shown>"}
    return "".join(part if isinstance(part, str) else names[id(part)] for part in call.parts)


def _ask(
    prompt: Prompt, question: Question, results: list, *, examples: list = (), chat: bool
) -> tuple[list[ModelCall], object]:
    """The calls that a prompt makes when the model returns `results`, and its prediction."""
    running = prompt(question, list(question.images), list(examples), chat)
    calls = [next(running)]
    for result in results[:-1]:
        calls.append(running.send(result))
    with pytest.raises(StopIteration) as end:
        running.send(results[-1])
    return calls, end.value.value


def test_captions_of_the_tuned_model():
    calls, prediction = _ask(caption, QUESTION, [" A dog on a Lawn. It runs.\nAnd"], chat=True)
    assert _spelt(calls[0]) == (
        f"{IMAGE_SYSTEM} [USER]: <image> please provide an accurate and concise description of the given image. "
        "[ASSISTANT]: the image depicts a photo of"
    )
    assert dict(calls[0].decoding) == {"num_beams": 5, "max_new_tokens": 20, "min_length": 8, "length_penalty": -1.0}
    assert prediction == "a dog on a lawn"


def test_captions_of_the_pretrained_model_after_an_example():
    calls, _ = _ask(caption, QUESTION, ["a dog"], examples=[(EXAMPLE, [SHOWN])], chat=False)
    begun = " describing the image in detail. the image shows"
    assert _spelt(calls[0]) == f"<shown>{begun} red. <image>{begun}"


def test_a_question_to_the_tuned_model():
    calls, prediction = _ask(vqa, QUESTION, ['It is a Dog, or "cat"'], chat=True)
    assert _spelt(calls[0]) == (
        f"{IMAGE_SYSTEM} [USER]: <image> {ONE_PHRASE} what is on the lawn? [ASSISTANT]: the answer is:"
    )
    assert dict(calls[0].decoding) == {"num_beams": 5, "max_new_tokens": 20, "min_length": 1, "length_penalty": -1.0}
    assert prediction == "dog"


def test_examples_are_earlier_turns_of_the_tuned_model():
    calls, _ = _ask(vqa, QUESTION, ["dog"], examples=[(EXAMPLE, [SHOWN])], chat=True)
    assert _spelt(calls[0]) == (
        f"{IMAGE_SYSTEM} [USER]: <shown> {ONE_PHRASE} what colour is it? [ASSISTANT]: the answer is: red</s>"
        f" [USER]: <image> {ONE_PHRASE} what is on the lawn? [ASSISTANT]: the answer is:"
    )


def test_the_pretrained_model_is_called_twice():
    calls, prediction = _ask(vqa, QUESTION, ["A dog on a lawn. Yes", "dog. It"], chat=False)
    assert [_spelt(call) for call in calls] == [
        "<image> describing the image in detail. the image shows",
        "a picture of a dog on a lawn. based on the picture, what is on the lawn? short answer:",
    ]
    assert prediction == "dog"


def test_text_only_examples_come_before_the_second_call():
    calls, _ = _ask(vqa, QUESTION, ["a dog", "dog"], examples=[(EXAMPLE, [])], chat=False)
    assert _spelt(calls[1]) == (
        " based on the picture, what colour is it? short answer: red. "
        "a picture of a dog. based on the picture, what is on the lawn? short answer:"
    )


def test_examples_with_images_make_it_one_call():
    calls, _ = _ask(vqa, QUESTION, ["dog"], examples=[(EXAMPLE, [SHOWN])], chat=False)
    asked = " based on the picture, {} short answer:"
    assert _spelt(calls[0]) == (
        f"<shown>{asked.format('what colour is it?')} red. <image>{asked.format('what is on the lawn?')}"
    )


@pytest.mark.parametrize(
    ("scores", "results", "expected"),
    [([2.0, 1.0], [], "unanswerable"), ([1.0, 2.0], ["A dog."], "dog")],
    ids=["not known", "known"],
)
def test_vizwiz_asks_first_whether_the_answer_is_known(scores, results, expected):
    scored = CandidateScores(np.array(scores), np.array([3, 9]), 20, np.array([False, False]))
    calls, prediction = _ask(vizwiz.prompt, QUESTION, [scored, *results], chat=True)
    assert _spelt(calls[0]) == (
        f"{IMAGE_SYSTEM} [USER]: <image> {ONE_PHRASE} what is on the lawn?, is the answer known? [ASSISTANT]:"
    )
    assert calls[0].candidates == ("yes.</s>", "no.</s>")
    assert prediction == expected


def test_a_dialogue_ranks_its_candidates():
    history = (("is it a dog", "yes"), ("is it big", "no"))
    question = Question("1", (IMAGE,), text="does it run", history=history, candidates=("yes", "no"))
    scored = CandidateScores(np.array([1.0, 2.0]), np.array([1, 4]), 5, np.array([True, False]))
    calls, prediction = _ask(visdial.prompt, question, [scored], chat=True)
    assert _spelt(calls[0]) == (
        f"{IMAGE_SYSTEM} [USER]: <image></s> [USER]: is it a dog? [ASSISTANT]: yes.</s>"
        " [USER]: is it big? [ASSISTANT]: no.</s> [USER]: does it run? [ASSISTANT]:"
    )
    assert calls[0].candidates == ("yes", "no")
    assert prediction == {"reference": [1 / 5, 2 / 8], "sum": [1.0, 2.0], "tokens": [1.0, 0.5]}


@pytest.mark.parametrize(
    ("text", "kept", "answer"),
    [
        (" A man. He\nruns", "a man", "man"),
        ("It's the Eiffel tower.", "it's the eiffel tower", "eiffel tower"),
        ('an apple, "red"', 'an apple, "red"', "apple"),
        ("", "", ""),
    ],
)
def test_what_is_kept_of_an_answer(text, kept, answer):
    assert (caption_of(text), short_answer(text)) == (kept, answer)
