"""Plans for people: of a step on this machine's own devices, and of made-up ones that differ in one thing."""

import dataclasses
import json
import math

import pytest
from PIL import Image

from emu_jax.cli import main
from emu_jax.errors import UserError
from emu_jax.plan.plan import Plan
from emu_jax.plan.program import Cost
from emu_jax.plan.report import describe, describe_comparison, hint
from tests.train import tiny

GIB = float(1 << 30)


def plan(**changes) -> Plan:
    """A step of 2 s by roofline on four chips of 100 TFLOP/s, two thirds of its FLOPs useful."""
    found = Plan(
        kind="pretrain",
        topology="v9:2x2",
        chips=4,
        mesh={"slice": 1, "data": 2, "fsdp": 2, "tensor": 1, "context": 1},
        rows=8,
        row_name="rows",
        tokens=16_384,
        micro_batches=1,
        steps=0,
        remat="full",
        memory={"parameters": 2 * GIB, "activations and workspace": 5 * GIB},
        capacity=16 * GIB,
        compile_s=9.0,
        cost=Cost(150e12, 1e12, 2.0, 10e12, {"fsdp all-gather": 60e9}),
        by_part={"llama": Cost(150e12, 1e12, 2.0, 10e12)},
        model_flops={"llama": 400e12},
        agreement=1.01,
        times={"roofline": 2.0, "with attention kernels": 2.25, "interconnect fully exposed": 2.5},
        interconnect_s=0.25,
        peak_flops=100e12,
        bandwidth=1e12,
    )
    return dataclasses.replace(found, **changes)


def test_a_plan_on_a_page():
    lines = describe(plan()).splitlines()
    assert lines[0] == "pretrain on v9:2x2: 4 chips, mesh data 2 x fsdp 2, 8 rows a step, remat full"
    assert "memory: 7.00 of 16 GiB a device: fits" in lines
    assert "  roofline                       2.0000 s a step     2,048.0 tokens/s/chip   50.0% MFU" in lines
    assert "  interconnect fully exposed     2.5000 s a step     1,638.4 tokens/s/chip   40.0% MFU" in lines
    assert lines[-1].startswith("hint: recomputation takes 0.50 s of a step: remat dots keeps the products' results")


def test_a_run_in_micro_batches_and_its_price():
    found = plan(micro_batches=4, steps=10_000, model_flops={"llama": 300e12, "vision": 100e12})
    lines = describe(found, {"tokens": 0.9, "images": 0.5}, price=2.0).splitlines()
    assert lines[0].endswith(": 4 chips, mesh data 2 x fsdp 2, 8 rows a step in 4 micro-batches, remat full")
    (line,) = (line for line in lines if line.startswith("  roofline"))
    useful = (0.9 * 300 + 0.5 * 100) / 400 / 2
    assert line.endswith(f"50.0% MFU{useful:8.1%} without padding"), line
    assert lines[-2] == "the run's 10,000 steps take 5.6 to 6.9 hours; at 2 a chip-hour they cost 44 to 56"
    assert "take 2.3 to 2.9 days" in describe(plan(steps=100_000))


def test_no_mfu_where_flops_are_not_the_models():
    text = describe(plan(agreement=1.06))
    assert "no MFU: they should agree within 5%" in text and "% MFU" not in text


def test_no_time_where_the_compiler_gives_none():
    text = describe(plan(times=dict.fromkeys(plan().times, math.nan)))
    assert text.endswith("no time: the compiler does not cost every operation of the step on these devices")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"capacity": 6 * GIB}, "it does not fit: fewer rows, remat full, or more chips along fsdp or tensor"),
        ({"kind": "decode"}, "every token reads all weights"),
        ({"cost": Cost(100e12, 1e12, 2.0)}, "memory traffic takes 1.00 s of a step, and there is room for twice"),
    ],
)
def test_hints(changes, expected):
    assert hint(plan(**changes)).startswith(expected)


def test_a_ranking_ends_with_what_does_not_fit():
    ranking = [
        ({"model.llama.remat": "full"}, plan()),
        ({"model.llama.remat": "dots"}, UserError("8 rows do not fit v9:2x2")),
    ]
    lines = describe_comparison(ranking).splitlines()
    assert lines[2].split() == ["7.0", "50.0%", "44.4%", "40.0%", "3.2", "model.llama.remat=full"]
    assert lines[3].endswith("model.llama.remat=dots: 8 rows do not fit v9:2x2")


@pytest.mark.slow
def test_plans_of_the_devices_at_hand_are_compared_written_and_drawn(tmp_path, capsys):
    files = ["--json", str(tmp_path / "plan.json"), "--chart", str(tmp_path / "plan.png")]
    options = ["--topology", "here", "--compare", "model.llama.remat=none", "rows=4,2", "--untimed", *files]
    assert main(["plan", "--config", tiny.__file__, "--config.model.llama.vocab_size=300", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[2:]] == ["rows=2", "rows=4"], lines
    found = json.loads((tmp_path / "plan.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    memory = {name: sum(plan["memory"].values()) for name, plan in found.items()}
    assert memory["model.llama.remat=none rows=2"] < memory["model.llama.remat=none rows=4"]
    assert Image.open(tmp_path / "plan.png").width > 800


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--compare", "model.llama.remat"],
            "--compare model.llama.remat: expected FIELD=A,B as in model.llama.remat=full,dots or rows=",
        ),
        (
            ["--compare", "model.llama.rematt=full"],
            "--config.model.llama.rematt: config.model.llama has no field 'rematt'; did you mean",
        ),
        (["--decode", "-1"], "--decode -1; expected 1 or more"),
        (["--fill", "0.9"], "--fill 0.9: expected two shares of 0 to 1, as in 0.91,0.97"),
        (["--fill", "0.9,1.2"], "--fill 0.9,1.2: expected two shares of 0 to 1"),
        (["--price", "-1"], "--price -1; expected 0 or more"),
        (["--config.train.mesh.fsdp=3"], "does not multiply to the 1 available devices"),
    ],
)
def test_settings_that_cannot_work(options, message, capsys):
    assert main(["plan", "--config", tiny.__file__, "--topology", "here", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
