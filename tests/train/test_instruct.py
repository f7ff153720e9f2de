"""Adapters: they alone are trained, and they add to the language model what merging them would."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters import partial_eval as pe

from configs import instruct
from emu_jax.config import load_config
from emu_jax.data.config import DataConfig
from emu_jax.data.mixture import SourceConfig
from emu_jax.data.pipeline import Pipeline, train_tokenizer
from emu_jax.data.prepare import recode
from emu_jax.data.raw.readers import make_reader
from emu_jax.data.sources import PairOrder
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.models import emu, lora
from emu_jax.models.layers import rope_tables
from emu_jax.models.llama import PROJECTIONS
from emu_jax.models.packed_attention import packed_attention
from emu_jax.models.paths import flatten, join, nest, split
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.tasks.instruct import Instruct
from emu_jax.train.tasks.interleaved import step_flops
from tests.data.folders import RECODING, SIZE, write_folder
from tests.test_data_formats import groups, options_of, write
from tests.train import tiny
from tests.train.tasks import interleaved, step_of
from tests.train.test_step import DOCUMENTS, IDS, batch_of, model


def adapted() -> emu.EmuConfig:
    fields = model().to_dict()
    fields["llama"] |= {"lora_rank": 3, "lora_alpha": 6.0}
    return emu.EmuConfig.from_dict(fields | {"regression_loss_weight": 0.0})


@pytest.fixture(scope="module")
def trained() -> tuple:
    """A state before and after two steps on one document."""
    from emu_jax.sharding import make_mesh
    from emu_jax.train.state import create_state

    fields = tiny.get_config().optimizer
    fields.learning_rate = {"llama": 1e-2}
    config = OptimizerConfig.from_dict(fields)
    task = interleaved(adapted(), IDS, config, kind=Instruct)
    before = create_state(task, config, 0, make_mesh({}, jax.devices()[:1]))
    step = jax.jit(step_of(task, config))
    after = before
    losses = []
    for _ in range(2):
        after, metrics = step(after, batch_of(DOCUMENTS["image first"]))
        losses.append(float(metrics["loss"]))
    return before, after, losses


def test_adapters_alone_are_trained(trained):
    before, after, losses = trained
    assert losses[1] < losses[0]
    old, new = flatten(before.params), flatten(after.params)
    moved = {path for path in old if not np.array_equal(old[path], new[path])}
    expected = {f"llama/blocks/attn/{name}/{half}" for name in "qkvo" for half in ("lora_a", "lora_b")}
    assert moved == expected, f"expected {sorted(expected)}"
    sizes = {path: leaf.shape for path, leaf in flatten(after.opt_state[1].mu).items()}
    assert set(sizes) == expected, "moments of what is trained alone"


@pytest.mark.long
def test_adapters_equal_merged_weights(trained):
    _, after, _ = trained
    flat = flatten(after.params)
    adapters = {path: leaf for path, leaf in flat.items() if lora.is_adapter(path)}
    plain = {path: leaf for path, leaf in flat.items() if path not in adapters}
    merged = lora.merge(nest(plain), nest(adapters), alpha=6.0)
    batch = batch_of(DOCUMENTS["image first"])
    statistics = emu.initial_statistics(model())
    beside = emu.intermediates(after.params, statistics, batch, config=adapted(), ids=IDS)["logits"]
    inside = emu.intermediates(merged, statistics, batch, config=model(), ids=IDS)["logits"]
    np.testing.assert_allclose(beside, inside, atol=1e-5)
    assert (
        float(
            jnp.abs(beside - emu.intermediates(nest(plain), statistics, batch, config=model(), ids=IDS)["logits"]).max()
        )
        > 1e-3
    )


def test_without_adapters_there_is_nothing_to_train():
    with pytest.raises(UserError, match=r"config\.model\.llama\.lora_rank=0; the objective instruct trains adapters"):
        interleaved(model(), IDS, kind=Instruct)


def test_the_config_trains_what_the_objective_does():
    config = instruct.get_config()
    config.model.llama.vocab_size = 32_004
    llama = config.model.llama
    assert (llama.lora_rank, llama.lora_alpha, llama.lora_dropout) == (16, 16.0, 0.05), "the reference's adapters"
    task = Instruct(config)
    trained = {path.rpartition("/")[0] for path in flatten(task.shapes) if task.is_trainable(path)}
    assert trained == {f"llama/blocks/attn/{name}" for name in "qkvo"}


# ---------------------------------------------------------------- the published mixture

SETS = {"sharegpt": 90.0, "alpaca": 52.0, "llava": 158.0, "videochat": 11.0, "video_chatgpt": 100.0}


def test_the_published_sets_weigh_their_samples():
    """10,000 steps of 128 samples are as many passes over each as over all of them."""
    config = instruct.get_config()
    assert {name: entry.weight for name, entry in config.data.mixture.items()} == SETS
    assert round(config.train.steps * 128 / (1000 * sum(SETS.values())), 1) == 3.1


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The records of the five sets, of all chats in docs/data-formats.md, as `prepare` stores them, by name."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for group in groups():
        if group[-1].headings[1] == "Raw data: chats":
            write(group, tmp_path)
            options = options_of(group)
            if options.out.name not in SETS:
                continue
            reader = make_reader(options.source, options.set)
            items = [item for shard in reader.shards(options.path) for item in reader.read(shard)]
            records = [record for item in items for record in recode(item, RECODING)]
            found[options.out.name] = write_folder(tmp_path / options.out, records, shards=1)
    return found


def test_the_five_sets_are_one_stream(prepared):
    """Sources come from the command line; each set is there as often as its weight says, videos with eight frames."""
    assert set(prepared) == set(SETS)
    overrides = [f"--config.data.mixture.{name}.source={folder}" for name, folder in prepared.items()]
    entries = load_config(instruct.__file__, overrides).data.mixture
    data = DataConfig(
        source="",
        split="train",
        seed=0,
        row_tokens=256,
        row_images=8,
        batch_rows=2,
        packing_window=sum(map(int, SETS.values())),
        workers=0,
        pairs=PairOrder(),
        mixture={name: SourceConfig.from_dict(name, entry) for name, entry in entries.items()},
    )
    tokenizer = train_tokenizer(data, SIZE, vocab_size=120, model_type="word")
    stream = Pipeline(data, Tokenizer(tokenizer.proto, instruct=True), queries=2, image_size=SIZE)
    seen = dict.fromkeys(SETS, 0)
    images = set()
    while sum(seen.values()) < data.packing_window:
        batch = next(stream)
        for row in range(data.batch_rows):
            for segment in range(1, batch["segments"][row].max() + 1):
                inside = batch["segments"][row] == segment
                name = stream.sources[batch["source_ids"][row][inside][0]]
                seen[name] += 1
                images.add((name, len({*batch["slots"][row][inside]} - {-1})))
    stream.close()
    print(seen, images)
    assert images == {("sharegpt", 0), ("alpaca", 0), ("llava", 1), ("videochat", 8), ("video_chatgpt", 8)}
    total = sum(SETS.values())
    for name, weight in SETS.items():
        expected = weight * sum(seen.values()) / total
        assert abs(seen[name] - expected) <= 3, f"{name}: expected about {expected:.0f} samples, got {seen[name]}"


# ---------------------------------------------------------------- memory and FLOPs


def test_optimizer_memory_is_the_adapters(trained):
    """AdamW's two moments of a and b in float32, and its counter; 4 projections of 2 layers, 16 x 3 and 3 x 16."""
    _, after, _ = trained
    adapters = 4 * 2 * (16 * 3 + 3 * 16) * 4
    found = sum(leaf.nbytes for leaf in jax.tree.leaves(after.opt_state))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(after.params))
    print(f"{found} bytes beside {whole} of parameters")
    assert found == 2 * adapters + 4, f"expected twice the {adapters} bytes of the adapters, and a counter of 4"


