"""What a run was made with, for whoever reads its numbers later: a line of starts.jsonl for each of its starts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from emu_jax.storage import Path, json_lines, replace_bytes

STARTS_FILE = "starts.jsonl"
PACKAGES = ("emu-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SECONDS = 5  # that git may take


def describe(step: int, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about this start, JSON-serialisable.

    Args:
      step: the run's steps before it.
      fingerprint: the data stream's.
    """
    return {
        "step": step,
        "time": time.time(),
        "command": sys.argv,
        "git": git_state(),
        "data": dict(fingerprint),
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "flags": {name: os.environ[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if os.environ.get(name)},
    }


def git_state() -> dict[str, Any]:
    """The commit of the repository around the current directory, and its changed files; {} where there is none."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=SECONDS, check=True)
        return done.stdout.strip()

    try:
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "changed": [line[3:] for line in changed.splitlines()]}


def add_start(workdir: Path, facts: Mapping[str, Any]) -> str:
    """Appends a line to starts.jsonl; returns the run's id, which its first start has chosen."""
    file = workdir / STARTS_FILE
    before = file.read_bytes() if file.exists() else b""
    lines = [start for _, start in json_lines(file, before)]
    id = lines[0]["id"] if lines else secrets.token_hex(8)
    replace_bytes(file, before + json.dumps({"id": id, **facts}).encode() + b"\n")
    return id


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
