"""The fields of a config.json of another family: read with that family's defaults, or refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from search_spaces.config import MOST, MOST_LAYERS, Activation, InvalidConfig

_ACTIVATIONS: Mapping[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' names of the activations that we have; some are the same formula written otherwise."""

# What decides nothing about the logits of a trained model: where the file is from, how text is generated or trained on,
# and heads of other tasks.
_HARMLESS = frozenset((
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_name_or_path", "architectures",
    "attn_implementation", "auto_map", "chunk_size_feed_forward", "dtype", "finetuning_task", "gradient_checkpointing", "id2label",
    "is_decoder", "label2id", "model_type", "name_or_path", "num_labels", "output_attentions", "output_hidden_states",
    "output_scores", "prefix", "pretraining_tp", "problem_type", "return_dict", "return_dict_in_generate", "task_specific_params",
    "tf_legacy_loss", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16", "use_cache",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "pad_token_id", "remove_invalid_values", "repetition_penalty", "sep_token_id", "suppress_tokens",
    "temperature", "top_k", "top_p", "typical_p",
    "activation_dropout", "attention_dropout", "attn_pdrop", "classifier_dropout", "dropout", "embd_pdrop", "embed_dropout",
    "hidden_dropout", "init_std", "initializer_range", "layerdrop", "output_router_logits", "resid_dropout", "resid_pdrop",
    "router_aux_loss_coef", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "n_ctx", "reorder_and_upcast_attn", "tie_last_hidden_states",
))  # fmt: skip

_REFUSED: Mapping[str, str] = {
    "add_cross_attention": "a decoder that attends to an encoder is another model",
    "alibi": "positions as biases of attention are not built",
    "attn_logit_softcapping": "capped attention scores are not built",
    "final_logit_softcapping": "capped logits are not built",
    "is_encoder_decoder": "an encoder is not built",
    "moe_layer_freq": "experts are not built",
    "n_routed_experts": "experts are not built",
    "num_experts": "experts are not built",
    "num_local_experts": "experts are not built",
    "per_layer_config": "layers with settings of their own are not read",
    "pruned_heads": "heads that were taken out are not built",
    "quantization_config": "weights in a quantised form are not read",
    "tie_encoder_decoder": "an encoder is not built",
    "use_bidirectional_attention": "attention is causal",
    "layer_types": "layers of several kinds are not built",
    "sliding_window": "a window is not part of this family",
}
"""Fields that no family may have with a value that says something, unless it reads them itself, and why."""


_LAYERS = ("n_layer", "num_layers", "num_hidden_layers", "num_transformer_layers")
_LARGEST = 1e30
"""No factor, base or epsilon is above this; it leaves room to multiply a few in float64."""


