"""Chats: the sequence that training packs, the answers of one whole prompt, a cache that is read once, what stops."""

import logging

import jax
import numpy as np
import pytest
from PIL import Image as PIL

from configs import models
from emu_jax import Emu
from emu_jax.data.document import Document, Image, Text
from emu_jax.data.images import resize
from emu_jax.data.sequence import tokenize_document
from emu_jax.data.system_messages import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.generate import chat as module
from emu_jax.generate import text
from emu_jax.generate.chat import Chat
from emu_jax.generate.messages import Video
from emu_jax.generate.model import _encode
from emu_jax.generate.prompt import PromptBatch, embedding_index
from emu_jax.models import emu
from tests.train import tiny

SIZE, QUERIES = 16, 4
TEXTS = [
    "what is this ? which colour has the bar and a cross",
    "it is red :",
    "green",
    "blue",
    IMAGE_SYSTEM,
    VIDEO_SYSTEM,
]
PROTOS = {
    "word": Tokenizer.train(TEXTS, vocab_size=90, model_type="word").proto,
    "bpe": Tokenizer.train(TEXTS, vocab_size=300, model_type="bpe").proto,  # most of its pieces are bytes
}
DRAW = np.random.default_rng(0)
CAT, DOG, *FRAMES = DRAW.integers(0, 256, (10, SIZE, SIZE, 3), np.uint8)


def make(kind: str, *, seed: int = 1, context: int = 512) -> Emu:
    """Random parameters, larger than at the start of training: otherwise every token is as likely as any other."""
    tokenizer = Tokenizer(PROTOS[kind], instruct=True)
    fields = models.debug()
    fields.llama.vocab_size, fields.llama.context = tokenizer.vocab_size, context
    config = emu.EmuConfig.from_dict(fields)
    params = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, emu.init(config, jax.random.key(seed)))
    if kind == "word":  # it says words alone: no other token is ever the likeliest
        mute = [id for id in tokenizer.special if id != tokenizer.eos_id]
        params["llama"]["lm_head"]["kernel"] = params["llama"]["lm_head"]["kernel"].at[:, np.array(mute)].set(0.0)
    return Emu(config, params, emu.initial_statistics(config), tokenizer)


@pytest.fixture(scope="module", params=["word", "bpe"])
def model(request) -> Emu:
    return make(request.param)


@pytest.fixture(scope="module")
def words() -> Emu:
    return make("word")


@pytest.fixture(scope="module")
def spelling() -> Emu:
    return make("bpe")


@pytest.fixture(scope="module")
def published(golden) -> Emu:
    file = golden / "mini-a/instruct/Emu-instruct.pt"
    return Emu.load(file, tokenizer=golden / "llama_tokenizer.model", vision_head_dim=12)


def afresh(model: Emu, tokens: list[int], images: list[np.ndarray], count: int, **decoding) -> tuple[list[int], float]:
    """The answer to the same ids as one whole prompt, by what `generate_text` calls: ids and score."""
    padding = -len(tokens) % 32
    ids = np.asarray([[model.tokenizer.pad_id] * padding + tokens], np.int32)
    index = embedding_index(ids == model.tokenizer.image_id)
    size = model.config.vision.image_size
    stacked = np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)
    batch = PromptBatch(ids, np.arange(ids.shape[1])[None] >= padding, stacked, index)
    found, score = text.generate(
        model.params,
        model._embed_batch(batch),
        batch.valid,
        jax.random.key(decoding.pop("seed", 0)),
        text.Decoding(**decoding),
        config=model.config,
        ends=model.ends,
        max_new_tokens=count,
    )
    found = np.asarray(found)[0].tolist()
    eos = model.tokenizer.eos_id
    return found[: found.index(eos)] if eos in found else found, float(score[0])


def check_last(chat: Chat, images: list[np.ndarray], count: int, **decoding) -> None:
    """The last turn's answer is that of the whole conversation, read anew."""
    answer = chat.history[-1].answer
    prompt = chat.tokens[: -len(answer.token_ids) - 1]
    expected, score = afresh(chat.model, prompt, images, count, **decoding)
    assert answer.token_ids == expected, f"expected {expected}, got {answer.token_ids}"
    np.testing.assert_allclose(answer.score, score, rtol=1e-4)


# ---------------------------------------------------------------- the sequence


