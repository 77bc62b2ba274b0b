"""Datasets by name: how a name is read, and what comes of it, from a folder and from a Hub on this machine."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hub_server import LICENCE, SHA, hub
from pyarrow import parquet

from nas.corpus import load_corpus
from nas.corpus_hub import dataset_name
from nas.errors import InvalidCorpus

ROOT = Path(__file__).resolve().parent.parent.parent
NAME = "someone/letters"


def letters(config: str, split: str, count: int = 60) -> list[str]:
    return [f"{config} {split} {i}: " + " ".join(f"é{i * j % 97}" for j in range(200)) + "\n" for i in range(count)]


@pytest.mark.parametrize(
    ("words", "name", "config", "split", "column", "is_folder"),
    [
        ("imdb", "imdb", None, "train", "body", False),
        ("org/name", "org/name", None, "train", "body", False),
        ("org/name/20220301.en", "org/name", "20220301.en", "train", "body", False),
        ("org/name//default", "org/name", "default", "train", "body", False),
        ("imdb//plain_text", "imdb", "plain_text", "train", "body", False),
        ("org/name:test", "org/name", None, "test", "body", False),
        ("org/name/en:test:text", "org/name", "en", "test", "text", False),
        ("org/name::text", "org/name", None, "train", "text", False),
        ("org/name:", "org/name", None, "train", "body", False),
        ("./a/b/c", "./a/b/c", None, "train", "body", True),
        ("../a//en:test", "../a", "en", "test", "body", True),
        ("~/a", "~/a", None, "train", "body", True),
        ("/a/b//en::text", "/a/b", "en", "train", "text", True),
        (".", ".", None, "train", "body", True),
    ],
)
def test_a_name_is_read_in_one_way(words: str, name: str, config: str | None, split: str, column: str, is_folder: bool) -> None:
    read = dataset_name(f"hf:{words}", text_field="body")
    assert (read.name, read.config, read.split, read.column, read.is_folder) == (name, config, split, column, is_folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "has a name that no dataset can have; write hf:NAME[/CONFIG][:SPLIT][:COLUMN]"),
        ("a b", "(dataset 'a b', split 'train', column 'text') has a name that no dataset can have"),
        ("org/..", "has a name that no dataset can have"),
        ("//en", "has a name that no dataset can have"),
        ("org/name/", "configuration ''"),
        ("org/name/en/gb", "(dataset 'org/name', configuration 'en/gb', split 'train', column 'text') has a configuration that no"),
        ("org/name//", "configuration ''"),
        ("org/name:train[:10%]", "asks for a part of a split"),
        ("a:b:c:d", "has too many colons"),
        ("https://huggingface.co/datasets/org/name", "is an address; give the dataset's name alone"),
    ],
)
def test_a_word_that_is_no_name(words: str, message: str) -> None:
    with pytest.raises(InvalidCorpus) as caught:
        dataset_name(f"hf:{words}")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_package_is_named_where_it_is_missing_or_runs_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found(version: str | None) -> None:
        def answer(package: str) -> str:
            if version is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return version

        monkeypatch.setattr(importlib.metadata, "version", answer)

    found(None)
    with pytest.raises(
        InvalidCorpus, match=r"needs the package datasets, which is not installed; run `pip install 'edgewise\[datasets\]'`"
    ):
        load_corpus(f"hf:{tmp_path}")
    found("3.6.0")
    with pytest.raises(InvalidCorpus, match=r"needs datasets 4 or later, which runs no code of a dataset's, and 3\.6\.0 is installed"):
        load_corpus(f"hf:{tmp_path}")


def test_a_size_is_of_a_dataset_alone() -> None:
    with pytest.raises(InvalidCorpus, match=r"'sotu' is read whole, --corpus-bytes is of a dataset \(hf:NAME\); leave it out"):
        load_corpus("sotu", most_bytes=1000)


# --- with the package -------------------------------------------------------------------------

_READ = """
import json, sys
from pathlib import Path
from nas.corpus import load_corpus

for line in sys.stdin:
    asked = json.loads(line)
    cache, notes = asked.pop("cache"), []
    try:
        corpus = load_corpus(**asked, cache=cache and Path(cache), note=notes.append)
        told = {"name": corpus.name, "licence": corpus.licence, "sha256": corpus.sha256, "train": corpus.train}
        told["held_out"] = corpus.validation
    except ValueError as error:
        told = {"error": str(error)}
    print(json.dumps({**told, "notes": notes}), flush=True)
"""
"""A process of its own: where the Hub is, is read when its client is imported."""


class Reader:
    """Loads corpora in another process, in a folder, with that folder's cache of the Hub."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hub-cache")}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _READ],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def load(self, source: str, **options: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"source": source, "cache": str(self.folder / "cache"), **options}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def refusal(self, source: str, **options: Any) -> str:
        message = str(self.load(source, **options)["error"])
        assert "\n" not in message
        return message


