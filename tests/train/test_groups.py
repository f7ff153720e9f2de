"""`config.optimizer.groups`: what patterns match, what each parameter gets, what is refused, what frozen slices do."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import models
from emu_jax.config import from_json, load_config, to_json
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.flops import forward_flops
from emu_jax.models.paths import flatten
from emu_jax.sharding import make_mesh
from emu_jax.train.groups import Group, resolve
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import create_state
from emu_jax.train.tasks.interleaved import step_flops
from tests.train import tiny
from tests.train.tasks import interleaved, step_of
from tests.train.test_step import DOCUMENTS, IDS, batch_of, model

FROZEN_LLM = (
    '(("llama/(lm_head|visual_head)/kernel", 1.0, None, False), '
    '("llama/embed/embedding[-4:]", 1.0, None, False), ("llama/.*", 1.0, None, True))'
)
LAYER_DECAY = '(("vision/blocks/0/.*", 0.25, None, False), ("vision/blocks/1/.*", 0.5, None, False))'
FROZEN_NORMS = '((".*norm.*", 1.0, None, True), ("ln_visual/.*", 1.0, None, True))'


def optimizer(*overrides: str) -> OptimizerConfig:
    """Of the tests' config, overridden as on a command line; rates of 1 make factors readable."""
    rates = [f"--config.optimizer.learning_rate.{part}=1.0" for part in ("vision", "causal", "llama")]
    return OptimizerConfig.from_dict(load_config(tiny.__file__, [*rates, *overrides]).optimizer)


def groups(text: str, *overrides: str) -> OptimizerConfig:
    return optimizer(f"--config.optimizer.groups={text}", *overrides)


def hyperparameters(config: OptimizerConfig) -> dict:
    """Of every parameter of the debug model (68 tokens), by path."""
    debug = emu.EmuConfig.from_dict(models.debug())
    return config.hyperparameters(emu.logical_axes(debug), emu.abstract(debug))


def plain(value) -> float | tuple:
    """A number, or an array's shape and values, for literal comparisons."""
    return float(value) if np.ndim(value) == 0 else (value.shape, [float(x) for x in value.ravel()])


# ---------------------------------------------------------------- what each parameter gets


def test_no_groups_are_the_parts_of_the_config():
    config = optimizer("--config.optimizer.learning_rate.vision=0", "--config.optimizer.learning_rate.causal=0.5")
    found = hyperparameters(config)
    rates = {path: plain(h.learning_rate) for path, h in found.items()}
    parts = {"vision": 0.0, "ln_visual": 0.0, "causal": 0.5, "llama": 1.0}
    assert rates == {path: parts[path.partition("/")[0]] for path in found}
    decays = {path: plain(h.weight_decay) for path, h in found.items()}
    assert decays == {path: 0.05 if path.endswith("/kernel") else 0.0 for path in found}


def test_a_frozen_language_model_with_trained_heads_and_new_token_rows():
    found = hyperparameters(groups(FROZEN_LLM))
    rates = {path: plain(h.learning_rate) for path, h in found.items() if path.startswith("llama/")}
    assert {path: rate for path, rate in rates.items() if rate != 0.0} == {
        "llama/lm_head/kernel": 1.0,
        "llama/visual_head/kernel": 1.0,
        "llama/embed/embedding": ((68, 1), [0.0] * 64 + [1.0] * 4),
    }
    assert len(rates) == 13
    assert all(h.learning_rate == 1.0 for path, h in found.items() if not path.startswith("llama/"))


def test_layer_wise_decay_of_the_learning_rate():
    found = hyperparameters(groups(LAYER_DECAY))
    rates = {path: plain(h.learning_rate) for path, h in found.items()}
    assert rates["vision/blocks/attn/qkv/kernel"] == ((2, 1, 1), [0.25, 0.5])
    assert rates["vision/blocks/attn/q_bias"] == ((2, 1), [0.25, 0.5])
    blocks = {path for path, rate in rates.items() if rate != 1.0}
    assert blocks == {path for path in found if path.startswith("vision/blocks/")}
    # As OptimizerConfig's docstring writes it for 40 layers.
    entries = tuple((f"vision/blocks/{i}/.*", 0.9 ** (2 - i), None, False) for i in range(2))
    config = OptimizerConfig.from_dict(load_config(tiny.__file__).optimizer.to_dict() | {"groups": entries})
    rates = hyperparameters(
        dataclasses.replace(config, learning_rate=(("causal", 1.0), ("llama", 1.0), ("vision", 1.0)))
    )
    np.testing.assert_allclose(rates["vision/blocks/norm1/scale"].learning_rate, [[0.81], [0.9]], rtol=1e-6)


