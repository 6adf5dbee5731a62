import json

import cv2
import numpy as np
import pytest
from PIL import Image

from datasets import demo
from datasets.demo import COUNTS, DEMO_CATEGORIES, cut_crop, demo_crops, main, read_photograph, write_demo
from datasets.synthetic import DEFECT_KINDS, MAX_AREA, MIN_CHANGE, MIN_PIXELS, MIN_SIDE, add_defect
from utils.cli import run_command


def surface(height, width, seed=0, grey=False):
    """A smooth coloured surface with some grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(40, 215, (6, 6, 1 if grey else 3)).astype(np.float32)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, -1)
    image = image + rng.normal(0, 4, (height, width, 1))
    return np.clip(np.broadcast_to(image, (height, width, 3)), 0, 255).astype(np.uint8)


def check_exact(image, changed, mask):
    difference = np.abs(changed.astype(int) - image).max(2)
    assert changed.shape == image.shape and changed.dtype == np.uint8
    assert mask.shape == image.shape[:2] and mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1}
    np.testing.assert_array_equal(difference > 0, mask == 1)
    assert difference[mask == 1].min() >= MIN_CHANGE
    assert MIN_PIXELS <= mask.sum() <= MAX_AREA * mask.size


@pytest.mark.parametrize("kind", DEFECT_KINDS)
@pytest.mark.parametrize("size", [(32, 32), (33, 120), (200, 64), (256, 256)])
@pytest.mark.parametrize("grey", [False, True])
def test_changed_pixels_are_the_mask(kind, size, grey):
    image = surface(*size, grey=grey)
    for seed in range(5):
        before = image.copy()
        changed, mask = add_defect(image, np.random.default_rng(seed), kind=kind)
        np.testing.assert_array_equal(image, before)
        check_exact(image, changed, mask)
        if grey:
            assert np.ptp(changed, axis=2).max() == 0


@pytest.mark.parametrize("kind", DEFECT_KINDS)
def test_constant_and_wild_images_work(kind):
    flat = [np.full((64, 64, 3), value, np.uint8) for value in (0, 128, 255)]
    noise = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    checks = np.repeat(255 * (np.indices((64, 64)).sum(0) % 2)[..., None], 3, axis=2).astype(np.uint8)
    for image in (*flat, noise, checks, np.asfortranarray(noise), noise[::-1]):
        changed, mask = add_defect(image, np.random.default_rng(1), kind=kind)
        check_exact(image, changed, mask)
        assert np.abs(changed.astype(int) - image).max() > 2 * MIN_CHANGE


def test_same_seed_same_defect():
    first, second, other = (add_defect(surface(96, 96), np.random.default_rng(seed)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert (first[1] != other[1]).any()


def test_sizes_range_from_tiny_to_medium():
    image, rng = surface(128, 128), np.random.default_rng(0)
    areas = [add_defect(image, rng)[1].mean() for _ in range(80)]
    assert min(areas) < 0.003 and max(areas) > 0.02
    assert 0.001 < np.median(areas) < 0.02


def test_foreign_texture_is_used_for_its_kind_only():
    image = surface(64, 64)
    foreign = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for kind in DEFECT_KINDS:
        own = add_defect(image, np.random.default_rng(3), kind=kind)[0]
        given = add_defect(image, np.random.default_rng(3), kind=kind, texture=foreign)[0]
        assert (own != given).any() == (kind == "texture")


@pytest.mark.parametrize("kind", DEFECT_KINDS)
def test_defects_prefer_the_object(kind):
    y, x = np.mgrid[-64:64, -64:64]
    on_object = y**2 + x**2 < 25**2
    image = np.where(on_object, 90 + 40 * (x // 4 % 2), 20).astype(np.uint8)[..., None].repeat(3, axis=2)
    near = cv2.dilate(on_object.astype(np.uint8), np.ones((9, 9))) > 0
    masks = [add_defect(image, np.random.default_rng(seed), kind=kind)[1] == 1 for seed in range(20)]
    assert np.mean([(mask & near).sum() / mask.sum() for mask in masks]) > 0.7  # which fills 12 %


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (np.zeros((64, 64, 3), np.float32), None, "image: float32"),
        (np.zeros((64, 64), np.uint8), None, r"\(64, 64\)"),
        (np.zeros((64, 64, 4), np.uint8), None, r"\(64, 64, 4\)"),
        (np.zeros((MIN_SIDE - 1, 64, 3), np.uint8), None, f"sides >= {MIN_SIDE}"),
        (np.zeros((64, 64, 3), np.uint8), "rust", "texture, scratch, stain, cut"),
    ],
)
def test_wrong_input_is_one_clear_line(image, kind, message):
    with pytest.raises(ValueError, match=message) as error:
        add_defect(image, np.random.default_rng(0), kind=kind)
    assert "\n" not in str(error.value)
    if kind is None:
        with pytest.raises(ValueError, match="texture: "):
            add_defect(surface(64, 64), np.random.default_rng(0), kind="texture", texture=image)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo") / "a", size=64)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_demo_layout_counts_and_values(root):
    assert sorted(p.name for p in root.iterdir()) == sorted([*DEMO_CATEGORIES, "demo.json"])
    for folder in (root / category for category in DEMO_CATEGORIES):
        for (split, defect), count in COUNTS.items():
            names = [f"{i:03d}" for i in range(count)]
            masks = [] if defect == "good" else [f"{name}_mask" for name in names]
            assert sorted(p.stem for p in (folder / split / defect).iterdir()) == names
            assert sorted(p.stem for p in (folder / "ground_truth" / defect).glob("*")) == masks
        for path in folder.rglob("*.png"):
            pixels = np.asarray(Image.open(path))
            if "ground_truth" in path.parts:
                assert pixels.shape == (64, 64) and set(np.unique(pixels)) == {0, 255}
            else:
                assert pixels.shape == (64, 64, 3) and pixels.std() > 2


def test_demo_is_identical_elsewhere_and_kept_where_it_is(root, tmp_path):
    before = contents(root)
    times = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert write_demo(root, size=64) == root
    assert times == {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert contents(write_demo(tmp_path / "b", size=64)) == before


@pytest.mark.parametrize("stop_at", [0, 150])
def test_an_interrupted_demo_is_completed(root, tmp_path, monkeypatch, stop_at):
    saved, save = [], demo._save

    def failing(path, image):
        if len(saved) == stop_at:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, image)

    monkeypatch.setattr(demo, "_save", failing)
    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "c", size=64)
    assert not (tmp_path / "c" / "demo.json").exists()
    monkeypatch.undo()
    assert contents(write_demo(tmp_path / "c", size=64)) == contents(root)


def test_a_lost_file_or_another_recipe_is_written_anew(root, tmp_path, monkeypatch):
    copy = write_demo(tmp_path / "d", size=64)
    (copy / "brick/test/cut/003.png").unlink()
    assert contents(write_demo(copy, size=64)) == contents(root)
    monkeypatch.setattr(demo, "RECIPE_VERSION", demo.RECIPE_VERSION + 1)
    write_demo(copy, size=32)
    assert json.loads((copy / "demo.json").read_text())["recipe"] == demo.RECIPE_VERSION
    assert Image.open(copy / "brick/test/cut/003.png").size == (32, 32)


def test_other_peoples_files_are_left_alone(tmp_path, capsys):
    (tmp_path / "brick").mkdir()
    (tmp_path / "brick/mine.txt").write_text("precious")
    assert run_command(main, ["--output", str(tmp_path)]) == 1
    assert "new or an empty folder" in capsys.readouterr().err
    assert contents(tmp_path) == {"brick/mine.txt": b"precious"}


def bounds_of(crop) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) around every pixel that is read; right and bottom are exclusive."""
    (x, y), half = crop.centre, demo.reach(crop.window, crop.turn)
    return int(x - half), int(y - half), int(np.ceil(x + half)), int(np.ceil(y + half))


@pytest.mark.parametrize("category", DEMO_CATEGORIES)
def test_train_and_test_crops_are_disjoint(category):
    crops, (left, top, right, bottom) = demo_crops(category), DEMO_CATEGORIES[category].box
    assert crops == demo_crops(category)
    bounds = np.array([bounds_of(crop) for crop in crops])
    assert (bounds >= (left, top, left, top)).all() and (bounds <= (right, bottom, right, bottom)).all()
    is_train = np.array([crop.split == "train" for crop in crops])
    assert bounds[is_train, 2].max() <= bounds[~is_train, 0].min()

    photograph = read_photograph(DEMO_CATEGORIES[category].file)
    for crop in crops[::9]:  # nothing outside the bounds is read
        left, top, right, bottom = bounds_of(crop)
        blanked = np.full_like(photograph, 255)
        blanked[top:bottom, left:right] = photograph[top:bottom, left:right]
        np.testing.assert_array_equal(cut_crop(photograph, crop, 48), cut_crop(blanked, crop, 48))


def test_a_missing_photograph_is_not_downloaded():
    with pytest.raises(FileNotFoundError, match="reinstall scikit-image"):
        read_photograph("not_there.png")
