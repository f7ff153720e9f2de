"""Shards found and named; JSON arrays in pieces."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.raw import files
from emu_jax.data.raw.files import Skip, find_shards, json_array, shard_name
from emu_jax.errors import UserError


def test_shards_are_sorted_and_named_alike_wherever_they_stand(tmp_path):
    for place in ("x", "y"):
        for name in ("b.tar", "a/00.tar", "a/.hidden.tar", ".git/c.tar", "a/00.txt"):
            (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place / name).touch()
        shards = find_shards(str(tmp_path / place), ["*.tar"], "tars")
        assert [shard_name(shard) for shard in shards] == ["a/00.tar", "b.tar"]
        assert all(Path(shard).read_bytes() == b"" for shard in shards)
    assert [shard_name(s) for s in find_shards(f"{tmp_path}/?/*.tar", ["*.tar"], "tars")] == ["x/b.tar", "y/b.tar"]
    assert [shard_name(s) for s in find_shards(f"{tmp_path}/**/0*.tar", ["*.tar"], "tars")] == [
        "x/a/00.tar",
        "y/a/00.tar",
    ]
    assert shard_name("/anywhere/b.tar") == "b.tar" and shard_name("//host/b.tar") == "b.tar"
    with pytest.raises(UserError, match=r"holds no \*.zip; expected archives"):
        find_shards(str(tmp_path), ["*.zip"], "archives")


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    for path in (".", "a.tar", "*.tar"):
        (shard,) = find_shards(path, ["*.tar"], "tars")
        assert shard_name(shard) == "a.tar" and Path(shard).read_bytes() == b""


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(VALUES, max_size=6), st.integers(1, 9), st.sampled_from([None, 1]), st.data())
def test_arrays_in_pieces(values, chunk, indent, data):
    """Any array comes back whatever the size of the pieces; cut anywhere, it gives what stands before and says so."""
    before, files.CHUNK = files.CHUNK, chunk
    try:
        text = json.dumps(values, indent=indent)
        assert list(json_array(io.StringIO(f"\ufeff {text}\n"))) == values
        cut, found = data.draw(st.integers(0, len(text) - 1)), []
        with pytest.raises(Skip) as skip:
            for value in json_array(io.StringIO(text[:cut])):
                found.append(value)  # kept when it raises
        whole = len(found) - (bool(found) and found[-1] != values[len(found) - 1])  # 1 of 12 may be the last
        assert found[:whole] == values[:whole] and (whole == len(found) or isinstance(found[-1], int | float))
        assert skip.value.reason == "cut_shard"
    finally:
        files.CHUNK = before


# ---------------------------------------------------------------- folders


def test_links_to_folders_are_read_as_a_glob_reads_them(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "a").mkdir(parents=True)
    elsewhere.mkdir()
    for path in (data / "a" / "1.tar", elsewhere / "猫\u3000 2.tar", data / "a" / ".hidden.tar", data / "a" / "x.txt"):
        path.touch()
    (data / "b").symlink_to(elsewhere, target_is_directory=True)
    (data / "c.tar").symlink_to(data / "a" / "1.tar")
    (data / "a" / "loop").symlink_to(data, target_is_directory=True)
    (elsewhere / "back").symlink_to(data, target_is_directory=True)
    (data / "self").symlink_to(data / "self")
    names = ["a/1.tar", "b/猫\u3000 2.tar", "c.tar"]
    assert find_shards(str(data), ("*.tar",), "tars") == [f"{data}//{name}" for name in names]
    assert find_shards(f"{data}/**/*.tar", (), "tars") == [f"{data}//{name}" for name in names]
    (data / "a" / "gone.tar").symlink_to(tmp_path / "none.tar")
    for path in (str(data), f"{data}/*/*.tar"):
        with pytest.raises(UserError, match=r"gone\.tar: a link to a file that is not there; copy the file, or remove"):
            find_shards(path, ("*.tar",), "tars")
