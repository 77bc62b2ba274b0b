"""The commands that look at one model or space: measure, count, spaces."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from nas.cli_show import cache_dir, table
from nas.cli_types import PRECISION, PRECISION_HELP

if TYPE_CHECKING:
    from cost_models.profile import Profile
    from nas.models import NamedModel
    from search_spaces.model import SLM
    from search_spaces.precision import Precision
    from search_spaces.space import Space
    from search_spaces.workload import Workload


_PROFILE_SHARE = 0.5
"""Of the time that timing takes, spent on a profile that was asked for: many runs, for steady medians."""


_reference = click.option("--reference", metavar="PATH", help="A config.json or a folder with one, in place of MODEL.")


def _model(model: str | None, given: str | None) -> "NamedModel":
    """The model of the argument or of --reference; what its file has that is not used goes to stderr, a line each.

    Raises:
        InvalidConfig: if it means none, or the file describes what cannot be represented.
    """
    from nas.models import named_model

    text = model if given is None else given
    if text is None:
        raise click.UsageError("Missing argument 'MODEL'.", click.get_current_context())
    if model is not None and given is not None:
        raise click.UsageError(f"MODEL {model!r} and --reference {given!r} are both given; give one of them.", click.get_current_context())
    named = named_model(text)
    for note in named.notes:
        click.echo(f"{named.name}: {note}", err=True)
    return named


# --- measure ----------------------------------------------------------------------------------


@click.command("measure")
@click.argument("model", metavar="MODEL", required=False)
@_reference
@click.option("--target", default="local", show_default=True, help="Where to measure: a name from `edgewise targets list`.")
@click.option("--prompt-bytes", type=click.IntRange(min=1), default=512, show_default=True, help="Text to read.")
@click.option("--generate-bytes", type=click.IntRange(min=1), default=256, show_default=True, help="Text to generate.")
@click.option("--weights", type=PRECISION, default="fp32", show_default=True, help=PRECISION_HELP)
@click.option("--profile", is_flag=True, help="Show which operators the time goes to, beside what the device can do.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, raw times included.")
def measure_command(
    model: str | None,
    reference: str | None,
    target: str,
    prompt_bytes: int,
    generate_bytes: int,
    weights: "Precision",
    profile: bool,
    as_json: bool,
) -> None:
    """Compile a model for a device, check it against PyTorch, and time a request.

    MODEL is a config.json, ours or of Hugging Face, a folder with one (such as an export), or a published model's name.
    Without a tokenizer, the bytes a token stands for are assumed from the size of the vocabulary. The check against
    PyTorch is on the weights as rounded to --weights.

    \b
    Examples:
      edgewise measure my-model
      edgewise measure my-model --weights int8
      edgewise measure my-model --profile
      edgewise measure smollm-135m --generate-bytes 64 --json
    """
    named = _model(model, reference)
    from search_spaces.workload import Workload
    from targets.target import load_target

    workload = Workload(prompt_bytes=prompt_bytes, generate_bytes=generate_bytes)
    device = load_target(target, cache_dir())
    try:
        values = _measured(named, device, workload, weights, with_profile=profile)
    finally:
        device.close()
    parts = values.pop("profile")
    if as_json:
        shown = {"profile": {phase: part.to_dict() for phase, part in parts.items()}} if profile else {}
        click.echo(json.dumps(values | shown, indent=1))
        return
    from nas.describe import describe_config, format_bytes, format_count, format_ms, format_rate, format_s

    assumed = " (assumed)" if values["bytes_per_token_assumed"] else ""
    click.echo(f"{named.name}: {describe_config(named.config)}")
    table(
        [
            ("device", values["target"]),
            ("parameters", format_count(values["params"])),
            ("weights", f"{values['weights']}, {format_bytes(values['weight_bytes'])}"),
            ("request", f"{prompt_bytes} + {generate_bytes} bytes, {values['prompt_tokens']} + {values['generated_tokens']} tokens"),
            ("bytes per token", f"{values['bytes_per_token']:.2f}{assumed}"),
            ("prefill", format_s(values["prefill_s"])),
            ("decode", f"{format_ms(values['decode_s_per_token'])} ms a token"),
            ("whole request", format_s(values["request_s"])),
            ("characters/s", format_rate(values["bytes_per_s"])),
            ("peak memory", format_bytes(values["peak_bytes"])),
            ("state", ", ".join(word for word in ("noisy", "slow") if values[word]) or "steady"),
            ("estimate", f"{format_ms(values['estimate']['decode_s_per_token'])} ms a token ({values['estimate']['model']})"),
        ]
    )
    if profile:
        _show_profiles(parts, values)
    if values["slow"]:
        click.echo(
            f"the device ran {values['slowdown']:.2f} times slower than it can: let it cool, close other programs and measure again",
            err=True,
        )
    if values["noisy"]:
        click.echo(f"times of {', '.join(values['noisy'])} spread widely: close other programs and measure again", err=True)


def _show_profiles(parts: "dict[str, Profile]", values: dict[str, Any]) -> None:
    from nas.breakdown import COLUMNS, breakdown_rows

    titles = {"prefill": f"prefill of {values['prompt_tokens']} tokens", "decode": f"decode of a token after {values['context']} others"}
    for phase, part in parts.items():
        click.echo(f"\n{titles[phase]}")
        table([COLUMNS, *breakdown_rows(part, **values["ceilings"])])


def _measured(
    named: "NamedModel", device: Any, workload: "Workload", precision: "Precision" = "fp32", *, with_profile: bool = False
) -> dict[str, Any]:
    """Measures a model; refuses what cannot fit before anything is compiled.

    Raises:
        UserError: if the request exceeds the context, the model the device's memory, or a profile is asked of a device
            that takes none.
        TargetError: if it cannot be compiled or measured, or differs from PyTorch.
    """
    from cost_models.roofline import Roofline
    from nas.describe import format_bytes
    from nas.errors import UserError
    from search_spaces.counting import count, kv_bytes, weight_bytes
    from search_spaces.workload import assumed_bytes_per_token
    from targets.measurement import Timing

    config = named.config
    model: SLM | None = None
    bytes_per_token, assumed = assumed_bytes_per_token(config.vocab_size), True
    loaded = named.load()
    if loaded is not None:
        model, tokenizer = loaded
        if tokenizer is not None:
            bytes_per_token, assumed = tokenizer.bytes_per_token, False
    tokens = workload.tokens(bytes_per_token)
    if tokens.total > config.context:
        raise UserError(
            f"the request needs {tokens.total} tokens and {named.name} has context={config.context}; "
            "give fewer --prompt-bytes or --generate-bytes"
        )
    if tokens.total > named.exact_tokens:
        raise UserError(
            f"the request needs {tokens.total} tokens, and attention of {named.name} looks back over a window of {named.exact_tokens}, "
            "which is not built; give fewer --prompt-bytes or --generate-bytes"
        )
    # As in a search, what is sure: the workspace depends on how the device computes.
    needed, memory = weight_bytes(config, precision) + kv_bytes(config, tokens.total), device.spec.memory_bytes
    if memory and needed > memory:
        raise UserError(
            f"{named.name} needs {format_bytes(needed)} of memory and target {device.spec.name!r} has {format_bytes(memory)}; "
            f"measure a smaller model{'' if precision == 'int4' else ', or one in fewer bits with --weights'}"
        )

    from cost_models.measured import measure_request
    from cost_models.profile import profiles

    timing = Timing(profile_share=_PROFILE_SHARE) if with_profile else Timing()
    measured = measure_request(device, config, tokens, workload, seed=0, model=model, precision=precision, timing=timing)
    measurement = measured.measurement
    if with_profile and measurement.profile is None:
        raise UserError(f"target {device.spec.name!r} cannot tell where its time goes; leave out --profile, or choose another --target")
    counts = count(config, context=tokens.mid_context, precision=precision)
    return {
        "model": named.name,
        "target": device.spec.name,
        "config": config.to_dict(),
        "weights": precision,
        "params": counts.params,
        "context": counts.context,
        "flops_per_token": counts.flops_per_token,
        "weight_bytes": counts.weight_bytes,
        "kv_bytes_per_token": counts.kv_bytes_per_token,
        "bytes_per_token": bytes_per_token,
        "bytes_per_token_assumed": assumed,
        "prompt_tokens": tokens.prompt,
        "generated_tokens": tokens.generated,
        **measured.to_dict(),
        "noisy": list(measurement.noisy),
        "slow": measurement.is_slow,
        "slowdown": measurement.slowdown,
        "estimate": Roofline().estimate(config, tokens, device.spec, precision).to_dict(),
        "ceilings": {"flops_per_s": device.spec.flops_per_s, "read_bytes_per_s": device.spec.read_bytes_per_s},
        "profile": profiles(measurement, config, tokens, precision),
    }


# --- count ------------------------------------------------------------------------------------


@click.command("count")
@click.argument("model", metavar="MODEL", required=False)
@_reference
@click.option("--weights", type=PRECISION, default="fp32", show_default=True, help=PRECISION_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def count_command(model: str | None, reference: str | None, weights: "Precision", as_json: bool) -> None:
    """Count a model's parameters, FLOPs and bytes, by component, from the architecture alone.

    MODEL is a config.json, ours or of Hugging Face, a folder with one (such as an export), or a published model's name.
    FLOPs and bytes read are those of decoding one token with a full context (`context` in the JSON: the tokens before
    it). The peak (`peak_bytes`) is that of decoding with a full context: weights, the whole cache and the workspace of
    one token, without a prompt's.
    Bytes of weights are those of --weights, scales included; norms, biases, the cache and activations are float32 always.

    \b
    Examples:
      edgewise count smollm-135m
      edgewise count smollm-135m --weights int4
      edgewise count my-model/config.json --json
      edgewise count --reference Qwen2.5-0.5B
    """
    named = _model(model, reference)
    from search_spaces.counting import count

    c = count(named.config, precision=weights)
    components = list(dict.fromkeys((*c.params_by_component, *c.flops_by_component, *c.bytes_read_by_component)))
    if as_json:
        values = {
            "model": named.name,
            "config": named.config.to_dict(),
            "weights": c.precision,
            "params": c.params,
            "flops_per_token": c.flops_per_token,
            "weight_bytes": c.weight_bytes,
            "kv_bytes_per_token": c.kv_bytes_per_token,
            "kv_bytes": c.kv_bytes,
            "workspace_bytes": c.workspace_bytes,
            "peak_bytes": c.peak_bytes,
            "bytes_read_per_token": c.bytes_read_per_token,
            "context": c.context,
            "by_component": {
                "params": dict(c.params_by_component),
                "flops_per_token": dict(c.flops_by_component),
                "bytes_read_per_token": dict(c.bytes_read_by_component),
            },
        }
        click.echo(json.dumps(values, indent=1))
        return
    from nas.describe import describe_config, format_bytes

    click.echo(f"{named.name}: {describe_config(named.config)}")
    rows: list[Sequence[str]] = [("", "parameters", "FLOPs/token", "bytes read/token")]
    tables = (c.params_by_component, c.flops_by_component, c.bytes_read_by_component)
    rows += [(name, *(f"{t[name]:,}" if name in t else "–" for t in tables)) for name in components]
    rows.append(("total", f"{c.params:,}", f"{c.flops_per_token:,}", f"{c.bytes_read_per_token:,}"))
    table(rows)
    click.echo("")
    table(
        [
            (f"weights ({c.precision})", f"{c.weight_bytes:,} bytes", format_bytes(c.weight_bytes)),
            ("cache per token", f"{c.kv_bytes_per_token:,} bytes", format_bytes(c.kv_bytes_per_token)),
            (f"cache of {named.config.context} tokens", f"{c.kv_bytes:,} bytes", format_bytes(c.kv_bytes)),
            ("peak while decoding", f"{c.peak_bytes:,} bytes", format_bytes(c.peak_bytes)),
        ]
    )


# --- spaces -----------------------------------------------------------------------------------


@click.group("spaces")
def spaces_group() -> None:
    """See the search spaces that come with edgewise."""


@spaces_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def spaces_list(as_json: bool) -> None:
    """List the shipped spaces, smallest models first."""
    from search_spaces.space import load_space, space_names

    spaces = [load_space(name) for name in space_names()]
    if as_json:
        click.echo(json.dumps([{"name": s.name, "about": s.about, "params": s.params_range} for s in spaces], indent=1))
    else:
        table([(s.name, s.about) for s in spaces])


@spaces_group.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of TOML.")
def spaces_show(name: str, as_json: bool) -> None:
    """Show a space, shipped or a TOML file of your own, as a TOML file to start your own from.

    \b
    Example:
      edgewise spaces show tiny > my-space.toml
      edgewise search --space my-space.toml
    """
    from search_spaces.space import REPAIRS, load_space
    from search_spaces.twin import RULES

    space = load_space(name)
    if as_json:
        twins = {} if space.twin_params is None else {"twin_rules": list(RULES)}
        click.echo(json.dumps({**space.to_dict(), "size": space.size, "repairs": list(REPAIRS), **twins}, indent=1))
        return
    click.echo(space.to_toml().rstrip())
    click.echo(f"\n# {'Endless' if space.size is None else f'{space.size:,}'} combinations; how they become models that can be built:")
    for rule in REPAIRS:
        click.echo(f"# - {rule}")
    if space.twin_params is not None:
        click.echo(f"\n# Models are scored by twins, {_twin_sizes(space)}:")
        for rule in RULES:
            click.echo(f"# - {rule}")


def _twin_sizes(space: "Space") -> str:
    """How large the twins of a space are, in words."""
    from nas.describe import format_count
    from search_spaces.twin import target_params

    assert space.params_range is not None
    sizes = [f"{format_count(target_params(space, n))} for {format_count(n)}" for n in space.params_range]
    return f"whose bodies have {' to '.join(dict.fromkeys(sizes))} parameters"
