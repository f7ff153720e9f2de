"""The stream of a mixture: exact for any number of hosts, workers and restarts; broken images are counted."""

import collections
import dataclasses
import hashlib

import numpy as np
import pytest

from emu_jax.data.config import DataConfig
from emu_jax.data.counts import figures
from emu_jax.data.document import Text
from emu_jax.data.pipeline import DIVISION, Pipeline
from emu_jax.data.prepared import Record, StoredImage
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from tests.data.folders import SIZE, image, pairs, write_folder

QUERIES, ROWS = 2, 4
COUNTS = {"cats": 96, "dogs": 40}


def web(count: int) -> list[Record]:
    """Web documents of two images and their texts."""
    parts = ((image(n), Text(f"web{n}"), image(n + 1), Text(f"then{n} more words")) for n in range(count))
    return [Record(f"w/{n}", "web", found) for n, found in enumerate(parts)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    write_folder(root / "cats", pairs("cat", COUNTS["cats"]))
    write_folder(root / "dogs", web(COUNTS["dogs"]))
    return root


@pytest.fixture(scope="module")
def tokenizer():
    texts = [part.text for record in [*pairs("cat", 96), *web(40)] for part in record.parts if isinstance(part, Text)]
    return Tokenizer.train(texts, vocab_size=400, model_type="word")


def config(folders, epochs: int = 0, **changes) -> DataConfig:
    mixture = {
        "cats": {"source": str(folders / "cats"), "weight": 3, "epochs": epochs},
        "dogs": {"source": str(folders / "dogs"), "weight": 1, "epochs": epochs},
    }
    fields = {
        "source": "",
        "split": "train",
        "seed": 0,
        "row_tokens": 32,
        "row_images": 3,
        "batch_rows": ROWS,
        "packing_window": 17,
        "workers": 0,
        "pairs": {},
        "mixture": mixture,
    }
    return DataConfig.from_dict(fields | changes)


def documents_of(batch: dict[str, np.ndarray]) -> list[tuple[int, tuple[int, ...], str]]:
    """(source, tokens in no order, a digest of the pixels) of every document in a batch."""
    found = []
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == segment
            slots = [s for s in dict.fromkeys(batch["slots"][row][here].tolist()) if s >= 0]
            pixels = b"".join(batch["images"][row, slot].tobytes() for slot in slots)
            tokens = tuple(np.sort(batch["tokens"][row][here]).tolist())
            found.append((int(batch["source_ids"][row][here][0]), tokens, hashlib.sha1(pixels).hexdigest()))
    return found


def read_all(pipelines: list[Pipeline]) -> list[list[dict]]:
    """Batches of several hosts until the stream of one ends."""
    batches = []
    while True:
        try:
            batches.append([next(pipeline) for pipeline in pipelines])
        except StopIteration:
            return batches


def joined(parts: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def expected_documents(folders, tokenizer) -> collections.Counter:
    """Of one epoch, read and tokenised one by one."""
    from emu_jax.data.packing import build_row
    from emu_jax.data.sequence import tokenize_document

    data = config(folders)
    sizes = {"row_tokens": data.row_tokens, "row_images": data.row_images}
    found: collections.Counter = collections.Counter()
    for number, source in enumerate(data.open(SIZE).values()):
        for record in source.read(range(len(source))):
            for document in source.documents(record, np.random.default_rng(0)):
                for piece in tokenize_document(document, tokenizer, queries=QUERIES, **sizes, source=number):
                    row, _, faults, _ = build_row([piece], **sizes, image_size=SIZE, pad_id=tokenizer.pad_id)
                    assert not faults
                    found.update(documents_of({name: np.asarray(value)[None] for name, value in row.items()}))
    return found


@pytest.mark.parametrize(("hosts", "workers"), [(1, 0), (1, 2), (4, 0), pytest.param(4, 2, marks=pytest.mark.long)])
def test_one_epoch_holds_every_document_once(folders, tokenizer, hosts, workers):
    """Rows that do not fill a last batch are left over: epochs are read until they are few."""
    sizes = {"queries": QUERIES, "image_size": SIZE}
    data = config(folders, epochs=1, shards=hosts, workers=workers, batch_rows=hosts)
    own = [[host] for host in range(hosts)]
    pipelines = [Pipeline(data, tokenizer, **sizes, own=lambda _, rows=rows: rows) for rows in own]
    # A host alone with the shard of each: what is left when the first of them ends is read from the others.
    found = collections.Counter()
    for pipeline in pipelines:
        for batch in read_all([pipeline]):
            found.update(documents_of(joined(batch)))
        pipeline.close()
    expected = expected_documents(folders, tokenizer)
    assert found == expected, f"missing {expected - found}, too many {found - expected}"


def test_hosts_read_their_own_shards_alone(folders, tokenizer):
    sizes = {"queries": QUERIES, "image_size": SIZE}
    data = config(folders, shards=2)
    whole = Pipeline(data, tokenizer, **sizes)
    hosts = [
        Pipeline(data, tokenizer, **sizes, own=lambda _: [0, 1]),
        Pipeline(data, tokenizer, **sizes, own=lambda _: [2, 3]),
    ]
    for _ in range(30):
        expected, found = next(whole), joined([next(host) for host in hosts])
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    states = [host.get_state() for host in hosts]
    assert [list(state["shards"]) for state in states] == [["0"], ["1"]]
    assert states[0]["shards"] | states[1]["shards"] == whole.get_state()["shards"]
    # Their joined state goes on with any number of hosts.
    states[0]["shards"].update(states[1]["shards"])
    alone = Pipeline(data, tokenizer, **sizes)
    alone.set_state(states[0])
    for name, value in next(whole).items():
        np.testing.assert_array_equal(next(alone)[name] if name == "tokens" else value, value)
    for pipeline in (whole, alone, *hosts):
        pipeline.close()


@pytest.mark.parametrize(
    ("shards", "workers", "every"),
    [(1, 0, 1), *(pytest.param(*each, marks=pytest.mark.long) for each in [(2, 0, 1), (2, 2, 50)])],
)
@pytest.mark.long
def test_restored_at_two_hundred_positions(folders, tokenizer, shards, workers, every):
    sizes = {"queries": QUERIES, "image_size": SIZE}
    data = config(folders, shards=shards, workers=workers)
    first = Pipeline(data, tokenizer, **sizes)
    states, batches = [], []
    for _ in range(201):
        states.append(first.get_state())
        batches.append(next(first))
    first.close()
    second = Pipeline(data, tokenizer, **sizes)
    for position in range(0, 200, every):
        second.set_state(states[position])
        for name, value in next(second).items():
            np.testing.assert_array_equal(value, batches[position][name], err_msg=f"{name} at {position}")
        assert second.get_state() == states[position + 1]
    second.close()


def test_the_same_seed_gives_the_same_bytes(folders, tokenizer):
    def stream(seed: int) -> bytes:
        pipeline = Pipeline(config(folders, seed=seed), tokenizer, queries=QUERIES, image_size=SIZE)
        batches = [next(pipeline) for _ in range(20)]
        return b"".join(batch[name].tobytes() for batch in batches for name in sorted(batch))

    assert stream(3) == stream(3) != stream(4)


def test_records_come_by_weight(folders, tokenizer):
    pipeline = Pipeline(config(folders), tokenizer, queries=QUERIES, image_size=SIZE)
    for _ in range(100):
        next(pipeline)
    cats, dogs = (pipeline.count(f"documents/{name}") for name in ("cats", "dogs"))
    assert abs(cats / dogs - 3) < 0.2, f"expected three cats a dog, got {cats} and {dogs}"
    described = figures([pipeline.counts()])
    assert described["documents"] == described["documents_cats"] + described["documents_dogs"]


def test_every_row_knows_its_documents(folders, tokenizer):
    """Each host's own rows, in the order of the segments, through worker processes too."""
    sizes = {"queries": QUERIES, "image_size": SIZE}
    data = config(folders, workers=1)
    whole, half = Pipeline(data, tokenizer, **sizes), Pipeline(data, tokenizer, **sizes, own=lambda _: [1, 3])
    for _ in range(3):
        batch, _ = next(whole), next(half)
        assert half.records == [whole.records[1], whole.records[3]]
        for row, records in enumerate(whole.records):
            assert len(records) == batch["segments"][row].max()
            for segment, (source, record) in enumerate(records, 1):
                here = batch["segments"][row] == segment
                assert set(batch["source_ids"][row][here]) == {source}
                name, key = whole.name(source, record)
                assert name == whole.sources[source] == {"cat": "cats", "w": "dogs"}[key.partition("/")[0]]
                word = key.replace("cat/", "cat").replace("w/", "web")  # which its text begins with
                assert tokenizer.encode_plain(word)[0] in batch["tokens"][row][here]
    for pipeline in (whole, half):
        pipeline.close()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch_rows": 8},
        {"workers": 1},
        {"shards": 2},
        {"mixture": {"cats": {"source": "cats"}}},
        {"mixture": {"cats": {"source": "cats", "weight": 2}, "dogs": {"source": "dogs"}}},
        {"mixture": {"dogs": {"source": "cats", "weight": 3}, "cats": {"source": "dogs"}}},
    ],
)
def test_a_state_is_refused_by_another_stream(folders, tokenizer, change):
    if "mixture" in change:
        change = {"mixture": {k: v | {"source": str(folders / v["source"])} for k, v in change["mixture"].items()}}
    state = Pipeline(config(folders), tokenizer, queries=QUERIES, image_size=SIZE).get_state()
    other = Pipeline(config(folders, **change), tokenizer, queries=QUERIES, image_size=SIZE)
    name = {"mixture": "(mixture|records)"}.get(next(iter(change)), next(iter(change)))
    with pytest.raises(UserError, match=f"input pipeline: the checkpoint was taken with {name}=.*, this run has"):
        other.set_state(state)


