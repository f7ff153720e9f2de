"""`config.train`: what is refused before anything starts."""

import pytest

from emu_jax.errors import UserError
from emu_jax.train.loop import TrainConfig

FIELDS = {
    "steps": 8,
    "minutes": 0.0,
    "seed": 0,
    "log_every": 1,
    "checkpoint_every": 3,
    "keep_checkpoints": 2,
    "mesh": {},
}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, "steps=0, config.train.minutes=0.0; expected one of them above 0, and the other 0"),
        ({"minutes": 60.0}, "steps=8, config.train.minutes=60.0; expected one of them above 0, and the other 0"),
        ({"steps": -1}, "steps=-1, config.train.minutes=0.0; expected one of them above 0"),
        ({"keep_checkpoints": 1}, "keep_checkpoints=1; expected at least 2"),
        ({"keep_every": -1}, "keep_every=-1; expected 0 (none) or more"),
        ({"save_timeout_minutes": 0.0}, "save_timeout_minutes=0.0; expected more than 0"),
    ],
)
def test_what_cannot_be(fields, said):
    with pytest.raises(UserError) as raised:
        TrainConfig(**FIELDS | fields)
    assert str(raised.value).startswith(f"config.train.{said}")
