"""The commands that README.md and docs/ print: found, parsed as their programs would, and run in small."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import processes
from conftest import ROOT

import train
from datasets.demo import write_demo
from utils.cli import overrides
from utils.errors import ConfigError
from utils.layers import load_config
from utils.yaml_io import parse_override

COMMAND = re.compile(r"(?:python|bash) ")
ALTERNATIVES = re.compile(r"\[[^\]]* [^\]]*\]")  # [--set a=1 | --set b=2]
SMALL = ("--iterations", "2", "--set", "data.image_size=64", "--set", "train.batch_size=2")
PLACES = ("DIR", "PREPARED", "MIXED")  # folders of datasets
LONG = (
    "venv",
    "test.sh",
    "demo.sh",
    "accuracy",
    "benchmarks",
    "backbones",
    "prepare",
    "tables.pages",
)  # minutes, or tests of their own


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


def documents() -> list[Path]:
    """README.md and everything below docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def printed_commands(files: Sequence[Path]) -> Iterator[Printed]:
    """The commands in fenced blocks, continued lines joined, each once per document."""
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
        if not importable(command.words[2]):
            raise DocsError(f"{prints}, but there is no module {command.words[2]}")
    elif not (ROOT / program).is_file():
        raise DocsError(f"{prints}, but there is no {program}")
    program, flags = behind(program, flags)
    program = str(Path(program).with_suffix(".py"))
    try:
        if program == "train.py":
            check_settings(train.parse_arguments(flags))
        elif (ROOT / program).is_file():  # not a module of Python itself
            args = parsed(program, flags)
            for key, value in map(parse_override, getattr(args, "set", [])):
                if program == "test.py":
                    load_config(ROOT / "configs/mvtec.yaml", {key: value})
    except (SystemExit, ConfigError) as error:
        raise DocsError(f"{prints}, which does not parse: {error}") from error


def behind(program: str, flags: list[str]) -> tuple[str, list[str]]:
    """The Python program that a script of a dataset, table or figure calls, and its flags."""
    kind, _, name = Path(program).stem.partition("_")
    if program.startswith("scripts/datasets/"):
        return "train.py", ["--dataset", Path(program).stem, *flags[1:]]
    if kind.startswith(("table", "figure")) and program.startswith("scripts/"):
        theory = kind == "figure" and name
        module = Path(program).with_name("theory.py" if theory else "reproduce.py")
        return str(module), [name or kind.removeprefix("table").removeprefix("figure"), *flags]
    return program, flags


def importable(module: str) -> bool:
    """Whether there is such a module."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def parsed(program: str, flags: Sequence[str]) -> argparse.Namespace:
    """What a program's main reads from its flags; it is left right after."""
    read: list[argparse.Namespace] = []

    class Enough(Exception):
        pass

    def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        read.append(args)
        raise Enough

    name = program.removesuffix(".py").replace("/", ".")
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
    load_config(ROOT / args.config, chosen, category=args.category)


class Runner:
    """Runs commands in a scratch folder, with placeholders replaced and trainings cut short."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        demo = write_demo(scratch / "demo", size=64) / "flange"
        self.names = {"mypart": demo, "new_images": demo / "test", "checkpoints": scratch / "run"}
        self.names["new_good_images"] = demo / "test/good"
        words = ["--config", "configs/folder.yaml", "--data-root", demo, "--model", "memory-bank"]
        processes.run("train.py", *words, *SMALL, "--output", scratch / "run")
        (last,) = (scratch / "run").rglob("last.pt")
        # the demo has fewer than 50 defects to move to the training set
        self.names |= {"RUN/model.onnx": last.with_name("model.onnx")}
        self.names |= {"RUN": last.parent, "$s": "0", "S": "std", "G": "0.2", "50": "4"}

    def run(self, command: Printed) -> str:
        """What became of it: "ran", "skipped" or the last line of its error."""
        _, program, *flags = command.words
        if program == "-m":
            program, *flags = flags
        needs_data = any(place in command.text for place in PLACES) and program != "test.py"
        endless = "--watch" in flags
        if needs_data or endless or "--category" in flags or any(name in program for name in LONG):
            return "skipped"
        words = [self.named(word) for word in flags]
        if program == "train.py":
            words += [*SMALL, "--output", str(self.scratch / "runs"), "--overwrite"]
            if "--minutes" in words:
                words[words.index("--minutes") + 1] = "0.01"
                at = words.index("--iterations")
                del words[at : at + 2]
        if program.startswith("examples/"):
            words += ["--output", str(self.scratch / "scores.csv")]
        if program in ("predict.py", "test.py"):
            words += ["--overwrite", "--output", str(self.scratch / program[:-3])]
        if "--tile" in flags:
            words += ["--tile", "64", "--set", "data.image_size=128"]
        if command.words[0] == "bash":
            done = subprocess.run(["bash", program, *words], cwd=ROOT, capture_output=True, text=True)
        else:
            done = processes.run(program, *words)
        return "ran" if done.returncode == 0 else f"FAILED: {done.stderr.strip().rpartition(chr(10))[2]}"

    def named(self, word: str) -> str:
        """A word with placeholders replaced."""
        word = re.sub(rf"^({'|'.join(PLACES)})$", str(self.scratch / "demo/flange"), word)
        key, equals, value = word.rpartition("=")
        return f"{key}{equals}{self.names.get(value, value)}"
