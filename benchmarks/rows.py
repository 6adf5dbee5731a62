"""The rows of the table, and how one is measured: ours, the peer and the machine in turn."""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from operations import Operations
from protocol import Reply, Spec, Worker, WorkerError

from utils.cli import log

HERE = Path(__file__).resolve().parent
SHAPES = ("peer", "paper", "released")


@dataclass(frozen=True)
class Row:
    """A line of the table in each of `variants`; only `peer`, the like for like, is paired with the peer.

    `per`: what one run is divided by to give the seconds that are shown. `limited`: convolutions and products
    make most of it, so a share of the machine's limit says something.
    """

    name: str
    title: str
    spec: Spec
    goal: str
    variants: tuple[str, ...] = ("peer",)
    per: int = 1
    limited: bool = True
    bf16: bool = False
    peer: bool = True


ROWS = (
    Row(
        "train", "training step, batch 8", Spec("train"), "fp32 2.3x and 75 %, bf16 4x; 5 GB", SHAPES,
        bf16=True,
    ),
    Row(
        "one", "one image, batch 1", Spec("predict", batch=1, count=1), "fp32 85 %, bf16 2.5x", SHAPES,
        bf16=True,
    ),
    Row(
        "many", "32 images, batch 8, s per image", Spec("predict", count=32), "fp32 85 %, bf16 3x", SHAPES,
        32,
        bf16=True,
    ),
    Row(
        "one-onnx", "one image, batch 1, the exported file in ONNX Runtime",
        Spec("onnx", batch=1, count=1), "", ("paper",), peer=False,
    ),
    Row(
        "many-onnx", "32 images, batch 8, s per image, the exported file in ONNX Runtime",
        Spec("onnx", count=32), "", ("paper",), 32, peer=False,
    ),
    Row(
        "similarity-256", "similarity loss, C = 256", Spec("similarity", size=64, channels=256),
        "2x, 80 %, 0.7 GB over inputs",
    ),
    Row("similarity-24", "similarity loss, C = 24", Spec("similarity", size=64, channels=24), "8x"),
    Row(
        "metrics", "all pixel metrics (peer: PRO alone), 160 maps, 200 regions",
        Spec("pixel-metrics", count=160), "0.4 s, PRO equal to 1e-3", limited=False,
    ),
    Row(
        "memory-bank", "memory bank on 32 images, and 8 scored (peer: PatchCore)",
        Spec("memory-bank", count=32), "", limited=False,
    ),
    Row(
        "start", "start of training, 320 images of 1024x1024", Spec("start", size=1024, count=320),
        "20 s", ("paper",), limited=False, peer=False, bf16=True,
    ),
)  # fmt: skip


@dataclass
class Measured:
    """Replies of the three processes, round by round, and what ours computes."""

    ours: list[Reply] = field(default_factory=list)
    peer: list[Reply] = field(default_factory=list)
    machine: list[Reply] = field(default_factory=list)
    operations: Operations = field(default_factory=Operations)
    versions: str = ""

    def seconds(self, side: str, per: int = 1) -> float | None:
        """Median of a side, None if it was not measured."""
        times = [reply["seconds"] for reply in getattr(self, side)]
        return statistics.median(times) / per if times else None

    def largest(self, side: str, key: str) -> float | None:
        """Largest `key` (a memory, a result) of a side."""
        return max((reply[key] for reply in getattr(self, side) if key in reply), default=None)

    def ratio(self) -> float | None:
        """Peer's time over ours, median over the rounds."""
        if not self.peer:
            return None
        return statistics.median(
            p["seconds"] / o["seconds"] for p, o in zip(self.peer, self.ours, strict=True)
        )

    def limit(self, per: int = 1) -> float | None:
        """Seconds that the operations need at the machine's throughput."""
        if not (self.machine and self.operations.total):
            return None
        convolution = statistics.median(m["convolution"] for m in self.machine)
        product = statistics.median(m["product"] for m in self.machine)
        return self.operations.limit(convolution, product) / per


@dataclass(frozen=True)
class Setup:
    """How to measure: interpreters (`peer_python` None: no peer), rounds, and what every spec shares."""

    python: str
    peer_python: str | None
    rounds: int
    device: str
    threads: int

    def worker(self, spec: Spec, *, peer: bool = False) -> Worker:
        """A started process for a spec."""
        spec = replace(spec, device=self.device, threads=self.threads)
        python = self.peer_python if peer else self.python
        assert python is not None
        return Worker(python, HERE / ("peer.py" if peer else "ours.py"), spec)


def measure(setup: Setup, spec: Spec, *, peer: bool, limited: bool) -> Measured:
    """Rounds of machine, peer, ours, in turn, after a warm-up of each.

    Raises:
        WorkerError: if ours or the machine's process fails; a failing peer only leaves its column empty.
    """
    found = Measured()
    wanted = {"ours": (spec, False)}
    if limited:
        wanted["machine"] = (replace(spec, row="machine"), False)
    if peer and setup.peer_python:
        # the peer is measured in fp32, as its users run it; ours may be faster in bf16
        wanted["peer"] = (replace(spec, precision="fp32"), True)
    with ExitStack() as stack:
        sides = started(setup, wanted, stack)
        found.operations = Operations(**sides["ours"].facts.get("operations", {}))
        if "peer" in sides:
            found.versions = str(sides["peer"].facts["versions"])
        for _ in range(setup.rounds):
            for name in reversed(sides):
                getattr(found, name).append(sides[name].run())
    return found


def started(setup: Setup, wanted: dict[str, tuple[Spec, bool]], stack: ExitStack) -> dict[str, Worker]:
    """The processes of a row, closed with `stack`; on a GPU they start at the same time, as memory allows it.

    Raises:
        WorkerError: if one fails that is not the peer, which is left out with a warning.
    """

    def start(spec: Spec, peer: bool) -> Worker:
        return stack.enter_context(setup.worker(spec, peer=peer))

    with ThreadPoolExecutor(1 if setup.device == "cpu" else len(wanted)) as pool:
        futures = {name: pool.submit(start, *side) for name, side in wanted.items()}
    if "peer" in futures and isinstance(error := futures["peer"].exception(), WorkerError):
        log.warning("no peer: %s", error)
        del futures["peer"]
    return {name: future.result() for name, future in futures.items()}


def stages(setup: Setup, spec: Spec) -> list[tuple[str, Operations, float, float]]:
    """(stage, operations, seconds, share of the limit) of each part of `train` or `predict`, medians."""
    with (
        setup.worker(replace(spec, row=f"{spec.row}-stages")) as ours,
        setup.worker(replace(spec, row="machine")) as rates,
    ):
        replies, machine = [], []
        for _ in range(setup.rounds):
            machine.append(rates.run())
            replies.append(ours.run()["stages"])
        measured = Measured(machine=machine)
        table = []
        for name, counts in ours.facts["stage_operations"].items():
            measured.operations = Operations(**counts)
            seconds = statistics.median(reply[name] for reply in replies)
            table.append((name, measured.operations, seconds, (measured.limit() or 0.0) / seconds))
    return table


__all__ = ["ROWS", "Measured", "Row", "Setup", "WorkerError", "measure", "stages"]
