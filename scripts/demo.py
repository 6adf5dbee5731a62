"""The demo from images to decisions: memory bank, ReMIND, new images, one table. Flags are those of train.py.

bash scripts/demo.sh --model uninet --flavor paper
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import predict
import train
from datasets.build import DEMO_ROOT
from datasets.demo import DEMO_CATEGORIES, demo_pictures, write_demo
from evaluation.metrics import Results, mean_results
from evaluation.results import results_table
from utils.cli import print_result, run_command, when_stopped
from utils.runs import RESULTS

SHOWN = ("image_auroc", "pixel_auroc", "pixel_ap", "pro")
RATE = 0.05  # of false alarms, which the 20 held-out images of a category support
NEXT = """
report:              {report}
heatmaps of [4/4]:   {heatmaps}
your own images:     python train.py --config configs/folder.yaml --data-root DIR --minutes 10
the paper's setting: bash scripts/datasets/mvtec.sh DIR --category screw"""


@when_stopped("the same command goes on from there")
def main(argv: Sequence[str]) -> None:
    """Run the four stages, with a line before each, and say what came out and what comes next."""
    began = time.monotonic()
    again = [] if "--overwrite" in argv else ["--resume"]
    rest = [w for before, w in zip(["", *argv], argv, strict=False) if "--flavor" not in (before, w[:8])]
    bank = ["--config", "configs/demo.yaml", *again, *rest, "--model", "memory-bank"]
    trained = ["--config", "configs/demo.yaml", *again, "--model", "remind", *argv]
    args = train.parse_arguments(trained)  # a wrong flag is said at once
    number = sum(len(demo_pictures(category)) for category in DEMO_CATEGORIES)
    stage(1, f"{number} images of parts, {' and '.join(DEMO_CATEGORIES)}, rendered here: about 10 seconds")
    root = write_demo(Path(args.data_root or DEMO_ROOT))
    stage(2, "memory bank, the baseline, needs no training: about 20 seconds", bank)
    baseline = train_quietly(bank)
    stage(3, f"{args.model}, a model for each kind of part: about 3 minutes on two cores", trained)
    runs = train_quietly(trained)
    new = root / "new" / runs[-1].parent.name
    words = ["--checkpoint", str(runs[-1]), "--output", str(runs[-1] / "new"), "--overwrite"]
    words += ["--false-alarm-rate", str(RATE), str(new if new.is_dir() else new.parent)]
    stage(4, "decisions about new images, which no split holds: some seconds", words, program="predict.py")
    predict.main(words)
    print_result(f"\n{(time.monotonic() - began) / 60:.1f} minutes in all. On test images, percent:\n")
    print_result(table([*baseline, *runs]))
    print_result(NEXT.format(report=runs[-1] / "report.html", heatmaps=runs[-1] / "new" / "heatmaps"))


def stage(number: int, text: str, words: Sequence[str] = (), program: str = "train.py") -> None:
    """Say what comes, and the command that does it."""
    print_result(f"\n[{number}/4] {text}")
    if words:
        print_result(f"      python {program} {shlex.join(words)}")


def train_quietly(words: Sequence[str]) -> list[Path]:
    """Train as train.py would, its table left out; the folders of the runs."""
    command = shlex.join(["python", "train.py", *words])
    with contextlib.redirect_stdout(io.StringIO()):
        return train.train_all(train.parse_arguments(words), command=command)


def table(runs: Sequence[Path]) -> str:
    """One row per category and model, the baseline first, then the means; in percent."""
    found: dict[str, dict[str, Results]] = {}  # by category, then by model
    for path in (
        run / RESULTS for run in runs if (run / RESULTS).is_file()
    ):  # there is none with --eval none
        tree = json.loads(path.read_text())
        for category in (name for name in tree["results"] if name != "mean"):
            model = tree["identity"]["settings"]["model.name"]
            results = {name: tree["results"][category].get(name) for name in SHOWN}
            found.setdefault(category, {})[model] = results
    if len(found) > 1:
        models = dict.fromkeys(model for category in found.values() for model in category)
        found["mean"] = {m: mean_results([category[m] for category in found.values()]) for m in models}
    rows = {f"{name}, {model}": r for name, models in found.items() for model, r in models.items()}
    return results_table(rows).rstrip()


if __name__ == "__main__":
    sys.exit(run_command(main))
