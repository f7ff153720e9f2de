"""Entries name the place of what is wrong; files and folders are found once."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_jax.errors import UserError
from emu_jax.evaluate.formats.files import Entry, Files, check_same, read_json, unique


def _message(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.fixture
def entry(tmp_path):
    fields = {
        "id": 3,
        "flag": True,
        "word": "héllo",
        "broken": "\ud800",
        "answers": [{"answer": "yes"}, {"answer": "no"}, {"answer": 2}],
        "ranks": [1, 2, "3"],
        "score": 0.5,
        "box": [1, 2.5, 10**400],
        "stories": [[{"id": 1}], [{"id": 2}, {}]],
    }
    return Entry(fields, tmp_path / "a.json", "items[7]")


def test_values(entry):
    assert (entry.whole("id"), entry.text("word"), "id" in entry, "other" in entry) == (3, "héllo", True, False)
    assert [item.place for item in entry.entries("answers")] == [f"items[7].answers[{n}]" for n in range(3)]


def test_equal_answers_are_one_object(tmp_path):
    given = json.loads('[{"a": "yellow bus"}, {"a": "grün"}, {"a": "yellow bus"}]')
    first, _, last = Entry({"all": given}, tmp_path).pluck("all", "a")
    assert first is last and first == "yellow bus"


def test_errors_name_the_place(entry):
    where = f"{entry.path}: items[7]"
    assert _message(entry.text, "title") == f"{where} has no title"
    assert _message(entry.text, "id") == f"{where}.id is 3; expected a text"
    assert _message(entry.text, "broken") == f"{where}.broken is '\\ud800'; expected Unicode text"
    assert entry.flag("flag") is True
    assert _message(entry.flag, "id") == f"{where}.id is 3; expected true or false"
    assert _message(entry.whole, "flag") == f"{where}.flag is True; expected a whole number"
    assert _message(entry.entry, "id") == f"{entry.path}: items[7].id is 3; expected a JSON object"
    assert _message(entry.entries, "word") == f"{where}.word is 'h\\xe9llo'; expected a list"
    assert _message(entry.pluck, "answers", "answer") == f"{where}.answers[2].answer is 2; expected a text"
    assert _message(entry.pluck, "ranks", "answer") == f"{where}.ranks[0] is 1; expected a JSON object"
    assert _message(entry.wholes, "ranks") == f"{where}.ranks[2] is '3'; expected a whole number"
    assert _message(entry.shares, "answers") == f"{where}.answers[0] is a JSON object; expected a number from 0 to 1"
    assert _message(Entry, [1, 2], entry.path) == f"{entry.path}: the file is a list of 2; expected a JSON object"


def test_numbers_are_those_that_a_float_holds(entry):
    where = f"{entry.path}: items[7]"
    assert (entry.number("score"), entry.number("id")) == (0.5, 3.0)
    assert _message(entry.number, "flag") == f"{where}.flag is True; expected a number"
    assert _message(entry.numbers, "box").startswith(f"{where}.box[2] is 1000") and "\n" not in _message(
        entry.numbers, "box"
    )
    assert Entry({"box": entry.fields["box"][:2]}, entry.path).numbers("box") == (1.0, 2.5)
    for value in (float("nan"), float("-inf")):
        assert _message(Entry({"x": value}, entry.path).number, "x") == f"{entry.path}: x is {value}; expected a number"


def test_lists_of_one_object(entry):
    stories = entry.wrapped("stories")
    assert next(stories).place == "items[7].stories[0][0]"
    with pytest.raises(UserError, match=r"items\[7\].stories\[1\] is a list of 2; expected a list of one JSON object"):
        next(stories)


def test_unique(tmp_path):
    entries = [Entry({"id": number}, tmp_path / "a.json", f"[{n}]") for n, number in enumerate((5, 6, 5))]
    assert list(unique(entries[:2], lambda entry: entry.whole("id"), "id")) == [5, 6]
    assert _message(unique, entries, lambda entry: entry.whole("id"), "id") == (
        f"{tmp_path}/a.json: [2] has the id 5 again, after [0]; expected each once"
    )


def test_questions_and_answers_must_pair(tmp_path):
    of = (tmp_path / "asked.json", tmp_path / "answered.json")
    check_same({1: None}, {1: None}, "question", of)
    assert _message(check_same, {1: 0, 2: 0, 3: 0}, {1: 0}, "question", of) == (
        f"{of[1]}: has no question 2 (and 1 more), which {of[0]} has; "
        "expected two complete files of one release and split"
    )
    assert _message(check_same, {1: 0}, {1: 0, 2: 0}, "question", of) == (
        f"{of[1]}: has question 2, which {of[0]} lacks; expected two complete files of one release and split"
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"a": 1,\n "b": }', "not JSON at line 2, column 7 (Expecting value)"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"9" * 5000, "not JSON (Exceeds the limit (4300 digits) for integer string conversion"),
        (b"[" * 100_000, "not JSON (nested too deeply)"),
    ],
)
def test_malformed_json(tmp_path, content, why):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    message = _message(read_json, path)
    assert message.startswith(f"{path}: {why}")
    assert message.endswith("; expected the file as it is published, so fetch it again")


def test_ids_that_are_names_stand_once(tmp_path):
    (tmp_path / "a.json").write_text('{"x": {}, "y": {}, "x": {}}')
    files = Files(tmp_path, "expected")
    assert list(files.document("a.json").fields) == ["x", "y"]
    assert "a.json: an object has the name 'x' twice; expected" in _message(
        lambda: files.document("a.json", keyed=True)
    )


def test_a_list_for_an_object(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "object.json").write_text("{}")
    files = Files(tmp_path, "expected")
    assert _message(files.document, "list.json").endswith("list.json: the file is a list of 1; expected a JSON object")
    assert _message(files.records, "object.json").endswith(
        "object.json: the file is a JSON object; expected a JSON array"
    )
    assert _message(files.records, "list.json").endswith("list.json: [0] is 1; expected a JSON object")


def test_json_lines(tmp_path):
    """A text may hold U+2028, which ends a line elsewhere; errors have the file's line."""
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": "x\u2028y"}\r\n\n{"a": 2}\r\n', encoding="utf-8")
    first, second = Files(tmp_path, "expected").lines("a.json")
    assert first.text("a") == "x\u2028y" and first.place == "line 1"
    assert _message(second.text, "a") == f"{path}: line 3.a is 2; expected a text"
    for content, why in (
        ('{"a": 1}\n\n{"a": 1', "not JSON at line 3, column 8 (Expecting ',' delimiter)"),
        ('{"a": 1}\n{} {}\n', "not JSON at line 2, column 4 (Extra data)"),
    ):
        path.write_text(content)
        message = _message(Files(tmp_path, "expected").lines, "a.json")
        assert message == f"{path}: {why}; expected the file as it is published, so fetch it again"
    path.write_text("\n \n")
    message = _message(Files(tmp_path, "expected").lines, "a.json")
    assert message == f"{path}: holds no line; expected the file as it is published, so fetch it again"
    path.write_text("3\n")
    message = _message(Files(tmp_path, "expected").lines, "a.json")
    assert message == f"{path}: line 1 is 3; expected a JSON object"


