"""Tables, scores.csv, pictures, log.jsonl after a kill."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from datasets.samples import Sample
from evaluation.figures import (
    choose_examples,
    colour_scale,
    heatmap,
    heatmap_page,
    subplots,
    svg,
    write_png,
)
from evaluation.results import results_table, write_scores
from evaluation.scoring import Scores, results_by_category
from utils.tracking import Tracker, validation_curve


@pytest.fixture
def scores(tmp_path):
    """Two categories of 4 normal and 4 anomalous images with two defect types; the maps know the answer."""
    samples, masks = [], []
    for category in ("a", "b"):
        for i in range(8):
            label, defect = int(i >= 4), "good" if i < 4 else ("dent" if i < 6 else "hole")
            path = tmp_path / category / defect / f"{i}.png"
            samples.append(Sample(path, label, None, category, "test", defect, str(path)))
            masks.append(np.zeros((16, 16), np.uint8))
            masks[-1][4:8, 4:8] = label
    masks = np.stack(masks)
    rng = np.random.default_rng(0)
    maps = (masks * 2 + rng.random(masks.shape)).astype(np.float32)
    return Scores(samples, maps.reshape(16, -1).max(axis=1).astype(float), maps, masks, 1.0)


@pytest.fixture
def evaluated(make_config):
    return make_config().run


def test_metrics_by_category_and_their_mean(scores, evaluated):
    results = results_by_category(scores, evaluated)
    assert list(results) == ["a", "b", "mean"]
    assert results["a"]["image_auroc"] == results["mean"]["pixel_auroc"] == 1
    assert results["mean"]["n_normal"] == 8 and results["a"]["n_anomalous"] == 4


def test_unknown_labels_are_left_out(scores, evaluated):
    from dataclasses import replace

    unknown = replace(scores, samples=[replace(s, label=-1) for s in scores.samples[:8]] + scores.samples[8:])
    assert list(results_by_category(unknown, evaluated)) == ["b", "mean"]
    with pytest.raises(ValueError, match="no labelled image"):
        results_by_category(
            replace(scores, samples=[replace(s, label=-1) for s in scores.samples]), evaluated
        )


def test_table(scores, evaluated):
    lines = results_table(results_by_category(scores, evaluated), notes=["a note"]).splitlines()
    assert lines[0].count("|") == lines[2].count("|") and "100.00" in lines[2] and lines[-1] == "a note"
    assert "mean" in lines[4]
    empty = results_table({"x": {"image_auroc": 0.5}})
    assert "50.00" in empty and "None" not in empty and "nan" not in empty


def test_scores_csv(scores, tmp_path):
    write_scores(tmp_path / "scores.csv", scores, tmp_path)
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0] == "path,category,label,defect,score" and len(lines) == 17
    assert lines[5].startswith("a/dent/4.png,a,1,dent,")


def test_one_colour_scale_for_all(scores):
    low, high = colour_scale(scores.maps, scores.labels)
    assert 0.3 < low < 0.7 and high > 2
    calm = heatmap(scores.maps[0], (low, high)).astype(int).sum()
    assert heatmap(scores.maps[5], (low, high)).astype(int).sum() > calm
    flat = np.ones((4, 4, 4), np.float32)
    assert np.isfinite(heatmap(flat[0], colour_scale(flat, np.zeros(4)))).all()


def test_examples_cover_normal_and_every_defect(scores):
    chosen = choose_examples(scores, 8)
    defects = [scores.samples[i].defect for i in chosen]
    assert len(chosen) == 8 and {"good", "dent", "hole"} == set(defects) and defects.count("good") == 2
    assert len(choose_examples(scores, 100)) <= 16


def test_page(scores, tmp_path):
    chosen = choose_examples(scores, 4)
    images = [np.full((16, 16, 3), 100, np.uint8) for _ in chosen]
    page = heatmap_page(images, scores, chosen, height=32)
    assert page.shape == (3 * 32 + 30, 4 * 36, 3)
    write_png(tmp_path / "p.png", page)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p.png")), page)


def test_plots_are_the_same_text_each_time():
    def drawn():
        figure, panels = subplots(4, columns=3)
        for axes in panels:
            axes.plot([0, 1], [0, 1], label="a < b")
        return svg(figure, "s & t")

    root = ElementTree.fromstring(drawn())
    assert root.find("{http://www.w3.org/2000/svg}title").text == "s & t"
    assert drawn() == drawn() and "a < b" not in "".join(root.itertext())  # without a legend


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    entries = [{"iteration": i, "total": 1.0} for i in range(1, 6)]
    entries.insert(2, {"iteration": 2, "split": "validation", "results": {"mean": {"image_auroc": 0.5}}})
    text = "".join(json.dumps(e) + "\n" for e in entries) + '{"iteration": 6, "to'
    (tmp_path / "log.jsonl").write_text(text)
    Tracker(tmp_path, start=3, stop=9, quiet=True).close()
    kept = [json.loads(line)["iteration"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kept == [1, 2, 2, 3]
    assert validation_curve(tmp_path) == [{"iteration": 2, "split": "validation", "image_auroc": 0.5}]
