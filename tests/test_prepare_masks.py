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


def call(folder, *flags):
    argv = ["--labels", str(folder / "labels"), "--images", str(folder / "images")]
    return run_command(masks.main, [*argv, "--output", str(folder / "part"), *flags])


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
            ([[1, 2, 3]], "pairs of finite numbers"),
            ([[1e300, 0, 5, 5, 0, 1e300]], "pairs of finite numbers"),
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


class TestCoco:
    def edit(self, folder, change):
        path = folder / "labels/coco.json"
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))

    def test_numbers_and_their_text_are_one_id(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        coco(tmp_path / "labels", [("0", [SQUARE])], category_id="7")
        assert convert()["a.png"]["kind"] == "scratch"

    @pytest.mark.parametrize("size", [None, 0])
    def test_sizes_may_be_unknown(self, tmp_path, convert, size):
        image(tmp_path / "images/a.png")
        coco(tmp_path / "labels", [(0, [SQUARE])])
        self.edit(tmp_path, lambda tree: tree["images"][0].update(width=size, height=size))
        assert (mask_of(tmp_path, convert()["a.png"]) == square()).all()

    def test_an_unknown_category_is_skipped(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        image(tmp_path / "images/b.png")
        coco(tmp_path / "labels", [(0, [SQUARE])], category_id=8)
        assert "category_id 8 is not among the categories" in convert()["a.png"]["skipped"]

    def test_two_images_with_one_id_are_one_line(self, tmp_path, capfd):
        image(tmp_path / "images/a.png")
        coco(tmp_path / "labels", [(0, [SQUARE])])
        self.edit(tmp_path, lambda tree: tree["images"].append(tree["images"][0]))
        assert call(tmp_path) == 0  # listed twice, as merged files do
        self.edit(tmp_path, lambda tree: tree["images"].append({"id": 0, "file_name": "b.png"}))
        assert call(tmp_path) == 1
        assert "coco.json cannot be used: two of its images have the id 0" in capfd.readouterr().err

    def test_annotations_of_unlisted_images_are_counted(self, tmp_path, convert, capfd):
        image(tmp_path / "images/a.png")
        coco(tmp_path / "labels", [(0, [SQUARE]), (3, [SQUARE]), (4, [SQUARE])])
        convert()
        message = "2 annotations are of images that are not listed, as annotation 1 of image_id 3"
        assert message in capfd.readouterr().err

    def test_a_crowd_in_runs_is_drawn(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        runs = [305, 10, *[20, 10] * 9]  # down the columns
        runs.append(HEIGHT * WIDTH - sum(runs))
        coco(tmp_path / "labels", [(0, {"size": [HEIGHT, WIDTH], "counts": runs})], iscrowd=1)
        assert (mask_of(tmp_path, convert()["a.png"]) == square()).all()

    def test_a_shape_without_a_pixel_is_not_lost(self, tmp_path, convert):
        """Else a part of the defects would count as normal."""
        image(tmp_path / "images/a.png")
        image(tmp_path / "images/b.png")
        outside = [50, 5, 60, 5, 60, 15]
        coco(tmp_path / "labels", [(0, [SQUARE]), (0, [outside])])
        assert convert()["a.png"]["skipped"] == "a shape of 'scratch' covers no pixel"


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

    def test_rotated_boxes(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        corners = [[15, 5], [20, 10], [15, 15], [10, 10]]
        self.write(tmp_path / "labels", [{"label": "x", "shape_type": "rotation", "points": corners}])
        assert int(convert()["a.png"]["pixels"]) == pytest.approx(50, abs=12)  # not the 100 around it

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

    def test_a_mask_outside_of_the_image_is_skipped(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        image(tmp_path / "images/b.png")
        bitmap = base64.b64encode(cv2.imencode(".png", np.full((9, 60), 255, np.uint8))[1]).decode()
        shape = {"label": "x", "shape_type": "mask", "points": [[50, 2], [110, 11]], "mask": bitmap}
        self.write(tmp_path / "labels", [shape])
        assert convert()["a.png"]["skipped"] == "a shape of 'x' covers no pixel"

    def test_a_file_beside_its_image_is_of_that_one(self, tmp_path, convert):
        """Each folder has an a.png; that of the folder's root is not meant."""
        pairs = np.array(SQUARE, float).reshape(-1, 2).tolist()
        image(tmp_path / "images/a.png")
        image(tmp_path / "images/x/a.png")
        self.write(tmp_path / "images/x", [{"label": "dent", "points": pairs}], imagePath="a.png")
        argv = ["--labels", str(tmp_path / "images"), "--images", str(tmp_path / "images")]
        assert run_command(masks.main, [*argv, "--output", str(tmp_path / "part")]) == 0
        assert [p.name for p in (tmp_path / "part/test/dent").iterdir()] == ["x_a.png"]

    def test_holes_alone_are_no_good_image(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        image(tmp_path / "images/b.png")
        pairs = np.array(SQUARE, float).reshape(-1, 2).tolist()
        self.write(tmp_path / "labels", [{"label": "hole", "points": pairs}])
        assert convert("--hole", "hole")["a.png"]["skipped"] == "it has holes (hole) alone"

    def test_a_hole_of_another_name_is_one_line(self, tmp_path, capfd):
        """Else the holes would be drawn as defects."""
        image(tmp_path / "images/a.png")
        pairs = np.array(SQUARE, float).reshape(-1, 2).tolist()
        self.write(tmp_path / "labels", [{"label": "hole", "points": pairs}])
        assert call(tmp_path, "--hole", "Hole") == 1
        assert "no shape has the label 'Hole' of --hole; there are hole" in capfd.readouterr().err

    def test_what_other_systems_add(self, tmp_path, convert):
        """A byte-order mark, endings in capitals, and macOS's own ._ files."""
        image(tmp_path / "images/a.png")
        pairs = np.array(SQUARE, float).reshape(-1, 2).tolist()
        self.write(tmp_path / "labels", [{"label": "Kratzer ß", "points": pairs}])
        text = (tmp_path / "labels/a.png.json").read_bytes()
        (tmp_path / "labels/a.png.json").unlink()
        (tmp_path / "labels/A.JSON").write_bytes(b"\xef\xbb\xbf" + text)
        (tmp_path / "labels/._A.json").write_bytes(b"\x00\x05\x16\x07\xff")
        assert convert()["a.png"]["written"] == "test/Kratzer ß/a.png"

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

    def test_class_names_of_windows_and_unnamed_classes(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        image(tmp_path / "images/b.png")
        (tmp_path / "labels").mkdir()
        shares = " ".join(str(v / (WIDTH, HEIGHT)[i % 2]) for i, v in enumerate(SQUARE))
        (tmp_path / "labels/a.txt").write_text(f"0 {shares}")
        (tmp_path / "labels/b.txt").write_text(f"1 {shares}")
        (tmp_path / "labels/classes.txt").write_bytes(b"\xef\xbb\xbfdent \r\n\r\n")
        rows = convert()
        assert rows["a.png"]["written"] == "test/dent/a.png"
        assert "class 1 has no name; there are 1 (--names)" in rows["b.png"]["skipped"]

    @pytest.mark.parametrize("names", ["{dent: 0}", "dent"])
    def test_class_names_of_another_form_are_one_line(self, tmp_path, capfd, names):
        image(tmp_path / "images/a.png")
        (tmp_path / "labels").mkdir()
        (tmp_path / "labels/a.txt").write_text("0.0 0 0 1 0 1 1")
        (tmp_path / "data.yaml").write_text(f"names: {names}")
        assert call(tmp_path) == 1
        assert "are neither a list nor names by their numbers" in capfd.readouterr().err

    def test_labels_of_another_split_are_not_mixed_in(self, tmp_path, convert):
        """val/1.txt is not of train/1.png, which has labels of its own; of 2.png either may be."""
        image(tmp_path / "images/train/1.png")
        image(tmp_path / "images/2.png")
        shares = " ".join(str(v / (WIDTH, HEIGHT)[i % 2]) for i, v in enumerate(SQUARE))
        for name, text in (
            ("train/1", f"0 {shares}"),
            ("val/1", "0 0 0 1 0 1 1"),
            ("train/2", ""),
            ("val/2", ""),
        ):
            path = tmp_path / "labels" / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        rows = convert()
        assert rows["train/1.png"]["pixels"] == "100"
        assert rows["val/1"]["skipped"] == "no such image below --images"
        assert "labels of train/2 and of val/2 both fit it" in rows["2.png"]["skipped"]

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
        assert rows["x/a.png"]["skipped"] == "labels of a.png may be of it, as 2 images end in that name"

    @pytest.mark.parametrize(
        ("there", "named"),
        [
            ("IMG_1.JPG", "img_1.jpg"),
            ("a.png", "a.jpg"),  # converted since
            ("x/a.v2.png", "C:\\lab\\x\\a.v2.png"),
            ("größe.png", "gro\u0308ße.png"),  # macOS writes the dots apart
            ("日本 1.png", "日本 1.png"),
        ],
    )
    def test_names_as_other_systems_write_them(self, tmp_path, convert, there, named):
        image(tmp_path / "images" / there)
        coco(tmp_path / "labels", [(0, [SQUARE])], names=(named,))
        rows = convert()
        assert [row["kind"] for row in rows.values()] == ["scratch"]
        assert (mask_of(tmp_path, rows[there]) == square()).all()

    def test_labels_of_no_image_stop_it(self, tmp_path, capfd):
        """Else all images would count as good."""
        image(tmp_path / "images/a.png")
        coco(tmp_path / "labels", [(0, [SQUARE])], names=("other.png",))
        assert call(tmp_path) == 1
        assert "none of the 1 labelled images, as 'other.png', is below" in capfd.readouterr().err
        assert not (tmp_path / "part").exists()

    def test_a_name_that_no_system_takes_is_one_row(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        coco(tmp_path / "labels", [(1, [SQUARE])], names=("b\0.png", "a.png"))
        assert convert()["b\0.png"]["skipped"] == "no such image below --images"

    def test_images_in_no_label_file_are_counted(self, tmp_path, convert, capfd):
        for name in ("a", "b", "c"):
            image(tmp_path / f"images/{name}.png")
        coco(tmp_path / "labels", [(0, [SQUARE])], names=("a.png", "b.png"))
        convert()
        assert "     2 good, 1 of them in no label file" in capfd.readouterr().out

    @pytest.mark.parametrize(
        ("label", "kind"),
        [("mask", "mask_defect"), ("scratch-gt", "scratch-gt_defect"), ("__x", "_x"), (" ", "defect")],
    )
    def test_kinds_are_names_that_own_folders_take(self, tmp_path, convert, label, kind):
        image(tmp_path / "images/a.png")
        Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)).save(tmp_path / "images/b.png")
        coco(tmp_path / "labels", [(0, [SQUARE])], names=("a.png", "b.png"))
        tree = json.loads((tmp_path / "labels/coco.json").read_text())
        tree["categories"][0]["name"] = label
        (tmp_path / "labels/coco.json").write_text(json.dumps(tree))
        assert convert("--good", "train")["a.png"]["kind"] == kind
        assert kind in {s.defect for s in collect(SPECS["folder"], tmp_path, "part")}

    def test_a_label_that_is_too_long_is_skipped(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        image(tmp_path / "images/b.png")
        coco(tmp_path / "labels", [(0, [SQUARE])])
        tree = json.loads((tmp_path / "labels/coco.json").read_text())
        tree["categories"][0]["name"] = "x" * 300
        (tmp_path / "labels/coco.json").write_text(json.dumps(tree))
        assert "a name of 300 bytes" in convert()["a.png"]["skipped"]

    def test_hostile_names_stay_inside(self, tmp_path, convert):
        image(tmp_path / "images/a.png")
        coco(tmp_path / "labels", [(0, [SQUARE])], names=("../../images/a.png",))
        tree = json.loads((tmp_path / "labels/coco.json").read_text())
        tree["categories"][0]["name"] = "../../x"
        (tmp_path / "labels/coco.json").write_text(json.dumps(tree))
        row = convert()["a.png"]
        assert row["written"] == "test/_.._x/a.png" and (tmp_path / "part" / row["written"]).is_file()

    @pytest.mark.parametrize("label", ["Good", "no defect", "OK"])
    def test_a_label_good_is_no_defect(self, tmp_path, convert, label):
        """Beside another label, too: its shape would be drawn as a defect."""
        image(tmp_path / "images/a.png")
        image(tmp_path / "images/b.png")
        coco(tmp_path / "labels", [(0, [SQUARE]), (0, [SQUARE])])
        tree = json.loads((tmp_path / "labels/coco.json").read_text())
        tree["categories"] = [{"id": 7, "name": label}, {"id": 8, "name": "scratch"}]
        tree["annotations"][1]["category_id"] = 8
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
