"""Folders as people have them: what is not used is said once, with counts and the reason."""

import logging
import shutil

import numpy as np
import pytest
from conftest import write_image

import datasets.check
from datasets.build import categories_of
from datasets.files import find_images, unused_files
from datasets.registry import SPECS, collect
from datasets.samples import count, unused_samples
from predict import samples_at
from utils.cli import run_command
from utils.errors import DatasetError
from utils.layers import load_config

FOLDER, MVTEC = SPECS["folder"], SPECS["mvtec"]
RNG = np.random.default_rng(7)


@pytest.fixture
def part(mvtec_like):
    return mvtec_like / "part"


@pytest.fixture
def said(caplog):
    """What is logged when the samples of a category are listed."""
    caplog.set_level(logging.INFO, logger="uninet")

    def call(root, category="part", spec=FOLDER):
        caplog.clear()
        return collect(spec, root, category), caplog.text

    return call


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "$RECYCLE.BIN", "__MACOSX"])
def test_hidden_names_are_no_images_kinds_or_categories(part, said, name):
    before = MVTEC.list_samples(part.parent, "part")
    for folder in ("test", "test/good", "train/good", "ground_truth/spot"):
        shutil.copytree(part / "test/spot", part / folder / name)
    shutil.copy(part / "test/spot/000.png", part / f"test/good/{name}000.png")
    shutil.copytree(part, part.parent / name)
    samples, text = said(part.parent, "all")
    assert samples == before == said(part.parent, "all", MVTEC)[0]
    assert MVTEC.list_categories(part.parent) == FOLDER.list_categories(part.parent) == ["part"]
    assert f"5 names that begin with . @ $ __ (ground_truth/spot/{name}, test/{name}," in text
    assert f"1 names that begin with . @ $ __ ({name})" in text  # beside the category
    assert len(find_images(part.parent)) == 26  # 21 images, 5 masks


def test_no_category_of_several_is_called_all(part, tmp_path):
    shutil.copytree(part, part.parent / "all")
    for category in ("all", "part"):
        with pytest.raises(DatasetError, match="a category named all, which stands for all"):
            collect(FOLDER, part.parent, category, warn=False)
    shutil.rmtree(part)
    assert {s.category for s in collect(FOLDER, part.parent, "all", warn=False)} == {"all"}


