"""What attackers send: each is answered by a 4xx at once, writes nothing, and leaves the server healthy.

`tests/benchmarks/benchmark_serve.py` prints how long each takes on a machine that does nothing else; here others run.
"""

import base64
import contextlib
import io
import json
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serve.costly_images import large_png, slow_jpeg
from tests.serve.test_server import QUESTION, SHOWN

MB = 1_000_000
SOON = 15.0  # seconds


def ask(
    port: int, path: str, body: bytes, kind: str = "application/json", length: int | None = None, seconds: float = 30
) -> tuple[int, float, str]:
    """POST by a bare socket, which goes on sending whatever is answered: status, seconds to it, and what was said."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}\r\n"
    head += f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), seconds) as plug:
        began = time.monotonic()
        with contextlib.suppress(OSError):  # it was answered, and the rest refused
            plug.sendall(head.encode() + body)
        answer = b""
        with contextlib.suppress(OSError):
            while not _whole(answer) and (piece := plug.recv(65536)):
                answer += piece
    taken = time.monotonic() - began
    assert answer.startswith(b"HTTP/1.1 "), f"no answer to {path}: {answer[:100]!r}"
    return int(answer.split()[1]), taken, answer.decode(errors="replace")


def _whole(answer: bytes) -> bool:
    """Whether head and body are there."""
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return bool(end) and length is not None and len(body) >= int(length[1])


def chat(url: str | None = None, count: int = 1, **fields) -> bytes:
    part = SHOWN if url is None else {"type": "image_url", "image_url": {"url": url}}
    messages = [QUESTION[0], {"role": "user", "content": [part] * count + [{"type": "text", "text": "what?"}]}]
    return json.dumps({"model": "tiny", "messages": messages, "max_tokens": 2, **fields}).encode()


@pytest.fixture
def calm(served, tmp_path):
    """Afterwards the server must be healthy, answer, and have written nothing where it runs."""
    here = {path for path in Path.cwd().iterdir()}
    yield served
    with urllib.request.urlopen(served.address + "/healthz", timeout=10) as answer:
        assert json.load(answer)["status"] == "ok"
    status, _, said = ask(served.port, "/v1/chat/completions", chat())
    assert status == 200, said
    assert {path for path in Path.cwd().iterdir()} == here


def data_url(image: bytes) -> str:
    return "data:;base64," + base64.b64encode(image).decode()


BOMB, SLOW = data_url(large_png(13_000, 13_000)), data_url(slow_jpeg())
CHAT = "/v1/chat/completions"
ATTACKS = {
    "a body of 50 MB": (CHAT, b'{"model": "' + b"a" * 50 * MB + b'"}', 413),
    "an image of 21 MB": (CHAT, chat("data:image/png;base64," + "A" * 28 * MB), 400),
    "13,000 x 13,000": (CHAT, chat(BOMB), 400),
    "an image that takes an hour": (CHAT, chat(SLOW), 400),
    "the same among others": ("/v1/embeddings", json.dumps({"model": "tiny", "input": ["a", SLOW]}).encode(), 400),
    "a file address": (CHAT, chat("file:///etc/passwd"), 400),
    "a web address": (CHAT, chat("http://127.0.0.1:1/a.png"), 400),
    "another machine's": (CHAT, chat("https://169.254.169.254/latest"), 400),
    "a relative name": (CHAT, chat("../../../../etc/passwd"), 400),
    "1,000 images": (CHAT, chat(count=1000), 400),
    "1,000 messages": (CHAT, json.dumps({"model": "tiny", "messages": QUESTION * 1000}).encode(), 400),
    "a long text": (
        CHAT,
        json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a " * MB}]}).encode(),
        400,
    ),
    "tokens": (CHAT, chat(max_tokens=-1), 400),
    "huge number": (CHAT, chat().replace(b'"max_tokens": 2', b'"max_tokens": 1' + b"0" * 5000), 400),
    "nested": (CHAT, b"[" * 100_000, 400),
    "no JSON": (CHAT, b"\xff\xfe{", 400),
    "a model's name": (CHAT, chat(model="../" * 1000), 404),
    "steps": ("/v1/images/generations", json.dumps({"prompt": "a", "steps": 10**9}).encode(), 400),
    "images": ("/v1/images/generations", json.dumps({"prompt": "a", "n": 10**9}).encode(), 400),
    "a size": ("/v1/images/generations", json.dumps({"prompt": "a", "size": "99999x99999"}).encode(), 400),
    "a user's name": (CHAT, chat(user="../" * 5 * MB + "x" * 20 * MB), 413),
    "an address": ("/v1/" + "../" * 1000, b"{}", 414),
    "a line break in an address": ("/v1/models/a%0Ab", b"{}", 404),
    "another path": ("/v1/../../etc/passwd", b"{}", 404),
}


UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"
FORM = "multipart/form-data; boundary=cut"


def form(name: bytes, data: bytes = b"x") -> bytes:
    """One file, as browsers upload it."""
    head = b'--cut\r\nContent-Disposition: form-data; name="files"; filename="' + name + b'"\r\n'
    return head + b"Content-Type: image/png\r\n\r\n" + data + b"\r\n--cut--\r\n"


def joins(path: str, **more) -> bytes:
    """An event of the page that names a file."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
    return json.dumps({"data": [file], "fn_index": 0, "session_hash": "a"}).encode()