def packed(tokenizer: Tokenizer, parts: list, queries: int = QUERIES) -> list[int]:
    rows = {"row_tokens": 4096, "row_images": 64}
    (found,) = tokenize_document(Document(tuple(parts)), tokenizer, queries=queries, **rows)
    return found.tokens.tolist()


def test_three_turns_literally(words):
    chat = words.chat("the bar")
    chat.add([CAT, "what is this ?"], "it is red")
    chat.add(" and a cross ? ", "green")
    chat.add(["which", " colour has", CAT, Video([CAT, DOG])], "blue")
    special = words.tokenizer.special
    shown = " ".join(special.get(id) or words.tokenizer.decode([id]) for id in chat.tokens)
    image = "[IMG] <image> <image> <image> <image> [/IMG]"
    assert shown == (
        f"<s> the bar [USER] : {image} what is this ? [ASSISTANT] : it is red </s> "
        f"[USER] : and a cross ? [ASSISTANT] : green </s> "
        f"[USER] : which colour has {image} {image} {image} [ASSISTANT] : blue </s>"
    )


@pytest.mark.parametrize("system", [None, "", "be brief"])
@pytest.mark.parametrize("kind", ["word", "bpe", "llama"])
def test_three_turns_are_what_training_packs(request, kind, system):
    if kind == "llama":
        model = request.getfixturevalue("published")
        cat, dog = (np.resize(image, (28, 28, 3)) for image in (CAT, DOG))
    else:
        model, cat, dog = make(kind), CAT, DOG
    chat = model.chat(system)
    chat.add([cat, "what is this ?"], "it is red")
    chat.add("[USER] and\nthe </s> bar ?", "a cross: café 日本")  # names that a text spells are text
    chat.add(["which", dog, "colour", cat], "green")
    message = IMAGE_SYSTEM if system is None else system
    parts = [Text(message, "system")] if message else []
    parts += [Image(cat, "0"), Text("what is this ?", "user"), Text("it is red", "assistant")]
    parts += [Text("[USER] and\nthe </s> bar ?", "user"), Text("a cross: café 日本", "assistant")]
    parts += [Text("which", "user"), Image(dog, "1"), Text("colour", "user"), Image(cat, "2"), Text("", "user")]
    parts += [Text("green", "assistant")]
    assert chat.tokens == packed(model.tokenizer, parts)


def test_a_conversation_that_was_answered_is_what_training_packs(words):
    """Its own answers, three of them, learnt as they were said."""
    chat, parts = words.chat("the bar"), [Text("the bar", "system")]
    for number, message in enumerate(([CAT, "what is this ?"], ["which colour"], [DOG, "and this ?"])):
        answer = chat.say(message, max_new_tokens=5)
        assert words.tokenizer.encode_plain(answer.text) == answer.token_ids, "the test needs answers of words"
        parts += [Image(part, str(number)) if isinstance(part, np.ndarray) else Text(part, "user") for part in message]
        parts.append(Text(answer.text, "assistant"))
    assert chat.tokens == packed(words.tokenizer, parts)


def test_the_paper_s_system_messages(words):
    def begins(message) -> str:
        chat = words.chat()
        chat.add(message, "red")
        return next((s for s in (IMAGE_SYSTEM, VIDEO_SYSTEM) if chat.tokens[1:-1] > [] and starts(chat.tokens, s)), "")

    def starts(tokens: list[int], system: str) -> bool:
        ids = words.tokenizer.encode(system)  # [IMG] and [/IMG] in it are tokens, as in the reference's prompts
        return tokens[: len(ids)] == ids

    assert words.tokenizer.img_id in words.tokenizer.encode(IMAGE_SYSTEM)
    assert begins([CAT, "what is this ?"]) == IMAGE_SYSTEM
    assert begins(["what is this ?", Video(FRAMES), CAT]) == VIDEO_SYSTEM
    assert begins("what is this ?") == ""


# ---------------------------------------------------------------- answers


MESSAGES = ([CAT, "what is this ?"], ["which colour has the bar"], [DOG, "and this ?"])


@pytest.mark.parametrize("decoding", [{}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "seed": 5}])
def test_answers_are_those_of_the_whole_conversation_as_one_prompt(words, decoding):
    chat, prompt = words.chat("the bar"), ["the bar"]
    for message in MESSAGES:
        prompt += [" [USER]: ", *message, " [ASSISTANT]:"]
        expected = words.generate_text([prompt], max_new_tokens=6, **decoding)[0]
        answer = chat.say(message, max_new_tokens=6, **decoding)
        assert answer.token_ids == expected.token_ids
        assert answer.text == expected.text
        np.testing.assert_allclose(answer.score, expected.score, rtol=1e-4)
        assert words.tokenizer.encode_plain(answer.text) == answer.token_ids, "the test needs answers of words"
        prompt += [f" {answer.text}</s>"]
    assert len({turn.answer.text for turn in chat.history}) == 3, "three answers that differ"


