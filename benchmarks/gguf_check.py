"""Whether llama.cpp, given our GGUF files, is the model that PyTorch is: logits, greedy tokens, tokenizer, perplexity.

    build/peers/bin/python benchmarks/gguf_check.py

A small random model of every architecture that leaves as GGUF, in every precision. float32 must give the same tokens.
A small trained model's perplexity in F32 and Q8_0 must be within 1 % of PyTorch's in float32.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from llama import Llama
from rich.console import Console
from rich.table import Table

from cost_models.measured import randomise
from nas.corpus import load_corpus
from nas.gguf_export import gguf_architecture, write_gguf
from nas.tokenizer import train_tokenizer
from nas.training import Budget, train
from search_spaces.config import SLMConfig
from search_spaces.model import SLM
from search_spaces.precision import PRECISIONS
from search_spaces.quantisation import round_weights

ROOT = Path(__file__).resolve().parent.parent

LLAMA = SLMConfig(vocab_size=300, d_model=128, num_layers=3, context=64, attention="gqa", num_heads=4, num_kv_heads=2, ffn_dim=192)
GPT2 = SLMConfig(
    vocab_size=300, d_model=128, num_layers=3, context=64, num_heads=4, ffn="standard", activation="gelu_tanh", norm="layernorm",
    positions="learned", qkv_bias=True, attention_bias=True, ffn_bias=True,
)  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "llama, untied, wide heads": dataclasses.replace(LLAMA, tie_embeddings=False, head_dim=64, rotary_dim=64, rope_theta=1e5),
    "llama, shared layers": dataclasses.replace(LLAMA, num_layers=4, sharing="cycle", num_unique_layers=2),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, norm_eps=1e-6),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True),
    "gemma": dataclasses.replace(LLAMA, attention="mqa", num_kv_heads=1, activation="gelu_tanh", embedding_scale=128**0.5),
    "gpt2": GPT2,
    "gpt2, untied": dataclasses.replace(GPT2, tie_embeddings=False),
}
LIMITS = {"fp32": 5e-4, "fp16": 5e-3, "int8": 5e-2, "int4": 5e-2}
"""Largest difference of logits from PyTorch's on the same rounded weights, relative to the largest of them.

llama.cpp looks gelu up in a float16 table, and rounds activations as it does weights (to 8 bits for int4).
"""
TEXTS = (
    "My fellow citizens, we're 1,234 strong -- and it's 2026!\n\n  Two  spaces,\ttabs\r\n",
    "Größe, 大小, размер, 🙂👍🏽 and a\u00a0hard space",
    "a document that spells <|endoftext|> out",
    "".join(chr(c) for c in range(1, 0x250)),
)
PROMPT, GENERATED = 9, 24


def compare(config: SLMConfig, precision: str, path: Path) -> tuple[float, int]:
    """The largest relative error of the logits along PyTorch's greedy path, and how many tokens are the same."""
    model = randomise(SLM(config), 0).eval()
    write_gguf(path, config, dict(model.named_parameters()), None, precision)  # type: ignore[arg-type]
    round_weights(model, precision)  # type: ignore[arg-type]
    llama = Llama(path, config.context, 1, exact=True)
    ids = torch.randint(config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    llama.feed(ids)
    worst, same = 0.0, 0
    with torch.inference_mode():
        for _ in range(GENERATED):
            expected, got = model(torch.tensor([ids]))[0, -1], torch.from_numpy(llama.logits())
            worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
            same += int(got.argmax() == expected.argmax())
            ids.append(int(expected.argmax()))
            llama.feed(ids[-1:])
    llama.close()
    return worst, same


def check_tokenizer(folder: Path) -> bool:
    """Whether llama.cpp makes the ids that ours makes of every text."""
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "nas").glob("*.py")))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer(load_corpus(str(folder / "text.txt")), 2000, folder / "tokenizer.json")
    config = dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size + 3)
    path = write_gguf(folder / "words.gguf", config, dict(SLM(config).initialise(0).named_parameters()), tokenizer)
    llama, right = Llama(path, config.context, 1), True
    for text in TEXTS:
        same = llama.tokenise(text) == tokenizer.encode(text)
        Console().print(f"tokenizer on {text[:40]!r}: {'the same ids' if same else 'OTHER IDS'}", markup=False)
        right &= same
    llama.close()
    return right


def perplexities(folder: Path) -> dict[str, float]:
    """Of a small model trained on this project's text, per token of a held-out document: PyTorch's, and llama.cpp's in each precision."""
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*s/*.py")))
    (folder / "source.txt").write_text(text, encoding="utf-8")
    corpus = load_corpus(str(folder / "source.txt"))
    tokenizer = train_tokenizer(corpus, 1000, folder / "source.json")
    config = dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size, context=256)
    model, _ = train(config, corpus, tokenizer, Budget(train_bytes=200_000), seed=0)
    ids = [tokenizer.end_of_text, *tokenizer.encode(corpus.validation[0])][: config.context]
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:-1]]))[0]
    found = {"PyTorch, fp32": perplexity(logits, ids)}
    for precision in PRECISIONS:
        path = write_gguf(folder / f"trained-{precision}.gguf", config, dict(model.named_parameters()), tokenizer, precision)
        llama, rows = Llama(path, config.context, 1, exact=True), []
        for token in ids[:-1]:
            llama.feed([token])
            rows.append(torch.from_numpy(llama.logits()))
        llama.close()
        found[precision] = perplexity(torch.stack(rows), ids)
    return found


def perplexity(logits_SV: torch.Tensor, ids: list[int]) -> float:
    """e to the mean loss of each id but the first, given those before it."""
    return float(torch.nn.functional.cross_entropy(logits_SV.double(), torch.tensor(ids[1:])).exp())


def main() -> None:
    """Prints a table; exit status 1 if anything is off."""
    table, wrong = Table("model", "architecture", "weights", "largest error", "same greedy tokens"), 0
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, config) in enumerate(CONFIGS.items()):
            for precision in PRECISIONS:
                error, same = compare(config, precision, Path(folder) / f"{number}-{precision}.gguf")
                bad = error > LIMITS[precision] or (precision == "fp32" and same < GENERATED)
                wrong += bad
                row = (name, gguf_architecture(config), precision, f"{error:.1e}", f"{same} of {GENERATED}")
                table.add_row(*row, style="red" if bad else None)
        Console().print(table)
        wrong += not check_tokenizer(Path(folder))
        found = perplexities(Path(folder))
        expected = found["PyTorch, fp32"]
        for name, value in found.items():
            bad = name in ("fp32", "int8") and abs(value / expected - 1) > 0.01
            wrong += bad
            Console().print(f"perplexity {name}: {value:.4f} ({value / expected - 1:+.3%})", style="red" if bad else None)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
