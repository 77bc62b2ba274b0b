"""An estimate is a type of its own: it can never pass as a measurement."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cost_models.baseline import BytesBaseline
from cost_models.estimate import CostModel, Estimate
from cost_models.roofline import Roofline
from search_spaces.config import SLMConfig
from search_spaces.workload import RequestTokens
from targets.measurement import Measurement
from targets.spec import load_spec

CONFIG = SLMConfig(vocab_size=60, d_model=32, num_layers=2, context=32)
TOKENS = RequestTokens(prompt=6, generated=4)


@pytest.mark.parametrize("model", [Roofline(), BytesBaseline()], ids=lambda m: m.name)
def test_a_cost_model_names_itself_and_its_request_is_the_sum_of_its_parts(model: CostModel) -> None:
    found = model.estimate(CONFIG, TOKENS, load_spec("null"))
    assert found.model == model.name
    assert found.request_s == pytest.approx(found.prefill_s + TOKENS.generated * found.decode_s_per_token)
    assert found.prefill_s > 0
    assert found.decode_s_per_token > 0


def test_an_estimate_is_plain_json_and_no_measurement() -> None:
    estimate = Estimate(model="m", prefill_s=1.0, decode_s_per_token=0.5, request_s=3.0)
    values = json.loads(json.dumps(estimate.to_dict()))
    assert values == {"model": "m", "prefill_s": 1.0, "decode_s_per_token": 0.5, "request_s": 3.0}
    with pytest.raises((KeyError, TypeError)):
        Measurement.from_dict(values)


def test_estimating_loads_neither_torch_nor_tvm() -> None:
    """A search estimates far more candidates than it builds, and the command line estimates at once."""
    code = "import sys, cost_models.roofline, cost_models.baseline; print({'torch', 'tvm'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "set()"
