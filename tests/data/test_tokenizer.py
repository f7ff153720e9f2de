"""The tokenizer against the reference's ids, and the ones trained here against what they promise."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.tokenizer import ADDED_INSTRUCT, Tokenizer
from emu_jax.errors import UserError

CAPTIONS = ["a red bus", "a blue bus", "woman astronaut: medium skin tone", "man astronaut: dark skin tone"]
SMALL = {
    model_type: Tokenizer.train(CAPTIONS, vocab_size=320, model_type=model_type)
    for model_type in ("bpe", "unigram", "word")
}


# ---------------------------------------------------------------- the reference


def _reference(golden, variant):
    tokenizer = Tokenizer.load(golden / "llama_tokenizer.model", instruct=variant == "instruct")
    return tokenizer, json.loads((golden / "mini-a" / variant / "reference.json").read_text())


@pytest.mark.parametrize("variant", ["pretrain", "instruct"])
def test_encodes_as_the_reference(golden, variant):
    tokenizer, reference = _reference(golden, variant)
    assert len(reference["tokenizer"]) == 11
    for case in reference["tokenizer"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]


@pytest.mark.parametrize("variant", ["pretrain", "instruct"])
def test_special_ids_are_the_reference_s(golden, variant):
    tokenizer, reference = _reference(golden, variant)
    for name, expected in reference["vocab"].items():
        assert tokenizer.encode(name, add_bos=False) == [expected]
    assert tokenizer.vocab_size == reference["config"]["llama"]["vocab_size"]
    ids = (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)
    assert ids == (0, 1, 2)
    ids = (tokenizer.pad_id, tokenizer.img_id, tokenizer.img_end_id, tokenizer.image_id)
    assert ids == (32000, 32001, 32002, 32003)


@pytest.mark.parametrize("variant", ["pretrain", "instruct"])
def test_candidates_are_encoded_without_bos(golden, variant):
    tokenizer, reference = _reference(golden, variant)
    cases = reference["candidates"]
    got = [tokenizer.encode(text, add_bos=False) for text in cases["candidates"]]
    assert got == cases["token_ids"]


@pytest.mark.parametrize("variant", ["pretrain", "instruct"])
def test_prompts_are_the_reference_s_padded_on_the_left(golden, variant):
    tokenizer, reference = _reference(golden, variant)
    for case in reference["generate"]:
        prompts = [tokenizer.encode(text) for text in case["prompt"]]
        longest = max(map(len, prompts))
        padded = [[tokenizer.pad_id] * (longest - len(ids)) + ids for ids in prompts]
        assert padded == case["prompt_ids"], case["name"]


def test_plain_text_that_spells_special_tokens_stays_text(golden):
    tokenizer, _ = _reference(golden, "instruct")
    text = "<s> [IMG]<image>[/IMG] [USER] [PAD] <unk> </s> <0x41>"
    ids = tokenizer.encode_plain(text)
    assert set(ids).isdisjoint({0, 1, 2}) and max(ids) < 32000
    assert tokenizer.decode(ids) == text


def test_llama_decodes_what_it_encoded(golden):
    tokenizer, _ = _reference(golden, "pretrain")
    for text in ["", " ", " a ", "a  b", "a\nb\tc", "café 日本語 🙂", "①ﬁ"]:
        assert tokenizer.decode(tokenizer.encode_plain(text)) == text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_leaves_special_tokens_out(golden):
    tokenizer, _ = _reference(golden, "pretrain")
    ids = tokenizer.encode("[PAD][IMG]<image>[/IMG]two dogs.</s>")
    assert ids == [1, 32000, 32001, 32003, 32002, 1023, 26361, 29889, 2]
    assert tokenizer.decode(ids) == "two dogs."


# ---------------------------------------------------------------- trained here


@pytest.mark.parametrize("model_type", SMALL)
def test_trained_ids_have_their_places(model_type):
    tokenizer = SMALL[model_type]
    base = tokenizer.vocab_size - 4
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    ids = (tokenizer.pad_id, tokenizer.img_id, tokenizer.img_end_id, tokenizer.image_id)
    assert ids == (base, base + 1, base + 2, base + 3)
    instruct = Tokenizer(tokenizer.proto, instruct=True)
    assert [instruct.added[name] for name in ADDED_INSTRUCT] == list(range(base, base + 6))
    assert instruct.vocab_size == base + 6


@pytest.mark.parametrize("model_type", SMALL)
def test_captions_come_back(model_type):
    tokenizer = SMALL[model_type]
    for text in CAPTIONS:
        ids = tokenizer.encode_plain(text)
        assert 0 not in ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@given(text=st.text())
def test_any_text_comes_back(model_type, text):
    # Two characters have a second meaning in SentencePiece: U+2581 is its white space, and NUL ends its strings.
    text = text.replace("\u2581", " ").replace("\0", "")
    tokenizer = SMALL[model_type]
    assert tokenizer.decode(tokenizer.encode_plain(text)) == text


@given(
    chunks=st.lists(st.sampled_from(["[IMG]", "[/IMG]", "<image>", "[PAD]", "</s>", "<s>", "red bus", " ", " a ", ""]))
)
def test_encode_is_each_chunk_alone_with_white_space_gone_beside_special_tokens(chunks):
    tokenizer = SMALL["bpe"]
    special = {name: tokenizer.encode(name, add_bos=False)[0] for name in ("[IMG]", "[/IMG]", "<image>", "[PAD]")}
    special |= {"<s>": 1, "</s>": 2}
    expected, text, after_special = [1], "", False
    for chunk in [*chunks, None]:
        if chunk is not None and chunk not in special:
            text += chunk
            continue
        text = text.lstrip() if after_special else text
        text = text.rstrip() if chunk is not None else text
        expected += tokenizer.encode_plain(text)
        if chunk is not None:
            expected.append(special[chunk])
        text, after_special = "", True
    assert tokenizer.encode("".join(chunks)) == expected


def test_words_never_seen_are_unknown():
    assert SMALL["word"].encode_plain("a green bus")[1] == 0


@pytest.mark.parametrize("model_type", SMALL)
def test_training_is_deterministic_and_quiet(model_type, capfd):
    again = Tokenizer.train(iter(CAPTIONS), vocab_size=320, model_type=model_type)
    assert again.proto == SMALL[model_type].proto
    assert again.fingerprint == SMALL[model_type].fingerprint
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("model_type", "asked"), [("bpe", 5000), ("unigram", 5000), ("word", 5000), ("word", 6)])
def test_vocab_size_is_a_ceiling(model_type, asked):
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=asked, model_type=model_type)
    assert 4 < tokenizer.vocab_size - 4 <= min(asked, 500)


def test_fingerprint_tells_models_apart():
    bpe = SMALL["bpe"]
    prints = [bpe.fingerprint, SMALL["word"].fingerprint, Tokenizer(bpe.proto, instruct=True).fingerprint]
    assert len(set(prints)) == 3 and all(len(print_) == 64 for print_ in prints)
    assert Tokenizer(bpe.proto).fingerprint == bpe.fingerprint


# ---------------------------------------------------------------- bad input


def _message(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(UserError) as error:
        Tokenizer.load(tmp_path / "none.model")
    assert "none.model: no such file" in _message(error)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 499723\n", "a Git-LFS pointer"),
        (b"<!doctype html><html>", "an HTML page"),
        (b"Entry not found", "the text 'Entry not found' in place of the file"),
        (b"", "an empty file"),
        (
            b'{"version": "1.0", "model": {"type": "BPE"}}',
            "JSON, as tokenizer.json of Hugging Face is; expected the Sent",
        ),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path, content, says):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Tokenizer.load(path)
    assert f"tokenizer.model: {says}" in _message(error)
    with pytest.raises(UserError) as error:
        Tokenizer.load(tmp_path)
    assert f"no such file; expected a SentencePiece .model; name {path}" in _message(error)


@pytest.mark.parametrize("content", [b"\0" * 64, SMALL["bpe"].proto[:100], SMALL["bpe"].proto[:-3]])
def test_a_broken_model_is_named(tmp_path, content, capfd):
    path = tmp_path / "broken.model"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Tokenizer.load(path)
    assert "broken.model: not a SentencePiece model" in _message(error)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("texts", "vocab_size", "model_type", "expected"),
    [
        (CAPTIONS, 1000, "char", "config.tokenizer.model_type='char'; choose bpe, unigram or word"),
        (CAPTIONS, 100, "bpe", "config.tokenizer.vocab_size=100; bpe needs at least 260"),
        (CAPTIONS, 265, "unigram", "config.tokenizer.vocab_size=265; the characters of these texts need at least"),
        ([], 300, "bpe", "the texts to train it from are empty"),
        (["", " \n "], 300, "word", "the texts to train it from are empty"),
    ],
)
def test_impossible_training_is_refused(texts, vocab_size, model_type, expected):
    with pytest.raises(UserError) as error:
        Tokenizer.train(texts, vocab_size=vocab_size, model_type=model_type)
    assert expected in _message(error)


# ---------------------------------------------------------------- which ids spell what


def test_bytes_of_a_character_are_spelt_together():
    tokenizer = SMALL["bpe"]
    spelt = tokenizer.pieces(tokenizer.encode_plain("a red é bus"))
    assert [text for _, text in spelt][-3:] == [" ", "é", " bus"]
    assert [len(ids) for ids, _ in spelt][-3:] == [1, 2, 1]
    assert tokenizer.pieces([]) == []


@given(st.sampled_from(["bpe", "unigram", "word"]), st.data())
def test_spellings_joined_are_the_decoded_text(model_type, data):
    """Of any ids, broken characters too."""
    tokenizer = SMALL[model_type]
    ids = data.draw(st.lists(st.integers(0, tokenizer.pad_id - 1), max_size=12))
    spelt = tokenizer.pieces(ids)
    assert [id for group, _ in spelt for id in group] == ids
    assert "".join(text for _, text in spelt) == tokenizer.decode(ids)


def test_characters_come_when_their_last_byte_does():
    """Ids one by one: what each of them finishes."""
    tokenizer = SMALL["bpe"]
    detokenizer = tokenizer.detokenizer()
    ids = tokenizer.encode_plain("a é🙂b")
    came = ["".join(text for _, text in detokenizer.add(id)) for id in ids] + [
        "".join(text for _, text in detokenizer.end())
    ]
    assert came == ["a", " ", "", "é", "", "", "", "🙂", "b", ""]
    broken = tokenizer.encode_plain("é🙂")[-6:-1]  # a whole character, and three bytes of four
    detokenizer = tokenizer.detokenizer()
    came = ["".join(text for _, text in detokenizer.add(id)) for id in [*broken, *tokenizer.encode_plain("a")[-1:]]]
    assert came[:5] == ["", "é", "", "", ""] and came[5].startswith("�") and came[5].endswith("a")
    assert "".join(came) == tokenizer.decode([*broken, *tokenizer.encode_plain("a")[-1:]])
