"""scripts/prepare/masks.py: labels of three tools become the masks that own folders use."""

import base64
import csv
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from datasets.registry import SPECS, collect
from scripts.prepare import labels, masks
from utils.cli import run_command

HEIGHT, WIDTH = 30, 40
SQUARE = [10, 5, 20, 5, 20, 15, 10, 15]  # x and y of the corners; clockwise as seen
INNER = [13, 8, 13, 12, 17, 12, 17, 8]  # inside of it, the other way round


def image(path, size=(WIDTH, HEIGHT)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 90)).save(path)
    return path


def square(inner=False):
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[5:15, 10:20] = True
    if inner:
        expected[8:12, 13:17] = False
    return expected


@pytest.fixture
def convert(tmp_path):
    """Call the command on tmp_path's `images` and `labels`; give back its table by image."""

    def call(*flags):
        argv = ["--labels", str(tmp_path / "labels"), "--images", str(tmp_path / "images")]
        assert run_command(masks.main, [*argv, "--output", str(tmp_path / "part"), *flags]) == 0
        with (tmp_path / "part/masks.csv").open() as file:
            return {row["image"]: row for row in csv.DictReader(file)}

    return call


def mask_of(folder, row):
    path = folder / "part" / row["written"]
    found = folder / "part/ground_truth" / path.parent.name / f"{path.stem}_mask.png"
    return cv2.imread(str(found), cv2.IMREAD_UNCHANGED) > 0


def coco(folder, segmentations, *, names=("a.png",), **more):
    """One annotation for each (image number, segmentation)."""
    tree = {
        "images": [{"id": i, "file_name": n, "width": WIDTH, "height": HEIGHT} for i, n in enumerate(names)],
        "categories": [{"id": 7, "name": "scratch"}],
        "annotations": [
            {"image_id": i, "category_id": 7, "segmentation": s, "bbox": [10, 5, 10, 10], **more}
            for i, s in segmentations
        ],
    }
    folder.mkdir(exist_ok=True)
    (folder / "coco.json").write_text(json.dumps(tree))


