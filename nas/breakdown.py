"""Where a model's time goes, as rows of words: the terminal and the report show the same."""

from cost_models.profile import Profile, profiles
from nas.describe import format_rate, format_s
from nas.evaluation import Evaluation
from search_spaces.workload import Workload
from targets.measurement import Measurement

COLUMNS = ("operator", "time", "share", "GFLOP/s", "GB/s")

_NAMES = {"ffn": "FFN"}


def trial_profiles(evaluation: Evaluation, workload: Workload) -> dict[str, Profile]:
    """The profiles of a trial's `prefill` and `decode`; empty if it was not measured or its device took none."""
    config, record, bytes_per_token = evaluation.config, evaluation.measurement, evaluation.bytes_per_token
    if config is None or record is None or bytes_per_token is None:
        return {}
    return profiles(Measurement.from_dict(record), config, workload.tokens(bytes_per_token), evaluation.weights)


def breakdown_rows(profile: Profile, flops_per_s: float, read_bytes_per_s: float) -> list[tuple[str, ...]]:
    """A row per operator, most time first, then what passed between kernels, the whole call, and the device's ceilings.

    Args:
        profile: of one function.
        flops_per_s, read_bytes_per_s: the ceilings as measured; 0 if they are not known.
    """
    rows = [
        (_NAMES.get(o.operator, o.operator), format_s(o.time_s), _percent(o.share), _giga(o.flops_per_s), _giga(o.read_bytes_per_s))
        for o in profile.operators
    ]
    flops, read_bytes = (sum(getattr(o, name) for o in profile.operators) / profile.wall_s for name in ("flops", "read_bytes"))
    return [
        *rows,
        ("between kernels", format_s(profile.between_s), _percent(profile.between_share), "–", "–"),
        ("whole call", format_s(profile.wall_s), "", _giga(flops), _giga(read_bytes)),
        ("device's best", "", "", _giga(flops_per_s), _giga(read_bytes_per_s)),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _giga(per_s: float | None) -> str:
    return format_rate(per_s / 1e9) if per_s else "–"