def test_frozen_norms():
    found = hyperparameters(groups(FROZEN_NORMS))
    assert {path for path, h in found.items() if h.frozen} == {
        "vision/blocks/norm1/scale",
        "vision/blocks/norm1/bias",
        "vision/blocks/norm2/scale",
        "vision/blocks/norm2/bias",
        "ln_visual/scale",
        "ln_visual/bias",
        "causal/blocks/self_norm/scale",
        "causal/blocks/cross_norm/scale",
        "causal/blocks/mlp_norm/scale",
        "causal/final_norm/scale",
        "llama/blocks/attn_norm/scale",
        "llama/blocks/mlp_norm/scale",
        "llama/final_norm/scale",
    }
    assert all(h.learning_rate == 1.0 for h in found.values() if not h.frozen)


def test_token_rows_of_the_head_are_its_second_axis():
    found = hyperparameters(groups('(("llama/(embed|lm_head)/.*[66:]", 2.0, 0.5, False),)'))
    assert plain(found["llama/lm_head/kernel"].learning_rate) == ((1, 68), [1.0] * 66 + [2.0] * 2)
    assert plain(found["llama/embed/embedding"].learning_rate) == ((68, 1), [1.0] * 66 + [2.0] * 2)
    # A number is for exactly what matches: new rows of a table that does not decay, and of a head that does.
    assert found["llama/embed/embedding"].weight_decay.ravel().tolist() == [0.0] * 66 + [0.5] * 2
    np.testing.assert_allclose(found["llama/lm_head/kernel"].weight_decay.ravel(), [0.05] * 66 + [0.5] * 2)


def test_weight_decay_of_an_entry_is_for_what_it_matches_norms_too():
    text = (
        '(("causal/.*kernel", 1.0, 0.3, False), '
        '("causal/.*norm/scale", 1.0, 0.2, False), ("causal/.*", 1.0, None, False))'
    )
    found = {path: plain(h.weight_decay) for path, h in hyperparameters(groups(text)).items()}
    for path, decay in found.items():
        kernel = path.endswith("/kernel")
        norm = "norm/scale" in path
        expected = (0.3 if kernel else 0.2 if norm else 0.0) if path.startswith("causal/") else 0.05 * kernel
        assert decay == expected, f"{path}: {decay}, expected {expected}"


PATTERNS = (".*", "llama/.*", ".*norm.*", ".*/0/.*", "vision/blocks/1/.*", "llama/(embed|lm_head)/.*")
LIMITS = st.none() | st.integers(-5, 70)


@st.composite
def entries(draw) -> Group:
    pattern = draw(st.sampled_from(PATTERNS))
    if draw(st.booleans()):
        start, stop = draw(LIMITS), draw(LIMITS)
        pattern += f"[{'' if start is None else start}:{'' if stop is None else stop}]"
    return Group(
        pattern, draw(st.sampled_from((0.0, 0.5, 2.0))), draw(st.sampled_from((None, 0.0, 0.3))), draw(st.booleans())
    )


@given(st.lists(entries(), max_size=4))
def test_the_first_entry_that_matches_counts(found_entries):
    """Against a loop over every layer and token row of some parameters."""
    axes = {
        "llama/embed/embedding": ("vocab", "embed"),
        "llama/lm_head/kernel": ("embed", "vocab"),
        "llama/blocks/attn_norm/scale": ("layers", "norm"),
        "vision/blocks/attn/qkv/kernel": ("layers", "embed", "heads"),
        "vision/patch_embed/bias": ("embed",),
    }
    shapes = {"llama/embed/embedding": (68, 3), "llama/lm_head/kernel": (3, 68), "vision/patch_embed/bias": (3,)}
    shapes |= {"llama/blocks/attn_norm/scale": (2, 3), "vision/blocks/attn/qkv/kernel": (2, 3, 4)}
    rates = {"vision": 0.1, "llama": 0.2}
    found = resolve(found_entries, rates, 0.05, axes, shapes)

    def matches(group: Group, path: str, position: int) -> bool:
        regex, bracket, rows = group.pattern.partition("[")
        if bracket:
            start, stop = (int(limit) if limit else None for limit in rows[:-1].split(":"))
            if "vocab" not in axes[path] or position not in range(68)[start:stop]:
                return False
        layer = path.replace("blocks/", f"blocks/{position}/") if "layers" in axes[path] else path
        return any(re.fullmatch(regex, name) for name in (path, layer))

    for path, names in axes.items():
        for index in itertools.product(*(range(size) for size in shapes[path])):
            axis = names.index("vocab") if "vocab" in names else 0
            winner = next((group for group in found_entries if matches(group, path, index[axis])), None)
            rate, decay = rates[path.partition("/")[0]], 0.05 if path.endswith("kernel") else 0.0
            if winner is not None:
                rate = 0.0 if winner.frozen else rate * winner.learning_rate
                decay = decay if winner.weight_decay is None else winner.weight_decay
            of_leaf = (found[path].learning_rate, found[path].weight_decay)
            got = tuple(float(np.broadcast_to(value, shapes[path])[index]) for value in of_leaf)
            assert got == pytest.approx((rate, decay)), f"{path}{list(index)} of {found_entries}"


