"""The commands that README and docs print parse; scripts/check_docs.py also runs them."""

import sys

import pytest
from conftest import ROOT

from datasets.registry import SPECS

sys.path.insert(0, str(ROOT / "scripts"))

import check_docs


def test_every_printed_command_parses():
    commands = list(check_docs.printed_commands(check_docs.documents()))
    assert len(commands) > 40
    for command in commands:
        check_docs.check(command)


@pytest.mark.parametrize("line", [
    "python train.py --no-such-flag",
    "python train.py --config configs/mvtec.yaml --set train.iteration=3",
    "python train.py --config configs/no_such.yaml",
    "python predict.py --checkpoint RUN x --safe overlay",
    "python scripts/no_such.py",
    "bash scripts/mvtec.sh DIR --setting many-class",
    "python test.py --checkpoint RUN --set score.nope=1",
    "python -m datasets.chek --dataset btad --data-root DIR",
    "python -m datasets.check --no-such-flag",
    "python scripts/april.py --no-such-flag",
    "bash scripts/accuracy.sh --no-such-flag",
])  # fmt: skip
def test_a_wrong_command_is_found(tmp_path, line, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"```\n{line} # why\n```\nand `python train.py --inline` is left alone\n")
    (command,) = check_docs.printed_commands([page])
    assert "#" not in command.text
    with pytest.raises(check_docs.DocsError, match="page.md"):
        check_docs.check(command)


def test_continued_lines_and_alternatives(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```\npython train.py --seed 1 \\\n    [--set a=1 | --set b=2]\n```\n")
    (command,) = check_docs.printed_commands([page])
    assert command.text == "python train.py --seed 1"


def test_commands_in_loops_and_lists_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("- why:\n  ```\n  for s in 0 1; do\n      python train.py --seed $s\n  done\n  ```\n")
    (command,) = check_docs.printed_commands([page])
    check_docs.check(command)
    assert command.text == "python train.py --seed '$s'"


def counts_table():
    """Published counts by dataset as docs/DATASETS.md prints them; of many categories the sum."""
    head = ("dataset", "category", "normal training", "normal test", "anomalous test",
            "anomalous training", "validation", "must agree")  # fmt: skip
    rows = [head, ("---",) * len(head)]
    for spec in (s for s in SPECS.values() if s.counts):
        must = "each" if spec.verified else "the sum" if spec.verified_total else "no: a warning"
        shown = spec.counts
        if len(shown) > 4:
            shown = {f"all {len(shown)}": tuple(map(sum, zip(*shown.values(), strict=True)))}
        for category, numbers in shown.items():
            cells = [f"{n:,}" for n in numbers] + [""] * (5 - len(numbers))
            rows.append((f"`{spec.name}`", category, *cells, must))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_counts_of_the_datasets_are_as_printed():
    assert counts_table() in (ROOT / "docs/DATASETS.md").read_text(), counts_table()
