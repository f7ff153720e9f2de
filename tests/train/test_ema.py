"""The exponential moving average: its decay, and that whatever reads a run takes it, or raw parameters on request."""

import json
import math
from decimal import Decimal, localcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from emu_jax import Emu
from emu_jax.checkpoints.load import load_emu
from emu_jax.cli import main
from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.models.paths import flatten
from emu_jax.sharding import make_mesh
from emu_jax.train.init_from import init_from_checkpoints
from emu_jax.train.loop import train
from emu_jax.train.optimizer import OptimizerConfig, ema_update, ema_weight
from emu_jax.train.state import create_state
from emu_jax.train.tasks.task import make_task
from emu_jax.workdir import read_metrics
from tests.train import tiny

DECAY, STEPS = 0.6, 4
# A whole parameter and one layer, which the EMA has not and has.
FROZEN = '(("ln_visual/scale", 1.0, None, True), ("llama/blocks/0/.*", 1.0, None, True))'


# ---------------------------------------------------------------- the decay


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.997, 0.9999])
@pytest.mark.parametrize("step", [0, 1, 2, 10, 1_000, 10_000, 1_000_000])
def test_the_decay_is_the_bias_corrected_one(decay, step):
    """1 - (1 - d) / (1 - d^(t+1)) in 50 digits; float32 keeps the weight to a millionth."""
    with localcontext(prec=50):
        d = Decimal(repr(decay))
        expected = float((1 - d) / (1 - d ** (step + 1)))
    got = float(ema_weight(decay, jnp.asarray(step)))
    print(f"d {decay}, t {step}: weight {got!r}, expected {expected!r}, decay {1 - got!r}")
    assert got == pytest.approx(expected, rel=2e-6)
    assert step or got == 1.0, "the initial parameters have no weight"


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_the_average_is_the_exponential_kernel_over_the_steps_there_are(decay):
    random = np.random.default_rng(0)
    values = random.standard_normal((30, 7)).astype(np.float32)
    ema = {"x": jnp.full(7, 1e9)}  # initial parameters, which must not matter
    for step, value in enumerate(values):
        ema = ema_update(ema, {"x": jnp.asarray(value)}, ema_weight(decay, jnp.asarray(step)))
        kernel = [decay ** (step - i) for i in range(step + 1)]
        expected = sum(k * np.float64(v) for k, v in zip(kernel, values[: step + 1], strict=True)) / sum(kernel)
        np.testing.assert_allclose(ema["x"], expected, rtol=1e-4, atol=1e-6, err_msg=f"step {step}")


def test_a_constant_stays_what_it_is():
    """Without drift over many steps, as decay and weight that do not add up to 1 would have."""
    value = {"x": jnp.asarray([0.1, 3.0, -7e-5], jnp.float32)}

    def step(i, ema):
        return ema_update(ema, value, ema_weight(0.9999, i + 1))

    found = jax.jit(lambda: jax.lax.fori_loop(0, 100_000, step, value))()
    np.testing.assert_array_equal(found["x"], value["x"])


def test_the_average_of_bfloat16_parameters_is_float32():
    ema = {"x": jnp.zeros(1, jnp.float32)}
    ema = ema_update(ema, {"x": jnp.ones(1, jnp.bfloat16)}, ema_weight(0.999, jnp.asarray(10**6)))
    assert ema["x"].dtype == jnp.float32 and float(ema["x"][0]) == pytest.approx(1e-3, rel=1e-4)


# ---------------------------------------------------------------- a run that keeps one


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, documents) -> Path:
    """A run of a few steps with an EMA, every step of which is kept."""
    workdir = tmp_path_factory.mktemp("averaged") / "run"
    words = [f"--config.optimizer.ema_decay={DECAY}", f"--config.optimizer.groups={FROZEN}"]
    words += ["--config.train.checkpoint_every=1", "--config.train.keep_checkpoints=9"]
    train(
        load_config(tiny.__file__, [f"--config.data.source={documents}", f"--config.train.steps={STEPS}", *words]),
        workdir,
    )
    return workdir


