"""A dataset as text to train on, from the Hugging Face Hub or a folder laid out like one, read by the package `datasets`.

It is read as a stream, in its own order, up to a size. No code of a dataset is run: `datasets` has known none since
version 4, and older ones are refused. Text from the Hub is kept, so that a run can be gone on with when the network,
or the dataset, is gone.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.corpus import STREAMED, Text, encodable, expanded, read_documents
from nas.describe import printable
from nas.errors import InvalidCorpus
from targets.files import whole

FORM = f"{STREAMED}NAME[/CONFIG][:SPLIT][:COLUMN]"
"""How a dataset is written."""
_SPLIT, _COLUMN = "train", "text"
_OLDEST = 4
"""Major version of `datasets`: the first that runs no code of a dataset's."""
_FOLDER, _ABOUT = "text", b"edgewise"
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetName:
    """A dataset's text, as a user named it.

    Attributes:
        source: what the user wrote.
        name: NAME or ORGANISATION/NAME on the Hub, or a folder's path.
        config: one of the dataset's configurations; None is the only one, or its default.
        is_folder: whether it is a folder here.
    """

    source: str
    name: str
    config: str | None
    split: str
    column: str
    is_folder: bool

    @property
    def title(self) -> str:
        """What people call it: the name, the configuration, and a split that is not the usual one."""
        name = expanded(self.name).resolve().name if self.is_folder else self.name
        parts = [name, *([self.config] if self.config else [])]
        return "/".join(parts) + (f":{self.split}" if self.split != _SPLIT else "")

    def refusal(self, what: str) -> InvalidCorpus:
        """The error that says how the word was read, and what is wrong with it."""
        kind = "folder" if self.is_folder else "dataset"
        config = f", configuration {self.config!r}" if self.config is not None else ""
        what = printable(what)  # names of a stranger's may be in it
        return InvalidCorpus(f"corpus {self.source!r} ({kind} {self.name!r}{config}, split {self.split!r}, column {self.column!r}) {what}")


def dataset_name(source: str, *, text_field: str = _COLUMN) -> DatasetName:
    """What `hf:NAME[/CONFIG][:SPLIT][:COLUMN]` means.

    NAME may have a slash itself: one slash is that of ORGANISATION/NAME, and a second one is before a configuration. Two
    slashes in a row are before a configuration always, as of a dataset without an organisation (`hf:NAME//CONFIG`) or a
    folder (`hf:./FOLDER//CONFIG`). What begins with `.`, `/` or `~` is a folder.

    Args:
        source: what the user wrote, `hf:` included.
        text_field: the column, if none is named.

    Raises:
        InvalidCorpus: if it is not of that form.
    """
    words = source.removeprefix(STREAMED)
    if "://" in words:
        raise InvalidCorpus(f"corpus {source!r} is an address; give the dataset's name alone, {FORM}")
    if "[" in words:
        raise InvalidCorpus(f"corpus {source!r} asks for a part of a split; name a whole one, and with --corpus-bytes how much is read")
    location, *rest = words.split(":")
    if len(rest) > 2:
        raise InvalidCorpus(f"corpus {source!r} has too many colons; write {FORM}, in which no part has one")
    is_folder = location.startswith((".", "/", "~"))
    name, slashes, config = location.partition("//")
    if not slashes and not is_folder and location.count("/") >= 2:
        organisation, name, config = location.split("/", 2)
        name, slashes = f"{organisation}/{name}", "/"
    found = DatasetName(
        source=source,
        name=name,
        config=config if slashes else None,
        split=(rest[0] if rest else "") or _SPLIT,
        column=(rest[1] if len(rest) > 1 else "") or text_field,
        is_folder=is_folder,
    )
    if not name or (not is_folder and (_NAME.fullmatch(name) is None or ".." in name)):
        raise found.refusal(f"has a name that no dataset can have; write {FORM}, or a folder as {STREAMED}./FOLDER")
    if slashes and (not config or "/" in config):
        raise found.refusal("has a configuration that no dataset can have; write it last, after // or after ORGANISATION/NAME/")
    return found


