"""Plans as text and charts: a page, a ranking, and a hint at what would help most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from emu_jax.errors import UserError
from emu_jax.plan.plan import AGREEMENT, DECODE, KERNEL_EFFICIENCY, Plan
from emu_jax.plan.serving import ServingPlan
from emu_jax.plan.suggest import Suggestions
from emu_jax.storage import Path, write_atomically

GIB = float(1 << 30)


def describe(plan: Plan, fill: Mapping[str, float] | None = None, price: float = 0.0) -> str:
    """The plan as a page of text, which says of every time that it is an estimate.

    Args:
      fill: as in `Plan.mfu`.
      price: what a chip costs for an hour; 0 prints no price.
    """
    sent = [f"{name} {_scaled(size, 'B')}" for name, size in sorted(plan.cost.collectives.items()) if size >= 1e6]
    lines = [
        f"{plan.kind} on {plan.topology}: {plan.chips} chips{_devices(plan)}, mesh {_mesh(plan)}, "
        f"{plan.rows:,} {plan.row_name} a step{_micro_batches(plan)}, remat {plan.remat}",
        "",
        f"memory: {plan.peak / GIB:.2f} of {plan.capacity / GIB:.0f} GiB a device: "
        f"{'fits' if plan.fits else 'DOES NOT FIT'}",
        *(f"  {kind:28s}{size / GIB:8.2f} GiB" for kind, size in plan.memory.items()),
        f"the step compiled in {plan.compile_s:.0f} s",
        "",
        f"collectives, sent by a device: {', '.join(sent) or 'none'}; {plan.interconnect_s:.3f} s if nothing overlaps",
        "model FLOPs of the whole step: "
        + ", ".join(f"{part} {_scaled(count, 'FLOP')}" for part, count in plan.model_flops.items() if count),
    ]
    if not plan.by_part:
        return "\n".join(lines)
    lines += [
        "",
        "by part, as the compiler counts it (a device)",
        f"  {'':12s}{'s':>9s}{'FLOP':>14s}{'in kernels':>14s}{'HBM':>12s}",
        *(
            f"  {part:12s}{cost.seconds:9.4f}{_scaled(cost.flops, 'FLOP'):>14s}"
            f"{_scaled(cost.kernel_flops, 'FLOP'):>14s}{_scaled(cost.traffic, 'B'):>12s}"
            for part, cost in plan.by_part.items()
        ),
    ]
    if plan.kind != DECODE:
        lines.append(f"counted FLOPs are {plan.agreement:.3f} of the model's (a small step without remat)")
        if not plan.trusted:
            return "\n".join([*lines, f"no MFU: they should agree within {AGREEMENT:.0%}"])
    if math.isnan(plan.times["roofline"]):
        return "\n".join([*lines, "no time: the compiler does not cost every operation of the step on these devices"])
    lines += ["", f"estimates (attention kernels at {KERNEL_EFFICIENCY:.0%} of peak; nothing overlaps):"]
    for name, seconds in plan.times.items():
        share = "" if plan.kind == DECODE else f"{plan.mfu(seconds):8.1%} MFU"
        share += f"{plan.mfu(seconds, fill):8.1%} without padding" if share and fill else ""
        lines.append(f"  {name:28s}{seconds:9.4f} s a step{_rate(plan, seconds)}{share}")
    if plan.kind == DECODE:
        read = plan.memory["weights read"] + plan.memory["cache"]
        bound = read / plan.bandwidth
        lines += [
            f"  {'bandwidth of HBM alone':28s}{bound:9.4f} s a step{_rate(plan, bound)}",
            f"bytes accessed are {plan.cost.traffic / read:.2f} of weights and cache ({_scaled(read, 'B')} a device)",
        ]
    if plan.steps:
        lines.append(_run(plan, price))
    return "\n".join([*lines, f"hint: {hint(plan)}"])


def _micro_batches(plan: Plan) -> str:
    return "" if plan.micro_batches == 1 else f" in {plan.micro_batches} micro-batches"


def _run(plan: Plan, price: float) -> str:
    """Length and price of the whole run, without stops, input and saves."""
    least, most = (plan.steps * plan.times[name] / 3600 for name in ("roofline", "interconnect fully exposed"))
    unit, size = ("days", 24) if most >= 48 else ("hours", 1)
    text = f"the run's {plan.steps:,} steps take {least / size:,.1f} to {most / size:,.1f} {unit}"
    if price:
        hourly = price * plan.chips
        text += f"; at {price:g} a chip-hour they cost {hourly * least:,.0f} to {hourly * most:,.0f}"
    return text


def describe_serving(plan: ServingPlan) -> str:
    """A served model's memory, program by program, and estimates of time."""
    weights = sum(plan.weights.values())
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.weights.items() if size >= GIB / 200)
    lines = [
        f"serving on {plan.topology}: {plan.chips} chips; "
        f"at most {plan.peak / GIB:.2f} of {plan.capacity / GIB:.0f} GiB "
        f"a device: {'fits' if plan.fits else 'DOES NOT FIT'}",
        f"weights: {weights / GIB:.2f} GiB ({listed})",
        "",
        f"{'a sequence or an image at a time':44s}{'beside weights':>16s}{'together':>12s}{'estimate':>12s}",
    ]
    for program in plan.programs:
        if program.error:
            lines.append(f"{program.about:44s} {program.error}")
            continue
        time = "" if math.isnan(program.seconds) else f"{program.seconds:10.4f} s"
        together = (weights + program.needs) / GIB
        lines.append(f"{program.about:44s}{program.needs / GIB:12.2f} GiB{together:8.2f} GiB{time:>12s}")
    return "\n".join(lines)


