"""Hooks of the documentation site: what pages link to outside of `docs/`.

Pages link to files of the repository as GitHub shows them (`../notebooks/rows.png`, `../configs/pretrain.py`). The site
carries the images of `notebooks/` itself, and shows other files by their name, without a link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)\s]*)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the images of `notebooks/` as `images/…`."""
    for image in sorted((ROOT / "notebooks").glob("*.png")):
        files.append(File.generated(config, f"images/{image.name}", abs_src_path=str(image)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links that leave `docs/`; code in fences stays as it is."""
    pieces = FENCE.split(markdown)
    return "".join(
        piece if piece.startswith("```") else LINK.sub(lambda found: _rewritten(found, page.file.src_uri), piece)
        for piece in pieces
    )


def _rewritten(found: re.Match[str], page: str) -> str:
    mark, text, target = found.groups()
    folder = posixpath.dirname(page)
    path = posixpath.normpath(posixpath.join("docs", folder, target.partition("#")[0]))  # from the repository's root
    if path.startswith("docs/"):
        return found[0]
    if mark:
        return f"![{text}]({posixpath.relpath(f'images/{posixpath.basename(path)}', folder or '.')})"
    return text
