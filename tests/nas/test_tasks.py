"""Task files: what each line becomes, and what is refused in one line that has its number."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nas.errors import InvalidCorpus, InvalidTasks
from nas.tasks import Item, load_tasks

PAIR = {"good": "The dogs bark.", "bad": "The dogs barks."}
CLOZE = {"context": "It was a dark and stormy", "target": "night"}
CHOICE = {"context": "Snow is", "choices": ["white", "green"], "answer": 1}


def written(folder: Path, *rows: Any, name: str = "tasks.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- what is read -----------------------------------------------------------------------------


def test_every_kind_is_told_by_its_fields(tmp_path: Path) -> None:
    pairs = load_tasks(written(tmp_path, PAIR, "\n", {**PAIR, "bad": "x", "group": "agreement"}))
    assert (pairs.name, pairs.kind, len(pairs), pairs.documents) == ("tasks", "pairs", 2, ())
    assert pairs.items[0] == Item(context="", options=("The dogs bark.", "The dogs barks."))
    assert pairs.items[1].group == "agreement"
    cloze = load_tasks(str(written(tmp_path, CLOZE)))
    assert (cloze.kind, cloze.items) == ("cloze", (Item(context=CLOZE["context"], options=("night",)),))
    choice = load_tasks(written(tmp_path, {**CHOICE, "delimiter": ""}))
    assert choice.items == (Item(context="Snow is", options=("white", "green"), answer=1, delimiter=""),)


@pytest.mark.parametrize(
    ("context", "option", "delimiter", "joined"),
    [
        ("Snow is", "white", None, "Snow is white"),
        ("Snow is ", "white", None, "Snow is white"),
        ("Snow is", " white", None, "Snow is white"),
        ("Snow is", "\nwhite", None, "Snow is\nwhite"),
        ("Snow is", "white", "", "Snow iswhite"),
        ("Snow is ", " white", ": ", "Snow is :  white"),
        ("", "white", None, "white"),
        ("", "white", "-", "white"),
    ],
)
def test_what_follows_is_joined_by_a_space_where_there_is_none(context: str, option: str, delimiter: str | None, joined: str) -> None:
    item = Item(context=context, options=(option, "x"), delimiter=delimiter)
    assert context + item.continuation(0) == joined


def test_text_is_read_as_documents_that_stay_whole(tmp_path: Path) -> None:
    long = "A line of a longer text.\n\n" * 2000
    (tmp_path / "notes.txt").write_text(long)
    alone = load_tasks(tmp_path / "notes.txt")
    assert (alone.name, alone.kind, alone.documents, alone.items) == ("notes", "text", (long,), ())
    written(tmp_path, {"text": "one", "label": 3}, {"text": " "}, {"text": "two", "target": "x"}, name="more.jsonl")
    assert load_tasks(tmp_path / "more.jsonl").documents == ("one", "two")
    assert load_tasks(tmp_path).documents == ("one", "two", long)
    assert load_tasks(written(tmp_path, {"body": "three"}), text_field="body").documents == ("three",)


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    one = load_tasks(written(tmp_path, CHOICE, CHOICE | {"answer": 0}))
    swapped = json.dumps(dict(reversed(CHOICE.items())))
    again = load_tasks(written(tmp_path, swapped + "\r\n", CHOICE | {"answer": 0}, name="again.jsonl"))
    assert (one.sha256, one.items) == (again.sha256, again.items)
    assert len({one.sha256, one.first(1).sha256, load_tasks(written(tmp_path, CHOICE, CHOICE)).sha256}) == 3
    assert one.first(9) == one
    with pytest.raises(InvalidTasks, match="limit=0 is below 1"):
        one.first(0)


def test_the_lines_that_the_page_shows_are_tasks(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "eval.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```jsonl\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert [load_tasks(written(tmp_path, text)).kind for text in shown] == ["pairs", "cloze", "choice"]


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"good": "a"}, r":2 lacks the field 'bad'; give \{\"good\": \"…\", \"bad\": \"…\"\}$"),
        ({**PAIR, "UID": "x"}, r":2 has the unknown field \"UID\"; here it is called 'group'$"),
        ({**PAIR, "note": "x"}, r":2 has the unknown field \"note\"; remove it; docs/eval.md"),
        ({**PAIR, "delimiter": ""}, ':2 has the unknown field "delimiter"'),
        ({"sentence_good": "a", "sentence_bad": "b"}, ":2 has the unknown field \"sentence_good\"; here it is called 'good'"),
        (CLOZE, ":2 asks for cloze and the lines before it for pairs; give each kind a file of its own"),
        ({**PAIR, "target": "x"}, ":2 has both 'bad' and 'target', which no kind of task has together"),
        ({"good": "a", "bad": "a"}, r":2 has the right answer \"a\" twice"),
        ({"good": "a", "bad": ""}, ":2: bad is empty; give a text"),
        ({"good": "a", "bad": 3}, ":2: bad=3 is not a text; give one in quotes"),
        ({**PAIR, "group": ""}, ":2: group is empty"),
        ({}, ":2 has no field, which is no task; give"),
        ({"weight": 1}, r':2 has \["weight"\], which is no task; give'),
        (["good"], r":2 is not a JSON object; give one a line, such as \{"),
    ],
)
def test_a_line_that_breaks_a_rule_is_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidTasks, match=message) as error:
        load_tasks(written(tmp_path, PAIR, row))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": ["a"]}, r':1: choices=\["a"\] is not a list of two or more texts'),
        ({"choices": "ab"}, ':1: choices="ab" is not a list'),
        ({"choices": ["a", None]}, r":1: choices\[1\]=null is not a text"),
        ({"choices": ["a", "b", "b"]}, ':1 has the right answer "b" twice'),
        ({"answer": 2}, ":1: answer=2 is not the number of a choice; give one from 0 to 1"),
        ({"answer": -1}, ":1: answer=-1 is not"),
        ({"answer": True}, ":1: answer=true is not"),
        ({"answer": "A"}, ':1: answer="A" is not'),
        ({"question": "x"}, ":1 has the unknown field \"question\"; here it is called 'context'"),
        ({"delimiter": None}, ":1: delimiter=null is not a text"),
        ({"x" * 500: 1}, r":1 has the unknown field \"x+…; remove it"),
    ],
)
def test_a_choice_that_breaks_a_rule_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidTasks, match=message) as error:
        load_tasks(written(tmp_path, {**CHOICE, **changes}))
    assert len(str(error.value)) < 400


def test_what_is_no_task_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidTasks, match=r"missing.jsonl' does not exist; give a .jsonl file of tasks, or a text"):
        load_tasks(tmp_path / "missing.jsonl")
    for empty in ("", "\n\n"):
        with pytest.raises(InvalidTasks, match=r"tasks.jsonl' is empty; give a file with tasks or text"):
            load_tasks(written(tmp_path, empty))
    with pytest.raises(InvalidCorpus, match=r"tasks.jsonl:1 is not JSON"):
        load_tasks(written(tmp_path, "{good: 1}\n"))
    with pytest.raises(InvalidCorpus, match=r"tasks.jsonl:1 is not JSON"):
        load_tasks(written(tmp_path, "[" * 100_000 + "\n"))
    with pytest.raises(InvalidCorpus, match=r"tasks.jsonl:1 has half a surrogate pair"):
        load_tasks(written(tmp_path, '{"good": "\\ud800", "bad": "x"}\n'))
    with pytest.raises(InvalidCorpus, match=r"unknown suffix '.csv'"):
        load_tasks(written(tmp_path, "a,b\n", name="tasks.csv"))