class Fields:
    """One config.json, read field by field; what is never asked for is accounted for at the end.

    Args:
        values: the file's fields.
        defaults: what transformers' config class of that family gives those that are absent.
        family: the model_type.
        aliases: other names that the family takes for a field.
    """

    def __init__(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any], family: str, aliases: Mapping[str, str] | None = None
    ) -> None:
        self.family = family
        self._values, self._defaults = dict(values), defaults
        self._used: set[str] = set()
        for alias, name in (aliases or {}).items():
            if alias in self._values:
                value = self._values.pop(alias)
                if self._values.setdefault(name, value) != value:
                    raise InvalidConfig(f"{alias}={value!r} contradicts {name}={self._values[name]!r}; leave one of them out")

    def has(self, name: str) -> bool:
        """Whether the file itself has the field."""
        return name in self._values

    def get(self, name: str) -> Any:
        """The field's value, or the family's default."""
        self._used.add(name)
        return self._values.get(name, self._defaults.get(name))

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raises InvalidConfig with the field, its value and the reason."""
        value = repr(self.get(name))
        shown = value if len(value) <= 80 else value[:79] + "…"
        absent = "" if self.has(name) else f" (the default of {self.family!r})"
        raise InvalidConfig(f"{name}={shown}{absent} cannot be represented: {why}; choose a model without it")

    def need(self, name: str, wanted: object, why: str) -> None:
        """Refuses any other value of a field."""
        if self.get(name) != wanted:
            self.refuse(name, why)

    def integer(self, name: str) -> int:
        """A whole number of 1 or more."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidConfig(f"{name}={value!r} is not a positive integer, which model_type={self.family!r} needs; correct config.json")
        most = MOST_LAYERS if name in _LAYERS else MOST
        if value > most:
            self.refuse(name, f"it is above {most:,}, the most there can be")
        return value

    def integer_or(self, name: str, other: int) -> int:
        """A whole number of 1 or more; `other` where the field is null."""
        return other if self.get(name) is None else self.integer(name)

    def number(self, name: str) -> float:
        """A finite number."""
        return self.finite(name, self.get(name))

    def finite(self, name: str, value: object) -> float:
        """`value`, found under a name, as a number; refuses anything else."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            raise InvalidConfig(f"{name}={value!r} is not a number, which model_type={self.family!r} needs; correct config.json")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.get(name)
        if not isinstance(value, bool):
            raise InvalidConfig(f"{name}={value!r} is not true or false, which model_type={self.family!r} needs; correct config.json")
        return value

    def activation(self, name: str) -> Activation:
        """The activation that a name of transformers' stands for."""
        value = self.get(name)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            self.refuse(name, f"the activations are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def head_dim(self, heads: int, width: int, *, free: bool) -> int:
        """Width of a head: `head_dim`, or the model's width by the number of heads.

        Args:
            free: whether the family takes any width of heads, or only the quotient.
        """
        if (not free or self.get("head_dim") is None) and width % heads:
            raise InvalidConfig(f"{heads} heads do not divide the {width} dimensions of this {self.family!r} config; correct config.json")
        given = self.integer_or("head_dim", width // heads)
        if not free and given != width // heads:
            self.refuse("head_dim", f"heads of {self.family!r} are {width} / {heads} wide")
        return given

    def rope(self, width: int, *, partial: str | None = None, theta: str = "rope_theta") -> tuple[int, float]:
        """How many of a head's dimensions rotate, and the base.

        Both are in `rope_parameters` (transformers 5) or in fields of their own (4), beside `rope_scaling`.

        Args:
            width: dimensions of a head that may rotate.
            partial: the field with the share that does, in families that have one.
            theta: the field with the base.
        """
        source = "rope_scaling" if self.get("rope_scaling") else "rope_parameters"
        self.get("rope_parameters")
        rope = self.get(source) or {}
        if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
            self.refuse(source, "one kind of rotary positions for all layers is built")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            self.refuse(source, f"rotary positions of type {kind!r} are not built, only 'default'")
        base = self.finite(theta, rope.get("rope_theta", 10000.0 if self.get(theta) is None else self.get(theta)))
        name = partial or "partial_rotary_factor"
        given = rope.get("partial_rotary_factor", self.get(name))
        share = 1.0 if given is None else self.finite(name, given)
        if partial is None and share != 1.0:
            raise InvalidConfig(f"{name}={given!r} cannot be represented: {self.family!r} rotates whole heads; choose a model without it")
        dims = int(width * share) if 0 < share <= 1 else 0
        if dims < 2 or dims % 2 or dims > width:
            rule = f"an even number of rotary dimensions from 2 to the {width} of a head"
            raise InvalidConfig(f"{name}={given!r} comes to {dims}, not {rule}; correct config.json")
        return dims, base

    def window(self, context: int, name: str = "sliding_window") -> int:
        """Most tokens for which attention over a sliding window is attention over everything."""
        value = self.get(name)
        return context if value is None else min(context, self.integer(name))

    def leftovers(self) -> Sequence[str]:
        """What the file has beyond the fields that were read and those that change nothing.

        Raises:
            InvalidConfig: if one of them says something that no family of ours does.
        """
        rest = [name for name in self._values if name not in self._used and name not in _HARMLESS]
        for name in rest:
            value = self._values[name]
            if name == "layer_types" and isinstance(value, list) and set(map(str, value)) <= {"full_attention"}:
                continue
            if name == "is_causal" and value is False:
                self.refuse(name, "attention is causal")
            if name in _REFUSED and value not in (None, False, 0, "", [], {}):
                self.refuse(name, _REFUSED[name])
        return [name for name in rest if name not in _REFUSED and name != "is_causal"]
