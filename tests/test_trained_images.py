"""Whether the images that a model was trained on are still those at its data root."""

import shutil
from dataclasses import replace

import pytest
from fixtures import COUNTS, LAYOUTS

import train as train_command
from datasets.build import categories_of, trained_parts
from datasets.registry import SPECS
from utils.layers import config_file, load_config

SUPERVISED = {"kolektor", "vad", "kvasir", "clinicdb", "colondb"}


def choices(name):
    """Settings under which a dataset's images split in different ways."""
    yield {}
    yield {"model.name": "remind"}
    if name in SUPERVISED:
        yield {"model.setting": "supervised", "data.num_train_anomalies": 2 * (name == "kolektor")}
    if name not in ("ped2", "kvasir", "clinicdb", "colondb"):
        yield {"model.setting": "multi-class", "data.category": "all"}
        yield {"data.train_limit": 3, "run.skip_unreadable": True}
        yield {"data.calibration_fraction": 0.3} | ({} if name == "kolektor" else {"eval.every": 1})


def contents(name, chosen, root):
    chosen = chosen | {"run.data_root": str(root), "train.iterations": 1, "train.batch_size": 1}
    if "data.category" not in chosen:
        chosen["data.category"] = categories_of(load_config(config_file(name), chosen))[0]
    config, _, identity = train_command.contents(load_config(config_file(name), chosen))
    return config, identity


@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_are_known_again(masters, tmp_path, caplog, monkeypatch, layout):
    """Of each dataset, also where the data has moved; a run that recorded others is told so."""
    name, root = layout.partition("-")[0], masters[layout]
    moved = shutil.copytree(root, tmp_path / "moved")
    for key in SPECS.keys() & COUNTS.keys():
        monkeypatch.setitem(SPECS, key, replace(SPECS[key], counts=COUNTS[key]))
    for chosen in choices(name):
        config, identity = contents(name, chosen, root)
        for place in (root, moved):
            there = replace(config, run=replace(config.run, data_root=str(place)))
            assert trained_parts(there, identity) is not None
        assert "overlap with" not in caplog.text, chosen
    assert trained_parts(there, None) is not None and "overlap with" not in caplog.text  # of older versions
    identity["data"]["trained"] = "0"
    assert trained_parts(there, identity) is not None
    assert f"no longer those at {moved}: overlap with them is not checked" in caplog.text
