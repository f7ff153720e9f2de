"""What is sent to the page: files of its own alone, no addresses, and no route that it does not need."""

import asyncio

import pytest

from emu_jax.serve.page_guard import Filter, is_own_file, refuses

HOST = "127.0.0.1:7860"
FILE = "gradio.FileData"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The page's folder, with an image and a link that leads out of it."""
    own = tmp_path / "page"
    (own / "ab12").mkdir(parents=True)
    (own / "ab12" / "a cat.png").write_bytes(b"image")
    (tmp_path / "secret.txt").write_text("secret")
    (own / "link.png").symlink_to(tmp_path / "secret.txt")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(own))
    return own


def sent(**file) -> dict:
    """A body as the page sends it: a message with one file."""
    file = {"meta": {"_type": FILE}, "orig_name": "a cat.png", **file}
    return {"data": [None, {"text": "what is this?", "files": [file]}, 0.5], "fn_index": 3, "session_hash": "abc"}


def test_what_the_page_sends_is_taken(folder):
    path = str(folder / "ab12" / "a cat.png")
    shown = path.replace(" ", "%20")
    for url in (f"http://{HOST}/gradio_api/file={shown}", f"/gradio_api/file={shown}", None):
        assert refuses(sent(path=path, url=url), HOST) is None
    assert refuses(sent(path=path, url=f"https://emu.example/below/gradio_api/file={shown}")) is None, "behind a proxy"
    assert refuses({"data": ["see https://example.com/cat.png and /etc/passwd"], "fn_index": 0}) is None, "a text"
    assert refuses([]) is None and refuses("text") is None and refuses(None) is None


@pytest.mark.parametrize(
    "file",
    [
        {"path": "http://example.com/cat.png"},
        {"path": "HTTPS://example.com/cat.png"},
        {"path": "//example.com/cat.png"},
        {"path": "ftp://example.com/cat.png"},
        {"path": "/etc/passwd"},
        {"path": "page/ab12/a cat.png"},
        {"path": "{folder}"},
        {"path": "{folder}/../secret.txt"},
        {"path": "{folder}/ab12/../../secret.txt"},
        {"path": "{folder}/link.png"},
        {"path": "{folder}2/cat.png"},
        {"path": "{folder}/ab12/a\0cat.png"},
        {"path": ["{folder}/ab12/a cat.png"]},
        {"url": "http://example.com/cat.png"},
        {"url": "http://example.com/gradio_api/file={folder}/ab12/a%20cat.png"},
        {"url": "//example.com/gradio_api/file={folder}/ab12/a%20cat.png"},
        {"url": f"http://user@{HOST}/gradio_api/file={{folder}}/ab12/a%20cat.png"},
        {"url": "file://{folder}/ab12/a%20cat.png"},
        {"url": "data:image/png;base64,AAAA"},
        {"url": f"http://{HOST}/gradio_api/file=http://example.com/cat.png"},
        {"url": f"http://{HOST}/gradio_api/file={{folder}}/%2e%2e/secret.txt"},
        {"url": f"http://{HOST}/gradio_api/proxy=https://example.hf.space/cat.png"},
        {"url": f"http://{HOST}/gradio_api/file={{folder}}/ab12/a%20cat.png?to=http://example.com"},
    ],
)
def test_other_files_and_addresses_are_refused(folder, file):
    filled = {
        key: value.replace("{folder}", str(folder)) if isinstance(value, str) else value for key, value in file.items()
    }
    reason = refuses(sent(**filled), HOST)
    assert reason is not None and "\n" not in reason and next(iter(file)) in reason
    assert refuses({"data": [[{"image": filled, "caption": None}]]}, HOST) or isinstance(file.get("path"), list)


def test_chats_of_components_are_refused():
    message = {"type": "component", "component": "html", "value": "x", "constructor_args": {}, "props": {}}
    reason = refuses({"data": [[{"role": "user", "content": [message]}]]})
    assert reason == "constructor_args: the page takes only texts, numbers and files"


def test_links_are_followed(folder):
    assert is_own_file(str(folder / "ab12" / "a cat.png"))
    assert not is_own_file(str(folder / "link.png"))


def passes(method: str, path: str) -> bool:
    """Whether a request comes through the filter, and that its answer has the headers either way."""
    messages: list[dict] = []

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"ALLOW")]})
        await send({"type": "http.response.body", "body": b"page"})

    async def send(message):
        messages.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": []}
    asyncio.run(Filter(page)(scope, None, send))
    headers = messages[0]["headers"]
    assert dict(headers)[b"content-security-policy"].startswith(b"default-src 'self'")
    assert [value for name, value in headers if name == b"x-frame-options"] == [b"DENY"]
    assert messages[0]["status"] in (200, 404)
    return messages[0]["status"] == 200


def test_the_routes_that_the_page_needs(folder):
    for path in ("/", "/config", "/assets/index.js", "/gradio_api/queue/data", "/gradio_api/heartbeat/abc"):
        assert passes("GET", path), path
    for path in ("/login", *(f"/gradio_api/{name}" for name in ("queue/join", "run/predict", "upload", "cancel"))):
        assert passes("POST", path), path
    assert passes("GET", f"/gradio_api/file={folder}/ab12/a cat.png")
    assert passes("HEAD", f"/gradio_api/file={folder}/ab12/a cat.png")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=http://example.com/cat.png"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=secret.txt"),
        ("GET", "/gradio_api/file/secret.txt"),
        ("GET", "/gradio_api/proxy=https://example.hf.space/cat.png"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/monitoring"),
        ("POST", "/gradio_api/run/go_on"),
        ("POST", "/gradio_api/call/predict"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/run-history/connect"),
        ("POST", "/gradio_api/stream/abc"),
        ("DELETE", "/gradio_api/upload"),
    ],
)
def test_other_routes_do_not_exist(folder, method, path):
    assert not passes(method, path)