# ---------------------------------------------------------------- settings


def test_groups_survive_a_config_s_json():
    config = load_config(tiny.__file__, [f"--config.optimizer.groups={FROZEN_LLM}"])
    assert isinstance(config.optimizer.groups, tuple)
    again = OptimizerConfig.from_dict(from_json(to_json(config)).optimizer)
    assert again == OptimizerConfig.from_dict(config.optimizer)
    assert [dataclasses.astuple(group) for group in again.groups] == [
        ("llama/(lm_head|visual_head)/kernel", 1.0, None, False),
        ("llama/embed/embedding[-4:]", 1.0, None, False),
        ("llama/.*", 1.0, None, True),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('("llama/.*", 1.0, None, True)', r"groups\[0\]='llama/\.\*'; expected \(pattern, learning rate factor,"),
        ("((3, 1.0, None, True),)", r"groups\[0\]: pattern 3; expected a regular expression in quotes"),
        ('(("llama/(.*", 1.0, None, True),)', r"groups\[0\]: llama/\(\.\* is not a regular expression \(missing \)"),
        ('((".*", -1.0, None, False),)', r"groups\[0\]: learning rate factor -1\.0 of \.\*; expected 0 \(frozen\)"),
        ('((".*", True, None, False),)', r"groups\[0\]: learning rate factor True of"),
        ('((".*", 1.0, -0.1, False),)', r"groups\[0\]: weight decay -0\.1 of \.\*; expected 0 or more, or None"),
        ('((".*", 1.0, None, 1),)', r"groups\[0\]: frozen is 1 for \.\*; expected True or False"),
    ],
)
def test_entries_that_cannot_be(text, message):
    with pytest.raises(UserError, match=r"^config\.optimizer\." + message):
        groups(text)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            '((".*bias", 2.0, None, False), ("llama/lmhead/kernel", 1.0, None, True))',
            (),
            r"groups\[1\], 'llama/lmhead/kernel', matches no parameter that this objective trains; did you mean "
            r"llama/lm_head/kernel\?$",
        ),
        (
            '(("vision/blocks/2/.*", 1.0, None, True),)',
            (),
            r"groups\[0\], 'vision/blocks/2/\.\*', matches no parameter that this objective trains; did you mean vi",
        ),
        (
            '(("llama/embed/embedding[32000:]", 1.0, None, True),)',
            (),
            r"groups\[0\], .* matches no parameter that this objective trains; llama/embed/embedding has \d+ tokens$",
        ),
        (
            '(("vision/.*[0:1]", 1.0, None, True),)',
            (),
            r"groups\[0\], .* matches no parameter that this objective trains; vision/\S+ has no token rows$",
        ),
        (
            '(("llama/.*", 1.0, None, True), ("llama/lm_head/kernel", 1.0, None, False))',
            (),
            r"groups\[1\], 'llama/lm_head/kernel', has no effect: entries before it match all that it matches",
        ),
        (
            '(("llama/lm_head/kernel", 1.0, None, False),)',
            ("--config.optimizer.learning_rate.llama=0",),
            r"groups\[0\], .* trains nothing, because config\.optimizer\.learning_rate\.llama is 0; set it above 0",
        ),
        ('((".*", 0.0, None, False),)', (), r"groups freezes every parameter that this objective trains"),
        (
            '(("vision/.*|ln_visual/.*|causal/.*", 1.0, None, True),)',
            ("--config.optimizer.learning_rate.llama=0",),
            r"groups freezes every parameter that this objective trains",
        ),
    ],
)
def test_groups_that_do_not_fit_the_model(text, overrides, message):
    with pytest.raises(UserError, match=r"^config\.optimizer\." + message):
        interleaved(model(), IDS, groups(text, *overrides))


