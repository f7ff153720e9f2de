"""Notebooks: what is stored is whole, small and clean, what they import is there, and they run from scratch."""

import ast
import base64
import importlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import PIL.Image
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("quickstart", "generate", "ablation", "pods")
LARGEST = 400_000  # bytes


def load(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(name: str) -> list[str]:
    return [cell.source for cell in load(name).cells if cell.cell_type == "code"]


def outputs(name: str) -> list:
    return [output for cell in load(name).cells for output in cell.get("outputs", ())]


def load_runner():
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_notebook_is_known():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES) == set(load_runner().NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_is_valid_and_small(name):
    nbformat.validate(load(name))
    size = (FOLDER / f"{name}.ipynb").stat().st_size
    print(name, f"{size:,}")
    assert size < LARGEST


@pytest.mark.parametrize("name", NAMES)
def test_opens_with_what_how_long_and_on_what(name):
    first = load(name).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    for said in ("**What.**", "**How long, on what.**", "`EMU_JAX_NOTEBOOK`", "`small`", "`full`", "minute", "CPU"):
        assert said in first.source, said


def test_all_begin_with_the_same_cell():
    firsts = {re.sub(r'^EXTRA = ".*?"', "EXTRA", code(name)[0], flags=re.MULTILINE) for name in NAMES}
    assert len(firsts) == 1
    (first,) = firsts
    assert first.count('os.environ.get("EMU_JAX_NOTEBOOK")') == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_import_of_ours_exists(name):
    found = 0
    for source in code(name):
        for node in ast.walk(ast.parse(source)):  # plain Python: no magics
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "emu_jax":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
                    found += 1
    assert found


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_stored(name):
    cells = [cell for cell in load(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from top to bottom, once"
    assert not [output for output in outputs(name) if output.output_type == "error" or output.get("name") == "stderr"]
    shown = [output.get("data", {}) for output in outputs(name)]
    images = [data[kind] for data in shown for kind in ("image/png", "image/jpeg") if kind in data]
    assert images
    for encoded in images:
        image = PIL.Image.open(io.BytesIO(base64.b64decode(encoded)))
        print(name, image.size, len(encoded))
        assert image.width <= 1000 and len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 4


@pytest.mark.parametrize("name", NAMES)
def test_no_paths_of_a_machine_are_stored(name):
    texts = [output.get("text", "") for output in outputs(name)]
    texts += [text for output in outputs(name) for kind, text in output.get("data", {}).items() if "text" in kind]
    for text in texts:
        assert not re.search(r"(?<![\w.…])/(?!/)\w[\w.-]*/", text), text
        assert "it/s]" not in text and "Warning" not in text


# ---------------------------------------------------------------------------------------------- the executor


@pytest.fixture
def runner(tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason="install .[notebooks]")
    pytest.importorskip("ipykernel", reason="install .[notebooks]")
    module = load_runner()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(module, "HERE", tmp_path / "notebooks")
    monkeypatch.setattr(module, "NAMES", ("one",))
    return module


def write_notebook(runner, *sources: str) -> None:
    cells = [nbformat.v4.new_markdown_cell("# One"), *map(nbformat.v4.new_code_cell, sources)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), runner.HERE / "one.ipynb")


def test_what_is_written_is_clean(runner, tmp_path, capsys):
    image = "import PIL.Image\nfrom IPython.display import display\ndisplay(PIL.Image.new('RGB', (1200, 60), 'red'))"
    speech = (
        "import os, sys\nfrom pathlib import Path\nprint(Path('a/b').absolute(), os.environ['EMU_JAX_NOTEBOOK'])\n"
        "print('noise', file=sys.stderr)\nprint('/usr/lib/x.so')"
    )
    write_notebook(runner, speech, image)
    assert runner.main(["--size", "smoke", "--folder", str(tmp_path / "empty"), "--write"]) == 0
    assert re.fullmatch(r"one\.ipynb: \d+ s\n", capsys.readouterr().out)
    notebook = nbformat.read(runner.HERE / "one.ipynb", as_version=4)
    _, said, shown = notebook.cells
    assert [output.text for output in said.outputs] == ["a/b smoke\n…/x.so\n"]
    (output,) = shown.outputs
    assert list(output.data) == ["image/png"]
    stored = PIL.Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
    assert stored.size == (1000, 50) and stored.convert("RGB").getpixel((500, 25)) == (255, 0, 0)
    assert not said.metadata


def test_a_cell_that_fails_is_named_in_one_line(runner, capsys):
    write_notebook(runner, "1 + 1", "raise ValueError('no such\\nthing')", "2 + 2")
    assert runner.main([]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "notebooks/run.py: one.ipynb, cell 3: ValueError: no such"
    assert not captured.out


def test_a_kernel_that_dies_is_named_in_one_line(runner, capsys):
    write_notebook(runner, "1 + 1", "import os\nos._exit(3)")
    assert runner.main([]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "notebooks/run.py: one.ipynb, cell 3: the kernel died"


def test_an_unknown_notebook_is_refused(runner, capsys):
    with pytest.raises(SystemExit):
        runner.main(["two"])
    assert "two: no such notebook; choose among one" in capsys.readouterr().err


@pytest.mark.slow
def test_all_run_from_scratch(tmp_path):
    """Every cell of every notebook, at the size that learns nothing, in an empty folder: 10 minutes on 2 cores."""
    pytest.importorskip("nbclient", reason="install .[notebooks]")
    pytest.importorskip("torch", reason="published files need PyTorch; install .[convert]")
    command = [sys.executable, str(FOLDER / "run.py"), "--size", "smoke", "--folder", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr.splitlines()[-1:]
    assert re.findall(r"^(\w+)\.ipynb: \d+ s$", done.stdout, re.MULTILINE) == list(NAMES)
    assert (tmp_path / "runs" / "ablation" / "compare.png").is_file()
