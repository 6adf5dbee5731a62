"""Never lose a run: killed at random, no space, no permission, hostile files, losses that are no number."""

from pathlib import Path

import processes
import pytest
import torch
from conftest import TINY

import predict as predict_command
import train as train_command
from model.uninet import UniNet
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.cli import run_command
from utils.errors import ConfigError
from utils.files import PARTIAL
from utils.runs import locked
from utils.yaml_io import MAX_CONFIG_BYTES, read_yaml

SMALL = [
    "--category", "part", "--backbone", TINY, "--precision", "fp32", "--device", "cpu",
    "--quiet", "--eval", "none", "--name", "r", "--set", "data.image_size=64",
    "--weights", "random", "--set", "model.width=0.25", "--set", "train.batch_size=2",
    "--save-every", "2",
]  # fmt: skip


@pytest.fixture
def run(mvtec_like, tmp_path, capfd):
    """Run train.py in this process; gives (exit code, stderr)."""

    def call(*flags, output=tmp_path / "runs"):
        argv = ["--data-root", str(mvtec_like), "--output", str(output), *SMALL, *flags]
        return run_command(train_command.main, argv), capfd.readouterr().err

    return call


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs/mvtec/one-class/part/r"


def one_line(err: str) -> bool:
    return err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


class TestResume:
    def test_other_settings_are_refused(self, run, folder, monkeypatch):
        monkeypatch.setattr(train_command, "stop_if_not_finite", interrupt_at(3))
        assert run("--iterations", "4")[0] == 1
        before = (folder / "last.pt").read_bytes()
        code, err = run("--iterations", "4", "--resume", "--set", "loss.kd_weight=0.5", "--seed", "1")
        assert code == 1 and one_line(err) and "--overwrite" in err
        assert "loss.kd_weight (0.7, now 0.5)" in err and "train.seed (0, now 1)" in err
        assert (folder / "last.pt").read_bytes() == before

    def test_what_a_killed_process_left_is_removed(self, folder):
        folder.mkdir(parents=True)
        (folder / f".last.pt.abc{PARTIAL}").write_bytes(b"half")
        with locked(folder):
            assert [p.name for p in folder.iterdir()] == [".lock"]


def interrupt_at(step):
    def stop(run, parts, batch, at):
        if at == step:
            raise KeyboardInterrupt

    return stop