def parameters(path: Path, weights: str) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten(load_emu(path, weights=weights).params).items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_run_s_ema_is_the_kernel_over_its_parameters(averaged):
    raw = [parameters(averaged / "checkpoints" / str(step), "raw") for step in range(1, STEPS + 1)]
    ema = parameters(averaged, "ema")
    kernel = [DECAY ** (STEPS - 1 - i) for i in range(STEPS)]
    for name in ema:
        expected = sum(k * np.float64(step[name]) for k, step in zip(kernel, raw, strict=True)) / sum(kernel)
        np.testing.assert_allclose(ema[name], expected, rtol=1e-4, atol=1e-7, err_msg=name)
    np.testing.assert_array_equal(ema["ln_visual/scale"], raw[0]["ln_visual/scale"])  # frozen: of the parameters
    first = ema["llama/blocks/attn/q/kernel"][0]
    np.testing.assert_array_equal(first, raw[0]["llama/blocks/attn/q/kernel"][0])  # a frozen layer: bit for bit
    assert not same(ema, raw[-1])
    assert same(parameters(averaged, "auto"), ema), "the EMA is what is taken by default"


@pytest.mark.long
def test_metrics_tell_the_decay(averaged):
    found = [row["ema_decay"] for row in read_metrics(averaged / "metrics.jsonl")]
    expected = [1 - (1 - DECAY) / (1 - DECAY ** (step + 1)) for step in range(STEPS)]
    print(found, expected)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_emu_loads_either(averaged):
    models = {weights: Emu.load(averaged, weights=weights) for weights in ("auto", "ema", "raw")}
    for weights, emu in models.items():
        assert same({n: np.asarray(x) for n, x in flatten(emu.params).items()}, parameters(averaged, weights)), weights
    embeddings = {weights: emu.generate_embeddings([["a red bar"]]) for weights, emu in models.items()}
    np.testing.assert_array_equal(embeddings["auto"], embeddings["ema"])
    assert np.abs(embeddings["raw"] - embeddings["ema"]).max() > 1e-4
    split = Emu.load(averaged, weights="ema", mesh={"fsdp": 1})
    assert same({n: np.asarray(x) for n, x in flatten(split.params).items()}, parameters(averaged, "ema"))


def test_generate_takes_either(averaged, tmp_path):
    for words, weights in (((), "ema"), (("--weights", "ema"), "ema"), (("--weights", "raw"), "raw")):
        out = tmp_path / f"{len(words)}-{weights}.npy"
        asked = ["generate", "--model", str(averaged), "--prompt", "a red bar", "--embeddings", str(out)]
        assert main([*asked, *words]) == 0
        expected = Emu.load(averaged, weights=weights).generate_embeddings([["a red bar"]])[0]
        np.testing.assert_array_equal(np.load(out), expected, err_msg=str(words))


@pytest.mark.slow
def test_evaluate_scores_either(averaged, tmp_path):
    """The predictions' record names the model that made them."""
    found = {}
    for weights in ("ema", "raw"):
        out = tmp_path / weights
        words = ["--benchmark", "fluent", "--limit", "2", "--out", str(out), "--weights", weights]
        assert main(["evaluate", "--model", str(averaged), *words]) == 0
        (file,) = out.rglob("0-of-1.jsonl")
        found[weights] = json.loads(file.read_text(encoding="utf-8").splitlines()[0])["run"]["model"]
    assert found == {weights: Emu.load(averaged, weights=weights).fingerprint for weights in found}
    assert found["ema"] != found["raw"]


def test_a_server_loads_either(averaged):
    server = pytest.importorskip("emu_jax.serve.server")
    for weights, expected in (("auto", "ema"), ("raw", "raw")):
        emu = server.load(server.Options(checkpoint=averaged, weights=weights))
        assert same({n: np.asarray(x) for n, x in flatten(emu.params).items()}, parameters(averaged, expected))


@pytest.mark.parametrize("words", [(), ("--weights", "ema"), ("--weights", "raw")])
def test_export_writes_either(averaged, tmp_path, words):
    """The language model, in float32: bit for bit."""
    from safetensors.numpy import load_file

    assert main(["export", "--from", str(averaged), "--to", str(tmp_path / "e"), "--format", "llama", *words]) == 0
    found = load_file(tmp_path / "e" / "model.safetensors")
    expected = parameters(averaged, "raw" if "raw" in words else "ema")
    for layer in range(2):
        np.testing.assert_array_equal(
            found[f"model.layers.{layer}.mlp.down_proj.weight"], expected["llama/blocks/mlp/down/kernel"][layer].T
        )
    np.testing.assert_array_equal(found["lm_head.weight"], expected["llama/lm_head/kernel"].T)
    np.testing.assert_array_equal(found["model.norm.weight"], expected["llama/final_norm/scale"])


