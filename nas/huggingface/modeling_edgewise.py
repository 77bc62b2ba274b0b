"""Our decoder as a model of transformers; the folder of a model that no family has carries this file with it."""

# mypy: disable-error-code="no-untyped-call, no-any-return"
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin  # type: ignore[attr-defined]
from transformers.modeling_outputs import CausalLMOutputWithPast

from nas.huggingface.configuration_edgewise import EdgewiseConfig
from search_spaces.config import SLMConfig
from search_spaces.model import SLM, Embed, rope_table
from search_spaces.operators import OPERATORS  # noqa: F401  (transformers 4 takes along only what this file imports)


class EdgewiseForCausalLM(PreTrainedModel, GenerationMixin):
    """An `SLM` that transformers loads, calls and generates with; rows of a batch are of one length.

    The cache is transformers' own: keys and values (B, K, C, d), or for latent attention the latents and the rotary
    keys, (B, 1, C, L) and (B, 1, C, R).
    """

    config_class = EdgewiseConfig
    base_model_prefix = "model"
    _supports_cache_class = True
    _supports_static_cache = False
    _no_split_modules = ["Attention", "LatentAttention", "FFN"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embed.tokens.weight"}  # noqa: RUF012

    def __init__(self, config: EdgewiseConfig) -> None:
        super().__init__(config)
        self.model = SLM(SLMConfig.from_dict(config.architecture), torch.get_default_device())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # A table that is computed is not in the file, and transformers makes modules without storage before it reads one.
        if isinstance(module, Embed):
            device = module.rope.device if module.rope.device.type != "meta" else "cpu"
            with torch.device("cpu"):  # whatever device modules are made on meanwhile
                table = rope_table(self.model.config)
            module.register_buffer("rope", table.to(device), persistent=False)
        within = next((f"{name}." for name, part in self.model.named_modules() if part is module), "")
        for name, parameter in module.named_parameters(recurse=False):
            is_read = getattr(parameter, "_is_hf_initialized", False)  # transformers marks so what was in the file
            is_tied = module is self.model.head and parameter is self.model.embed.tokens.weight
            if not (is_read or is_tied or parameter.is_meta):
                self.model.fill(within + name, parameter)

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.model.embed.tokens

    def get_output_embeddings(self) -> nn.Module:
        """What holds the output projection."""
        return self.model.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, S, V) of tokens (B, S) after those in the cache; with labels (-100: none) the mean loss too.

        Raises:
            ValueError: if rows are padded on the left, or there are more tokens than the model's context.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        self._check(input_ids, attention_mask, past)
        if past_key_values is None and use_cache and not self.training:
            past_key_values = DynamicCache()
        if past == 0:
            x = self._read_all(input_ids, past_key_values)
        else:
            assert past_key_values is not None
            x = torch.cat([self._read_one(token, past_key_values) for token in torch.split(input_ids, 1, dim=1)], dim=1)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(x[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None, past: int) -> None:
        longest, context = past + input_ids.shape[1], self.model.config.context
        if longest > context:
            raise ValueError(f"{longest} tokens are more than this model's context of {context}; give fewer, or a smaller max_new_tokens")
        if attention_mask is not None and attention_mask.ndim == 2 and not bool(attention_mask[:, 0].all()):
            raise ValueError("padding on the left is not supported; give rows of one length, or one row at a time")
        if attention_mask is not None and past and not bool(attention_mask.all()):
            raise ValueError("rows of different lengths cannot go on together; give rows of one length, or one row at a time")

    def _read_all(self, tokens_BS: Tensor, cache: Cache | None) -> Tensor:
        x_BSD, cos, sin = self.model.embed(tokens_BS, torch.arange(tokens_BS.shape[1], device=tokens_BS.device))
        for i, block in enumerate(self.model.blocks()):
            x_BSD, rows = block.prefill(x_BSD, (cos, sin))
            if cache is not None:
                cache.update(_to_cache(rows[0]), _to_cache(rows[1]), i)
        return x_BSD

    def _read_one(self, token_B1: Tensor, cache: Cache) -> Tensor:
        position_1 = torch.tensor([cache.get_seq_length()], device=token_B1.device)
        x_B1D, cos, sin = self.model.embed(token_B1, position_1)
        latent = self.model.config.attention == "mla"
        for i, block in enumerate(self.model.blocks()):
            old: Any = cache.layers[i]
            x_B1D, rows = block.decode(x_B1D, (cos, sin), (_from_cache(old.keys, latent), _from_cache(old.values, latent)))
            cache.update(_to_cache(rows[0]), _to_cache(rows[1]), i)
        return x_B1D


def _to_cache(rows: Tensor) -> Tensor:
    """(B, C, K, d) -> (B, K, C, d), and latents (B, C, L) -> (B, 1, C, L)."""
    return rows.transpose(1, 2) if rows.ndim == 4 else rows[:, None]


def _from_cache(rows: Tensor, latent: bool) -> Tensor:
    return rows[:, 0] if latent else rows.transpose(1, 2)