def test_going_on_with_another_division(folders, tokenizer):
    """An epoch of one shard, left halfway, ends with four: nothing comes twice, and little is left out."""
    sizes = {"queries": QUERIES, "image_size": SIZE}
    one = Pipeline(config(folders, epochs=1, packing_window=5, batch_rows=1), tokenizer, **sizes)
    found = collections.Counter()
    for _ in range(20):
        found.update(documents_of(next(one)))
    data = config(folders, epochs=1, packing_window=5, batch_rows=4, shards=4)
    four = Pipeline(dataclasses.replace(data, batch_rows=4), tokenizer, **sizes)
    state = one.get_state()
    state["fingerprint"]["batch_rows"] = 4  # of a run that keeps its batch
    with pytest.raises(UserError, match=r"shards=1, this run has shards=4; .* or pass reshard_data to resume near"):
        four.set_state(state)
    four.resume(state, differing=DIVISION)
    for batch in read_all([four]):
        found.update(documents_of(joined(batch)))
    expected = expected_documents(folders, tokenizer)
    assert not found - expected, f"read twice: {found - expected}"
    left_out = sum((expected - found).values())
    assert left_out <= 20, f"expected what is left of a window of 5 records and of four shards' ends, got {left_out}"


def test_windows_that_are_skipped_are_counted_over_the_run(folders, tokenizer):
    """Three windows in all, in two goes; asked for again, nothing more is left out, and going back is refused."""
    sizes = {"queries": QUERIES, "image_size": SIZE}
    data = config(folders, packing_window=4, batch_rows=2)
    *streams, reference = [Pipeline(data, tokenizer, **sizes) for _ in range(4)]
    reference.set_state(reference.get_state() | {"offset": 3})  # the window that was begun, and two
    next(streams[0])
    assert streams[1].resume(streams[0].get_state(), skip_windows=2) == 2
    np.testing.assert_array_equal(next(streams[1])["tokens"], next(reference)["tokens"])
    state = streams[1].get_state()
    assert state["skipped"] == 2 and streams[2].resume(state, skip_windows=2) == 0
    np.testing.assert_array_equal(next(streams[2])["tokens"], next(streams[1])["tokens"])
    assert streams[2].resume(state, skip_windows=3) == 1 and streams[2].get_state()["skipped"] == 3
    with pytest.raises(UserError, match=r"^skip_windows=2: this run has already left out 3$"):
        streams[0].resume(streams[2].get_state(), skip_windows=2)
    for stream in (*streams, reference):
        stream.close()


