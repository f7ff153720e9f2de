"""The page in a browser, with a real server and model: chat, drawing, blending, documents and few-shot prompts.

The page shows what the engine returns, and neither the browser nor the server loads anything from other sites.
"""

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu_jax import Emu
from emu_jax.data import fluent_emoji
from emu_jax.data.images import resize
from emu_jax.serve.encoded_prompt import Message
from emu_jax.serve.engine import Engine
from emu_jax.serve.settings import DrawSettings, TextSettings
from tests.serve.conftest import LIMITS
from tests.train import tiny

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH; apt-get install chromium"),
]
KEY = "a key of letters"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
PATIENCE = 60_000  # milliseconds, of a busy machine
FAST = DrawSettings(sampler="pndm", steps=3, guidance=7.5, seed=5)

connections: list[str] = []  # that this process opened


def _audit(event: str, arguments: tuple) -> None:
    if event == "socket.connect":
        connections.append(str(arguments[1]))


@dataclasses.dataclass
class Server:
    """A server that runs in a thread of this process."""

    engine: Engine
    address: str
    folder: Path


@contextlib.contextmanager
def serve(engine: Engine, folder: Path, key: str | None = None):
    from fastapi import FastAPI

    from emu_jax.serve import page, page_guard
    from emu_jax.serve.guard import Guard

    folder.mkdir()
    before = {name: os.environ.get(name) for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE")}
    app = page.mount(FastAPI(), engine, "tiny", key, folder)
    app = Guard(app, engine.limits, key, page_guard.refuses)
    config = uvicorn.Config(app, port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(engine, f"http://127.0.0.1:{port}", folder)
    finally:
        server.should_exit = True
        thread.join()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    sys.addaudithook(_audit)
    with serve(engine, tmp_path_factory.mktemp("page") / "files") as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, server: Server, size: str = "desktop"):
    """A page that has no errors and asks nobody else, until the end."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    here = (server.address + "/", "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(here) else problems.append(request.url))
    page.goto(server.address)
    page.wait_for_selector("#tabs")
    page.wait_for_function("window.gradio_config && document.querySelectorAll('[role=tab]').length >= 4")
    page.wait_for_timeout(1500)  # until the page listens to events
    try:
        yield page
        assert problems == []
    finally:
        context.close()


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as page:
        yield page


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Path]:
    """Held-out images as files."""
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for number, example in enumerate(fluent_emoji.examples("heldout_combinations", 128)[:3]):
        paths.append(folder / f"{number}.png")
        Image.fromarray(example.pixels).save(paths[-1])
    return paths


def tab(page, name: str) -> None:
    page.locator("#tabs > .tab-wrapper").get_by_role("tab", name=name, exact=True).click()


def downloaded(page, button) -> bytes:
    with page.expect_download() as download:
        button.click()
    return Path(download.value.path()).read_bytes()


def enabled(page, name: str):
    button = page.locator("button:visible, a:visible").filter(has_text=re.compile(f"^\\s*{re.escape(name)}\\s*$")).first
    playwright.expect(button).to_be_enabled(timeout=PATIENCE)
    return button


def ask(page, question: str, *files: Path) -> None:
    box = page.locator("#ask")
    if files:
        box.locator("input[type=file]").set_input_files([str(file) for file in files])
        page.wait_for_function(f"document.querySelectorAll('#ask .thumbnail-item').length >= {len(files)}")
    box.locator("textarea").fill(question)
    box.locator("textarea").press("Enter")


def quick(page) -> None:
    """Few steps, and a seed of its own."""
    page.locator("#draw-settings > button").click()
    settings = page.locator("#draw-settings")
    settings.get_by_label("number input for Steps").fill(str(FAST.steps))
    settings.get_by_label("Seed").fill(str(FAST.seed))
    settings.get_by_label("Seed").press("Tab")


def drawn_images(page, count: int) -> list[Image.Image]:
    """The files that the page shows."""
    page.wait_for_function(f"document.querySelectorAll('#drawn img').length >= {count}", timeout=PATIENCE)
    playwright.expect(page.locator("#draw-status")).to_contain_text("guidance", timeout=PATIENCE)
    addresses = page.eval_on_selector_all(
        "#drawn .grid-container img, #drawn .thumbnail-item img", "x => x.map(i => i.src)"
    )
    return [Image.open(io.BytesIO(page.request.get(address).body())) for address in dict.fromkeys(addresses)]


def result(ticket_of) -> object:
    """The engine's own result."""

    async def run() -> object:
        return await (await ticket_of()).result()

    with ThreadPoolExecutor(1) as pool:  # the browser's loop runs in this thread
        return pool.submit(asyncio.run, run()).result()


# ---------------------------------------------------------------- chat


def test_a_question_about_an_image(page, server, samples):
    page.get_by_label("System message").fill("a red bar")
    ask(page, "what is this?", samples[0])
    playwright.expect(page.locator("#chat-status")).to_contain_text("prompt of", timeout=PATIENCE)
    image = np.asarray(Image.open(samples[0]))
    asked = [Message("system", ("a red bar",)), Message("user", (image, "what is this?"))]
    expected = result(lambda: server.engine.chat(asked, TextSettings(64)))
    said = page.locator("#chat .bot").inner_text()
    assert said.split() == expected.text.split() and f"{expected.prompt_tokens}." not in said
    assert page.locator("#chat .user img").count() == 1

    with zipfile.ZipFile(io.BytesIO(downloaded(page, enabled(page, "Download")))) as archive:
        about = json.loads(archive.read("settings.json"))
        assert sorted(archive.namelist()) == ["image-1.png", "settings.json"]
    assert about["turns"][0]["user"] == [{"image": "image-1.png"}, {"text": "what is this?"}]
    assert about["turns"][0]["assistant"] == [{"text": expected.text}]
    assert about["turns"][0]["settings"]["system"] == "a red bar"

    enabled(page, "Take back").click()
    playwright.expect(page.locator("#ask textarea")).to_have_value("what is this?")
    assert page.locator("#chat .bot").count() == 0
    enabled(page, "Clear").click()
    playwright.expect(page.locator("#ask textarea")).to_have_value("")


def test_texts_are_shown_as_they_are(page):
    """Neither what a person writes nor what a model says becomes a part of the page, or loads anything."""
    text = '<img src="http://example.com/a.png"> ![a](http://example.com/b.png) <b>bold</b> &amp;'
    page.get_by_label("System message").fill("a")
    page.get_by_label("number input for New tokens").fill("2")
    ask(page, text)
    playwright.expect(page.locator("#chat .user").first).to_contain_text(text, timeout=PATIENCE)
    assert page.locator("#chat .user img, #chat .user b").count() == 0


def test_an_answer_that_begins_an_image_is_drawn(browser, model, tmp_path):
    drawer = tiny.that_draws(model.merged())
    engine = Engine(drawer, LIMITS)
    engine.start()
    with serve(engine, tmp_path / "files") as server, opened(browser, server) as page:
        ask(page, "a bar")
        playwright.expect(page.locator("#chat .bot img")).to_have_count(1, timeout=PATIENCE)
        address = page.locator("#chat .bot img").get_attribute("src")
        shown = Image.open(io.BytesIO(page.request.get(address).body()))
        ask(page, "and again")  # reads the drawn image, and draws another one
        playwright.expect(page.locator("#chat .bot img")).to_have_count(2, timeout=PATIENCE)
        with zipfile.ZipFile(io.BytesIO(downloaded(page, enabled(page, "Download")))) as archive:
            assert sorted(archive.namelist()) == ["drawing-1.png", "drawing-2.png", "settings.json"]
    engine.close(0)
    chat = drawer.chat("")
    chat.say("a bar")
    assert_alike(shown, chat.draw().image)


def test_one_click_shows_what_it_can_do(page, server):
    """An example of each tab asks, draws, blends, continues and answers at once."""
    clicked = ".gallery-item, tbody tr"
    page.get_by_label("System message").fill("a")  # the paper's is longer than this model's context
    page.locator("#chat-examples").locator(clicked).first.click()
    playwright.expect(page.locator("#chat .bot").first).to_be_visible(timeout=PATIENCE)
    tab(page, "Draw")
    quick(page)
    page.locator("#draw-names").locator(clicked).first.click()
    drawn_images(page, 1)
    before = page.locator("#drawn img").first.get_attribute("src")
    page.get_by_role("tab", name="Blend").click()
    page.locator("#draw-blends").locator(clicked).first.click()
    page.wait_for_function("x => document.querySelector('#drawn img')?.src !== x", arg=before, timeout=PATIENCE)
    drawn_images(page, 1)
    tab(page, "Document")
    page.get_by_label("number input for Steps").locator("visible=true").fill("3")
    page.locator("#document-examples").locator(clicked).nth(1).click()
    playwright.expect(page.locator("#document-status")).to_contain_text("new items", timeout=PATIENCE)
    tab(page, "Few-shot")
    page.get_by_label("Form of the prompt").click()
    page.get_by_role("option", name="plain: image, text").click()
    page.locator("#few-shot-examples").locator(clicked).first.click()
    playwright.expect(page.locator("#few-shot-status")).to_contain_text("prompt of", timeout=PATIENCE)


def test_errors_are_one_line(page, server, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    ask(page, "what is this?", tmp_path / "broken.png")
    toast = page.locator(".toast-body").first
    playwright.expect(toast).to_contain_text("broken.png: not a readable image", timeout=PATIENCE)
    assert str(server.folder) not in toast.inner_text()


def test_stopping_or_leaving_frees_the_slot(browser, server):
    def running() -> int:
        return sum(server.engine.running().values()) + sum(server.engine.waiting().values())

    def until(count: int) -> None:
        limit = time.monotonic() + PATIENCE / 1000
        while (running() > 0) != (count > 0) and time.monotonic() < limit:
            time.sleep(0.02)
        assert (running() > 0) == (count > 0)

    for leaves in (False, True):
        with opened(browser, server) as page:
            tab(page, "Draw")
            page.locator("#draw-settings > button").click()
            page.locator("#draw-settings").get_by_label("number input for Steps").fill("900")
            page.locator("#draw-settings").get_by_label("number input for Images").fill("12")
            page.locator("#draw-words textarea").fill("a red bar")
            cancelled = server.engine.counts.cancelled
            page.locator("#draw-by-words").click()
            until(1)
            if not leaves:
                enabled(page, "Stop").click()
                until(0)
                playwright.expect(page.locator("#draw-status")).to_contain_text("Nothing was drawn")
        if leaves:
            until(0)
        assert server.engine.counts.cancelled > cancelled


# ---------------------------------------------------------------- draw


def assert_alike(shown, expected) -> None:
    """The same image: one drawn in another slot differs by rounding, which these random weights enlarge."""
    difference = np.abs(np.asarray(shown, int) - np.asarray(expected, int)).mean()
    assert difference < 1.0, f"images differ by {difference:.1f} of 255"


def test_an_image_from_words(page, server):
    tab(page, "Draw")
    quick(page)
    page.locator("#draw-words textarea").fill("a red bar")
    page.locator("#draw-by-words").click()
    (shown,) = drawn_images(page, 1)
    expected = result(lambda: server.engine.draw(["a red bar"], FAST))
    assert_alike(shown, expected.image)
    assert json.loads(shown.text["prompt"]) == ["a red bar"] and shown.text["seed"] == "5"
    assert json.loads(shown.text["settings"]) == {"sampler": "pndm", "steps": 3, "guidance": 7.5}
    assert "pndm, 3 steps, guidance 7.5, seed 5" in page.locator("#draw-status").inner_text()
    with zipfile.ZipFile(io.BytesIO(downloaded(page, enabled(page, "Download with settings")))) as archive:
        about = json.loads(archive.read("settings.json"))
        assert about["prompt"] == [{"text": "a red bar"}] and about["drawings"][0]["settings"]["seed"] == 5


def test_a_blend_in_the_users_order(page, server, samples):
    tab(page, "Draw")
    quick(page)
    page.get_by_role("tab", name="Blend").click()
    page.locator("#blend input[type=file]").first.set_input_files([str(path) for path in samples[:2]])
    page.wait_for_function("document.querySelectorAll('#blend .thumbnail-item img').length >= 2")
    page.locator("#blend .thumbnail-item").nth(1).click()
    enabled(page, "◀ Earlier").click()
    page.wait_for_function("document.querySelector('#blend .caption-label')?.innerText.trim() == '1'")
    page.locator("#draw-by-blend").click()
    (shown,) = drawn_images(page, 1)
    images = [np.asarray(Image.open(path)) for path in (samples[1], samples[0])]
    expected = result(lambda: server.engine.draw(images, FAST))
    assert_alike(shown, expected.image)
    with zipfile.ZipFile(io.BytesIO(downloaded(page, enabled(page, "Download with settings")))) as archive:
        first = np.asarray(Image.open(io.BytesIO(archive.read("image-1.png"))))
    np.testing.assert_array_equal(first, resize(images[0], server.engine.plain.config.vision.image_size))


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, "x" * 200_000), (1, 99), (1, None), (2, "plms"), (3, 5000), (3, 2.5), (4, 1e9), (5, -1), (5, 2**40)],
)
def test_limits_hold_whatever_is_sent(server, place, value):
    """Past the widgets: what a program sends instead of the page."""
    import httpx

    data: list = ["a red bar", 1, FAST.sampler, FAST.steps, FAST.guidance, FAST.seed]
    data[place] = value
    images = server.engine.counts.images
    with httpx.Client(base_url=server.address, timeout=60) as client:
        config = client.get("/config").json()
        words = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "draw-words")
        function = next(each["id"] for each in config["dependencies"] if [words, "submit"] in each["targets"])
        asked = {"data": data, "fn_index": function, "session_hash": f"limits{place}{str(value)[:9]}"}
        assert client.post("/gradio_api/queue/join", json=asked).status_code == 200
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": asked["session_hash"]}) as events:
            told = [json.loads(line.removeprefix("data: ")) for line in events.iter_lines() if line]
    (end,) = [event for event in told if event["msg"] == "process_completed"]
    assert not end["success"] and "\n" not in (end["output"]["error"] or "")
    assert server.engine.counts.images == images