PAGE_ATTACKS = {
    "an upload of 50 MB": (UPLOAD, form(b"a.png", b"x" * 50 * MB), 413, FORM),
    "an upload of 25 MB": (UPLOAD, form(b"a.png", b"x" * 25 * MB), 413, FORM),
    "a file name of 50 MB": (UPLOAD, form(b"a" * 50 * MB), 413, FORM),
    "a file name of 10 MB": (UPLOAD, form(b"a" * 10 * MB), 413, FORM),
    "a file name of 5 kB": (UPLOAD, form(b"a" * 5000), 413, FORM),
    "a web address in an event": (JOIN, joins("http://127.0.0.1:1/a.png"), 400, "application/json"),
    "a file address in an event": (JOIN, joins("file:///etc/passwd"), 400, "application/json"),
    "a path in an event": (JOIN, joins("/etc/passwd"), 400, "application/json"),
    "an address beside a path": (JOIN, joins("a", url="https://169.254.169.254/"), 400, "application/json"),
    "an event that is nested": (JOIN, b"[" * 200_000, 400, "application/json"),
}


@pytest.mark.parametrize("attack", PAGE_ATTACKS)
def test_attacks_of_the_page(calm, attack):
    path, body, expected, kind = PAGE_ATTACKS[attack]
    status, seconds, said = ask(calm.port, path, body, kind)
    assert status == expected, said
    assert seconds < SOON, f"answered after {seconds:.2f} s"


@pytest.mark.parametrize("name", [b"../../../../../../evil.png", b"/tmp/evil.png", b"..", b"\0", b"a/../../evil.png"])
def test_names_of_uploads_lead_nowhere(calm, name):
    """What is stored lies in the server's own folder, whatever it is called."""
    status, _, said = ask(calm.port, UPLOAD, form(name), FORM)
    assert status in (200, 400, 422), said
    if status == 200:
        (path,) = json.loads(said.partition("\r\n\r\n")[2])
        folder = Path(path).resolve()
        assert any(parent.name.startswith("emu-jax-") for parent in folder.parents), path
        assert not Path("/tmp/evil.png").exists()
        assert not Path("evil.png").exists()


@pytest.mark.parametrize(
    "path", ["file=/etc/passwd", "file=http://127.0.0.1:1/", "proxy=http://127.0.0.1:1/", "file=../../etc/passwd"]
)
def test_files_that_are_not_the_pages(calm, path):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{calm.address}/gradio_api/{path}", timeout=10)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks(calm, attack):
    path, body, expected = ATTACKS[attack]
    status, seconds, said = ask(calm.port, path, body)
    assert status == expected, said
    assert seconds < SOON, f"answered after {seconds:.2f} s"


