"""Configuration: layers, types, ranges, and what a user gets wrong."""

from dataclasses import asdict

import pytest
import yaml
from conftest import ROOT

from utils.config import CONFIGS, Config, ConfigError, build, load_config, merge, parse_override, read_yaml
from utils.runs import config_hash

MVTEC = CONFIGS / "mvtec.yaml"


def load(category=None, **settings):
    return load_config(MVTEC, {k.replace("__", "."): v for k, v in settings.items()}, category=category)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_file_is_valid_and_survives_a_round_trip(path):
    config = load_config(path, {})
    again = build(Config, yaml.safe_load(yaml.safe_dump(config.to_dict())))
    assert asdict(again) == asdict(config)


def test_flavours_are_the_contracts_table():
    paper, released = load(), load(model__flavor="released")
    rows = {
        "score.score_sigma": (0, 4),
        "score.decision_values": ("probability", "distance"),
        "score.beta": (0.03, 3e-5),
        "model.mem_kernels": ((3, 7), (3, 3)),
        "model.mem_reparam": ("none", "construct"),
        "model.dfs_theta": ("learnable", "fixed"),
        "model.dfs_theta_map": ("identity", "clamp_sigmoid"),
        "loss.kd": ("global", "pointwise"),
        "loss.stop_grad_kd": (True, False),
        "loss.reduction": ("paper", "released"),
        "model.category_exceptions": (False, True),
    }
    for key, expected in rows.items():
        section, name = key.split(".")
        assert tuple(getattr(getattr(c, section), name) for c in (paper, released)) == expected, key
    for config in (paper, released):
        assert (config.loss.temperature, config.loss.tau, config.loss.kd_weight) == (2, 1, 0.7)
        assert (config.optim.lr, config.optim.lr_teacher, config.optim.weight_decay) == (5e-3, 1e-6, 1e-5)
        assert config.score.alpha == 0.01 and config.loss.pairs == "both" and config.score.map_sigma == 0


def test_category_exceptions():
    assert load(category="bottle", model__flavor="released").loss.temperature == 0.1
    assert load(category="screw", model__flavor="released").loss.temperature == 2
    assert load(category="bottle").loss.temperature == 2  # the paper has none
    assert (
        load(category="bottle", model__flavor="released", model__category_exceptions=False).loss.temperature
        == 2
    )
    transistor = load(category="transistor", model__flavor="released")
    assert transistor.model.dfs == "none" and transistor.optim.lr_teacher == 1e-4


def test_the_command_line_wins():
    assert load(category="bottle", model__flavor="released", loss__temperature=0.7).loss.temperature == 0.7
    assert load(model__setting="multi-class").optim.preset == "multi-class"
    assert load(model__setting="multi-class", optim__preset="one-class").optim.preset == "one-class"
    lite = load(model__backbone="tf_efficientnet_lite0")
    assert lite.model.feature_scale == "standardise" and load().model.feature_scale == "none"
    bank = load(model__name="memory-bank")
    assert bank.model.flavor == "default" and bank.score.decision == "max" and bank.score.map_sigma == 4


@pytest.mark.parametrize(("settings", "message"), [
    ({"loss__temprature": 1}, "unknown setting 'loss.temprature'; did you mean 'loss.temperature'"),
    ({"los__temperature": 1}, "unknown setting 'los'; did you mean 'loss'"),
    ({"train__iterations": 0}, "allowed are 1 to"),
    ({"train__iterations": 1.5}, "expected int"),
    ({"train__iterations": "many"}, "expected int"),
    ({"train__iterations": True}, "expected int"),
    ({"model__mem": 1}, "expected bool"),
    ({"model__mem_kernels": [3, 5, 7]}, "2 values are needed"),
    ({"loss__kd": "both"}, "choose one of global, pointwise"),
    ({"model__flavor": "papper"}, "unknown flavor 'papper'"),
    ({"optim__lr": float("nan")}, "allowed are"),
    ({"loss": 3}, "section.key=value"),
])  # fmt: skip
def test_mistakes(settings, message):
    with pytest.raises(ConfigError, match=message):
        load(**settings)


def test_numbers_as_people_write_them():
    assert load(optim__lr="5e-3").optim.lr == 5e-3
    assert load(data__image_size=128).data.image_size == (128, 128)
    assert parse_override("data.image_size=[640, 256]") == ("data.image_size", [640, 256])
    with pytest.raises(ConfigError, match="has no '='"):
        parse_override("train.iterations")


@pytest.mark.parametrize(("text", "message"), [
    ("a: [1, 2", "not readable YAML"),
    ("- 1\n- 2", "must hold sections"),
    ("a: !!python/object/apply:os.system ['true']", "not readable YAML"),
    ("a: &x [1]\nb: [*x, *x]", "aliases"),
    ("#" * (1 << 18) + "\na: 1", "too large"),
])  # fmt: skip
def test_files_that_are_no_config(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="come with the repository are: .*mvtec.yaml"):
        read_yaml(tmp_path / "none.yaml")


def test_merge_is_by_key():
    assert merge([{"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}, {"b": 1}]) == {"a": {"x": 1, "y": 3}, "b": 1}


def test_hash_covers_what_changes_the_result():
    base = config_hash(load())
    same = [{"data__root": "/x"}, {"train__device": "cuda"}, {"data__workers": 3}, {"train__log_every": 7}]
    assert all(config_hash(load(**s)) == base for s in same)
    other = [
        {"loss__temperature": 1},
        {"train__iterations": 7},
        {"eval__split": "validation"},
        {"data__resize": "bicubic"},
    ]
    assert len({config_hash(load(**s)) for s in other} | {base}) == 5


def test_every_key_of_base_has_a_meaning_beside_it():
    lines = [line for line in (ROOT / "configs/base.yaml").read_text().splitlines() if line.startswith("  ")]
    assert [line for line in lines if "#" not in line] == []
