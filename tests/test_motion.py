"""Stacked frames of a video (`data.stack_frames`), and the synthetic defects of motion."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from fixtures import COUNTS, write_ped2
from PIL import Image

import predict as predict_command
import test as test_command
import train as train_command
from calibrate import good_samples
from datasets.build import build_data, data_identity, new_samples, read_as
from datasets.registry import SPECS
from datasets.samples import Sample
from datasets.synthetic import MIN_CHANGE, NoDefectError, add_defect
from datasets.transforms import Normalise
from datasets.video import with_earlier_frames
from export import describe
from model.build import build_model
from model.motion import OpticalFlow, SpeedHead
from utils.checkpoint import Checkpoint, load_checkpoint, restore_model
from utils.cli import run_command
from utils.errors import CheckpointError, ConfigError, DatasetError

NORMALISE = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SIDE, SPEED = 64, 3


def frame(number, clip=0):
    """A dark square that moves SPEED pixels a frame over a bright, uneven ground of the clip."""
    ground = np.random.default_rng(clip).normal(170, 3, (SIDE, SIDE))
    ground[24:40, 4 + SPEED * number : 12 + SPEED * number] = 40
    return np.clip(ground, 0, 255).astype(np.uint8)


def stacked(number, step):
    return np.stack([frame(number - 2 * step), frame(number - step), frame(number)], axis=2)


@pytest.fixture
def ped2(tmp_path, monkeypatch):
    """Two training and two test clips of 4 frames; a square moves in each."""
    monkeypatch.setitem(SPECS, "ped2", replace(SPECS["ped2"], counts={"ped2": COUNTS["ped2"]["ped2"]}))
    root = tmp_path / "data"
    write_ped2(root)
    for number, clip in enumerate(("Train/Train001", "Train/Train002", "Test/Test001", "Test/Test002")):
        for i, path in enumerate(sorted((root / clip).glob("*.tif"))):
            Image.fromarray(frame(i, number)).save(path)
    return root


@pytest.fixture
def config(make_config, ped2):
    def make(**settings):
        chosen = {"run__data_root": str(ped2), "data__synthetic": 0.0, "data__stack_frames": 1}
        if "model__name" not in settings:
            chosen |= {"model__name": "remind", "model__head": "none"}
        return make_config(path="configs/ped2.yaml", **(chosen | settings))

    return make


class TestStackedFrames:
    def test_frames_of_the_clip_oldest_first(self):
        samples = [
            Sample(ROOT / f"{clip}{i}", 0, None, "v", "train", "", clip) for clip in "ab" for i in range(4)
        ]
        found = [[p.name for p in s.earlier] for s in with_earlier_frames(samples, 1)]
        places = ((2, 1), (3, 2), (0, 1), (1, 2))  # backwards at the start
        assert found == [[f"{clip}{i}", f"{clip}{j}"] for clip in "ab" for i, j in places]
        found = [[p.name for p in s.earlier] for s in with_earlier_frames(samples, 2)][:4]
        assert found == [["a3", "a2"], ["a3", "a3"], ["a3", "a3"], ["a3", "a3"]]
        assert with_earlier_frames(samples[:1], 2)[0].earlier == (samples[0].path,) * 2

    def test_pixels(self, config):
        data = build_data(config(), NORMALISE).train
        expected = np.stack([cv2.resize(frame(i), (64, 64)) for i in (1, 2, 3)], axis=2)
        assert np.array_equal(data.pixels(3), expected)
        first = np.stack([cv2.resize(frame(i, 1), (64, 64)) for i in (2, 1, 0)], axis=2)
        assert np.array_equal(data.pixels(4), first)  # of the second clip
        data.fill_cache(quiet=True)
        assert np.array_equal(data.pixels(3), expected)

    def test_a_subset_keeps_its_neighbours(self, config):
        whole = build_data(config(), NORMALISE).train
        some = build_data(config(data__train_limit=3), NORMALISE).train
        at = {s.path: i for i, s in enumerate(whole.samples)}
        for i, sample in enumerate(some.samples):
            assert np.array_equal(some.pixels(i), whole.pixels(at[sample.path]))

    def test_prediction_takes_a_folder_as_a_clip(self, config, ped2):
        files = sorted((ped2 / "Test/Test001").glob("*.tif"))
        samples = new_samples(files, ped2, config())
        assert samples[3].earlier == (files[1], files[2]) and samples[0].earlier == (files[2], files[1])
        for few in (files[3:], files[2:]):  # of the latter the second would be its own earlier frame
            with pytest.raises(DatasetError, match=f"Test001 has {len(few)} of the 3 frames"):
                new_samples(few, ped2, config())
        other = sorted((ped2 / "Test/Test002").glob("*.tif"))[:2]
        with pytest.raises(DatasetError, match="Test002 has 2 of the 3 frames"):
            new_samples([*files, *other], ped2, config())

    def test_a_test_clip_of_a_training_clips_name_is_another(self, config, ped2, monkeypatch):
        counts = {"ped2": COUNTS["ped2"]["ped2"]}
        for part in ("Train", "Test"):
            shutil.copytree(ped2 / f"{part}/{part}002", ped2 / part / "yard")
        with (ped2 / "Test/UCSDped2.m").open("a") as file:
            file.write("TestVideoFile{end+1}.gt_frame = [3:4];\n")
        monkeypatch.setitem(SPECS, "ped2", replace(SPECS["ped2"], counts=counts))
        data = build_data(config(run__skip_unreadable=True), NORMALISE)
        for sample in (*data.train.samples, *data.test.samples):
            assert all(path.parent == sample.path.parent for path in sample.earlier)

    def test_frames_beside_those_of_the_test_are_not_trained_on(self, config):
        message = "num_train_anomalies takes frames out of test clips"
        with pytest.raises(ConfigError, match=message):
            build_data(config(model__setting="supervised", data__num_train_anomalies=1), NORMALISE)

    def test_another_score_needs_another_power(self, config):
        """test.py would multiply it by what was measured for the run's own score."""
        flags = ["--checkpoint", "r", "--set", "score.decision=max"]
        args = test_command.parse_arguments(flags)
        with pytest.raises(ConfigError, match="the power of the speed was measured for the run's own score"):
            test_command.evaluated_config(config(model__head="speed"), args)
        assert test_command.evaluated_config(config(), args).score.decision == "max"

    def test_another_model_reads_frames_without_their_speed(self, config):
        """The head is what was trained, not what the dataset's file says."""
        plain = config(data__stack_frames=0, data__tile=32)
        assert read_as("ped2", "all", plain).tile == 32

    def test_unreadable_neighbours_leave_a_frame_out(self, config, ped2):
        (ped2 / "Train/Train001/001.tif").write_bytes(b"broken")
        data = build_data(config(run__skip_unreadable=True), NORMALISE)
        kept = [s.path.name for s in data.train.samples if s.group == "Train001"]
        assert kept == ["002.tif", "004.tif"] and len(data.skipped) == 1

    def test_a_clip_is_held_out_to_scale_the_speed_on(self, config, monkeypatch):
        """On frames of the training the maps' score hardly spreads, and speed would count little."""
        data = build_data(config(model__head="speed"), NORMALISE)
        (held,), (kept,) = ({s.group for s in part.samples} for part in (data.scale, data.train))
        assert held != kept and len(data.scale) == 4
        asked = []
        run = SimpleNamespace(data=data, model=SimpleNamespace(fit_score=asked.append))
        monkeypatch.setattr(train_command, "image_batches", lambda run, images, what: images)
        train_command.fit_score(run)
        assert [s.group for s in asked[0].samples] == [held] * 4
        plain = build_data(config(), NORMALISE)
        assert len(plain.scale) == 0 and len(plain.train) == 8
        assert data_identity(config(), data)["images"]["scale"] == 4
        assert "scale" not in data_identity(config(), plain)["images"]  # older runs keep theirs, and go on
        data.scale.samples *= 200  # more than for other statistics: few frames weigh the speed badly
        train_command.fit_score(run)
        assert len(asked[1]) == 512

    def test_calibration_takes_no_clip_that_the_speed_was_measured_on(self, config, ped2):
        fitted = config(model__head="speed")
        (held,) = {s.group for s in build_data(fitted, NORMALISE).scale.samples}
        detector = SimpleNamespace(config=fitted, state=SimpleNamespace(identity=None))
        with pytest.raises(DatasetError, match=f"{held}.* which the model was trained on"):
            good_samples(ped2 / "Train" / held, detector, skip_unreadable=False)

    def test_one_clip_is_too_few_to_scale_the_speed_on(self, config, ped2):
        shutil.rmtree(ped2 / "Train/Train002")
        with pytest.raises(
            DatasetError, match="none to spare; take two clips .* above 0, or model.head=none"
        ):
            build_data(config(model__head="speed", run__skip_unreadable=True), NORMALISE)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"model__name": "uninet"}, "needs data.stack_frames=0"),
            ({"model__head": "speed", "data__stack_frames": 0}, "--model remind and data.stack_frames"),
            ({"model__head": "speed", "model__name": "memory-bank"}, "--model remind and data.stack_frames"),
            ({"model__head": "speed", "data__tile": 64}, "data.tile does not go with model.head speed"),
            (
                {"data__stack_frames": 0, "data__synthetic": 0.5, "data__synthetic_kinds": ["speed"]},
                "data.stack_frames",
            ),
        ],
    )
    def test_settings_that_do_not_go_together(self, config, settings, message):
        with pytest.raises(ConfigError, match=message):
            config(**settings)

    def test_needs_a_video(self, make_config, mvtec_like):
        config = make_config(run__data_root=str(mvtec_like), data__category="part", data__stack_frames=1)
        with pytest.raises((ConfigError, DatasetError), match="frames of a video"):
            build_data(config, NORMALISE)