@settings(max_examples=25)
@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=2), min_size=1, max_size=5))
def test_lines_are_what_json_makes_of_them(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("lines") / "a.json"
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    assert [entry.fields for entry in Files(path.parent, "expected").lines("a.json")] == values


def test_the_first_of_several_places(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    (tmp_path / "b.jpg").touch()
    files = Files(tmp_path, "expected: …")
    assert files.shown("a.jpg", "images/a.jpg") == tmp_path / "images" / "a.jpg"
    assert files.shown("b.jpg", "images/b.jpg") == tmp_path / "b.jpg"
    files.check_shown()
    for name in ("c", "d", "c", "e"):
        files.shown(f"{name}.jpg", f"images/{name}.jpg")
    assert _message(files.check_shown) == f"{tmp_path}: no c.jpg (and 2 more); expected: …"
    assert files.find("x", "b.jpg") == tmp_path / "b.jpg"
    assert _message(files.find, "x", "y") == f"{tmp_path}: no x; expected: …"


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.jpg", "images/../../a.jpg", "a\0.jpg", ""])
def test_names_that_lead_out_of_the_folder(tmp_path, name):
    message = _message(Files(tmp_path, "expected").shown, name)
    assert message == f"{tmp_path}: annotations name the file {name!a}, which leads out of the folder"


def test_names_never_break_the_line(tmp_path):
    (tmp_path / "a.json").write_text('{"x\\ny": 1}')
    files = Files(tmp_path, "expected")
    document = files.document("a.json")
    assert _message(document.entry, "x\ny") == f"{tmp_path}/a.json: x\\ny is 1; expected a JSON object"
    assert _message(document.text, "é\r") == f"{tmp_path}/a.json: the file has no \\xe9\\r"
    files.shown("é.jpg")
    assert _message(files.check_shown) == f"{tmp_path}: no é.jpg; expected"
    files = Files(tmp_path, "expected")
    files.shown("a\nb.jpg")
    assert _message(files.check_shown) == f"{tmp_path}: no a\\nb.jpg; expected"


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    listed = []
    monkeypatch.setattr("os.listdir", lambda path: listed.append(path) or ["a", "b"])
    files = Files(tmp_path, "expected")
    for name in ("f/a", "f/b", "f/a", "g/a"):
        files.shown(name)
    assert listed == [tmp_path / "f", tmp_path / "g"]
