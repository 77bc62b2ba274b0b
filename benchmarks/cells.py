"""What is compared: twelve architectures, two phases, several lengths; plain data that both sides import."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from search_spaces.config import SLMConfig
from search_spaces.references import reference
from search_spaces.workload import RequestTokens

Phase = Literal["prefill", "decode"]

PREFILL_TOKENS = (32, 128, 512)
DECODE_CONTEXTS = (128, 1024)
PRECISIONS = ("fp32", "fp16", "int8", "int4")

_DECODE_PROMPT = 32
"""Prompt of a program that is there to decode: short, since its prefill is checked before every timing."""


def _config(**values: Any) -> SLMConfig:
    return SLMConfig(context=2048, **values)


CONFIGS: Mapping[str, SLMConfig] = {
    "mha-5m": _config(
        vocab_size=8192, d_model=256, num_layers=4, num_heads=8, ffn="standard", activation="gelu", norm="layernorm"
    ),
    "gqa-12m": _config(
        vocab_size=8192, d_model=320, num_layers=6, attention="gqa", num_heads=10, num_kv_heads=2, tie_embeddings=False
    ),
    "mqa-26m": _config(vocab_size=8192, d_model=512, num_layers=8, attention="mqa", num_heads=8, ffn_dim=1408),
    "mla-28m": _config(
        vocab_size=8192, d_model=512, num_layers=8, attention="mla", num_heads=8, head_dim=64, kv_rank=128,
        rotary_dim=32, ffn_dim=1408,
    ),
    "gqa-32m": _config(
        vocab_size=8192, d_model=512, num_layers=8, attention="gqa", num_heads=8, num_kv_heads=4, ffn_dim=1408,
        tie_embeddings=False,
    ),
    "mqa-63m": _config(
        vocab_size=16384, d_model=640, num_layers=10, attention="mqa", num_heads=10, ffn="standard", activation="relu",
        norm="layernorm", tie_embeddings=False,
    ),
    "mla-90m": _config(
        vocab_size=16384, d_model=768, num_layers=10, attention="mla", num_heads=12, head_dim=64, kv_rank=192, q_rank=384,
        rotary_dim=32, ffn="standard", activation="gelu_tanh", tie_embeddings=False,
    ),
    "gpt2-124m": dataclasses.replace(reference("gpt2-124m"), context=2048),
    "smollm-135m": reference("smollm-135m"),
    "pythia-160m": reference("pythia-160m"),
    "openelm-270m": reference("openelm-270m"),
    "qwen2-0.5b": reference("qwen2-0.5b"),
}  # fmt: skip
"""MHA, GQA, MQA and MLA, standard and gated, tied and untied, sequential and parallel, 5 M to 500 M parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One comparison.

    Attributes:
        config: a name in `CONFIGS`.
        phase: prefill of `length` tokens from an empty cache, or decode of one token against `length` cached rows.
        length: tokens or rows.
        threads: threads that each side may use.
        precision: how our weights are stored, and with what they are compared.
    """

    config: str
    phase: Phase
    length: int
    threads: int
    precision: str = "fp32"

    @property
    def request(self) -> RequestTokens:
        """The request whose program has this cell's function: of a decode, one whose mean context is `length`."""
        if self.phase == "prefill":
            return RequestTokens(prompt=self.length, generated=1)
        return RequestTokens(prompt=_DECODE_PROMPT, generated=2 * (self.length - _DECODE_PROMPT))

    def __str__(self) -> str:
        return f"{self.config} {self.precision} {self.phase} {self.length} on {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerJob:
    """What a peer is asked to load.

    Attributes:
        cell: the comparison.
        config: the architecture, as `SLMConfig.to_dict` gives it.
        weights: safetensors, each parameter under its name in `SLM`, float32 and not rounded.
        inputs: safetensors: `tokens` (1, S), `logits` (1, 1, V) that PyTorch gives with the rounded weights; for decode also the tensors
            `cache.LAYER.PART` (1, C, ...) and the `prefix` (1, C) they came from.
        folder: where a peer may keep what it exports or compiles for this config.
    """

    cell: Cell
    config: dict[str, Any]
    weights: str
    inputs: str
    folder: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PeerJob":
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**values, "cell": Cell(**values["cell"])})
