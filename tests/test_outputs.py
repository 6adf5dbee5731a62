"""Names of what is written about images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.samples import NORMAL, Sample
from evaluation.results import names_of
from evaluation.scoring import Scores
from test import write_maps


@pytest.mark.parametrize(
    ("images", "names"),
    [
        (["a/0.png", "b/0.png"], ["a/0.tiff", "b/0.tiff"]),
        (["a/0.png", "a/0.jpg"], ["a/0.png.tiff", "a/0.jpg.tiff"]),
        (["/elsewhere/0.png"], ["elsewhere/0.tiff"]),
    ],
    ids=["same name", "another ending", "outside"],
)
def test_one_name_an_image(images, names):
    assert names_of([Path(p) for p in images], ".tiff") == [Path(p) for p in names]


def test_maps_of_images_of_the_same_name_are_all_written(tmp_path):
    """As in KolektorSDD, where every commutator has a Part0, and in the clips of Ped2."""
    root = tmp_path / "data"
    paths = [root / f"kos{item}/Part0.jpg" for item in ("36", "50")]
    samples = [Sample(p, NORMAL, None, "kolektor", "test", "good", p.parent.name) for p in paths]
    maps = np.stack([np.full((4, 4), value, np.float32) for value in (1, 2)])
    write_maps(tmp_path / "maps", Scores(samples, maps.max((1, 2)), maps, None, 0.0), root, quiet=True)
    found = {
        p.relative_to(tmp_path / "maps"): np.asarray(Image.open(p)).max() for p in tmp_path.rglob("*.tiff")
    }
    assert found == {Path("kos36/Part0.tiff"): 1, Path("kos50/Part0.tiff"): 2}