def products(jaxpr) -> tuple[float, float]:
    """FLOPs of a program's matrix products: of linear maps, and of attention, whose products have batch axes."""
    linear = attention = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            count = 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
            linear, attention = (linear, attention + count) if batched else (linear + count, attention)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                a, b = products(inner)
                linear, attention = linear + times * a, attention + times * b
    return linear, attention


@pytest.mark.parametrize(
    "targets",
    [("q", "k", "v", "o"), ("k",), ("q", "v"), ("v", "o"), ("o", "up"), ("gate", "down"), ("down",), PROJECTIONS],
)
def test_useful_flops_are_those_of_the_program(targets):
    """Of the language model's part of a step: what the gradients of adapters need, unrolled, dead code left out."""
    fields = model().to_dict()
    fields["llama"] |= {"lora_rank": 3, "lora_targets": targets, "layers": 3}
    config = emu.EmuConfig.from_dict(fields)
    rows, length = 2, 8
    adapters, rest = split(emu.abstract(config), lora.is_adapter)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))

    def total(adapters, rest, inputs):
        llama = emu.bind(config, join(adapters, rest)).llama
        graph, layers = nnx.split(llama.blocks)
        cos, sin = rope_tables(
            positions, length, config.llama.head_dim, config.llama.rope_base, config.llama.rope_dtype
        )
        attend = packed_attention(positions * 0 + 1, config.llama.head_dim, "auto")
        for layer in range(config.llama.layers):  # not a loop of the program, whose first layer does as all others
            block = nnx.merge(graph, jax.tree.map(lambda leaf, layer=layer: leaf[layer], layers))
            inputs = block(inputs, attend=attend, cos=cos, sin=sin)
        return inputs.sum()

    inputs = jax.ShapeDtypeStruct((rows, length, 16), jnp.float32)
    program = jax.make_jaxpr(jax.value_and_grad(total))(adapters, rest, inputs).jaxpr
    program, _ = pe.dce_jaxpr(program, [True] * len(program.outvars))
    linear, attention = products(program)
    expected = step_flops(config, rows, 0, length, lora.is_adapter)
    assert linear == expected["llama"] + expected["adapters"], targets
    assert attention == 2 * expected["attention"], "the program computes what the causal mask hides, too"
