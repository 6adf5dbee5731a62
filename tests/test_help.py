"""The help of each command states the default of each flag once, and it is what the command takes."""

import argparse
import contextlib
import dataclasses
import importlib
import re
from unittest import mock

import printed_commands
import pytest
from conftest import ROOT

import predict as predict_command
import test as test_command
import train as train_command
from utils.cli import SETTING_OF, overrides, run_command
from utils.config import RunOptions

PREPARE = ("aptos", "isic2018", "visa", "kolektor")  # their parser is in scripts/prepare/writer.py
FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in (".", "datasets", "scripts", "scripts/*", "benchmarks")
    for path in sorted(ROOT.glob(f"{folder}/*.py"))
    if "new_parser(" in path.read_text() and path.stem != "writer"
] + [f"scripts/prepare/{name}.py" for name in PREPARE]
RUNS_OWN = re.compile(r"the run's|as the run did")  # test.py and predict.py: what the checkpoint says


class ParserFound(Exception):
    """Carries a command's parser out of its main."""


def parser_of(program):
    def parse_args(parser, _argv=None):
        raise ParserFound(parser)

    alone = contextlib.nullcontext()
    if program.startswith("benchmarks/"):
        alone = printed_commands.modules_of(ROOT / "benchmarks")
    stop = mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args)
    with alone, stop, pytest.raises(ParserFound) as found:
        importlib.import_module(program.removesuffix(".py").replace("/", ".")).main([])
    return found.value.args[0]


def shown(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def texts_of(parser):
    """Each action with its help as it is printed."""
    formatter = parser._get_formatter()
    return [(action, formatter._expand_help(action)) for action in parser._actions if action.dest != "help"]


def test_each_command_is_looked_at():
    assert {"train.py", "test.py", "predict.py", "export.py", "datasets/check.py"} < set(FILES)
    assert len(FILES) >= 21


@pytest.mark.parametrize("program", FILES)
def test_each_default_is_stated_once_and_true(program):
    parser = parser_of(program)
    one_of = [
        a for group in parser._mutually_exclusive_groups if group.required for a in group._group_actions
    ]
    for action, text in texts_of(parser):
        flag = (action.option_strings or [action.dest])[-1]
        assert text, f"{flag} has no help"
        stated = re.findall(r"\(default: ([^()]*)\)", text)
        assert text.count("default") == len(stated) <= 1, f"{flag}: {text}"
        needed = action in one_of or (action.required and action.nargs != "*")
        if needed or action.nargs == 0:  # a switch is off, unless a run had it on
            assert not stated or (not needed and RUNS_OWN.match(stated[0])), f"{flag}: {text}"
        elif action.default not in (None, []):
            assert stated == [shown(action.default)], f"{flag}: {text}"
        elif action.default is None:
            assert stated, f"{flag} says nothing of its default: {text}"


def test_flags_of_settings_leave_the_config_alone():
    parser = parser_of("train.py")
    assert overrides(train_command.parse_arguments([])) == {}
    for action, text in texts_of(parser):
        section, _, key = SETTING_OF.get(action.dest, "").partition(".")
        if section == "run" and getattr(RunOptions(), key):
            assert f"(default: {getattr(RunOptions(), key)})" in text
        elif section and section != "run" and action.dest != "dataset":
            assert text.endswith("(default: the config's)"), text


def test_what_is_not_given_to_test_is_the_runs(make_config):
    config = make_config(
        data__category="screw", run__data_root="x", run__skip_unreadable=True, run__extra_metrics=["aupimo"]
    )
    args = test_command.parse_arguments(["--checkpoint", "RUN"])
    same = test_command.evaluated_config(config, args)
    here = dataclasses.replace(config.run, device="auto")  # and not where it was trained
    assert (same.data, same.run) == (config.data, here)
    args = test_command.parse_arguments(["--checkpoint", "RUN", "--dataset", "btad"])
    assert test_command.evaluated_config(config, args).data.category == "all"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "as before (default: 1) (default: 2)"), (3, "(default: 4)"), (None, "a size"), (1, "")],
)
def test_a_wrong_help_is_found(value, text):
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default=value, help=text)
    with mock.patch(f"{__name__}.parser_of", lambda _: parser), pytest.raises(AssertionError, match="--size"):
        test_each_default_is_stated_once_and_true("")


@pytest.mark.parametrize(("words", "at"), [
    (["", "--checkpoint", "r"], "the first argument"), (["--checkpoint", ""], "--checkpoint"),
    (["new", "--output=", "--name", "x"], "--output"),
])  # fmt: skip
@pytest.mark.parametrize("command", [train_command, test_command, predict_command])
def test_an_empty_argument_is_no_folder(capfd, command, words, at):
    """As of a shell's variable that is not set: a path would be the folder where the command runs."""
    assert run_command(command.main, words) == 2
    assert re.fullmatch(f"error: {at} is ''; expected a value, .*\n", capfd.readouterr().err)
