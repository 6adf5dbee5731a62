"""scripts/*.sh from any folder: relative paths are the user's."""

import os
import subprocess

import pytest
from conftest import ROOT


@pytest.fixture
def call(tmp_path):
    """Run a script in `tmp_path` with a `python` that writes its folder and arguments, one a line."""
    program = tmp_path / "bin/python"
    program.parent.mkdir()
    program.write_text('#!/usr/bin/env bash\npwd\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)

    def call(name, *flags, cwd=tmp_path):
        env = os.environ | {"VIRTUAL_ENV": "active", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        words = ["bash", ROOT / f"scripts/{name}.sh", *flags]
        done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return call


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        (
            "mvtec",
            "a_b --output=out --weights w.pt --category x",
            "{}/a_b --resume --output={}/out --weights {}/w.pt",
        ),
        ("table01", "--data ../d --output t --seeds 0 1", "--data {}/../d --output {}/t --seeds 0 1"),
        (
            "accuracy",
            "--data mvtec=d kolektor=/k --runs r --dry-run",
            "--data mvtec={}/d kolektor=/k --runs {}/r",
        ),
        ("figure_smoothing", "--output f", "smoothing --output {}/f"),
        ("demo", "--output o --iterations 3", "--resume --output {}/o --iterations 3"),
    ],
)
def test_paths_of_flags(call, tmp_path, script, flags, expected):
    lines = call(script, *flags.split())
    assert lines[0] == str(ROOT) and expected.format(*[tmp_path] * 4) in " ".join(lines)


def test_in_the_repository_nothing_changes(call):
    assert " ".join(call("mvtec", "rel", "--output", "out", cwd=ROOT)).endswith("rel --resume --output out")
