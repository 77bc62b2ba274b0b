"""`Workload`: what a user asks of the model, in bytes of text, and what that is in a candidate's tokens."""

import itertools
import math
from dataclasses import dataclass

# Bytes per token of byte-level BPE on English prose, by vocabulary size; measured with `tokenizers` on 20 MB.
_BYTES_PER_TOKEN = ((256, 1.0), (512, 1.9), (1024, 2.6), (4096, 4.07), (8192, 4.57), (16384, 4.90), (32768, 5.08), (65536, 5.15))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One request: a prompt to read and text to generate, both in bytes, the same for every vocabulary.

    Raises:
        ValueError: if a length is below 1.
    """

    prompt_bytes: int = 512
    generate_bytes: int = 256

    def __post_init__(self) -> None:
        for name in ("prompt_bytes", "generate_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; give a positive number of bytes")

    def tokens(self, bytes_per_token: float) -> "RequestTokens":
        """This request in tokens of a tokenizer that makes one token of `bytes_per_token` bytes."""
        return RequestTokens(
            prompt=math.ceil(self.prompt_bytes / bytes_per_token),
            generated=math.ceil(self.generate_bytes / bytes_per_token),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTokens:
    """A request in one tokenizer's tokens."""

    prompt: int
    generated: int

    @property
    def mid_context(self) -> int:
        """Cached rows half way through generation: decode cost is linear in context, so this is its mean."""
        return self.prompt + self.generated // 2

    @property
    def total(self) -> int:
        """Positions the request needs: the context a model must have."""
        return self.prompt + self.generated


def assumed_bytes_per_token(vocab_size: int) -> float:
    """Bytes per token to assume where no tokenizer is at hand, by log-linear interpolation of measured ones."""
    points = _BYTES_PER_TOKEN
    if vocab_size <= points[0][0]:
        return points[0][1]
    for (v0, b0), (v1, b1) in itertools.pairwise(points):
        if vocab_size <= v1:
            return b0 + (b1 - b0) * math.log(vocab_size / v0) / math.log(v1 / v0)
    return points[-1][1]
