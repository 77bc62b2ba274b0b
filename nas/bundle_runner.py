"""Continues a text with the model of a bundle: `python run.py "Once upon a time"`, or from Python:

```
import run

model = run.load()
print("".join(model.generate("Once upon a time", tokens=64)))
```

Needs apache-tvm (its runtime), numpy and tokenizers, no PyTorch. The only thing of a bundle that is executed is its compiled
library, after its hash was found to be the manifest's; who trusts the bundle trusts that library as any other program.
"""

import argparse
import codecs
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from targets.machine import Machine, Memory

MANIFEST, WEIGHTS, TOKENIZER = "manifest.json", "weights.safetensors", "tokenizer.json"
FORMAT = 1
_ITEM_BYTES = {"float32": 4, "float16": 2, "int64": 8, "int32": 4, "int8": 1}
_CHUNK_BYTES = 1 << 20
_CPUINFO = Path("/proc/cpuinfo")
_AGAIN = "export the model again"


class BundleError(ValueError):
    """A bundle that cannot be used here, or a request that it cannot answer; the message is one line that says what to do."""


# --- checking a bundle ------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, once it is known to be whole, of this format, and its own.

    Raises:
        BundleError: if there is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(manifest, dict)
        stated = manifest.pop("sha256")
    except FileNotFoundError:
        raise BundleError(f"{str(folder)!r} is no bundle: it has no {MANIFEST}; give a folder of `edgewise export --format tvm`") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, KeyError, AssertionError, RecursionError):
        raise BundleError(f"{path} is damaged, or not the manifest of a bundle; {_AGAIN}") from None
    if manifest.get("format") != FORMAT:
        raise BundleError(f"{path} has format {manifest.get('format')!r}, not {FORMAT}; use the version of edgewise that made it")
    if stated != manifest_sha256(manifest):
        raise BundleError(f"{path} was changed after the bundle was made (its sha256 is another); {_AGAIN}")
    return manifest


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """The hash that a manifest states of itself: of its other entries as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_files(folder: Path, files: Mapping[str, Any], later: Sequence[str] = ()) -> None:
    """Compares every file with the size and hash that the manifest states; of those in `later` the size alone.

    Raises:
        BundleError: if one is missing, cut off or changed.
    """
    for name, stated in files.items():
        if name in (".", "..") or "/" in name or "\\" in name:
            raise BundleError(f"{folder / MANIFEST} names the file {name!r}, which is outside the bundle; {_AGAIN}")
        path = folder / name
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != stated["bytes"]:
                    raise BundleError(f"{path} has {size} bytes, not {stated['bytes']}: it was cut off or changed; {_AGAIN}")
                if name not in later and hashlib.file_digest(file, "sha256").hexdigest() != stated["sha256"]:
                    raise BundleError(_changed(path))
        except FileNotFoundError:
            raise BundleError(f"{path} is missing; {_AGAIN}") from None
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def check_program(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses a manifest whose program is not in its files, or whose weights do not fill theirs.

    Raises:
        BundleError: if so.
    """
    files, weights = manifest["files"], manifest["weights"]
    for name in (manifest["program"]["library"], WEIGHTS, TOKENIZER):
        if name not in files:
            raise BundleError(f"{folder / MANIFEST} does not state the file {name!r}; {_AGAIN}")
    for weight in weights:
        size = math.prod(weight["shape"]) * _ITEM_BYTES[weight["dtype"]]
        if size != weight["bytes"]:
            raise BundleError(f"{folder / MANIFEST} gives {weight['name']!r} {weight['bytes']} bytes, and its shape {size}; {_AGAIN}")
    if sum(weight["bytes"] for weight in weights) > files[WEIGHTS]["bytes"]:
        raise BundleError(f"{folder / MANIFEST} states weights of more bytes than {WEIGHTS} has; {_AGAIN}")


def _changed(path: Path) -> str:
    return f"{path} was changed after the bundle was made (its sha256 is another); {_AGAIN}"


def check_processor(target: Mapping[str, Any], cpuinfo: Path = _CPUINFO) -> None:
    """Compares this machine with what the library was compiled for.

    Raises:
        BundleError: if it is of another kind, or lacks an instruction set that the library may use.
    """
    here = architecture()
    if here != target["machine"]:
        raise BundleError(f"this bundle was compiled for {target['machine']}, and this machine is {here}; export one with --target for it")
    known = processor_flags(cpuinfo)
    missing = [flag for flag in target["flags"] if flag not in known] if known else []
    if missing:
        raise BundleError(
            f"this bundle was compiled for {target['cpu']}, and this processor lacks {', '.join(missing)}; export one with --target for it"
        )


