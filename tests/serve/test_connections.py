"""Clients that are slow on purpose, by real sockets against a real uvicorn: each is let go, and others are answered."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from emu_jax.serve.connections import most_connections
from emu_jax.serve.guard import Guard
from emu_jax.serve.limits import Limits
from emu_jax.serve.server import web_config

LIMITS = Limits(
    head_seconds=0.5, body_seconds=0.5, upload_seconds=1.5, answer_seconds=0.5, half_closed_seconds=1.5, connections=20
)
LATER = 20.0  # seconds in which a deadline has passed on a busy machine
SIZE = 40_000_000  # of an answer that no socket buffers
GONE: list[str] = []


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello " * int(request.query_params.get("count", 1)))


async def large(request: Request) -> Response:
    return Response(bytes(SIZE))


async def late(request: Request) -> Response:
    """Its answer takes its time, unless the client disconnects."""
    await request.body()
    seconds = float(request.query_params["seconds"])
    with contextlib.suppress(TimeoutError):
        while (await asyncio.wait_for(request.receive(), seconds))["type"] != "http.disconnect":
            pass
        GONE.append(request.query_params["name"])
    return PlainTextResponse("late")


async def stream(request: Request) -> Response:
    async def pieces():
        for number in range(20):
            yield f"{number} "
            await asyncio.sleep(0.2)

    return StreamingResponse(pieces())


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    routes = [Route("/hello", hello), Route("/large", large), Route("/stream", stream)]
    routes += [Route("/late", late, methods=["GET", "POST"]), Route("/echo", hello, methods=["POST"])]
    app = Guard(Starlette(routes=routes), LIMITS, None, lambda payload, host: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(web_config(app, LIMITS))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def plugged(port: int, sent: str = "", buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as plug:
        if buffer is not None:
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        plug.settimeout(LATER)
        plug.connect(("127.0.0.1", port))
        plug.sendall(sent.encode())
        yield plug


def head(port: int, path: str, *headers: str, method: str = "GET") -> str:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", *headers, "", ""])


def rest(plug: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := plug.recv(1 << 20):
            found += piece
    return found


def drip(plug: socket.socket, text: str, pause: float = 0.1) -> None:
    """Sends a character at a time until the server has enough of it."""
    with contextlib.suppress(OSError):
        for character in text:
            plug.sendall(character.encode())
            time.sleep(pause)


def answers(port: int) -> bool:
    with plugged(port, head(port, "/hello", "Connection: close")) as plug:
        return rest(plug).endswith(b"hello ")


def until(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + LATER
    while not (done := holds()) and time.monotonic() < end:
        time.sleep(0.02)
    return done


@pytest.mark.parametrize("sent", ["", "G", "GET /hello HTTP/1.1\r\n", "GET /hello HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "])
def test_a_head_that_never_ends(port, sent):
    with plugged(port, sent) as plug:
        assert answers(port)
        said = rest(plug).decode()
    assert said.startswith("HTTP/1.1 408")
    assert "incomplete after 0.5 s" in json.loads(said.partition("\r\n\r\n")[2])["error"]["message"]


def test_a_head_that_comes_drop_by_drop(port):
    """What comes meanwhile extends nothing, and a second request has a deadline of its own."""
    with plugged(port, head(port, "/hello")) as plug:
        assert plug.recv(1000).startswith(b"HTTP/1.1 200")
        drip(plug, head(port, "/hello", *["X: " + "a" * 50] * 4))
        assert b"408" in rest(plug)


def test_a_body_that_comes_drop_by_drop(port):
    """No pause is long, and it ends nevertheless."""
    with plugged(port, head(port, "/echo", "Content-Length: 1000", method="POST")) as plug:
        began = time.monotonic()
        drip(plug, "a" * 100)
        said = rest(plug).decode()
    assert said.startswith("HTTP/1.1 408") and "the body is incomplete after 1.5 s" in said
    assert time.monotonic() - began > 1.4


def test_a_body_that_stops(port):
    with plugged(port, head(port, "/echo", "Content-Length: 1000", method="POST") + "a") as plug:
        assert b"none of it arrived for 0.5 s" in rest(plug)


def test_an_answer_that_nobody_reads(port):
    """The connection ends; a client that reads slowly gets all of it."""
    with plugged(port, head(port, "/large"), buffer=4096) as plug, plugged(port, head(port, "/large")) as slow:
        found = 0
        while found < SIZE:
            piece = slow.recv(1 << 20)
            assert piece, f"only {found} bytes came"
            found += len(piece)
            time.sleep(0.03)
        assert len(rest(plug)) < SIZE


def test_a_client_that_stops_sending_is_answered(port):
    """As `nc -N` and some libraries do; also by a stream that takes longer than the deadline."""
    for path, last in (("/hello", "hello "), ("/late?seconds=0.3&name=a", "late"), ("/stream", "19 \r\n0\r\n\r\n")):
        with plugged(port, head(port, path)) as plug:
            plug.shutdown(socket.SHUT_WR)
            assert rest(plug).decode().endswith(last)


def test_half_a_request_is_not_waited_for(port):
    for sent in ("GET /hello HT", head(port, "/echo", "Content-Length: 9", method="POST") + "a"):
        with plugged(port, sent) as plug:
            plug.shutdown(socket.SHUT_WR)
            rest(plug)


@pytest.mark.parametrize("closes", [socket.socket.close, lambda plug: plug.shutdown(socket.SHUT_WR)])
def test_who_has_left_is_found_out(port, closes):
    """An answer that does not begin in time is cancelled: the client may have left."""
    name = f"left{time.monotonic()}"
    with plugged(port, head(port, f"/late?seconds=60&name={name}")) as plug:
        time.sleep(0.2)
        closes(plug)
        assert until(lambda: name in GONE)


def test_connections_that_are_silent_make_room(port):
    """Those that wait for a head the longest are closed, not those that are answered."""
    with plugged(port, head(port, "/stream", "Connection: close")) as busy, contextlib.ExitStack() as stack:
        plugs = [stack.enter_context(plugged(port)) for _ in range(60)]
        assert answers(port)
        assert rest(busy).endswith(b"0\r\n\r\n")
        for plug in plugs:
            rest(plug)


def test_requests_one_after_the_other(port):
    """Deadlines of one request do not reach the next one."""
    with plugged(port) as plug:
        plug.sendall((head(port, "/hello") * 3).encode())
        time.sleep(0.2)
        plug.sendall(head(port, "/late?seconds=1.5&name=b", "Connection: close").encode())
        assert rest(plug).count(b"HTTP/1.1 200") == 4


def test_half_of_the_files_are_for_connections():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        assert most_connections(Limits()) == 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert most_connections(Limits(connections=7)) == 7
