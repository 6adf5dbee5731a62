"""report.html: self-contained, escaped, and with the numbers and pictures of the run."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.metrics import auc

from datasets.samples import Sample
from evaluation import metrics
from evaluation.metrics import evaluate, few_points
from evaluation.report import GALLERY, Report, page
from evaluation.scoring import Scores, results_by_category

pytestmark = pytest.mark.usefixtures("real_plots")


class Tags(HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report_of(make_config, tmp_path, count=20, category="part", anomalous=None, masks=True):
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        label = int(i >= count // 2) if anomalous is None else int(anomalous)
        samples.append(
            Sample(tmp_path / f"<b>{i}.png", label, None, category, "test", "bent" if label else "good", "")
        )
    truth = np.zeros((count, 32, 48), np.uint8)
    for i, s in enumerate(samples):
        truth[i, 4:12, 5:15] = s.label
    maps = (rng.random(truth.shape) + truth).astype(np.float32)
    scores = Scores(samples, maps.max(axis=(1, 2)).astype(float), maps, truth if masks else None, 2.0)
    results = results_by_category(scores, make_config().run)
    facts = {"command": "python train.py --set 'a=<b>'"}
    pixels = lambda i: np.full((32, 48, 3), 7 * i % 255, np.uint8)  # noqa: E731
    return Report("x & <y>", scores, pixels, results, ["a note"], facts, {"train": {"seed": 0}})


def test_well_formed_and_without_network(make_config, tmp_path):
    html = page(report_of(make_config, tmp_path))
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert not re.findall(r"(?:src|href)=.(?!data:)", html) and "http" not in html
    assert "<b>" not in html and "&lt;b&gt;" in html and "x &amp; &lt;y&gt;" in html


def test_for_people_who_listen(make_config, tmp_path):
    tags = Tags()
    tags.feed(page(report_of(make_config, tmp_path)))
    assert ("html", {"lang": "en"}) in tags.seen
    assert all(a.get("alt") for tag, a in tags.seen if tag == "img")
    plots = [a for tag, a in tags.seen if tag == "img" and a["src"].startswith("data:image/svg+xml")]
    assert [a["alt"].split(",")[0] for a in plots] == [
        "part: ROC of images",
        "part: PRO",
        "part: score of images",
    ]
    headings = [tag for tag, _ in tags.seen if re.fullmatch(r"h\d", tag)]
    assert headings[0] == "h1" and headings.count("h1") == 1
    assert [a["scope"] for tag, a in tags.seen if tag == "th"].count("col") >= 5
    assert any(tag == "caption" for tag, _ in tags.seen)


def test_numbers_and_pictures(make_config, tmp_path):
    report = report_of(make_config, tmp_path, count=100)
    html = page(report)
    for key in ("image_auroc", "pro"):
        assert f"{100 * report.results['part'][key]:.2f}" in html
    assert "part: ROC of images" in html and "part: PRO" in html and "part: score of images" in html
    gallery = html[html.index('id="gallery"') :]
    assert gallery.count("<img") == GALLERY and f"{GALLERY} of 100 images" in html
    missed = html[html.index("lowest scores") : html.index("highest scores")]
    worst = min(i for i in range(50, 100) if report.scores.score[i] == report.scores.score[50:].min())
    assert f'data-place="{worst}"' in missed


def test_files_of_one_name_are_told_apart(make_config, tmp_path):
    report = report_of(make_config, tmp_path, count=4)
    for i, sample in enumerate(report.scores.samples):
        report.scores.samples[i] = replace(sample, path=tmp_path / f"kos0{i}/Part0.jpg")
    html = page(report)
    assert all(html.count(f"kos0{i}/Part0.jpg") > 1 for i in range(4))  # as text, and for people who listen


def test_what_the_curves_show(make_config, tmp_path):
    html = page(report_of(make_config, tmp_path))
    svgs = [base64.b64decode(s) for s in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html)]
    words = [" ".join(ElementTree.fromstring(s).itertext()) for s in svgs]
    for found, expected in zip(
        words, ("FPR TPR", "FPR overlap 0.3", "score share normal anomalous"), strict=True
    ):
        assert set(expected.split()) <= set(found.split())


@pytest.mark.parametrize(("anomalous", "masks"), [(1, True), (0, True), (None, False)])
def test_what_is_missing_is_left_out(make_config, tmp_path, anomalous, masks):
    html = page(report_of(make_config, tmp_path, anomalous=anomalous, masks=masks))
    assert "part: PRO" not in html
    assert ("part: ROC" in html) == (anomalous is None) == ("Only one kind of image" not in html)


def test_a_segmentation_is_ranked_by_dice(make_config, tmp_path):
    report = report_of(make_config, tmp_path, count=8, anomalous=1)
    report.scores.kind = "segmentation"
    report.scores.masks[:] = 0
    report.scores.masks[:, :8] = 1
    report.scores.maps[:] = report.scores.masks  # exact, but for one
    report.scores.maps[5] = 1 - report.scores.masks[5]
    html = page(report)
    worst = html[html.index("lowest Dice") :]
    assert worst.index('data-place="5"') < worst.index('data-place="0"')
    assert "part: Dice of images" in html and "ROC of images" not in html and ">Dice</button>" in html


def test_the_drawn_curve_has_the_area_of_the_metric():
    rng = np.random.default_rng(0)
    masks = (rng.random((4, 16, 16)) > 0.9).astype(np.uint8)
    maps = (rng.random(masks.shape) + 0.5 * masks).round(1)  # few points: none is left out
    curve = []
    pro = evaluate(np.arange(4.0), np.array([0, 0, 1, 1]), maps, masks, curve=curve)["pro"]
    fpr, overlap = np.array(curve).T
    assert fpr[0] == overlap[0] == 0 and fpr[-1] <= 0.3 and (np.diff(fpr) >= 0).all()
    assert 0.6 * pro < auc(fpr, overlap) / 0.3 <= pro  # up to its last point before the limit
    evaluate(np.arange(4.0), np.array([0, 0, 1, 1]), maps, np.zeros_like(masks), curve=(none := []))
    assert none == []


def test_few_points_of_a_curve():
    x = np.linspace(0, 1, 5001)
    points = few_points(x, x**2, 0.3)
    assert points[0] == (0, 0) and points[-1] == (x[1500], x[1500] ** 2) and 400 < len(points) < 520
    assert few_points(x[:3], x[:3]) == [(x[0], x[0]), (x[1], x[1]), (x[2], x[2]), (x[2], x[2])]


def test_curves_are_counted_once(make_config, tmp_path, monkeypatch):
    calls, count = [], metrics._curve
    monkeypatch.setattr(metrics, "_curve", lambda *args: (calls.append(args), count(*args))[1])
    assert "part: PRO" in page(report_of(make_config, tmp_path))
    assert len(calls) == 1