def write_dataset(folder: Path) -> None:
    """Two configurations in Parquet; one has rows without text, in groups that are read one after another."""
    folder.mkdir()
    texts: list[str | None] = [*letters("en", "train"), None, " \n"]
    for name, rows in {"train": texts, "test": letters("en", "test"), "de": letters("de", "train")}.items():
        parquet.write_table(pa.table({"id": list(range(len(rows))), "text": rows}), folder / f"{name}.parquet", row_group_size=10)
    parts = {"en": {"train": "train.parquet", "test": "test.parquet"}, "de": {"train": "de.parquet"}}
    lines = ["---", "configs:"]
    for config, splits in parts.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [line for split, path in splits.items() for line in (f"  - split: {split}", f"    path: {path}")]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def test_datasets_of_a_hub_and_of_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is an extra")
    write_dataset(tmp_path / "data")
    with hub(tmp_path / "data", NAME) as endpoint:
        reader = Reader(tmp_path, endpoint)
        first = a_dataset_on_the_hub(reader)
        names_that_there_are_not(reader)
        a_folder_here(reader)
    text_is_kept_when_the_hub_is_gone(reader, first)
    reader.process.communicate(timeout=60)
    assert reader.process.returncode == 0  # no thread of a stream outlives what was read of it


def a_dataset_on_the_hub(reader: Reader) -> Any:
    whole = reader.load(f"hf:{NAME}/en")
    assert sorted((*whole["train"], *whole["held_out"])) == sorted(letters("en", "train"))
    assert whole["notes"] == []
    assert (whole["name"], whole["licence"]) == (f"{NAME}/en@{SHA[:12]}", LICENCE)

    size = 40_001
    part = reader.load(f"hf:{NAME}/en", most_bytes=size)
    taken = "".join(letters("en", "train")).encode()[:size].decode(errors="ignore")
    assert part["notes"] == [f"hf:{NAME}/en goes on after the first {size:,} bytes, which are what is used"]
    assert sum(map(len, (*part["train"], *part["held_out"]))) == len(taken)
    assert all(d in taken for d in (*part["train"], *part["held_out"]))

    apart = reader.load(f"hf:{NAME}/en", held_out=f"hf:{NAME}/en:test")
    assert apart["train"] == letters("en", "train")
    assert apart["held_out"] == letters("en", "test")
    return whole


def names_that_there_are_not(reader: Reader) -> None:
    read = f"corpus 'hf:{NAME}' (dataset '{NAME}', split 'train', column 'text')"
    assert reader.refusal(f"hf:{NAME}") == f"{read} has several configurations; choose one of en, de, as in hf:{NAME}/en"
    assert "has no configuration 'fr'; choose one of en, de" in reader.refusal(f"hf:{NAME}/fr")
    assert "has no split 'dev'; choose one of train, test" in reader.refusal(f"hf:{NAME}/en:dev")
    assert "has no column 'body'; name the one that holds text last, one of id, text" in reader.refusal(f"hf:{NAME}/en::body")
    assert "has no column 'body'" in reader.refusal(f"hf:{NAME}/de", text_field="body")
    assert "has no text in row 1 but int; choose a column of strings" in reader.refusal(f"hf:{NAME}/de::id")
    missing = reader.refusal("hf:someone/de")
    assert "(dataset 'someone/de', split" in missing and "is not on the Hugging Face Hub, or is private" in missing
    assert missing.endswith("with 'de' as configuration of 'someone' write hf:someone//de")
    (reader.folder / "someone" / "letters").mkdir(parents=True)
    assert f"where '{NAME}' is a folder here; go elsewhere, or write hf:./{NAME} for the folder" in reader.refusal(f"hf:{NAME}/de")
    (reader.folder / "someone" / "letters").rmdir()


def a_folder_here(reader: Reader) -> None:
    here = reader.load("hf:./data//de")
    assert sorted((*here["train"], *here["held_out"])) == sorted(letters("de", "train"))
    assert (here["name"], here["licence"]) == ("data/de", "unknown")
    assert here["sha256"] == reader.load(f"hf:{NAME}/de")["sha256"] == reader.load(f"hf:{reader.folder}/data//de")["sha256"]
    assert "(folder './data', split 'train', column 'text') has several configurations; choose one of en, de, as in hf:./data//en" in (
        reader.refusal("hf:./data")
    )
    rows = reader.folder / "rows"
    rows.mkdir()
    (rows / "part.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in letters("de", "train")), encoding="utf-8")
    assert reader.load("hf:./rows::body")["sha256"] == here["sha256"]
    assert "has no configurations; leave out 'en'" in reader.refusal("hf:./rows//en")
    assert "does not exist; give a folder" in reader.refusal("hf:./nowhere")
    assert "is a file, not a folder; give it without hf:" in reader.refusal("hf:./data/README.md")
    script = reader.folder / "script"
    script.mkdir()
    (script / "script.py").write_text(f"open({str(reader.folder / 'was-run')!r}, 'w')")
    assert "cannot be read (RuntimeError: " in reader.refusal("hf:./script")
    assert not (reader.folder / "was-run").exists()


def text_is_kept_when_the_hub_is_gone(reader: Reader, first: Any) -> None:
    again = reader.load(f"hf:{NAME}/en")
    kept = [path for path in (reader.folder / "cache" / "text").iterdir() if path.name.startswith("someone-letters-en-")]
    (note,) = again.pop("notes")
    assert {**again, "notes": []} == first
    assert any(str(path) in note for path in kept)
    assert all(load_corpus(str(path)).train_bytes for path in kept if "test" not in path.name)  # a corpus like any other
    message = reader.refusal(f"hf:{NAME}/en", most_bytes=50_000)  # was never asked for
    assert "cannot be fetched from the Hugging Face Hub (" in message and message.endswith("get a network, or give files")
    for path in kept:
        path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be fetched" in reader.refusal(f"hf:{NAME}/en")  # damaged is not kept
    assert "cannot be fetched" in reader.refusal(f"hf:{NAME}/de", cache=None)
