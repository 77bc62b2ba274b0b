"""OpenVINO on the CPU: fixed shapes, latency hint, float32 throughout."""

import numpy as np
import openvino as ov
from cells import PeerJob
from numpy.typing import NDArray
from peer_torch import arguments, exported


class OpenVinoSession:
    """One infer request whose inputs are set once."""

    def __init__(self, model: "ov.Model", inputs: list[NDArray[np.generic]], threads: int) -> None:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",  # where the processor has bfloat16, the default would be that
        }
        self._request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
        for i, array in enumerate(inputs):
            self._request.set_input_tensor(i, ov.Tensor(array))

    def run(self) -> None:
        """One call."""
        self._request.infer()

    def logits(self) -> NDArray[np.float32]:
        """Of the last call."""
        result: NDArray[np.float32] = self._request.get_output_tensor(0).data
        return result

    def close(self) -> None:
        """Nothing is left over."""


def load(job: PeerJob) -> OpenVinoSession:
    """Reads the exported graph: its converter for PyTorch programs does not know grouped heads, and this one is faster."""
    inputs = [tensor.numpy() for tensor in arguments(job)]
    return OpenVinoSession(ov.Core().read_model(exported(job)), inputs, job.cell.threads)
