"""From raw images to a served model, with every path in a bucket: bit for bit what a local folder gets."""

import io
import json
import sys
import urllib.request
from pathlib import Path

import pytest

from emu_jax.checkpoints.store import newest_folder, read_meta
from emu_jax.cli import main
from emu_jax.data import fluent_emoji
from emu_jax.storage import as_path
from tests.data.test_prepare_buckets import write_pairs
from tests.serve.conftest import Server

pytestmark = pytest.mark.slow


def run(*words: object) -> None:
    """A command that has to succeed."""
    assert main([str(word) for word in words]) == 0, words


def chain(root, configs: Path) -> None:
    """Prepares, trains all four kinds of run, generates, evaluates, converts and exports; all files below `root`."""
    write_pairs(as_path(f"{root}/raw"))
    size = ("--image-size", "32", "--shards", "2", "--max-faults", "0.1")
    run("prepare", "pairs", "--in", f"{root}/raw", "--out", f"{root}/pairs", *size, "--workers", "2")
    source = f"--config.data.source={root}/pairs"
    run("train", "--config", configs / "pretrain.py", "--workdir", f"{root}/run", source)
    run("train", "--config", configs / "vae.py", "--workdir", f"{root}/run/vae", source)
    run("precompute", "--model", f"{root}/run", "--vae", f"{root}/run/vae", "--out", f"{root}/run/latents",
        "--source", f"{root}/pairs")  # fmt: skip
    run("train", "--config", configs / "decoder.py", "--workdir", f"{root}/run/unet",
        f"--config.data.source={root}/run/latents")  # fmt: skip
    run("train", "--config", configs / "instruct.py", "--workdir", f"{root}/run/chat", source,
        f"--config.init.emu={root}/run", f"--config.tokenizer.path={root}/run")  # fmt: skip
    prompt = ("generate", "--model", f"{root}/run", "--prompt", "image 3")
    run(*prompt, "--out", f"{root}/drawn.png", "--steps", "2", "--sampler", "ddim")
    run(*prompt, "--embeddings", f"{root}/next.npy")
    run("export", "--from", f"{root}/run", "--to", f"{root}/exported", "--format", "emu")
    run("evaluate", "--model", f"{root}/run", "--benchmark", "fluent", "--limit", "4", "--part", "0/2",
        "--out", f"{root}/scores")  # fmt: skip
    run("evaluate", "--model", f"{root}/run", "--benchmark", "fluent", "--limit", "4", "--part", "1/2",
        "--out", f"{root}/scores")  # fmt: skip


def files(root: str, folder: str) -> dict[str, bytes]:
    place = as_path(f"{root}/{folder}")
    return {path.name: path.read_bytes() for path in place.iterdir() if not path.is_dir()}


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> Path:
    """The tiny configs as files; what differs between places is given on the command line."""
    folder = tmp_path_factory.mktemp("configs")
    call = {
        "pretrain": "tiny.get_config()",
        "vae": "tiny.vae_config('')",
        "decoder": "tiny.decoder_config('')",
        "instruct": "tiny.instruct_config('', '')",
    }
    for name, made in call.items():
        text = f"from tests.train import tiny\n\ndef get_config():\n    config = {made}\n"
        (folder / f"{name}.py").write_text(text + "    return config\n")
    return folder


def test_every_command_on_a_bucket(configs, bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir("/proc")  # where nothing can be written
    remote, local = str(bucket), str(tmp_path)
    for root in (local, remote):
        chain(root, configs)
    for part in ("run", "run/vae", "run/unet", "run/chat"):
        ours, theirs = (read_meta(newest_folder(as_path(f"{root}/{part}"))) for root in (local, remote))
        assert ours["digests"] == theirs["digests"], part
    for name in ("drawn.png", "next.npy"):
        ours, theirs = ((as_path(f"{root}/{name}")).read_bytes() for root in (local, remote))
        assert ours == theirs, name
    for folder in ("pairs", "exported"):
        ours, theirs = files(local, folder), files(remote, folder)
        assert sorted(ours) == sorted(theirs)
        for name in ours:
            if name not in ("index.json", "provenance.json"):
                assert ours[name] == theirs[name], f"{folder}/{name}"


def test_serve_and_chat_with_a_model_in_a_bucket(configs, bucket, tmp_path, monkeypatch, capsys):
    root = str(bucket)
    chain(root, configs)
    monkeypatch.chdir("/proc")
    monkeypatch.setattr(sys, "stdin", io.StringIO("image 3\n"))
    run("chat", "--model", f"{root}/run/chat")
    server = Server("--model", f"{root}/run")
    try:
        body = {"model": "run", "messages": [{"role": "user", "content": "image 3"}], "max_tokens": 4}
        request = urllib.request.Request(
            f"{server.address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = json.loads(response.read())
        assert answer["usage"]["completion_tokens"] > 0, answer
    finally:
        assert server.stop() == 0, server.lines


def test_the_quick_starts_evaluation_in_a_bucket(drawing, bucket, monkeypatch):
    """Its report, scores, drawings and plots."""
    from tests.test_paths import put

    put(drawing, bucket / "run")
    monkeypatch.chdir("/proc")
    run("evaluate", "--model", f"{bucket}/run")
    page = (bucket / "run" / "report.html").read_bytes()
    scores = json.loads((bucket / "run" / "scores.json").read_bytes())
    assert page.startswith(b"<!doctype html>") and b"data:image/png" in page
    assert scores["figures"]["heldout_combinations: caption exactly right"]["count"] == len(
        fluent_emoji.examples("heldout_combinations", 16)
    )
