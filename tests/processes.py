"""Scripts of the repository in processes of their own that need not import PyTorch again.

Importing it takes seconds. A server process imports it once and is copied for each script, so a test that
needs a process (to be killed, to exit, to be one of several) costs little more than a call.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train", "test", "predict", "warm"])


@dataclass
class Script:
    """A started script; `returncode` is negative if a signal ended it."""

    process: ForkServerProcess
    folder: tempfile.TemporaryDirectory = field(repr=False)
    returncode: int | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        return (Path(self.folder.name) / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (Path(self.folder.name) / "stderr").read_text()

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        self.returncode = self.process.exitcode
        return self.returncode

    def kill(self) -> None:
        """End it, if it has not ended."""
        self.process.kill()

    def terminate(self) -> None:
        """Ask it to end."""
        self.process.terminate()

    def communicate(self) -> tuple[str, str]:
        """Wait for its end; what it wrote."""
        self.wait()
        return self.stdout, self.stderr

    def wait(self, timeout: float = 240) -> Script:
        """Wait for its end.

        Raises:
            TimeoutError: if it has not ended by then; it is killed.
        """
        self.process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise TimeoutError(f"a script ran for more than {timeout} s: {self.stderr}")
        return self


def start(
    script: str | Path, *argv: str, cwd: Path = ROOT, env: dict | None = None, before: str = ""
) -> Script:
    """Start `python SCRIPT ARGV`, or `python -m MODULE` for a name without suffix.

    env: further environment variables. before: Python that runs in the process first.
    """
    with pytest.MonkeyPatch.context() as patch:  # only the server's first start looks there
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        forkserver.ensure_running()
    folder = tempfile.TemporaryDirectory()
    where = (str(script), [str(a) for a in argv], str(cwd), {k: str(v) for k, v in (env or {}).items()})
    process = _context.Process(target=_run, args=(*where, before, folder.name))
    process.start()
    return Script(process, folder)


def run(script: str | Path, *argv: str, **options: object) -> Script:
    """`start` and wait for the end."""
    return start(script, *argv, **options).wait()


def replace_subprocess(patch: pytest.MonkeyPatch) -> None:
    """Let what starts scripts by `subprocess`, as those of scripts/ do, start them here."""
    real = subprocess.run

    def run_words(words: list[str], *, check: bool = False, **options: object) -> Script:
        if words[0] != sys.executable:
            return real(words, check=check, **options)
        done = run(words[1], *words[2:])
        if check and done.returncode:
            raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
        return done

    def popen(words: list[str], *, env: dict[str, str], **_: object) -> Script:
        assert words[0] == sys.executable
        return start(words[1], *words[2:], env=env)

    patch.setattr(subprocess, "run", run_words)
    patch.setattr(subprocess, "Popen", popen)


def _run(script: str, argv: list[str], cwd: str, env: dict[str, str], before: str, folder: str) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        handle = os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [script, *argv]
    exec(before, {})
    if script.endswith(".py"):
        path = ROOT / script
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")
    else:
        sys.path.insert(0, str(ROOT))
        runpy.run_module(script, run_name="__main__", alter_sys=True)
