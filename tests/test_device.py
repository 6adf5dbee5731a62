"""Device and precision choices, learning-rate schedules."""

import dataclasses
import os
import platform
import shlex
import subprocess
import sys

import cv2
import numpy as np
import processes
import pytest
import torch
from conftest import ROOT
from torch._utils import ExceptionWrapper

import utils.device
from utils.cli import run_command
from utils.device import autocast, choose_device, choose_precision, seed_everything, versions
from utils.errors import DatasetError
from utils.optim import rate_at

CPU = torch.device("cpu")


@pytest.mark.parametrize(("fp32", "bf16", "expected"), [
    (1.0, 0.4, "bf16"),
    (1.0, 0.95, "fp32"),  # too little gained
    (1.0, 100.0, "fp32"),  # emulated
])  # fmt: skip
def test_auto_looks_before_it_chooses(monkeypatch, fp32, bf16, expected):
    probed = []

    def seconds(dtype, size):
        probed.append((dtype, size))
        return bf16 if dtype == torch.bfloat16 else fp32

    monkeypatch.setattr(utils.device, "_product_seconds", seconds)
    assert choose_precision("auto", CPU) == expected
    if bf16 > 20:  # the small product was warning enough
        assert {size for _, size in probed} == {128}
    assert choose_precision("bf16", CPU) == "bf16" and choose_precision("fp32", CPU) == "fp32"
    with pytest.raises(ValueError, match="precision 'fp16' is unknown; choose auto, fp32 or bf16"):
        choose_precision("fp16", CPU)


def test_results_name_the_device_that_computed(monkeypatch):
    """A run on the CPU of a machine with a GPU is no run on that GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    assert versions(torch.device("cpu"))["device"] == platform.machine()
    assert versions(torch.device("cuda:1"))["device"] == "GPU cuda:1"


def test_autocast():
    a = torch.ones(4, 4)
    with autocast(CPU, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert (a @ a).dtype == torch.float32


def test_devices():
    assert choose_device("cpu") == CPU
    for name in ("gpu", "tpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{name}'"):
            choose_device(name)


def test_seeds():
    seed_everything(3)
    a = torch.rand(3)
    seed_everything(3)
    assert torch.equal(a, torch.rand(3))


def test_schedules(make_config):
    def rates(schedule, warmup=0):
        config = make_config(optim__schedule=schedule, optim__warmup=warmup)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, iterations=100))
        return [rate_at(step, config) for step in range(100)]

    assert set(rates("constant")) == {1.0}
    assert rates("step") == [1.0] * 80 + [0.2] * 20
    cosine = rates("cosine", warmup=10)
    assert cosine[:10] == pytest.approx([0.1 * k for k in range(1, 11)]) and cosine[10] == 1
    assert all(a > b for a, b in zip(cosine[10:], cosine[11:])) and cosine[-1] < 1e-3


def full(text):
    raise torch.OutOfMemoryError(text)


@pytest.mark.parametrize(("fill", "where"), [
    (lambda: torch.empty(10**15), "CPU, 4000000000000000 bytes too many"),
    (lambda: np.empty(10**15), "CPU, 7.11 PiB too many"),
    (lambda: cv2.resize(np.zeros((9, 9, 3), np.uint8), (2**20, 2**20)), "CPU, 3298534883328 bytes too many"),
    (lambda: full("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0"), "GPU, 20.00 GiB too many"),
])  # fmt: skip
def test_out_of_memory_is_one_line(fill, where, capfd):
    assert run_command(lambda argv: fill(), []) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"out of memory on the {where}; lower train.batch_size" in err
    with pytest.raises((RuntimeError, MemoryError, cv2.error)):
        run_command(lambda argv: fill(), ["--debug"])


def test_our_own_faults_keep_their_traceback():
    def fault(argv):
        raise RuntimeError("shapes do not agree")

    with pytest.raises(RuntimeError, match="do not agree"):
        run_command(fault, [])


def test_an_error_of_a_loader_process_is_one_line(capfd):
    def fault(argv):
        try:
            raise DatasetError("cannot read a.png: truncated")
        except DatasetError:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    assert run_command(fault, []) == 1
    assert capfd.readouterr().err == "error: cannot read a.png: truncated\n"


MEMORY = """
import resource, sys, torch
import utils.device
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20  # MiB
told = getattr(utils.device, sys.argv[1])() if len(sys.argv) > 1 else True
before = resident()
blocks = [torch.empty(9 << 20).fill_(1) for _ in range(8)]  # 36 MiB each
most = resident() - before
del blocks
held = resident() - before
for _ in range(20):  # aligned blocks leave small gaps; it takes some rounds until one fits into an old one
    torch.empty(1 << 24).fill_(1)
start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.empty(1 << 24).fill_(1)
print(int(told), most, held, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be told")
class TestMemory:
    def seen(self, *how):
        """MiB at most, MiB held after all is freed, page faults of later blocks."""
        words = [sys.executable, "-c", MEMORY, *how]
        found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        if found[0] == "0":
            pytest.skip("this C library cannot be told")
        return [int(x) for x in found[1:]]

    def test_freed_memory_is_kept_and_used_again(self):
        most, held, faults = self.seen("keep_freed_memory")
        assert most > 280 and held > 250
        assert faults * 20 < self.seen()[2]


def test_copied_process_has_one_thread():
    """With more it would wait for ever for those that the process it was copied from had started."""
    program = "import torch; print(torch.get_num_threads()); raise SystemExit(0)"
    done = processes.run("train.py", before=program)
    assert (done.returncode, done.stdout) == (0, "1\n")


@pytest.mark.parametrize("command", [
    "train.py", "test.py", "predict.py", "export.py", "-m datasets.check", "-m scripts.demo",
    "-m scripts.tables.accuracy", "-c import\\ model",
])  # fmt: skip
def test_threads_that_wait_sleep(tmp_path, command):
    """Each command says so before it loads PyTorch, for which a stub stands here."""
    (tmp_path / "torch.py").write_text(
        "import os; print(os.environ['OMP_WAIT_POLICY'], flush=True); os._exit(0)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    words = [sys.executable, *shlex.split(command), "--help"]
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        env = env | {"PYTHONPATH": str(tmp_path)} | given
        assert (
            subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True).stdout == f"{expected}\n"
        )
