"""A chosen trial made by hand, of any architecture and precision, to export without a search."""

from pathlib import Path
from typing import Any

from cost_models.measured import randomise
from nas.corpus import Corpus
from nas.evaluation import Evaluation
from nas.export import Chosen
from nas.run import Run
from nas.tokenizer import train_tokenizer
from search_spaces.config import SLMConfig
from search_spaces.model import SLM
from search_spaces.precision import Precision
from targets.spec import DeviceSpec

TEXT = "My fellow citizens, this year’s harvest — wheat, maïze & ‘rye’ — was good. Ἀγαθόν 豊作です 🌾.\n"


def make_chosen(folder: Path, spec: DeviceSpec, precision: Precision = "fp32", target: str | None = "local", **config: Any) -> Chosen:
    """A model with random weights and a tokenizer of 300 ids, as if it had been searched on `spec`."""
    path = folder / "tokenizers" / "300.json"
    tokenizer = train_tokenizer(Corpus(name="text", licence="none", train=(TEXT * 9,), validation=(TEXT,)), 300, path)
    values: dict[str, Any] = {"d_model": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48, "context": 80, **config}
    architecture = SLMConfig(vocab_size=tokenizer.vocab_size, **values)
    manifest: dict[str, Any] = {
        "target": "local",
        "device": spec.to_dict(),
        "corpus": {"name": "text", "licence": "none", "sha256": "0" * 64},
        "settings": {"prompt_bytes": 64, "generate_bytes": 64, "sampler": "tpe", "speed": "request", "budget_bytes": 1000},
        "created": "2026-01-01",
        "space": {"name": "small"},
        "seed": 0,
        "versions": {},
    }
    evaluation = Evaluation(trial=3, state="complete", config=architecture, weights=precision, params=1, bytes_per_token=1.5)
    return Chosen(
        run=Run(folder, manifest),
        evaluation=evaluation,
        config=architecture,
        model=randomise(SLM(architecture), 0).eval(),
        tokenizer=tokenizer,
        tokenizer_path=path,
        facts={},
        target=target,
    )