# ---------------------------------------------------------------- documents and examples


def test_a_document_is_continued(page, server, samples):
    tab(page, "Document")
    page.get_by_label("number input for Steps").locator("visible=true").fill("3")
    page.get_by_label("New items").click()
    page.get_by_role("option", name="image, text").click()
    page.locator("#add input[type=file]").set_input_files(str(samples[0]))
    page.wait_for_selector("#add .thumbnail-item")
    page.locator("#add textarea").fill("a red bar")
    enabled(page, "Add").click()
    playwright.expect(page.locator("#paper p")).to_have_text("a red bar", timeout=PATIENCE)
    page.locator("#go").click()
    playwright.expect(page.locator("#document-status")).to_contain_text("new items", timeout=PATIENCE)
    page_file = downloaded(page, enabled(page, "Download as HTML")).decode()
    with zipfile.ZipFile(io.BytesIO(downloaded(page, enabled(page, "Download all (zip)")))) as archive:
        about = json.loads(archive.read("settings.json"))
        drawn = np.asarray(Image.open(io.BytesIO(archive.read("drawing-1.png"))))
    model = Emu(
        server.engine.plain.config,
        server.engine.plain.params,
        server.engine.plain.statistics,
        server.engine.plain.tokenizer,
        server.engine.plain.decoder,
    )
    begun = [np.asarray(Image.open(samples[0])), "a red bar"]
    expected = model.continue_document(begun, max_items=2, pattern=("image", "text"), max_new_tokens=32, steps=3)
    np.testing.assert_allclose(drawn.astype(int), np.asarray(expected[0].image, int), atol=1)
    texts = [part["text"] for part in about["parts"] if "text" in part]
    assert texts == ["a red bar", *(item.text for item in expected[1:])]
    assert page_file.count("<img") == page.locator("#paper img").count() == 2 and "http" not in page_file


