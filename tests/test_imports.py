"""What is imported: the program starts on systems without POSIX modules."""

import processes

PROGRAM = """
import importlib, sys
from pathlib import Path

root = Path.cwd()
folders = ("", "utils", "datasets", "losses", "model", "model/peers", "evaluation")
files = [path.relative_to(root) for folder in folders for path in sorted((root / folder).glob("*.py"))]
names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]
for name in names:  # the server has imported them
    sys.modules.pop(name, None)
sys.modules |= dict.fromkeys(("fcntl", "resource", "termios", "pwd", "grp"))  # None: cannot be imported
for name in names:
    importlib.import_module(name)
"""


def test_everything_imports_without_posix_modules():
    """As on Windows, which has neither fcntl nor resource."""
    done = processes.run("train.py", "--list", before=PROGRAM)
    assert done.returncode == 0 and "datasets" in done.stdout, done.stderr
