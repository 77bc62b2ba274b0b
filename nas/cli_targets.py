"""The commands about devices: `edgewise targets`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from nas.cli_show import cache_dir, table, words
from nas.cli_types import Duration, Size
from targets.spec import Backend, Dot, Linker

if TYPE_CHECKING:
    from nas.check import CheckStep
    from targets.spec import DeviceSpec

_MARKS = {"ok": "✓", "warning": "!", "failed": "✗"}
_RPC_PORT, _TRACKER_PORT = 9090, 9190
"""What TVM's server and tracker listen on unless they are told otherwise."""


@click.group("targets")
def targets_group() -> None:
    """See, describe and check the devices that models can be measured on."""


@targets_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def targets_list(as_json: bool) -> None:
    """List the devices by name: those that ship, your own, and one for each installed plug-in.

    The state says what was tried: "run" on such a device, "cross-compiled" only, or "described" and no more.

    \b
    Example:
      edgewise targets list --json
    """
    from targets.spec import InvalidDevice, device_origins, load_spec

    rows: list[dict[str, Any]] = []
    for name, origin in device_origins().items():
        try:
            spec = load_spec(name)
        except InvalidDevice as error:  # one bad file hides no other
            rows.append({"name": name, "origin": origin, "kind": "", "state": "malformed", "description": str(error)})
            continue
        about = {"kind": spec.kind, "state": spec.state, "description": spec.description or f"{spec.kind} {spec.host}".strip()}
        rows.append({"name": name, "origin": origin, **about})
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    widths = {key: max(len(row[key]) for row in rows) for key in ("name", "kind", "state", "origin")}
    for row in rows:
        click.echo("  ".join([*(row[key].ljust(width) for key, width in widths.items()), row["description"]]).rstrip())


@targets_group.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def targets_show(name: str, as_json: bool) -> None:
    """Show what is known of a device, by NAME or TOML file.

    What the file of a device at hand leaves out is detected and measured, which takes a moment. One that is reached over
    the network is not asked: `edgewise targets check` does that.

    \b
    Example:
      edgewise targets show local
    """
    from targets.spec import load_spec

    spec = load_spec(name)
    if spec.kind not in ("rpc", "tracker"):
        from targets.target import load_target

        device = load_target(name, cache_dir())
        try:
            spec = device.spec
        finally:
            device.close()
    values = spec.to_dict()
    if as_json:
        click.echo(json.dumps(values, indent=1))
    else:
        table([(key, words(value)) for key, value in values.items() if value not in (None, "", [], {})])