@pytest.mark.slow
def test_beams_between_greedy_answers(words):
    chat, prompt = words.chat(), [IMAGE_SYSTEM]
    for message, beams in zip(MESSAGES, (1, 3, 1), strict=True):
        prompt += [" [USER]: ", *message, " [ASSISTANT]:"]
        options = {"max_new_tokens": 5, "num_beams": beams, "length_penalty": 0.5}
        expected = words.generate_text([prompt], **options)[0]
        answer = chat.say(message, **options)
        assert answer.token_ids == expected.token_ids, f"{beams} beams"
        np.testing.assert_allclose(answer.score, expected.score, rtol=1e-4)
        prompt += [f" {answer.text}</s>"]


def test_the_golden_model_over_three_turns(published):
    cat, dog = DRAW.integers(0, 256, (2, 28, 28, 3), np.uint8)
    chat, shown = published.chat(), [cat]
    for message in ([cat, "what is this?"], "and which colour has it?", [dog, "and this one?"]):
        shown = [cat, dog] if message[0] is dog else shown
        chat.say(message, max_new_tokens=12)
        check_last(chat, shown, 12)


# ---------------------------------------------------------------- the cache


@pytest.fixture
def fed(monkeypatch) -> list[int]:
    """How many positions went through the model, by call."""
    counts: list[int] = []
    prefill, step = module._prefill_chunk, module._next_token

    def counting_prefill(params, cache, slot, tokens, visual, is_visual, count, **static):
        counts.append(int(count))
        return prefill(params, cache, slot, tokens, visual, is_visual, count, **static)

    def counting_step(*arguments, **static):
        counts.append(1)
        return step(*arguments, **static)

    monkeypatch.setattr(module, "_prefill_chunk", counting_prefill)
    monkeypatch.setattr(module, "_next_token", counting_step)
    return counts


def test_every_position_is_read_once(words, fed):
    chat = words.chat("the bar")
    for number, message in enumerate(MESSAGES):
        before, left = len(chat.tokens), len(chat.tokens) - sum(fed)
        fed_before = sum(fed)
        answer = chat.say(message, max_new_tokens=6)
        own = len(chat.tokens) - before
        turn = chat.history[-1]
        # What the last answer left unread (its </s>, and a last token that nothing followed), and the message.
        assert turn.read == left + own - len(answer.token_ids) - 1
        assert left <= (2 if number else 0)
        assert sum(fed) - fed_before <= own + left
        assert 1 <= len(chat.tokens) - sum(fed) <= 2, "all but what nothing was asked after"


def test_a_third_turn_compiles_nothing(caplog):
    model = make("word", context=480)  # which no other test compiles for

    def compiled(chat: Chat, message, **decoding) -> list[str]:
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.DEBUG):
            chat.say(message, max_new_tokens=6, **decoding)
        return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]

    chat = model.chat("the bar")
    assert any("_next_token" in line for line in compiled(chat, MESSAGES[0])), "the first turn compiles"
    compiled(chat, MESSAGES[1])
    sizes = [
        program._cache_size() for program in (module._prefill_chunk, module._first_token, module._next_token, _encode)
    ]
    assert compiled(chat, MESSAGES[2]) == []
    assert compiled(chat, "what is this ?", temperature=0.5, top_k=3, top_p=0.5, seed=2, min_length=3) == []
    other = model.chat("the bar")
    assert compiled(other, MESSAGES[2], temperature=1) == [], "another chat of the model"
    assert sizes == [
        program._cache_size() for program in (module._prefill_chunk, module._first_token, module._next_token, _encode)
    ]


def test_the_cache_is_updated_in_place(words):
    chat = words.chat()
    chat.say("what", max_new_tokens=2)
    before = chat._cache
    chat.say("is this", max_new_tokens=3)
    assert before.k.is_deleted() and before.v.is_deleted()
    assert chat._cache.k.shape == before.k.shape


