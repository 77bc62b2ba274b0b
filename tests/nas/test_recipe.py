"""The recipe: what it writes is read by the tools it is for, says the same architecture, and trains."""

import dataclasses
import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from search_helpers import run_search, write_speeches
from strategies import random_config

from cost_models.measured import randomise
from nas.corpus import load_corpus
from nas.errors import InvalidRun
from nas.export import Chosen, choose_trial, export_trial, load_exported
from nas.litgpt_config import litgpt_config
from nas.recipe import Recipe, recipe_for, write_recipe, yaml_of
from nas.run import Run
from nas.search import Outcome
from search_spaces.config import InvalidConfig, SLMConfig
from search_spaces.counting import params
from search_spaces.model import SLM

HAS_LITGPT = importlib.util.find_spec("litgpt") is not None
HAS_TRAINER = all(importlib.util.find_spec(name) is not None for name in ("transformers", "accelerate"))
LLAMA = SLMConfig(vocab_size=300, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, attention="gqa", context=64)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Outcome, Path]:
    folder = tmp_path_factory.mktemp("recipe")
    text = write_speeches(folder / "speeches.jsonl")
    return (*run_search(folder / "run", load_corpus(str(text)), trials=1), text)


def chosen_of(searched: tuple[Run, Outcome, Path], config: SLMConfig) -> Chosen:
    """A trial of the search with another, random model."""
    run, outcome, _ = searched
    assert outcome.chosen is not None
    chosen = choose_trial(run, outcome.chosen.trial)
    config = dataclasses.replace(config, vocab_size=chosen.tokenizer.vocab_size)
    return dataclasses.replace(chosen, config=config, model=randomise(SLM(config), 0).eval())


def test_every_trial_has_a_recipe_and_the_folder_still_loads(searched: tuple[Run, Outcome, Path], tmp_path: Path) -> None:
    run, outcome, _ = searched
    assert outcome.chosen is not None
    folder = export_trial(run, outcome.chosen.trial, tmp_path / "out", "recipe")
    model, _ = load_exported(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    recipe = recipe_for(model.config)
    assert f"edgewise train my-model --corpus TEXT --tokens {recipe.tokens} --out trained" in card
    assert card.count("## Training it for real") == 1
    export_trial(run, outcome.chosen.trial, folder, "recipe")  # over itself
    assert (folder / "README.md").read_text(encoding="utf-8") == card
    compile((folder / "train.py").read_text(encoding="utf-8"), "train.py", "exec")


def test_litgpt_files_are_there_or_the_card_says_why(searched: tuple[Run, Outcome, Path], tmp_path: Path) -> None:
    write_recipe(chosen_of(searched, LLAMA), tmp_path)
    assert (tmp_path / "litgpt" / "model_config.yaml").exists()
    assert "litgpt pretrain --config litgpt/pretrain.yaml" in (tmp_path / "README.md").read_text(encoding="utf-8")
    write_recipe(chosen_of(searched, dataclasses.replace(LLAMA, series_activation=2)), tmp_path)
    assert not (tmp_path / "litgpt" / "model_config.yaml").exists()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "There is nothing for litgpt: litgpt cannot say series_activation=2: litgpt has no word for it." in card
    assert f"python train.py TEXT.txt --out trained{' --trust'}" in card


def test_budget_and_rates_follow_from_the_size() -> None:
    recipe = recipe_for(LLAMA)
    assert recipe.tokens == pytest.approx(20 * params(LLAMA), rel=0.05)
    large = recipe_for(SLMConfig(vocab_size=32_000, d_model=768, num_layers=12, num_heads=12, context=2048))
    assert large.matrix_rate == pytest.approx(8e-4 * 128 / 768 * math.sqrt(4 / 12))
    assert large.other_rate == 1.5e-2
    assert (large.window, large.batch_windows * large.window) == (1024, 131_072)
    assert large.micro_windows * large.window == 16_384
    assert large.steps * large.batch_windows * large.window == pytest.approx(large.tokens, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positions": "learned", "rotary_dim": None}, "positions='learned': litgpt has rotary positions only"),
        ({"attention": "mla", "kv_rank": 8, "num_kv_heads": None}, "attention='mla'"),
        ({"ffn_dim": [40, 48]}, "ffn_dim=(40, 48): every layer has the same sizes there"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"ffn": "standard"}, "activation='silu'"),
        ({"ffn_bias": True}, "attention_bias=False"),
        ({"ffn_bias": True, "attention_bias": True}, "qkv_bias=False"),
        ({"norm": "layernorm", "norm_bias": False}, "norm_bias=False"),
        ({"norm": "layernorm", "norm_bias": True, "qk_norm": True}, "qk_norm=True"),
        ({"embedding_scale": 2.0}, "embedding_scale=2.0"),
        ({"augmented_shortcuts": 1}, "augmented_shortcuts=1"),
        ({"sharing": "cycle", "num_unique_layers": 1}, "sharing="),
    ],
)
def test_what_litgpt_cannot_say_is_refused_by_its_field(changes: dict[str, Any], reason: str) -> None:
    config = SLMConfig.from_dict({**LLAMA.to_dict(), **changes})
    with pytest.raises(InvalidConfig) as refusal:
        litgpt_config(config, "x")
    assert str(refusal.value).startswith(f"litgpt cannot say {reason}")