def architecture() -> str:
    """The kind of this machine, as Linux names it."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def processor_flags(cpuinfo: Path = _CPUINFO) -> set[str]:
    """Instruction sets of this processor as Linux names them; empty where they cannot be known, as under an emulator."""
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return set()
    words = {key.strip().lower(): value.split() for key, _, value in (line.partition(":") for line in lines)}
    here = architecture()
    if here.startswith("riscv"):  # rv64imafdcv_zicsr…
        first, *rest = "".join(words.get("isa", ())).split("_")
        return {*first[len("rv64") :], *rest}
    return set(words.get("flags" if here == "x86_64" else "features", ()))


def check_packages(requires: Mapping[str, str]) -> None:
    """Compares the installed packages with those that the bundle needs; of TVM the first two numbers of the version count.

    Raises:
        BundleError: if one is missing, or TVM is another.
    """
    wanted = requires["apache-tvm"]
    install = f"run `pip install apache-tvm=={wanted} numpy tokenizers`"
    for name in ("apache-tvm", "tokenizers"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise BundleError(f"{name} is not installed; {install}") from None
        if name == "apache-tvm" and found.split(".")[:2] != wanted.split(".")[:2]:
            raise BundleError(f"this bundle was compiled by TVM {wanted}, and {found} is installed; {install}")


# --- choosing tokens, and text from them --------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token, whatever the others say.
        top_k: only this many of the likeliest are drawn from; 0: all.
        top_p: only the likeliest whose probabilities just add up to this are drawn from (Holtzman et al., arXiv 1904.09751).
        seed: of the draws; None: another each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, holds, rule in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top-k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not holds:
                raise BundleError(f"{name}={value} is not {rule}; choose one that is")

    def chooser(self) -> Callable[[NDArray[Any]], int]:
        """A function that chooses from logits (V,), with a random generator of its own."""
        generator = np.random.default_rng(self.seed)
        return lambda logits: self._choose(logits, generator)

    def _choose(self, logits_V: NDArray[Any], generator: np.random.Generator) -> int:
        if self.temperature == 0 or self.top_k == 1:
            return int(logits_V.argmax())
        scaled = (logits_V.astype(np.float64) - float(logits_V.max())) / self.temperature
        weights = np.exp(scaled)
        order: NDArray[Any] = np.arange(len(weights))
        if self.top_k or self.top_p < 1:
            order = np.argsort(-scaled, kind="stable")[: self.top_k or None]  # stable: of equal ones the first stay
            weights = weights[order]
        if self.top_p < 1:
            kept = int(np.searchsorted(np.cumsum(weights), self.top_p * weights.sum())) + 1
            order, weights = order[:kept], weights[:kept]
        sums = np.cumsum(weights)
        drawn = int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))
        return int(order[min(drawn, len(order) - 1)])


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level BPE's tokens stands for (Radford et al. 2019, GPT-2).

    Printable characters of Latin-1 stand for themselves; the other bytes, in order, are the characters from 256 on.
    """
    themselves = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(byte): byte for byte in themselves} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TextStream:
    """Text from tokens as they come: bytes of a character that is not complete wait for the rest.

    Args:
        piece: the text of a token as the vocabulary has it, by id; None for an id it does not know.
    """

    def __init__(self, piece: Callable[[int], str | None]) -> None:
        self._piece, self._bytes = piece, byte_alphabet()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that is complete with this token; may be empty."""
        piece = self._piece(token) or ""
        return self._decoder.decode(bytes(self._bytes[c] for c in piece if c in self._bytes))

    def end(self) -> str:
        """What is left: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


# --- the model ----------------------------------------------------------------------------------


@dataclass
class Stats:
    """What a generation took.

    Attributes:
        prompt_tokens, tokens: read, with the end of text that every text begins with; and generated.
        load_s, prefill_s, decode_s: loading the model; reading the prompt; all further tokens.
        ended: why it stopped: "tokens" (as many as asked for), "end of text" or "context" (it is full).
    """

    prompt_tokens: int = 0
    tokens: int = 0
    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ended: str = "tokens"

    def __str__(self) -> str:
        rate = f", {(self.tokens - 1) / self.decode_s:.1f} tokens/s" if self.tokens > 1 and self.decode_s > 0 else ""
        return (
            f"loaded in {self.load_s:.2f} s; prompt of {self.prompt_tokens} tokens in {1000 * self.prefill_s:.1f} ms; "
            f"{self.tokens} generated in {self.decode_s:.2f} s{rate}; ended by {self.ended}"
        )