def read_dataset(source: str, *, text_field: str, most_bytes: int, cache: Path | None, note: Callable[[str], None]) -> Text:
    """The beginning of a dataset, as documents: one a row that has text.

    Args:
        source: see `dataset_name`.
        text_field: the column, if `source` names none.
        most_bytes: of UTF-8, that are taken; the document in which they end is cut there.
        cache: the folder where text from the Hub is kept; a folder's is read anew.
        note: is told what people should know, a line each.

    Raises:
        InvalidCorpus: if the package is missing, the Hub cannot be reached, or there is no such dataset, configuration,
            split or column of text.
    """
    wanted = dataset_name(source, text_field=text_field)
    path = None if cache is None or wanted.is_folder else cache / _FOLDER / _file_name(wanted, most_bytes)
    kept = None if path is None else _kept(path)
    if kept is not None:
        text, is_cut = kept
        note(f"{source} is read from {path}, where it was kept; remove that file to fetch it anew")
    else:
        text, is_cut = _fetched(wanted, most_bytes)
        if path is not None:
            _keep(path, text, is_cut)
    if is_cut:
        note(f"{source} goes on after the first {most_bytes:,} bytes, which are what is used")
    return text


# --- reading ----------------------------------------------------------------------------------


def _fetched(wanted: DatasetName, most_bytes: int) -> tuple[Text, bool]:
    """What is read of a dataset now, and whether it goes on."""
    datasets = _package(wanted)
    where, revision, licence = _folder(wanted) if wanted.is_folder else _on_the_hub(wanted)
    try:
        builder = datasets.load_dataset_builder(where, wanted.config, revision=revision)
    except Exception as error:
        # What is wrong is in the text of the error alone; the names that there are can be asked for.
        raise _without_builder(datasets, wanted, where, revision, error) from error
    splits = [str(name) for name in builder.info.splits or builder.config.data_files or ()]
    if splits and wanted.split not in splits:
        raise wanted.refusal(f"has no split {wanted.split!r}; choose one of {', '.join(splits)}")
    try:
        stream = builder.as_streaming_dataset(split=wanted.split)
        columns = list(stream.column_names or next(iter(stream.take(1)), {}))
        if wanted.column not in columns:
            raise wanted.refusal(
                f"has no column {wanted.column!r}; name the one that holds text last, one of {', '.join(columns) or 'none'}"
            )
        documents, is_cut = _taken(wanted, stream.select_columns([wanted.column]), most_bytes)
    except InvalidCorpus:
        raise
    except Exception as error:  # of the network, of any format of files, of what a file holds
        raise wanted.refusal(f"cannot be read ({_reason(error)}); try again, or give another dataset") from error
    if not documents:
        raise wanted.refusal("has no text; choose another split or column")
    name = wanted.title if revision is None else f"{wanted.title}@{revision[:12]}"
    return Text(name=name, licence=licence, documents=documents), is_cut


def _taken(wanted: DatasetName, stream: Any, most_bytes: int) -> tuple[list[str], bool]:
    """The documents of a stream up to a size, and whether it goes on."""
    documents: list[str] = []
    left = most_bytes
    rows: Iterator[dict[str, Any]] = iter(stream)
    with contextlib.closing(rows):  # type: ignore[type-var]  # a generator, whose threads are to end here
        for number, row in enumerate(rows, start=1):
            value = row[wanted.column]
            if value is None:
                continue
            if not isinstance(value, str):
                raise wanted.refusal(f"has no text in row {number} but {type(value).__name__}; choose a column of strings")
            if not value.strip():
                continue
            data = encodable(value, f"{wanted.source} row {number}").encode()
            if len(data) > left:
                beginning = data[:left].decode(errors="ignore")  # half a character goes
                return [*documents, *([beginning] if beginning.strip() else [])], True
            documents.append(value)
            left -= len(data)
    return documents, False


def _package(wanted: DatasetName) -> Any:
    """The package that reads datasets."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("datasets")
    except PackageNotFoundError:
        raise InvalidCorpus(
            f"corpus {wanted.source!r} needs the package datasets, which is not installed; run `pip install 'edgewise[datasets]'`"
        ) from None
    if int(found.partition(".")[0]) < _OLDEST:
        raise InvalidCorpus(
            f"corpus {wanted.source!r} needs datasets {_OLDEST} or later, which runs no code of a dataset's, and {found} is installed; "
            "run `pip install -U datasets`"
        )
    import datasets

    return datasets


def _folder(wanted: DatasetName) -> tuple[str, None, str]:
    """A folder's path, without a revision or a known licence."""
    path = expanded(wanted.name)
    if not path.is_dir():
        what = "is a file, not a folder; give it without hf:" if path.is_file() else "does not exist; give a folder"
        raise wanted.refusal(what)
    return str(path.resolve()), None, "unknown"


