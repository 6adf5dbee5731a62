"""Copy metrics.json of finished runs into a folder for git, and print their tables and commands as Markdown.

python -m scripts.tables.collect checkpoints --output results/measured/core
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence

from evaluation.results import COLUMNS
from scripts.text import markdown
from utils.cli import new_parser, print_result, run_command, user_path
from utils.files import write_json
from utils.yaml_io import Tree

WITH_VALUE = {
    "--data-root": "DIR",
    "--save-every": None,
    "--test-data-root": "DIR2",
    "--output": None,
    "--checkpoint": "RUN",
}
DROPPED = ("--resume", "--debug", "--quiet", "--overwrite")


def main(argv: Sequence[str]) -> None:
    """Collect every finished run below a folder.

    Raises:
        ValueError: if there is none.
    """
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("runs", type=user_path, help="a folder with finished runs somewhere below it")
    parser.add_argument(
        "--output", type=user_path, help="where the copies go (default: nowhere; tables only)"
    )
    args = parser.parse_args(argv)
    runs = {}
    for path in sorted(args.runs.rglob("metrics.json")):
        tree = json.loads(path.read_text())
        tree["command"] = portable(tree["command"])
        tree.pop("identity", None)  # it has folders of this machine
        # dataset, setting, category and run folder name the copy; what follows is an evaluation of that run
        name = "-".join(path.relative_to(args.runs).parts[:-1])
        runs[name or args.runs.resolve().name] = tree
    if not runs:
        raise ValueError(f"no metrics.json below {args.runs}; train something first")
    for name, tree in runs.items():
        if args.output is not None:
            write_json(args.output / f"{name}.json", tree)
    print_result(results(runs))
    print_result("\n" + "\n".join(tree["command"] for tree in runs.values()))
    print_result("\n" + curves(runs))


def portable(command: str) -> str:
    """The command with folders of this machine replaced, and without flags that change no result."""
    words, portable_words = iter(shlex.split(command)), []
    for word in words:
        if word in WITH_VALUE:
            value, shown = next(words), WITH_VALUE[word]
            portable_words += [word, shown] if shown and value else []
        elif word not in DROPPED:
            portable_words.append(word)
    return shlex.join(portable_words)


def results(runs: dict[str, Tree]) -> str:
    """One row per run and category, in percent; columns that no run has are left out."""
    rows = [(name, key, tree, r) for name, tree in runs.items() for key, r in tree["results"].items()]
    rows = [row for row in rows if row[1] != "mean" or len(row[2]["results"]) > 2]
    shown = {k: title for k, title in COLUMNS.items() if any(r.get(k) is not None for *_, r in rows)}
    header = ["run", "category", "steps", *shown.values(), "training", "ms per image"]
    lines = [header]
    for name, key, tree, r in rows:
        values = ["" if r.get(k) is None else f"{100 * r[k]:.1f}" for k in shown]
        timing = tree["timing"]
        steps = str(tree["protocol"]["iterations"]) if "s_per_iteration" in timing else ""
        minutes = f"{timing['train_s'] / 60:.0f} min" if "train_s" in timing else ""
        lines.append([name, key, steps, *values, minutes, f"{timing['ms_per_image']:.0f}"])
    return markdown(lines)


def curves(runs: dict[str, Tree]) -> str:
    """Evaluations during training, one row each."""
    entries = [entry for tree in runs.values() for entry in tree.get("curve", [])]
    known = ("image_auroc", "pixel_auroc", "pixel_ap", "pro", "dsc", "miou")
    names = [n for n in known if any(entry.get(n) is not None for entry in entries)]
    lines = [["run", "step", *(COLUMNS[n] for n in names)]]
    for name, tree in runs.items():
        for entry in tree.get("curve", []):
            values = ["" if entry.get(n) is None else f"{100 * entry[n]:.1f}" for n in names]
            lines.append([name, str(entry["iteration"]), *values])
    return markdown(lines) if len(lines) > 1 else ""


if __name__ == "__main__":
    sys.exit(run_command(main))
