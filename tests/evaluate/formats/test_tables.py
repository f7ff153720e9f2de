"""Tables: rows with their places, and what is refused."""

import pyarrow
import pyarrow.parquet
import pytest

from emu_jax.errors import UserError
from emu_jax.evaluate.formats.tables import read_parquet, read_table


def test_places_of_rows(tmp_path):
    """A cell may have several lines: the place is the last one."""
    path = tmp_path / "a.tsv"
    path.write_bytes(b'\xef\xbb\xbfid\ttext\n1\t"a\nb"\n2\tc"d, e\n')
    rows = [(row.place, row.fields) for row in read_table(path, ("id", "text"), separator="\t")]
    assert rows == [("line 3", {"id": "1", "text": "a\nb"}), ("line 4", {"id": "2", "text": 'c"d, e'})]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "an empty file; download it again"),
        (b"Entry not found", "the text 'Entry not found' in place of the file; look at its name"),
        (b"id,words\n1,a\n", "no column text; expected id, text"),
        (b"id,text\n", "no rows; expected a CSV of id, text"),
        (b"id,text\n1\n", "line 2 does not have the 2 cells of the header; expected the file as it is published"),
        (b"id,text\n1,a,b\n", "line 2 does not have the 2 cells of the header; expected the file as it is published"),
        (b"id,text\n1,\xff\n", "cannot be read ('utf-8' codec can't decode byte 0xff in position 10"),
    ],
)
def test_what_is_no_table(tmp_path, content, expected):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_table(path, ("id", "text")))
    assert str(caught.value).startswith(f"{path}: {expected}") and "\n" not in str(caught.value)


def test_rows_of_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [str(n) for n in range(40)], "text": ["a"] * 40}), path)
    rows = [(row.place, row.fields) for row in read_parquet(path, ("id",))]
    assert rows == [(f"row {n}", {"id": str(n)}) for n in range(40)]
    with pytest.raises(UserError, match=r"a\.parquet: no column image; expected id, image$"):
        list(read_parquet(path, ("id", "image")))
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:3f\n")
    with pytest.raises(UserError, match=r"a\.parquet: a Git-LFS pointer, not the file itself; run `git lfs pull`"):
        list(read_parquet(path, ("id",)))
    path.write_bytes(b"PAR1 and no more\0")
    with pytest.raises(
        UserError, match=r"a\.parquet: cannot be read \(.*\); expected the file as it is published, so "
    ):
        list(read_parquet(path, ("id",)))
