"""The pipeline: the same batches for the same seed, exact continuation, and refusal of another stream's state."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emu_jax.data.config import DataConfig
from emu_jax.data.counts import figures
from emu_jax.data.document import Text
from emu_jax.data.examples import ExamplePipeline, ExamplesConfig, Images
from emu_jax.data.pipeline import Pipeline, train_tokenizer
from emu_jax.data.prepared import Record
from emu_jax.data.sources import PairOrder
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import TransientError, UserError
from tests.data.folders import image, write_folder

SIZE, QUERIES = 16, 4
DATA = DataConfig(
    source="fluent_emoji",
    split="heldout_combinations",
    seed=0,
    row_tokens=64,
    row_images=3,
    batch_rows=2,
    packing_window=32,
    workers=0,
    pairs=PairOrder("both"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(DATA, SIZE, vocab_size=400, model_type="word")


@pytest.fixture
def open_pipeline(tokenizer):
    """Opens pipelines and closes them after the test."""
    opened = []

    def make(**changes) -> Pipeline:
        own = changes.pop("own", None)
        data = dataclasses.replace(DATA, **changes)
        opened.append(Pipeline(data, tokenizer, queries=QUERIES, image_size=SIZE, own=own and (lambda _: own)))
        return opened[-1]

    yield make
    for pipeline in opened:
        pipeline.close()


def take(pipeline: Pipeline, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(pipeline, count))


def assert_same(a: list, b: list):
    for x, y in zip(a, b, strict=True):
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def test_batches_have_one_shape_and_type(open_pipeline):
    shapes = {name: (value.shape, str(value.dtype)) for name, value in next(open_pipeline()).items()}
    assert shapes == {
        "images": ((2, 3, 16, 16, 3), "uint8"),
        "tokens": ((2, 64), "int32"),
        "segments": ((2, 64), "int32"),
        "slots": ((2, 64), "int32"),
        "text_weights": ((2, 64), "float32"),
        "visual_weights": ((2, 64), "float32"),
    }


def test_a_seed_decides_the_stream(open_pipeline):
    first = take(open_pipeline(), 30)
    assert_same(first, take(open_pipeline(), 30))
    other = next(open_pipeline(seed=1))
    assert (other["tokens"] != first[0]["tokens"]).any()


def test_one_worker_process_gives_the_stream_of_none(open_pipeline):
    assert_same(take(open_pipeline(), 5), take(open_pipeline(workers=1), 5))


@settings(max_examples=6)
@given(stop=st.integers(0, 60))
def test_restored_state_continues_exactly(tokenizer, stop):
    pipeline = Pipeline(DATA, tokenizer, queries=QUERIES, image_size=SIZE)
    take(pipeline, stop)
    state = json.loads(json.dumps(pipeline.get_state()))
    expected = take(pipeline, 5)
    again = Pipeline(DATA, tokenizer, queries=QUERIES, image_size=SIZE)
    again.set_state(state)
    assert_same(take(again, 5), expected)
    pipeline.close()
    again.close()


@pytest.mark.parametrize("change", [{"seed": 5}, {"packing_window": 16}, {"workers": 1}, {"split": "heldout_concepts"}])
def test_state_of_another_stream_is_refused(open_pipeline, change):
    state = open_pipeline().get_state()
    with pytest.raises(UserError, match="input pipeline: the checkpoint was taken with"):
        open_pipeline(**change).set_state(state)


@pytest.mark.parametrize("frame_sampling", ["random", "fixed"])
def test_two_epochs_of_one_video(tmp_path, frame_sampling):
    """Random frames are others in every epoch, fixed ones the same; a seed decides both."""
    clip = Record("clip", "video", (*(image(n) for n in range(24)), Text("a cat runs")))
    data = dataclasses.replace(
        DATA,
        source=str(write_folder(tmp_path / "clips", [clip], shards=1)),
        split="train",
        row_images=8,
        batch_rows=1,
        packing_window=2,
        pairs=PairOrder("image_first"),
        frame_sampling=frame_sampling,
    )
    tokenizer = train_tokenizer(data, SIZE, vocab_size=40, model_type="word")
    epochs = []
    for _ in range(2):
        pipeline = Pipeline(data, tokenizer, queries=QUERIES, image_size=SIZE)
        epochs.append([batch["images"][0] for batch in take(pipeline, 3)])
        pipeline.close()
    (first, second, third), again = epochs
    assert [np.array_equal(a, b) for a, b in zip(epochs[0], again, strict=True)] == [True] * 3
    same = [np.array_equal(a, b) for a, b in ((first, second), (second, third), (first, third))]
    assert same == [frame_sampling == "fixed"] * 3


def test_wrong_frames_are_refused():
    with pytest.raises(UserError, match=r"config\.data\.video_frames=0; expected at least 1"):
        dataclasses.replace(DATA, video_frames=0)
    with pytest.raises(UserError, match=r"config\.data\.frame_sampling='all'; choose one of random, fixed"):
        dataclasses.replace(DATA, frame_sampling="all")


def gather(hosts: list[list[dict[str, np.ndarray]]]) -> list[dict[str, np.ndarray]]:
    """The batches of hosts that hold a run of rows each -> global batches."""
    return [{name: np.concatenate([b[name] for b in parts]) for name in parts[0]} for parts in zip(*hosts, strict=True)]


def test_hosts_together_read_the_batches_of_one(open_pipeline):
    """Whatever their number: four read on where two have stopped."""
    settings = {"batch_rows": 4}
    one = open_pipeline(**settings)
    expected, described = [], []
    for batch in itertools.islice(one, 12):
        expected.append(batch)
        described.append(figures([one.counts()]))
    two = [open_pipeline(**settings, own=own) for own in ([0, 1], [2, 3])]
    assert_same(gather([take(host, 7) for host in two]), expected[:7])
    assert [figures([host.counts()]) for host in two] == [described[6]] * 2
    states = [json.loads(json.dumps(host.get_state())) for host in two]
    assert states[0] == states[1]
    four = [open_pipeline(**settings, own=[row]) for row in range(4)]
    for host in four:
        host.set_state(states[0])
    assert_same(gather([take(host, 5) for host in four]), expected[7:])
    assert [figures([host.counts()]) for host in four] == [described[11]] * 4


@pytest.mark.long
def test_worker_processes_of_a_host_build_its_rows(open_pipeline):
    one = open_pipeline(workers=2, batch_rows=3)
    expected = [{name: rows[1:2] for name, rows in batch.items()} for batch in take(one, 6)]
    host = open_pipeline(workers=2, batch_rows=3, own=[1])
    assert_same(take(host, 4), expected[:4])
    state = json.loads(json.dumps(host.get_state()))
    host.set_state(state)
    assert_same(take(host, 2), expected[4:])


def test_examples_of_hosts_are_those_of_one():
    data = ExamplesConfig(source="fluent_emoji", split="heldout_combinations", seed=0, batch=4)
    images = Images(data.source, data.split, SIZE)
    rows = {1: [[0, 1, 2, 3]], 2: [[0, 1], [2, 3]], 4: [[0], [1], [2], [3]]}
    hosts = {count: [ExamplePipeline(images, data, own=own) for own in owned] for count, owned in rows.items()}
    expected = take(hosts[1][0], 50)  # more than an epoch of 140
    assert_same(gather([take(host, 40) for host in hosts[2]]), expected[:40])
    for host in hosts[4]:
        host.set_state(json.loads(json.dumps(hosts[2][0].get_state())))
    assert_same(gather([take(host, 10) for host in hosts[4]]), expected[40:])
    for host in itertools.chain(*hosts.values()):
        host.close()


def test_every_record_of_an_epoch_comes_once(tokenizer):
    """Of 140 records at a window of 28, the first five windows hold each image once."""
    data = dataclasses.replace(DATA, packing_window=28, batch_rows=1, pairs=PairOrder("image_first"))
    pipeline = Pipeline(data, tokenizer, queries=QUERIES, image_size=SIZE)
    images, documents = set(), 0
    while documents < 140:
        batch = next(pipeline)
        documents += int(figures([pipeline.counts()])["documents"])
        used = batch["images"][0, : int(figures([pipeline.counts()])["images"])]
        images |= {image.tobytes() for image in used}
    assert (documents, len(images)) == (140, 140)
    pipeline.close()


def test_jsonl_of_pairs_and_documents(tmp_path, tokenizer):
    for name in "ab":
        Image.new("RGB", (20, 30), (name == "a" and "red") or "blue").save(tmp_path / f"{name}.png")
    long = " ".join(["light"] * 100)
    lines = [
        {"image": "a.png", "text": "medium skin tone"},
        {"parts": [{"text": "dark"}, {"image": "a.png"}, {"text": long}, {"image": "b.png"}]},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = dataclasses.replace(DATA, source=str(tmp_path / "data.jsonl"))
    pipeline = Pipeline(data, tokenizer, queries=QUERIES, image_size=SIZE)
    batches = take(pipeline, 4)
    assert pipeline.count("split_documents") > 0, "the long document does not fit a row"
    assert {tuple(p) for b in batches for p in b["images"].reshape(-1, 3)} == {(255, 0, 0), (0, 0, 255), (0, 0, 0)}
    pipeline.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"data.jsonl:1: not JSON"),
        (
            '\n{"image": "a.png", "text": "caf\xe9"}',
            r"data.jsonl:2: not UTF-8 at byte 31 \(0xe9\); expected JSON, saved as UTF-8",
        ),
        (
            '{"image": "a.png", "text": "a \\ud800"}',
            r"data.jsonl:1: a text holds \\ud800, which is half of a surrogate",
        ),
        ("[" * 100_000, r"data.jsonl:1: not JSON \(nested too deeply\)"),
        ('{"image": 1}', r"""data.jsonl:1: its fields are \['image'\]; expected \{"image": …, "text": …\}"""),
        ('{"image": "a.png", "text": null}', r"data.jsonl:1: text is null; expected a text"),
        ('{"image": "a.png", "text": ["a"]}', r"data.jsonl:1: text is a list of 1; expected a text"),
        ('{"image": "a.png", "text": NaN}', r"data.jsonl:1: text is NaN; expected a text"),
        ('{"image": "a.png", "text": 7}', r"data.jsonl:1: text is 7; expected a text"),
        ('{"image": "", "text": "a"}', r"data.jsonl:1: image is ''; expected the name of an image file"),
        ('{"image": "a\\u0000.png", "text": "a"}', r"data.jsonl:1: image is 'a\\x00.png'; expected the name"),
        ('{"parts": [{"video": "x"}]}', r"data.jsonl:1: parts\[0\] is \['video'\]; expected"),
        ('{"parts": [{"text": "a"}, {"text": true}]}', r"data.jsonl:1: parts\[1\].text is true; expected a text"),
        ('{"parts": [{"image": null}]}', r"data.jsonl:1: parts\[0\].image is null; expected the name of an image"),
        ('{"image": "a.png", "text": "a", "video": "b.mp4"}', r"data.jsonl:1: video is not read here; expected"),
        ('{"image": "a.png", "text": "a", "images": ["b.png"]}', r"data.jsonl:1: images is not read here; expected"),
        ("", r"data.jsonl: the file holds no documents"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, tokenizer, line, message):
    (tmp_path / "data.jsonl").write_text(line, encoding="latin-1")
    data = dataclasses.replace(DATA, source=str(tmp_path / "data.jsonl"))
    with pytest.raises(UserError, match=message):
        Pipeline(data, tokenizer, queries=QUERIES, image_size=SIZE)


def test_a_missing_image_of_a_jsonl_is_named(tmp_path, tokenizer):
    (tmp_path / "data.jsonl").write_text('{"image": "gone.png", "text": "dark"}')
    data = dataclasses.replace(DATA, source=str(tmp_path / "data.jsonl"))
    pipeline = Pipeline(data, tokenizer, queries=QUERIES, image_size=SIZE)
    with pytest.raises(UserError, match=r"gone\.png: no such image file"):
        next(pipeline)
    pipeline.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_tokens": 0}, "config.data.row_tokens=0; expected at least 1"),
        ({"source": "nowhere"}, "config.data source 'nowhere': no such folder; expected a folder of"),
        ({"split": "test"}, "split 'test' of fluent_emoji is unknown; choose one of train,"),
    ],
)
def test_bad_settings(tokenizer, change, message):
    with pytest.raises(UserError, match=message):
        Pipeline(dataclasses.replace(DATA, **change), tokenizer, queries=QUERIES, image_size=SIZE)
    with pytest.raises(UserError, match=r"config\.data\.pairs\.order='up'; choose one of"):
        PairOrder("up")


def test_worker_processes_outlive_the_signals_that_end_a_run_and_are_missed_when_killed(open_pipeline):
    """Their parent gets the same signals, and may train on for a step and save."""
    pipeline = open_pipeline(workers=2)
    take(pipeline, 1)
    workers = [process.pid for process in multiprocessing.active_children()]
    assert len(workers) == 2
    for process, number in itertools.product(workers, (signal.SIGTERM, signal.SIGINT)):
        os.kill(process, number)
    take(pipeline, 40)
    assert [process.pid for process in multiprocessing.active_children()] == workers
    os.kill(workers[0], signal.SIGKILL)
    with pytest.raises(TransientError, match=r"^config\.data\.workers=2: a process that prepares batches was killed; "):
        take(pipeline, 1000)


PARENT = """
import multiprocessing, time
from emu_jax.data.pipeline import _become_worker

def work():
    _become_worker(0, 1)
    print("ready", flush=True)
    time.sleep(30)
    print("outlives its parent", flush=True)

if __name__ == "__main__":
    multiprocessing.get_context("fork").Process(target=work, daemon=True).start()
    time.sleep(60)
"""


def test_a_worker_process_ends_with_its_parent(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        assert parent.stdout.read() == "", "returns when the worker has ended, too"
