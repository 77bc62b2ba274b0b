"""PyTorch as it is, and compiled; also the module that the other runtimes are exported from."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cells import PeerJob
from made_from import maker
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from search_spaces.config import SLMConfig
from search_spaces.model import SLM

_EXPORTER = maker(("torch", "onnx", "onnx-ir", "onnxscript"), ("benchmarks/peer_torch.py",))
"""What makes the ONNX files, beside what the folder of a config is named by."""


class Phase(nn.Module):
    """One phase of a model with tensors for inputs and outputs: logits (1, 1, V), then each layer's new rows."""

    def __init__(self, job: PeerJob) -> None:
        super().__init__()
        self.model, self.phase = SLM(SLMConfig.from_dict(job.config)), job.cell.phase
        stored = load_file(job.weights)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(stored[name])
        self.eval()

    def forward(self, tokens: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        if self.phase == "prefill":
            logits, rows = self.model.prefill(tokens)
        else:
            logits, rows = self.model.decode(tokens, list(zip(caches[::2], caches[1::2], strict=True)))
        return (logits, *(part for layer in rows for part in layer))


def arguments(job: PeerJob) -> tuple[Tensor, ...]:
    """The tokens, and for decode each layer's two caches, in the order that `Phase` takes them."""
    stored = load_file(job.inputs)
    layers = range(job.config["num_layers"] if job.cell.phase == "decode" else 0)
    return (stored["tokens"], *(stored[f"cache.{i}.{part}"] for i in layers for part in (0, 1)))


class TorchSession:
    """A callable in inference mode."""

    def __init__(self, call: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> None:
        self._call, self._inputs = call, inputs
        self._out: tuple[Tensor, ...] = ()

    def run(self) -> None:
        """One call."""
        with torch.inference_mode():
            self._out = self._call(*self._inputs)

    def logits(self) -> NDArray[np.float32]:
        """Of the last call."""
        result: NDArray[np.float32] = self._out[0].numpy()
        return result

    def close(self) -> None:
        """Nothing is left over."""


def eager(job: PeerJob) -> TorchSession:
    """PyTorch eager in float32."""
    torch.set_num_threads(job.cell.threads)
    return TorchSession(Phase(job), arguments(job))


def compiled(job: PeerJob) -> TorchSession:
    """`torch.compile` with weights frozen and kernels chosen by trying them: of its settings the fastest here, by far in decode."""
    import torch._inductor.config as inductor

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(job.folder) / "inductor"))
    torch.set_num_threads(job.cell.threads)
    torch._dynamo.reset()
    inductor.freezing = True
    return TorchSession(torch.compile(Phase(job), dynamic=False, mode="max-autotune-no-cudagraphs"), arguments(job))


def exported(job: PeerJob) -> Path:
    """The phase as an ONNX file with float32 weights, made once for a config, length and exporter, whatever the threads."""
    path = Path(job.folder) / f"onnx-{_EXPORTER}" / f"{job.cell.phase}-{job.cell.length}.onnx"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(path.stem + ".part.onnx")
        program = torch.onnx.export(Phase(job), arguments(job), dynamo=True, optimize=True, verbose=False)
        assert program is not None
        program.save(part, external_data=True)
        part.replace(path)  # the weights beside it keep the name that the graph knows
    return path
