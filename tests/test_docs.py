"""The commands that README and docs print parse, and those that the demo's images suffice for run."""

import printed_commands
import pytest
from conftest import ROOT
from test_imports import CORE

from datasets.registry import SPECS


def test_every_printed_command_parses():
    commands = list(printed_commands.printed_commands(printed_commands.documents()))
    assert len(commands) > 40
    for command in commands:
        printed_commands.check(command)


@pytest.mark.slow
def test_printed_commands_run(tmp_path):
    runner = printed_commands.Runner(tmp_path)
    # the log tells what was run once; tests/test_demo.py trains on the demo
    guides = [path for path in printed_commands.documents() if path.name != "LOG.md"]
    commands = printed_commands.printed_commands(guides)
    once = {command.text: command for command in commands}
    found = {text: runner.run(command) for text, command in once.items()}
    assert {text: what for text, what in found.items() if what.startswith("FAILED")} == {}
    assert list(found.values()).count("ran") >= 10


@pytest.mark.parametrize("line", [
    "python train.py --no-such-flag",
    "python train.py --config configs/mvtec.yaml --set train.iteration=3",
    "python train.py --config configs/no_such.yaml",
    "python predict.py --checkpoint RUN x --safe overlay",
    "python no_such.py",
    "python -m scripts.tables.no_such",
    "bash scripts/datasets/mvtec.sh DIR --setting many-class",
    "python test.py --checkpoint RUN --set score.nope=1",
    "python -m datasets.chek --dataset btad --data-root DIR",
    "python -m datasets.check --no-such-flag",
    "python -m scripts.tables.leakage --no-such-flag",
    "bash scripts/tables/accuracy.sh --no-such-flag",
    "bash scripts/tables/table01.sh --no-such-flag",
    "bash scripts/figures/figure_smoothing.sh --no-such-flag",
])  # fmt: skip
def test_a_wrong_command_is_found(tmp_path, line, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"```\n{line} # why\n```\nand `python train.py --inline` is left alone\n")
    (command,) = printed_commands.printed_commands([page])
    assert "#" not in command.text
    with pytest.raises(printed_commands.DocsError, match="page.md"):
        printed_commands.check(command)


def test_continued_lines_and_alternatives(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```\npython train.py --seed 1 \\\n    [--set a=1 | --set b=2]\n```\n")
    (command,) = printed_commands.printed_commands([page])
    assert command.text == "python train.py --seed 1"


def test_commands_in_loops_and_lists_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("- why:\n  ```\n  for s in 0 1; do\n      python train.py --seed $s\n  done\n  ```\n")
    (command,) = printed_commands.printed_commands([page])
    printed_commands.check(command)
    assert command.text == "python train.py --seed '$s'"


def test_the_tree_of_the_code_names_each_file():
    text = (ROOT / "docs/CODE.md").read_text()
    tree = text.split("```")[3].splitlines()
    folder, named = "", set()
    for line in filter(None, tree):
        name = line.split()[0]
        folder = "" if not line.startswith(" ") else folder
        if name.endswith("/"):
            folder = name
        else:
            named.add(folder + name)
    assert named == {p.relative_to(ROOT).as_posix() for p in CORE if p.name != "__init__.py"}
    assert len(text.splitlines()) <= 120


def counts_table():
    """Published counts by dataset as docs/DATASET_FACTS.md prints them; of many categories the sum."""
    head = ("dataset", "category", "must agree", "normal training", "normal test", "anomalous test",
            "anomalous training", "validation")  # fmt: skip
    rows = [head, ("---",) * len(head)]
    for spec in (s for s in SPECS.values() if s.counts):
        must = "each" if spec.verified else "the sum" if spec.verified_total else "no: a warning"
        shown = spec.counts
        if len(shown) > 4:
            shown = {f"all {len(shown)}": tuple(map(sum, zip(*shown.values(), strict=True)))}
        for category, numbers in shown.items():
            rows.append((f"`{spec.name}`", category, must, *(f"{n:,}" for n in numbers)))
    return "\n".join(" | ".join(row) for row in rows)


def test_counts_of_the_datasets_are_as_printed():
    assert counts_table() in (ROOT / "docs/DATASET_FACTS.md").read_text(), counts_table()