@pytest.mark.slow
def test_to_the_last_position_of_the_context():
    """Turns of many lengths, some longer than a piece, until nothing more fits."""
    context = 100
    model = make("word", context=context)
    chat = model.chat("")
    for length in (3, 34, 1, 5, 0):  # words; the last are as many as fit
        mark = 5 if not chat.tokens else 4  # <s>, [USER]: and [ASSISTANT]:
        length = length or context - len(chat.tokens) - mark - 3
        chat.say("red " * length, max_new_tokens=3, min_length=9)
        check_last(chat, [], 3, min_length=9)
    assert len(chat.tokens) == context + 1, "all positions, and the </s> that nothing will follow"
    before = chat.tokens
    with pytest.raises(UserError, match=rf"exceed the model's context of {context}; take turns back, reset the chat"):
        chat.say("red", max_new_tokens=1)
    assert chat.tokens == before


def test_by_default_an_answer_is_what_the_context_leaves():
    chat = make("word", context=100).chat("")
    assert len(chat.say("red", min_length=200).token_ids) == 100 - 6  # <s> [USER]: red [ASSISTANT]:


# ---------------------------------------------------------------- streaming


@pytest.mark.parametrize("seed", range(4))
def test_pieces_joined_are_the_answer_whatever_the_bytes(spelling, seed):
    chat = spelling.chat("")
    pieces = list(chat.stream([CAT, "what"], max_new_tokens=60, temperature=3.0, seed=seed, min_length=60))
    answer = chat.history[-1].answer
    assert "".join(pieces) == answer.text == spelling.tokenizer.decode(answer.token_ids)
    assert len(pieces) > 4
    assert any(spelling.tokenizer._model.is_byte(id) for id in answer.token_ids if id < spelling.tokenizer.pad_id)
    check_last(chat, [CAT], 60, temperature=3.0, seed=seed, min_length=60)


def test_pieces_come_one_by_one(words, fed):
    chat = words.chat("")
    pieces = chat.stream("what is this ?", max_new_tokens=6, min_length=9)
    assert fed == [], "nothing is read before a piece is asked for"
    seen = []
    for number, _ in enumerate(pieces):
        seen.append(fed.count(1))
        assert chat.history == (), f"the turn is finished after piece {number}"
    assert seen == sorted(set(seen)), f"steps at each piece: {seen}"


def test_a_stream_that_is_closed_ends_the_answer_with_what_was_said(model):
    chat = model.chat()
    pieces = chat.stream([CAT, "what is this ?"], max_new_tokens=30, min_length=40)
    said = [next(pieces) for _ in range(3)]
    pieces.close()
    (turn,) = chat.history
    assert turn.answer.text == "".join(said)
    assert chat.tokens[-len(turn.answer.token_ids) - 1 :] == [*turn.answer.token_ids, model.tokenizer.eos_id]
    assert next(pieces, None) is None
    chat.say([DOG, "and this ?"], max_new_tokens=6)
    check_last(chat, [CAT, DOG], 6)


def test_a_stream_that_is_left_ends_where_the_chat_goes_on(words):
    chat = words.chat()
    left = chat.stream([CAT, "what is this ?"], max_new_tokens=30, min_length=40)
    said = next(left)
    unread = chat.stream("which colour", max_new_tokens=4)
    assert [turn.answer.text for turn in chat.history] == [said]
    chat.say("and this ?", max_new_tokens=4)
    assert [turn.message for turn in chat.history] == [(CAT, "what is this ?"), ("and this ?",)], "unread: not said"
    assert list(unread) == [] == list(left)
    check_last(chat, [CAT], 4)


@pytest.mark.parametrize("steps", [0, 4])
def test_an_interruption_loses_no_turn_but_its_own(words, monkeypatch, steps):
    """Ctrl-C within a step, whose cache is lost: it was given away and nothing came back."""
    chat = words.chat()
    chat.say([CAT, "what is this ?"], max_new_tokens=4)
    before = chat.tokens
    step, calls = module._next_token, []

    def interrupted(*arguments, **static):
        result = step(*arguments, **static)
        calls.append(1)
        if len(calls) > steps:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(module, "_next_token", interrupted)
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        for piece in chat.stream([DOG, "and this ?"], max_new_tokens=20, min_length=30):
            pieces.append(piece)
    monkeypatch.setattr(module, "_next_token", step)
    assert [turn.answer.text for turn in chat.history][1:] == ["".join(pieces)]
    assert chat.tokens[: len(before)] == before
    chat.say("which colour", max_new_tokens=5)
    check_last(chat, [CAT, DOG], 5)