def test_other_weights_hold_from_the_next_window_on(folders, tokenizer):
    """All documents of one epoch come once, whatever the weights; and the state says how to go on."""
    sizes = {"queries": QUERIES, "image_size": SIZE}
    data = config(folders, epochs=1, packing_window=5, batch_rows=1)
    cats = dataclasses.replace(data.mixture["cats"], weight=0.5)
    other = dataclasses.replace(data, mixture={**data.mixture, "cats": cats})
    one, two, three = (Pipeline(settings, tokenizer, **sizes) for settings in (data, other, other))
    found = collections.Counter()
    for _ in range(20):
        found.update(documents_of(next(one)))
    with pytest.raises(UserError, match="the checkpoint was taken with mixture="):
        two.set_state(one.get_state())
    two.resume(one.get_state(), differing=("mixture",))
    for _ in range(3):
        found.update(documents_of(next(two)))
    three.set_state(two.get_state())
    for batch in read_all([three]):
        found.update(documents_of(joined(batch)))
    expected = expected_documents(folders, tokenizer)
    assert not found - expected, f"read twice: {found - expected}"
    assert sum((expected - found).values()) <= 8, "expected what is left of a window of 5 records and of the end"
    for stream in (one, two):
        stream.close()


# ---------------------------------------------------------------- faults


