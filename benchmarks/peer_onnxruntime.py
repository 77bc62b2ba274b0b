"""ONNX Runtime on its CPU provider: fixed shapes, every graph optimisation, inputs and outputs bound once."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from cells import PeerJob
from numpy.typing import NDArray
from peer_torch import arguments, exported


class OrtSession:
    """A session whose inputs and outputs stay where they are from run to run."""

    def __init__(self, path: Path, inputs: list[NDArray[np.generic]], threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        # Kept: a bound value must outlive the binding.
        self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in inputs]
        for spec, value in zip(self._session.get_inputs(), self._values, strict=True):
            self._binding.bind_ortvalue_input(spec.name, value)
        outputs = [(spec.name, ort.OrtValue.ortvalue_from_shape_and_type(spec.shape, np.float32)) for spec in self._session.get_outputs()]
        for name, value in outputs:
            self._binding.bind_ortvalue_output(name, value)
        self._logits = outputs[0][1]
        self._values += [value for _, value in outputs]

    def run(self) -> None:
        """One call."""
        self._session.run_with_iobinding(self._binding)

    def logits(self) -> NDArray[np.float32]:
        """Of the last call."""
        result: NDArray[np.float32] = self._logits.numpy()
        return result

    def close(self) -> None:
        """Nothing is left over."""


def load(job: PeerJob) -> OrtSession:
    """Opens the exported graph."""
    return OrtSession(exported(job), [tensor.numpy() for tensor in arguments(job)], job.cell.threads)
