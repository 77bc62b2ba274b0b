"""What both sides are given: weights from a seed, tokens, and PyTorch's logits to check against."""

from pathlib import Path

import torch
from cells import CONFIGS, Cell
from made_from import digest, maker
from safetensors.torch import save_file

from cost_models.measured import randomise
from search_spaces.model import SLM
from search_spaces.quantisation import round_weights

SEED = 0
_MAKER = maker(
    ("torch",),
    (
        "benchmarks/engine_inputs.py",
        "cost_models/measured.py",
        *(f"search_spaces/{name}.py" for name in ("config", "model", "operators", "precision", "quantisation")),
    ),
)


def inputs_folder(work: Path, config: str) -> Path:
    """The folder of everything made for a config, another one once its architecture, the seed or what makes the files has changed.

    Old ones stay until somebody removes them.

    Args:
        work: where exports, kernels and results lie.
        config: a name in `cells.CONFIGS`.
    """
    return work / f"{config}-{digest(CONFIGS[config].to_dict(), SEED, _MAKER)}"


def weights_path(folder: Path) -> Path:
    """The file of a config's weights."""
    return folder / "weights.safetensors"


def inputs_path(folder: Path, cell: Cell) -> Path:
    """The file of a cell's inputs and expected logits; threads do not matter to it, the precision of the weights does."""
    return folder / f"{cell.phase}-{cell.length}-{cell.precision}.safetensors"


def write_inputs(cell: Cell, folder: Path) -> None:
    """Writes the weights of a cell's config and its inputs, unless they are there."""
    path, config = inputs_path(folder, cell), CONFIGS[cell.config]
    if path.exists() and weights_path(folder).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = randomise(SLM(config), SEED).eval()
    if not weights_path(folder).exists():
        _write(weights_path(folder), {name: p.detach() for name, p in model.named_parameters()})
    round_weights(model, cell.precision)  # type: ignore[arg-type]
    ids_1S = torch.randint(config.vocab_size, (1, cell.length + 1), generator=torch.Generator().manual_seed(SEED))
    prefix_1C, token_11 = ids_1S[:, : cell.length], ids_1S[:, cell.length :]
    with torch.inference_mode():
        logits, caches = model.prefill(prefix_1C)
        if cell.phase == "prefill":
            _write(path, {"tokens": prefix_1C, "logits": logits})
            return
        logits, _ = model.decode(token_11, caches)
    rows = {f"cache.{i}.{part}": rows for i, layer in enumerate(caches) for part, rows in enumerate(layer)}
    _write(path, {"tokens": token_11, "prefix": prefix_1C, "logits": logits, **rows})


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, part)
    part.replace(path)
