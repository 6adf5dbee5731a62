"""Shared helpers: small configurations, tiny datasets on disk, and the shared real images if there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before PyTorch is loaded: a process copied from one in which OpenMP has started threads waits for ever at
# its first parallel loop (tests/processes.py copies), and the models here are tiny.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"

from model.backbone import BackboneInfo  # noqa: E402
from utils.layers import load_config  # noqa: E402

LITE0 = "tf_efficientnet_lite0"
TINY = "test_efficientnet"  # of timm, for tests: a tenth of the parameters and no weights to load


def pytest_collection_finish():
    """Not in the process that only hands tests to others."""
    import warm  # noqa: F401


def pytest_collection_modifyitems(items):
    """Tests marked slow (seconds each) run where UNINET_SLOW_TESTS is set, as .ci/run does."""
    if "UNINET_SLOW_TESTS" not in os.environ:
        skip = pytest.mark.skip(reason="slow; .ci/run sets UNINET_SLOW_TESTS=1")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def real_plots(monkeypatch):
    """report.html with its plots, also where tests/warm.py leaves them out."""
    import warm

    for name, plot in warm.PLOTS.items():
        monkeypatch.setattr(warm.report, name, plot)


@pytest.fixture
def copied_processes(monkeypatch):
    """Scripts that the test's subject starts are copies of a process that has imported PyTorch."""
    import processes

    processes.replace_subprocess(monkeypatch)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a test may have set more


def levels(*channels: int, strides: tuple[int, ...] = (4, 8, 16), signed: bool = False) -> BackboneInfo:
    """What a bottleneck and a student need to know of a backbone."""
    return BackboneInfo("x", channels, strides, (0.5,) * 3, (0.5,) * 3, signed)


@pytest.fixture(scope="session")
def make_config():
    """A configuration of a tiny backbone with random weights; keyword `set` holds dotted overrides."""

    def make(path="configs/mvtec.yaml", category=None, **settings):
        chosen = {
            "model.backbone": TINY,
            "model.weights": "random",
            "model.width": 1.0,
            "data.image_size": 64,
            "train.epochs": None,
            "train.precision": "fp32",
            "run.device": "cpu",
        }
        chosen |= {key.replace("__", "."): value for key, value in settings.items()}
        return load_config(ROOT / path, chosen, category=category)

    return make


def write_image(path: Path, rng: np.random.Generator, size=(48, 40), mode="RGB", spot: bool = False) -> None:
    """A stripy picture (height, width); `spot` puts a bright square at rows 10..19, columns 10..19."""
    height, width = size
    stripes = 90 + 40 * np.sin(np.arange(width) / 3)[None] + rng.normal(0, 4, (height, width))
    if spot:
        stripes[10:20, 10:20] = 250
    grey = Image.fromarray(np.clip(stripes, 0, 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    grey.convert(mode).save(path)


def write_mask(path: Path, size=(48, 40), value: int = 255) -> None:
    """The mask of `write_image`'s spot."""
    mask = np.zeros(size, np.uint8)
    mask[10:20, 10:20] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


@pytest.fixture
def mvtec_like(tmp_path):
    """MVTec AD's layout, category 'part': 12 train, 4 good, 5 anomalous test images, odd files too."""
    return write_mvtec_like(tmp_path / "data")


def write_mvtec_like(root: Path) -> Path:
    """What `mvtec_like` is; the same images each time."""
    rng = np.random.default_rng(0)
    base = root / "part"
    for i in range(12):
        write_image(
            base / f"train/good/{i:03d}.{'PNG' if i % 2 else 'jpg'}", rng, mode="L" if i % 3 else "RGB"
        )
    for i in range(4):
        write_image(base / f"test/good/{i:03d}.png", rng)
    for i in range(3):
        write_image(base / f"test/spot/{i:03d}.png", rng, spot=True)
        write_mask(base / f"ground_truth/spot/{i:03d}_mask.png")
    for i in range(2):
        write_image(base / f"test/dot/{9 - i}.bmp", rng, spot=True)
        write_mask(base / f"ground_truth/dot/{9 - i}.png")
    (base / "test/spot/Thumbs.db").write_bytes(b"odd")
    (base / "readme.txt").write_text("a text among the images")
    return root


@pytest.fixture
def shared_data():
    """Folder of the real images; the test is skipped where it is missing."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data, the real images beside the repository")
    return SHARED / "data"


@pytest.fixture(scope="session")
def masters(tmp_path_factory):
    """Each benchmark's layout in small (tests/fixtures.py), written once; not to be changed."""
    from fixtures import LAYOUTS, write_layout

    folder = tmp_path_factory.mktemp("layouts")
    return {layout: write_layout(layout, folder / layout) for layout in LAYOUTS}
