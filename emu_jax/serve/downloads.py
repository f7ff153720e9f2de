"""Downloads: everything that the page shows, as files that record how it was made.

A zip holds `settings.json` (model, prompt, settings and results), the images shown to the model and those that it drew;
a drawn PNG also carries its settings in text chunks. All files are stored in the page's folder (GRADIO_TEMP_DIR).
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import os
import secrets
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PIL
from PIL.Image import Image as PILImage

from emu_jax.generate.decoder import GeneratedImage
from emu_jax.generate.files import png_metadata
from emu_jax.generate.messages import Video
from emu_jax.serve.settings import DrawSettings

Part = str | np.ndarray | PILImage | Video


def frames(video: Video) -> list[np.ndarray | PILImage]:
    """The images of a video that `read_uploads` returned."""
    if isinstance(video.source, Path):
        raise ValueError(f"{video.source}: the video is not read yet")
    return [frame for frame in video.source if not isinstance(frame, Path)]


@dataclasses.dataclass
class Archive:
    """A zip under construction: parts of prompts and replies as JSON, and their images as numbered files."""

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def parts(self, parts: Sequence[Part | GeneratedImage]) -> list[Any]:
        """{"text": …}, {"image": "image-1.png"} and {"video": ["image-2.png", …]}."""
        return [self._part(part) for part in parts]

    def _part(self, part: Part | GeneratedImage) -> dict[str, Any]:
        if isinstance(part, str):
            return {"text": part}
        if isinstance(part, Video):
            return {"video": [self._add(frame) for frame in frames(part)]}
        if isinstance(part, GeneratedImage):
            return {
                "drawing": self.add(f"drawing-{self._count('drawing') + 1}.png", png(part.image)),
                "seed": part.seed,
            }
        return {"image": self._add(part)}

    def _add(self, image: np.ndarray | PILImage) -> str:
        return self.add(f"image-{self._count('image') + 1}.png", png(image))

    def _count(self, kind: str) -> int:
        return sum(name.startswith(kind) for name in self.files)

    def add(self, name: str, content: bytes) -> str:
        """Adds a file to the zip."""
        self.files[name] = content
        return name

    def save(self, name: str, settings: Mapping[str, Any]) -> str:
        """Writes the zip with its settings.json; returns its path."""
        path = new_path(f"{name}.zip")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("settings.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
            for file, content in self.files.items():
                archive.writestr(file, content)
        return str(path)


def new_path(name: str) -> Path:
    """The path of a new file, in a folder of its own with an unguessable name."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"]) / "results" / secrets.token_hex(16)
    folder.mkdir(parents=True)
    return folder / name


def png(image: np.ndarray | PILImage) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    (PIL.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, "PNG")
    return buffer.getvalue()


def file_names(prompt: Sequence[Part]) -> list[str]:
    """A prompt as in the text chunks of a PNG: texts, and the file names of images."""
    shown = 0
    names = []
    for part in prompt:
        shown += not isinstance(part, str)
        names.append(part if isinstance(part, str) else f"image-{shown}.png")
    return names


def drawn_png(result: GeneratedImage, prompt: Sequence[Part], settings: DrawSettings) -> bytes:
    """A drawn image as a PNG file with its settings in text chunks, as `emu-jax generate` writes them."""
    fields = dataclasses.asdict(settings)
    del fields["seed"]
    buffer = io.BytesIO()
    result.image.save(buffer, "PNG", pnginfo=png_metadata(result, file_names(prompt), fields))
    return buffer.getvalue()


def write(name: str, content: bytes | str) -> str:
    """Writes one file; returns its path."""
    path = new_path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# ---------------------------------------------------------------- documents


def figures(parts: Sequence[Part | GeneratedImage]) -> str:
    """A document as HTML: escaped paragraphs, and embedded images."""
    return "\n".join(_figure(part) for part in parts)


def _figure(part: Part | GeneratedImage) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    if isinstance(part, Video):
        return "\n".join(_figure(frame) for frame in frames(part))
    if isinstance(part, GeneratedImage):
        image, alternative, caption = part.image, "drawn image", f"<figcaption>drawn, seed {part.seed}</figcaption>"
    else:
        image, alternative, caption = part, "image", ""
    data = base64.b64encode(png(image)).decode()
    return f'<figure><img alt="{alternative}" src="data:image/png;base64,{data}">{caption}</figure>'


def html_page(title: str, parts: Sequence[Part | GeneratedImage], settings: Mapping[str, Any]) -> str:
    """A document as one HTML file, which loads nothing else and ends with its settings."""
    about = html.escape(json.dumps(settings, indent=2, ensure_ascii=False))
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
body {{ font: 17px/1.6 system-ui, sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem; color: #1c1917; }}
figure {{ margin: 1.5rem 0; }}
img {{ width: 16rem; max-width: 100%; border-radius: 8px; }}
figcaption, pre {{ color: #78716c; font-size: 13px; }}
pre {{ white-space: pre-wrap; border-top: 1px solid #e7e5e4; padding-top: 1rem; margin-top: 3rem; }}
</style>
{figures(parts)}
<pre>{about}</pre>
</html>
"""