def test_a_length_without_the_body(calm):
    """The answer comes before 50 MB are sent, and half-sent bodies are not waited for."""
    status, seconds, _ = ask(calm.port, CHAT, b"{", length=50 * MB)
    assert (status, seconds < SOON) == (413, True), seconds
    status, seconds, said = ask(calm.port, CHAT, chat()[:100], length=len(chat()))
    assert status == 408, said
    assert seconds < SOON, "after --body-seconds 0.5"


def test_a_body_of_no_length(calm):
    """Chunks are counted as they come."""
    with socket.create_connection(("127.0.0.1", calm.port), 30) as plug:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:{calm.port}\r\nContent-Type: application/json\r\n"
        plug.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b"a" * 0x100000 + b"\r\n"
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 100:
                plug.sendall(chunk)
                sent += 1
        assert sent < 60, "it was stopped near 32 MB"


def test_a_hundred_half_sent_bodies(calm):
    """They hold nobody up."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:{calm.port}\r\nContent-Type: application/json\r\n"
    head += "Content-Length: 99\r\n\r\n{"
    plugs = [socket.create_connection(("127.0.0.1", calm.port), 30) for _ in range(100)]
    try:
        for plug in plugs:
            plug.sendall(head.encode())
        assert ask(calm.port, CHAT, chat())[0] == 200
        for plug in plugs:
            assert plug.recv(100).startswith(b"HTTP/1.1 408")
    finally:
        for plug in plugs:
            plug.close()


def test_slow_images_hold_nobody_up(calm):
    """More of them than decoders: texts are answered at once, and images once a decoder is ended and replaced."""
    text = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 2}).encode()
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(ask, calm.port, CHAT, chat(SLOW), seconds=120) for _ in range(4)]
        time.sleep(1)
        assert ask(calm.port, "/v1/completions", text)[0] == 200
        assert not slow[-1].done(), "the text did not wait for it"
        said = [each.result() for each in slow]
    for status, _, words in said:
        assert status == 400
        error = json.loads(words.partition("\r\n\r\n")[2])["error"]
        assert error["param"] == "messages[1].content[0].image_url.url"
        assert "the request's images take longer than 5 s to decode" in error["message"]


def memory(pid: int, name: str) -> int:
    """MB of a line of /proc/PID/status."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) // 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_memory_of_the_server_is_bounded(calm):
    """Images of 45 megapixels are decoded elsewhere, and come back small."""
    pid = calm.process.pid
    before = memory(pid, "VmHWM")
    body = chat(data_url(large_png(6700, 6700)), count=3)  # 405 MB of pixels
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(calm.port, CHAT, body, seconds=120)[0], range(8)))
    assert set(answers) <= {200, 400}, answers  # a busy machine may not decode them in time
    assert memory(pid, "VmHWM") - before < 120
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert all(memory(int(child), "VmPeak") <= 2048 for child in children)


def test_slow_heads_hold_nobody_up(calm):
    """700 of them, more than the connections that may be open."""
    with contextlib.ExitStack() as stack:
        for _ in range(700):
            plug = stack.enter_context(socket.create_connection(("127.0.0.1", calm.port), 30))
            plug.sendall(b"GET /v1/models HTTP/1.1\r\nX: ")
        assert ask(calm.port, CHAT, chat())[0] == 200
        began = time.monotonic()
        assert plug.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 30


def test_endless_headers(calm):
    with socket.create_connection(("127.0.0.1", calm.port), 30) as plug:
        plug.sendall(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n")
        assert plug.recv(1000).startswith(b"HTTP/1.1 400")


def test_other_types(calm):
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
        assert ask(calm.port, CHAT, chat(), kind)[0] == 415


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_bomb_is_a_whole_image():
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(BOMB.partition(",")[2]))) as image:
        assert image.size == (13_000, 13_000)