class Model:
    """A loaded bundle. Made by `load`."""

    def __init__(self, manifest: Mapping[str, Any], machine: Machine, tokenizer: Any) -> None:
        self.manifest = manifest
        self.context: int = manifest["program"]["rows"]
        self.end_of_text: int = manifest["end_of_text"]
        self.stats = Stats()
        self._machine, self._tokenizer = machine, tokenizer
        self._prefills = sorted((size, name) for name, size in manifest["prefills"].items())

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, begun by the end of text, as in training.

        Raises:
            BundleError: if it is not valid Unicode.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError):
            raise BundleError("the prompt is not valid Unicode text; check its encoding") from None
        return [self.end_of_text, *ids]

    def prefill(self, tokens: Sequence[int]) -> NDArray[Any]:
        """Reads 1 to `context` tokens from an empty cache; the logits (V,) of what follows."""
        size, name = next(entry for entry in self._prefills if entry[0] >= len(tokens))
        padded = np.full((1, size), self.end_of_text, np.int64)
        padded[0, : len(tokens)] = tokens
        inputs = {"tokens": padded, "positions": np.arange(size), "last": np.array([len(tokens) - 1])}
        return self._logits(name, inputs)

    def decode(self, token: int) -> NDArray[Any]:
        """Reads one more token, behind at least one and at most `context - 1`; the logits (V,) of what follows."""
        return self._logits("decode", {"tokens": np.array([[token]]), "positions": np.array([self._machine.rows])})

    def _logits(self, function: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        logits: NDArray[Any] = self._machine.call(function, inputs)["logits"].numpy()
        return logits.reshape(-1)

    def next_tokens(self, prompt: Sequence[int], tokens: int | None = None, sampling: Sampling | None = None) -> Iterator[int]:
        """The tokens that follow, until the end of text, as many as asked for, or a full context.

        Raises:
            BundleError: if the context has no room behind the prompt.
        """
        room = self.context - len(prompt)
        if room < 1:
            raise BundleError(f"the prompt is {len(prompt)} tokens, and the context {self.context}; give a shorter one")
        count = room if tokens is None else min(tokens, room)
        choose = (sampling or Sampling()).chooser()
        self.stats = Stats(prompt_tokens=len(prompt), load_s=self.stats.load_s, ended="tokens" if count == tokens else "context")
        began = time.perf_counter()
        logits = self.prefill(prompt)
        self.stats.prefill_s = time.perf_counter() - began
        while True:
            token = choose(logits)
            if token == self.end_of_text:
                self.stats.ended = "end of text"
                return
            self.stats.tokens += 1
            yield token
            if self.stats.tokens == count:
                return
            began = time.perf_counter()
            logits = self.decode(token)
            self.stats.decode_s += time.perf_counter() - began

    def generate(self, prompt: str, tokens: int | None = None, sampling: Sampling | None = None) -> Iterator[str]:
        """The text that follows a prompt, piece by piece.

        Args:
            prompt: any text, also none.
            tokens: most tokens to generate; None: until the context is full.
            sampling: how tokens are chosen; None: the likeliest.

        Raises:
            BundleError: if the context has no room behind the prompt.
        """
        text = TextStream(self._tokenizer.id_to_token)
        for token in self.next_tokens(self.encode(prompt), tokens, sampling):
            if piece := text.add(token):
                yield piece
        if piece := text.end():
            yield piece


def load(folder: str | Path | None = None, session: Any = None) -> Model:
    """The model of a bundle, checked before anything of it is executed.

    Args:
        folder: of the bundle; None: the one that this file is in.
        session: an open session of the device to run on, which has `load`, `device` and `machine`; None: this machine.

    Raises:
        BundleError: if the bundle is damaged, or compiled for another processor or TVM.
    """
    began = time.perf_counter()
    folder = Path(__file__).parent if folder is None else Path(folder)
    manifest = read_manifest(folder)
    try:
        check_program(folder, manifest)
        check_files(folder, manifest["files"], later=(WEIGHTS,))
        if session is None:
            check_processor(manifest["target"])
        check_packages(manifest["requires"])
        import tokenizers
        import tvm

        tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
        tokenizer.encode_special_tokens = True  # a prompt that spells out the end of text does not end
        program = manifest["program"]
        library, kind = folder / program["library"], manifest["target"]["device"]
        if session is None:
            device = tvm.device(kind)
            machine = Machine(tvm.runtime.load_module(str(library)), program, device)
        else:
            device = session.device(kind)
            machine = session.machine(session.load(library), program, device)
        machine.hold(_weights(folder / WEIGHTS, manifest, machine.memory))
        model = Model(manifest, machine, tokenizer)
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}); {_AGAIN}") from error
    model.stats.load_s = time.perf_counter() - began
    return model


