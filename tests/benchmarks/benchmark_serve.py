"""A server under load: `python -m tests.benchmarks.benchmark_serve WORKDIR [--seconds 60] [--clients 64]`.

WORKDIR is a quick start's, with `chat`, `unet` and `vae` in it. A real `emu-jax serve` is asked about held-out images
by one client and then by many, each asking again as soon as it is answered: requests a second, how long they took,
what memory did. Then clients leave, the queue is filled, and attacks are timed (`tests/serve/test_attack.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import time
from pathlib import Path

import numpy as np

from emu_jax.data.fluent_emoji import examples
from tests.serve import test_attack
from tests.serve.conftest import Server
from tests.serve.test_server import data_uri, get

CHAT, IMAGES = "/v1/chat/completions", "/v1/images/generations"


@dataclasses.dataclass
class Client:
    """One connection that asks and waits, over and over."""

    port: int
    bodies: list[bytes]
    seconds: list[float] = dataclasses.field(default_factory=list)
    statuses: list[int] = dataclasses.field(default_factory=list)

    async def run(self, until: float, path: str = CHAT) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        number = 0
        while time.monotonic() < until:
            body = self.bodies[number % len(self.bodies)]
            number += 1
            head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
            began = time.monotonic()
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            self.seconds.append(time.monotonic() - began)
            self.statuses.append(int(answer.split()[1]))
            if b"connection: close" in answer.lower():
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.close()


def questions(name: str, size: int) -> list[bytes]:
    """What is asked: every held-out image once."""
    found = []
    for example in examples("heldout_combinations", size):
        shown = {"type": "image_url", "image_url": {"url": data_uri(example.pixels)}}
        content = [shown, {"type": "text", "text": "what is this?"}]
        request = {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 20}
        found.append(json.dumps(request).encode())
    return found


def memory(server: Server) -> float:
    """MB that the server holds."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return next(int(line.split()[1]) / 1000 for line in status.splitlines() if line.startswith("VmRSS"))


async def load(
    server: Server, bodies: list[bytes], clients: int, seconds: float
) -> tuple[list[Client], list[float], float]:
    """All clients for so long: they, the server's memory at ten times, and the seconds it took."""
    asked = [Client(server.port, bodies[number:] + bodies[:number]) for number in range(clients)]
    began = time.monotonic()

    async def watch() -> list[float]:
        seen = []
        for number in range(1, 11):
            await asyncio.sleep(max(0.0, began + seconds * number / 10 - time.monotonic()))
            seen.append(memory(server))
        return seen

    watched, *_ = await asyncio.gather(watch(), *(client.run(began + seconds) for client in asked))
    return asked, watched, time.monotonic() - began


def tell(title: str, clients: list[Client], seconds: float) -> float:
    """Prints a row; requests a second."""
    taken = [value for client in clients for value in client.seconds]
    wrong = sum(status != 200 for client in clients for status in client.statuses)
    p50, p95 = np.percentile(taken, [50, 95])
    counts = [len(client.seconds) for client in clients]
    rate = len(taken) / seconds
    latency = f"p50 {1000 * p50:6.0f} ms   p95 {1000 * p95:6.0f} ms   max {1000 * max(taken):6.0f} ms"
    about = f"errors {wrong}   a client {min(counts)} to {max(counts)}"
    print(f"{title:28} {rate:7.1f}/s   {latency}   {about}", flush=True)
    return rate


def crowd(server: Server, body: bytes, count: int) -> None:
    """More requests at once than may wait: some are refused, none is lost."""

    async def run() -> list[Client]:
        clients = [Client(server.port, [body]) for _ in range(count)]
        await asyncio.gather(*(_once(client) for client in clients))
        return clients

    async def _once(client: Client) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\nContent-Type: application/json\r\n"
        began = time.monotonic()
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        client.seconds.append(time.monotonic() - began)
        client.statuses.append(int(answer.split()[1]))
        writer.close()

    clients = asyncio.run(run())
    statuses = [client.statuses[0] for client in clients]
    refused = [client.seconds[0] for client in clients if client.statuses[0] == 429]
    print(f"{count} drawings at once: {statuses.count(200)} drawn, {statuses.count(429)} answered 429", end="")
    print(f" after {1000 * statistics.median(refused):.0f} ms (median)" if refused else "")


def leave(server: Server, body: bytes, count: int) -> None:
    """Clients that go as soon as they have asked, and how long the server works for them."""

    async def run() -> None:
        for _ in range(count):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            head = f"POST {IMAGES} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.close()

    asyncio.run(run())
    began = time.monotonic()
    while any(sum(json.loads(get(server, "/healthz")[1])[kind].values()) for kind in ("running", "waiting")):
        time.sleep(0.02)
    print(f"{count} clients that leave drawings of 200 steps: all places free after {time.monotonic() - began:.2f} s")


def attacks(port: int) -> None:
    """Every attack's answer and its seconds."""
    print("attack                     status   seconds")
    asked = {name: (path, body) for name, (path, body, _) in test_attack.ATTACKS.items()}
    asked |= {name: (path, body, kind) for name, (path, body, _, kind) in test_attack.PAGE_ATTACKS.items()}
    for name, arguments in asked.items():
        status, seconds, _ = test_attack.ask(port, *arguments)
        print(f"{name:26} {status}      {seconds:.3f}")
    status, seconds, _ = test_attack.ask(port, CHAT, b"{", length=50 * test_attack.MB)
    print(f"{'50 MB announced, 1 B sent':26} {status}      {seconds:.3f}")
    status, seconds, _ = test_attack.ask(port, CHAT, b"{", length=99)
    print(f"{'a half-sent body':26} {status}      {seconds:.3f}   (--body-seconds 0.5)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    server = Server("--checkpoint", options.workdir, "--name", "tiny", "--body-seconds", "0.5")
    try:
        bodies = questions("tiny", 64)
        asyncio.run(load(server, bodies, 4, 3.0))  # what is imported and opened once
        one, _, seconds = asyncio.run(load(server, bodies, 1, options.seconds / 2))
        alone = tell("1 client", one, seconds)
        many, held, seconds = asyncio.run(load(server, bodies, options.clients, options.seconds))
        together = tell(f"{options.clients} clients", many, seconds)
        print(f"{'together over alone':28} {together / alone:7.1f}x")
        print("memory, MB, ten times:", " ".join(f"{value:.0f}" for value in held))
        drawing = json.dumps({"prompt": "woman astronaut", "steps": 200}).encode()
        leave(server, drawing, 20)
        crowd(server, json.dumps({"prompt": "woman astronaut", "steps": 5}).encode(), 300)
        attacks(server.port)
    finally:
        print("stopped with exit code", server.stop())


if __name__ == "__main__":
    main()
