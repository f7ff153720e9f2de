"""Sources of examples, mixed by weights."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PIL

from emu_jax.data.counts import figures
from emu_jax.data.examples import ExamplePipeline, ExamplesConfig, Images, Mixed, open_examples
from emu_jax.errors import UserError


class Named:
    """Examples that say whose they are."""

    def __init__(self, name: str, count: int):
        self.fingerprint, self._name, self._count = f"{name} {count}", name, count

    def __len__(self) -> int:
        return self._count

    def key(self, index: int) -> str:
        return f"{self._name}{index}"

    def examples(self, drawn):
        return [{"value": np.array([ord(self._name), index, rng.integers(100)])} for index, rng in drawn]


def data(**fields) -> ExamplesConfig:
    return ExamplesConfig.from_dict({"source": "", "split": "train", "seed": 0, "batch": 8} | fields)


def mixture(**weights) -> dict:
    return {name: {"source": name, "weight": weight} for name, weight in weights.items()}


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.5, 1.0, 2.0, 3.5, 7.0])), min_size=1, max_size=4),
)
def test_an_epoch_has_every_example_and_each_source_its_share(parts):
    names = "abcd"[: len(parts)]
    sources = {name: Named(name, count) for name, (count, _) in zip(names, parts, strict=True)}
    weights = {name: weight for name, (_, weight) in zip(names, parts, strict=True)}
    mixed = Mixed(sources, weights)
    drawn = [(index, np.random.default_rng(index)) for index in range(len(mixed))]
    values = [example["value"] for example in mixed.examples(drawn)]
    seen = collections.Counter((chr(who), int(index)) for who, index, _ in values)
    assert set(seen) == {(name, index) for name, source in sources.items() for index in range(len(source))}
    assert [mixed.key(index) for index, _ in drawn] == [f"{chr(who)}{index}" for who, index, _ in values]
    total, shares = sum(weights.values()), collections.Counter(chr(who) for who, _, _ in values)
    for name, weight in weights.items():
        assert abs(shares[name] - len(mixed) * weight / total) <= len(parts), (shares, weights)


def test_the_stream_has_the_shares_and_resumes():
    config = data(mixture=mixture(a=7, b=2))
    source, parts = open_examples(config, lambda name, split: Named(name, {"a": 30, "b": 50}[name]))
    assert [len(part) for part in parts] == [30, 50]
    stream = ExamplePipeline(source, config)
    values = []
    for number in range(90):
        if number == 40:
            state = stream.get_state()
        values.append(next(stream)["value"])
    shares = collections.Counter(chr(who) for who in np.concatenate(values)[:, 0])
    assert abs(shares["a"] / 720 - 7 / 9) < 0.03, shares
    again = ExamplePipeline(source, config)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["value"], values[40])
    other = ExamplePipeline(Mixed({"a": parts[0], "b": parts[1]}, {"a": 1, "b": 1}), config)
    with pytest.raises(UserError, match="records"):
        other.set_state(state)


def test_one_source_is_read_as_it_is():
    source, parts = open_examples(data(source="a", mixture=mixture(b=1)), lambda name, split: Named(name, 3))
    assert source is parts[0] and source.fingerprint == "a 3"
    source, _ = open_examples(data(mixture=mixture(a=0, b=1)), lambda name, split: Named(name, 3))
    assert source.key(0) == "b0", "a weight of 0 leaves a source out"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"source": "a", "weigth": 1},
            r"config\.data\.mixture\.x\.weigth is no field of MixedSource; did you mean weig",
        ),
        ({"source": "a", "weight": -1.0}, r"config\.data\.mixture\.x\.weight=-1\.0; expected 0 or more"),
        (
            {"source": ""},
            r"config\.data\.mixture\.x\.source is empty; name one, or set config\.data\.mixture\.x\.weigh",
        ),
    ],
)
def test_what_cannot_be(entry, message):
    with pytest.raises(UserError, match=message):
        open_examples(data(mixture={"x": entry}), lambda name, split: Named(name, 3))


# ---------------------------------------------------------------- faults

COUNT, BAD = 12, (2, 5, 6)


def write_images(folder, bad=BAD):
    """A JSONL of grey images, some of which are missing or broken; image n is grey 10 n."""
    lines = []
    for n in range(COUNT):
        PIL.new("RGB", (8, 8), (10 * n,) * 3).save(folder / f"{n}.png")
        lines.append(json.dumps({"image": f"{n}.png", "text": f"{n}"}))
    for n in bad:
        (folder / f"{n}.png").unlink() if n % 2 else (folder / f"{n}.png").write_bytes(b"<html>")
    (folder / "a.jsonl").write_text("\n".join(lines))
    return str(folder / "a.jsonl")


def greys(stream: ExamplePipeline, batches: int) -> np.ndarray:
    """Of each image, 10 n [batches, rows]."""
    return np.stack([next(stream)["pixels"][:, 0, 0, 0] for _ in range(batches)])


def test_another_image_is_drawn_for_an_unreadable_one(tmp_path):
    config = data(source=write_images(tmp_path), batch=6, max_faults=0.5)

    def opened(own=None, config=config):
        return ExamplePipeline(Images(config.source, "", 8, config.max_faults), config, own=own)

    stream = opened()
    found = greys(stream, 8)
    assert set(found.ravel()) == {10 * n for n in range(COUNT) if n not in BAD}
    drawn = 8 * 6 / COUNT  # epochs
    counts = figures([stream.counts()])
    assert counts["faulty_documents"] >= drawn * len(BAD), "one that is drawn may be faulty itself"
    assert counts["images"] == 6
    parts = [greys(opened(own), 8) for own in ([0, 1, 2], [3, 4, 5])]
    np.testing.assert_array_equal(np.concatenate(parts, 1), found)
    state = opened()
    greys(state, 3)
    again = opened()
    again.set_state(state.get_state())
    np.testing.assert_array_equal(greys(again, 5), found[3:])
    assert opened().fingerprint == opened(config=data(source=config.source, batch=6)).fingerprint


def test_readable_images_are_drawn_as_without_max_faults(tmp_path):
    source = write_images(tmp_path, bad=())
    streams = [ExamplePipeline(Images(source, "", 8), data(source=source, max_faults=share)) for share in (0.0, 0.5)]
    np.testing.assert_array_equal(*(greys(stream, 4) for stream in streams))


def test_too_many_faults_end_the_run(tmp_path):
    source = write_images(tmp_path)
    with pytest.raises(UserError, match=r"^[^\n]*[256]\.png: [^\n]*; mend it, or raise config\.data\.max_faults$"):
        greys(ExamplePipeline(Images(source, "", 8), data(source=source)), 3)
    stream = ExamplePipeline(Images(source, "", 8), data(source=source, max_faults=0.001))
    with pytest.raises(
        UserError, match=r"a\.jsonl: 2 of its first \d+ documents have unreadable images, more than conf"
    ):
        greys(stream, 9)
    for n in range(COUNT):
        (tmp_path / f"{n}.png").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"\.png: no such image file; mend it"):
        greys(ExamplePipeline(Images(source, "", 8), data(source=source, max_faults=1.0)), 1)


def test_faults_are_those_of_a_source(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    sources = {"a": write_images(tmp_path / "a", ()), "b": write_images(tmp_path / "b", range(1, COUNT))}
    entries = {name: {"source": source, "weight": {"a": 9, "b": 1}[name]} for name, source in sources.items()}
    config = data(mixture=entries, max_faults=0.002)
    source, _ = open_examples(config, lambda path, split: Images(path, "", 8, config.max_faults))
    stream = ExamplePipeline(source, config)
    with pytest.raises(UserError, match=r"config\.data source b: 3 of its first \d+ documents have unreadable images"):
        greys(stream, 60)


def test_lines_without_a_document_are_left_out(tmp_path):
    source = write_images(tmp_path, ())
    with open(source, "a") as file:
        file.write('\n{"image": "0.png", "text": null}\n')
    with pytest.raises(UserError, match="text is null"):
        Images(source, "", 8)
    images = Images(source, "", 8, max_faults=0.2)
    assert len(images) == COUNT and "1 of 13 lines left out (unreadable_record 1)" in images.remark


def test_shares():
    with pytest.raises(UserError, match=r"config\.data\.max_faults=2; expected a share"):
        data(max_faults=2)