def sayable(seed: int) -> SLMConfig:
    """A random architecture that litgpt can say."""
    rng = random.Random(seed)
    while True:
        config = random_config(rng, max_layers=3)
        values = {"positions": "rotary", "rotary_dim": config.rotary_dim or 2, "position_offset": 0, "augmented_shortcuts": 0}
        bias = rng.random() < 0.3
        values |= {
            "series_activation": 1,
            "sharing": "none",
            "num_unique_layers": None,
            "embedding_scale": rng.choice([1.0, config.d_model**0.5]),
        }
        values |= {"ffn_bias": bias, "attention_bias": bias, "qkv_bias": bias or rng.random() < 0.3}
        values |= {"activation": rng.choice(["gelu", "gelu_tanh"] if config.ffn == "standard" else ["silu", "gelu", "gelu_tanh"])}
        values |= {"norm_bias": config.norm == "layernorm", "qk_norm": config.qk_norm and config.norm == "rmsnorm"}
        try:
            config = SLMConfig.from_dict({**config.to_dict(), **values})
            litgpt_config(config, "x")
        except InvalidConfig:
            continue
        return config


@pytest.mark.skipif(not HAS_LITGPT, reason="litgpt is not installed (benchmarks/train-peers.txt)")
@pytest.mark.parametrize("seed", range(24))
def test_litgpt_makes_the_same_model_of_it(seed: int, tmp_path: Path) -> None:
    from litgpt.config import Config
    from litgpt.model import GPT

    config = sayable(seed)
    (tmp_path / "model_config.yaml").write_text(yaml_of(litgpt_config(config, "x")), encoding="utf-8")
    theirs = GPT(Config.from_file(tmp_path / "model_config.yaml"))
    if config.tie_embeddings:
        theirs.lm_head.weight = theirs.transformer.wte.weight
    assert sum(p.numel() for p in theirs.parameters()) == params(config)
    ours = randomise(SLM(config), seed).eval()
    theirs.load_state_dict(renamed(ours), strict=True)
    tokens = torch.randint(0, config.vocab_size, (2, config.context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens), ours(tokens), rtol=2e-4, atol=2e-4)