def test_two_examples_and_an_image(page, server, samples):
    tab(page, "Few-shot")
    texts = ("a red bar", "a blue cross")
    page.get_by_label("Form of the prompt").click()
    page.get_by_role("option", name="plain: image, text").click()
    pickers = page.locator(".example:visible input[type=file]")
    for number in range(3):
        pickers.nth(number).set_input_files(str(samples[number]))
        page.wait_for_function(f"document.querySelectorAll('.example .image-frame img').length >= {number + 1}")
    for number, text in enumerate(texts, 1):
        page.get_by_label(f"Text {number}").locator("visible=true").fill(text)
    queries = server.engine.plain.config.causal.queries
    shown = f"[IMG] <image> × {queries} [/IMG]"
    prompt = f"<s> {shown} {texts[0]} {shown} {texts[1]} {shown}"
    expected_text = re.compile(re.escape(prompt).replace(r"\ ", r"\s*"))
    playwright.expect(page.locator("#exact .exact")).to_have_text(expected_text, timeout=PATIENCE)
    page.locator("#few-shot-go").click()
    playwright.expect(page.locator("#few-shot-status")).to_contain_text("prompt of", timeout=PATIENCE)
    images = [np.asarray(Image.open(path)) for path in samples]
    parts = [images[0], f" {texts[0]} ", images[1], f" {texts[1]} ", images[2]]
    expected = result(lambda: server.engine.complete(parts, TextSettings(24)))
    assert page.locator("#few-shot-answer textarea").input_value() == expected.text.strip()


