"""The benchmarks' folder layouts in small, with what real copies hold: mixed suffixes, stray files.

Every picture is different. A defect is a bright square, at another place in each image, and its mask covers
it, so a mask that is paired with the wrong image shows.
"""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIDE, SQUARE = 40, 8
UNMASKED = ("vad", "aptos", "oct2017", "isic2018", "folder")  # anomalous test images need no mask


def has_masks(spec) -> bool:
    return spec.name not in UNMASKED


@dataclass
class Writer:
    """Writes pictures and masks; `zoom` enlarges both."""

    zoom: int = 1
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def image(self, path: Path, spot: int | None = None, mode: str = "RGB") -> None:
        """Stripes with noise; `spot` is the number of the place of a bright square."""
        grey = 90 + 40 * np.sin(np.arange(SIDE) / 3)[None] + self.rng.normal(0, 4, (SIDE, SIDE))
        if spot is not None:
            grey[place(spot)] = 250
        self._save(path, np.clip(grey, 0, 255).astype(np.uint8), mode)

    def mask(self, path: Path, spot: int | None, value: int = 255) -> None:
        """The square of `spot`, or nothing."""
        mask = np.zeros((SIDE, SIDE), np.uint8)
        if spot is not None:
            mask[place(spot)] = value
        self._save(path, mask, "L")

    def _save(self, path: Path, values: np.ndarray, mode: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        enlarged = values.repeat(self.zoom, 0).repeat(self.zoom, 1)
        Image.fromarray(enlarged).convert(mode).save(path)


def place(spot: int) -> tuple[slice, slice]:
    """Rows and columns of a square; there are 16 places."""
    row, column = divmod(spot % 16, 4)
    top, left = 4 + 8 * row, 4 + 8 * column
    return slice(top, top + SQUARE), slice(left, left + SQUARE)


def stray(folder: Path) -> None:
    """Files that are no images, as unpacked archives and file managers leave them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Thumbs.db").write_bytes(b"odd")
    (folder / "README.txt").write_text("a text among the images")
    (folder / ".hidden.png").write_bytes(b"no image")


def classes(write: Writer, base: Path, numbers: dict[str, int], suffixes=("png",), normal="good") -> None:
    """`numbers` of images in the folders of `base`; those of other classes than `normal` have a square."""
    for folder, number in numbers.items():
        for i in range(number):
            spot = None if normal in Path(folder).parts else i
            mode = "L" if i % 3 == 2 else "RGB"
            write.image(base / folder / f"{i:03d}.{suffixes[i % len(suffixes)]}", spot, mode)
        stray(base / folder)


def masks(write: Writer, folder: Path, number: int, suffix="png", *, value=255, empty=False) -> None:
    """Masks of images 000, 001, ..., written from the last to the first."""
    for i in reversed(range(number)):
        write.mask(folder / f"{i:03d}.{suffix}", None if empty else i, value)
    stray(folder)


# --- industrial ---------------------------------------------------------------------------------------------


def write_btad(root: Path) -> None:
    write = Writer()
    for name, suffix in (("01", "png"), ("03", "bmp")):
        numbers = {"train/ok": 5, "test/ok": 2, "test/ko": 3}
        classes(write, root / name, numbers, ("bmp", "PNG", "Jpg"), normal="ok")
        masks(write, root / name / "ground_truth/ko", 3, suffix)


def write_visa(root: Path) -> None:
    """The release: images by label, a split file, masks with small values."""
    write, rows = Writer(), []
    for name in ("candle", "pcb1"):
        classes(write, root / name / "Data/Images", {"Normal": 7, "Anomaly": 3}, ("JPG", "png"), "Normal")
        masks(write, root / name / "Data/Masks/Anomaly", 3, value=2)
        for path in sorted((root / name / "Data/Images").glob("*/[0-9]*")):
            image = path.relative_to(root).as_posix()
            if path.parent.name == "Anomaly":
                rows.append([name, "test", "anomaly", image, f"{name}/Data/Masks/Anomaly/{path.stem}.png"])
            else:
                rows.append([name, "test" if path.stem in ("001", "003") else "train", "normal", image, ""])
    (root / "split_csv").mkdir()
    with (root / "split_csv/1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])


def write_visa_prepared(root: Path) -> None:
    write = Writer()
    for name in ("candle", "pcb1"):
        classes(write, root / name, {"train/good": 5, "test/good": 2, "test/bad": 3}, ("JPG", "png"))
        masks(write, root / name / "ground_truth/bad", 3, value=1)


def write_mvtec3d(root: Path) -> None:
    """Large enough for the crops; mask pixels below half of the range do not count."""
    write = Writer(zoom=10)
    for name in ("dowel", "potato"):
        numbers = {"train/good": 4, "validation/good": 2, "test/good": 2, "test/hole": 3}
        classes(write, root / name, {f"{kind}/rgb": number for kind, number in numbers.items()})
        classes(Writer(), root / name, {f"{kind}/xyz": number for kind, number in numbers.items()}, ("tiff",))
        masks(write, root / name / "test/good/gt", 2, empty=True)
        masks(write, root / name / "test/hole/gt", 3)
        for path in (root / name / "test/hole/gt").glob("[0-9]*.png"):
            mask = np.asarray(Image.open(path)).copy()
            mask[:20] = 90
            Image.fromarray(mask).save(path)


def write_mvtec_ad2(root: Path) -> None:
    """Masks lie in the test folder; the private test images have no labels, every third has a square."""
    write = Writer()
    for name in ("can", "vial"):
        base, mode = root / name, "L" if name == "vial" else "RGB"
        numbers = {"train/good": 5, "validation/good": 3, "test_public/good": 2, "test_public/bad": 3}
        for folder, number in numbers.items():
            for i in range(number):
                spot = i if folder.endswith("bad") else None
                write.image(base / folder / f"{i:03d}_regular.png", spot, mode)
                if spot is not None:
                    write.mask(base / f"test_public/ground_truth/bad/{i:03d}_regular_mask.png", spot)
            stray(base / folder)
        for folder, ending in (("test_private", "regular"), ("test_private_mixed", "mixed")):
            for i in range(4):
                write.image(base / folder / f"{i:03d}_{ending}.png", i if i % 3 == 2 else None, mode)


def write_mvtec_loco(root: Path) -> None:
    """The masks of an image are in a folder of its name; their value tells the kind of defect."""
    write, kinds = Writer(), {"logical_anomalies": 2, "structural_anomalies": 1}
    numbers = {"train/good": 5, "validation/good": 2, "test/good": 2}
    keys = ("defect_name", "pixel_value", "saturation_threshold", "relative_saturation")
    rows = [("logical_anomalies", 255, 32, False), ("structural_anomalies", 254, 1, True)]
    config = [dict(zip(keys, row, strict=True)) for row in rows]
    for name in ("juice_bottle", "pushpins"):
        classes(write, root / name, numbers | {f"test/{kind}": number for kind, number in kinds.items()})
        for entry in config:
            for i in range(kinds[entry["defect_name"]]):
                folder = root / name / "ground_truth" / entry["defect_name"] / f"{i:03d}"
                write.mask(folder / "000.png", i, entry["pixel_value"])
        (root / name / "defects_config.json").write_text(json.dumps(config))


def write_vad(root: Path) -> None:
    numbers = {"train/good": 6, "train/bad": 2, "test/good": 3, "test/bad": 2, "test/bad_unseen_defects": 1}
    classes(Writer(), root, numbers, ("png", "PNG"))


def write_kolektor(root: Path) -> None:
    """kos26 is a copy of kos01; kos36 and kos50 are for testing only; one defect each."""
    write = Writer()
    for item, defective in (("kos01", 2), ("kos02", 0), ("kos36", 1), ("kos50", 0)):
        for part in range(3):
            spot = part if part == defective else None
            write.image(root / item / f"Part{part}.jpg", spot, "L")
            write.mask(root / item / f"Part{part}_label.{'bmp' if part else 'png'}", spot)
        stray(root / item)
    shutil.copytree(root / "kos01", root / "kos26")


# --- medical ------------------------------------------------------------------------------------------------


def write_medical(root: Path) -> None:
    numbers = {"train/NORMAL": 6, "test/NORMAL": 3, "test/ABNORMAL": 2}
    classes(Writer(), root, numbers, ("png", "JPG"), normal="NORMAL")


def write_oct(root: Path) -> None:
    write = Writer()
    for split, number in (("train", 6), ("test", 2), ("val", 1)):
        for name in ("NORMAL", "CNV", "DME", "DRUSEN"):
            for i in range(number):
                patient = f"{10 * (split == 'test') + i // 2:07d}"
                path = root / split / name / f"{name}-{patient}-{i}.jpeg"
                write.image(path, None if name == "NORMAL" else i, "L")
    stray(root / "train/NORMAL")


# --- polyps and video ---------------------------------------------------------------------------------------


def write_polyp(root: Path) -> None:
    """As prepared: every image has a polyp and a mask of its name, with grey values on the border."""
    write = Writer()
    for category in ("random", "sequence"):
        for split, number in (("train", 5), ("validation", 2), ("test", 3)):
            base = root / category / split
            classes(write, base, {"images": number}, ("jpg", "png"), normal="none")
            masks(write, base / "masks", number)
            for path in (base / "masks").glob("[0-9]*.png"):
                mask = np.asarray(Image.open(path)).copy()
                mask[:3] = 100
                Image.fromarray(mask).save(path)


def write_ped2(root: Path) -> None:
    """Two clips a split; the second one's masks have other names, as in the release."""
    write, intervals = Writer(), []
    for clip in ("001", "002"):
        for number in range(1, 5):
            write.image(root / f"Train/Train{clip}/{number:03d}.tif", None, "L")
        first, last = (2, 3) if clip == "001" else (1, 2)
        intervals.append(f"TestVideoFile{{end+1}}.gt_frame = [{first}:{last}];")
        for number in range(1, 5):
            spot = number if first <= number <= last else None
            name = f"frame{number:03d}" if clip == "002" else f"{number:03d}"
            write.image(root / f"Test/Test{clip}/{number:03d}.tif", spot, "L")
            write.mask(root / f"Test/Test{clip}_gt/{name}.bmp", spot)
        stray(root / f"Test/Test{clip}")
    (root / "Test/UCSDped2.m").write_text("\n".join(["TestVideoFile = {};", *intervals]))


LAYOUTS = {
    "btad": write_btad,
    "visa": write_visa,
    "visa-prepared": write_visa_prepared,
    "mvtec3d": write_mvtec3d,
    "mvtec_ad2": write_mvtec_ad2,
    "mvtec_loco": write_mvtec_loco,
    "vad": write_vad,
    "kolektor": write_kolektor,
    "aptos": write_medical,
    "oct2017": write_oct,
    "isic2018": write_medical,
    "kvasir": write_polyp,
    "clinicdb": write_polyp,
    "colondb": write_polyp,
    "ped2": write_ped2,
}
COUNTS = {
    "btad": {"01": (5, 2, 3), "03": (5, 2, 3)},
    "visa": {"candle": (5, 2, 3), "pcb1": (5, 2, 3)},
    "visa-prepared": {"candle": (5, 2, 3), "pcb1": (5, 2, 3)},
    "mvtec3d": {"dowel": (4, 2, 3), "potato": (4, 2, 3)},
    "mvtec_ad2": {"can": (5, 2, 3), "vial": (5, 2, 3)},
    "mvtec_loco": {"juice_bottle": (5, 2, 3), "pushpins": (5, 2, 3)},
    "vad": {"vad": (6, 3, 3, 2)},
    "kolektor": {"kolektor": (6, 4, 5)},
    "aptos": {"aptos": (6, 3, 2)},
    "oct2017": {"oct2017": (6, 2, 6)},
    "isic2018": {"isic2018": (6, 3, 2)},
    "kvasir": {"random": (0, 0, 3, 5, 2), "sequence": (0, 0, 3, 5, 2)},
    "clinicdb": {"random": (0, 0, 3, 5, 2), "sequence": (0, 0, 3, 5, 2)},
    "colondb": {"random": (0, 0, 3, 5, 2), "sequence": (0, 0, 3, 5, 2)},
    "ped2": {"ped2": (8, 4, 4)},
}


def write_layout(layout: str, root: Path) -> Path:
    """Write one of LAYOUTS under `root`, with a README beside it; gives back `root`."""
    root.mkdir(parents=True)
    LAYOUTS[layout](root)
    (root / "README.md").write_text("as downloaded")
    return root


# --- originals of the datasets that need preparation --------------------------------------------------------


def write_aptos_originals(root: Path, images: int = 9) -> Path:
    """Bright discs on black, of several sizes; every third is diseased."""
    rows, rng = [], np.random.default_rng(0)
    (root / "train_images").mkdir(parents=True)
    for i in range(images):
        height, width = 60 + 3 * i, 90
        y, x = np.mgrid[:height, :width]
        disc = ((y - height / 2) ** 2 + (x - 45) ** 2 < 35**2)[..., None]
        photograph = (disc * rng.integers(60, 200, (height, width, 3))).astype(np.uint8)
        Image.fromarray(photograph).save(root / f"train_images/id{i}.png")
        rows.append([f"id{i}", 2 if i % 3 == 0 else 0])
    with (root / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id_code", "diagnosis"], *rows])
    return root


def write_isic_originals(root: Path) -> Path:
    names = ["image", "MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
    for part, number in (("Training", 6), ("Validation", 5)):
        stem, rows = f"ISIC2018_Task3_{part}", []
        for i in range(number):
            image = f"ISIC_{part[0]}{i}"
            Writer(rng=np.random.default_rng([i, number])).image(root / f"{stem}_Input/{image}.jpg", None)
            kind = 2 if i % 2 else 1
            rows.append([image, *("1.0" if k == kind else "0.0" for k in range(1, 8))])
        stray(root / f"{stem}_Input")
        (root / f"{stem}_GroundTruth").mkdir()
        with (root / f"{stem}_GroundTruth/{stem}_GroundTruth.csv").open("w", newline="") as file:
            csv.writer(file).writerows([names, *rows])
    return root


def write_polyp_originals(root: Path) -> Path:
    """40 images of ten videos, four frames each, with masks and the table of videos."""
    for i in range(1, 41):
        write = Writer(rng=np.random.default_rng(i))
        write.mask(root / f"Original/{i}.png", i, 255 - i)  # no two are the same
        write.mask(root / f"Ground Truth/{i}.png", i)
    rows = [[i, (i - 1) // 4 + 1] for i in range(1, 41)]
    with (root / "sequences.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["frame", "sequence"], *rows])
    return root


def write_flat_polyps(root: Path) -> Path:
    """As CVC-ColonDB is published: 20 frames N.tiff (two .tif), masks pN, contours cpN, in one folder.

    The frames 2, 4 and 11 are the same, and so are 5 and 6.
    """
    same = {4: 2, 11: 2, 6: 5}
    for i in range(1, 21):
        write, spot = Writer(rng=np.random.default_rng(same.get(i, i))), same.get(i, i)
        write.image(root / f"{i}.{'tif' if i in (3, 11) else 'tiff'}", spot)
        write.mask(root / f"p{i}.tiff", spot)
        write.mask(root / f"cp{i}.tiff", spot)
    stray(root)
    return root


def labelled_batch() -> dict[str, torch.Tensor]:
    """Two images 64 x 64, the second labelled anomalous with a square as its mask; the same each time."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    mask[1, :, 20:40, 20:40] = 1
    image = torch.randn(2, 3, 64, 64, generator=generator)
    return {"image": image, "label": torch.tensor([0, 1]), "mask": mask}
