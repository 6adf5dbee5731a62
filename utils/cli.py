"""What the commands share: flags to settings, one-line errors, exit codes, logging."""

import argparse
import io
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from utils.config import RunOptions
from utils.device import PRECISIONS, keep_freed_memory
from utils.errors import ConfigError, UserError
from utils.layers import FLAVORS, MODELS, SETTINGS
from utils.yaml_io import parse_override

log = logging.getLogger("uninet")
USER_ERRORS = (UserError, ValueError, OSError, FloatingPointError)


@dataclass(frozen=True)
class Flag:
    """A flag that stands for one setting or option: where it is not given, that stays as it is."""

    setting: str
    help: str
    metavar: str | None = None
    kind: type = str
    choices: Sequence[str] | None = None
    nargs: str | None = None

    def add(self, parser: argparse._ActionsContainer, name: str, *, default: str | None = None) -> None:
        """Add it to a parser. default: what holds where it is not given, in words, if the help lacks them."""
        text = self.help if default is None else f"{self.help} (default: {default})"
        if self.kind is bool:
            parser.add_argument(f"--{name}", action="store_true", default=None, help=text)
        else:
            add, shown, kind, choices = parser.add_argument, self.metavar, self.kind, self.choices
            add(f"--{name}", metavar=shown, type=kind, choices=choices, nargs=self.nargs, help=text)


SKIP = Flag(
    "run.skip_unreadable",
    "leave out image files that cannot be read (listed in skipped.csv), take incomplete datasets",
    kind=bool,
)
EXTRA = Flag(
    "run.extra_metrics",
    "aupimo: recall at 1e-5 to 1e-4 false alarms; dsc_unias: UniAS's Dice, one threshold per class from "
    "the test masks; soft_dsc: DSC and mIoU of the public code, maps stretched, no threshold",
    metavar="NAME",
    choices=("aupimo", "dsc_unias", "soft_dsc"),
    nargs="+",
)
WHAT = {
    "data-root": Flag("run.data_root", "folder of the dataset (default: only the demo has one)", "DIR"),
    "category": Flag("data.category", "one category, or all", "NAME"),
    "setting": Flag("model.setting", "what a model is trained on (docs/SETTINGS.md)", choices=SETTINGS),
    "model": Flag("model.name", "the network (--list says what they are)", choices=MODELS),
    "flavor": Flag("model.flavor", "of uninet: the equations as printed, or its code", "|".join(FLAVORS)),
    "backbone": Flag("model.backbone", "any timm backbone with features_only", "NAME"),
    "weights": Flag("model.weights", "local ImageNet state dict of the backbone", "FILE"),
    "skip-unreadable": SKIP,
    "tile": Flag("data.tile", "large images: train and predict on overlapping tiles of N pixels", "N", int),
}
HOW = {
    "iterations": Flag("train.iterations", "optimiser steps; replaces train.epochs", "N", int),
    "seed": Flag("train.seed", "of weights, data order and held-out parts", "S", int),
    "device": Flag("run.device", "where to compute; auto: a GPU if there is one", "auto|cpu|cuda"),
    "precision": Flag("train.precision", "auto: bf16 where it is faster, else fp32", choices=PRECISIONS),
    "eval-precision": Flag("run.eval_precision", "of scoring; bf16 is coarser", choices=PRECISIONS),
    "eval-batch-size": Flag("run.eval_batch_size", "images scored at once; moves last digits", "N", int),
    "workers": Flag("run.workers", "loader processes (default: up to 4 for a GPU, else 0)", "N", int),
    "cache-gb": Flag("run.cache_gb", "decoded images kept in memory, at most", "GB", float),
    "graph": Flag("run.graph", "auto: a GPU replays the training step as a graph", choices=("auto", "off")),
    "save-every": Flag("run.save_every", "steps between checkpoints", "N", int),
    "select": Flag("eval.select", "best looks at the test set, and says so", choices=("last", "best")),
    "eval": Flag("eval.split", "what to evaluate on", choices=("test", "validation", "none")),
    "extra-metrics": EXTRA,
}
SETTING_OF = {name.replace("-", "_"): flag.setting for name, flag in (WHAT | HOW).items()}
SETTING_OF["dataset"] = "data.name"
MODEL_LINES = {
    "uninet": "the paper's: two teachers, a student with feature selection, contrastive and margin losses",
    "remind": "our recipe: one frozen teacher, hard positions, synthetic defects, a bank (docs/RECIPE.md)",
    "recontrast": "its ancestor: contrastive reconstruction with mining of hard points (NeurIPS 2023)",
    "unias": "coarse-to-fine reconstruction by a transformer, one model for all categories (WACV 2025)",
    "memory-bank": "the baseline: distance to the nearest of the training patches; no training",
}
FLAVOR_LINES = {"paper": "the equations as printed", "released": "the public code after May 2025"}
BACKBONE_LINES = {
    "wide_resnet50_2": "the paper's; weights by download or --weights FILE",
    "tf_efficientnet_lite0": "small; its weights come with the requirements",
    "any other": "of timm's with features_only and the strides of model.strides",
}


