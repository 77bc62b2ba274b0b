"""What people write on the command line for durations, sizes and counts, read into SI units, and for precisions."""

import math
import re

import click

from search_spaces.precision import MEANINGS, PRECISIONS, Precision

_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-zµμ]*)\s*")


class _Quantity(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic only in newer click
    """A positive number with a unit."""

    units: dict[str, float]
    example: str
    needs_unit = False

    def _read(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = _NUMBER.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is not a {self.name}; write it as in {self.example}", param, ctx)
        number, unit = float(match[1]), match[2]
        if not unit and self.needs_unit:
            self.fail(f"{value!r} has no unit; write it as in {self.example}", param, ctx)
        factor = self.units.get(unit) or self.units.get(unit.lower())
        if factor is None and unit:
            known = ", ".join(u for u in self.units if u)
            self.fail(f"{value!r}: {unit!r} is not a unit of {self.name}; use one of {known}", param, ctx)
        result = number * (factor or 1.0)
        if not (math.isfinite(result) and result > 0):
            self.fail(f"{value!r} is not above 0; give a positive {self.name}", param, ctx)
        return result


class Duration(_Quantity):
    """`5ms`, `30s`, `10m`, `2h` as seconds."""

    name = "duration"
    units = {"us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}  # noqa: RUF012
    example = "5ms, 30s, 10m or 2h"
    needs_unit = True

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        return value if isinstance(value, float) else self._read(value, param, ctx)


class Size(_Quantity):
    """`64MB`, `1.5GB`, `512KiB`, `1000` as bytes; kB, MB, GB are powers of 1000."""

    name = "size"
    units = {  # noqa: RUF012
        **{"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "k": 1e3, "m": 1e6, "g": 1e9},
        **{"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30},
    }
    example = "64MB, 1.5GB or 512KiB"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        return value if isinstance(value, int) else max(1, round(self._read(value, param, ctx)))


class Count(_Quantity):
    """`5M`, `500k`, `1.1B`, `5000000` as a number."""

    name = "count"
    units = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}  # noqa: RUF012
    example = "5M, 500k or 1.1B"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        return value if isinstance(value, int) else max(1, round(self._read(value, param, ctx)))


PRECISION = click.Choice(PRECISIONS)
"""One precision."""

PRECISION_HELP = f"How the device holds the matrices: {', '.join(f'{name} ({meaning})' for name, meaning in MEANINGS.items())}."


class Precisions(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """`int8` or `fp32,int8,int4` as a tuple of precisions."""

    name = "precisions"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """How `--help` shows the value."""
        return f"[{'|'.join(PRECISIONS)}][,…]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Precision, ...]:
        """The precisions, in the order written."""
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")]
        found: list[Precision] = [precision for word in words for precision in PRECISIONS if precision == word]
        wrong = next((word for word in words if word not in PRECISIONS), None)
        if wrong is not None:
            self.fail(f"{wrong!r} is not a precision; use one or several of {', '.join(PRECISIONS)}, as in fp32,int8", param, ctx)
        if len(set(found)) < len(found):
            self.fail(f"{value!r} names a precision twice; name each once", param, ctx)
        return tuple(found)


class Rungs(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """`64KB,256KB` as bytes; `none` as no rung, `auto` as None."""

    name = "rungs"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """How `--help` shows the value."""
        return "auto|none|SIZE[,…]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...] | None:
        """Bytes of each, in the order written."""
        if isinstance(value, tuple) or value == "auto":
            return value if isinstance(value, tuple) else None
        return () if value == "none" else tuple(Size().convert(word, param, ctx) for word in str(value).split(","))


class ExportFormat(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A format of `edgewise export`; the table of them is read when it is needed."""

    name = "format"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """How `--help` shows the value."""
        from nas.export import FORMATS

        return f"[{'|'.join(FORMATS)}]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name, if it is one."""
        from nas.export import FORMATS

        return str(click.Choice(list(FORMATS)).convert(value, param, ctx))
