"""The config of a model that no family of transformers has; the folder of such a model carries this file with it."""

# mypy: disable-error-code="no-untyped-call"
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig


class EdgewiseConfig(PretrainedConfig):
    """An architecture of edgewise, under the names that transformers asks for.

    Args:
        architecture: the fields of `SLMConfig`.
        kwargs: what every config of transformers has.
    """

    model_type = "edgewise"

    def __init__(self, architecture: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.architecture = dict(architecture or {})
        names = {
            "vocab_size": "vocab_size",
            "hidden_size": "d_model",
            "num_hidden_layers": "num_layers",
            "max_position_embeddings": "context",
        }
        for theirs, ours in names.items():
            kwargs.pop(theirs, None)  # what the architecture says holds
            setattr(self, theirs, self.architecture.get(ours))
        kwargs["tie_word_embeddings"] = bool(self.architecture.get("tie_embeddings", True))
        super().__init__(**kwargs)