def _weights(path: Path, manifest: Mapping[str, Any], memory: Memory) -> list[Any]:
    """The weights on the device, read one at a time into the memory they stay in, and hashed on the way."""
    digest = hashlib.sha256()

    def fill(view: memoryview, file: BinaryIO) -> None:
        for first in range(0, len(view), _CHUNK_BYTES):
            part = view[first : first + _CHUNK_BYTES]
            done = 0
            while done < len(part):
                count = file.readinto(part[done:])  # type: ignore[attr-defined]
                if not count:
                    raise BundleError(f"{path} ends too early; {_AGAIN}")
                done += count
            digest.update(part)

    with path.open("rb", buffering=0) as file:
        nbytes = sum(weight["bytes"] for weight in manifest["weights"])
        fill(memoryview(bytearray(manifest["files"][WEIGHTS]["bytes"] - nbytes)), file)  # the header, for other readers
        tensors = [memory.filled(w["shape"], w["dtype"], lambda array: fill(bytes_of(array), file)) for w in manifest["weights"]]
    if digest.hexdigest() != manifest["files"][WEIGHTS]["sha256"]:
        raise BundleError(_changed(path))
    return tensors


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


# --- the command --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, session: Any = None) -> int:
    """Prints what follows a prompt and returns an exit status: 0 done, 2 a mistake, 1 anything else.

    Args:
        arguments: of the command; None: the process's own.
        session: of the device to run on, as `load` takes it; None: this machine.
    """
    given = _parser().parse_args(arguments)
    asked = (given.temperature, given.top_k, given.top_p, given.seed)
    try:
        folder = Path(given.folder) if given.folder else Path(__file__).parent
        sampling = Sampling(
            temperature=(0.0 if asked == (None,) * 4 else 1.0) if given.temperature is None else given.temperature,
            top_k=given.top_k or 0,
            top_p=1.0 if given.top_p is None else given.top_p,
            seed=given.seed,
        )
        if given.tokens is not None and given.tokens < 1:
            raise BundleError(f"tokens={given.tokens} is not above 0; choose one that is")
        prepare(read_manifest(folder)["target"])
        model = load(folder, session)
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        for piece in model.generate(given.prompt, given.tokens, sampling):
            print(_harmless(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        print(flush=True)
        if given.stats:
            print(model.stats, file=sys.stderr)
    except BundleError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get("EDGEWISE_DEBUG") == "1":
            raise
        print(f"error: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Continues a text with the model of this folder.")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument("--folder", help="of the bundle; this file's own if left out")
    parser.add_argument("--tokens", type=int, help="most tokens to generate; until the context is full if left out")
    parser.add_argument("--temperature", type=float, help="above 0 to sample; 0, or no choice at all, takes the likeliest token")
    parser.add_argument("--top-k", type=int, help="sample from this many of the likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens that make up this probability")
    parser.add_argument("--seed", type=int, help="of the draws: the same text each time")
    parser.add_argument("--stats", action="store_true", help="print times to stderr at the end")
    return parser


def prepare(target: Mapping[str, Any]) -> None:
    """Settings that TVM reads when it is imported: its runtime alone, as many threads as compiled for, and no PyTorch,
    which TVM would import where it is installed, and whose threads would slow ours."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("TVM_NUM_THREADS", str(max(1, min(int(target.get("cores", cores)), cores))))
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # None is how Python marks a module as not there


def _harmless(text: str) -> str:
    """Text for a terminal: control characters, which could command it, are shown as U+FFFD."""
    return "".join(c if c in "\n\t" or c.isprintable() or ord(c) > 0x9F else "\ufffd" for c in text)


if __name__ == "__main__":
    sys.exit(main())
