"""Config files, variants and overrides."""

import pytest

from emu_jax.config import from_json, load_config, to_json
from emu_jax.errors import UserError

SOURCE = """
from ml_collections import ConfigDict

def get_config(variant: str = "plain"):
    web = {"source": "", "weight": 64.0}
    a = {"rate": 1.0, "steps": 3, "on": True, "sizes": (1, 2)}
    return ConfigDict({"variant": variant, "a": a, "name": "x", "data": {"mixture": {"web": web}, "more": {}}})
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "configs" / "mine.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return str(path)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("--config.a.rate=2", lambda c: c.a.rate, 2.0),
        ("--config.a.rate=1e-3", lambda c: c.a.rate, 0.001),
        ("--config.a.steps=-4", lambda c: c.a.steps, -4),
        ("--config.a.on=false", lambda c: c.a.on, False),
        ("--config.a.sizes=[3,4]", lambda c: c.a.sizes, (3, 4)),
        ("--config.name=12", lambda c: c.name, "12"),
        ("--config.name=a=b", lambda c: c.name, "a=b"),
    ],
)
def test_overrides_keep_the_field_s_type(file, override, read, value):
    got = read(load_config(file, [override]))
    assert got == value
    assert type(got) is type(value)


def test_variants(file):
    assert load_config(file).variant == "plain"
    assert load_config(f"{file}:other").variant == "other"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.a.rates=2", r"--config\.a\.rates: config\.a has no field 'rates'; did you mean rate\?"),
        ("--config.b.rate=2", r"config has no field 'b'"),
        ("--config.a.rate.x=2", r"config\.a\.rate has no field 'x'"),
        ("--config.a.steps=2.5", r"--config\.a\.steps=2\.5: expected int like 3, got float"),
        ("--config.a.on=1", r"--config\.a\.on=1: expected bool like True, got int"),
        ("--config.a=1", r"--config\.a is a group of fields \(.*\); set one of them"),
        ("--config.a.rate", r"expected --config\.<field>=<value>"),
        ("--config.a..rate=2", r"expected --config\.<field>=<value>"),
        ("--config.data.more=2", r"--config\.data\.more is a group of fields \(none yet\); set one of them"),
        ("--config.data.more.x=2", r"config\.data\.more has no field 'x'"),
        ("--config.data.mixtures.mine.source=x", r"config\.data has no field 'mixtures'; did you mean mixture\?"),
        ("--config.data.mixture=x", r"is a group of fields \(web\); set one of them"),
        ("--config.data.mixture.web=x", r"is a group of fields \(source, weight\); set one of them"),
        (
            "--config.data.mixture.mine=x",
            r"--config\.data\.mixture\.mine: config\.data\.mixture has no 'mine' to set; create it by setting "
            r"one of its fields, as in --config\.data\.mixture\.mine\.<field>=<value>",
        ),
        ("--config.data.mixture.web.source.x=2", r"config\.data\.mixture\.web\.source has no field 'x'"),
        ("--config.data.mixture.web.weight=x", r"mixture\.web\.weight=x: expected float like 64\.0, got str"),
    ],
)
def test_overrides_that_cannot_be(file, override, message):
    with pytest.raises(UserError, match=message):
        load_config(file, [override])


def test_entries_of_a_mixture_may_be_new(file):
    """So may the fields of an entry; their values are Python literals, or texts."""
    overrides = (
        "mine.source=data/mine",
        "mine.weight=16",
        "mine.pairs.order=text_first",
        "web.epochs=2",
        "web.weight=1",
    )
    config = load_config(file, [f"--config.data.mixture.{text}" for text in overrides])
    assert config.data.mixture.to_dict() == {
        "mine": {"source": "data/mine", "weight": 16, "pairs": {"order": "text_first"}},
        "web": {"source": "", "weight": 1.0, "epochs": 2},
    }
    assert type(config.data.mixture.web.weight) is float, "a field that was there keeps its type"
    assert load_config(file).data.mixture.to_dict() == {"web": {"source": "", "weight": 64.0}}


def test_json_round_trip(file):
    config = load_config(file)
    assert to_json(from_json(to_json(config))) == to_json(config)


def test_a_config_in_a_folder_of_configs(tmp_path):
    """configs/ablations/x.py imports `configs.…` like those beside the folder."""
    folder = tmp_path / "configs" / "ablations"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text("import sys\ndef get_config():\n    return list(sys.path)\n")
    assert str(tmp_path) in load_config(str(folder / "mine.py"))
