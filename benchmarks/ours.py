"""Our half: the workloads of the table, on this repository."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generated import images, maps_and_masks, unit_features  # noqa: E402
from machine import machine  # noqa: E402
from operations import Operations, convolutions, similarity, similarity_of_step  # noqa: E402
from PIL import Image  # noqa: E402
from protocol import Reply, Spec, Workload, serve  # noqa: E402
from shapes import configuration, uninet  # noqa: E402
from stages import predict_stages, train_stages  # noqa: E402

from datasets.transforms import Normalise  # noqa: E402
from evaluation.metrics import pixel_metrics as all_pixel_metrics  # noqa: E402
from losses.similarity import contrastive_loss, margin_loss, softmax_diagonal  # noqa: E402
from model.exported import open_session  # noqa: E402
from model.inference import replayed  # noqa: E402
from model.step import EAGER, TrainingStep  # noqa: E402
from utils.checkpoint import Checkpoint  # noqa: E402
from utils.device import autocast, keep_freed_memory  # noqa: E402
from utils.optim import make_optimizer  # noqa: E402

Built = tuple[Workload, Operations]


def train(spec: Spec) -> Built:
    """A step as train.py takes it: forward, backward, finite check, optimiser; on a GPU as a graph."""
    net, device = uninet(spec).train(), torch.device(spec.device)
    config = configuration(spec)
    optimizer, schedule = make_optimizer(net.parameter_groups(config.optim), config)
    batch = {"image": images(spec).contiguous(memory_format=torch.channels_last)}
    take = TrainingStep(net, optimizer, config)

    def step() -> None:
        take(batch)
        schedule.step()

    levels = list(zip(net.info.channels, net.info.strides, strict=True))
    one = {name: value[:1] for name, value in batch.items()}
    counted = Operations(convolution=spec.batch * convolutions(lambda: take(one)).convolution)
    counted += similarity_of_step(spec.batch, spec.size, levels)
    for _ in range(1 if device.type == "cpu" else EAGER + 1):
        step()
    assert take.first_bad() is None
    return step, counted


def predict(spec: Spec) -> Built:
    """Score `count` images in batches with the deployed model, as predict.py does."""
    net, device = uninet(spec).deploy(), torch.device(spec.device)
    batch = images(spec).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(spec.count // spec.batch):
            with autocast(device, spec.precision):
                net.predict(batch)

    counted = convolutions(run)
    net = replayed(net)
    for _ in range(2):  # the second call records a graph on a GPU
        run()
    return run, counted


def onnx(spec: Spec) -> Built:
    """Score `count` images in batches with ONNX Runtime and the file that export.py writes."""
    net = uninet(spec)
    with tempfile.TemporaryDirectory(prefix="uninet-benchmark-") as name:
        folder = Path(name)
        Checkpoint(configuration(spec), net.state_dict(), 1).save(folder / "last.pt")
        (folder / "images").mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (spec.batch, spec.size, spec.size, 3), np.uint8)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"images/{i}.png")
        command = [sys.executable, "export.py", "--checkpoint", str(folder / "last.pt")]
        command += ["--images", str(folder / "images"), "--output", str(folder / "model.onnx"), "--quiet"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        session = open_session(folder / "model.onnx")
    given, outputs = session.get_inputs()[0].name, ["score", "anomaly_map"]
    images_of = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # strided channels last
    scale, offset = (
        torch.from_numpy(x).view(3, 1, 1) for x in Normalise(net.info.mean, net.info.std).factors()
    )
    net = net.deploy()
    with torch.inference_mode():
        expected = net.predict(images_of * scale + offset).anomaly_map.numpy()
        counted = convolutions(lambda: net.predict(images_of * scale + offset))
    off = float(np.abs(session.run(outputs, {given: pixels})[1] - expected).max() / np.ptp(expected))

    def run() -> Reply:
        for _ in range(spec.count // spec.batch):
            session.run(outputs, {given: pixels})
        return {"off": off}

    return run, Operations(convolution=counted.convolution * (spec.count // spec.batch))


def similarity_loss(spec: Spec) -> Built:
    """L_SC and L_M of one pair, forward and backward to both features."""
    student, teacher = (x.requires_grad_() for x in unit_features(spec))

    def run() -> None:
        student.grad = teacher.grad = None
        d = softmax_diagonal(student, teacher, 2.0)
        (0.3 * contrastive_loss(d) + margin_loss(d, 1.0)).backward()

    run()
    return run, similarity(spec.batch, spec.size**2, spec.channels, teacher_learns=True)


def pixel_metrics(spec: Spec) -> Built:
    """AUROC, AP, F1, PRO at 0.3 and 0.05."""
    maps, masks = maps_and_masks(spec)

    def run() -> Reply:
        pro = all_pixel_metrics(maps, masks)["pro"]
        assert pro is not None  # there are regions
        return {"pro": pro}

    run()
    return run, Operations()


def memory_bank(spec: Spec) -> Built:
    """Fit on `count` images, then score one batch; the bank is a random tenth of the patches."""
    net, batch = uninet(replace(spec, variant="memory-bank")), images(spec)

    @torch.inference_mode()
    def run() -> None:
        torch.manual_seed(0)
        net.fit((batch + 0.1 * torch.randn_like(batch) for _ in range(spec.count // spec.batch)), seed=0)
        net.predict(batch)

    run()
    return run, Operations()


def start(spec: Spec) -> Built:
    """train.py up to the end of its first step, as a command, on `count` PNG files of size x size."""
    folder = tempfile.TemporaryDirectory(prefix="uninet-benchmark-")
    root, rng = Path(folder.name), np.random.default_rng(0)
    for i in range(spec.count + 1):  # one to test on
        part = "train" if i else "test"
        coarse = rng.integers(0, 200, (spec.size // 16, spec.size // 16, 3), dtype=np.uint8)
        pixels = coarse.repeat(16, 0).repeat(16, 1) + rng.integers(0, 30, (spec.size, spec.size, 3), np.uint8)
        path = root / f"part/{part}/good/{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    command = [
        sys.executable,
        "train.py",
        "--config",
        "configs/folder.yaml",
        "--data-root",
        str(root / "part"),
    ]
    command += [
        "--flavor",
        spec.variant,
        "--backbone",
        "wide_resnet50_2",
        "--set",
        "model.weights=random",
    ]
    command += ["--set", "data.calibration_fraction=0"]  # images that are scored afterwards
    command += ["--iterations", "1", "--eval", "none", "--quiet", "--overwrite", "--device", spec.device]
    command += ["--precision", spec.precision, "--output", str(root / "runs")]

    def run(kept: object = folder) -> Reply:  # the images are removed with the workload
        for log in (root / "runs").rglob("log.jsonl"):
            log.unlink()
        began, first = time.perf_counter(), None
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)  # noqa: S603
        while process.poll() is None:  # the checkpoint at the end is not waited for
            time.sleep(0.02)
            if first is None and any(log.stat().st_size for log in (root / "runs").rglob("log.jsonl")):
                first = time.perf_counter() - began
        if process.returncode or first is None:
            raise RuntimeError(f"train.py ended with code {process.returncode} before its first step")
        return {"seconds": first}

    return run, Operations()


WORKLOADS: dict[str, Callable[[Spec], Built]] = {
    "train": train,
    "predict": predict,
    "onnx": onnx,
    "similarity": similarity_loss,
    "pixel-metrics": pixel_metrics,
    "memory-bank": memory_bank,
    "start": start,
    "machine": machine,
}
STAGES = {"train-stages": train_stages, "predict-stages": predict_stages}


def build(spec: Spec) -> tuple[Workload, Reply]:
    """The workload after a warm-up run, and its operations; of stages a table of them."""
    torch.manual_seed(0)
    torch.set_num_threads(spec.threads)
    keep_freed_memory()  # as every command does
    if spec.row in STAGES:
        run, operations = STAGES[spec.row](spec)
        return run, {"stage_operations": {name: vars(found) for name, found in operations.items()}}
    run, found = WORKLOADS[spec.row](spec)
    return run, {"operations": vars(found)}


if __name__ == "__main__":
    serve(build)
