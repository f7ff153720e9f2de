"""Drawing requests -> PNG files that record how they were made.

A request is a prompt, a seed and a file. A JSONL holds many, one JSON object per line, with paths relative to it:

    {"prompt": ["a dog wearing glasses"], "out": "dog.png", "seed": 3}
    {"prompt": [{"image": "cat.png"}, {"image": "tiger.png"}], "out": "blend.png"}
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from emu_jax.data.padding import padded_batches
from emu_jax.errors import UserError, nearest, shown
from emu_jax.generate.decoder import Drawing, GeneratedImage
from emu_jax.generate.model import Emu
from emu_jax.storage import Path, as_path, is_bucket, json_lines, write_atomically

log = logging.getLogger(__name__)

FIELDS = frozenset({"prompt", "out", "seed"})  # of a request
SHAPE = '{"prompt": ["text", {"image": "a.png"}], "out": "b.png", "seed": 0}'


@dataclasses.dataclass(frozen=True)
class DrawingRequest:
    """One image to draw; `prompt` holds texts and paths of images."""

    prompt: tuple[str | Path, ...]
    seed: int
    out: Path


def with_seeds(prompt: Sequence[str | Path], seeds: Sequence[int], out: Path) -> list[DrawingRequest]:
    """One request per seed; several files are numbered by seed: blend.png -> blend-0.png, blend-1.png."""
    name = "{stem}-{seed}{suffix}" if len(seeds) > 1 else "{stem}{suffix}"
    return [
        DrawingRequest(tuple(prompt), seed, out.with_name(name.format(stem=out.stem, seed=seed, suffix=out.suffix)))
        for seed in seeds
    ]


def read_requests(file: Path) -> list[DrawingRequest]:
    """Reads a JSONL of requests.

    Raises:
      UserError: the file cannot be read, or a line is no request; names the file and the line.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); expected a JSONL") from error
    requests = []
    for number, record in json_lines(file, data):
        try:
            requests.append(_request(record, file.parent))
        except UserError as error:
            raise UserError(f"{file}:{number}: {error}") from error
    if not requests:
        raise UserError(f"{file}: the file holds no requests")
    return requests


def _request(record: Any, folder: Path) -> DrawingRequest:
    """The request of a line; its paths are relative to `folder`, or have a scheme.

    Raises:
      UserError: a field is missing, unknown, or of another type.
    """
    if not isinstance(record, dict):
        raise UserError(f"the line is {shown(record)}; expected {SHAPE}")
    if unknown := sorted(record.keys() - FIELDS):
        raise UserError(f"the field {unknown[0]!a:.60} is unknown; did you mean {nearest(unknown[0], FIELDS)}?")
    prompt, seed = record.get("prompt"), record.get("seed", 0)
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        found = shown(prompt) if "prompt" in record else "missing"
        raise UserError(f"prompt is {found}; expected a text, or a list of texts and images, as in {SHAPE}")
    if type(seed) is not int or seed < 0:  # True is an int as well
        raise UserError(f"seed is {shown(seed)}; expected a whole number of 0 or more")

    def named(value: Any, where: str) -> Path:
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise UserError(f"{where} is {shown(value)}; expected the name of a file")
        return as_path(value) if "://" in value else folder / value

    parts: list[str | Path] = []
    for number, part in enumerate(prompt):
        if isinstance(part, dict) and part.keys() == {"image"}:
            parts.append(named(part["image"], f"prompt[{number}].image"))
        elif isinstance(part, str):
            if pathlib.PurePath(part).suffix and os.path.isfile(os.path.join(folder, part)):
                raise UserError(
                    f'prompt[{number}]: {shown(part)} is the name of a file; write {{"image": {json.dumps(part)}}}'
                )
            parts.append(part)
        else:
            raise UserError(f'prompt[{number}] is {shown(part)}; expected a text or {{"image": "a.png"}}')
    return DrawingRequest(tuple(parts), seed, named(record.get("out"), "out"))


def draw_files(emu: Emu, requests: Sequence[DrawingRequest], *, batch: int, settings: dict[str, Any]) -> Iterator[Path]:
    """Draws all requests, `batch` at a time, and yields each file once it is complete on disk.

    Raises:
      UserError: two requests name the same file, or a file exists already; before anything is drawn.
    """
    for request in requests:
        if request.out.exists():
            raise UserError(f"{request.out}: the file exists; name a new one")
        if request.out.suffix.lower() != ".png":
            raise UserError(f"{request.out}: images are written as PNG; name a file that ends in .png")
        if not is_bucket(request.out) and not request.out.parent.is_dir():
            raise UserError(f"{request.out}: the folder {request.out.parent} does not exist; make it first")
    if len({request.out for request in requests}) < len(requests):
        raise UserError("two requests name the same file; give every one its own `out`")
    emu.check_drawing(Drawing(**settings))
    batch = min(batch, len(requests))
    with tqdm(total=len(requests), desc="draw", unit="image") as bar:
        for chunk, filled in padded_batches(requests, batch):
            drawn = emu.generate_images([r.prompt for r in filled], seeds=[r.seed for r in filled], **settings)
            for request, result in zip(chunk, drawn, strict=False):
                save(result, request, settings)
                if result.flagged:
                    log.warning("%s: black, the safety checker flagged it", request.out)
                bar.update()
                yield request.out


def png_metadata(result: GeneratedImage, prompt: Sequence[str], settings: dict[str, Any]) -> PngInfo:
    """Prompt, seed, settings and the safety checker's result, as text chunks of a PNG."""
    chunks = PngInfo()
    chunks.add_itxt("prompt", json.dumps(list(prompt), ensure_ascii=False))
    chunks.add_itxt("seed", str(result.seed))
    chunks.add_itxt("settings", json.dumps({name: value for name, value in settings.items() if value is not None}))
    chunks.add_itxt("safety", "not checked" if result.flagged is None else "flagged" if result.flagged else "passed")
    return chunks


def save(result: GeneratedImage, request: DrawingRequest, settings: dict[str, Any]) -> None:
    """Writes a PNG with its metadata, completely or not at all."""
    chunks = png_metadata(result, [str(part) for part in request.prompt], settings)
    with write_atomically(request.out) as partial:
        result.image.save(partial, "PNG", pnginfo=chunks)
