"""Seconds of training until an evaluation reaches an image AUROC: the command line of train.py after `--`.

python benchmarks/time_to.py --at 0.97 -- --dataset mvtec --data-root DIR --category screw --model remind \
    --iterations 1200 --set eval.every=100 --select best

Evaluations are not counted. With --select best they look at the test set: the time is a measure of speed, the
run no result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.cli import new_parser, print_result, run_command, user_path  # noqa: E402
from utils.tracking import validation_curve  # noqa: E402


def main(argv: Sequence[str]) -> None:
    """Train, and print one line."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("--at", type=float, default=0.97, help="image AUROC to reach")
    parser.add_argument("--output", type=user_path, help="folder of the run (default: one that is removed)")
    parser.add_argument("train", nargs=argparse.REMAINDER, help="-- and flags of train.py")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        output = str(args.output or folder)
        flags = [word for word in args.train if word != "--"]
        command = [sys.executable, "train.py", *flags, "--output", output, "--overwrite", "--quiet"]
        printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout  # noqa: S603
        run = Path(printed.strip().splitlines()[-1].rpartition(": ")[2])
        print_result(reached(run, args.at))


def reached(run: Path, at: float) -> str:
    """One line: seconds and steps until the first evaluation of at least `at`, and of the whole training."""
    timing = json.loads((run / "metrics.json").read_text())["timing"]
    each, curve = timing["s_per_iteration"], validation_curve(run)
    steps = next((point["iteration"] for point in curve if point["image_auroc"] >= at), None)
    best = max(point["image_auroc"] for point in curve)
    to = f"not reached, best {best:.4f}" if steps is None else f"{steps * each:.1f} s, {steps} steps"
    return f"image AUROC {at:g}: {to}; training {timing['train_s']:.1f} s, {each:.4f} s per step"


if __name__ == "__main__":
    sys.exit(run_command(main))
