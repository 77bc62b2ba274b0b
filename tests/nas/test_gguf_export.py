"""GGUF files, read back with GGUF's own reader: names, sizes, and every weight in place."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cost_models.measured import randomise
from nas.corpus import load_corpus
from nas.errors import UserError
from nas.gguf_export import gguf_architecture, write_gguf
from nas.tokenizer import train_tokenizer
from search_spaces.config import SLMConfig
from search_spaces.model import SLM
from search_spaces.precision import Precision
from search_spaces.quantisation import dequantise, quantise
from search_spaces.references import reference

gguf = pytest.importorskip("gguf", reason="GGUF is an extra")

LLAMA = SLMConfig(vocab_size=300, d_model=64, num_layers=2, context=64, attention="gqa", num_heads=4, num_kv_heads=2, ffn_dim=96)
GPT2 = SLMConfig(
    vocab_size=300, d_model=64, num_layers=2, context=64, num_heads=4, ffn="standard", activation="gelu_tanh", norm="layernorm",
    positions="learned", qkv_bias=True, attention_bias=True, ffn_bias=True,
)  # fmt: skip


def written(config: SLMConfig, path: Path, precision: Precision = "fp32") -> tuple[Any, dict[str, torch.Tensor]]:
    """The reader of a random model's file, and the weights that went in."""
    tensors = {name: p.detach() for name, p in randomise(SLM(config), 0).named_parameters()}
    return gguf.GGUFReader(write_gguf(path, config, tensors, None, precision)), tensors


def values(reader: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor by name, in float32 and our order of axes."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(t.shape)[::-1]) for t in reader.tensors}


def field(reader: Any, name: str) -> Any:
    return reader.get_field(name).contents()


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("smollm-135m", "llama"), ("tinyllama-1.1b", "llama"), ("qwen2-0.5b", "qwen2"), ("gemma-2b", "gemma"), ("gpt2-124m", "gpt2")],
)
def test_published_models_go_to_the_architecture_they_are(name: str, architecture: str) -> None:
    assert gguf_architecture(reference(name)) == architecture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "activation='relu' .*'llama', the nearest architecture, needs 'silu'"),
        ({"qkv_bias": True, "qk_norm": True}, "qk_norm=True .*'qwen2'|qkv_bias=True .*'qwen3'"),
        ({"ffn_bias": True}, "ffn_bias=True .* needs False"),
        ({"block": "parallel"}, "block='parallel' .* needs 'sequential'"),
        ({"series_activation": 2}, "series_activation=2 .* needs 1"),
        ({"augmented_shortcuts": 1}, "augmented_shortcuts=1 .* needs 0"),
        ({"head_bias": True}, "head_bias=True .* needs False"),
        ({"embedding_scale": 2.0}, "embedding_scale=2.0 .* needs 1.0"),
        ({"rotary_dim": 8}, "rotary_dim=8 .*rotates whole heads, head_dim=16"),
        ({"ffn_dim": (96, 128)}, r"ffn_dim=\(96, 128\) .*one value for all layers"),
        ({"num_heads": (4, 8), "head_dim": 16}, r"num_heads=\(4, 8\) .*one value for all layers"),
        ({"attention": "mla", "num_kv_heads": None, "kv_rank": 16}, "attention='mla' .* needs 'mha' or 'gqa' or 'mqa'"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_by_field(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, **changes)
    with pytest.raises(UserError, match=message) as error:
        write_gguf(tmp_path / "x.gguf", config, {}, None)
    assert "use --format hf instead" in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_exact_gelu_or_narrow_heads_are_not_gpt2() -> None:
    with pytest.raises(UserError, match=r"activation='gelu' .* needs 'gelu_tanh'"):
        gguf_architecture(dataclasses.replace(GPT2, activation="gelu"))
    with pytest.raises(UserError, match=r"head_dim=8 .*d_model / num_heads, 16"):
        gguf_architecture(dataclasses.replace(GPT2, head_dim=8))


def test_a_width_that_does_not_fill_blocks_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, ffn_dim=100)
    with pytest.raises(UserError, match=r"ffn_dim=100 is not a multiple of 32, the block of GGUF's Q4_0 \(int4\); choose fp16 or fp32"):
        write_gguf(tmp_path / "x.gguf", config, {}, None, "int4")
    written(config, tmp_path / "x.gguf", "fp16")


def test_without_the_package_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package gguf, which is not installed; pip install 'edgewise\[gguf\]'"):
        write_gguf(tmp_path / "x.gguf", LLAMA, {}, None)


def test_sizes_are_under_the_keys_that_llama_cpp_reads(tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, rope_theta=1e5, norm_eps=1e-6, head_dim=24, rotary_dim=24)
    reader, _ = written(config, tmp_path / "x.gguf")
    expected = {
        "general.architecture": "llama", "llama.context_length": 64, "llama.embedding_length": 64, "llama.block_count": 2,
        "llama.feed_forward_length": 96, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 24, "llama.attention.value_length": 24, "llama.rope.dimension_count": 24,
        "llama.vocab_size": 300, "tokenizer.ggml.model": "none",
    }  # fmt: skip
    assert {name: field(reader, name) for name in expected} == expected
    assert field(reader, "llama.rope.freq_base") == pytest.approx(1e5)
    assert field(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)