class _Help(argparse.HelpFormatter):
    """Each default once, as (default: ...): in the help's own words, or else the value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, value = action.help or "", action.default
        if "(default:" in text or action.nargs == 0 or value is None or value in ([], argparse.SUPPRESS):
            return text
        shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        return f"{text} (default: {shown})".replace("%", "%%")


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that every command has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help, allow_abbrev=False)
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def user_path(text: str) -> Path:
    """A path from the command line; ~ is the home folder."""
    return Path(text).expanduser()


def add_overwrite_flag(parser: argparse._ActionsContainer) -> None:
    """--overwrite of an earlier call's files."""
    text = "replace what an earlier call wrote to the output, all of it"
    parser.add_argument("--overwrite", action="store_true", help=text)


def add_device_flags(parser: argparse._ActionsContainer) -> None:
    """--device, --precision and --eval-batch-size of a command that uses a trained model."""
    where, precision = HOW["device"], "of scoring; auto: bf16 where faster, else fp32 (default: the run's)"
    parser.add_argument("--device", default="auto", metavar=where.metavar, help=where.help)
    parser.add_argument("--precision", choices=PRECISIONS, help=precision)
    HOW["eval-batch-size"].add(parser, "eval-batch-size", default="the run's")


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that set one configuration key each."""
    for title, flags in (("what to train, on what", WHAT), ("how", HOW)):
        group = parser.add_argument_group(title)
        for name, flag in flags.items():
            flag.add(group, name, default=_default_of(flag))
    text = "time for all runs; sets the steps, and of own images the size (default: the config's steps)"
    group.add_argument("--minutes", type=float, metavar="N", help=text)
    shown, text = "SECTION.KEY=VALUE", "any setting of configs/base.yaml"
    group.add_argument("--set", action="append", default=[], metavar=shown, help=text)


def _default_of(flag: Flag) -> str | None:
    """What holds where train.py is not given the flag; None where its help says so, or it is off."""
    if not flag.setting.startswith("run."):
        return "the config's"
    value = getattr(RunOptions(), flag.setting.removeprefix("run."))
    return None if value in (None, False) else str(value or "none")


def add_place_flags(parser: argparse.ArgumentParser) -> None:
    """Where runs go, and what to do where one is already."""
    where, output = parser.add_argument_group("where results go"), Path("checkpoints")
    where.add_argument("--output", type=user_path, default=output, metavar="DIR", help="folder of all runs")
    where.add_argument("--name", help="of the run's folder (default: of model, variant, backbone and seed)")
    again = where.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if any")
    again.add_argument("--overwrite", action="store_true", help="start again where a run exists")


def choices(datasets: Mapping[str, Iterable[str]]) -> str:
    """What can be chosen on the command line: datasets with their categories, models, flavours, backbones."""
    parts = {
        "datasets (data.name, configs/NAME.yaml) and their categories": {
            name: ", ".join(categories) or "the folders found" for name, categories in datasets.items()
        },
        "models (--model)": MODEL_LINES,
        "flavours of uninet (--flavor)": FLAVOR_LINES,
        "backbones (--backbone)": BACKBONE_LINES,
        "settings (--setting, docs/SETTINGS.md)": dict.fromkeys(SETTINGS, ""),
    }
    lines = []
    for title, rows in parts.items():
        lines += [title, *(f"  {name:<22} {text}".rstrip() for name, text in rows.items())]
    return "\n".join(lines)


def overrides(args: argparse.Namespace) -> dict[str, object]:
    """Settings given on the command line, as dotted keys; --set comes last."""
    chosen = {setting: getattr(args, flag, None) for flag, setting in SETTING_OF.items()}
    chosen = {setting: value for setting, value in chosen.items() if value is not None}
    given = dict(map(parse_override, getattr(args, "set", [])))
    if flag := next((key for key in given if key.startswith("run.")), None):
        raise ConfigError(f"'{flag}' is no setting; write --{flag[4:].replace('_', '-')}")
    chosen |= given
    if isinstance(weights := chosen.get("model.weights"), str):
        chosen["model.weights"] = str(user_path(weights))
    if "run.data_root" in chosen:  # a run keeps it, and may be used from another folder
        chosen["run.data_root"] = str(user_path(str(chosen["run.data_root"])).resolve())
    if "train.iterations" in chosen and chosen.setdefault("train.epochs", None) is not None:
        raise ConfigError("train.iterations and train.epochs are both given; a run has one length")
    return chosen


def run_command(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command: 0 when done, 2 for wrong usage, 1 for any other failure, which is told in one line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # libraries speak from warnings on: timm tells of each state dict that it reads
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s", force=True)
    log.setLevel(logging.WARNING if "--quiet" in argv else logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as by Ctrl-C
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files must not lose a table
            stream.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    try:
        for before, word in pairwise(["the first argument", *argv]):
            if word == "" or re.fullmatch("--[^=]*=", word):
                raise ConfigError(f"{word[:-1] or before} is ''; expected a value, such as . for this folder")
        main(argv)
    except Exception as error:
        line = _one_line(error) if isinstance(error, USER_ERRORS) else _out_of_memory(error)
        if "--debug" in argv or line is None:
            raise
        log.error("error: %s", line)
        return error.exit_code if isinstance(error, UserError) else 1
    except KeyboardInterrupt as stop:
        log.error("stopped%s", f"; {stop}" if str(stop) else "")
        return 1
    return 0


def _one_line(error: Exception) -> str:
    text = str(error).rstrip()
    if "DataLoader worker process" in text:  # the error's own text is the last line of a traceback
        text = text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__


def _out_of_memory(error: Exception) -> str | None:
    """One line for an error of torch, numpy or OpenCV that found no memory; None for any other error."""
    text = str(error)
    words = "can't allocate memory|not enough memory|insufficient memory|out of memory|ALLOC_FAILED"
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not re.search(words, text, re.I):
        return None
    asked = re.search(r"allocate ([\d.]+ ?\w+)", text)
    more = f", {asked[1]} too many" if asked else ""
    return (
        f"out of memory on the {'GPU' if 'CU' in text else 'CPU'}{more}; lower train.batch_size, "
        "--eval-batch-size, data.image_size or --cache-gb, or take --tile N for large images"
    )


@contextmanager
def when_stopped(advice: str) -> Iterator[None]:
    """Let `run_command` add `advice` where the body is interrupted."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(advice) from stop


def print_result(text: str) -> None:
    """Write a result to stdout (progress goes to stderr)."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
