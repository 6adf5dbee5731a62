"""Kill a training again and again, resume it, and compare the end with an undisturbed run, bit for bit.

python scripts/kill_test.py --kills 20
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train
from datasets.demo import write_demo
from utils.checkpoint import FILE, load_checkpoint
from utils.cli import log, new_parser, run_command, say
from utils.errors import RunError
from utils.files import PARTIAL

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SETTINGS = (
    "data.image_size=64", "model.random_weights=true", "model.width=0.25", "train.batch_size=2",
    "train.save_every=1", "train.log_every=1", "eval.every=4",
)  # fmt: skip
LONGEST = 600  # seconds that one process may take


def main(argv: Sequence[str]) -> None:
    """Train once undisturbed, then until enough processes were killed, and compare."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="processes to kill")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of signals and moments")
    parser.add_argument("--iterations", type=int, default=8, metavar="N", help="steps of a training")
    args = parser.parse_args(argv)
    rng, kills = random.Random(args.seed), Counter()  # noqa: S311 (moments, no secret)
    with tempfile.TemporaryDirectory() as scratch:
        command = training_command(Path(scratch), args.iterations)
        began = time.monotonic()
        code = wait(start([*command, "--name", "whole"]))
        if code != 0:
            raise RunError(f"the undisturbed training ended with code {code}")
        seconds = time.monotonic() - began
        folder = next(Path(scratch).glob(f"runs/*/*/*/whole/{FILE}")).parent.parent
        for number in itertools.count():
            disturbed_run(folder / str(number), command, rng, kills, seconds=seconds, limit=args.kills)
            compare(folder / "whole", folder / str(number))
            log.info("run %d is the same, %d processes killed", number, kills.total())
            if kills.total() >= args.kills:
                break
    how = ", ".join(f"{count} by {name}" for name, count in sorted(kills.items()))
    say(f"{kills.total()} processes killed ({how}); {number + 1} runs ended with the undisturbed run's bits")


def training_command(scratch: Path, iterations: int) -> list[str]:
    """Flags of train.py for a tiny training on demo images."""
    write_demo(scratch / "demo", size=64)
    where = ["--data-root", str(scratch / "demo"), "--output", str(scratch / "runs"), "--category", "gravel"]
    how = ["--iterations", str(iterations), "--device", "cpu", "--precision", "fp32", "--quiet", "--resume"]
    return ["--config", "configs/folder.yaml", *where, *how, *(f for s in SETTINGS for f in ("--set", s))]


def start(command: Sequence[str]) -> int:
    """Train in a process of its own, a fork, which has torch loaded already; gives its id."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        code = 3
        try:
            code = run_command(train.main, command)
        except KeyboardInterrupt:
            code = 1  # it came before the command listened, or after
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """Exit code of the process, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def disturbed_run(
    folder: Path,
    command: Sequence[str],
    rng: random.Random,
    kills: Counter[str],
    *,
    seconds: float,
    limit: int,
) -> None:
    """Start the training until it ends by itself; as long as `limit` is not reached, kill it on the way.

    Every second process dies while it writes a checkpoint, the others at any moment of their time.
    """
    while True:
        pid = start([*command, "--name", folder.name])
        if kills.total() < limit:
            number = rng.choice(SIGNALS)
            writing, after = kills.total() % 2 == 1, rng.uniform(0, seconds / 2)
            if died := kill_at(pid, number, folder=folder if writing else None, after=after):
                kills[f"{number.name}{' while writing' if died == 'writing' else ''}"] += 1
        code = wait(pid)
        if code == 0:
            return
        if code not in (1, *(-s for s in SIGNALS)) or kills.total() > limit:
            raise RunError(f"a resumed training ended with code {code}")


def kill_at(pid: int, number: signal.Signals, *, folder: Path | None, after: float) -> str | None:
    """Send the signal after `after` seconds, or later when a temporary file is in `folder`.

    Returns:
        "moment" or "writing"; None if the process had ended before.
    """
    began, found = time.monotonic(), "moment"
    while time.monotonic() - began < LONGEST:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return None
        waited = time.monotonic() - began >= after
        if folder is None and waited:
            break
        if folder is not None and waited and any(folder.glob(f".{FILE}.*{PARTIAL}")):
            found = "writing"
            break
        time.sleep(0.0005)
    os.kill(pid, number)
    return found


def compare(whole: Path, killed: Path) -> None:
    """Stop unless weights, metrics, scores and validation curve are the same, and nothing is left over.

    Raises:
        RunError: naming what differs.
    """
    ours, theirs = (load_checkpoint(folder / FILE).model for folder in (whole, killed))
    wrong = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, killed)]
    wrong += [key for key in ("results", "curve") if found[0][key] != found[1][key]]
    if (whole / "scores.csv").read_bytes() != (killed / "scores.csv").read_bytes():
        wrong.append("scores.csv")
    wrong += [path.name for path in killed.glob(f".*{PARTIAL}")]
    if wrong:
        raise RunError(f"the run that was killed differs in {', '.join(wrong[:5])} ({len(wrong)} in all)")


if __name__ == "__main__":
    sys.exit(run_command(main))
