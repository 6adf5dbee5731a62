"""predict.py --watch: each image once over kills, half-written files and a full disk; warnings of drift."""

import csv
import os
import random
import resource
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
from filelock import FileLock
from PIL import Image
from test_predict import RUN, fitted, run  # noqa: F401 (fixtures)

import predict as predict_command
from datasets.images import UnreadableImageError, read_image
from evaluation import watch as watching
from evaluation.watch import BETS, HEADER, IMAGES_PER_FALSE_WARNING, Drift, Watch, watched
from model.detector import Calibration
from utils.checkpoint import load_checkpoint
from utils.cli import run_command
from utils.errors import RunError
from utils.files import PARTIAL


def rows_of(folder):
    return list(csv.DictReader((folder / "scores.csv").open(newline="")))


class TestDrift:
    def test_false_warnings_are_as_rare_as_stated(self, monkeypatch):
        """Also with few held-out images, and with a scale of scores that has only a few steps."""
        monkeypatch.setattr(watching, "IMAGES_PER_FALSE_WARNING", 200)
        rng, warnings = np.random.default_rng(0), 0
        for stream in range(50):
            scores = rng.gamma(2.0, size=1020).round(0 if stream % 2 else 9)
            drift = Drift(scores[:20])
            warnings += sum(drift.warns(score) for score in scores[20:])
        assert 150 < warnings <= 250  # of 50,000 images; it is not wasteful either

    @pytest.mark.parametrize(("held_out", "times"), [(20, 20), (99, 10)])
    def test_the_p_values_of_the_table_would_warn_too_often(self, held_out, times):
        """Why earlier images are ranked with: here 200 held-out sets, each with 3,000 images."""
        rng, sums, warnings = np.random.default_rng(0), np.zeros((200, len(BETS))), 0
        known = rng.random((200, held_out))
        for scores in rng.random((3000, 200)):
            p = (1 + (known >= scores[:, None]).sum(1)) / (1 + held_out)  # as Calibration.p_values
            sums = (1 + sums) * (1 + np.array(BETS) * (1 - 2 * p[:, None]))
            complete = sums.mean(1) >= IMAGES_PER_FALSE_WARNING
            sums[complete] = 0
            warnings += complete.sum()
        assert warnings > times * 200 * 3000 / IMAGES_PER_FALSE_WARNING

    @pytest.mark.parametrize(("held_out", "before"), [(99, 1000), (99, 0), (30, 200)])
    def test_a_change_is_told_soon(self, held_out, before):
        rng = np.random.default_rng(0)
        drift = Drift(rng.normal(size=held_out))
        assert not any(drift.warns(score) for score in rng.normal(size=before))
        told = [i for i, score in enumerate(rng.normal(2, size=1000)) if drift.warns(score)]
        assert told[0] < 60

    def test_rare_defects_are_no_drift(self):
        rng = np.random.default_rng(0)
        drift = Drift(rng.normal(size=99))
        scores = np.where(rng.random(5000) < 0.01, 20, rng.normal(size=5000))
        assert not any(drift.warns(score) for score in scores)


