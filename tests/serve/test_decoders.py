"""The processes that decode uploads: the same pixels, and nothing that a file does outlives its request."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from emu_jax.data.images import decode_image, load_image, resize
from emu_jax.data.video import read_frames
from emu_jax.serve import decoding_worker
from emu_jax.serve.decoders import Decoders, Upload
from emu_jax.serve.limits import MEGA, LimitError, Limits
from emu_jax.serve.ticket import Busy, Failed, Stopping, TimeUp
from tests.data.damaged_images import variants
from tests.serve.costly_images import large_png, slow_jpeg
from tests.videos import write_video

SMALL = variants()["PNG"]
is_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux bounds the memory of a process")


@contextlib.contextmanager
def pool(**limits) -> Iterator[Decoders]:
    decoders = Decoders(Limits(**limits))
    try:
        yield decoders
    finally:
        decoders.close()


def decode(decoders: Decoders, *uploads: Upload, size: int = 16) -> list[np.ndarray]:
    return asyncio.run(decoders.decode(uploads, size))


def refused(decoders: Decoders, data: bytes, *, is_video: bool = False) -> str:
    with pytest.raises(LimitError) as raised:
        decode(decoders, Upload(SMALL, "image[0]"), Upload(data, "image[1]", is_video))
    assert raised.value.parameter == "image[1]"
    return str(raised.value)


def processes(decoders: Decoders) -> set[int]:
    return {process._process.pid for process in decoders._all}


def test_the_pixels_are_those_of_the_one_opener(tmp_path):
    write_video(tmp_path / "a.mp4", [np.full((32, 48, 3), 20 * shade, np.uint8) for shade in range(12)])
    video = (tmp_path / "a.mp4").read_bytes()
    whole = variants()
    with pool(decoders=1) as decoders:
        *images, frames = decode(decoders, *(Upload(data, "x") for data in whole.values()), Upload(video, "v", True))
        for (found,), data in zip(images, whole.values(), strict=True):
            np.testing.assert_array_equal(found, resize(decode_image(data, "x"), 16))
        np.testing.assert_array_equal(frames, [resize(load_image(frame), 16) for frame in read_frames(video)])
        assert len(processes(decoders)) == 1, "one process decoded all"


def test_what_is_no_image_is_said():
    with pool(decoders=1) as decoders:
        assert decode(decoders, Upload(SMALL, "x"))
        before = processes(decoders)
        assert refused(decoders, b"") == f"image[1]: {reason(b'')}"
        assert refused(decoders, b"<html>") == f"image[1]: {reason(b'<html>')}"
        assert refused(decoders, SMALL[:-30]) == f"image[1]: {reason(SMALL[:-30])}"
        bomb = large_png(13_000, 13_000)
        assert refused(decoders, bomb).startswith("image[1]: 13000 x 13000 pixels; expected at most 50 megapixels")
        assert "expected a whole video or animation" in refused(decoders, b"x" * 99, is_video=True)
        assert processes(decoders) == before, "what is wrong with a file does not end the process"


def reason(data: bytes) -> str:
    with pytest.raises(Exception) as raised:
        decode_image(data, "x")
    return raised.value.detail


def test_a_slow_image_is_ended_and_others_go_on():
    with pool(decoders=2, decode_seconds=2.0) as decoders:
        decode(decoders, Upload(SMALL, "x"))

        async def ask() -> tuple:
            slow = asyncio.create_task(decoders.decode([Upload(SMALL, "a"), Upload(slow_jpeg(), "b")], 16))
            await asyncio.sleep(0)
            (whole,) = await decoders.decode([Upload(SMALL, "c")], 16)
            return slow.done(), whole.shape, await asyncio.gather(slow, return_exceptions=True)

        began = time.monotonic()
        done, shape, (error,) = asyncio.run(ask())
        assert (done, shape) == (False, (1, 16, 16, 3))
        assert str(error).startswith("b: the request's images take longer than 2 s to decode")
        assert time.monotonic() - began < 60, "not the hour that it takes"
        assert decode(decoders, Upload(SMALL, "x"))
        assert len(processes(decoders)) <= 2


@is_linux
def test_memory_is_bounded():
    with pool(decoders=1, decode_bytes=500 * MEGA) as decoders:
        large = large_png(7000, 7000, alpha=True)  # 196 MB, and more to make it opaque
        assert refused(decoders, large) == "image[1]: decoding it needs more than 500 MB of memory; scale it down"
        assert decode(decoders, Upload(SMALL, "x"))


def test_a_process_that_dies_costs_its_request_alone():
    with pool(decoders=1, decode_seconds=60.0) as decoders:
        decode(decoders, Upload(SMALL, "x"))
        (first,) = processes(decoders)

        def kill() -> None:
            while decoders._idle:  # until it is taken
                time.sleep(0.01)
            time.sleep(0.2)
            os.kill(first, signal.SIGKILL)

        slow = Upload(slow_jpeg(), "x")
        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(LimitError, match="x: its decoder failed; save it anew, as JPEG or PNG"):
            decode(decoders, slow)
        killer.join()
        assert first not in processes(decoders)
        (second,) = processes(decoders)
        os.kill(second, signal.SIGKILL)  # while nobody uses it
        decoders._idle[0]._process.wait()
        assert decode(decoders, Upload(SMALL, "x"))


@pytest.mark.parametrize("program", ["false", "no-such-program"])
def test_a_process_that_cannot_start_is_named(monkeypatch, program):
    with pool(decoders=1) as decoders:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", program)
            with pytest.raises(Failed, match="did not start"):
                decode(decoders, Upload(SMALL, "x"))
        while True:  # a replacement was started in the meantime
            with contextlib.suppress(Failed):
                assert decode(decoders, Upload(SMALL, "x"))
                break


def test_few_wait():
    with pool(decoders=1, waiting=1, decode_seconds=1.0) as decoders:

        async def ask() -> list:
            uploads = [Upload(slow_jpeg(scans=2000), "x")]
            return await asyncio.gather(*(decoders.decode(uploads, 16) for _ in range(4)), return_exceptions=True)

        found = asyncio.run(ask())
    assert [type(each) for each in found] == [LimitError, LimitError, Busy, Busy]


def test_who_has_waited_too_long_is_told():
    with pool(decoders=1, seconds=0.5, decode_seconds=2.0) as decoders:

        async def ask() -> list:
            uploads = [Upload(slow_jpeg(scans=2000), "x")]
            return await asyncio.gather(*(decoders.decode(uploads, 16) for _ in range(2)), return_exceptions=True)

        assert [type(each) for each in asyncio.run(ask())] == [LimitError, TimeUp]


def test_closing_ends_what_runs():
    with pool(decoders=2) as decoders:
        decoders.start()
        assert len(processes(decoders)) == 2
        decode(decoders, Upload(SMALL, "x"))
        running = processes(decoders)

        async def ask() -> None:
            uploads = [Upload(slow_jpeg(), "x")]
            tasks = [asyncio.create_task(decoders.decode(uploads, 16)) for _ in range(4)]
            await asyncio.sleep(0.5)
            decoders.close()
            for task in tasks:  # two of them wait
                with pytest.raises(Stopping):
                    await task
            with pytest.raises(Stopping):
                await decoders.decode([Upload(SMALL, "x")], 16)

        asyncio.run(ask())
    for pid in running:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_starts_without_jax_and_ends_with_its_input():
    """Nothing that it imports may be slow; it also ends when the server was killed."""
    code = f"import sys, {decoding_worker.__name__}; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    command = [sys.executable, "-m", decoding_worker.__name__, str(2048 * MEGA)]
    done = subprocess.run(command, input=b"", capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, decoding_worker.READY, b"")
