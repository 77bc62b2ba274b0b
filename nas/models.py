"""The models that people name: a published one, a config.json of ours or of Hugging Face's, a folder with weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from search_spaces.config import MODEL_TYPE, InvalidConfig, SLMConfig, read_fields

if TYPE_CHECKING:
    from nas.huggingface.imported import Imported
    from nas.tokenizer import Tokenizer
    from search_spaces.model import SLM


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    """A model as named on the command line.

    Attributes:
        name: as people know it.
        config: the architecture.
        folder: where its weights are; None if there are none.
        exact_tokens: most tokens for which our model computes what the file describes (a sliding window is attention
            over everything up to its length); `config.context` where that is all of them.
        notes: what was left out of the file without changing the model, a line each.
        imported: what the file of another family said.
    """

    name: str
    config: SLMConfig
    folder: Path | None = None
    exact_tokens: int
    notes: tuple[str, ...] = ()
    imported: "Imported | None" = None

    def load(self) -> "tuple[SLM, Tokenizer | None] | None":
        """The model with its weights, in evaluation mode, and its tokenizer if the folder has one; None without weights.

        Raises:
            InvalidRun: if the weights or the tokenizer are damaged, or of another model.
        """
        if self.folder is None:
            return None
        tokenizer = self._tokenizer(self.folder)
        if self.imported is not None:
            from nas.huggingface.weights import load

            return load(self.folder, self.imported), tokenizer
        from nas.export import WEIGHTS
        from nas.weights import load_weights

        return load_weights(self.folder / WEIGHTS, self.config), tokenizer

    def _tokenizer(self, folder: Path) -> "Tokenizer | None":
        """Ours, if the weights' header says what tokenizer.json has no room for, else a published one."""
        from nas.errors import InvalidRun
        from nas.export import TOKENIZER, WEIGHTS
        from nas.tokenizer import Tokenizer
        from nas.weights import load_weights, read_facts

        path = folder / TOKENIZER
        meta = (read_facts(folder / WEIGHTS) or {}).get("tokenizer")
        if isinstance(meta, dict):
            tokenizer = Tokenizer.from_file(path, meta, "export the model again")
        elif self.imported is None:
            load_weights(folder / WEIGHTS, self.config)  # says what is wrong with it, if anything else is
            raise InvalidRun(f"{folder / WEIGHTS} does not say what tokenizer it goes with; export the model again")
        elif path.is_file():
            tokenizer = Tokenizer.published(folder)
        else:
            return None
        if tokenizer.vocab_size > self.config.vocab_size:
            found = f"{path} has {tokenizer.vocab_size} ids and vocab_size={self.config.vocab_size}"
            raise InvalidRun(f"{found}; they are not of the same model")
        return tokenizer


def named_model(text: str) -> NamedModel:
    """The model that a name or a path means: a published one, a config.json, or a folder with one.

    A config.json may be ours or of a family of `nas.huggingface.families`.

    Raises:
        InvalidConfig: if it is none of them, or the file describes what cannot be represented.
        InvalidRun: if the folder has weights only in a form that is not safe to read.
    """
    from search_spaces.references import reference, reference_names

    path = Path(text)
    if text not in reference_names():
        if path.exists():
            return model_at(path)
        if path.suffix == ".json" or len(path.parts) > 1:
            raise InvalidConfig(f"{text!r} does not exist; give a config.json, a folder with one, or a name such as smollm-135m")
    config = reference(text)
    return NamedModel(name=text, config=config, exact_tokens=config.context)


def model_at(path: Path) -> NamedModel:
    """The model of a config.json or of a folder with one.

    Raises:
        InvalidConfig: if it cannot be read, or describes what cannot be represented.
        InvalidRun: if the folder has weights only in a form that is not safe to read.
    """
    values = read_fields(path)
    folder = path if path.is_dir() else None
    if values.get("model_type", MODEL_TYPE) == MODEL_TYPE and ("model_type" in values or "architectures" not in values):
        from nas.export import is_export

        config = SLMConfig.from_dict(values)
        folder = folder if folder is not None and is_export(folder) else None
        return NamedModel(name=_name(path), config=config, folder=folder, exact_tokens=config.context)
    from nas.huggingface.families import read_family

    imported = read_family(values)
    if folder is not None:
        from nas.huggingface.weights import has_weights

        folder = folder if has_weights(folder) else None
    return NamedModel(
        name=_name(path), config=imported.config, folder=folder, exact_tokens=imported.exact_tokens, notes=imported.notes, imported=imported
    )


def _name(path: Path) -> str:
    """A folder's name, which says more than that of the config.json in it."""
    path = path.resolve()
    return path.parent.name if path.name == "config.json" and path.parent.name else path.name