def with_broken(records: list[Record], broken: set[int]) -> list[Record]:
    """The images of some records are no JPEG files."""
    return [
        dataclasses.replace(record, parts=(StoredImage(record.parts[0].data[:100]), *record.parts[1:]))
        if number in broken
        else record
        for number, record in enumerate(records)
    ]


def test_broken_images_cost_their_document_alone(tmp_path, tokenizer):
    broken = {3, 14, 15}
    write_folder(tmp_path / "cats", with_broken(pairs("cat", 300), broken))
    fields = {"source": str(tmp_path / "cats"), "split": "train", "mixture": {}, "max_faults": 0.02}
    data = dataclasses.replace(config(tmp_path, **fields), batch_rows=1)
    data = dataclasses.replace(data, mixture={})
    pipeline = Pipeline(data, tokenizer, queries=QUERIES, image_size=SIZE)
    name = str(tmp_path / "cats")
    unlearnt = 0
    # What a window holds back comes after documents of the second epoch.
    while pipeline.count(f"documents/{name}") < 300 + 2 * data.packing_window:
        batch = next(pipeline)
        for segment in range(1, batch["segments"].max() + 1):
            here = batch["segments"] == segment
            unlearnt += not batch["text_weights"][here].any() and not batch["visual_weights"][here].any()
    assert unlearnt == pipeline.count(f"faults/{name}") == figures([pipeline.counts()])["faulty_documents"]
    assert 3 <= unlearnt <= 6, "all of the first epoch, and what has come of the second"


def test_too_many_broken_images_stop_the_run(tmp_path, tokenizer):
    write_folder(tmp_path / "cats", with_broken(pairs("cat", 300), set(range(0, 300, 30))))
    write_folder(tmp_path / "dogs", web(40))
    pipeline = Pipeline(config(tmp_path, max_faults=0.02), tokenizer, queries=QUERIES, image_size=SIZE)
    expected = (
        r"config\.data source cats: 21 of its first (\d+) documents have unreadable images, more than "
        r"config\.data\.max_faults=0\.02; the last: cat/\d+: not a readable image"
    )
    with pytest.raises(UserError, match=expected):
        for _ in range(10_000):
            next(pipeline)


def test_images_larger_than_prepared(folders):
    with pytest.raises(UserError, match=r"prepared for models that read 16 pixels, this one reads 224; prepare"):
        config(folders).open(224)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": 3}, r"config\.data\.batch_rows=4 does not divide by config\.data\.shards=3"),
        ({"max_faults": 1.5}, r"config\.data\.max_faults=1\.5; expected a share of 0 to 1"),
    ],
)
def test_bad_settings(folders, changes, message):
    with pytest.raises(UserError, match=message):
        config(folders, **changes)


def test_sources_that_are_not_named(folders):
    data = config(folders, mixture={"laion": {"source": "", "weight": 1.0}})
    with pytest.raises(UserError, match=r"config\.data\.mixture\.laion\.source is empty; name a folder"):
        data.open(SIZE)
    with pytest.raises(UserError, match=r"config\.data\.source is empty, and so is config\.data\.mixture; name"):
        config(folders, mixture={}).open(SIZE)