class TestDefects:
    @pytest.mark.parametrize("kind", ["speed", "zoom"])
    def test_where_something_moves(self, kind):
        image, faster = stacked(9, 1), stacked(9, 4)
        for seed in range(8):
            texture = faster if kind == "speed" else None
            rng = np.random.default_rng(seed)
            changed, mask = add_defect(image, rng, kind=kind, texture=texture)
            difference = cv2.absdiff(changed, image).max(2)
            assert (difference[mask == 1] >= MIN_CHANGE).all() and not difference[mask == 0].any()
            assert mask[20:44].sum() > 0.6 * mask.sum()  # where the square passes
            if kind == "speed":
                same = (changed == faster).all(2) | (mask == 0)
                assert same.mean() > 0.95  # but for what was too faint
                assert cv2.absdiff(changed, image)[..., 2].max() <= MIN_CHANGE  # the last frame stays

    def test_nothing_moves(self):
        still = np.repeat(frame(3)[..., None], 3, axis=2)
        with pytest.raises(NoDefectError, match="no visible speed"):
            add_defect(still, np.random.default_rng(0), kind="speed", texture=still)

    def test_training_draws(self, config):
        kinds = {"data__synthetic": 1.0, "data__synthetic_kinds": ["speed"]}
        data = build_data(config(**kinds), NORMALISE)
        normal = build_data(config(), NORMALISE).train
        for draw in range(16):  # also of first frames, of which nothing is faster
            image, mask, label = data.train.sample(draw)
            assert label == 1 and mask.any()
            assert (image != normal.pixels(draw % 8)).any(2)[mask == 1].all()
            again = data.train.sample(draw)
            assert np.array_equal(again[0], image) and np.array_equal(again[1], mask)

    def test_faster_is_what_its_name_says(self, config):
        kinds = {"data__synthetic": 1.0, "data__synthetic_kinds": ["speed"]}
        data = build_data(config(**kinds), NORMALISE).train
        grey = [cv2.resize(frame(i), (64, 64)) for i in range(4)]
        for index, places in (
            (3, (1, 1, 3)),
            (2, (1, 1, 2)),
            (1, (3, 2, 1)),
        ):  # the clip's first two look forward
            found = data._faster(index, np.random.default_rng(0))
            assert np.array_equal(found, np.stack([grey[i] for i in places], axis=2))


