"""The registry; and for every benchmark: its sample is read, and any fault in it is one line that names the file."""

import copy
import importlib
import json
import random
import shutil
import string
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_jax.data.images import StoredImage
from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.benchmark import Scoring, Weights
from emu_jax.evaluate.benchmarks.registry import OURS, benchmark_names, find_benchmark
from tests.evaluate.benchmarks.editing import load, read, refused, store
from tests.evaluate.samples import WRITERS, write_sample

# Those of the embedded images need no files.
FILED = [name for name in benchmark_names() if find_benchmark(name).tree]
EVERY = pytest.mark.parametrize("name", FILED)
# Tables that hold their images: test_mmbench.py and test_mmmu.py change their cells.
TABLES = ("mmbench", "mmmu")
TEXTS = ("coco_drawing", "geneval", "dpg")  # which are drawn: their questions show no image
OF_JSON = pytest.mark.parametrize("name", [name for name in FILED if name not in (*TABLES, "dpg")])
# Each line of geneval's file is a document, whose number names its drawings.
WHOLE = pytest.mark.parametrize("name", [name for name in FILED if name not in (*TABLES, "dpg", "geneval")])


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
    assert sorted(WRITERS) == FILED
    assert benchmark_names() == [find_benchmark(name).name for name in benchmark_names()]


def test_names_cost_no_import_of_jax():
    code = """
import sys
from emu_jax.evaluate.benchmarks.registry import benchmark_names
assert "coco" in benchmark_names()
print(sorted({"jax", "numpy", "emu_jax.evaluate.benchmarks.coco"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


MINE = """
from emu_jax.evaluate import intervals
from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.prompts import vqa
from emu_jax.evaluate.question import Question

BENCHMARK = Benchmark(
    name="mine",
    splits=("test",),
    split="test",
    tree=("mine.json",),
    described="here",
    reader=lambda files, split: [
        Question(entry.text("id"), text=entry.text("asks"), answers=(entry.text("answer"),))
        for entry in files.records("mine.json")
    ],
    prompt=vqa,
    metrics=lambda said, questions, _: {
        "right": intervals.share([text == q.answers[0] for text, q in zip(said, questions)])
    },
)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package with the module `MINE` and some entry points where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(*points):
        (tmp_path / "mine_for_emu.py").write_text(MINE)
        package = tmp_path / "mine_for_emu-1.0.dist-info"
        package.mkdir()
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-for-emu\nVersion: 1.0\n")
        (package / "entry_points.txt").write_text("\n".join(["[emu_jax.benchmarks]", *points]))
        importlib.invalidate_caches()

    yield install
    sys.modules.pop("mine_for_emu", None)


def test_an_installed_package_adds_a_benchmark(install, tmp_path):
    install("mine = mine_for_emu:BENCHMARK")
    assert benchmark_names() == [*(point.name for point in OURS), "mine"]
    benchmark = find_benchmark("mine")
    (tmp_path / "mine.json").write_text('[{"id": "1", "asks": "what?", "answer": "this"}]')
    questions = benchmark.read(tmp_path)
    assert [(question.id, question.text) for question in questions] == [("1", "what?")]
    figures = benchmark.score(questions, {"1": "this"}, Scoring(tmp_path, tmp_path, Weights(), emu=None))
    assert figures["right"].value == 1.0


@pytest.mark.parametrize(
    ("point", "name", "message"),
    [
        ("mine = mine_for_emu:MISSING", "mine", "benchmark 'mine': mine_for_emu:MISSING cannot be imported (module"),
        ("mine = not_there:BENCHMARK", "mine", "benchmark 'mine': not_there:BENCHMARK cannot be imported (No module"),
        ("mine = mine_for_emu:Question", "mine", "benchmark 'mine': mine_for_emu:Question is <class"),
        (
            "other = mine_for_emu:BENCHMARK",
            "other",
            "benchmark 'other': mine_for_emu:BENCHMARK is Benchmark(name",
        ),
        ("coco = mine_for_emu:BENCHMARK", "coco", "benchmark 'coco' is defined by emu_jax.evaluate.benchmarks.coco:"),
    ],
    ids=["no attribute", "no module", "no benchmark", "another name", "ours"],
)
def test_entry_points_that_cannot_be_used(install, point, name, message):
    install(point)
    with pytest.raises(UserError) as caught:
        find_benchmark(name)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_an_unknown_benchmark():
    with pytest.raises(UserError, match=r"^no benchmark 'vqa2'; did you mean vqav2\? \(coco, coco_drawing, .*\)$"):
        find_benchmark("vqa2")


