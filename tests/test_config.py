"""Config files, variants and overrides."""

import json
import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from emu_jax.config import from_json, load_config, override, to_json
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
        ("--config.a.steps=1e6", lambda c: c.a.steps, 1_000_000),
        ("--config.a.steps=2_000", lambda c: c.a.steps, 2000),
        ("--config.a.steps=-2.0", lambda c: c.a.steps, -2),
        ("--config.a.on=TRUE", lambda c: c.a.on, True),
        ("--config.a.sizes=3,4.0", lambda c: c.a.sizes, (3, 4)),
        ("--config.a.sizes=()", lambda c: c.a.sizes, ()),
        ("--config.name=12", lambda c: c.name, "12"),
        ("--config.name='12'", lambda c: c.name, "12"),
        ("--config.name=", lambda c: c.name, ""),
        ("--config.name=don't", lambda c: c.name, "don't"),
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
        ("--config.a.steps=1.5e0", r"--config\.a\.steps=1\.5e0: expected int like 3, got float"),
        ("--config.a.steps=1e30", r"--config\.a\.steps=1e30: expected int like 3, got float"),
        ("--config.a.steps=true", r"--config\.a\.steps=true: expected int like 3, got bool"),
        ("--config.a.steps=", r"--config\.a\.steps=: expected int like 3, got nothing"),
        (f"--config.a.steps=1{'0' * 30}", r"larger than 64 bits"),
        ("--config.a.rate=1e999", r"--config\.a\.rate=1e999: not a finite number"),
        ("--config.a.on=1", r"--config\.a\.on=1: expected bool like True, got int; write true or false"),
        ("--config.a.on=yes", r"--config\.a\.on=yes: expected bool like True, got str; write true or false"),
        ("--config.a.sizes=3", r"got int; quote it for the shell, as in --config\.a\.sizes='\(1, 2\)'"),
        ("--config.a.sizes=(1,1.5)", r"expected int everywhere as in \(1, 2\), got 1\.5"),
        ("--config.a.sizes=('a',)", r"expected int everywhere as in \(1, 2\), got 'a'"),
        ("--config.a=1", r"--config\.a is a group of fields \(.*\); set one of them"),
        ("--config.a.rate", r"expected --config\.<field>=<value>; write --config\.a\.rate=VALUE"),
        ("--config.a..rate=2", r"expected --config\.<field>=<value>"),
        ("--config.data.more=2", r"--config\.data\.more is a group of fields \(none yet\); set one of them"),
        ("--config.data.more.x=2", r"config\.data\.more has no field 'x'"),
        ("--config.data.mixtures.mine.source=x", r"config\.data has no field 'mixtures'; did you mean mixture\?"),
        (
            "--config.data.mixture=x",
            r"group of fields \(web\); set one of them, as in --config\.data\.mixture\.web\.source=…",
        ),
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


def test_the_last_override_of_a_field_counts(file):
    """A whole number in an entry that the user adds may become a fraction: its reader knows the type."""
    weights = ["1", "0.5"]
    overrides = ["--config.a.steps=4", "--config.a.steps=5"]
    config = load_config(file, [*overrides, *(f"--config.data.mixture.mine.weight={text}" for text in weights)])
    assert (config.a.steps, config.data.mixture.mine.weight) == (5, 0.5)


WORDS = st.one_of(
    st.text(string.printable, max_size=12),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=2),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=2)
        ),
        max_leaves=4,
    ).map(repr),
)
FIELDS = ("a.rate", "a.steps", "a.on", "a.sizes", "a", "name", "data.mixture", "data.mixture.web.x", "data.mixture.y")


@settings(max_examples=40)
@given(st.sampled_from(FIELDS), WORDS)
@example("a.sizes", "(" * 300)
@example("name", "'\\d'")
@example("data.mixture.web.x", "{1: 2}")
def test_any_override_keeps_the_types_or_is_refused_in_one_line(field, text):
    """By the plain rule: a text is taken as it is, or without its quotes; another value is equal to its literal."""
    config = ConfigDict(
        {
            "a": {"rate": 1.0, "steps": 3, "on": True, "sizes": (1, 2)},
            "name": "x",
            "data": {"mixture": {"web": {"source": ""}}},
        }
    )
    before = config.to_dict()
    try:
        override(config, f"--config.{field}={text}")
    except UserError as error:
        assert str(error).startswith(f"--config.{field}") and len(str(error).splitlines()) == 1
        assert config.to_dict() == before
        return
    again = from_json(to_json(config))
    if field == "name":
        assert config.name in (text, text.strip()[1:-1]) or "'" in text or '"' in text
    elif field.startswith("a."):
        name = field[2:]
        assert type(config.a[name]) is type(before["a"][name])
        assert name != "sizes" or all(type(size) is int for size in config.a.sizes)
        if name != "on":
            value = eval(text, {"__builtins__": {}})
            assert config.a[name] == (tuple(value) if isinstance(value, list) else value)
        assert json.loads(again.to_json())["a"] == json.loads(config.to_json())["a"]
    else:
        assert field == "data.mixture.web.x"
        assert list(again.data.mixture.web) == ["source", "x"]


def test_json_round_trip(file):
    config = load_config(file)
    assert to_json(from_json(to_json(config))) == to_json(config)


def test_a_config_in_a_folder_of_configs(tmp_path):
    """configs/ablations/x.py imports `configs.…` like the files of the parent folder."""
    folder = tmp_path / "configs" / "ablations"
    folder.mkdir(parents=True)
    code = "import sys\nfrom ml_collections import ConfigDict\n"
    (folder / "mine.py").write_text(f"{code}def get_config():\n    return ConfigDict({{'path': list(sys.path)}})\n")
    assert str(tmp_path) in load_config(str(folder / "mine.py")).path


@pytest.mark.parametrize(
    ("code", "variant", "message"),
    [
        ("def get_config():\n    return 1\n", ":mini", "mine.py:mini: the file has no variants; write --config"),
        ("def get_config(size):\n    return 1\n", "", "mine.py: names no variant; write --config .*mine.py:VARIANT"),
        ("def get_config():\n    return {}\n", "", "get_config returned dict; expected an ml_collections.ConfigDict"),
        ("x = 1\n", "", r"the file defines no get_config\(variant\) function"),
        ("def get_config(:\n", "", "mine.py: line 1: invalid syntax; mend the file"),
        ("\nimport gone\n", "", "mine.py: line 2: ModuleNotFoundError: No module named 'gone'; mend the file"),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({}).x\n",
            "",
            "line 3: AttributeError: ",
        ),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, code, variant, message):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError, match=message) as error:
        load_config(f"{tmp_path / 'mine.py'}{variant}")
    assert "\n" not in str(error.value)