def clip(way, count=3, size=(96, 128)):
    """Frames (count, H, W) of a bright, smooth texture that moves by `way`, right and down, each frame."""
    rng = np.random.default_rng(0)
    ground = cv2.GaussianBlur(rng.normal(0, 1, (360, 300)).astype(np.float32), (0, 0), 3)
    ground = 128 + 40 * ground / ground.std()
    (height, width), (right, down) = size, way
    places = [(50 - i * down, 80 - i * right) for i in range(count)]
    return np.clip([ground[y : y + height, x : x + width] for y, x in places], 0, 255).astype(np.uint8)


def flow_of(before, after):
    pair = (torch.from_numpy(frame)[None, None].float() for frame in (before, after))
    return OpticalFlow()(*pair)[0].permute(1, 2, 0).numpy()


class TestFlow:
    @pytest.mark.parametrize("way", [(3, -2), (0, 0), (-4, 3)])
    def test_a_known_way(self, way):
        inner = flow_of(*clip(way, 2))[16:-16, 16:-16]
        assert np.abs(inner - way).max() < 0.2

    @pytest.mark.parametrize("size", [(256, 128), (96, 160), (64, 64)])  # four, two and two scales
    def test_as_opencv(self, size):
        """Also at the borders, and where a part moves another way."""
        before, after = clip((2, 1), 2, size)
        after[20:44, 10:40] = clip((-4, 3), 2, size)[1][20:44, 10:40]
        theirs = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        assert np.abs(theirs).max() > 3
        np.testing.assert_allclose(flow_of(before, after), theirs, atol=0.01)


