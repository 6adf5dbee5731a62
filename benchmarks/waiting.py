"""Seconds of a training step while another program takes a core: threads that spin, and threads that sleep.

python benchmarks/waiting.py

Each row is a training of the demo's flange in a process of its own; the result must be the same in all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAYS = {"spin (libgomp's default)": {"GOMP_SPINCOUNT": "300000"}, "sleep (ours)": {}}
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def train(extra: dict[str, str], steps: int) -> tuple[float, dict]:
    """Seconds of a step, and the results."""
    env = {k: v for k, v in os.environ.items() if k not in NAMES} | extra
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--config", "configs/demo.yaml", "--category", "flange"]
        command += ["--model", "remind", "--iterations", str(steps), "--output", folder, "--quiet"]
        command += ["--precision", "fp32"]
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        (path,) = Path(folder).rglob("metrics.json")
        tree = json.loads(path.read_text())
    return tree["timing"]["s_per_iteration"], tree["results"]


def main() -> None:
    """Print one row per way to wait and number of busy cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="of each training")
    parser.add_argument(
        "--busy", type=int, nargs="+", default=[0, 1], help="cores that another program takes"
    )
    parser.add_argument("--repeats", type=int, default=1, help="the fastest counts")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, {args.steps} steps\n")
    print("| threads | busy cores | s per step |\n| --- | --- | --- |", flush=True)
    seen = []
    for busy in args.busy:
        for name, extra in WAYS.items():
            with busy_cores(busy):
                found = [train(extra, args.steps) for _ in range(args.repeats)]
            seen += [results for _, results in found]
            print(f"| {name} | {busy} | {min(seconds for seconds, _ in found):.3f} |", flush=True)
    same = all(results == seen[0] for results in seen)
    print("\nresults: " + ("the same in all" if same else "THEY DIFFER"))


if __name__ == "__main__":
    main()