# ---------------------------------------------------------------- looks, keys and secrets


def test_nothing_is_wider_than_a_phone(browser, server):
    with opened(browser, server, "phone") as page:
        for name in ("Chat", "Draw", "Document", "Few-shot"):
            tab(page, name)
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= SIZES["phone"][0], name


def test_the_page_asks_for_the_key(browser, engine, tmp_path):
    with serve(engine, tmp_path / "files", KEY) as server:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        assert page.request.get(f"{server.address}/config").status == 401
        page.goto(server.address)
        for password, comes_in in (("a wrong one", False), (KEY, True)):
            page.get_by_label("username").fill("anybody")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if comes_in:
                page.wait_for_selector("#tabs")
            else:
                page.wait_for_timeout(1000)
                assert page.locator("#tabs").count() == 0
        context.close()


def test_no_address_is_fetched_and_no_other_file_read(server, tmp_path):
    """Beside the guard, which is not here: the page itself does not serve what is not its own."""
    import httpx

    (tmp_path / "secret.txt").write_text("secret")
    with httpx.Client(base_url=server.address) as client:
        for path in (f"/gradio_api/file={tmp_path}/secret.txt", "/gradio_api/file=http://127.0.0.1:9/a.png"):
            assert client.get(path).status_code == 404
        example = next((server.folder / "examples").glob("*.png"))
        assert client.get(f"/gradio_api/file={example}").content == example.read_bytes()


def test_the_server_connects_to_nobody(server):
    """All tests above have run: what the process connected to was this machine."""
    assert [address for address in connections if "127.0.0.1" not in address and "::1" not in address] == []
    assert {path.name for path in server.folder.parent.iterdir()} == {server.folder.name}