def test_pictures_of_earlier_results_are_no_images(part, tmp_path):
    """Of runs, test.py and predict.py below the folder: they would be scored, and calibrated on."""
    before = find_images(part / "test")
    names = "heatmaps.png", "clips.png", "heatmaps/good/000.png.png", "maps/000.tiff", "masks/000.png"
    for place in ("run", "spot/out"):
        for name in names:
            (part / "test" / place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(part / "test/spot/000.png", part / "test" / place / name)
    assert len(find_images(part / "test")) == len(before) + 10
    for place in ("run", "spot/out"):
        (part / "test" / place / "scores.csv").touch()
    assert find_images(part / "test") == before


def test_a_hidden_split_of_polyps(masters, tmp_path):
    root, spec = shutil.copytree(masters["kvasir"], tmp_path / "kvasir"), SPECS["kvasir"]
    shutil.copytree(root / "random", root / "@random")
    assert spec.list_categories(root) == ["random", "sequence"]


@pytest.mark.parametrize("name", ["OK", "Good", "GOOD", "normal", "ok_1", "io", "anomaly_free"])
@pytest.mark.parametrize("beside", [True, False])
def test_good_images_of_another_name_are_no_defects(part, name, beside):
    if beside:
        shutil.copytree(part / "test/good", part / f"test/{name}")
    else:
        (part / "test/good").rename(part / f"test/{name}")
    with pytest.raises(DatasetError, match=rf"test/{name} would count as anomalous.*test/good alone; rename"):
        collect(FOLDER, part.parent, "part")


def test_a_test_set_of_one_kind(part, said):
    shutil.rmtree(part / "test/good")
    assert "all test images are anomalous, none is normal: no AUROC" in said(part.parent)[1]


def test_misplaced_images_and_other_endings(part, said, capfd):
    for place in ("train/good/day1", "test/spot/day1", "test", "Test/good"):
        write_image(part / place / "new.png", RNG)
    for name in ("a.webp", "b.gif", "c.WEBP", "d.tif.bak"):
        (part / "train/good" / name).write_bytes(b"odd")
    write_image(part / "train/good/e.jfif.jpg", RNG)
    (part / "train/good/e.jfif.jpg").rename(part / "train/good/e.jfif")
    samples, text = said(part.parent)
    assert count(samples) == (13, 4, 5)  # .jfif is a JPEG
    assert text.count("not used in") == 1 and "WARNING" in text
    assert "4 images where none are looked for: 1 in" in text
    for place in ("in train/good/day1", "in test/spot/day1", "in test,", "in Test/good"):
        assert place in text
    assert "3 files of other kinds: 2 ending in .webp, 1 ending in .gif (read are .png" in text
    assert "3 other files: " in text and "1 ending in .bak" in text and "1 ending in .db" in text
    assert "not used in" not in said(part.parent)[1]  # once
    run_command(datasets.check.main, ["--dataset", "folder", "--data-root", str(part.parent)])
    out = capfd.readouterr().out
    assert "part: not used: 4 images where none are looked for" in out and "2 ending in .webp" in out


def test_nothing_is_said_of_what_is_as_it_should_be(part, said):
    for odd in ("test/spot/Thumbs.db", "readme.txt"):
        (part / odd).unlink()
    assert said(part.parent)[1] == ""


@pytest.mark.parametrize(
    ("found", "moved"),
    [
        ("train/good", "train/good/day1"),
        ("train/good", "Train/Good"),
        ("train", "TRAIN"),
        ("train/good", "train/OK"),
    ],
)
def test_an_error_says_what_is_there(part, found, moved):
    (part / found).rename(part / "away")
    (part / moved).parent.mkdir(parents=True, exist_ok=True)
    (part / "away").rename(part / moved)
    (part / "train/good").mkdir(parents=True, exist_ok=True) if "day" in moved else None
    folder = moved if moved != "TRAIN" else "TRAIN/good"
    for root in (part, part.parent):
        with pytest.raises(
            DatasetError, match=f"(expected|no normal training image).*12 in (part/)?{folder}"
        ):
            collect(FOLDER, root, "part")


def test_hints_are_of_the_own_folder(part, tmp_path):
    """Another part beside it is no better root; the folder that holds train/good is."""
    for place in (part / "train/good", part / "test/good"):
        with pytest.raises(DatasetError, match=rf"did you mean --data-root {part}\?"):
            collect(FOLDER, place, "part")
    shutil.copytree(part / "train", tmp_path / "lines/a/TRAIN")
    shutil.copytree(part, tmp_path / "lines/b")
    shutil.rmtree(tmp_path / "lines/b/test")
    with pytest.raises(DatasetError, match="Found, but not where it is looked for.*TRAIN/good"):
        collect(FOLDER, tmp_path / "lines/a", "part")


def test_what_lies_beside_the_categories(part, said, caplog):
    shutil.copytree(part, part.parent / "other").joinpath("train").rename(part.parent / "other/Train")
    config = load_config("configs/folder.yaml", {"run.data_root": str(part.parent), "data.category": "all"})
    caplog.set_level(logging.INFO, logger="uninet")
    assert categories_of(config) == ["part"]
    assert caplog.text.count("12 in other/Train/good") == 1


@pytest.mark.parametrize("place", ["test/spot/zzz.png", "test/dot/zzz.png"])
def test_one_file_of_two_labels(part, place, caplog, capfd):
    shutil.copy(part / "test/good/001.png", part / place)
    with pytest.raises(
        DatasetError, match=r"zzz\.png \(\w+\) is the same file as .*good/001\.png.*two labels"
    ):
        collect(FOLDER, part.parent, "part")
    code = run_command(datasets.check.main, ["--dataset", "folder", "--data-root", str(part.parent)])
    assert code == 1 and "two labels" in capfd.readouterr().out


def test_published_sets_with_two_labels_are_warned_of(masters, tmp_path, caplog):
    """As in APTOS, where equal photographs have different grades."""
    root = shutil.copytree(masters["aptos"], tmp_path / "aptos")
    shutil.copy(*(next((root / f"test/{kind}").glob("00*.png")) for kind in ("NORMAL", "ABNORMAL")))
    collect(SPECS["aptos"], root, "aptos", incomplete=True)  # of fewer images than the release
    assert "two labels (1 such pairs)" in caplog.text


def test_unreadable_files_are_not_compared(part):
    for folder in ("good", "spot"):
        (part / f"test/{folder}/empty.png").write_bytes(b"")
        (part / f"test/{folder}/link.png").symlink_to("nowhere")
    assert len(collect(FOLDER, part.parent, "part")) == 25


def test_the_only_category_has_any_name(part, tmp_path, said, caplog):
    before = collect(FOLDER, part.parent, "part")
    part.rename(tmp_path / "newtest")
    for root in (tmp_path / "newtest", tmp_path):
        after, text = said(root)
        assert text.count("has one category, newtest: it is taken for part") == 1
        collect(FOLDER, root, "part", warn=False)
        assert caplog.text.count("taken for part") == 1
        assert [(s.group, s.category, s.defect) for s in after] == [
            (s.group, s.category, s.defect) for s in before
        ]  # so the same images are held out
    with pytest.raises(DatasetError, match="no category 'part'.*found: newtest"):
        collect(MVTEC, tmp_path, "part")
    shutil.copytree(tmp_path / "newtest", tmp_path / "second")
    with pytest.raises(DatasetError, match="no category 'part'.*found: newtest, second"):
        collect(FOLDER, tmp_path, "part")


def test_loops_and_limits(tmp_path):
    write_image(tmp_path / "a/b.png", RNG)
    (tmp_path / "a/back").symlink_to(tmp_path)
    assert "1 images where none are looked for: 1 in a" in str(unused_files(tmp_path, ()))
    assert str(unused_files(tmp_path, (), limit=0)) == ""


def test_new_images_that_are_not_used(tmp_path, caplog, make_config):
    caplog.set_level(logging.INFO, logger="uninet")
    config, output = make_config(), tmp_path / "new/out"
    for name in ("new/a.png", "new/day/b.jpg", "new/@eaDir/a.png", "new/out/heatmaps/a.png"):
        write_image(tmp_path / name, RNG)
    for name in ("new/c.webp", "new/out/d.gif"):
        (tmp_path / name).write_bytes(b"odd")
    found = [s.path.name for s in samples_at(tmp_path / "new", output, config)]
    assert found == ["a.png", "b.jpg"]
    assert "1 files of other kinds: 1 ending in .webp (read are" in caplog.text and ".gif" not in caplog.text
    assert "1 names that begin with . @ $ __ (@eaDir)" in caplog.text
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/c.webp").write_bytes(b"odd")
    with pytest.raises(DatasetError, match=r"no image at .*Found.*1 ending in \.webp"):
        samples_at(tmp_path / "bare", tmp_path / "out", config)


@pytest.mark.parametrize("name", ["btad", "vad", "kolektor", "aptos", "clinicdb", "ped2", "visa-prepared"])
def test_releases_are_used_whole(masters, name):
    spec = SPECS[name.partition("-")[0]]
    for category in spec.list_categories(masters[name]):
        samples = spec.list_samples(masters[name], category)
        assert unused_samples(spec, masters[name], category, samples).pictures == ()
