"""Run the commands that README.md and docs/ print, in small; or only see that they parse.

python scripts/check_docs.py --data mvtec=DIR --data kolektor=DIR
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from datasets.demo import write_demo
from utils.cli import log, new_parser, overrides, run_command, say
from utils.config import load_config
from utils.errors import ConfigError
from utils.yaml_io import parse_override

ROOT = Path(__file__).resolve().parent.parent
COMMAND = re.compile(r"(?:python|bash) ")
ALTERNATIVES = re.compile(r"\[[^\]]* [^\]]*\]")  # [--set a=1 | --set b=2]
SMALL = ("--iterations", "2", "--set", "data.image_size=64", "--set", "train.batch_size=2")
DATASET_SCRIPTS = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"base"}
PLACES = ("DIR", "PREPARED", "MIXED")  # folders of datasets
LONG = ("demo.sh", "test.sh", "accuracy.sh", "check_docs.py", "benchmarks/")  # minutes, or tests of their own


@dataclass(frozen=True)
class Printed:
    """A command of a document, without its comment, and where it stands."""

    words: tuple[str, ...]
    where: str

    @property
    def text(self) -> str:
        """As one would type it."""
        return shlex.join(self.words)


class DocsError(ValueError):
    """A printed command does not do what it says; the message names it."""


def main(argv: Sequence[str]) -> None:
    """Check every command; run those that the data at hand allows.

    Raises:
        DocsError: if any of them fails.
    """
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=DIR", help="a dataset at hand; may be repeated"
    )
    parser.add_argument("--parse-only", action="store_true", help="run nothing")
    parser.add_argument("--list", action="store_true", help="say what would be run or skipped, and why")
    parser.add_argument("files", nargs="*", type=Path, help="documents; default: README.md and docs/")
    args = parser.parse_args(argv)
    roots = {name: str(Path(folder).resolve()) for name, _, folder in (x.partition("=") for x in args.data)}
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        runner = None if args.parse_only else Runner(Path(scratch), roots, dry=args.list)
        for command in printed_commands(args.files or documents()):
            check(command)
            found = runner.run(command) if runner else "parsed"
            counts[found.partition(":")[0]] += 1
            log.info("%s: %s (%s)", found, command.text, command.where)
            if found.startswith("FAILED"):
                say(f"{found}\n  {command.where}: {command.text}")
    say(", ".join(f"{number} {what}" for what, number in sorted(counts.items())))
    if counts["FAILED"]:
        raise DocsError(f"{counts['FAILED']} printed commands fail; mend them or the text")


def documents() -> list[Path]:
    """README.md and everything below docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def printed_commands(files: Sequence[Path]) -> Iterator[Printed]:
    """The commands in fenced blocks, continued lines joined, each once for a document."""
    for path in files:
        seen = set()
        for block in re.findall(r"^ *```\w*\n(.*?)^ *```", path.read_text(encoding="utf-8"), re.S | re.M):
            for line in map(str.strip, block.replace("\\\n", " ").splitlines()):
                if COMMAND.match(line) and line not in seen:
                    seen.add(line)
                    words = shlex.split(ALTERNATIVES.sub("", line), comments=True)
                    yield Printed(tuple(words), path.name)


def check(command: Printed) -> None:
    """Parse a command as its program would, without running it.

    Raises:
        DocsError: if a file, flag or setting of it does not exist.
    """
    program, *flags = ["0" if word == "$s" else word for word in command.words[1:]]
    prints = f"{command.where} prints '{command.text}'"
    if program == "-m":
        program, *flags = f"{flags[0].replace('.', '/')}.py", *flags[1:]
        if importlib.util.find_spec(command.words[2]) is None:
            raise DocsError(f"{prints}, but there is no module {command.words[2]}")
        if not (ROOT / program).is_file():  # of Python itself
            return
    elif not (ROOT / program).is_file():
        raise DocsError(f"{prints}, but there is no {program}")
    stem = Path(program).stem
    if Path(program).suffix == ".sh" and stem in DATASET_SCRIPTS:
        program, flags = "train.py", ["--config", f"configs/{stem}.yaml", *flags[1:]]
    program = str(Path(program).with_suffix(".py"))
    try:
        if program == "train.py":
            check_settings(train.parse_arguments(flags))
        elif (ROOT / program).is_file():
            args = parsed(program, flags)
            for key, value in map(parse_override, getattr(args, "set", [])):
                if program == "test.py":
                    load_config(ROOT / "configs/mvtec.yaml", {key: value})
    except (SystemExit, ConfigError) as error:
        raise DocsError(f"{prints}, which does not parse: {error}") from error


