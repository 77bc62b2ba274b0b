"""What a model is asked to show: texts to predict, or tasks with a right answer, read from the user's own files.

A task is one JSON object a line of a .jsonl file. Its fields say of which kind it is, and a file holds one kind:

| kind | fields | asked |
|---|---|---|
| pairs | `good`, `bad` | which of two texts is likelier |
| cloze | `context`, `target` | does the context go on with the target |
| choice | `context`, `choices`, `answer` | which choice is the likeliest to follow; `answer` is its number, from 0 |

Every kind may have a `group`, a label to break results down by. What follows a context is joined to it by `delimiter`, one
space unless it is given; none is added where the context ends, or what follows begins, with white space, or where the
context is empty.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nas.corpus import encodable, expanded, json_rows, read_documents
from nas.errors import InvalidTasks

Kind = Literal["text", "pairs", "cloze", "choice"]
"""What a file asks."""

_FIELDS: Mapping[Kind, tuple[str, ...]] = {
    "pairs": ("good", "bad"),
    "cloze": ("context", "target"),
    "choice": ("context", "choices", "answer"),
}
"""What each kind must have."""
_OPTIONAL: Mapping[Kind, tuple[str, ...]] = {
    "pairs": ("group",),
    "cloze": ("delimiter", "group"),
    "choice": ("delimiter", "group"),
}
_MARKS: Mapping[str, Kind] = {"good": "pairs", "bad": "pairs", "target": "cloze", "choices": "choice", "answer": "choice"}
"""Fields that one kind alone has."""
_OTHER_NAMES = {
    **{"sentence_good": "good", "sentence_bad": "bad", "category": "group", "UID": "group", "activity_label": "group"},
    **{"question": "context", "ctx": "context", "prompt": "context", "endings": "choices", "options": "choices"},
    **{"label": "answer", "gold": "answer", "answerKey": "answer"},
}
"""What published files call a field, for the error that refuses it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One task: a context and what may follow it.

    Attributes:
        context: may be empty; both texts of a pair follow nothing.
        options: the two texts of a pair (the good one first), the choices, or the target of a cloze alone.
        answer: the place of the right option.
        delimiter: between the context and an option; None is one space, where neither has white space there.
        group: a label, if the file has one.
    """

    context: str
    options: tuple[str, ...]
    answer: int = 0
    delimiter: str | None = None
    group: str | None = None

    def continuation(self, option: int) -> str:
        """What is joined to the context: the delimiter and that option."""
        text = self.options[option]
        if not self.context or self.delimiter is not None:
            return (self.delimiter or "") + text if self.context else text
        return text if self.context[-1].isspace() or text[:1].isspace() else " " + text


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSet:
    """What one file asks: texts, or items of one kind.

    Attributes:
        name: of the file or folder, without its suffix.
        kind: "text" has `documents`, every other kind `items`.
        sha256: of the content: equal for the same items or documents under another path, with other line ends or key order.
    """

    name: str
    kind: Kind
    documents: tuple[str, ...] = field(default=(), repr=False)
    items: tuple[Item, ...] = field(default=(), repr=False)
    sha256: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        assert bool(self.documents) != bool(self.items) and bool(self.documents) == (self.kind == "text")
        content = [[i.context, i.options, i.answer, i.delimiter, i.group] for i in self.items] or self.documents
        digest = hashlib.sha256(json.dumps([self.kind, content]).encode())
        object.__setattr__(self, "sha256", digest.hexdigest())

    def __len__(self) -> int:
        """How many items or documents there are."""
        return len(self.items or self.documents)

    def first(self, count: int) -> "TaskSet":
        """The first items or documents alone; all of them if there are fewer.

        Raises:
            InvalidTasks: if `count` is below 1.
        """
        if count < 1:
            raise InvalidTasks(f"limit={count} is below 1; give a positive number of items")
        return TaskSet(name=self.name, kind=self.kind, documents=self.documents[:count], items=self.items[:count])


def load_tasks(path: str | Path, *, text_field: str = "text") -> TaskSet:
    """What a file asks of a model.

    Args:
        path: a .jsonl file of tasks; or text, as documents that stay whole: a .txt or .md file (one document), a .jsonl
            file with one in each line's `text_field`, a .parquet file, or a folder of these.
        text_field: the JSON field or Parquet column that holds text.

    Raises:
        InvalidTasks: if there is nothing in it, or a line breaks a rule; the message has its number.
        InvalidCorpus: if it cannot be read.
    """
    source = expanded(path)
    if not str(path).strip() or not source.exists():
        raise InvalidTasks(f"{str(path)!r} does not exist; give a .jsonl file of tasks, or a text: .txt, .md, .jsonl, .parquet or a folder")
    name = source.resolve().stem
    if source.suffix.lower() == ".jsonl" and source.is_file():
        rows = list(json_rows(source))
        if rows and not _is_text(rows[0][1], text_field):
            kind = _kind(*rows[0], text_field)
            return TaskSet(name=name, kind=kind, items=tuple(_item(where, row, kind, text_field) for where, row in rows))
    documents = tuple(d for d in read_documents(source, text_field) if d.strip())
    if not documents:
        raise InvalidTasks(f"{str(path)!r} is empty; give a file with tasks or text")
    return TaskSet(name=name, kind="text", documents=documents)


# --- one line ---------------------------------------------------------------------------------


def _is_text(row: Any, text_field: str) -> bool:
    """Other fields beside a text are passed over, as in a corpus, unless they make a task."""
    return isinstance(row, dict) and text_field in row and not any(row.keys() >= set(fields) for fields in _FIELDS.values())


def _kind(where: str, row: Any, text_field: str) -> Kind:
    """What the fields of a line ask.

    Raises:
        InvalidTasks: if no kind has them, or two.
    """
    if not isinstance(row, dict):
        raise InvalidTasks(f"{where} is not a JSON object; give one a line, such as {_EXAMPLES['pairs']}")
    kinds = {_MARKS[name]: name for name in row if name in _MARKS}
    if len(kinds) == 1:
        return next(iter(kinds))
    if kinds:
        first, second = list(kinds.values())[:2]
        raise InvalidTasks(f"{where} has both {first!r} and {second!r}, which no kind of task has together; give one kind a line")
    for name in row:
        if name in _OTHER_NAMES:
            raise InvalidTasks(_unknown(where, name))
    known = _shown(list(row)) if row else "no field"
    raise InvalidTasks(f"{where} has {known}, which is no task; give {', or '.join(_EXAMPLES.values())}, or a text in {text_field!r}")


_EXAMPLES: Mapping[Kind, str] = {
    "pairs": '{"good": "…", "bad": "…"}',
    "cloze": '{"context": "…", "target": "…"}',
    "choice": '{"context": "…", "choices": ["…", "…"], "answer": 0}',
}


def _unknown(where: str, name: str) -> str:
    known = _OTHER_NAMES.get(name)
    hint = f"here it is called {known!r}" if known else "remove it; docs/eval.md has those that are known"
    return f"{where} has the unknown field {_shown(name)}; {hint}"


def _item(where: str, row: Any, kind: Kind, text_field: str) -> Item:
    """One line as an item.

    Raises:
        InvalidTasks: if it is of another kind, or a field is unknown, missing or of another type.
    """
    found = _kind(where, row, text_field)
    if found != kind:
        raise InvalidTasks(f"{where} asks for {found} and the lines before it for {kind}; give each kind a file of its own")
    for name in row:
        if name not in _FIELDS[kind] and name not in _OPTIONAL[kind]:
            raise InvalidTasks(_unknown(where, name))
    for name in _FIELDS[kind]:
        if name not in row:
            raise InvalidTasks(f"{where} lacks the field {name!r}; give {_EXAMPLES[kind]}")
    options = _options(where, row, kind)
    answer = _answer(where, row, len(options)) if kind == "choice" else 0
    if options.count(options[answer]) > 1:
        raise InvalidTasks(f"{where} has the right answer {_shown(options[answer])} twice; make them different, or remove the line")
    return Item(
        context=_text(where, "context", row.get("context", ""), empty=True),
        options=options,
        answer=answer,
        delimiter=_text(where, "delimiter", row["delimiter"], empty=True) if "delimiter" in row else None,
        group=_text(where, "group", row["group"]) if "group" in row else None,
    )


def _options(where: str, row: Mapping[str, Any], kind: Kind) -> tuple[str, ...]:
    if kind != "choice":
        return tuple(_text(where, name, row[name]) for name in _FIELDS[kind] if name != "context")
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise InvalidTasks(f"{where}: choices={_shown(choices)} is not a list of two or more texts; give them in brackets")
    return tuple(_text(where, f"choices[{i}]", text) for i, text in enumerate(choices))


def _text(where: str, name: str, value: object, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise InvalidTasks(f"{where}: {name}={_shown(value)} is not a text; give one in quotes")
    if not value and not empty:
        raise InvalidTasks(f"{where}: {name} is empty; give a text")
    return encodable(value, where)


def _answer(where: str, row: Mapping[str, Any], choices: int) -> int:
    value = row["answer"]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < choices:
        raise InvalidTasks(f"{where}: answer={_shown(value)} is not the number of a choice; give one from 0 to {choices - 1}")
    return value


def _shown(value: object) -> str:
    """A value as JSON, short enough for one line."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "…"