class TestResources:
    @pytest.mark.slow
    def test_no_space_for_the_next_checkpoint(self, mvtec_like, folder, tmp_path):
        """A process that may write files of 8 MB only: the checkpoint of step 2 stays, the last one fails."""
        program = """
import resource
import utils.checkpoint as checkpoint
real = checkpoint.Checkpoint.save
def saved(*args):
    real(*args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
checkpoint.Checkpoint.save = saved
"""
        flags = ["--data-root", str(mvtec_like), "--output", str(tmp_path / "runs"), *SMALL]
        done = processes.run("train.py", *flags, "--iterations", "4", before=program)
        assert done.returncode == 1 and one_line(done.stderr), done.stderr
        assert "could not be written" in done.stderr and "MB are free" in done.stderr
        assert load_checkpoint(folder / "last.pt").iteration == 2
        assert not list(folder.glob(f".*{PARTIAL}")) and not (folder / "metrics.json").exists()

    def test_no_space_for_a_text(self, run, folder, monkeypatch):
        import errno
        import os

        def full(handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        code, err = run("--iterations", "1")
        assert code == 1 and one_line(err) and f"No space left on device: '{folder}/" in err
        assert not list(folder.glob(f".*{PARTIAL}"))

    def test_output_cannot_be_written(self, run, tmp_path):
        (tmp_path / "file").write_text("not a folder")
        code, err = run("--iterations", "1", output=tmp_path / "file")
        assert code == 1 and one_line(err) and str(tmp_path / "file") in err
        code, err = run("--iterations", "1", output=Path("/proc/nowhere"))  # root may write nearly anywhere
        assert code == 1 and one_line(err) and "/proc/nowhere" in err

    def test_predictions_cannot_be_written(self, run, folder, mvtec_like, tmp_path, capfd):
        assert run("--model", "memory-bank")[0] == 0
        argv = ["--checkpoint", str(folder), str(mvtec_like / "part/test/good"), "--output", "/proc/nowhere"]
        assert run_command(predict_command.main, [*argv, "--quiet"]) == 1
        assert one_line(capfd.readouterr().err)


class TestLossThatIsNoNumber:
    def test_the_last_good_checkpoint_stays(self, run, folder, monkeypatch):
        real, steps = UniNet.loss, []

        def poisoned(self, batch, progress):
            parts = real(self, batch, progress)
            steps.append(progress)
            if len(steps) == 4:
                parts["sc"] = parts["sc"] * float("nan")
                parts["total"] = parts["total"] + parts["sc"]
            return parts

        monkeypatch.setattr(UniNet, "loss", poisoned)
        code, err = run("--iterations", "6")
        assert code == 1 and one_line(err)
        assert "step 3" in err and "sc nan" in err and any(suffix in err for suffix in (".jpg", ".PNG"))
        state = load_checkpoint(folder / "last.pt")
        assert state.iteration == 2 and all(v.isfinite().all() for v in state.model.values())


class TestHostileCheckpoints:
    @pytest.fixture
    def good(self, make_config, folder):
        """A checkpoint in the run's folder."""
        Checkpoint(make_config(), {"a": torch.zeros(10000)}, 1).save(folder / "last.pt")
        return folder / "last.pt"

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
    def test_truncated(self, run, good, share):
        content = good.read_bytes()
        good.write_bytes(content[: int(share * len(content))])
        code, err = run("--iterations", "1", "--resume")
        assert code == 1 and one_line(err) and "damaged" in err
        assert good.stat().st_size == int(share * len(content))  # nothing was put in its place

    def test_a_pickle_through_every_command(self, good, tmp_path, mvtec_like, run, capfd):
        import export as export_command
        import test as test_command

        torch.save({"format": 1, "model": Evil(tmp_path / "executed")}, good)
        images = str(mvtec_like / "part/test")
        for command, extra in (
            (test_command, []),
            (predict_command, [images, "--output", str(tmp_path / "out")]),
            (export_command, []),
        ):
            assert run_command(command.main, ["--checkpoint", str(good), "--quiet", *extra]) == 1
            err = capfd.readouterr().err
            assert one_line(err) and "nothing of it was run" in err
        assert run("--iterations", "1", "--resume")[0] == 1
        assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("tree", "message"), [
        ({"wrong.weight": torch.zeros(2)}, "no state dict of this backbone: it lacks"),
        ([1, 2], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
    ])  # fmt: skip
    def test_weights_of_another_backbone(self, run, tmp_path, tree, message):
        torch.save(tree, tmp_path / "weights.pth")
        code, err = run("--iterations", "1", "--weights", str(tmp_path / "weights.pth"))
        assert code == 1 and one_line(err) and message in err

    def test_weights_that_are_a_program(self, run, tmp_path):
        torch.save({"conv_stem.weight": Evil(tmp_path / "executed")}, tmp_path / "weights.pth")
        code, err = run("--iterations", "1", "--weights", str(tmp_path / "weights.pth"))
        assert code == 1 and one_line(err) and "no plain PyTorch state dict" in err
        assert not (tmp_path / "executed").exists()

    def test_a_checkpoint_of_another_backbone(self, run, folder):
        flags = ("--iterations", "2")
        assert run(*flags)[0] == 0
        (folder / "metrics.json").unlink()
        before = (folder / "last.pt").read_bytes()
        code, err = run(*flags, "--resume", "--backbone", "resnet18")
        assert code == 1 and one_line(err) and f"model.backbone ({TINY}, now resnet18)" in err
        assert (folder / "last.pt").read_bytes() == before


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestHostileConfigs:
    @pytest.mark.parametrize(("text", "message"), [
        ("a: &a [1, 2]\nb: *a", "aliases"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]", "aliases"),
        ("train: !!python/object/apply:os.system ['touch executed']", "not readable YAML"),
        ("train: !!python/name:os.system", "not readable YAML"),
        ("train:\n  iterations: [1, 2", "not readable YAML"),
        ("- a\n- b", "must hold sections"),
        ("", "must hold sections"),
        ("\x00\x01", "not readable YAML"),
        ("[" * 5000, "not readable YAML"),
        ("train: {iteratons: 5}", "did you mean 'train.iterations'"),
        ("trian: {iterations: 5}", "did you mean 'train'"),
        ("train: 5", "is a section"),
    ])  # fmt: skip
    def test_one_line_and_nothing_is_run(self, run, tmp_path, text, message, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "c.yaml").write_text(text)
        code, err = run("--config", str(tmp_path / "c.yaml"))
        assert code == 2 and one_line(err) and message in err
        assert not (tmp_path / "executed").exists() and not (tmp_path / "runs").exists()

    def test_a_huge_file(self, tmp_path):
        (tmp_path / "c.yaml").write_text("a: " + "x" * MAX_CONFIG_BYTES)
        with pytest.raises(ConfigError, match="too large"):
            read_yaml(tmp_path / "c.yaml")

    @pytest.mark.parametrize("text", ["train.iterations=*a", "train.iterations=!!python/name:os.system"])
    def test_on_the_command_line(self, run, text):
        code, err = run("--set", text)
        assert code == 2 and one_line(err)