def _scaled(amount: float, unit: str) -> str:
    """1.5e12, "FLOP" -> "1.5 TFLOP"."""
    for prefix, size in {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6}.items():
        if amount >= size:
            return f"{amount / size:,.1f} {prefix}{unit}"
    return f"{amount / 1e3:,.1f} k{unit}" if amount else "-"


def _devices(plan: Plan) -> str:
    return "" if plan.devices == plan.chips else f", {plan.devices} devices"


def _mesh(plan: Plan) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"


def _rate(plan: Plan, seconds: float) -> str:
    amount, unit = (plan.tokens, "tokens") if plan.tokens else (plan.rows, plan.row_name)
    return f"{amount / seconds / plan.chips:12,.1f} {unit}/s/chip"


def hint(plan: Plan) -> str:
    """The change that would help most, by the figures."""
    if not plan.fits:
        return "it does not fit: fewer rows, remat full, or more chips along fsdp or tensor"
    if plan.kind == DECODE:
        return (
            "every token reads all weights: more sequences at a time, int8 or int4 weights, or more chips along tensor"
        )
    room = plan.capacity - plan.peak
    compute = plan.cost.flops / plan.peak_flops
    lost = {
        "interconnect": plan.times["interconnect fully exposed"] - plan.times["with attention kernels"],
        "recomputation": max(plan.cost.flops - sum(plan.model_flops.values()) / plan.devices, 0.0) / plan.peak_flops,
        "memory traffic": plan.times["roofline"] - compute,
    }
    worst = max(lost, key=lambda name: lost[name])
    took = f"{worst} takes {lost[worst]:.2f} s of a step"
    if worst == "recomputation":
        return f"{took}: remat dots keeps the products' results, if they fit in {room / GIB:.0f} GiB"
    if room > plan.memory["activations and workspace"]:
        return f"{took}, and there is room for twice the rows_per_device"
    if worst == "interconnect":
        return f"{took}, if none of it overlaps: a shorter fsdp axis beside data, or more rows with more remat"
    return f"{took} beyond the products: more rows a device, if memory allows"


def describe_comparison(ranking: list[tuple[dict[str, str], Plan | UserError]]) -> str:
    """A ranking as a table: the fastest first, those that do not fit last."""
    lines = [f"{'GiB':>7s}{'roofline':>10s}{'kernels':>9s}{'exposed':>9s}{'rows/s':>9s}  settings"]
    for choice, plan in ranking:
        settings = " ".join(f"{field}={value}" for field, value in choice.items())
        if isinstance(plan, UserError):
            lines.append(f"{'-':>7s}{'':37s}  {settings}: {plan}")
        else:
            shares = "".join(
                f"{plan.mfu(seconds):{width}.1%}"
                for seconds, width in zip(plan.times.values(), (10, 9, 9), strict=True)
            )
            rate = plan.rows / plan.times["interconnect fully exposed"]
            lines.append(
                f"{plan.peak / GIB:7.1f}{shares}{rate:9.1f}  {settings}{'' if plan.fits else ': DOES NOT FIT'}"
            )
    return "\n".join(["MFU by estimate, rows a second with the interconnect fully exposed", *lines])


def describe_suggestions(suggestions: Suggestions, topology: str) -> str:
    """The choices that fit, as a table with the settings to pass on."""
    found = suggestions.found
    lines = [
        f"{len(found)} of {suggestions.ranked} choices for {topology}, the fastest by arithmetic that fit; "
        f"{suggestions.compiled} were compiled"
    ]
    if not found:
        return "\n".join([*lines, "none fits: more chips, or a smaller batch, whose micro-batches may have fewer rows"])
    lines.append(f"{'GiB':>7s}{'s a step':>10s}{'MFU':>8s}{'micro-batches':>15s}{'rows':>6s}  settings")
    for choice, plan in found:
        settings = " ".join(f"--config.{field}={value}" for field, value in choice.settings.items())
        lines.append(
            f"{plan.peak / GIB:7.1f}{choice.seconds:10.2f}{plan.mfu(choice.seconds):8.1%}"
            f"{choice.micro_batches:15d}{choice.rows:6d}  {settings}"
        )
    return "\n".join(lines)


def chart(plans: list[tuple[str, Plan]], file: Path) -> None:
    """A PNG of memory by kind and time by part, with a bar for each plan."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 1.6 + 0.7 * len(plans)), layout="constrained")
    names = [name for name, _ in plans]
    _bars(left, names, [{kind: size / GIB for kind, size in plan.memory.items()} for _, plan in plans])
    left.axvline(plans[0][1].capacity / GIB, color="black", linestyle="--", linewidth=1)
    left.set_xlabel("memory of a device, GiB (dashed: its capacity)")
    _bars(right, names, [_seconds(plan) for _, plan in plans])
    right.set_xlabel("estimated time of a step, s, if nothing overlaps")
    right.set_yticklabels([])
    with write_atomically(file) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)


def _seconds(plan: Plan) -> dict[str, float]:
    roofline, kernels, exposed = plan.times.values()
    parts = {part: cost.seconds for part, cost in plan.by_part.items()}
    return parts | {"attention kernels": kernels - roofline, "interconnect": exposed - kernels}


def _bars(axes: Any, names: list[str], stacks: list[dict[str, float]]) -> None:
    """Horizontal stacked bars, the first one on top."""
    kinds = list(dict.fromkeys(kind for stack in stacks for kind in stack))
    starts = [0.0] * len(stacks)
    for kind in kinds:
        sizes = [stack.get(kind, 0.0) for stack in stacks]
        axes.barh(names, sizes, left=starts, label=kind)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
