"""A GPU on this machine or behind a session: what it is, and two kernels that say what it can do at most.

Runs in worker processes: in the one that measures for what asks the GPU, in the one that compiles for what is compiled.
"""

from pathlib import Path
from typing import Any

import tvm
from tvm import te, tirx

from targets.gpu import PROBE_PARTS, PROBE_SIZE, PROBE_WIDTH, GpuKind
from targets.job import READ_VALUES
from targets.link import link_shared
from targets.schedules.gpu import schedule_for_gpu
from targets.toolchain import Toolchain
from targets.tvm_device_code import DeviceExecutable, device_code

_NAMES = {"cuda": "CUDA", "opencl": "OpenCL"}


class NoGpu(RuntimeError):
    """There is no such GPU, or TVM cannot reach it; the message is one line with what to do."""


def detect(kind: GpuKind) -> dict[str, Any]:
    """What this machine's first GPU is: `arch`, `memory_bytes` and `name`.

    Raises:
        NoGpu: if there is none.
    """
    name = _NAMES[kind]
    if not tvm.runtime.enabled(kind):
        what = "needs the driver and libcudart.so.13 of CUDA 13" if kind == "cuda" else "was built without it"
        raise NoGpu(f"TVM's runtime has no {name} here: it {what}; see docs/gpu.md")
    device = tvm.device(kind, 0)
    if not device.exist:
        raise NoGpu(f"this machine has no GPU that {name} knows; use --target local, or a device elsewhere")
    return describe(device)


def describe(device: Any) -> dict[str, Any]:
    """What a GPU says of itself: `arch` ("" if that is not NVIDIA's), `memory_bytes` and `name`.

    Args:
        device: of this process, or of an RPC session.
    """
    version = device.compute_version if device.type == "cuda" else None
    return {
        "arch": f"sm_{version.replace('.', '')}" if version else "",
        "memory_bytes": int(device.total_global_memory or 0),
        "name": str(device.device_name),
    }


def compile_probe(tools: Toolchain, path: Path) -> Path:
    """Compiles `product`, `read` and `ones` for a GPU into a shared library at `path`, as programs are compiled."""
    assert tools.gpu is not None, "a processor's probe is in tvm_probe.py"
    target = tvm.target.Target(tools.target)
    with target:
        kernels = schedule_for_gpu(tvm.IRModule({"product": _product(), "read": _read(), "ones": _ones()}), tools.gpu)
        named = {var.name_hint: kernel.with_attr("global_symbol", var.name_hint) for var, kernel in kernels.functions.items()}
        module = tvm.tirx.build(tvm.IRModule(named), target=target)
        code = device_code(module)
    return link_shared(DeviceExecutable(executable=module, codes=[code]), path, (), tools.triple, tools.linker)


def _product() -> Any:
    """One product as a model's weights are multiplied, see `gpu_kernels.py`."""
    size = PROBE_SIZE
    x, weight = te.placeholder((1, size, size), name="x"), te.placeholder((size, size, 1), name="weight")
    k = te.reduce_axis((0, size), name="k")
    return te.create_prim_func(
        [x, weight, te.compute((1, size, size), lambda b, i, j: te.sum(x[b, i, k] * weight[j, k, 0], axis=k), name="product")]
    )


def _read() -> Any:
    """Sums the steps of each part: the threads of a warp read side by side."""
    steps = READ_VALUES // (PROBE_PARTS * PROBE_WIDTH)
    data, s = te.placeholder((PROBE_PARTS, steps, PROBE_WIDTH), name="data"), te.reduce_axis((0, steps), name="s")
    return te.create_prim_func([data, te.compute((PROBE_PARTS, PROBE_WIDTH), lambda p, j: te.sum(data[p, s, j], axis=s), name="total")])


def _ones() -> Any:
    """Fills an array of any length."""
    return te.create_prim_func([te.compute((te.var("n", "int64"),), lambda _: tirx.const(1.0, "float32"), name="ones")])