@pytest.fixture
def folders(tmp_path):
    """The watched folder and the output."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path / "in", tmp_path / "out"


@pytest.fixture
def new_watch(folders):
    """A watch as after a start."""
    return lambda: begun(Watch(*folders, Calibration((1.0, 2.0, 3.0, 4.0), 0.0, 1.0), 0.2, "part"))


def begun(watch):
    watch.restore()
    return watch


def lengths(paths):
    """A score that needs no image: the length of the name."""
    return np.array([float(len(path.stem)) for path in paths])


def add(folder, *names):
    for name in names:
        Image.new("RGB", (16, 16)).save(folder / name)


def look(watch, times=2, score=lengths):
    for _ in range(times):
        watch.look(score)


class TestRows:
    def test_each_image_once(self, folders, new_watch):
        add(folders[0], "a.png", "abc.png")
        watch = new_watch()
        look(watch, 4)
        add(folders[0], "abcde.png")
        look(watch)
        again = new_watch()
        look(again)
        rows = rows_of(folders[1])
        assert [(r["path"], r["score"], r["p_value"], r["is_anomalous"]) for r in rows] == [
            ("a.png", "1", "1", "0"), ("abc.png", "3", "0.6", "0"), ("abcde.png", "5", "0.2", "1"),
        ]  # fmt: skip
        assert again.drift.scores == watch.drift.scores and again.drift.sums == watch.drift.sums
        assert again.drift.random.random() == watch.drift.random.random()

    def test_odd_names_are_known_again(self, folders, new_watch):
        names = ["a,b.png", 'a"b.png', "a\nb.png", "a\rb.png", os.fsdecode(b"a\xffb.png"), "ä.png"]
        blanks = ["a b.png", "a\u00a0b.png", "a\\xa0b.png", "9.41\u202fAM.png", "写真\u30001.png"]
        names += blanks
        add(folders[0], *names)
        look(new_watch())
        look(new_watch())
        assert len(rows_of(folders[1])) == len(names)
        assert set(blanks) < {row["path"] for row in rows_of(folders[1])}  # as predict.py alone writes them
        assert (folders[1] / "scores.csv").read_bytes().count(b"\n") == 1 + len(names)

    @pytest.mark.parametrize("torn", [1, 5, 20])
    def test_a_torn_row_is_made_anew(self, folders, new_watch, torn):
        add(folders[0], "a.png", "abc.png")
        look(new_watch())
        whole = (folders[1] / "scores.csv").read_bytes()
        (folders[1] / "scores.csv").write_bytes(whole[:-torn])
        look(new_watch())
        assert (folders[1] / "scores.csv").read_bytes() == whole

    def test_warnings_are_in_the_csv(self, folders, caplog):
        add(folders[0], *(f"{i:09d}.png" for i in range(60)))
        watch = Watch(*folders, Calibration(tuple(np.linspace(0, 1, 99)), 0.0, 1.0), 0.2, "part")
        look(begun(watch))
        warned = [row["path"] for row in rows_of(folders[1]) if row["drift"] == "1"]
        assert f"drift: up to {warned[0]}" in caplog.text and "100000" in caplog.text
        assert caplog.text.count("drift: up to") == len(warned)

    @pytest.mark.parametrize("text", ["path,score\n", f"{HEADER}\na.png,1\n", f"{HEADER}\n\xff\n", "\n"])
    def test_other_rows_are_refused(self, folders, new_watch, text):
        (folders[1] / "scores.csv").write_text(text, encoding="latin-1")
        with pytest.raises(RunError, match="is no row of a watch"):
            new_watch()


class TestFullDisk:
    @contextmanager
    def room(self, size):
        """The process cannot write files beyond so many bytes."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    @pytest.mark.parametrize("room", [0, 1, 30])
    def test_rows_wait_and_none_is_torn(self, folders, new_watch, monkeypatch, caplog, room):
        add(folders[0], "a.png", "abc.png")
        before = new_watch().path.read_bytes()
        full = self.room(len(before) + room)
        steps = [full.__enter__, None, None, None, lambda: full.__exit__(None, None, None), None, None]
        pretend(monkeypatch, steps)
        watch = new_watch()
        with pytest.raises(KeyboardInterrupt):
            watch.run(lengths)
        assert caplog.text.count("File too large") == 1
        assert [row["path"] for row in rows_of(folders[1])] == ["a.png", "abc.png"]
        assert watch.drift.sums == new_watch().drift.sums  # no image counted twice

    def test_a_folder_that_is_away_is_told_once(self, folders, new_watch, monkeypatch, caplog):
        away = folders[0].with_name("away")
        add(folders[0], "a.png")
        steps = [lambda: folders[0].rename(away), None, None, lambda: away.rename(folders[0]), None, None]
        pretend(monkeypatch, steps)
        with pytest.raises(KeyboardInterrupt):
            new_watch().run(lengths)
        assert caplog.text.count("trying again") == 1 and "No such file" in caplog.text
        assert [row["path"] for row in rows_of(folders[1])] == ["a.png"]

    def test_a_folder_that_goes_away_while_it_is_read(self, folders, new_watch, monkeypatch, caplog):
        away, calls = folders[0].with_name("away"), []

        def score(paths):
            if not calls:
                calls.append(folders[0].rename(away))
            return [read_image(path) for path in paths] and lengths(paths)

        add(folders[0], "a.png", "abc.png")
        pretend(monkeypatch, [None, None, lambda: away.rename(folders[0]), None, None])
        with pytest.raises(KeyboardInterrupt):
            new_watch().run(score)
        assert [row["path"] for row in rows_of(folders[1])] == ["a.png", "abc.png"]
        assert caplog.text.count("trying again") == 1 and "cannot be read" not in caplog.text


