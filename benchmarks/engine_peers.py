"""What compiled models are compared with; each function runs in a worker process of its own."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def torch_eager(config: dict[str, Any], prompt: int, context: int) -> dict[str, float]:
    """Median seconds of PyTorch's own prefill of `prompt` tokens and of one decode step against `context` rows."""
    import torch

    from search_spaces.config import SLMConfig
    from search_spaces.model import SLM

    model = SLM(SLMConfig.from_dict(config)).initialise(0).eval()
    ids = torch.randint(config["vocab_size"], (1, context))
    with torch.inference_mode():
        _, caches = model.prefill(ids)
        return {
            "prefill": _median_s(lambda: model.prefill(ids[:, :prompt])),
            "decode": _median_s(lambda: model.decode(ids[:, :1], caches)),
        }


def _median_s(run: Callable[[], object], repeats: int = 7, least_s: float = 0.05) -> float:
    def elapsed(number: int) -> float:
        begin = time.perf_counter()
        for _ in range(number):
            run()
        return (time.perf_counter() - begin) / number

    elapsed(1)
    number = max(1, round(least_s / elapsed(1)))
    return statistics.median(elapsed(number) for _ in range(repeats))