def test_a_run_with_such_groups_writes_nothing(documents, tmp_path):
    from emu_jax.train.loop import train

    words = [f"--config.data.source={documents}", '--config.optimizer.groups=(("lm_head", 1.0, None, True),)']
    with pytest.raises(UserError, match=r"groups\[0\], 'lm_head', matches no parameter .* did you mean llama/lm_head/"):
        train(load_config(tiny.__file__, words), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_entry_for_a_part_that_is_partly_frozen_elsewhere_stands():
    """Norms of a part with rate 0 are frozen anyway; those of the others are what the entry is for."""
    config = groups('((".*norm.*", 0.5, None, False),)', "--config.optimizer.learning_rate.vision=0")
    task = interleaved(model(), IDS, config)
    encoder = [path for path in flatten(task.logical_axes) if path.startswith(("vision", "ln_visual"))]
    assert encoder and not any(map(task.is_trainable, encoder))


# ---------------------------------------------------------------- what is frozen


def steps(config: OptimizerConfig, count: int = 3, document: str = "image first"):
    """The task, the first state and the last one, and the metrics of each step."""
    task = interleaved(model(), IDS, config)
    first = create_state(task, config, 0, make_mesh({}, jax.devices()[:1]))
    first = dataclasses.replace(first, total_steps=jnp.asarray(10))
    step, state, rows = jax.jit(step_of(task, config)), first, []
    for _ in range(count):
        state, metrics = step(state, batch_of(DOCUMENTS[document]))
        rows.append({name: float(value) for name, value in metrics.items()})
    return task, first, state, rows


def config_with(text: str, **fields) -> OptimizerConfig:
    return OptimizerConfig.from_dict(
        load_config(tiny.__file__, [f"--config.optimizer.groups={text}"]).optimizer.to_dict() | fields
    )


@pytest.mark.slow
def test_frozen_slices_stay_bit_for_bit():
    """Layer 0 of the language model's blocks and its old token rows, beside a whole parameter; the rest moves."""
    text = (
        '(("llama/blocks/0/.*", 1.0, None, True), ("llama/embed/embedding[:-4]", 1.0, None, True), '
        '("llama/lm_head/kernel[:-4]", 1.0, None, True), ("llama/final_norm/scale", 1.0, None, True))'
    )
    _, first, last, _ = steps(config_with(text))
    old, new = flatten(first.params), flatten(last.params)
    moments = flatten(last.opt_state[1].mu)
    assert set(old) - set(moments) == {"llama/final_norm/scale"}, "a whole parameter has no optimizer state"
    for path in old:
        frozen = np.zeros(old[path].shape, bool)
        if path.startswith("llama/blocks/"):
            frozen[0] = True
        elif path == "llama/embed/embedding":
            frozen[:-4] = True
        elif path == "llama/lm_head/kernel":
            frozen[:, :-4] = True
        elif path == "llama/final_norm/scale":
            frozen[:] = True
        moved = np.asarray(old[path]) != np.asarray(new[path])
        assert not moved[frozen].any(), path
        if path in moments:
            for kind in (last.opt_state[1].mu, last.opt_state[1].nu):
                assert not np.asarray(flatten(kind)[path])[frozen].any(), f"{path}: moments of what is frozen"
        if path.startswith("llama/blocks/") or path == "llama/lm_head/kernel":
            assert moved[~frozen].mean() > 0.9, f"{path}: {moved[~frozen].mean()}"


@pytest.mark.slow
def test_the_gradient_of_a_frozen_slice_is_left_out_before_clipping():
    """The norm that clips is that of the rest: what is trained moves as if the frozen rows had no gradient at all."""
    text = '(("llama/lm_head/kernel[:-4]", 1.0, None, True),)'
    task, first, last, rows = steps(config_with(text, clip_norm=1e-3), count=1)
    batch = batch_of(DOCUMENTS["image first"])

    def loss(params):
        return task.loss(params, first.statistics, batch, jax.random.key(0), task.normalisers(batch))[0]

    grads = {path: np.array(leaf, np.float64) for path, leaf in flatten(jax.jit(jax.grad(loss))(first.params)).items()}
    whole = np.sqrt(sum(np.square(leaf).sum() for leaf in grads.values()))
    grads["llama/lm_head/kernel"][:, :-4] = 0
    rest = np.sqrt(sum(np.square(leaf).sum() for leaf in grads.values()))
    assert rows[0]["grad_norm"] == pytest.approx(rest, rel=1e-4) and rest < 0.99 * whole
    clipped = np.sqrt(sum(np.square(np.float64(leaf) / 0.1).sum() for leaf in jax.tree.leaves(last.opt_state[1].mu)))
    assert clipped == pytest.approx(1e-3, rel=1e-3), "of the first step's mean, a tenth of the clipped gradient"


@pytest.mark.slow
def test_frozen_by_an_entry_or_by_the_rate_of_the_part_is_the_same():
    text = '(("vision/.*", 1.0, None, True), ("ln_visual/.*", 1.0, None, True))'
    by_entry = steps(config_with(text), count=2)
    rates = dict(config_with("()").learning_rate) | {"vision": 0.0}
    by_rate = steps(config_with("()", learning_rate=rates), count=2)
    jax.tree.map(np.testing.assert_array_equal, by_entry[2], by_rate[2])
    paths = list(flatten(by_rate[0].logical_axes))
    assert [by_entry[0].is_trainable(path) for path in paths] == [by_rate[0].is_trainable(path) for path in paths]


@pytest.mark.slow
def test_a_factor_is_of_the_learning_rate():
    """Adam's first step is its rate in size: half the factor moves half as far, without decay."""
    fields = {"weight_decay": 0.0, "clip_norm": 0.0}
    _, first, one, _ = steps(config_with("()", **fields), count=1)
    _, _, other, _ = steps(config_with('(("vision/blocks/1/.*", 0.5, None, False),)', **fields), count=1)
    old, whole, half = (
        np.asarray(state.params["vision"]["blocks"]["attn"]["qkv"]["kernel"]) for state in (first, one, other)
    )
    np.testing.assert_array_equal(whole[0], half[0])
    np.testing.assert_allclose(half[1] - old[1], 0.5 * (whole[1] - old[1]), rtol=1e-3, atol=1e-9)
    assert np.abs(whole[1] - old[1]).max() > 1e-5


@pytest.mark.slow
def test_the_decay_of_an_entry_is_what_is_subtracted():
    """Without a gradient (a batch of text does not reach the encoder), the decay alone moves a parameter."""
    _, first, last, _ = steps(config_with('(("vision/blocks/1/norm1/scale", 1.0, 0.5, False),)'), 1, "text only")
    old, new = (np.asarray(state.params["vision"]["blocks"]["norm1"]["scale"]) for state in (first, last))
    np.testing.assert_array_equal(new[0], old[0])
    rate = 1.2e-3  # of the second of ten steps' warm-up of 3%: the schedule is at its peak
    np.testing.assert_allclose(old[1] - new[1], rate * 0.5 * old[1], rtol=0.03)


# ---------------------------------------------------------------- FLOPs


def flops(text: str, *overrides: str) -> dict[str, float]:
    """Of a step over those of forward passes, by part."""
    task = interleaved(model(), IDS, groups(text, *overrides))
    forward = forward_flops(model(), 4, 2, 32)
    found = step_flops(model(), 2, 2, 32, task.is_trainable)
    return {part: round(value / forward[part], 3) for part, value in found.items() if forward[part]}


def rate_0(*parts: str) -> list[str]:
    return [f"--config.optimizer.learning_rate.{part}=0" for part in parts]


@pytest.mark.parametrize(
    ("text", "frozen", "vision", "causal", "llama", "attention", "heads"),
    [
        ("()", (), 3, 3, 3, 3, 3),
        ("()", ("vision",), 1, 3, 3, 3, 3),
        ("()", ("causal",), 3, 2, 3, 3, 3),
        ("()", ("vision", "causal"), 1, 1, 3, 3, 3),
        ("()", ("llama",), 3, 3, 2, 3, 2),
        # The same by entries.
        ('(("vision/.*", 1.0, None, True), ("ln_visual/.*", 1.0, None, True))', (), 1, 3, 3, 3, 3),
        ('(("llama/.*", 1.0, None, True),)', (), 3, 3, 2, 3, 2),
        # ln_visual learns above the encoder; norms and slices change nothing; heads are trained on a frozen model.
        ('(("vision/.*", 1.0, None, True),)', ("causal",), 1, 2, 3, 3, 3),
        (FROZEN_NORMS, (), 3, 3, 3, 3, 3),
        ('(("vision/blocks/0/.*", 1.0, None, True),)', (), 3, 3, 3, 3, 3),
        (FROZEN_LLM, (), 3, 3, 2, 3, 3),
        (
            '(("llama/(lm_head|visual_head)/kernel", 1.0, None, False), ("llama/.*", 1.0, None, True))',
            ("vision", "causal"),
            *(1, 1, 1, 1, 2),
        ),
    ],
)
def test_flops_of_a_step_over_those_of_a_forward_pass(text, frozen, vision, causal, llama, attention, heads):
    expected = {"vision": vision, "causal": causal, "llama": llama, "attention": attention, "heads": heads}
    assert flops(text, *rate_0(*frozen)) == expected
