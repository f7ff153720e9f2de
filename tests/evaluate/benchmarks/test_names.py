"""What holds for every benchmark: its sample is read, and anything wrong with it is one line that names the file."""

import copy
import json
import random
import shutil
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_jax.cli.evaluate import BENCHMARK_NAMES
from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.names import BENCHMARKS, find_benchmark
from tests.evaluate.benchmarks.editing import read, refused
from tests.evaluate.samples import WRITERS, write_sample

# The embedded images' have no files.
FILED = [name for name, benchmark in BENCHMARKS.items() if benchmark.task != "embedded"]
EVERY = pytest.mark.parametrize("name", FILED)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A folder of samples, which tests copy before they change them."""
    folder = tmp_path_factory.mktemp("samples")
    for name in WRITERS:
        write_sample(name, folder / name)
    return folder


@pytest.fixture
def sample(name, samples, tmp_path):
    return shutil.copytree(samples / name, tmp_path / name)


def test_every_benchmark_has_a_sample():
    assert list(WRITERS) == FILED
    assert list(BENCHMARKS) == [benchmark.name for benchmark in BENCHMARKS.values()] == list(BENCHMARK_NAMES)


def test_an_unknown_benchmark():
    with pytest.raises(UserError, match=r"^no benchmark 'vqa2'; did you mean vqav2\? \(coco, nocaps, .*\)$"):
        find_benchmark("vqa2")


@EVERY
def test_splits(name, samples):
    benchmark = find_benchmark(name)
    assert benchmark.split in benchmark.splits and benchmark.shots in ("", *benchmark.splits)
    assert benchmark.read(samples / name) == benchmark.read(samples / name, benchmark.split)
    shown = {}
    for split in benchmark.splits:
        questions = read(name, samples / name, split)
        shown[split] = {path.read_bytes() for q in questions.values() for path in (*q.images, q.video) if path}
        assert all(q.text or q.images for q in questions.values())
    if benchmark.shots:  # eight examples of as many images, none of which is asked about
        assert len(shown[benchmark.shots]) >= 8 and not shown[benchmark.shots] & shown[benchmark.split]


@EVERY
def test_an_unknown_split(name, samples):
    assert refused(name, samples / name, "vla").startswith(f"{name} has no split 'vla'; did you mean ")


@EVERY
def test_a_missing_folder(name, tmp_path):
    message = refused(name, tmp_path / "elsewhere")
    benchmark = find_benchmark(name)
    assert message == (
        f"ROOT: no such folder; {name} expects there: {'; '.join(benchmark.tree)}. "
        f"Official files: {benchmark.described}"
    )


@EVERY
def test_each_missing_annotation_is_named_with_the_expected_tree(name, sample):
    benchmark = find_benchmark(name)
    annotations = sorted(path for path in sample.rglob("*") if path.suffix in (".json", ".csv", ".txt"))
    needed = set()
    for split in benchmark.splits:
        for path in annotations:
            path.rename(path.with_suffix(".away"))
            try:
                benchmark.read(sample, split)
            except UserError as error:
                assert str(error).startswith(f"{sample}: no ")
                assert f"{path.name}; {name} expects there: {benchmark.tree[0]}" in str(error)
                assert str(error).endswith(f"Official files: {benchmark.described}")
                needed.add(path)
            path.with_suffix(".away").rename(path)
    assert needed == set(annotations)


@EVERY
def test_missing_images_and_videos_are_named_and_counted(name, sample):
    if name == "coco_drawing":
        pytest.skip("its questions show no image; test_drawing.py has the real ones")
    benchmark = find_benchmark(name)
    questions = benchmark.read(sample)
    shown = list(dict.fromkeys(path for q in questions for path in (*q.images, q.video) if path))
    for path in shown[1:]:
        path.unlink()
    others = len(shown) - 2  # beside the first that is gone; there are at least three images
    message = refused(name, sample)
    assert message.startswith("ROOT: no ")
    assert f"/{shown[1].name} (and {others} more); {name} expects there: {benchmark.tree[0]}" in message
    shown[0].unlink()
    assert f"/{shown[0].name} (and {others + 1} more); {name} expects" in refused(name, sample)


# ---------------------------------------------------------------- anything in the files

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200000),
    st.floats(allow_nan=False),
    st.text(st.characters(categories=["L", "N", "Cs", "P"]), max_size=5),
    st.sampled_from(
        ["../../etc/passwd", "/etc/passwd", "a/../../b", "a\0b", "", ".", "a\nb", 10**400, {"a\nb": {}}, {"a\nb": 1}]
    ),
    st.builds(list),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(string.ascii_lowercase, max_size=3), st.integers(), max_size=2),
)


def _places(value, place=()):
    """Where a JSON value has values."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*place, key))


def _put(value, place, new):
    if not place:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return value


@EVERY
@settings(max_examples=25)
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused_in_one_line(name, data, samples):
    """No other exception, and no file outside the folder."""
    benchmark, root = find_benchmark(name), samples / name
    path = data.draw(st.sampled_from(sorted(root.rglob("*.json"))))
    whole = path.read_text()
    value = json.loads(whole)
    place = data.draw(st.sampled_from(list(_places(value))))
    path.write_text(json.dumps(_put(value, place, data.draw(VALUES))))
    try:
        for split in benchmark.splits:
            try:
                questions = benchmark.read(root, split)
            except UserError as error:
                assert "\n" not in str(error) and str(root) in str(error)
            else:
                assert len({question.id for question in questions}) == len(questions)
                assert all(root in path.parents for q in questions for path in (*q.images, q.video) if path)
                assert all(".." not in path.parts for q in questions for path in q.images)
                json.dumps([q.text for q in questions], ensure_ascii=False).encode()
    finally:
        path.write_text(whole)


@EVERY
@settings(max_examples=25)
@given(data=st.data())
def test_a_cut_file_is_refused_with_the_place(name, data, samples):
    benchmark, root = find_benchmark(name), samples / name
    path = data.draw(st.sampled_from(sorted(root.rglob("*.json"))))
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refusals = []
    try:
        for split in benchmark.splits:
            try:
                benchmark.read(root, split)
            except UserError as error:
                refusals.append(str(error))
    finally:
        path.write_bytes(whole)
    assert refusals
    for message in refusals:
        assert message.startswith(f"{path}: not JSON at line 1, column "), message
        assert message.endswith("; expected the file as it is published, so fetch it again")


def _shuffled(value, rng):
    """A value whose lists of objects are in another order."""
    if isinstance(value, dict):
        return {key: item if key == "dialog" else _shuffled(item, rng) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = [_shuffled(item, rng) for item in value]
        rng.shuffle(value)
    return value


@EVERY
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_the_order_of_records_changes_no_question(name, seed, samples):
    benchmark, root = find_benchmark(name), samples / name
    expected = {split: read(name, root, split) for split in benchmark.splits}
    before = {path: path.read_text() for path in root.rglob("*.json")}
    try:
        for path, text in before.items():
            path.write_text(json.dumps(_shuffled(json.loads(text), random.Random(seed))))
        for split, questions in expected.items():
            again = read(name, root, split)
            assert again.keys() == questions.keys()
            for key, question in questions.items():
                assert sorted(again[key].answers) == sorted(question.answers)
                kept = {**vars(question), "answers": ()}
                assert {**vars(again[key]), "answers": ()} == kept
    finally:
        for path, text in before.items():
            path.write_text(text)