class TestFiles:
    def test_below_the_folder_and_named_alike(self, folders, new_watch):
        for name in ("a", "b"):
            (folders[0] / name).mkdir()
            add(folders[0] / name, "x.png")
        look(new_watch())
        (folders[0] / "a").rename(folders[0] / "c")  # other names are other images
        look(new_watch())
        assert [row["path"] for row in rows_of(folders[1])] == ["a/x.png", "b/x.png", "c/x.png"]

    def test_the_output_may_be_inside(self, folders, new_watch):
        add(folders[0], "a.png")
        (folders[0] / "out").mkdir()
        add(folders[0] / "out", "a.png")
        watch = Watch(folders[0], folders[0] / "out", new_watch().calibration, 0.2, "part")
        look(begun(watch))
        assert list(watch.done) == ["a.png"]

    def test_a_done_image_that_changes_is_told(self, folders, new_watch, caplog):
        add(folders[0], "a.png")
        watch = new_watch()
        look(watch)
        os.utime(folders[0] / "a.png", (1, 1))
        look(watch)
        assert caplog.text.count("a.png has changed after it was scored") == 1
        again = new_watch()
        look(again)  # when it was scored is not known here
        assert caplog.text.count("a.png has changed") == 1
        os.utime(folders[0] / "a.png", (2, 2))
        look(again)
        assert caplog.text.count("a.png has changed") == 2 and len(rows_of(folders[1])) == 1

    def test_a_changing_file_is_not_taken(self, folders, new_watch):
        add(folders[0], "a.png")
        watch = new_watch()
        for i in range(4):
            os.utime(folders[0] / "a.png", (i, i))
            look(watch, 1)
        assert not watch.done

    def test_one_that_is_deleted_while_it_is_read(self, folders, new_watch, monkeypatch):
        add(folders[0], "a.png", "abc.png")

        def score(paths):
            (folders[0] / "a.png").unlink(missing_ok=True)
            return [read_image(path) for path in paths] and lengths(paths)

        pretend(monkeypatch, [None, None, None, None])
        with pytest.raises(KeyboardInterrupt):
            new_watch().run(score)
        assert [row["path"] for row in rows_of(folders[1])] == ["abc.png"]

    def test_what_could_not_be_read_is_tried_again_later(self, folders, new_watch, monkeypatch, caplog):
        """The system may refuse a file that is whole, and later not."""
        calls = []

        def refuse(paths):
            calls.append(paths)
            raise UnreadableImageError(paths[0], "Input/output error")

        add(folders[0], "a.png")
        watch = new_watch()
        look(watch, 4, refuse)
        assert len(calls) == 1 and "a.png" in (folders[1] / "skipped.csv").read_text()
        watch.again = 0
        look(watch, 2, refuse)
        assert len(calls) == 2 and caplog.text.count("Input/output error") == 1
        watch.again = 0
        look(watch, 1)
        assert list(watch.done) == ["a.png"] and not (folders[1] / "skipped.csv").exists()

    def test_a_lost_table_is_begun_again(self, folders, new_watch, monkeypatch):
        add(folders[0], "a.png")
        steps = [None, None, (folders[1] / "scores.csv").unlink, lambda: add(folders[0], "b.png"), None, None]
        pretend(monkeypatch, [*steps, None, None])
        with pytest.raises(KeyboardInterrupt):
            new_watch().run(lengths)
        assert sorted(row["path"] for row in rows_of(folders[1])) == ["a.png", "b.png"]


def pretend(monkeypatch, steps):
    """Do these one after the other in place of waiting, then interrupt."""
    left = iter(steps)

    def sleep(_):
        try:
            step = next(left)
        except StopIteration:
            raise KeyboardInterrupt from None
        if step is not None:
            step()

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))


