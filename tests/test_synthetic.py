import cv2
import numpy as np
import pytest

from datasets.synthetic import (
    DEFECT_KINDS,
    MAX_AREA,
    MAX_MOVED,
    MIN_CHANGE,
    MIN_PIXELS,
    MIN_SIDE,
    PLACE_KINDS,
    add_defect,
)


def surface(height, width, seed=0, grey=False):
    """A smooth coloured surface with some grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(40, 215, (6, 6, 1 if grey else 3)).astype(np.float32)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, -1)
    image = image + rng.normal(0, 4, (height, width, 1))
    return np.clip(np.broadcast_to(image, (height, width, 3)), 0, 255).astype(np.uint8)


def check_exact(image, changed, mask, most=MAX_AREA):
    difference = np.abs(changed.astype(int) - image).max(2)
    assert changed.shape == image.shape and changed.dtype == np.uint8
    assert mask.shape == image.shape[:2] and mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1}
    np.testing.assert_array_equal(difference > 0, mask == 1)
    assert difference[mask == 1].min() >= MIN_CHANGE
    assert MIN_PIXELS <= mask.sum() <= most * mask.size


@pytest.mark.parametrize("kind", [*DEFECT_KINDS, *PLACE_KINDS])
@pytest.mark.parametrize("size", [(32, 32), (33, 120), (200, 64), (256, 256)])
@pytest.mark.parametrize("grey", [False, True])
def test_changed_pixels_are_the_mask(kind, size, grey):
    image = surface(*size, grey=grey)
    for seed in range(5):
        before = image.copy()
        changed, mask = add_defect(image, np.random.default_rng(seed), kind=kind)
        np.testing.assert_array_equal(image, before)
        check_exact(image, changed, mask, MAX_MOVED if kind in PLACE_KINDS else MAX_AREA)
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


def test_a_moved_part_comes_from_near_by():
    """Pixels far from the mask's border are those of another place, the same way off for all."""
    y, x = np.mgrid[:128, :128]
    image = np.stack([2 * y, 2 * x, np.full_like(x, 99)], axis=2).astype(np.uint8)  # tells its place
    areas, whole, ways = [], [], []
    for seed in range(30):
        changed, mask = add_defect(image, np.random.default_rng(seed), kind="moved")
        areas.append(mask.mean())
        inside = cv2.erode(mask, np.ones((15, 15))) == 1
        way = (changed.astype(int) - image)[inside][:, :2] / 2
        if len(way):
            off = np.abs(way - np.median(way, axis=0)).max(axis=1)
            whole.append((off <= 1).all())  # what lies beyond the border is mirrored
            ways.append(np.linalg.norm(np.median(way, axis=0)))
    assert np.mean(whole) > 0.4 and 0.03 * 128 < np.median(ways) < max(ways) < 0.32 * 128
    assert max(areas) > MAX_AREA  # larger than a surface defect


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
