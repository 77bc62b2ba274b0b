"""What comes out of reading a config.json of another family."""

from dataclasses import dataclass, field

from search_spaces.config import SLMConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Factors between a family's weights and ours: ours are theirs times these.

    Attributes:
        queries: of the query projection of each layer; empty: 1.
        residual: of the projections back into the residual stream.
        final: of the last norm.
        norm_shift: added to norm weights (Gemma keeps them less one).
        latents: of the projections to MLA's latents: a norm with another epsilon than theirs, on a latent scaled by the
            root of their ratio, is the norm with theirs.
        neighbours: MLA's rotary dimensions pair (2j, 2j + 1), ours (j, j + R/2).
    """

    queries: tuple[float, ...] = ()
    residual: float = 1.0
    final: float = 1.0
    norm_shift: float = 0.0
    latents: float = 1.0
    neighbours: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A config.json of another family, as ours.

    Attributes:
        family: its model_type.
        config: the architecture.
        exact_tokens: most tokens for which ours computes the same.
        scales: what to do to its weights.
        notes: what was left out, a line each.
    """

    family: str
    config: SLMConfig
    exact_tokens: int
    scales: Scales = field(default_factory=Scales)
    notes: tuple[str, ...] = ()