def test_an_error_takes_the_turn_back(words, monkeypatch):
    chat = words.chat()
    chat.say([CAT, "what is this ?"], max_new_tokens=4)
    before = chat.tokens, chat.history
    step, calls = module._next_token, []

    def failing(*arguments, **static):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return step(*arguments, **static)

    monkeypatch.setattr(module, "_next_token", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        chat.say([DOG, "and this ?"], max_new_tokens=20, min_length=30)
    assert (chat.tokens, chat.history) == before
    chat.say([DOG, "and this ?"], max_new_tokens=5)
    check_last(chat, [CAT, DOG], 5)


# ---------------------------------------------------------------- taking back


def test_what_is_taken_back_was_never_said(words):
    chat = words.chat()
    with pytest.raises(UserError, match="chat: there is no turn to take back"):
        chat.undo()
    first = chat.say(MESSAGES[0], max_new_tokens=5)
    tokens = chat.tokens
    chat.say([DOG, "red red red red"], max_new_tokens=9)
    assert chat.undo().message == (DOG, "red red red red")
    assert chat.tokens == tokens and [turn.answer for turn in chat.history] == [first]
    chat.say(MESSAGES[2], max_new_tokens=5)
    check_last(chat, [CAT, DOG], 5)
    chat.reset()
    assert chat.tokens == [] and chat.history == ()
    chat.say("which colour", max_new_tokens=5)
    assert words.tokenizer.img_id not in chat.tokens, "the system message is chosen anew"
    check_last(chat, [], 5)


# ---------------------------------------------------------------- videos


def test_a_video_is_eight_images(words, tmp_path):
    file = tmp_path / "clip.gif"
    greys = [PIL.new("RGB", (SIZE, SIZE), (10 * n, 255 - 10 * n, 100)) for n in range(20)]
    greys[0].save(file, save_all=True, append_images=greys[1:], duration=40, lossless=True)
    chat = words.chat()
    chat.say([Video(file), "what is this ?"], max_new_tokens=4)
    ids = words.tokenizer.encode(VIDEO_SYSTEM)
    assert chat.tokens[: len(ids)] == ids
    assert chat.tokens.count(words.tokenizer.image_id) == 8 * QUERIES
    shown = [np.asarray(PIL.open(file).convert("RGB"))]
    images = []
    with PIL.open(file) as video:
        for index in [1, 3, 6, 8, 11, 13, 15, 18]:  # frame_indices(20)
            video.seek(index)
            images.append(np.asarray(video.convert("RGB")))
    check_last(chat, images, 4)
    other = words.chat()
    other.say([*images, "what is this ?"], max_new_tokens=4)
    assert other.tokens.count(words.tokenizer.image_id) == 8 * QUERIES
    one = words.chat()
    one.say([file, "what is this ?"], max_new_tokens=4)  # a GIF is an image where it is not said to be a video
    check_last(one, shown, 4)


# ---------------------------------------------------------------- what cannot be


FAST = {"sampler": "ddim", "steps": 2, "guidance": 2.0}


@pytest.fixture(scope="module")
def drawer(instructed, drawing) -> Emu:
    return tiny.that_draws(Emu.load(instructed, decoder=drawing).merged())


def test_an_answer_that_begins_an_image_is_drawn(drawer):
    chat = drawer.chat("")
    answer = chat.say("draw a red bar")
    assert (answer.text, answer.ended_by) == ("", "image")
    drawn = chat.draw(seed=3, **FAST)
    prompt = ["[USER]: draw a red bar [ASSISTANT]:"]
    np.testing.assert_allclose(drawn.embeddings, drawer.generate_embeddings([prompt])[0], atol=1e-5)
    alone = drawer.generate_image(prompt, seed=3, **FAST)
    np.testing.assert_allclose(np.asarray(drawn.image, int), np.asarray(alone.image, int), atol=1)
    assert chat.history[-1].image is drawn


def test_a_drawn_image_is_read_like_one_that_was_shown(drawer):
    """The tokens are those that training packs, and the next answer is that of the whole conversation."""
    chat = drawer.chat("")
    chat.say("draw a red bar")
    shown = resize(np.asarray(chat.draw(**FAST).image), SIZE)
    assert chat.say("and a blue one", max_new_tokens=3).ended_by == "image"
    parts = [Text("draw a red bar", "user"), Image(shown, "0"), Text("", "assistant")]
    parts += [Text("and a blue one", "user"), Text("", "assistant")]
    queries = drawer.config.causal.queries
    assert chat.tokens == packed(drawer.tokenizer, parts, queries)
    second = chat.draw(**FAST)
    (before, after) = drawer.encode_images(shown[None])[0], chat._images[0]
    np.testing.assert_allclose(after, before, atol=1e-5)
    prompt = ["[USER]: draw a red bar [ASSISTANT]:", shown, "</s>[USER]: and a blue one [ASSISTANT]:"]
    np.testing.assert_allclose(second.embeddings, drawer.generate_embeddings([prompt])[0], atol=1e-4)
    chat.undo()
    chat.undo()
    assert chat.tokens == []


def test_what_cannot_be_drawn(drawer, words):
    with pytest.raises(UserError, match="there is no answer yet"):
        drawer.chat("").draw()
    said = words.chat("")
    said.say("what is this ?", max_new_tokens=2)
    with pytest.raises(UserError, match="the last answer began none"):
        said.draw()
    chat = drawer.chat("")
    chat.say("a red bar")
    before = chat.tokens
    with pytest.raises(UserError, match="steps=0"):
        chat.draw(steps=0)
    full = Emu(drawer.config, drawer.params, drawer.statistics, drawer.tokenizer).chat("")
    full.say("a red bar")
    with pytest.raises(UserError, match="no visual decoder"):
        full.draw()
    assert chat.tokens == before
    chat.draw(**FAST)
    with pytest.raises(UserError, match="drawn already"):
        chat.draw(**FAST)


def test_models_of_pretraining_do_not_chat(trained):
    expected = (
        r"this model does not chat: its tokenizer has no \[USER\] and no \[ASSISTANT\]; load an instruction-tuned"
    )
    with pytest.raises(UserError, match=expected):
        Emu.load(trained).chat()


def test_messages_that_cannot_be_change_nothing(words, tmp_path):
    (tmp_path / "words.png").write_text("not an image")
    (tmp_path / "words.mp4").write_text("not a video")
    chat = words.chat()
    chat.say([CAT, "what is this ?"], max_new_tokens=4)
    before = chat.tokens, chat.history
    cases = [
        ([tmp_path / "gone.png", "what"], {}, r"gone\.png: no such image file"),
        (["what", tmp_path / "words.png"], {}, r"words\.png: not a readable image"),
        ([CAT, tmp_path / "gone.mp4"], {}, r"gone\.mp4: no such video file"),
        (
            [CAT, tmp_path / "words.mp4"],
            {},
            r"words\.mp4: Invalid data found when processing input; expected a whole video",
        ),
        ([Video([])], {}, r"Video\(\[\]\): expected a pathlib\.Path or a list of images"),
        ([Video(tmp_path / "words.mp4", 0)], {}, r"words\.mp4: frames=0; expected at least 1"),
        ("  ", {}, "turn 2: the message is empty; expected a text, an image or a video"),
        ([], {}, "turn 2: the message is empty"),
        (CAT, {}, r"turn 2: expected a text or a list of texts, images and videos; wrap it in \[\]"),
        ([3], {}, "turn 2: expected a text, a PIL image, an array or a pathlib.Path, got int"),
        ("\udcff", {}, "turn 2: not Unicode text"),
        (
            [CAT, "red " * 600],
            {},
            r"turn 2: its 610 tokens after \d+, and 1 new ones, exceed the model's context of 512",
        ),
        ("red", {"max_new_tokens": 500}, "and 500 new ones, exceed the model's context of 512"),
        ("red", {"max_new_tokens": 0}, "max_new_tokens=0; expected at least 1 of each"),
        ("red", {"top_p": 0.0}, r"top_p=0\.0; expected temperature >= 0 and 0 < top_p <= 1"),
    ]
    for message, options, expected in cases:
        with pytest.raises(UserError, match=expected) as caught:
            chat.say(message, **options)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=expected):
            chat.stream(message, **options)  # at once, not at the first piece
        assert (chat.tokens, chat.history) == before, expected
    with pytest.raises(UserError, match=r"num_beams=2 and temperature=0\.5; beams do not sample"):
        chat.say("red", num_beams=2, temperature=0.5)
    chat.say([DOG, "and this ?"], max_new_tokens=5)
    check_last(chat, [CAT, DOG], 5)
