"""Trained weights on disk: safetensors, every parameter once under its name in `SLM`, facts in the header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nas.errors import InvalidRun
from nas.evaluation import write_whole
from search_spaces.config import SLMConfig
from search_spaces.model import SLM

_FACTS = "edgewise"
_WITHIN = "model."
_OTHER = "it is not from the same model as its config.json"


def save_weights(path: Path, model: SLM, facts: Mapping[str, Any]) -> Path:
    """Writes a model's parameters whole; tied and shared ones once.

    Args:
        path: the file.
        model: on any device.
        facts: JSON values for the header, such as the score: one write keeps both or neither.
    """
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    # One entry only: safetensors writes several in an order that changes from process to process.
    header = {_FACTS: json.dumps({"config": model.config.key, **facts}, allow_nan=False)}
    return write_whole(path, save(tensors, metadata=header))


def read_facts(path: Path) -> dict[str, Any] | None:
    """The facts that `save_weights` put in the header; None if there is no such file, or it is not a whole one."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[_FACTS])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def load_weights(path: Path, config: SLMConfig, remedy: str = "export the model again") -> SLM:
    """The model of a config with the weights of a file, in evaluation mode.

    Args:
        path: the file.
        config: the architecture.
        remedy: what an error says to do.

    Raises:
        InvalidRun: if the file is missing or damaged, or its tensors are not those of the config.
    """
    model = SLM(config)
    try:
        with safe_open(path, framework="pt") as file:
            # transformers saves a model that it trained further under the name of the part that it is of.
            prefix = _WITHIN if all(name.startswith(_WITHIN) for name in file.keys()) else ""  # noqa: SIM118  (no mapping)
            names = {name.removeprefix(prefix) for name in file.keys()}  # noqa: SIM118
            wanted = dict(model.named_parameters())
            for name, parameter in wanted.items():
                if name not in names:
                    raise InvalidRun(f"{path} lacks the tensor {name!r} of this architecture; {_OTHER}; {remedy}")
                shape = tuple(file.get_slice(prefix + name).get_shape())
                if shape != tuple(parameter.shape):
                    raise InvalidRun(f"{path}: tensor {name!r} has shape {list(shape)}, not {list(parameter.shape)}; {_OTHER}; {remedy}")
            extra = sorted(names - wanted.keys())
            if extra:
                raise InvalidRun(f"{path} has the tensor {extra[0]!r}, which this architecture lacks; {_OTHER}; {remedy}")
            with torch.no_grad():
                for name, parameter in wanted.items():
                    parameter.copy_(file.get_tensor(prefix + name))
    except (OSError, SafetensorError) as error:
        reason = "there is no such file" if not path.exists() else str(error).splitlines()[0]
        raise InvalidRun(f"{path} cannot be read ({reason}); {remedy}") from error
    return model.eval()
