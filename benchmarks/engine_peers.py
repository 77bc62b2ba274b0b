"""The runtimes that compiled models are compared with; runs in the peers' own environment, one runtime a process.

    python engine_peers.py PEER

Reads lines of JSON, `["load", PeerJob]` or `["time", Timing]`, and answers each with one line: `{"value": ...}` or
`{"error": ...}`. Loading gives the largest error of the logits, relative to the largest of PyTorch's.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from cells import PeerJob
from numpy.typing import NDArray

PEERS = {
    "PyTorch eager": "peer_torch:eager",
    "torch.compile": "peer_torch:compiled",
    "ONNX Runtime": "peer_onnxruntime:load",
    "OpenVINO": "peer_openvino:load",
    "llama.cpp": "peer_llama:load",
}
"""Name -> "module:function", which takes a `PeerJob` and gives a `Session`."""

_PR_SET_PDEATHSIG = 1  # prctl(2)
_FEWEST_REPEATS = 3


class Session(Protocol):
    """A loaded model with its inputs in place."""

    def run(self) -> None:
        """One prefill or one decode step, finished when it returns."""

    def logits(self) -> NDArray[np.float32]:
        """What the last run gave, any shape of V values."""

    def close(self) -> None:
        """Frees what the end of the object does not."""


def times_s(run: Callable[[], None], timing: dict[str, Any]) -> list[float]:
    """Raw seconds per call, by the rules of `targets.measurement.Timing`: warm-up, repeats of enough calls each."""

    def elapsed(number: int) -> float:
        begin = time.perf_counter()
        for _ in range(number):
            run()
        return (time.perf_counter() - begin) / number

    elapsed(1)
    once, warm_until = elapsed(1), time.perf_counter() + timing["warmup_s"]
    while time.perf_counter() < warm_until:
        once = min(once, elapsed(1))
    number = max(1, round(timing["min_repeat_s"] / once))
    taken: list[float] = []
    until = time.perf_counter() + timing["budget_s"]
    while len(taken) < timing["repeats"] and (len(taken) < _FEWEST_REPEATS or time.perf_counter() < until):
        taken.append(elapsed(number))
    return taken


def relative_error(session: Session, inputs: str) -> float:
    """Largest difference of the logits over the largest expected magnitude."""
    from safetensors import safe_open

    with safe_open(inputs, framework="numpy") as file:
        expected = file.get_tensor("logits").ravel()
    session.run()
    return float(np.abs(np.asarray(session.logits()).ravel() - expected).max() / np.abs(expected).max())


def _serve(peer: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    session: Session | None = None
    reply: dict[str, Any]
    for line in sys.stdin:
        question, argument = json.loads(line)
        try:
            if question == "load":
                if session is not None:  # the last one goes before the next one comes
                    session.close()
                    session = None
                job = PeerJob.from_dict(argument)
                module, _, function = PEERS[peer].partition(":")
                session = getattr(importlib.import_module(module), function)(job)
                reply = {"value": relative_error(session, job.inputs)}
            else:
                assert session is not None
                reply = {"value": times_s(session.run, argument)}
        except Exception as error:
            import traceback

            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # stopped as it may be, it must not outlive who asked
    _serve(sys.argv[1])
