"""A folder that is watched: which images are ready, scores.csv with each exactly once, warnings of drift.

scores.csv is the only state. What is in it is done, and a restart takes the rest out of it, too.
"""

import csv
import io
import json
import logging
import os
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from datasets.check import write_skipped
from datasets.files import is_image, walk
from datasets.images import UnreadableImageError
from datasets.samples import UNKNOWN
from evaluation.results import SCORES, WATCH, WRITTEN, begin, claim, finish
from model.detector import Calibration
from utils.errors import RunError
from utils.files import PARTIAL, printable, write_json, write_text

INTERVAL = 1.0  # seconds between two looks; a file that is the same at both is ready
PAUSE = 10.0  # seconds after an error of the system
UNREADABLE = 60.0  # seconds until what could not be read is tried again, changed or not
CHUNK = 64  # images that are scored before their rows are written
LOCK = ".watch.lock"
HEADER = "path,category,label,defect,score,p_value,is_anomalous,drift"
BETS = (0.25, 0.5, 1.0)
IMAGES_PER_FALSE_WARNING = 100_000
DRIFT = (
    "drift: up to %s, scores are higher than before and than the held-out ones. Look at the camera, light "
    "and parts. If the images are good, calibrate.py makes decisions right again. Without a change such a "
    f"warning comes once in {IMAGES_PER_FALSE_WARNING} images or less often, on average"
)
Score = Callable[[list[Path]], np.ndarray]  # scores (N,) of N images; writes their pictures
_log = logging.getLogger("uninet")


class Drift:
    """A running test of whether the images of a stream and the held-out ones are exchangeable.

    p is the rank of a score, from the top, among the held-out images, all earlier ones and itself, with ties
    broken at random. If all are exchangeable, these p are independent and uniform (Vovk et al. 2003), so a
    bet that pays 1 + b (1 - 2p) has mean 1. It pays more where p crowd near 0. `sums` add the products of the
    bets from each earlier image on (Shiryaev-Roberts). They grow by 1 per image in the mean, so on average
    at least IMAGES_PER_FALSE_WARNING images pass before a false warning.

    `Calibration.p_values` would not do: they share one held-out set, whose chance a long stream reveals.
    """

    def __init__(self, held_out: Iterable[float]) -> None:
        self.scores = array("d", sorted(float(f"{score:.6g}") for score in held_out))
        self.sums = [0.0] * len(BETS)
        self.random = np.random.default_rng(0)  # the same numbers again after a restart

    def warns(self, score: float) -> bool:
        """Add the next image. True where the evidence is complete; then the test starts anew."""
        score, known = float(f"{score:.6g}"), self.scores  # as scores.csv has it
        left, right = bisect_left(known, score), bisect_right(known, score)
        p = (len(known) - right + self.random.random() * (right - left + 1)) / (len(known) + 1)
        known.insert(right, score)
        self.sums = [(1 + s) * (1 + b * (1 - 2 * p)) for s, b in zip(self.sums, BETS, strict=True)]
        if sum(self.sums) < IMAGES_PER_FALSE_WARNING * len(BETS):
            return False
        self.sums = [0.0] * len(BETS)
        return True


@contextmanager
def watched(output: Path, about: Mapping[str, object], *, overwrite: bool) -> Iterator[None]:
    """Hold `output` for a watch, to begin or to go on with. about: what makes its rows comparable, plain
    types. Raises RunError if another process watches into it, or if it is another call's.
    """
    output.mkdir(parents=True, exist_ok=True)
    mark = output / WATCH
    try:
        with FileLock(output / LOCK, timeout=0):
            if overwrite or not mark.is_file():
                begin(output, claim(output, overwrite=overwrite, images=[Path(str(about["images"]))]))
                finish(output)
                write_json(mark, dict(about))
            earlier = json.loads(mark.read_text())
            for key, value in about.items():
                if earlier.get(key) != value:
                    other = printable(f"{output} is of a watch with {key} {earlier.get(key)}, not {value}")
                    raise RunError(f"{other}; choose another --output, or replace all of it with --overwrite")
            places = [output.glob, *((output / name).rglob for name in WRITTEN)]
            for left in [path for find in places for path in find(f".*{PARTIAL}")]:  # of a killed process
                left.unlink()
            yield
    except Timeout as error:
        held = f"another process watches into {printable(output)}"
        raise RunError(f"{held}; choose another --output") from error


def _whole_lines(file: BinaryIO) -> Iterator[str]:
    """The lines of a file; a last one that a kill has torn is cut off."""
    for line in file:
        if line.endswith(b"\n"):
            yield line.decode()
        else:
            file.truncate(file.tell() - len(line))


