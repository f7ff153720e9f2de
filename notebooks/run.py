"""Executes notebooks from scratch, in an empty folder, and prints how long each took.

    python notebooks/run.py                        # all of them, at the size that fits the devices
    python notebooks/run.py pods --size smoke      # one, the smallest way
    python notebooks/run.py quickstart --write     # and stores its outputs, cleaned

All share one folder, in the order of `NAMES`. A cell that fails ends the command with one line and exit code 1. Needs
`pip install -e '.[notebooks,convert,plan]'`.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
NAMES = ("quickstart", "generate", "ablation", "pods")
SIZES = ("smoke", "small", "full")
KEPT_METADATA = ("kernelspec", "language_info")
WIDEST = 1000  # pixels of a stored image
QUALITY = 75  # of JPEG
ABSOLUTE = re.compile(r"(?<![\w./:<])/(?:home|root|tmp|usr|opt|var|mnt|work|content|Users|private)/[^\s'\"),:\]]*")
COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")


class CellError(Exception):
    """One line: the notebook, the cell, and what went wrong."""


def execute(name: str, folder: Path, size: str = "") -> NotebookNode:
    """Runs a notebook with `folder` as its current one.

    Raises:
      CellError: a cell fails.
    """
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    sockets = tempfile.TemporaryDirectory()  # over TCP, all that is said could be read by other users
    environment = os.environ | {"TQDM_DISABLE": "1"} | ({"EMU_JAX_NOTEBOOK": size} if size else {})
    begun = [0]  # cells, counted from 1
    client = NotebookClient(
        notebook,
        on_cell_start=lambda cell, cell_index: begun.append(cell_index + 1),
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets.name}/kernel"}}),
        store_widget_state=False,
    )
    try:
        with sockets:
            client.execute(env=environment)
    except (CellExecutionError, DeadKernelError) as error:
        said = "the kernel died"
        if isinstance(error, CellExecutionError):
            said = COLOUR_CODES.sub("", f"{error.ename}: {error.evalue}").strip().splitlines()[0]
        raise CellError(f"{name}.ipynb, cell {begun[-1]}: {said}") from error
    return notebook


def cleaned(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The notebook as it is stored: no standard error, no paths of this machine, small images.

    Standard error holds progress and warnings of libraries; what a notebook has to say, it prints.
    """
    notebook.metadata = NotebookNode({key: notebook.metadata[key] for key in KEPT_METADATA if key in notebook.metadata})
    notebook.metadata.language_info = NotebookNode(name="python")
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stderr":
                    continue
                output.text = without_paths(output.text, folder)
            if "data" in output:
                output.data = NotebookNode(_stored(output.data, folder))
                output.metadata = NotebookNode()
            kept.append(output)
        cell.outputs = kept
    return notebook


def _stored(data: NotebookNode, folder: Path) -> dict[str, str]:
    """An image alone, or texts: beside an image stands the address of an object, or the same image as JPEG."""
    if "image/png" in data:
        return dict([smaller(data["image/png"])])
    return {kind: without_paths(text, folder) for kind, text in data.items() if kind.startswith("text/")}


def without_paths(text: str, folder: Path) -> str:
    """Text with paths in `folder` and the checkout made relative, and other absolute ones shortened to their names."""
    for place in (str(folder), str(HERE.parent)):
        text = text.replace(place + "/", "").replace(place, ".")
    return ABSOLUTE.sub(lambda found: "…/" + Path(found[0]).name, text)


def smaller(encoded: str) -> tuple[str, str]:
    """A PNG in base64 -> media type and base64 of the smaller of PNG and JPEG, at most `WIDEST` pixels wide."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    if image.width > WIDEST:
        height = round(image.height * WIDEST / image.width)
        image = image.resize((WIDEST, height), Image.Resampling.LANCZOS)
    kinds = {}
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": QUALITY, "subsampling": 0})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **settings)
        kinds[f"image/{kind}"] = base64.b64encode(buffer.getvalue()).decode()
    return min(kinds.items(), key=lambda item: len(item[1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="notebooks/run.py", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--size", choices=SIZES, default="", help="EMU_JAX_NOTEBOOK (default: what fits the devices)")
    parser.add_argument("--folder", type=Path, help="where they run, kept afterwards (default: an empty one, removed)")
    parser.add_argument("--write", action="store_true", help="store the outputs in the notebooks, cleaned")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"{unknown[0]}: no such notebook; choose among {', '.join(NAMES)}")
    names = [name for name in NAMES if name in (options.names or NAMES)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            started = time.monotonic()
            try:
                notebook = execute(name, folder, options.size)
            except CellError as error:
                print(f"notebooks/run.py: {error}", file=sys.stderr)
                return 1
            print(f"{name}.ipynb: {time.monotonic() - started:.0f} s", flush=True)
            if options.write:
                nbformat.write(cleaned(notebook, folder), HERE / f"{name}.ipynb")
    return 0


if __name__ == "__main__":
    sys.exit(main())