@targets_group.command("add")
@click.argument("name")
@click.option("--like", metavar="NAME", help="Begin with what is known of that device.")
@click.option("--host", help="Where its RPC server listens.")
@click.option("--port", type=click.IntRange(1, 65535), help=f"The port it listens on.  [default: {_RPC_PORT}]")
@click.option(
    "--tracker", metavar="HOST[:PORT]", help=f"A tracker that has a pool of such devices instead.  [default port: {_TRACKER_PORT}]"
)
@click.option("--key", help="What the devices of the pool registered as.")
@click.option("--kind", help="A plug-in that makes the device instead; see `edgewise targets list`.")
@click.option("--description", help="One line about it.")
@click.option("--triple", help="LLVM's name of the machine, as in aarch64-linux-gnu.")
@click.option("--cpu", help="LLVM's name of the processor, as in cortex-a76.")
@click.option("--feature", "features", multiple=True, metavar="+NAME", help="A feature of the processor; may be given several times.")
@click.option("--cores", type=click.IntRange(min=1), help="Threads to use.")
@click.option("--affinity", metavar="N,N", help="The processors to use, by number, as in 4,5,6,7.")
@click.option("--vector-bytes", type=int, help="Width of a SIMD register: 16 for NEON, 32 for AVX2.")
@click.option("--dot", type=click.Choice([d or "none" for d in get_args(Dot)]), help="Byte dot products it has.")
@click.option("--memory", "memory_bytes", type=Size(), help="Memory that a model may use, as in 8GB.")
@click.option("--backend", type=click.Choice(get_args(Backend)), help="What computes: the processor (llvm) or a GPU.")
@click.option("--arch", help="The GPU's architecture, as in sm_87.")
@click.option("--linker", type=click.Choice(get_args(Linker)), help="What links libraries for it.")
@click.option("--cooldown", "cooldown_s", type=Duration(), help="Rest before each measurement, as in 5s.")
@click.option("--timeout", "timeout_s", type=Duration(), help="Most time of a session on it, as in 10m.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="What its plug-in wants to know; may be given several times.")
@click.option("--replace", is_flag=True, help="Take the place of a device of yours that has this name.")
def targets_add(name: str, like: str | None, replace: bool, **given: Any) -> None:
    """Describe a device of your own: writes a TOML file that may be edited.

    Give what --like does not know. Files lie in `devices` of $EDGEWISE_CONFIG, else of ~/.config/edgewise.

    \b
    Examples:
      edgewise targets add board --like pi5 --host 192.168.1.7 --memory 8GB
      edgewise targets add farm --like pi5 --tracker 127.0.0.1 --key pi5
      edgewise targets add half --like local --cores 1
    """
    from targets.device_files import add_device
    from targets.spec import DeviceSpec, load_spec

    base: dict[str, Any] = {}
    if like is not None:
        known = load_spec(like)
        # What was measured of that device, or reaches it, is not this one's.
        own = {"read_bytes_per_s": 0.0, "flops_per_s": 0.0} if known.kind != "null" else {}
        base = {**known.to_dict(), "description": f"like {like}: {known.description}" if known.description else f"like {like}", **own}
        if known.state == "run":  # the other one, not this
            base["state"] = "described"
    values = {**base, "name": name, **_connection(name, base.get("kind"), given), **_processor(given)}
    spec = DeviceSpec.from_dict(values, f"device {name!r}")
    click.echo(str(add_device(spec, replace=replace)))
    reached = spec.kind not in ("rpc", "tracker") or spec.host
    then = f"`edgewise targets check {name}` tries it" if reached else "it has no host yet: give --host or --tracker, with --replace"
    click.echo(then, err=True)


def _connection(name: str, kind: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """How the device is reached.

    Raises:
        InvalidDevice: if that is not said, or twice.
    """
    from targets.spec import InvalidDevice

    ways = [f"--{way}" for way in ("host", "tracker", "kind") if given[way] is not None]
    if len(ways) > 1:
        raise InvalidDevice(f"device {name!r}: {' and '.join(ways)} say two ways to reach it; give one")
    if given["tracker"] is not None:
        host, colon, port = given["tracker"].rpartition(":")
        if not colon or given["tracker"].count(":") > 1:
            host, port = given["tracker"], str(given["port"] or _TRACKER_PORT)
        if not port.isdecimal() or not host:
            raise InvalidDevice(f"device {name!r}: --tracker {given['tracker']!r} is not HOST or HOST:PORT; correct it")
        if given["key"] is None:
            raise InvalidDevice(f"device {name!r}: --tracker needs --key, the key that the devices of the pool registered with")
        return {"kind": "tracker", "host": host, "port": int(port), "key": given["key"]}
    if given["host"] is not None:
        # A pool's key is none of a server that is reached directly.
        key = {} if given["key"] is None and kind == "rpc" else {"key": given["key"] or ""}
        return {"kind": "rpc", "host": given["host"], "port": given["port"] or _RPC_PORT, **key}
    for way in ("port", "key"):
        if given[way] is not None and kind not in ("rpc", "tracker"):
            raise InvalidDevice(f"device {name!r}: --{way} is that of a server; give --host or --tracker, too")
    if given["kind"] is not None:
        return {"kind": given["kind"]}
    if kind is None:
        raise InvalidDevice(
            f"device {name!r}: nothing says how it is reached; give --host, --tracker, --kind, or --like a device that does"
        )
    return {way: given[way] for way in ("port", "key") if given[way] is not None}


def _processor(given: dict[str, Any]) -> dict[str, Any]:
    """What the options say of the device itself, in the fields of a device file."""
    plain = (
        "description",
        "triple",
        "cpu",
        "cores",
        "vector_bytes",
        "memory_bytes",
        "backend",
        "arch",
        "linker",
        "cooldown_s",
        "timeout_s",
    )
    values = {key: given[key] for key in plain if given[key] is not None}
    if given["features"]:
        values["features"] = list(given["features"])
    if given["dot"] is not None:
        values["dot"] = "" if given["dot"] == "none" else given["dot"]
    if given["affinity"] is not None:
        words_ = [word.strip() for word in given["affinity"].split(",") if word.strip()]
        values["affinity"] = [int(word) if word.isdecimal() else word for word in words_]  # a wrong one is refused with all others
    if given["options"]:
        values["options"] = dict(map(_option, given["options"]))
    return values


def _option(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value a number, a truth value or a list where it is written as one in JSON, else a text."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--option")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


@targets_group.command("remove")
@click.argument("name")
def targets_remove(name: str) -> None:
    """Remove a device of your own.

    \b
    Example:
      edgewise targets remove board
    """
    from targets.device_files import remove_device

    click.echo(f"removed {remove_device(name)}", err=True)


@targets_group.command("check")
@click.argument("name")
@click.option("--repeats", type=click.IntRange(min=3), default=40, show_default=True, help="How often a small model is timed.")
@click.option("--no-save", is_flag=True, help="Leave the device file as it is.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a line for each step.")
def targets_check(name: str, repeats: int, no_save: bool, as_json: bool) -> None:
    """See whether a device works, how fast it is and how steady.

    Looks for what is missing, sends a probe, compares a small model with PyTorch, measures what the device can do at
    most, and times the model again and again. What was measured is written into a device file of yours. Exit status 1 if
    something fails; what makes times doubtful is marked with ! and fails nothing.

    \b
    Examples:
      edgewise targets check local
      edgewise targets check board --repeats 400      does it get hot?
    """
    from nas.check import ceilings, check_device
    from targets.spec import InvalidDevice, load_spec

    spec = load_spec(name)
    steps: dict[str, CheckStep] = {}
    for step in check_device(spec, cache_dir(), repeats):
        steps[step.name] = step
        if not as_json:
            click.echo(f"{_MARKS[step.status]} {step.name.ljust(9)}  {step.detail}")
            sys.stdout.flush()  # a step may take a minute
    works = all(step.status != "failed" for step in steps.values())
    saved, note, problem = None, "", None
    if works and not no_save:
        try:
            saved, note = _save(name, spec, ceilings(steps))
        except (InvalidDevice, OSError) as error:  # raised once the figures are shown
            problem = error
    if as_json:
        shown = {"target": spec.name, "ok": works, "steps": [step.to_dict() for step in steps.values()]}
        click.echo(json.dumps({**shown, "saved": None if saved is None else str(saved)}, indent=1))
    elif note:
        click.echo(note)
    if problem is not None:
        raise problem
    if not works:
        raise click.exceptions.Exit(1)


def _save(name: str, spec: "DeviceSpec", found: dict[str, float]) -> tuple[Path | None, str]:
    """Writes what was measured into the user's device file: its path, and what to say about it."""
    from targets.device_files import set_values
    from targets.spec import own_file

    if own_file(name) is None:
        return None, f"nothing is written: {name!r} has no file of yours; `edgewise targets add NAME --like {name}` makes one"
    path = set_values(name, {**({} if spec.kind == "null" else found), "state": "run"})
    return path, f"written to {path}"
