"""One measured process: builds a workload once, then runs it when told to, by JSON lines over pipes.

Standard library and torch only: the peer's environment runs it as well as ours. Each side has a process of
its own, so that libraries, memory peaks and thread pools do not mix, and the parent can let them take turns.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

GPU_SECONDS = 0.3  # what is faster is repeated for so long on a GPU
Workload = Callable[[], "Reply | None"]


class WorkerError(RuntimeError):
    """A measured process failed or was killed; the message is its own last word."""


@dataclass(frozen=True)
class Spec:
    """What to build. `count`: images or maps of a set; `channels`: of the similarity loss."""

    row: str
    variant: str = "peer"
    precision: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    batch: int = 8
    size: int = 256
    count: int = 0
    channels: int = 0


class Reply(TypedDict, total=False):
    """What a measured process answers: first facts about a workload, then of each run what it has."""

    operations: dict[str, float]  # fields of `Operations`
    stage_operations: dict[str, dict[str, float]]
    versions: str
    seconds: float
    peak_gb: float
    over_gb: float
    stages: dict[str, float]  # seconds of each
    convolution: float  # GFLOP/s, as is `product`
    product: float
    pro: float
    off: float  # maps from PyTorch's, as a share of their range


# --- the parent's side --------------------------------------------------------------------------------------


class Worker:
    """A running measured process; use as a context manager."""

    def __init__(self, python: str, script: Path, spec: Spec) -> None:
        threads = {"OMP_NUM_THREADS": str(spec.threads), "MKL_NUM_THREADS": str(spec.threads)}
        process = subprocess.Popen(  # noqa: S603 (our own script, in an interpreter the user named)
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads},
        )
        assert process.stdin and process.stdout
        self.process, self.requests, self.answers = process, process.stdin, process.stdout
        self.facts = self._ask({"do": "build", "spec": asdict(spec)})

    def run(self) -> Reply:
        """One timed run: `seconds`, `peak_gb`, `over_gb`, and what the workload itself returns."""
        return self._ask({"do": "run"})

    def _ask(self, request: Mapping[str, object]) -> Reply:
        try:
            self.requests.write(json.dumps(request) + "\n")
            self.requests.flush()
            line = self.answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process ended with code {self.process.wait()}; was memory short?")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(str(reply["error"]))
        return reply

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.requests.close()
        self.answers.close()
        self.process.wait()


# --- the measured side --------------------------------------------------------------------------------------


def serve(build: Callable[[Spec], tuple[Workload, Reply]]) -> None:
    """Answer requests on stdin until it closes. `build` gives the workload and facts about it.

    The first run of a workload is part of its building (warm-up). What libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    workload: Workload
    reply: Mapping[str, object]
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "build":
                spec = Spec(**request["spec"])
                workload, reply = build(spec)
                base = _resident_gb(spec.device)
            else:
                reply = _timed(workload, spec.device, base)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def _timed(workload: Workload, device: str, base: float) -> Reply:
    wait(device)
    found, seconds = _run(workload, device, 1)
    if device != "cpu" and seconds < GPU_SECONDS:  # its clocks rise with work, and a wait takes time
        found, seconds = _run(workload, device, round(GPU_SECONDS / seconds))
    peak = _peak_gb(device)
    return {"seconds": seconds, "peak_gb": peak, "over_gb": peak - base, **found}


def _run(workload: Workload, device: str, times: int) -> tuple[Reply, float]:
    """What the workload returns, and the seconds of one of several runs in a row."""
    start = time.perf_counter()
    for _ in range(times):
        found = workload() or {}
    wait(device)
    return found, (time.perf_counter() - start) / times


def wait(device: str) -> None:
    """Wait for a GPU to finish; nothing to do on a CPU."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def _peak_gb(device: str) -> float:
    """Largest memory so far: of the process on a CPU, of the tensors on a GPU."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _resident_gb(device: str) -> float:
    """Memory now; Linux only on a CPU."""
    if device != "cpu":
        import torch

        return torch.cuda.memory_allocated(device) / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30