def renamed(model: SLM) -> dict[str, torch.Tensor]:
    """Weights under litgpt's names."""
    state = dict(model.state_dict())
    found = {"transformer.wte.weight": state["embed.tokens.weight"], "lm_head.weight": state["head.weight"]}
    if "head.bias" in state:
        found["lm_head.bias"] = state["head.bias"]
    names = {"attention.norm": "norm_1", "attention.out": "attn.proj", "attention.q_norm": "attn.norm_q", "attention.k_norm": "attn.norm_k"}
    gated = model.config.ffn == "gated"
    names |= {"ffn.norm": "norm_2", "ffn.down": "mlp.proj", "ffn.up": "mlp.fc_2" if gated else "mlp.fc", "ffn.gate": "mlp.fc_1"}
    for end in ("weight", "bias"):
        if f"head.norm.{end}" in state:
            found[f"transformer.ln_f.{end}"] = state[f"head.norm.{end}"]
        for i in range(model.config.num_layers):
            parts = [state[key] for name in "qkv" if (key := f"attentions.{i}.{name}.{end}") in state]
            if parts:
                found[f"transformer.h.{i}.attn.qkv.{end}"] = torch.cat(parts)
            for name, theirs in names.items():
                part, _, rest = name.partition(".")
                if (key := f"{part}s.{i}.{rest}.{end}") in state:
                    found[f"transformer.h.{i}.{theirs}.{end}"] = state[key]
    return found


@pytest.mark.skipif(not HAS_LITGPT, reason="litgpt is not installed (benchmarks/train-peers.txt)")
def test_litgpt_reads_its_arguments(searched: tuple[Run, Outcome, Path], tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser
    from litgpt.pretrain import setup

    write_recipe(chosen_of(searched, LLAMA), tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(setup)
    read = parser.parse_path(tmp_path / "litgpt" / "pretrain.yaml")
    recipe = recipe_for(chosen_of(searched, LLAMA).config)
    assert read.model_config.n_query_groups == 2
    assert read.train.max_tokens == recipe.tokens
    assert read.optimizer["init_args"]["lr"] == recipe.matrix_rate


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRAINER, reason="transformers and accelerate are not both installed")
@pytest.mark.parametrize("changes", [{}, {"series_activation": 2}])
def test_the_script_trains(searched: tuple[Run, Outcome, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "recipe"
    folder.mkdir()
    write_recipe(chosen_of(searched, dataclasses.replace(LLAMA, **changes)), folder)
    lines = [json.loads(line)["text"] for line in searched[2].read_text().splitlines()]
    (tmp_path / "text.txt").write_text("\n".join(lines[:10]), encoding="utf-8")
    more = ["max_steps=12", "warmup_steps=1", "logging_steps=4", "use_cpu=true"]
    command = [sys.executable, "train.py", "../text.txt", "--out", "../trained", *(f"--set={value}" for value in more)]
    trust = ["--trust"] if changes else []
    done = subprocess.run([*command, *trust], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads((tmp_path / "trained" / "checkpoint-12" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0] < 1.1 * math.log(load_exported(folder)[0].config.vocab_size)
    assert (tmp_path / "trained" / "model.safetensors").exists()


def test_yaml_is_read_as_it_was_written() -> None:
    yaml = pytest.importorskip("yaml")
    values = {
        "a": 1,
        "rate": 8e-5,
        "eps": 1e-10,
        "flag": True,
        "none": None,
        "text": "x: [y] # z\n'",
        "deep": {"b": [0.9, 0.99], "c": {"d": 0.5}},
    }
    assert yaml.safe_load(yaml_of(values)) == values


def test_a_recipe_has_a_step_at_least() -> None:
    recipe = Recipe(tokens=10, window=64, micro_windows=4, accumulate=1, matrix_rate=1e-3, other_rate=1e-2)
    assert recipe.steps == 1


def test_weights_of_a_run_can_be_begun_with(
    searched: tuple[Run, Outcome, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nas.cli import main

    run, outcome, text = searched
    assert outcome.chosen is not None
    trial = outcome.chosen.trial
    (tmp_path / "model.json").write_text(choose_trial(run, trial).config.to_json())
    common = ["train", str(tmp_path / "model.json"), "--corpus", str(text), "--tokens", "600", "--batch-tokens", "300", "--device", "cpu"]
    assert main([*common, "--out", str(tmp_path / "warm"), "--init", str(run.weights_path(trial))]) == 0
    assert main([*common, "--out", str(tmp_path / "cold")]) == 0
    first = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["loss"] for name in ("warm", "cold")]
    assert first[0] < first[1]
    with pytest.raises(InvalidRun, match="trial 77 is not in run"):
        choose_trial(run, 77)
