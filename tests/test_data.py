"""Datasets on disk in the real layout, the errors they raise, decoding, and the order of training batches."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from conftest import write_image, write_mask
from PIL import Image

from datasets import loader, synthetic
from datasets.build import build_data
from datasets.loader import (
    DeviceSet,
    ImageSet,
    TrainingOrder,
    batches,
    batches_per_epoch,
    fits_on,
    statistics_sample,
    training_batches,
)
from datasets.registry import SPECS, collect
from datasets.samples import Sample, count
from datasets.splits import check_disjoint, hold_out, limit, tied_groups
from datasets.synthetic import DEFECT_KINDS, SyntheticTraining, SyntheticValidation
from datasets.transforms import Decode, Normalise
from utils.errors import DatasetError

MVTEC, FOLDER = SPECS["mvtec"], SPECS["folder"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NORMALISE = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class TestListing:
    def test_layout(self, mvtec_like):
        samples = collect(MVTEC, mvtec_like, "part")
        assert count(samples) == (12, 4, 5)
        assert [s.defect for s in samples if s.split == "test"] == ["dot"] * 2 + ["good"] * 4 + ["spot"] * 3
        for s in samples:
            assert (s.mask_path is not None) == (s.label == 1)
            if s.mask_path:
                assert s.mask_path.stem.removesuffix("_mask") == s.path.stem  # paired by name, not by order

    def test_missing_mask(self, mvtec_like):
        (mvtec_like / "part/ground_truth/spot/001_mask.png").unlink()
        with pytest.raises(DatasetError, match=r"no mask for .*spot/001\.png; expected .*001_mask\.png"):
            collect(MVTEC, mvtec_like, "part")
        assert count(collect(FOLDER, mvtec_like, "part")) == (12, 4, 5)  # optional there

    @pytest.mark.parametrize(("added", "message"), [
        ("ground_truth/spot/000.png", r"000\.png and 000_mask\.png have the same name"),
        ("ground_truth/spot/000_mask.bmp", r"000_mask\.bmp and 000_mask\.png have the same name"),
        ("test/spot/000.jpg", r"000\.jpg and 000\.png would share the mask .*000_mask\.png"),
    ])  # fmt: skip
    @pytest.mark.parametrize("spec", [MVTEC, FOLDER], ids=lambda spec: spec.name)
    def test_pairs_that_are_not_clear(self, mvtec_like, spec, added, message):
        write_mask(mvtec_like / "part" / added)
        with pytest.raises(DatasetError, match=message):
            collect(spec, mvtec_like, "part")

    def test_images_of_one_name_without_masks(self, mvtec_like):
        write_image(mvtec_like / "part/test/new/000.jpg", np.random.default_rng(90))
        write_image(mvtec_like / "part/test/new/000.png", np.random.default_rng(91))
        assert count(collect(FOLDER, mvtec_like, "part")) == (12, 4, 7)

    @pytest.mark.parametrize("wrong", ["..", "part"])
    def test_wrong_root_is_corrected(self, mvtec_like, wrong):
        with pytest.raises(DatasetError, match=f"did you mean --data-root .*{mvtec_like.name}"):
            collect(MVTEC, (mvtec_like / wrong).resolve(), "part")

    def test_other_errors(self, mvtec_like, tmp_path):
        with pytest.raises(DatasetError, match="--data-root DIR"):
            collect(MVTEC, None, "part")
        with pytest.raises(DatasetError, match="is no folder"):
            collect(MVTEC, tmp_path / "nothing", "part")
        with pytest.raises(DatasetError, match="no category 'screw' in .*found: part"):
            collect(MVTEC, mvtec_like, "screw")
        shutil.rmtree(mvtec_like / "part/train/good")
        (mvtec_like / "part/train/good").mkdir()
        with pytest.raises(DatasetError, match="no normal training image"):
            collect(MVTEC, mvtec_like, "part")

    def test_official_counts_are_asserted(self, mvtec_like):
        (mvtec_like / "part").rename(mvtec_like / "bottle")
        with pytest.raises(
            DatasetError, match="has 12 training, 4 normal and 5 anomalous .*209 training, 20 normal and 63"
        ):
            collect(MVTEC, mvtec_like, "bottle")
        assert len(collect(FOLDER, mvtec_like, "bottle")) == 21

    def test_folder_with_good_images_only(self, tmp_path):
        write_image(tmp_path / "mine/train/good/a.png", np.random.default_rng(0))
        for root in (tmp_path, tmp_path / "mine"):  # the folder of categories, or the category itself
            samples = collect(FOLDER, root, "all")
            assert [(s.category, s.label) for s in samples] == [("mine", 0)]

    def test_all_categories(self, mvtec_like):
        shutil.copytree(mvtec_like / "part", mvtec_like / "another")
        assert {s.category for s in collect(MVTEC, mvtec_like, "all")} == {"part", "another"}

    def test_real_images(self, shared_data):
        assert count(collect(MVTEC, shared_data / "mvtec", "screw")) == (320, 41, 119)
        assert count(collect(MVTEC, shared_data / "mvtec", "bottle")) == (209, 20, 63)

    def test_a_test_image_that_was_trained_on(self, mvtec_like):
        shutil.copy(mvtec_like / "part/train/good/001.PNG", mvtec_like / "part/test/good/zzz.png")
        samples = collect(MVTEC, mvtec_like, "part")
        train, test = ([s for s in samples if s.split == split] for split in ("train", "test"))
        with pytest.raises(DatasetError, match=r"zzz\.png of the test set is the same file as .*001\.PNG"):
            check_disjoint(train, test)


class TestSplits:
    def test_hold_out_keeps_groups_together_in_any_order(self, mvtec_like):
        from dataclasses import replace

        train = [s for s in collect(MVTEC, mvtec_like, "part") if s.split == "train"]
        train = [replace(s, group=str(i // 3)) for i, s in enumerate(train)]
        kept, held = hold_out(train, 0.3, seed=0)
        assert not {s.group for s in kept} & {s.group for s in held}
        assert (
            len(held) == 6 and len(kept) == 6
        )  # the smallest number of groups of three that reaches 30 % of 12
        again = hold_out(train[::-1], 0.3, seed=0)[1]
        assert {s.path for s in again} == {s.path for s in held}
        assert {s.path for s in hold_out(train, 0.3, seed=3)[1]} != {s.path for s in held}

    def test_nothing_held_out(self, mvtec_like):
        train = [s for s in collect(MVTEC, mvtec_like, "part") if s.split == "train"]
        assert hold_out(train, 0.0, seed=0) == (train, [])
        assert len(hold_out(train, 0.9, seed=0)[0]) >= 1

    def test_copies_stay_together(self, tmp_path):
        """A chain of copies ties groups and categories; equal sizes and middles alone do not."""
        texts = {"a": b"1" * 9000, "b": b"2" * 9000, "c": b"2" * 9000, "d": b"0" + b"1" * 8999, "e": b"3"}
        for name, text in texts.items():
            (tmp_path / name).write_bytes(text)
        groups = {"a": "one", "b": "one", "c": "two", "d": "three", "e": "four"}
        samples = [
            Sample(tmp_path / name, 0, None, "x" if name in "abe" else "y", "train", "good", group)
            for name, group in groups.items()
        ]
        assert tied_groups(samples) == {"one": "one", "two": "one", "three": "three", "four": "four"}
        assert tied_groups(samples[::-1]) == tied_groups(samples)
        for seed in range(20):
            kept, held = hold_out(samples, 0.4, seed=seed)
            names = {s.path.name for s in held}
            assert len(kept) + len(held) == 5 and names & set("abc") in (set(), set("abc"))
            assert sorted(s.path for s in hold_out(samples[::-1], 0.4, seed=seed)[1]) == sorted(
                s.path for s in held
            )

    def test_copies_are_in_one_part_and_calibrate_once(self, mvtec_like, make_config):
        for kind in ("train/good", "test/spot"):
            for path in list((mvtec_like / "part" / kind).iterdir()):
                shutil.copy(path, path.with_name(f"again{path.name}"))
        for path in list((mvtec_like / "part/ground_truth/spot").iterdir()):
            shutil.copy(path, path.with_name(f"again{path.name}"))
        config = make_config(
            "configs/folder.yaml", run__data_root=str(mvtec_like), data__category="part",
            data__num_train_anomalies=3,
            data__calibration_fraction=0.3, data__validation_fraction=0.3, eval__split="validation",
            model__setting="supervised",
        )  # fmt: skip
        data = build_data(config, NORMALISE)
        parts = [data.train, data.calibration, data.validation, data.test]
        texts = [[s.path.read_bytes() for s in part.samples] for part in parts]
        assert all(texts) and not any(set(a) & set(b) for a, b in itertools.combinations(texts, 2))
        assert len(texts[1]) == len(set(texts[1])) == 4  # of 8 held-out files
        normal = [s.label for part in parts for s in part.samples].count(0)
        assert normal == 24 + 4 - 4

    def test_an_image_that_calibrates_or_validates_is_not_tested_on(self, mvtec_like, make_config):
        for part in ("calibration", "validation"):
            settings = {f"data__{part}_fraction": 0.3, "eval__split": "validation"}
            settings |= {"run__data_root": str(mvtec_like), "data__category": "part"}
            data = build_data(make_config(**settings), NORMALISE)
            held_out = data.calibration if part == "calibration" else data.validation.held_out
            copy = mvtec_like / "part/test/good" / f"zzz{held_out.samples[0].path.suffix}"
            shutil.copy(held_out.samples[0].path, copy)
            with pytest.raises(DatasetError, match="of the test set is the same file as"):
                build_data(make_config(**settings), NORMALISE)
            copy.unlink()

    def test_limits_are_nested(self, mvtec_like):
        train = [s for s in collect(MVTEC, mvtec_like, "part") if s.split == "train"]
        few, more = limit(train, 3, seed=0), limit(train, 7, seed=0)
        assert len(few) == 3 and {s.path for s in few} < {s.path for s in more}
        assert limit(train, None, seed=0) == train

    def test_build_data_sets_are_disjoint(self, mvtec_like, make_config):
        config = make_config(
            run__data_root=str(mvtec_like), data__category="part", data__calibration_fraction=0.2,
            eval__split="validation",
            data__validation_fraction=0.25, data__image_size=(64, 32),
        )  # fmt: skip
        data = build_data(config, NORMALISE)
        parts = [data.train, data.calibration, data.validation.held_out, data.test]
        paths = [s.path for part in parts for s in part.samples]
        assert len(paths) == len(set(paths)) == 21
        assert [len(p) for p in parts] == [6, 3, 3, 9]
        assert len(data.validation) == 6
        assert (
            build_data(
                make_config(run__data_root=str(mvtec_like), data__category="part"), NORMALISE
            ).validation
            is None
        )


class TestDecoding:
    def test_sizes_modes_and_crop(self, tmp_path):
        rng = np.random.default_rng(0)
        for name, mode in (
            ("a.png", "L"),
            ("b.jpg", "RGB"),
            ("c.bmp", "RGB"),
            ("d.tif", "L"),
            ("e.png", "RGBA"),
        ):
            write_image(tmp_path / name, rng, mode=mode)
            image = Decode((32, 64)).image(tmp_path / name)
            assert image.shape == (32, 64, 3) and image.dtype == np.uint8
        Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10)).save(tmp_path / "n.png")
        assert Decode((4, 4), center_crop=4).image(tmp_path / "n.png")[..., 0].tolist()[0] == [33, 34, 35, 36]
        assert (Decode((12, 12), center_crop=12).image(tmp_path / "n.png")[0] == 0).all()  # padded with zeros

    def test_masks(self, tmp_path):
        values = np.zeros((10, 10), np.uint8)
        values[0, :4] = (1, 100, 127, 128)
        Image.fromarray(values).save(tmp_path / "m.png")
        assert Decode((10, 10)).mask(tmp_path / "m.png").sum() == 4
        assert Decode((10, 10), mask_threshold=127 / 255).mask(tmp_path / "m.png").sum() == 1
        assert Decode((20, 20)).mask(tmp_path / "m.png").sum() == 16  # nearest neighbour
        Image.fromarray(values > 0).save(tmp_path / "bool.png")
        assert Decode((10, 10)).mask(tmp_path / "bool.png").sum() == 4

    @pytest.mark.parametrize(("crop", "size"), [(20, (20, 20)), (0.5, (20, 30)), (80, (80, 80))])
    @pytest.mark.parametrize("zoom", [2, 1, 0.5])
    def test_a_mask_of_another_size_is_cropped_as_its_image(self, tmp_path, crop, size, zoom):
        values = np.zeros((40, 60), np.uint8)
        values[14:30, 22:44] = 255
        image = Image.fromarray(values)
        image.convert("RGB").save(tmp_path / "image.png")
        image.resize((int(60 * zoom), int(40 * zoom)), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
        decode = Decode(size, center_crop=crop)
        mask = decode.mask(tmp_path / "mask.png", of=tmp_path / "image.png")
        assert np.array_equal(mask, decode.image(tmp_path / "image.png")[..., 0] > 127)

    def test_unreadable(self, tmp_path):
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
        with pytest.raises(DatasetError, match="no readable image"):
            Decode((8, 8)).image(tmp_path / "x.png")

    def test_too_many_pixels_are_refused_before_decoding(self, tmp_path, monkeypatch):
        write_image(tmp_path / "big.png", np.random.default_rng(0))
        monkeypatch.setattr("datasets.images.MAX_PIXELS", 1000)
        with pytest.raises(DatasetError, match="40 x 48 pixels"):
            Decode((8, 8)).image(tmp_path / "big.png")

    def test_normalise(self):
        images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
        out = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(images)
        assert out.shape == (2, 3, 4, 5) and out.dtype == torch.float32
        assert out[1, 2, 3, 4].item() == pytest.approx((images[1, 3, 4, 2] / 255 - 0.406) / 0.225, abs=1e-5)


class TestLoading:
    @pytest.fixture
    def data(self, mvtec_like):
        samples = collect(MVTEC, mvtec_like, "part")
        return ImageSet([s for s in samples if s.split == "test"], Decode((48, 40)), NORMALISE, cache_gb=1)

    def test_batch(self, data):
        batch = data.__getitems__([0, 3])
        assert batch["image"].shape == (2, 3, 48, 40) and batch["label"].tolist() == [1, 0]
        assert batch["mask"].shape == (2, 1, 48, 40) and batch["index"].tolist() == [0, 3]
        assert (
            batch["mask"][0, 0, 10:20, 10:20].all()
            and batch["mask"][0].sum() == 100
            and not batch["mask"][1].any()
        )

    def test_cache_changes_nothing_and_is_bounded(self, data):
        fresh = data.__getitems__([2])["image"]
        data.fill_cache(quiet=True)
        assert torch.equal(data.__getitems__([2])["image"], fresh)
        small = ImageSet(data.samples, data.decode, NORMALISE, cache_gb=2.5 * 3 * 48 * 40 / 2**30)
        assert small.cached == 2 and len(small.fill_cache(quiet=True)._cache) == 2
        assert torch.equal(small.__getitems__([2])["image"], fresh)

    def test_a_sample_decodes_nothing_again(self, data, monkeypatch):
        whole = ImageSet(data.samples, data.decode, NORMALISE, cache_gb=1).fill_cache(quiet=True)
        monkeypatch.delattr(ImageSet, "_decoded")
        sample = statistics_sample(whole, 2)
        places = [whole.samples.index(s) for s in sample.samples]
        assert len(places) == 2 and all(
            np.array_equal(sample.pixels(at), whole.pixels(i)) for at, i in enumerate(places)
        )

    def test_no_masks_where_one_is_unknown(self, data):
        from dataclasses import replace

        part = ImageSet([replace(data.samples[0], mask_path=None), data.samples[3]], data.decode, NORMALISE)
        assert "mask" not in part.__getitems__([0, 1])

    def test_evaluation_order(self, data):
        seen = [i for b in batches(data, 4) for i in b["index"].tolist()]
        assert seen == list(range(9))

    def test_synthetic_validation(self, mvtec_like):
        train = [s for s in collect(MVTEC, mvtec_like, "part") if s.split == "train"][:4]
        held = ImageSet(train, Decode((64, 64)), NORMALISE)
        a, b = SyntheticValidation(held, seed=1), SyntheticValidation(held, seed=1)
        assert len(a) == 8 and [s.label for s in a.samples] == [0] * 4 + [1] * 4
        for i in range(4):
            changed = (a.pixels(i) != a.pixels(4 + i)).any(axis=2)
            assert np.array_equal(changed, a.mask(4 + i) == 1) and not a.mask(i).any()
            assert np.array_equal(a.pixels(4 + i), b.pixels(4 + i))

    @pytest.mark.parametrize(("pairs", "images"), [(0, 0), (2, 0), (0.5, 1), (2, 1), (4, 0), (9, 0)])
    def test_synthetic_defects_are_made_when_asked_for(self, mvtec_like, monkeypatch, pairs, images):
        """The same bits, whatever is kept; no more is kept than the budget of the cache."""
        train = [s for s in collect(MVTEC, mvtec_like, "part") if s.split == "train"][:4]
        made, make, pixels = [], synthetic.add_defect, 64 * 64
        whole = ImageSet(train, Decode((64, 64)), NORMALISE)
        expected = [
            synthetic._draw(whole.pixels(i), np.random.default_rng([1, i]), DEFECT_KINDS) for i in range(4)
        ]
        monkeypatch.setattr(synthetic, "add_defect", lambda *a, **k: (made.append(1), make(*a, **k))[1])
        budget = (7 * pairs + 3 * images) * pixels
        held = ImageSet(train, Decode((64, 64)), NORMALISE, cache_gb=budget / 2**30)
        data = SyntheticValidation(held, seed=1)
        assert not made and not held._cache
        for _ in range(2):
            batch = data.__getitems__(list(range(8)))
            for i, (image, mask) in enumerate(expected):
                assert np.array_equal(NORMALISE.pixels(batch["image"][4 + i : 5 + i])[0], image)
                assert np.array_equal(batch["mask"][4 + i, 0].numpy(), mask)
                assert not batch["mask"][i].any()
        kept = min(4, int(pairs))
        assert len(made) == 4 + (4 - kept) and batch["label"].tolist() == [0] * 4 + [1] * 4
        arrays = [*held._cache.values(), *(part for pair in data._defects.values() for part in pair)]
        assert sum(array.nbytes for array in arrays) <= budget
        assert len(data._defects) == kept and len(held._cache) >= kept

    def test_training_and_validation_share_the_cache(self, mvtec_like, make_config):
        for share, whole in ((0.5, False), (10.0, True)):
            config = make_config(
                run__data_root=str(mvtec_like),
                data__category="part",
                run__cache_gb=share * 10 * 3 * 64**2 / 2**30,
                data__validation_fraction=0.3,
                eval__split="validation",
            )
            data = build_data(config, NORMALISE)
            held = data.validation.held_out
            room = data.train.cached * 3 * 64**2 + held.cached * 3 * 64**2 + data.validation.kept * 4 * 64**2
            assert 0 < room <= share * 10 * 3 * 64**2
            assert (data.train.cached == len(data.train) and held.cached == len(held)) == whole


class TestTrainingOrder:
    def order(self, start=0, stop=10, samples=7, batch=3, seed=5):
        return list(TrainingOrder(samples, batch, seed=seed, start=start, stop=stop))

    def test_every_sample_once_an_epoch(self):
        flat = [i for b in self.order(stop=14) for i in b]
        for epoch in range(6):
            draws = flat[7 * epoch : 7 * epoch + 7]
            assert sorted(draws) == list(range(7 * epoch, 7 * epoch + 7))
        assert flat[:7] != [draw - 7 for draw in flat[7:14]]

    def test_goes_on_anywhere(self):
        whole = self.order(stop=30)
        for start in (1, 4, 7, 20):
            assert self.order(start=start, stop=30) == whole[start:]
        assert self.order(seed=6) != self.order()

    @pytest.mark.parametrize(("last", "sizes"), [("drop", [3, 3]), ("keep", [3, 3, 1])])
    def test_what_an_epoch_leaves(self, last, sizes):
        """Seven samples in batches of three: two, or three of which the last has one."""
        whole = list(TrainingOrder(7, 3, seed=5, start=0, stop=12, last_batch=last))
        assert [len(batch) for batch in whole] == sizes * (12 // len(sizes))
        assert batches_per_epoch(7, 3, last) == len(sizes)
        left = set()
        for epoch in range(12 // len(sizes)):
            draws = [d for batch in whole[len(sizes) * epoch :][: len(sizes)] for d in batch]
            assert {d // 7 for d in draws} == {epoch} and len(set(draws)) == sum(sizes)
            left |= {d % 7 for d in range(7 * epoch, 7 * epoch + 7)} - {d % 7 for d in draws}
        assert (len(left) > 1) == (last == "drop")  # not the same one each time
        for start in (1, 5, 8):
            assert list(TrainingOrder(7, 3, seed=5, start=start, stop=12, last_batch=last)) == whole[start:]
        twice = list(TrainingOrder(7, 3, seed=5, start=0, stop=8, repeat=2, last_batch=last))
        assert twice[::2] == twice[1::2] == whole[:4]

    def test_batches_of_an_epoch(self):
        assert batches_per_epoch(7, 3, "carry") == 7 / 3 and batches_per_epoch(9, 3, "keep") == 3
        with pytest.raises(DatasetError, match=r"2 training images make no batch of 3.*batch_size=2"):
            batches_per_epoch(2, 3, "drop")

    def test_loader_follows_it(self, mvtec_like):
        train = [s for s in collect(MVTEC, mvtec_like, "part") if s.split == "train"]
        data = ImageSet(train, Decode((32, 32)), NORMALISE)
        order = TrainingOrder(len(data), 5, seed=0, start=2, stop=6)
        for workers in (0, 1):
            seen = [b["index"].tolist() for b in training_batches(data, order, workers=workers, device=CPU)]
            assert seen == [[draw % len(data) for draw in draws] for draws in order]

    def test_processes_where_a_gpu_would_wait(self, mvtec_like, monkeypatch):
        train = [s for s in collect(MVTEC, mvtec_like, "part") if s.split == "train"]
        data = ImageSet(train, Decode((32, 32)), NORMALISE)
        order = TrainingOrder(len(data), 5, seed=0, start=0, stop=2)
        for cores, expected in ((1, 0), (2, 1), (4, 2), (64, 4)):
            monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
            for device, workers in ((CPU, 0), (CUDA, expected)):
                assert training_batches(data, order, workers=None, device=device).num_workers == workers

    @pytest.mark.parametrize("masks", [True, False])
    def test_batches_made_on_a_device_are_the_same(self, mvtec_like, masks):
        samples = [s for s in collect(MVTEC, mvtec_like, "part") if masks or s.split == "train"]
        data = ImageSet(samples, Decode((48, 40)), NORMALISE)
        data.has_masks = masks
        order = TrainingOrder(len(data), 4, seed=0, start=1, stop=5)
        device = torch.device("cuda") if torch.cuda.is_available() else CPU
        pairs = zip(order, training_batches(data, order, workers=0, device=CPU), strict=True)
        resident = DeviceSet(data, device)
        for draws, expected in pairs:
            found = resident.__getitems__(draws)
            assert found.keys() == expected.keys() and found["index"].device == CPU
            assert found["image"].is_contiguous(memory_format=torch.channels_last)
            for name, values in expected.items():
                assert found[name].dtype == values.dtype and torch.equal(found[name].cpu(), values), name

    def test_a_set_is_on_a_gpu_where_it_fits(self, mvtec_like, monkeypatch):
        train = [s for s in collect(MVTEC, mvtec_like, "part") if s.split == "train"]
        data = ImageSet(train, Decode((32, 32)), NORMALISE, cache_gb=1)
        order = TrainingOrder(len(data), 5, seed=0, start=0, stop=2)
        need = 8 * 3 * 32 * 32 * len(data)
        for free, fits in ((need, False), (need + 1, True)):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
            assert fits_on(data, CUDA) is fits and not fits_on(data, CPU)
        assert not fits_on(ImageSet(train, Decode((32, 32)), NORMALISE), CUDA)  # nothing is cached
        synthetic = SyntheticTraining(data, kinds=["cut"], share=0.5, seed=0)
        assert not fits_on(synthetic, CUDA)  # its defects are drawn on the CPU
        monkeypatch.setattr(loader, "DeviceSet", lambda data, device: (len(data), device))
        assert training_batches(data, order, workers=4, device=CUDA).dataset == (len(data), CUDA)


def test_mask_writer_matches_the_picture(tmp_path):
    """The fixtures themselves: the mask covers the spot."""
    write_image(tmp_path / "a.png", np.random.default_rng(0), spot=True)
    write_mask(tmp_path / "m.png")
    image, mask = np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "m.png"))
    assert (image[mask > 0] == 250).all()
