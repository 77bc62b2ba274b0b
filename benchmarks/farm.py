"""Whether a pool of boards measures faster the more boards it has: TVM's servers on this machine, behind a tracker.

    python benchmarks/farm.py [--servers 6] [--candidates 24] [--rest 3]

This machine has fewer processors than a pool has boards, so the boards mostly sleep: each rests for `--rest` at the beginning of
a session, as a board that gets hot does (`cooldown_s`), and measures a tiny model then. Measures the same number of candidates
with 1, 2, … servers and prints a table of measurements a second, then JSON.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cost_models.measured import make_sample
from cost_models.program import build_program
from search_spaces.config import SLMConfig
from search_spaces.workload import RequestTokens
from targets.local import LocalTarget
from targets.measurement import Timing
from targets.rpc import RpcTarget
from targets.spec import load_spec
from targets.tracker import servers as registered

CONFIG = SLMConfig(vocab_size=61, d_model=32, num_layers=1, num_heads=2, ffn_dim=40, context=16)
TOKENS = RequestTokens(prompt=4, generated=10)
TIMING = Timing(repeats=1, min_repeat_s=0.0, warmup_s=0.0, retries=0)
KEY = "farm"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def farm(count: int, port: int) -> Iterator[None]:
    """A tracker at the port with as many servers."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    head = [sys.executable, "-W", "ignore", "-m"]
    tracker = [*head, "tvm.exec.rpc_tracker", "--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1)]
    running: list[subprocess.Popen[bytes]] = [subprocess.Popen(tracker, **quiet)]  # type: ignore[call-overload]
    try:
        for _ in range(count):
            at = free_port()
            server = [*head, "tvm.exec.rpc_server", "--host", "127.0.0.1", "--port", str(at), "--port-end", str(at + 1)]
            server += ["--tracker", f"127.0.0.1:{port}", "--key", KEY]
            running.append(subprocess.Popen(server, **quiet))  # type: ignore[call-overload]
        while _count(port) < count:
            time.sleep(0.1)
        yield
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _count(port: int) -> int:
    try:
        return registered("127.0.0.1", port, KEY)
    except OSError:
        return 0


def throughput(target: RpcTarget, artifact: Path, candidates: int, threads: int) -> float:
    """Measurements a second of as many candidates, that many at once."""
    sample = make_sample(CONFIG, TOKENS, 0)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: target.measure(artifact, sample, TIMING), range(threads)))  # child processes start
        began = time.perf_counter()
        found = list(pool.map(lambda _: target.measure(artifact, sample, TIMING), range(candidates)))
        took_s = time.perf_counter() - began
    assert all(measured.errors for measured in found)
    return candidates / took_s


@click.command()
@click.option("--servers", type=click.IntRange(min=1), default=6, show_default=True)
@click.option("--candidates", type=click.IntRange(min=1), default=24, show_default=True)
@click.option("--rest", "rest_s", type=float, default=3.0, show_default=True, help="Seconds.")
def main(servers: int, candidates: int, rest_s: float) -> None:
    """Measures candidates on farms of 1, 2, … servers."""
    rates: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="edgewise-farm-") as folder:
        cache = Path(folder) / "cache"
        local = LocalTarget(load_spec("local"), cache)
        described = local.spec
        local.close()
        artifact: Path | None = None
        for count in sorted({1, 2, 3, servers}):
            port = free_port()
            spec = dataclasses.replace(described, name="farm", kind="tracker", host="127.0.0.1", port=port, key=KEY, cores=1)
            with farm(count, port):
                target = RpcTarget(spec, cache)
                assert target.spec
                artifact = artifact or target.compile(build_program(CONFIG, TOKENS), Path(folder) / "program")
                target.close()
                target = RpcTarget(dataclasses.replace(spec, cooldown_s=rest_s), cache)
                assert target.parallel == count
                rates[count] = throughput(target, artifact, max(count, candidates * count // servers), count)
                target.close()
    show(rates, rest_s)


def show(rates: dict[int, float], rest_s: float) -> None:
    """The table, then JSON."""
    table = Table("servers", "measurements a second", "of one server's")
    for count, rate in rates.items():
        table.add_row(str(count), f"{rate:.3f}", f"{rate / rates[1]:.2f}")
    Console().print(table)
    values: dict[str, Any] = {"rest_s": rest_s, "per_s": {str(count): rate for count, rate in rates.items()}}
    print(json.dumps(values))


if __name__ == "__main__":
    main()