@dataclass(eq=False)
class Watch:
    """The images of `root` and their rows in `output`. Both are resolved paths."""

    root: Path
    output: Path
    calibration: Calibration
    rate: float
    category: str
    seen: dict[Path, tuple[int, int]] = field(default_factory=dict)  # size and time at the last look

    def run(self, score: Score) -> None:
        """Look again and again, until the process is interrupted.

        What the system refuses (a full disk, a folder that is away) is told once and tried again.
        """
        told = ""
        while True:
            try:
                self.restore()
                while True:
                    self.look(score)
                    told = ""
                    time.sleep(INTERVAL)
            except OSError as error:
                reason = error.strerror or str(error)  # the names of temporary files differ
                if reason != told:
                    _log.warning("%s; trying again every %g s", error, PAUSE)
                told = reason
            time.sleep(PAUSE)

    def restore(self) -> None:
        """Begin from scores.csv, a new one if there is none. Raises RunError if it has other rows."""
        self.path = self.output / SCORES
        self.drift = Drift(self.calibration.scores)
        self.done: dict[str, int] = {}  # time of the file; 0: of an earlier start
        self.unreadable: dict[Path, str] = {}  # and why
        self.listed: dict[Path, str] | None = None  # in skipped.csv
        self.again = 0.0  # when all of it is tried again
        if not self.path.exists():
            write_text(self.path, HEADER + "\n")
        with self.path.open("r+b") as file:
            rows = csv.reader(_whole_lines(file))
            try:
                if next(rows) != HEADER.split(","):
                    raise ValueError
                for name, _, _, _, score, _, _, _ in rows:
                    self.drift.warns(float(score))
                    self.done[name] = 0
            except (ValueError, StopIteration, csv.Error) as error:
                found = f"line {rows.line_num} of {printable(self.path)} is no row of a watch"
                raise RunError(f"{found}; mend it, or choose another --output") from error
        _log.info("watching %s: %d images are done", printable(self.root), len(self.done))

    def look(self, score: Score) -> None:
        """Score what is ready."""
        ready = self.ready()
        for i in range(0, len(ready), CHUNK):
            part = ready[i : i + CHUNK]
            while part:
                try:
                    self.record(part, score(part))
                    break
                except UnreadableImageError as error:
                    error.path.stat()  # an OSError if it is gone, perhaps with the whole folder
                    self.unreadable[error.path] = error.reason
                    part.remove(error.path)
        if self.unreadable != self.listed:
            for path, reason in self.unreadable.items() - (self.listed or {}).items():
                _log.warning("cannot be read: %s: %s", printable(path), reason)
            write_skipped(self.output, self.unreadable, self.root)
            self.listed = self.unreadable

    def ready(self) -> list[Path]:
        """Images that are not done, are the same as at the last look, and are not known as unreadable."""
        before, self.seen = self.seen, {}
        for path in filter(is_image, walk(self.root, [self.output])):
            with suppress(OSError):  # gone again, or a link to nothing
                status, name = path.stat(), self._name(path)
                if name not in self.done:
                    self.seen[path] = status.st_size, status.st_mtime_ns
                elif self.done[name] != status.st_mtime_ns:
                    if self.done[name]:
                        _log.warning("%s has changed after it was scored; give each image its own name", name)
                    self.done[name] = status.st_mtime_ns
        if time.monotonic() >= self.again:
            self.unreadable, self.again = {}, time.monotonic() + UNREADABLE
        same = {path for path, state in self.seen.items() if before.get(path) == state}
        self.unreadable = {path: reason for path, reason in self.unreadable.items() if path in same}
        return sorted(same - self.unreadable.keys())

    def record(self, paths: Sequence[Path], scores: np.ndarray) -> None:
        """Append a row for each image; from here on it is done."""
        text, rows = io.StringIO(), []
        for path, score, p in zip(paths, scores, self.calibration.p_values(scores), strict=True):
            decision = [f"{p:.6g}", int(p <= self.rate), int(self.drift.warns(score))]
            rows.append([self._name(path), self.category, UNKNOWN, "", f"{score:.6g}", *decision])
        csv.writer(text, lineterminator="\n").writerows(rows)
        with self.path.open("r+b") as file:  # "ab" would make a lost file without header
            file.seek(0, os.SEEK_END)
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
        for path, (name, *_, p, flagged, drift) in zip(paths, rows, strict=True):
            self.done[str(name)] = self.seen[path][1]
            if flagged:
                _log.info("anomalous: %s (p = %s)", name, p)
            if drift:
                _log.warning(DRIFT, name)

    def _name(self, path: Path) -> str:
        """As in scores.csv, on one line whatever the name: a row ends where its line does."""
        name = path.relative_to(self.root).as_posix()
        return "".join(
            printable(c) if c.splitlines() != [c] or "\ud800" <= c <= "\udfff" else c for c in name
        )