def test_every_weight_is_there_once_under_its_name(tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, qkv_bias=True)  # qwen2: rows stay as they are
    reader, tensors = written(config, tmp_path / "x.gguf")
    got = values(reader)
    assert sum(t.numel() for t in tensors.values()) == sum(array.size for array in got.values())
    pairs = {"token_embd.weight": "embed.tokens.weight", "output_norm.weight": "head.norm.weight"}
    for i in range(2):
        for ours, theirs in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v")):
            pairs |= {f"blk.{i}.{theirs}.{kind}": f"attentions.{i}.{ours}.{kind}" for kind in ("weight", "bias")}
        pairs |= {f"blk.{i}.ffn_{name}.weight": f"ffns.{i}.{name}.weight" for name in ("norm", "gate", "up", "down")}
        pairs |= {f"blk.{i}.attn_norm.weight": f"attentions.{i}.norm.weight", f"blk.{i}.attn_output.weight": f"attentions.{i}.out.weight"}
    assert pairs.keys() == got.keys()
    for theirs, ours in pairs.items():
        np.testing.assert_array_equal(got[theirs], tensors[ours].numpy(), err_msg=theirs)


def test_llama_pairs_neighbours_where_we_pair_halves(tmp_path: Path) -> None:
    reader, tensors = written(LLAMA, tmp_path / "x.gguf")
    got = values(reader)
    for letter, heads in (("q", 4), ("k", 2)):
        theirs, ours = got[f"blk.1.attn_{letter}.weight"], tensors[f"attentions.1.{letter}.weight"].numpy()
        for head in range(heads):
            for j in range(8):
                np.testing.assert_array_equal(theirs[16 * head + 2 * j], ours[16 * head + j])
                np.testing.assert_array_equal(theirs[16 * head + 2 * j + 1], ours[16 * head + j + 8])
    np.testing.assert_array_equal(got["blk.1.attn_v.weight"], tensors["attentions.1.v.weight"].numpy())


def test_gpt2_stacks_its_projections_and_has_a_position_table(tmp_path: Path) -> None:
    reader, tensors = written(dataclasses.replace(GPT2, tie_embeddings=False), tmp_path / "x.gguf")
    got = values(reader)
    stacked = torch.cat([tensors[f"attentions.1.{letter}.bias"] for letter in "qkv"])
    np.testing.assert_array_equal(got["blk.1.attn_qkv.bias"], stacked.numpy())
    np.testing.assert_array_equal(got["position_embd.weight"], tensors["embed.positions.weight"].numpy())
    np.testing.assert_array_equal(got["output.weight"], tensors["head.weight"].numpy())
    assert sum(t.numel() for t in tensors.values()) == sum(array.size for array in got.values())


def test_layers_that_share_weights_are_written_apart(tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, num_layers=4, sharing="cycle", num_unique_layers=2)
    got = values(written(config, tmp_path / "x.gguf")[0])
    np.testing.assert_array_equal(got["blk.3.ffn_up.weight"], got["blk.1.ffn_up.weight"])
    assert not np.array_equal(got["blk.2.ffn_up.weight"], got["blk.1.ffn_up.weight"])


@pytest.mark.parametrize(("precision", "kind"), [("fp16", "F16"), ("int8", "Q8_0"), ("int4", "Q4_0")])
def test_matrices_leave_with_the_values_that_are_scored(precision: Precision, kind: str, tmp_path: Path) -> None:
    reader, tensors = written(dataclasses.replace(LLAMA, qkv_bias=True), tmp_path / "x.gguf", precision)
    got = values(reader)
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == ("F32" if "norm" in tensor.name or "bias" in tensor.name else kind), tensor.name
    for theirs, ours in (("token_embd.weight", "embed.tokens.weight"), ("blk.1.ffn_down.weight", "ffns.1.down.weight")):
        stored, scales = quantise(tensors[ours], precision)
        scored = dequantise(stored, None if scales is None else scales.half(), {"fp16": 16, "int8": 8, "int4": 4}[precision])
        np.testing.assert_array_equal(got[theirs], scored.numpy())
        assert np.abs(got[theirs] - tensors[ours].numpy()).max() > 0


def test_a_tokenizer_leaves_with_its_merges_and_fills_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"line {i} of a text that is long enough" for i in range(2000)), encoding="utf-8")
    tokenizer = train_tokenizer(load_corpus(str(tmp_path / "text.txt")), 290, tmp_path / "tokenizer.json")
    config = dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size + 2)
    tensors = dict(SLM(config).initialise(0).named_parameters())
    reader = gguf.GGUFReader(write_gguf(tmp_path / "x.gguf", config, tensors, tokenizer))
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == config.vocab_size
    assert tokens[tokenizer.encode(" line")[0]].startswith("Ġ")
    assert tokens[tokenizer.end_of_text] == "<|endoftext|>"
    assert [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL] == [tokenizer.end_of_text]
    assert list(kinds[-2:]) == [gguf.TokenType.UNUSED] * 2
    assert len(field(reader, "tokenizer.ggml.merges")) == tokenizer.vocab_size - 257
    assert field(reader, "tokenizer.ggml.bos_token_id") == field(reader, "tokenizer.ggml.eos_token_id") == tokenizer.end_of_text
    assert field(reader, "tokenizer.ggml.pre") == "gpt-2"


def test_a_file_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    _, tensors = written(LLAMA, path)
    before = path.read_bytes()
    with pytest.raises(KeyError, match=r"head\.norm\.weight"):
        write_gguf(path, LLAMA, {name: t for name, t in tensors.items() if name != "head.norm.weight"}, None)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
