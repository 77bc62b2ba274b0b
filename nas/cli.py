"""The command line: `edgewise`.

Nothing heavy is imported until a command needs it: `--help` and the lists answer at once. Exit status: 0 done, 2 the
user's mistake, 1 anything else; an error is one line on stderr (EDGEWISE_DEBUG=1 shows where it came from).
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import click

from nas.cli_cache import cache_group
from nas.cli_eval import eval_command
from nas.cli_generate import generate_command
from nas.cli_models import count_command, measure_command, spaces_group
from nas.cli_search import front_command, search_command
from nas.cli_targets import targets_group
from nas.cli_train import train_command
from nas.cli_types import ExportFormat

_USERS_ERRNO = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


def _version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked or context.resilient_parsing:
        return
    from nas.run import versions

    click.echo(f"edgewise {versions()['edgewise']}")
    context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit.")
def cli() -> None:
    """Finds the small language model that fits a device.

    Architectures are proposed, compiled and timed on the device, trained for a short while, and those that nothing
    beats in both speed and bits per byte are the result.

    \b
    First steps:
      edgewise search --trials 8              search models for this machine
      edgewise front runs/tiny-local          the result, as a table
      edgewise export runs/tiny-local --trial 3 --to my-model
      edgewise count smollm-135m              what a published model costs
    """


@cli.command()
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
def report(run_path: Path) -> None:
    """Write a run's report.html again and print its path.

    \b
    Example:
      edgewise report runs/tiny-local
    """
    from nas.run import open_run
    from nas.search import rewrite_report

    run = open_run(run_path)
    rewrite_report(run)
    click.echo(str(run.report_path))


@cli.command()
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--trial", type=click.IntRange(min=0), required=True, help="A trial on the front, from `edgewise front RUN`.")
@click.option("--to", type=click.Path(path_type=Path), required=True, metavar="DIR", help="A new or empty folder, or an earlier export.")
@click.option("--format", "format_name", type=ExportFormat(), default="hf", show_default=True, help="What the folder is for; see above.")
@click.option("--target", help="The device that --format tvm compiles for.  [default: the run's]")
def export(run_path: Path, trial: int, to: Path, format_name: str, target: str | None) -> None:
    """Write a trial's trained model and a model card into a folder.

    \b
    Formats:
      hf      for transformers: of a family of its own, or with the Python file that is the model
      tvm     a program for the device, with a runner that needs no PyTorch (`edgewise generate`)
      gguf    for llama.cpp, in the precision that was searched
      recipe  what training the architecture for real needs

    \b
    Examples:
      edgewise export runs/tiny-local --trial 3 --to my-model
      edgewise measure my-model
      edgewise export runs/tiny-local --trial 3 --format gguf --to my-gguf
    """
    from nas.export import export_trial
    from nas.run import open_run

    click.echo(str(export_trial(open_run(run_path), trial, to, format_name, target)))


cli.add_command(search_command)
cli.add_command(front_command)
cli.add_command(measure_command)
cli.add_command(count_command)
cli.add_command(train_command)
cli.add_command(generate_command)
cli.add_command(eval_command)
cli.add_command(targets_group)
cli.add_command(spaces_group)
cli.add_command(cache_group)


# --- the entry point --------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0 done, 2 the user's mistake, 1 anything else."""
    try:
        result = cli.main(args=args, prog_name="edgewise", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx is not None else "", err=True)
        return 2
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        return _failed("interrupted", 1)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "edgewise"
        return _failed(f"{error.format_message().rstrip('.')}; see `{command} --help`", 2)
    except click.ClickException as error:
        return _failed(error.format_message(), 1)
    except Exception as error:
        if os.environ.get("EDGEWISE_DEBUG") == "1":
            raise
        return _failed(*_explained(error))


def _explained(error: Exception) -> tuple[str, int]:
    """One line about an error, and the exit status it means."""
    from nas.errors import UserError
    from search_spaces.config import InvalidConfig
    from search_spaces.space import InvalidSpace
    from targets.spec import InvalidDevice
    from targets.target import TargetError

    if isinstance(error, UserError | InvalidConfig | InvalidSpace | InvalidDevice):
        return str(error), 2
    if isinstance(error, TargetError):
        return str(error), 1
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        text = f"{error.strerror or error}{where}"
        if error.errno in _USERS_ERRNO:
            return f"{text}; give a path that can be read and written", 2
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{text}; make room and run the same command again, nothing finished is lost", 1
        return text, 1
    if type(error).__module__.split(".")[0] in ("optuna", "sqlalchemy", "sqlite3"):
        reason = error.__cause__ or error
        return f"the study cannot be read or written ({_line(reason)}); run the same command again, nothing finished is lost", 1
    return f"{type(error).__name__}: {error}; EDGEWISE_DEBUG=1 shows where it came from", 1


def _failed(message: str, status: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return status


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