def _content(shown):
    return shown.data if isinstance(shown, StoredImage) else shown.read_bytes()


@EVERY
def test_splits(name, samples):
    benchmark = find_benchmark(name)
    assert benchmark.split in benchmark.splits and benchmark.few_shot_split in ("", *benchmark.splits)
    assert benchmark.read(samples / name) == benchmark.read(samples / name, benchmark.split)
    shown = {}
    for split in benchmark.splits:
        questions = read(name, samples / name, split)
        shown[split] = {_content(what) for q in questions.values() for what in (*q.images, q.video) if what}
        assert all(q.text or q.images for q in questions.values())
    if benchmark.few_shot_split:  # eight examples of as many images, none of which is asked about
        pool = shown[benchmark.few_shot_split]
        assert len(pool) >= 8 and not pool & shown[benchmark.split]


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


# MMMU's subjects may be missing: test_mmmu.py.
@pytest.mark.parametrize("name", [name for name in FILED if name != "mmmu"])
def test_each_missing_annotation_is_named_with_the_expected_tree(name, sample):
    benchmark = find_benchmark(name)
    endings = (".json", ".jsonl", ".csv", ".tsv", ".txt")
    annotations = sorted(path for path in sample.rglob("*") if path.suffix in endings)
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


# test_coco_drawing.py has the images that it compares with.
@pytest.mark.parametrize("name", [name for name in FILED if name not in (*TEXTS, *TABLES)])
def test_missing_images_and_videos_are_named_and_counted(name, sample):
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


@pytest.mark.long
@OF_JSON
@settings(max_examples=25)
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused_in_one_line(name, data, samples):
    """No other exception, and no file outside the folder."""
    benchmark, root = find_benchmark(name), samples / name
    path = data.draw(st.sampled_from(sorted([*root.rglob("*.json"), *root.rglob("*.jsonl")])))
    whole = path.read_text()
    value = load(path)
    place = data.draw(st.sampled_from(list(_places(value))))
    store(path, _put(value, place, data.draw(VALUES)))
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


@pytest.mark.long
@WHOLE
@settings(max_examples=25)
@given(data=st.data())
def test_a_cut_file_is_refused_with_the_place(name, data, samples):
    benchmark, root = find_benchmark(name), samples / name
    path = data.draw(st.sampled_from(sorted(root.rglob("*.json"))))
    whole = path.read_bytes()
    # A file of JSON lines that ends between two of them is a shorter file: a cut is within a line.
    first = data.draw(st.sampled_from([0, *(n + 1 for n, byte in enumerate(whole[:-1]) if byte == ord("\n"))]))
    length, lines = len(whole[first:].split(b"\n")[0]), b"\n" in whole
    end = first + data.draw(st.integers(int(lines), length - 1))
    path.write_bytes(whole[:end])
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
        line = 1 + whole[:first].count(b"\n")
        if end == 0:
            assert message == f"{path}: an empty file; download it again"
            continue
        assert message.startswith(f"{path}: not JSON at line {line}, column "), message
        assert message.endswith("; expected the file as it is published, so fetch it again")


def _shuffled(value, rng):
    """A value whose lists of objects are in another order."""
    if isinstance(value, dict):
        return {key: item if key == "dialog" else _shuffled(item, rng) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = [_shuffled(item, rng) for item in value]
        rng.shuffle(value)
    return value


@pytest.mark.long
@WHOLE
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_the_order_of_records_changes_no_question(name, seed, samples):
    benchmark, root = find_benchmark(name), samples / name
    expected = {split: read(name, root, split) for split in benchmark.splits}
    before = {path: path.read_text() for path in root.rglob("*.json")}
    try:
        for path in before:
            store(path, _shuffled(load(path), random.Random(seed)))
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
