"""The process that generates on a device reached by RPC: a session there, and `bundle_runner` on it.

Run as `python -m nas.remote_runner TARGET …`, the rest being the runner's own arguments. The host keeps the text and the
tokenizer; library, weights and cache are on the device.
"""

import sys
from collections.abc import Sequence

from nas.bundle_runner import main as run
from nas.bundle_runner import prepare
from targets.spec import DeviceSpec, InvalidDevice, load_spec

SESSION_S = 3600.0
"""The server ends a session after as many seconds; also the longest wait for a device in use."""


def main(arguments: Sequence[str]) -> int:
    """Runs the rest of the arguments on the first, a device; returns an exit status: 0 done, 2 a mistake, 1 anything else."""
    name, *rest = arguments
    try:
        spec = load_spec(name)
        host, port, key = _address(spec)
    except (InvalidDevice, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidDevice) else 1
    prepare({})
    from targets import tvm_rpc

    try:
        tvm_rpc.connect(host, port, key, SESSION_S, max(1, spec.cores), spec.affinity)
    except Exception as error:
        reason = " ".join(str(error).split())
        print(f"error: target {name!r} at {host}:{port} gives no session ({reason}); see `edgewise targets check {name}`", file=sys.stderr)
        return 1
    try:
        return int(tvm_rpc.on_device("nas.remote_runner:serve", rest))
    finally:
        tvm_rpc.disconnect()


def serve(session: object, arguments: Sequence[str]) -> int:
    """Runs a bundle in an open session."""
    return run(arguments, session)


def _address(spec: DeviceSpec) -> tuple[str, int, str]:
    """Where a session is to be had, and the key to name there; waits for a free server of a tracker's.

    Raises:
        InvalidDevice: if the device is not reached by RPC.
        OSError: if its tracker has no server.
    """
    if spec.kind not in ("rpc", "tracker"):
        raise InvalidDevice(f"target {spec.name!r} is not reached by RPC (kind={spec.kind!r}); leave out --target to run on this machine")
    if not spec.host or not spec.port:
        raise InvalidDevice(f"target {spec.name!r} does not say where it is; `edgewise targets add` makes a device that has host and port")
    if spec.kind == "rpc":
        return spec.host, spec.port, spec.key
    from targets.tracker import request

    return request(spec.host, spec.port, spec.key, SESSION_S, lambda: True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
