"""The command that runs an exported bundle: `edgewise generate`.

A child process does it, as TVM can end a process; it runs the installed package's runner, not the copy in the bundle.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import click


@click.command("generate")
@click.argument("bundle", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--tokens", type=click.IntRange(min=1), help="Most tokens to generate.  [default: until the context is full]")
@click.option("--temperature", type=click.FloatRange(min=0), help="Sample: above 1 more freely, below 1 less; 0 takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(min=0), help="Sample from this many of the likeliest tokens; 0: from all.")
@click.option(
    "--top-p", type=click.FloatRange(min=0, max=1, min_open=True), help="Sample from the likeliest that make up this probability."
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the draws: the same text each time.")
@click.option("--target", help="A device that is reached by RPC: the model is sent there and runs there.  [default: this machine]")
@click.option("--stats", is_flag=True, help="Print times to stderr at the end.")
def generate_command(
    bundle: Path,
    prompt: str,
    tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    target: str | None,
    stats: bool,
) -> None:
    """Continue PROMPT with the bundle in DIR, from `edgewise export --format tvm`; the text streams to stdout.

    Without --temperature, --top-k, --top-p and --seed the likeliest token is taken each time; with one of them, tokens are drawn.

    \b
    Examples:
      edgewise generate my-bundle "My fellow citizens"
      edgewise generate my-bundle "My fellow citizens" --temperature 0.8 --top-p 0.95 --seed 1
    """
    options = {"--tokens": tokens, "--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--seed": seed}
    given = [f"{name}={value}" for name, value in options.items() if value is not None] + ["--stats"] * stats
    status = _run([f"--folder={bundle}", *given, "--", prompt], target)
    if status < 0:
        name = signal.Signals(-status).name
        raise click.ClickException(f"the model's process was ended by {name}; if {bundle} is of another machine, export it for this one")
    if status:
        raise click.exceptions.Exit(status)


def _run(arguments: list[str], target: str | None) -> int:
    """The runner's exit status; what it prints goes to this process's own stdout and stderr."""
    module = ["nas.bundle_runner"] if target is None else ["nas.remote_runner", target]
    # -P: nothing that lies in the folder a user happens to be in is imported.
    command = [sys.executable, "-P", "-W", "ignore", "-m", *module, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(command, env=environment) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue  # the child has had the signal, too, and ends by itself