class TestShapes:
    @pytest.mark.parametrize(
        ("rings", "inner"),
        [
            ([SQUARE], False),
            ([SQUARE, INNER], True),  # turns the other way: a hole
            ([SQUARE, [13, 8, 17, 8, 17, 12, 13, 12]], False),  # turns the same way: united
            ([[*SQUARE, 10, 5, *INNER, 13, 8]], True),  # one ring with a bridge
        ],
    )
    def test_polygons(self, tmp_path, convert, rings, inner):
        image(tmp_path / "images/a.png")
        coco(tmp_path / "labels", [(0, rings)])
        row = convert()["a.png"]
        assert row["kind"] == "scratch" and row["written"] == "test/scratch/a.png"
        assert (mask_of(tmp_path, row) == square(inner)).all()
        assert int(row["pixels"]) == square(inner).sum()

    def test_annotations_of_one_image_are_united(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        coco(tmp_path / "labels", [(0, [SQUARE]), (0, [[0, 0, 4, 0, 4, 4, 0, 4]])])
        row = convert()["a.png"]
        assert int(row["pixels"]) == 100 + 16 and row["shapes"] == "2"

    def test_runs_of_both_forms(self):
        expected = np.zeros((7, 9), np.uint8)
        expected[1:5, 2:7] = 1
        expected[2:4, 3:5] = 0
        expected[6, 8] = 1
        text = "?43MO010O01300<M"  # of COCO's own tools
        assert (labels.rle_bitmap(labels.rle_counts(text), 7, 9) == expected).all()
        flat = expected.T.ravel()
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [flat[-1] ^ 1]])))
        counts = np.diff(np.concatenate([[0], edges])).tolist()
        assert (labels.rle_bitmap(counts, 7, 9) == expected).all()

    def test_long_runs(self):
        expected = np.zeros((300, 12), np.uint8)
        expected[20:280, 2:9] = 1
        expected[100:200, 5:7] = 0
        text = "\\c0T8X10000\\Jl10TN0l10TNd500`k0"
        assert (labels.rle_bitmap(labels.rle_counts(text), 300, 12) == expected).all()

    @pytest.mark.parametrize(
        ("region", "reason"),
        [
            ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "covers 10 pixels"),
            ({"size": [HEIGHT, WIDTH], "counts": "o"}, "cut off"),
            ([[1, 2, 3]], "pairs of numbers"),
            ({"size": [15, 80], "counts": [1200]}, "RLE is for 80x15, the image has 40x30"),
            ({"size": [10**6, 10**6], "counts": [10**12]}, "RLE is for 1000000x1000000"),
            ({"size": [HEIGHT, WIDTH], "counts": [10**30]}, "its RLE covers 1000"),
            ([], "only a box"),
            (None, "only a box"),
        ],
    )
    def test_what_cannot_be_drawn_is_skipped_with_the_reason(self, tmp_path, convert, region, reason):
        image(tmp_path / "images/a.png")
        image(tmp_path / "images/b.png")
        coco(tmp_path / "labels", [(0, region)], names=("a.png", "b.png"))
        rows = convert()
        assert reason in rows["a.png"]["skipped"] and not rows["a.png"]["written"]
        assert rows["b.png"]["written"] == "test/good/b.png"

    def test_boxes_are_filled_on_request(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        coco(tmp_path / "labels", [(0, [])])
        assert (mask_of(tmp_path, convert("--boxes")["a.png"]) == square()).all()


class TestLabelme:
    def write(self, folder, shapes, name="a.png", **more):
        folder.mkdir(exist_ok=True)
        tree = {
            "shapes": shapes,
            "imagePath": f"..\\images\\{name}",
            "imageWidth": WIDTH,
            "imageHeight": HEIGHT,
        }
        (folder / f"{name}.json").write_text(json.dumps(tree | more))

    def test_shapes(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        bitmap = base64.b64encode(cv2.imencode(".png", np.full((3, 4), 255, np.uint8))[1]).decode()
        pairs = np.array(SQUARE, float).reshape(-1, 2).tolist()
        shapes = [
            {"label": "dent", "shape_type": "polygon", "points": pairs},
            {"label": "hole", "shape_type": "rectangle", "points": [[17, 12], [13, 8]]},
            {"label": "dirt", "shape_type": "mask", "points": [[30, 20], [34, 23]], "mask": bitmap},
            {"label": "dirt", "shape_type": "circle", "points": [[5, 24], [8, 24]]},
        ]
        self.write(tmp_path / "labels", shapes)
        row = convert("--hole", "hole")["a.png"]
        assert row["kind"] == "dent+dirt"
        found = mask_of(tmp_path, row)
        assert (found[:20, 9:25] == square(inner=True)[:20, 9:25]).all()
        assert found[20:23, 30:34].all() and found[20:, 25:].sum() == 12
        assert found[18:, :12].sum() == pytest.approx(np.pi * 9, abs=4)

    def test_a_line_has_no_area(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        image(tmp_path / "images/b.png")
        self.write(tmp_path / "labels", [{"label": "x", "shape_type": "line", "points": [[1, 1], [5, 5]]}])
        assert "a line with 2 points has no area" in convert()["a.png"]["skipped"]

    @pytest.mark.parametrize(
        "shape", [1, {}, {"label": "x", "shape_type": "mask", "points": [[1, 1]], "mask": ""}]
    )
    def test_a_damaged_shape_is_skipped(self, tmp_path, convert, shape):
        image(tmp_path / "images/a.png")
        image(tmp_path / "images/b.png")
        self.write(tmp_path / "labels", [shape])
        assert convert()["a.png"]["skipped"].startswith("shape 0: ")

    def test_labels_of_another_size_are_skipped(self, tmp_path, convert):
        image(tmp_path / "images/a.png", (20, 15))
        image(tmp_path / "images/b.png")
        pairs = np.array(SQUARE, float).reshape(-1, 2).tolist()
        self.write(tmp_path / "labels", [{"label": "x", "points": pairs}])
        assert "are for 40x30, it has 20x15" in convert()["a.png"]["skipped"]


class TestYolo:
    def test_outlines_and_names(self, tmp_path, convert):
        image(tmp_path / "images/x/1.png")
        image(tmp_path / "images/y/1.png")
        image(tmp_path / "images/y/2.png")
        shares = [v / (WIDTH, HEIGHT)[i % 2] for i, v in enumerate(SQUARE)]
        line = " ".join(map(str, [1, *shares]))
        for name, text in (("x/1", line), ("y/1", f"0 0.5 0.5 0.1 0.1\n{line}"), ("y/2", "")):
            path = tmp_path / "labels" / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "data.yaml").write_text("names: [dent, scratch]\n")
        rows = convert()
        assert rows["x/1.png"]["written"] == "test/scratch/x_1.png"  # two images are named 1.png
        assert (mask_of(tmp_path, rows["x/1.png"]) == square()).all()
        assert "line 1: a box, no outline" in rows["y/1.png"]["skipped"]
        assert rows["y/2.png"]["written"] == "test/good/2.png"
        rows = convert("--boxes", "--overwrite", "--good", "train")
        assert rows["y/1.png"]["kind"] == "dent+scratch"
        assert rows["y/2.png"]["written"] == "train/good/2.png"
        assert not (tmp_path / "part/test/good/2.png").exists()

    def test_what_is_no_text_is_one_line(self, tmp_path, capfd):
        image(tmp_path / "images/a.png")
        (tmp_path / "labels").mkdir()
        (tmp_path / "labels/a.txt").write_bytes(b"\xff\xfe\x00")
        argv = ["--labels", str(tmp_path / "labels"), "--images", str(tmp_path / "images")]
        assert run_command(masks.main, [*argv, "--output", str(tmp_path / "part")]) == 1
        assert "a.txt is no text file" in capfd.readouterr().err


class TestFiles:
    def test_one_name_in_two_folders_needs_its_folder(self, tmp_path, convert):
        image(tmp_path / "images/x/a.png")
        image(tmp_path / "images/y/a.png")
        coco(tmp_path / "labels", [(0, [SQUARE]), (1, [SQUARE])], names=("a.png", "y/a.png"))
        rows = convert()
        assert rows["a.png"]["skipped"] == "2 images end in this name"
        assert rows["y/a.png"]["written"] == "test/scratch/y_a.png"
        assert rows["x/a.png"]["kind"] == "good"

    def test_hostile_names_stay_inside(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        coco(tmp_path / "labels", [(0, [SQUARE])], names=("../../images/a.png",))
        tree = json.loads((tmp_path / "labels/coco.json").read_text())
        tree["categories"][0]["name"] = "../../x"
        (tmp_path / "labels/coco.json").write_text(json.dumps(tree))
        row = convert()["a.png"]
        assert row["written"] == "test/_.._x/a.png" and (tmp_path / "part" / row["written"]).is_file()

    def test_a_label_good_is_no_defect(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        image(tmp_path / "images/b.png")
        coco(tmp_path / "labels", [(0, [SQUARE])])
        tree = json.loads((tmp_path / "labels/coco.json").read_text())
        tree["categories"][0]["name"] = "Good"
        (tmp_path / "labels/coco.json").write_text(json.dumps(tree))
        assert "names no defect" in convert()["a.png"]["skipped"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is no json file"),
            ("[]", "holds none of"),
            ('{"annotations": []}', "is no COCO file"),
            ('{"annotations": [1], "images": []}', "its annotations are no list of objects"),
            ('{"shapes": 1}', "its shapes are no list"),
        ],
    )
    def test_damaged_labels_are_one_line(self, tmp_path, capfd, text, message):
        image(tmp_path / "images/a.png")
        (tmp_path / "labels.json").write_text(text)
        argv = ["--labels", str(tmp_path / "labels.json"), "--images", str(tmp_path / "images")]
        assert run_command(masks.main, [*argv, "--output", str(tmp_path / "part")]) == 1
        assert message in capfd.readouterr().err
        assert not (tmp_path / "part").exists()

    def test_foreign_files_are_kept(self, tmp_path, capfd):
        image(tmp_path / "images/a.png")
        coco(tmp_path / "labels", [(0, [SQUARE])])
        (tmp_path / "part").mkdir()
        (tmp_path / "part/mine.txt").write_text("x")
        argv = ["--labels", str(tmp_path / "labels"), "--images", str(tmp_path / "images"), "--overwrite"]
        assert run_command(masks.main, [*argv, "--output", str(tmp_path / "part")]) == 1
        assert "is not empty" in capfd.readouterr().err

    def test_the_result_is_a_folder_that_trains(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)).save(tmp_path / "images/b.png")
        coco(tmp_path / "labels", [(0, [SQUARE])], names=("a.png", "b.png"))
        convert("--good", "train")
        samples = collect(SPECS["folder"], tmp_path, "part")
        assert [(s.split, s.defect, bool(s.masks)) for s in samples] == [
            ("train", "good", False), ("test", "scratch", True),
        ]  # fmt: skip
