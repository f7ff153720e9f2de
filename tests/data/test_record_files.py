"""Records of many files by index: in order, by few handles, and without opening what is not read."""

import os
import random
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from emu_jax.data.record_files import RecordFile, RecordFiles, _reason, raise_file_limit
from emu_jax.data.records import write_records
from emu_jax.errors import TransientError, UserError

FILES, HANDLES = 6000, 1024


def write(folder, counts: list[int]) -> list[RecordFile]:
    """Files of so many records; a record states its file and its position."""
    files = []
    for number, count in enumerate(counts):
        path = folder / f"{number}.array_record"
        write_records(path, [b"%d/%d" % (number, position) for position in range(count)])
        files.append(RecordFile(path, count, path.stat().st_size))
    return files


def test_records_come_in_the_order_of_their_indices(tmp_path):
    counts = [3, 40, 0, 1]
    records = RecordFiles(write(tmp_path, counts))
    whole = [b"%d/%d" % (number, position) for number, count in enumerate(counts) for position in range(count)]
    assert len(records) == len(whole) == 44
    assert records.read(range(44)) == whole
    shuffled = random.Random(0).choices(range(44), k=200)  # with repetitions
    assert records.read(shuffled) == [whole[index] for index in shuffled]
    assert records.read([]) == []
    for outside in (-1, 44):
        with pytest.raises(IndexError):
            records.read([outside])


def test_only_files_whose_records_are_read_are_opened(tmp_path):
    files = write(tmp_path, [2, 2, 2])
    files[0].path.unlink()
    files[2].path.write_bytes(b"")
    records = RecordFiles(files)
    assert records.read([2, 3]) == [b"1/0", b"1/1"]
    with pytest.raises(UserError, match=rf"^{files[0].path}: damaged \(open\(\) failed: No such file"):
        records.read([0])
    with pytest.raises(UserError, match=rf"^{files[2].path}: damaged \(.+\); copy it again or prepare the data again$"):
        records.read([2, 4])


@pytest.mark.parametrize(
    "said, kind",
    [
        ("pread() failed: Input/output error; reading a", TransientError),
        ("open() failed: Stale file handle; opening a", TransientError),
        ("open() failed: No such file or directory; opening a", UserError),
        ("Corrupted Riegeli/records file: chunk header hash mismatch", UserError),
    ],
)
def test_a_file_share_that_fails_in_passing_is_no_damage(said, kind):
    assert type(_reason(Path("a"), said)) is kind


def test_another_number_of_records_than_stated(tmp_path):
    (file,) = write(tmp_path, [2])
    with pytest.raises(UserError, match=rf"^{file.path}: damaged \(2 records, its manifest states 3\)"):
        RecordFiles([file._replace(records=3)]).read([0])


def test_threads_read_at_once(tmp_path):
    records = RecordFiles(write(tmp_path, [50] * 6))
    expected = records.read(range(300))
    found = {}

    def read(seed: int) -> None:
        order = random.Random(seed).sample(range(300), 300)
        found[seed] = dict(zip(order, records.read(order), strict=True))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all([found[seed][index] for index in range(300)] == expected for seed in range(8))


def test_a_forked_process_opens_its_own_files(tmp_path):
    records = RecordFiles(write(tmp_path, [1, 1]))
    assert records.read([0, 1]) == [b"0/0", b"1/0"]  # the parent has threads and open files
    child = os.fork()
    if child == 0:
        os._exit(records.read([1, 0]) != [b"1/0", b"0/0"])
    assert os.waitpid(child, 0)[1] == 0


READ_ALL = """
import os, random, resource, sys
from pathlib import Path
from emu_jax.data.record_files import RecordFile, RecordFiles
source, count, handles = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (handles, handles))
before = len(os.listdir("/proc/self/fd"))
records = RecordFiles(RecordFile(source / f"{number}.array_record", 1, 0) for number in range(count))
assert len(os.listdir("/proc/self/fd")) == before, "a file was opened before one of its records was read"
order = random.Random(0).sample(range(count), count)
for first in range(0, count, 1024):
    found = records.read(order[first : first + 1024])
    assert found == [b"0/0"] * len(found)
print(len(os.listdir("/proc/self/fd")))
"""


def test_six_thousand_files_with_a_thousand_handles(tmp_path):
    (file,) = write(tmp_path, [1])
    for number in range(1, FILES):
        os.link(file.path, tmp_path / f"{number}.array_record")
    command = [sys.executable, "-c", READ_ALL, str(tmp_path), str(FILES), str(HANDLES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= HANDLES // 4 + 16


def test_the_limit_of_open_files_is_raised():
    code = (
        "import resource; from emu_jax.data.record_files import raise_file_limit\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "print(raise_file_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    returned, soft = map(int, done.stdout.split())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert returned == soft == min(hard, 1 << 16)
    assert raise_file_limit() <= 1 << 16
