"""Every benchmark by its name: ours, which are the other modules of this folder, and those of installed packages.

A package adds one by an entry point; its name is the benchmark's, and its object a `Benchmark`:

    [project.entry-points."emu_jax.benchmarks"]
    textcaps = "their_package.textcaps:BENCHMARK"

A benchmark's module is imported when the benchmark is used: listing the names does not import JAX.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from emu_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from emu_jax.evaluate.benchmarks.benchmark import Benchmark

GROUP = "emu_jax.benchmarks"
MODULES = sorted({file.stem for file in Path(__file__).parent.glob("*.py")} - {"__init__", "benchmark", "registry"})
OURS = [EntryPoint(name, f"emu_jax.evaluate.benchmarks.{name}:BENCHMARK", GROUP) for name in MODULES]


def benchmark_names() -> list[str]:
    """The names of all benchmarks, ours first."""
    return list(dict.fromkeys(point.name for point in _points()))


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
      UserError: there is none, naming the nearest; there are two; or an installed package's cannot be imported.
    """
    found = [point for point in _points() if point.name == name]
    if not found:
        names = benchmark_names()
        raise UserError(f"no benchmark {name!r}; did you mean {nearest(name, names)}? ({', '.join(names)})")
    if len(found) > 1:
        raise UserError(
            f"benchmark {name!r} is defined by {' and '.join(point.value for point in found)}; rename the entry point "
            f"of the group {GROUP} in one of the packages, or uninstall it"
        )
    from emu_jax.evaluate.benchmarks.benchmark import Benchmark

    try:
        benchmark = found[0].load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"benchmark {name!r}: {found[0].value} cannot be imported ({error})") from error
    if not isinstance(benchmark, Benchmark) or benchmark.name != name:
        raise UserError(f"benchmark {name!r}: {found[0].value} is {benchmark!r:.60}; expected a Benchmark of that name")
    return benchmark


def _points() -> list[EntryPoint]:
    return [*OURS, *entry_points(group=GROUP)]