def _on_the_hub(wanted: DatasetName) -> tuple[str, str, str]:
    """A dataset's full name on the Hub, its revision of now, and its licence."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = HfApi().dataset_info(wanted.name, timeout=30)
    except GatedRepoError as error:
        raise wanted.refusal("is given to those who accept its terms; do so on its page, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        parted = wanted.name.partition("/")
        hint = f"; with {parted[2]!r} as configuration of {parted[0]!r} write {STREAMED}{parted[0]}//{parted[2]}" if parted[2] else ""
        raise wanted.refusal(f"is not on the Hugging Face Hub, or is private; correct the name, or run `hf auth login`{hint}") from error
    except Exception as error:
        raise wanted.refusal(f"cannot be fetched from the Hugging Face Hub ({_reason(error)}); get a network, or give files") from error
    if Path(info.id).exists():  # `datasets` would take it for the dataset
        raise wanted.refusal(
            f"cannot be read where {info.id!r} is a folder here; go elsewhere, or write {STREAMED}./{info.id} for the folder"
        )
    licence = getattr(info.card_data, "license", None)
    licences = [licence] if isinstance(licence, str) else licence or ["unknown"]
    return info.id, str(info.sha), ", ".join(map(str, licences))


def _without_builder(datasets: Any, wanted: DatasetName, where: str, revision: str | None, error: Exception) -> InvalidCorpus:
    """What is wrong with a configuration, else with the dataset."""
    configs: Sequence[str] = ()
    if isinstance(error, ValueError):
        with contextlib.suppress(Exception):  # the first error is the one to tell
            configs = datasets.get_dataset_config_names(where, revision=revision)
    if len(configs) > 1 and wanted.config is None:
        return wanted.refusal(f"has several configurations; choose one of {_some(configs)}, as in {_with_config(wanted, configs[0])}")
    if configs and wanted.config is not None and wanted.config not in configs:
        if list(configs) == ["default"]:
            return wanted.refusal(f"has no configurations; leave out {wanted.config!r}")
        return wanted.refusal(f"has no configuration {wanted.config!r}; choose one of {_some(configs)}")
    return wanted.refusal(f"cannot be read ({_reason(error)}); give another dataset, or its files")


def _with_config(wanted: DatasetName, config: str) -> str:
    return f"{STREAMED}{wanted.name}{'/' if '/' in wanted.name and not wanted.is_folder else '//'}{config}"


def _some(names: Sequence[str]) -> str:
    most = 20
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _reason(error: Exception) -> str:
    """The first line of what went wrong, with its kind: alone it is often a name."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__


# --- keeping ----------------------------------------------------------------------------------


def _file_name(wanted: DatasetName, most_bytes: int) -> str:
    key = json.dumps([wanted.name, wanted.config, wanted.split, wanted.column, most_bytes])
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', wanted.title).strip('.-')[:100]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.parquet"


def kept_files(cache: Path) -> list[Path]:
    """The files in which text from the Hub is kept, in a cache folder."""
    return sorted((cache / _FOLDER).glob("*.parquet"))


def _keep(path: Path, text: Text, is_cut: bool) -> None:
    """Writes text as a Parquet file, which is a corpus itself."""
    import pyarrow as pa
    from pyarrow import parquet

    about = json.dumps({"name": text.name, "licence": text.licence, "cut": is_cut}).encode()
    table = pa.table({_COLUMN: pa.array(text.documents, pa.large_string())}).replace_schema_metadata({_ABOUT: about})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        parquet.write_table(table, part, compression="zstd")


def _kept(path: Path) -> tuple[Text, bool] | None:
    """What was kept, and whether the dataset goes on; None if nothing was, or it is damaged."""
    import pyarrow as pa
    from pyarrow import parquet

    if not path.exists():
        return None
    try:
        about = json.loads((parquet.read_schema(path).metadata or {})[_ABOUT])
        return Text(name=about["name"], licence=about["licence"], documents=read_documents(path, _COLUMN)), about["cut"]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):  # InvalidCorpus is a ValueError
        return None
