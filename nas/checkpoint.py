"""Where a training stands, in one file: weights, moments, random state, losses. Tensors and JSON, nothing to run."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nas.errors import InvalidRun
from nas.training_step import Learner
from targets.files import whole

_MOMENTS = ("exp_avg", "exp_avg_sq")
_HEADER = "edgewise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a training has come to besides its weights.

    Attributes:
        losses: mean loss of each step so far, nats a token; their number is the step to take next, and with the settings
            gives the place in the data.
        train_s: seconds spent on those steps.
    """

    losses: tuple[float, ...] = ()
    train_s: float = 0.0


def save_checkpoint(path: Path, learner: Learner, progress: Progress, of: str = "") -> Path:
    """Writes everything that training goes on from; the file before is there until this one is whole.

    Args:
        path: of the file.
        learner: what was trained.
        progress: how far.
        of: what else decides a training besides the architecture; only the same is read back.
    """
    tensors = {name: value.detach().cpu() for name, value in _tensors(learner)}
    # Losses are float32 where they are made, so nothing is lost.
    tensors["losses"] = torch.tensor(progress.losses, dtype=torch.float32)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    header = {"config": learner.model.config.key, "step": len(progress.losses), "train_s": progress.train_s, "of": of}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        # One entry only: safetensors writes several in an order that changes from process to process.
        save_file(tensors, part, metadata={_HEADER: json.dumps(header)})
    return path


def load_checkpoint(path: Path, learner: Learner, of: str = "") -> Progress:
    """Puts a learner where it was when the file was written; as it is, if there is none.

    Raises:
        InvalidRun: if the file is damaged, or of another model or training (`of`).
    """
    if not path.exists():
        return Progress()
    remedy = "delete it to begin again from nothing"
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})[_HEADER])
            if header["config"] != learner.model.config.key:
                raise InvalidRun(f"checkpoint {str(path)!r} is of another architecture; {remedy}")
            if header.get("of", "") != of:
                raise InvalidRun(f"checkpoint {str(path)!r} is of another training; {remedy}")
            losses, step = file.get_tensor("losses").tolist(), int(header["step"])
            if len(losses) != step:
                raise ValueError(f"{len(losses)} losses of {step} steps")
            with torch.no_grad():
                _prepare(learner, step)
                for name, value in _tensors(learner):
                    value.copy_(file.get_tensor(name))
            torch.set_rng_state(file.get_tensor("random.cpu"))
            if "random.cuda" in file.keys() and torch.cuda.is_available():  # noqa: SIM118  (not a dict)
                torch.cuda.set_rng_state(file.get_tensor("random.cuda"))
            return Progress(losses=tuple(losses), train_s=float(header["train_s"]))
    except InvalidRun:
        raise
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InvalidRun(f"checkpoint {str(path)!r} cannot be read ({str(error).splitlines()[0]}); {remedy}") from error


def _prepare(learner: Learner, step: int) -> None:
    """Gives the optimiser the state it has after so many steps, its moments still to be filled."""
    for parameter in learner.model.parameters():
        learner.optimiser.state[parameter] = {
            # AdamW counts steps for each parameter, in float32, beside it on a GPU.
            "step": torch.tensor(float(step), dtype=torch.float32, device=parameter.device),
            **{name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in _MOMENTS},
        }


def _tensors(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """Weights and moments by name."""
    for name, parameter in learner.model.named_parameters():
        yield f"model.{name}", parameter
        for moment in _MOMENTS:
            yield f"{moment}.{name}", learner.optimiser.state[parameter][moment]
