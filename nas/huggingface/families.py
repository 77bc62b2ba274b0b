"""A config.json of another family, as an `SLMConfig`, or refused by the field that is in the way."""

from collections.abc import Mapping
from typing import Any

from nas.huggingface.defaults import ALIASES, CLOSED, DEFAULTS, REFUSED, TELLING
from nas.huggingface.fields import Fields
from nas.huggingface.imported import Imported
from nas.huggingface.readers import READERS
from search_spaces.config import InvalidConfig, SLMConfig

FAMILIES: tuple[str, ...] = tuple(READERS)
"""Every model_type that can be read."""


def read_family(values: Mapping[str, Any]) -> Imported:
    """The architecture that the fields of another family's config.json describe.

    Raises:
        InvalidConfig: if the family is not known, or a field has a value that cannot be represented.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in READERS:
        reason = REFUSED.get(str(name), f"the families that can be read are {', '.join(FAMILIES)}")
        told = ", ".join(f"{key}={values[key]!r}" for key in TELLING if values.get(key))
        raise InvalidConfig(f"model_type={name!r} cannot be represented: {reason}{f' ({told})' if told else ''}; choose another model")
    fields = Fields(values, DEFAULTS[name], name, ALIASES.get(name))
    read = READERS[name](fields)
    leftovers = sorted(fields.leftovers())
    if leftovers and name in CLOSED:
        fields.refuse(leftovers[0], f"it is not a field of {name!r} that is known")
    try:
        config = SLMConfig(**read.values)
    except InvalidConfig as error:
        raise InvalidConfig(f"this {name!r} config cannot be built: {error}") from error
    notes = [f"not fields of {name!r}, and not used, as in transformers: {', '.join(map(_printable, leftovers))}"] if leftovers else []
    if read.exact_tokens < config.context:
        notes.append(f"attention over a window of {read.exact_tokens} tokens: the same as ours for up to so many, of {config.context}")
    return Imported(family=name, config=config, exact_tokens=read.exact_tokens, scales=read.scales, notes=tuple(notes))


def _printable(name: str) -> str:
    """A name from a file as a terminal may show it."""
    return name if name.isprintable() else ascii(name)
