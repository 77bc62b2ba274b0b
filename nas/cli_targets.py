"""The commands about devices: `edgewise targets`."""

import json

import click

from nas.cli_show import cache_dir, table, words


@click.group("targets")
def targets_group() -> None:
    """See the devices that models can be measured on."""


@targets_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def targets_list(as_json: bool) -> None:
    """List the devices by name."""
    from targets.spec import device_names, load_spec

    specs = [load_spec(name) for name in device_names()]
    if as_json:
        click.echo(json.dumps([{"name": s.name, "kind": s.kind, "description": s.description} for s in specs], indent=1))
    else:
        table([(s.name, s.description) for s in specs])


@targets_group.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def targets_show(name: str, as_json: bool) -> None:
    """Show what is known of a device; what is not in its file is detected and measured, which takes a moment.

    \b
    Example:
      edgewise targets show local
    """
    from targets.target import load_target

    device = load_target(name, cache_dir())
    try:
        values = device.spec.to_dict()
    finally:
        device.close()
    if as_json:
        click.echo(json.dumps(values, indent=1))
    else:
        table([(key, words(value)) for key, value in values.items() if value not in (None, "", [])])