class TestCommand:
    @pytest.fixture
    def watch(self, run, monkeypatch, tmp_path):  # noqa: F811
        """Run predict.py --watch with these steps between its looks."""
        (tmp_path / "in").mkdir()

        def call(*flags, steps=(None,)):
            pretend(monkeypatch, steps)
            code, out, err = run("--watch", str(tmp_path / "in"), "--quiet", *flags)
            return code, out, err

        call.copy = lambda path: shutil.copy(path, tmp_path / "in" / path.name)
        return call

    def test_rows_and_pictures_are_those_of_predict(self, watch, run, mvtec_like, tmp_path):  # noqa: F811
        for path in (mvtec_like / "part/test/spot").glob("*.png"):
            watch.copy(path)
        assert watch("--save", "overlay,map")[0] == 0
        found = rows_of(tmp_path / "out")
        assert {p.name for p in (tmp_path / "out/heatmaps").iterdir()} == {f"00{i}.png.png" for i in range(3)}
        assert len(list((tmp_path / "out/maps").iterdir())) == 3
        assert run(str(tmp_path / "in"), "--quiet", "--output", str(tmp_path / "once"))[0] == 0
        for row, other in zip(found, rows_of(tmp_path / "once"), strict=True):
            assert row.pop("drift") == "0"
            assert row == other

    def test_a_half_written_file_is_taken_when_it_is_whole(self, watch, mvtec_like, tmp_path):
        whole, there = (mvtec_like / "part/test/spot/000.png").read_bytes(), tmp_path / "in/x.png"
        seen = []

        def finish():
            seen.append((tmp_path / "out/skipped.csv").read_text())
            assert rows_of(tmp_path / "out") == []
            there.write_bytes(whole)

        steps = [lambda: there.write_bytes(whole[: len(whole) // 2]), None, finish, None, None]
        assert watch(steps=steps)[0] == 0
        assert "x.png" in seen[0] and not (tmp_path / "out/skipped.csv").exists()
        assert [row["path"] for row in rows_of(tmp_path / "out")] == ["x.png"]

    def test_a_file_that_stays_bad_stops_no_other(self, watch, mvtec_like, tmp_path):
        (tmp_path / "in/bad.png").write_text("no image")
        watch.copy(mvtec_like / "part/test/spot/001.png")
        code, _, err = watch(steps=[None] * 4)
        assert code == 0 and err.count("bad.png") == 1
        assert [row["path"] for row in rows_of(tmp_path / "out")] == ["001.png"]
        assert "bad.png" in (tmp_path / "out/skipped.csv").read_text()

    def test_mistakes(self, watch, run, mvtec_like, tmp_path, monkeypatch):  # noqa: F811
        plain = ["--checkpoint", str(tmp_path / RUN), "--device", "cpu", "--quiet", "--watch"]
        flags = [*plain, str(tmp_path / "in"), "--output", str(tmp_path / "out")]
        pretend(monkeypatch, [])
        assert run_command(predict_command.main, flags) == 0  # begins
        assert run_command(predict_command.main, flags) == 0  # goes on
        assert run_command(predict_command.main, [*flags, "--false-alarm-rate", "0.2"]) == 1
        with FileLock(tmp_path / "out/.watch.lock"):
            assert run_command(predict_command.main, flags) == 1
        code, _, err = run("--watch", str(tmp_path / "no_such"))
        assert code == 1 and "needs a folder" in err
        code, _, err = run("--watch", str(tmp_path / "in"), "--output", str(tmp_path / "in"))
        assert code == 1 and "needs a folder" in err
        state = load_checkpoint(tmp_path / RUN / "last.pt")
        state.calibration = None
        state.save(tmp_path / RUN / "last.pt")
        code, _, err = run("--watch", str(tmp_path / "in"))
        assert code == 2 and "calibrate.py" in err


class TestOutput:
    ABOUT = {"images": "/new", "rate": 0.1}  # noqa: RUF012

    def refused(self, folder, about, message):
        with pytest.raises(RunError, match=message), watched(folder, about, overwrite=False):
            pass

    def test_one_process_at_a_time(self, tmp_path):
        with watched(tmp_path, self.ABOUT, overwrite=False):
            self.refused(tmp_path, self.ABOUT, "another process watches")
        with watched(tmp_path, self.ABOUT, overwrite=False):  # goes on
            pass

    def test_rows_that_do_not_go_together(self, tmp_path):
        with watched(tmp_path, self.ABOUT, overwrite=False):
            (tmp_path / "scores.csv").write_text("rows")
        self.refused(tmp_path, self.ABOUT | {"rate": 0.2}, r"rate 0\.1, not 0\.2")
        with watched(tmp_path, self.ABOUT | {"rate": 0.2}, overwrite=True):
            assert not (tmp_path / "scores.csv").exists()
        (tmp_path / "watch.json").unlink()
        (tmp_path / "scores.csv").write_text("of a single prediction")
        self.refused(tmp_path, self.ABOUT, "of an earlier call")

    def test_what_a_killed_process_left_is_removed(self, tmp_path):
        left = [tmp_path / f".scores.csv.x{PARTIAL}", tmp_path / f"heatmaps/a/.x.png.x{PARTIAL}"]
        others = tmp_path / f"new/.of_another_program{PARTIAL}"
        with watched(tmp_path, self.ABOUT, overwrite=False):
            pass
        for path in (*left, others):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("half")
        with watched(tmp_path, self.ABOUT, overwrite=False):
            assert others.exists() and not any(path.exists() for path in left)


FAST = """
from pathlib import Path
import numpy as np
import evaluation.watch, model
from datasets.loader import batches
from datasets.transforms import Normalise
from model.detector import Calibration
from model.inference import Predicted
from utils.layers import load_config
class Fast:  # the mean of the pixels, in place of a network
    path, precision = Path("predict.py"), "fp32"
    config = load_config(Path("configs/folder.yaml"), {"data.image_size": 64}, category="part")
    calibration = Calibration(tuple(np.linspace(0, 250, 99)), 0.0, 250.0)
    normalise = Normalise((0.48, 0.45, 0.4), (0.22, 0.22, 0.23))
    def predictions(self, data, *, quiet):
        for batch in batches(data, 16):
            maps = self.normalise.pixels(batch["image"]).mean(-1).astype(np.float32)
            yield Predicted(batch, maps.mean((1, 2)).astype(float), maps, 0.0)
model.load_detector = lambda *_, **__: Fast()
evaluation.watch.INTERVAL = 0.02
"""


def arrive(folder, count):
    """Write images one by one, the grey value i % 250; every fiftieth is half there for a while."""
    for i in range(count):
        path, whole = folder / f"{i:05d}.png", folder.parent / "whole.png"
        Image.new("RGB", (16, 16), (i % 250,) * 3).save(whole)
        data = whole.read_bytes()
        with path.open("wb") as file:
            if i % 50 == 0:
                file.write(data[: len(data) // 2])
                file.flush()
                time.sleep(0.05)
                data = data[len(data) // 2 :]
            file.write(data)
        time.sleep(0.003)


def resident(pid):
    """Bytes of memory that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


@pytest.mark.slow
def test_killed_twenty_times_each_image_is_there_once(folders):
    """5,000 images arrive; the watch is killed at any moment of its work, and its memory stays flat."""
    images, output = folders
    scores, count, rng = output / "scores.csv", 5000, random.Random(0)
    flags = ["--checkpoint", "x", "--watch", images, "--output", output, "--save", "map", "--quiet"]

    def rows():
        return scores.read_bytes().count(b"\n") - 1 if scores.exists() else 0

    def wait_for(number, script):
        for _ in range(30_000):  # a minute or more, not by a clock: the machine may stand still
            if rows() >= number:
                return
            time.sleep(0.002)
            assert script.poll() is None, script.stderr
        raise AssertionError(f"{rows()} of {number} rows: {script.stderr}")

    threading.Thread(target=arrive, args=(images, count), daemon=True).start()
    script = None
    try:
        for _ in range(20):
            script = processes.start("predict.py", *flags, before=FAST)
            wait_for(rows() + rng.randint(1, 80), script)
            time.sleep(rng.uniform(0, 0.1))
            script.kill()
            assert script.wait().returncode == -9
        script = processes.start("predict.py", *flags, before=FAST)
        wait_for(rows() + 500, script)
        began, early = rows(), resident(script.pid)
        wait_for(count, script)
        assert count - began > 1000 and resident(script.pid) - early < 16 << 20
        time.sleep(0.5)  # skipped.csv follows the rows
        script.terminate()
        assert script.wait().returncode == 0, script.stderr
    finally:
        script.kill()
    found = [(row["path"], float(row["score"])) for row in rows_of(output)]
    assert sorted(found) == [(f"{i:05d}.png", i % 250) for i in range(count)]
    assert sorted(p.name for p in (output / "maps").iterdir()) == [f"{i:05d}.png.tiff" for i in range(count)]
    assert not (output / "skipped.csv").exists()
