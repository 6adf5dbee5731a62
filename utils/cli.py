"""What the commands share: flags to settings, one-line errors, exit codes, logging."""

from __future__ import annotations

import argparse
import io
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from utils.config import FLAVORS, MODELS, SETTINGS, RunOptions
from utils.device import keep_freed_memory
from utils.errors import ConfigError, UserError
from utils.yaml_io import CONFIGS, parse_override, read_yaml

log = logging.getLogger("uninet")
USER_ERRORS = (UserError, ValueError, OSError, FloatingPointError)

# flag: setting
FLAGS = {
    "dataset": "data.name",
    "data_root": "run.data_root",
    "skip_unreadable": "data.skip_unreadable",
    "category": "data.category",
    "tile": "data.tile",
    "setting": "model.setting",
    "model": "model.name",
    "flavor": "model.flavor",
    "backbone": "model.backbone",
    "weights": "model.weights",
    "iterations": "train.iterations",
    "seed": "train.seed",
    "device": "run.device",
    "workers": "run.workers",
    "cache_gb": "run.cache_gb",
    "save_every": "run.save_every",
    "eval_batch_size": "run.eval_batch_size",
    "eval_precision": "run.eval_precision",
    "precision": "train.precision",
    "select": "eval.select",
    "eval": "eval.split",
}


MODEL_LINES = {
    "uninet": "the paper's: two teachers, a student with feature selection, contrastive and margin losses",
    "remind": "our recipe: one frozen teacher, hard positions, synthetic defects (docs/REMIND.md)",
    "recontrast": "its ancestor: contrastive reconstruction with mining of hard points (NeurIPS 2023)",
    "unias": "coarse-to-fine reconstruction by a transformer, one model for all categories (WACV 2025)",
    "memory-bank": "the baseline: distance to the nearest of the training patches; no training",
}
FLAVOR_LINES = {
    "paper": "the equations as printed",
    "released": "the public code after May 2025",
}
BACKBONE_LINES = {
    "wide_resnet50_2": "the paper's; weights by download or --weights FILE",
    "tf_efficientnet_lite0": "small; its weights come with the requirements",
    "any other": "of timm's with features_only and the strides of model.strides",
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, as (default: ...); one that is written there already counts.

    That of a flag that stands for a setting is base.yaml's, which a config may change.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if "(default:" in (action.help or ""):
            return action.help
        if action.default is None and action.dest in FLAGS:
            section, _, key = FLAGS[action.dest].partition(".")
            if section == "run":
                value, default = getattr(RunOptions(), key), "default: {}"
            else:
                value = read_yaml(CONFIGS / "base.yaml")[section][key]
                default = "default: the config's; base.yaml: {}"
            return action.help if value in (None, False) else f"{action.help} ({default.format(value)})"
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


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
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier call wrote to the output, all of it"
    )


def add_skip_flag(parser: argparse._ActionsContainer) -> None:
    """--skip-unreadable; None where it is not given, as a run's own setting counts then."""
    parser.add_argument(
        "--skip-unreadable",
        action="store_true",
        default=None,
        help="leave out image files that cannot be read (listed in skipped.csv), take incomplete datasets",
    )


def add_batch_flag(parser: argparse._ActionsContainer) -> None:
    """--eval-batch-size."""
    parser.add_argument(
        "--eval-batch-size", type=int, metavar="N", help="images scored at once; changes no result"
    )


def add_device_flags(parser: argparse._ActionsContainer) -> None:
    """--device and --precision of a command that uses a trained model."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda",
        help="where to compute; auto: a GPU if there is one",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        help="of scoring; auto: bf16 where it is faster, else fp32 (default: the run's)",
    )
    add_batch_flag(parser)


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that set one configuration key each; unset ones leave the config's value."""
    what = parser.add_argument_group("what to train, on what")
    what.add_argument("--data-root", metavar="DIR", help="folder of the dataset")
    what.add_argument("--category", metavar="NAME", help="one category, or all")
    what.add_argument("--setting", choices=SETTINGS, help="what a model is trained on (docs/SETTINGS.md)")
    what.add_argument("--model", choices=MODELS, help="the network (--list says what they are)")
    what.add_argument(
        "--flavor",
        metavar="|".join(FLAVORS),
        help="of uninet: the equations as printed, or as the public code",
    )
    what.add_argument("--backbone", metavar="NAME", help="any timm backbone with features_only")
    what.add_argument("--weights", metavar="FILE", help="local ImageNet state dict of the backbone")
    add_skip_flag(what)
    what.add_argument(
        "--tile",
        type=int,
        metavar="N",
        help="large images: train and predict on overlapping tiles of N pixels of data.image_size",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--iterations", type=int, metavar="N", help="optimiser steps; replaces train.epochs")
    how.add_argument("--seed", type=int, metavar="S", help="of weights, data order and held-out parts")
    how.add_argument(
        "--device", metavar="auto|cpu|cuda", help="where to compute; auto: a GPU if there is one"
    )
    how.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), help="auto: bf16 where it is faster, else fp32"
    )
    how.add_argument(
        "--eval-precision",
        choices=("auto", "fp32", "bf16"),
        help="of scoring; bf16 rounds away small anomalies of barely trained models",
    )
    add_batch_flag(how)
    how.add_argument("--workers", type=int, metavar="N", help="loader processes; without it up to 4 on a GPU")
    how.add_argument("--cache-gb", type=float, metavar="GB", help="decoded images kept in memory, at most")
    how.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints")
    how.add_argument("--select", choices=("last", "best"), help="best looks at the test set, and says so")
    how.add_argument("--eval", choices=("test", "validation", "none"), help="what to evaluate on")
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any setting of configs/base.yaml",
    )


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
    """Settings given on the command line, as dotted keys; --set comes last.

    Raises:
        ConfigError: for a --set that is not section.key=value.
    """
    chosen = {setting: getattr(args, flag, None) for flag, setting in FLAGS.items()}
    chosen = {setting: value for setting, value in chosen.items() if value is not None}
    given = dict(map(parse_override, getattr(args, "set", [])))
    if flag := next((key for key in given if key.startswith("run.")), None):
        raise ConfigError(f"'{flag}' is no setting; write --{flag[4:].replace('_', '-')}")
    chosen |= given
    if isinstance(weights := chosen.get("model.weights"), str):
        chosen["model.weights"] = str(user_path(weights))
    if "run.data_root" in chosen:  # a run keeps it, and may be used from another folder
        chosen["run.data_root"] = str(user_path(str(chosen["run.data_root"])).resolve())
    if "train.iterations" in chosen:
        chosen.setdefault("train.epochs", None)
    return chosen


def run_command(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command: 0 when done, 2 for wrong usage, 1 for any other failure, which is told in one line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # libraries speak from warnings on: timm tells of each state dict that it reads
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s", force=True)
    log.setLevel(logging.WARNING if "--quiet" in argv else logging.INFO)
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files must not lose a table
            stream.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    try:
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


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


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
