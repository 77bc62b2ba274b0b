"""Weights of other families in safetensors files, read one tensor at a time into our model, and laid out for them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nas.errors import InvalidRun
from nas.huggingface.imported import Imported
from nas.huggingface.tensors import Entry, entries, names_of
from search_spaces.model import SLM

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_REMEDY = "take the folder again from where it is from"
_COMPUTED = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
"""Ends of names of tensors that older files hold and that are computed: masks and rotary frequencies."""


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights that `load` reads, as far as its names tell.

    Raises:
        InvalidRun: if it has weights, but only such as could run code when they are read.
    """
    if any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return True
    for name in _PICKLES:
        if (folder / name).exists():
            raise InvalidRun(f"{folder / name} is a pickle, which can run anything when it is read; save the weights as safetensors")
    return False


def load(folder: Path, imported: Imported) -> SLM:
    """The model of a folder's config.json with the folder's weights as float32, in evaluation mode.

    Raises:
        InvalidRun: if a file is missing or damaged, or its tensors are not those of the config.
    """
    names = names_of(imported.family, imported.config)
    with ExitStack() as stack:
        files = _open(folder, stack)
        # The bare decoder leaves out the prefix, a model around it has one more.
        found: dict[str, tuple[Any, str]] = {}
        for name, file in files.items():
            plain = name.removeprefix("model.") if name.startswith(f"model.{names.prefix}") else name
            if imported.family == "opt" and plain.startswith("decoder."):  # its bare model keeps a prefix of its own
                plain = f"model.{plain}"
            known = plain.startswith((names.prefix, f"{names.head}."))
            found[plain if known else names.prefix + plain] = (file, name)
        model = SLM(imported.config)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for entry in entries(imported.family, imported.config, imported.scales):
                if entry.theirs not in found:
                    raise InvalidRun(f"{folder} lacks the tensor {entry.theirs!r}, which its config.json asks for; {_REMEDY}")
                _fill(entry, _read(folder, *found.pop(entry.theirs)), parameters, folder)
        _check_rest(found, f"{names.head}.weight", model, folder)
    return model.eval()


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor's name, and the open file that has it."""
    path = folder / SINGLE
    try:
        if path.exists():
            file = stack.enter_context(safe_open(path, framework="pt"))
            return dict.fromkeys(file.keys(), file)
        path = folder / INDEX
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(index, dict):
            raise ValueError("weight_map is not an object")
        opened: dict[str, Any] = {}
        for shard in sorted(set(map(str, index.values()))):
            if Path(shard).name != shard or shard in ("", ".", ".."):
                raise ValueError(f"{shard!r} is not the name of a file beside it")
            path = folder / shard
            opened[shard] = stack.enter_context(safe_open(path, framework="pt"))
        return {name: opened[str(shard)] for name, shard in index.items()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = "there is no such file" if not path.exists() else str(error).splitlines()[0]
        raise InvalidRun(f"{path} cannot be read ({reason}); {_REMEDY}") from error


def _read(folder: Path, file: Any, name: str) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InvalidRun(f"{folder} has no whole tensor {name!r} ({str(error).splitlines()[0]}); {_REMEDY}") from error
    if not tensor.dtype.is_floating_point:
        raise InvalidRun(f"{folder}: tensor {name!r} is {tensor.dtype}, in a quantised form that is not read; choose the model in float")
    return tensor.float()


def _fill(entry: Entry, theirs: Tensor, parameters: Mapping[str, Tensor], folder: Path) -> None:
    ours = [parameters[name] for name in entry.ours]
    wanted = entry.layout.join([p.to("meta") for p in ours]).shape
    if theirs.shape != wanted:
        shapes = f"shape {list(theirs.shape)}, not {list(wanted)}"
        raise InvalidRun(f"{folder}: tensor {entry.theirs!r} has {shapes}, which its config.json asks for; {_REMEDY}")
    for parameter, values in zip(ours, entry.layout.split(theirs), strict=True):
        parameter.copy_(values)


def _check_rest(found: Mapping[str, tuple[Any, str]], head: str, model: SLM, folder: Path) -> None:
    for name, (file, actual) in found.items():
        if name == head and model.config.tie_embeddings:
            if not torch.equal(_read(folder, file, actual), model.embed.tokens.weight):
                raise InvalidRun(f"{folder}: {name!r} is not the embedding, and tie_word_embeddings is true; correct config.json")
        elif not name.endswith(_COMPUTED):
            raise InvalidRun(f"{folder} has the tensor {actual!r}, which its config.json does not ask for; {_REMEDY}")


def laid_out(model: SLM, imported: Imported) -> Iterator[tuple[str, Tensor]]:
    """Our weights as a family's tensors, under its names."""
    parameters = {name: p.detach().cpu() for name, p in model.named_parameters()}
    for entry in entries(imported.family, imported.config, imported.scales):
        yield entry.theirs, entry.layout.join([parameters[name] for name in entry.ours]).contiguous()