@pytest.mark.long
def test_a_run_begins_with_the_ema(averaged, documents):
    """Adapters on it: the EMA in its place; their own EMA is of them alone, and of the initial ones as they are."""
    config = tiny.instruct_config(documents, averaged)
    config.optimizer.ema_decay = 0.9
    (task, inputs), mesh = make_task(config), make_mesh({})
    with jax.set_mesh(mesh):
        fresh = create_state(task, OptimizerConfig.from_dict(config.optimizer), 0, mesh)
        state = init_from_checkpoints(fresh, inputs.config, task.init_parts, inputs.tokenizer.role_words)
    begun, expected = flatten(state.params), parameters(averaged, "ema")
    for name, value in expected.items():
        if "embed/" not in name and "lm_head" not in name:  # which have new tokens
            np.testing.assert_array_equal(begun[name], value, err_msg=name)
    ema = flatten(state.statistics["ema"])
    assert set(ema) == {
        f"llama/blocks/{name}/{half}" for name in ("attn/q", "attn/v", "mlp/down") for half in ("lora_a", "lora_b")
    }
    for name, value in ema.items():
        np.testing.assert_array_equal(value, begun[name])


@pytest.mark.slow
def test_tuned_adapters_have_an_ema_of_their_own(averaged, documents, tmp_path):
    config = tiny.instruct_config(documents, averaged)
    config.optimizer.ema_decay = 0.5
    train(config, tmp_path / "run")
    raw, ema = (parameters(tmp_path / "run", weights) for weights in ("raw", "ema"))
    assert {name for name in raw if not np.array_equal(raw[name], ema[name])} == {
        f"llama/blocks/{name}/{half}" for name in ("attn/q", "attn/v", "mlp/down") for half in ("lora_a", "lora_b")
    }
    from safetensors.numpy import load_file

    assert main(["export", "--from", str(tmp_path / "run"), "--to", str(tmp_path / "p"), "--format", "peft"]) == 0
    found = load_file(tmp_path / "p" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    np.testing.assert_array_equal(found[name], ema["llama/blocks/attn/q/lora_b"][1].T)


@pytest.mark.slow
def test_a_bfloat16_run_keeps_its_ema_in_float32(documents, tmp_path):
    words = ["--config.model.param_dtype=bfloat16", "--config.optimizer.ema_decay=0.9", "--config.train.steps=2"]
    train(load_config(tiny.__file__, [f"--config.data.source={documents}", *words]), tmp_path / "run")
    raw, ema = (parameters(tmp_path / "run", weights) for weights in ("raw", "ema"))
    assert {leaf.dtype for leaf in raw.values()} == {leaf.dtype for leaf in ema.values()} == {jnp.dtype("bfloat16")}
    assert not same(raw, ema)


# ---------------------------------------------------------------- what cannot be


def test_a_run_that_keeps_none(trained, tmp_path, capsys):
    message = r"run: keeps no EMA \(it was made without config\.optimizer\.ema_decay\).*; take raw ones"
    with pytest.raises(UserError, match=message):
        Emu.load(trained, weights="ema")
    with pytest.raises(UserError, match=r"weights='average' is unknown; choose one of auto, raw, ema"):
        Emu.load(trained, weights="average")
    assert same(parameters(trained, "auto"), parameters(trained, "raw"))
    words = ["--to", str(tmp_path / "e"), "--format", "llama", "--weights", "ema"]
    assert main(["export", "--from", str(trained), *words]) == 2
    assert "keeps no EMA" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_the_decoder_s_parts_are_raw_with_the_model(drawing):
    """The U-Net keeps an EMA, the VAE and the model none: `ema` of the model is refused, the U-Net's is the default."""
    auto, raw = (flatten(Emu.load(drawing, weights=weights).decoder.unet_params) for weights in ("auto", "raw"))
    assert any(not np.array_equal(auto[name], raw[name]) for name in auto)
    with pytest.raises(UserError, match="keeps no EMA"):
        Emu.load(drawing, weights="ema")


def test_decays_of_one_or_more_are_refused():
    fields = load_config(tiny.__file__).optimizer.to_dict()
    for decay in (1.0, -0.1, math.inf):
        with pytest.raises(UserError, match=r"config\.optimizer\.ema_decay=.*; expected 0 to below 1"):
            OptimizerConfig.from_dict(ConfigDict(fields | {"ema_decay": decay}))