class TestSpeedHead:
    @pytest.fixture
    def head(self):
        return SpeedHead(NORMALISE.mean, NORMALISE.std)

    def images(self, *ways):
        return NORMALISE(np.stack([clip(way).transpose(1, 2, 0) for way in ways]))

    def test_pixels_between_the_last_two_frames(self, head):
        found = head.speed(self.images((3, 1), (0, 0), (-2, 0)))
        np.testing.assert_allclose(found, [10**0.5, 0, 2], atol=0.3)  # at the border a little more

    def test_its_logarithm_spreads_like_that_of_the_models_own_score(self, head):
        images, own = self.images((1, 0), (2, 0), (4, 0)), torch.tensor([0.1, 0.3, 0.2])
        assert (head(images) == 1).all()  # before it is fitted
        head.fit(own, head.speed(images))
        logs = head(images).log()
        assert logs.std(correction=0) == pytest.approx(own.log().std(correction=0).item(), rel=1e-4)
        assert logs.mean() == pytest.approx(0, abs=1e-6)
        assert head(self.images((6, 0))) > head(images).max()
        # twice as fast is the same factor more, wherever one starts
        power, speed = (
            own.log().std(correction=0) / head.speed(images).log().std(correction=0),
            head.speed(images),
        )
        torch.testing.assert_close(logs[2] - logs[0], power * (speed[2] / speed[0]).log())
        for still in (1.0, 0.01, 0.3):  # the same everywhere, but for rounding: nothing to compare with
            head.fit(torch.rand(512), torch.full((512,), still))
            assert (head(images) == 1).all()
        head.fit(torch.rand(512), 3 + 0.02 * torch.rand(512))  # as on a belt: finite, whatever comes
        assert head(self.images((0, 0), (9, 0))).tolist() == pytest.approx([0.1, 1000])

    def test_where_nothing_moves_defects_still_count(self, head):
        own = torch.tensor([0.1, 0.3, 0.2])
        head.fit(own, head.speed(self.images((3, 0), (4, 0), (5, 0))))
        assert head(self.images((0, 0))).item() == pytest.approx(0.1)
        head.fit(own, head.speed(self.images((0, 0), (0, 0), (5, 0))))  # some do not move
        assert head(self.images((0, 0), (5, 0))).isfinite().all()
        head.fit(torch.tensor([0.0, 0.3, 0.2]), head.speed(self.images((3, 0), (4, 0), (5, 0))))
        assert head(self.images((4, 0))).isfinite().all()

    def test_multiplies_the_score_alone(self, config):
        model, images = build_model(config(model__head="speed")).eval(), self.images((2, 0), (5, 0))
        images = images[..., :64, :64]
        with torch.no_grad():
            plain = model.predict(images)
            model.fit_score([images[:1], images[1:]])
            found, factor = model.predict(images), model.speed(images)
        assert (factor != 1).all() and torch.equal(found.anomaly_map, plain.anomaly_map)
        torch.testing.assert_close(found.score, plain.score * factor)

    @pytest.mark.slow
    def test_onnx(self, head, tmp_path):
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        head.power.fill_(1)
        images = self.images((1, 0), (2, 1), (0, 3))[..., :64, :64].contiguous()
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        with torch.no_grad():
            torch.onnx.export(head, (images,), tmp_path / "speed.onnx", dynamo=True, dynamic_shapes=shapes)
            expected = head(images).numpy()
        session = onnxruntime.InferenceSession(tmp_path / "speed.onnx")
        for count in (3, 1):
            found = session.run(None, {session.get_inputs()[0].name: images[:count].numpy()})[0]
            np.testing.assert_allclose(found, expected[:count], rtol=1e-3)