def parsed(program: str, flags: Sequence[str]) -> argparse.Namespace:
    """What a program's main reads from its flags; it is left right after."""
    read: list[argparse.Namespace] = []

    class Enough(Exception):  # noqa: N818
        pass

    def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        read.append(args)
        raise Enough

    name = program.removesuffix(".py").removeprefix("scripts/").replace("/", ".")
    stop_early = mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args)
    alone = modules_of(ROOT / "benchmarks") if program.startswith("benchmarks/") else contextlib.nullcontext()
    with alone, stop_early, contextlib.suppress(Enough):
        importlib.import_module(name).main(flags)
    return read[0]


@contextlib.contextmanager
def modules_of(folder: Path) -> Iterator[None]:
    """Import from `folder` first; modules of the same name from elsewhere are put aside meanwhile."""
    names = [path.stem for path in folder.glob("*.py")]
    aside = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        yield
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(aside)


def check_settings(args: argparse.Namespace) -> None:
    """Build the configuration of a train.py command; placeholders such as $s and S stand for a value."""
    chosen = {k: v for k, v in overrides(args).items() if str(v) not in ("S", "G")}
    load_config(ROOT / (args.config or "configs/mvtec.yaml"), chosen, category=args.category)


class Runner:
    """Runs commands in a scratch folder, with placeholders replaced and trainings cut short."""

    def __init__(self, scratch: Path, roots: dict[str, str], *, dry: bool) -> None:
        demo = write_demo(scratch / "demo", size=64) / "brick"
        self.scratch, self.dry, self.roots = scratch, dry, roots | {"run": str(demo)}
        self.names = {
            "mypart": str(demo),
            "new_images": str(demo / "test"),
            "$s": "0",
            "S": "std",
            "G": "0.2",
        }
        self.names["checkpoints"] = str(scratch / "run")
        self.names["RUN"] = "RUN" if dry else self.a_run(demo)

    def a_run(self, demo: Path) -> str:
        """A finished run for commands that want one."""
        words = ["train.py", "--config", "configs/folder.yaml", "--data-root", str(demo), "--model"]
        output = ["--output", str(self.scratch / "run")]
        self.call([sys.executable, *words, "memory-bank", *output, *SMALL])
        return str(next((self.scratch / "run").rglob("last.pt")).parent)

    def run(self, command: Printed) -> str:
        """What became of it: "ran" ("would run"), "skipped: why" or "FAILED: why"."""
        program, *flags = command.words[1:]
        if program in ("-m", "-c") or program.startswith("scripts/prepare_"):
            return "skipped: has tests of its own"
        if any(name in program for name in LONG):
            return "skipped: takes minutes, or has tests of its own"
        root = self.roots.get(dataset_of(program, flags))
        if root is None and any(name in command.text for name in PLACES):
            return "skipped: its dataset is not given with --data"
        if self.dry:
            return "would run"
        named = [self.named(word, root or "") for word in flags]
        if program == "train.py":
            named += [*SMALL, "--output", str(self.scratch / "runs"), "--overwrite"]
        elif command.words[0] == "bash":
            named += [*SMALL, "--output", str(self.scratch / "runs"), "--set", "model.random_weights=true"]
        if "--tile" in flags:
            named += ["--tile", "64", "--set", "data.image_size=128"]
        try:
            self.call([sys.executable if command.words[0] == "python" else "bash", program, *named])
        except subprocess.CalledProcessError as error:
            return f"FAILED: {error.stderr.strip().splitlines()[-1] if error.stderr else error}"
        return "ran"

    def named(self, word: str, root: str) -> str:
        """A word with placeholders replaced."""
        word = re.sub(rf"^({'|'.join(PLACES)})(?=/|$)", root, word)
        key, equals, value = word.rpartition("=")
        return f"{key}{equals}{self.names.get(value, value)}"

    def call(self, words: Sequence[str]) -> None:
        """Run a file of the repository from its root, writing to the scratch folder where it has no other."""
        output = {"predict.py": "predictions", "test.py": "tested"}.get(words[1])
        extra = ["--overwrite", "--output", str(self.scratch / output)] if output else []
        env = os.environ | {"PYTHONWARNINGS": "ignore"}
        command = [*words, *extra]
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)  # noqa: S603


def dataset_of(program: str, flags: Sequence[str]) -> str:
    """The dataset that DIR stands for: the script's or config's, that of the finished run, or MVTec AD."""
    if Path(program).suffix == ".sh":
        return Path(program).stem
    if program == "test.py":
        return "none" if "--category" in flags else "run"  # another category than the run's has no data here
    return Path(flags[flags.index("--config") + 1] if "--config" in flags else "mvtec").stem


if __name__ == "__main__":
    sys.exit(run_command(main))
