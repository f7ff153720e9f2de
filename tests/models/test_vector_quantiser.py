"""Codes against a search in plain Python, and what a gradient passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_jax.errors import UserError
from emu_jax.models.vector_quantiser import Codebook, VectorQuantiser, look_up, multiply_adds, nearest_codes, quantise


def made(sizes: Codebook, width: int = 6) -> tuple[VectorQuantiser, jax.Array]:
    shape = (sizes.groups, sizes.codes, sizes.width // sizes.groups)
    return VectorQuantiser(nnx.Rngs(0), width, sizes, "float32"), jax.random.normal(jax.random.key(1), shape)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**16), st.sampled_from([(2, 1, 1), (5, 2, 4), (7, 3, 3)]))
def test_codes_are_the_nearest_entries(seed, sizes):
    codes, groups, width = sizes
    z, codebook = (
        np.asarray(jax.random.normal(jax.random.key(seed + n), shape))
        for n, shape in enumerate([(4, groups, width // groups), (groups, codes, width // groups)])
    )
    found = np.asarray(nearest_codes(jnp.asarray(z), jnp.asarray(codebook)))
    for row in range(4):
        for group in range(groups):
            distances = [sum((a - b) ** 2 for a, b in zip(z[row, group], e, strict=True)) for e in codebook[group]]
            assert distances[found[row, group]] == pytest.approx(min(distances), abs=1e-5)
    entries = look_up(jnp.asarray(found), jnp.asarray(codebook))
    for row in range(4):
        for group in range(groups):
            np.testing.assert_array_equal(entries[row, group], codebook[group, found[row, group]])


def test_an_entry_s_own_embedding_is_restored_from_it():
    module, codebook = made(Codebook(5, 2, 4))
    x = jax.random.normal(jax.random.key(2), (3, 7, 6))
    found = quantise(module, codebook, x)
    assert found.codes.shape == (3, 7, 2) and found.restored.shape == x.shape
    np.testing.assert_allclose(found.restored, module.restore(look_up(found.codes, codebook)), atol=1e-5)
    np.testing.assert_allclose(found.reconstruction, jnp.square(found.restored - x).mean(-1), rtol=1e-5)
    np.testing.assert_array_equal(found.commitment, found.codebook)
    # z that are entries: no distance
    exact = nearest_codes(codebook.transpose(1, 0, 2), codebook)  # [K, G]
    np.testing.assert_array_equal(exact, [[0, 0], [1, 1], [2, 2], [3, 3], [4, 4]])


def test_gradients_go_where_they_should():
    """Restoring trains both maps, through the choice; commitment trains `down`, the codebook's term the entries."""
    module, codebook = made(Codebook(5, 2, 4))
    graph, params = nnx.split(module)
    x = jax.random.normal(jax.random.key(2), (3, 6))

    def reached(term: str) -> set[str]:
        def loss(params, codebook):
            return getattr(quantise(nnx.merge(graph, params), codebook, x), term).sum()

        by_map, by_entry = jax.grad(loss, (0, 1))(params, codebook)
        found = {name for name, tree in nnx.to_pure_dict(by_map).items() if np.abs(tree["kernel"]).max() > 0}
        return found | ({"codebook"} if np.abs(by_entry).max() > 0 else set())

    assert reached("reconstruction") == {"down", "up", "out"}
    assert reached("commitment") == {"down"}
    assert reached("codebook") == {"codebook"}


def test_multiply_adds_are_the_compiler_s():
    sizes, width = Codebook(256, 1, 32), 128
    module, codebook = made(sizes, width)
    like = jax.ShapeDtypeStruct((64, width), jnp.float32)
    counted = jax.jit(lambda x: quantise(module, codebook, x).restored).lower(like).compile().cost_analysis()["flops"]
    assert multiply_adds(width, sizes) == pytest.approx(counted / 2 / 64, rel=0.05)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((1, 1, 4), "x.codes=1; expected 2 or more"),
        ((4, 0, 4), "x.groups=0; expected 1 or more"),
        ((4, 3, 4), "x.width=4 does not divide into x.groups=3 groups; expected a multiple of them"),
    ],
)
def test_sizes_that_cannot_work(sizes, said):
    with pytest.raises(UserError) as caught:
        Codebook(*sizes).check("x")
    assert str(caught.value) == said