def test_a_scale_of_before_the_factor_is_refused(config, tmp_path):
    """Its numbers were of a speed that was added; as a factor they would give other scores."""
    model = build_model(config(model__head="speed"))
    old = {name.replace("speed.power", "speed.gain"): value for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"speed\.(gain|power)"):
        restore_model(model, old, source=tmp_path / "last.pt")


def test_an_exported_model_says_what_its_channels_are(config):
    def about(step):
        state = Checkpoint(config(data__stack_frames=step), {}, 1)
        model = torch.nn.Linear(1, 1)
        detector = SimpleNamespace(config=state.config, state=state, calibration=None, model=model)
        return describe(detector, 0.01)

    assert about(2)["stacked_frames"].startswith("the frames 4 and 2 before")
    assert "(B, 3, H, W, 3)" in about(2)["input"]
    assert "stacked_frames" not in about(0) and "(B, H, W, 3)" in about(0)["input"]


@pytest.mark.parametrize("head", ["none", "speed"])
@pytest.mark.slow
def test_train_and_predict(ped2, tmp_path, capsys, head):
    words = ["--config", str(ROOT / "configs/ped2.yaml"), "--data-root", str(ped2), "--model", "remind"]
    words += ["--backbone", TINY, "--device", "cpu", "--precision", "fp32", "--quiet"]
    words += ["--iterations", "2", "--output", str(tmp_path / "runs"), "--name", "run"]
    for setting in (
        "model.weights=random", "data.image_size=64", "data.stack_frames=1", "train.batch_size=2",
        "data.synthetic_kinds=[speed,cut]", f"model.head={head}",
    ):  # fmt: skip
        words += ["--set", setting]
    assert run_command(train_command.main, words) == 0
    folder = next((tmp_path / "runs").rglob("run"))
    scale = {
        key: float(value)
        for key, value in load_checkpoint(folder / "last.pt").model.items()
        if "speed" in key
    }
    assert set(scale) == ({"speed.centre", "speed.power"} if head == "speed" else set())
    assert scale.get("speed.power", 1) > 0
    out = tmp_path / "out"
    words = ["--checkpoint", str(folder), str(ped2 / "Test/Test001"), "--output", str(out), "--quiet"]
    assert run_command(predict_command.main, [*words, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "micro" in captured.out

    def scores(path):
        lines = [line.split(",") for line in path.read_text().splitlines()]
        place = lines[0].index("score")
        return [float(line[place]) for line in lines[1:]]

    assert scores(out / "scores.csv") == pytest.approx(scores(folder / "scores.csv")[:4], rel=1e-4)
