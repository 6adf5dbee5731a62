"""Configuration: layers, types, ranges, and what a user gets wrong."""

import copy
import json
import math
import random
import re
import shlex
from dataclasses import asdict, fields
from functools import cache
from typing import ClassVar, get_type_hints

import pytest
import yaml
from conftest import ROOT
from fixtures import labelled_batch

import train
import utils.layers
from datasets.registry import SPECS
from model.build import build_model
from model.step import TrainingStep
from utils.cli import overrides
from utils.config import Config
from utils.errors import ConfigError
from utils.layers import load_config
from utils.optim import make_optimizer, rate_at
from utils.runs import config_hash
from utils.yaml_io import CONFIGS, build, merge, parse_override, read_yaml

MVTEC = CONFIGS / "mvtec.yaml"
COARSE = {"model__strides": [8, 16, 32]}


def read_text(text):
    return parse_override(f"a.b={text}")[1]


def load(category=None, **settings):
    return load_config(MVTEC, {k.replace("__", "."): v for k, v in settings.items()}, category=category)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_file_is_valid_and_survives_a_round_trip(path):
    config = load_config(path, {})
    again = build(Config, yaml.safe_load(yaml.safe_dump(config.to_dict())))
    assert asdict(again) == asdict(config)


def test_our_settings_of_polyps_are_those_that_were_measured():
    """configs/polyp_ours.yaml is the command of the rows of docs/RESULTS_MORE.md, in short."""
    run = ROOT / "results/measured/settings/clinicdb-supervised-random-uninet-paper-teacher.json"
    words = shlex.split(json.loads(run.read_text())["command"])[2:]
    parsed = train.parse_arguments(words)
    measured = load_config(ROOT / parsed.config, overrides(parsed), category="random")
    parsed = train.parse_arguments(["--config", "configs/polyp_ours.yaml", *words[:6], "--data-root", "DIR"])
    ours = load_config(
        ROOT / parsed.config, overrides(parsed) | {"data.category": "random"}, category="random"
    )
    assert ours.to_dict() == measured.to_dict()


def test_flavours_are_the_contracts_table():
    paper, released = load(), load(model__flavor="released")
    rows = {
        "score.score_sigma": (0, 4),
        "score.decision": ("weighted", "weighted-distance"),
        "score.beta": (0.03, 3e-5),
        "model.mem_kernels": ((3, 7), (3, 3)),
        "model.mem_reparam": ("none", "construct"),
        "model.dfs_theta": ("learnable", "fixed"),
        "loss.kd": ("global", "pointwise"),
        "loss.stop_grad": ("kd", "none"),
        "loss.reduction": ("paper", "released"),
    }
    for key, expected in rows.items():
        section, name = key.split(".")
        assert tuple(getattr(getattr(c, section), name) for c in (paper, released)) == expected, key
    for config in (paper, released):
        assert (config.loss.temperature, config.loss.kd_weight) == (2, 0.7)
        assert (config.optim.lr, config.optim.lr_teacher, config.optim.weight_decay) == (5e-3, 1e-6, 1e-5)
        assert config.score.alpha == 0.01 and config.score.map_sigma == 0


def test_rules_by_category():
    assert load(category="bottle", model__flavor="released").loss.temperature == 0.1
    assert load(category="screw", model__flavor="released").loss.temperature == 2
    assert load(category="bottle").loss.temperature == 2  # the paper has none
    transistor = load(category="transistor", model__flavor="released")
    assert transistor.model.dfs == "none" and transistor.optim.lr_teacher == 1e-4


def test_the_command_line_wins():
    assert load(category="bottle", model__flavor="released", loss__temperature=0.7).loss.temperature == 0.7
    assert load(model__setting="multi-class").optim.preset == "multi-class"
    assert load(model__setting="multi-class", optim__preset="one-class").optim.preset == "one-class"
    both = load(model__setting="multi-class", model__flavor="released")
    assert (both.loss.temperature, both.data.resize) == (0.1, "bilinear")
    one = load(model__flavor="released")
    assert (one.loss.temperature, one.data.resize) == (2, "lanczos")
    lite = load(model__backbone="tf_efficientnet_lite0")
    assert lite.model.feature_gain == 0.2 and load().model.feature_gain is None
    ours = {setting: load(model__name="remind", model__setting=setting) for setting in utils.layers.SETTINGS}
    assert [config.model.bank_fraction for config in ours.values()] == [0.5, 0, 0]  # where it was measured
    assert load_config(CONFIGS / "ped2.yaml", {"model.name": "remind"}).model.bank_fraction == 0
    bank = load(model__name="memory-bank")
    assert bank.model.flavor == "default" and bank.score.decision == "max" and bank.score.map_sigma == 4


@pytest.mark.parametrize(("settings", "message"), [
    ({"loss__temprature": 1}, "unknown setting 'loss.temprature'; did you mean 'loss.temperature'"),
    ({"los__temperature": 1}, "unknown setting 'los'; did you mean 'loss'"),
    ({"train__iterations": 0}, "allowed are 1 to"),
    ({"train__iterations": 1.5}, "expected int"),
    ({"train__iterations": "many"}, "expected int"),
    ({"train__iterations": True}, "expected int"),
    ({"model__skip_connections": 1}, "expected bool"),
    ({"model__mem_kernels": [3, 5, 7]}, "2 values are needed"),
    ({"loss__kd": "both"}, "choose one of global, pointwise"),
    ({"model__flavor": "papper"}, "unknown flavor 'papper'"),
    ({"model__flavor": "paper", "model__name": "remind"}, "--flavor is of uninet and the model is 'remind'"),
    ({"optim__lr": float("nan")}, "allowed are"),
    ({"optim__lr": float("inf")}, "allowed are"),
    ({"train__iterations": float("inf")}, "expected int"),
    ({"train__iterations": float("nan")}, "expected int"),
    ({"train__iterations": 10**400}, "expected int"),
    ({"train__iterations": "1_000"}, "expected int"),
    ({"train__seed": "010"}, "expected int"),
    ({"train__seed": "0x10"}, "expected int"),
    ({"model__skip_connections": "yes"}, "expected bool: true or false"),
    ({"data__category": 1.5}, "expected text, in quotes"),
    ({"data__resize": ["a" * 1000]}, r"is \['a{75}\.\.\.; choose"),
    ({"model__name": ["uninet"]}, "unknown name"),
    ({"model__setting": {"a": 1}}, "unknown setting"),
    ({"model__backbone": "a" * 5000, "model__strides": []}, "model.strides is"),
    ({"model__strides": [4, 16]}, "twice the one before"),
    ({"model__strides": [16, 8]}, "twice the one before"),
    ({"model__name": "remind", "model__strides": [16]}, "needs 2 at least, .* or model.bank_fraction=0"),
    ({"model__name": "memory-bank", "model__strides": [16]}, "needs 2 at least"),
    ({"model__mem_kernels": [2, 4]}, "odd sides"),
    (COARSE | {"data__image_size": 128, "train__scales": [0.75, 1]}, r"multiples of 64.*0.75 gives \[96, 96"),
    (COARSE | {"data__tile": 64, "train__scales": [0.5]}, r"tile 64 must be multiples of 64.*0.5 gives"),
    ({"loss": 3}, "section.key=value"),
    # what would be left out in silence
    ({"model__name": "remind", "model__head": "mask"}, "model.head of --model remind is none; .* be mask"),
    ({"model__name": "remind", "data__frame_offset": 3}, "data.frame_offset of --model remind is 0"),
    ({"model__name": "recontrast", "loss__supervised": "bce"}, "loss.supervised of --model recontrast is"),
    ({"model__name": "memory-bank", "data__synthetic": 0.5}, "data.synthetic of --model memory-bank is 0"),
])  # fmt: skip
def test_mistakes(settings, message):
    with pytest.raises(ConfigError, match=message):
        load(**settings)


class TestUnreadSettings:
    """`config.unread` knows which settings nothing reads; here is what each model reads."""

    SECTIONS = ("model", "loss", "optim")
    TAGGED: ClassVar[dict] = {
        f"{section}.{spec.name}": spec.metadata["values"]
        for section in SECTIONS
        for spec in fields(get_type_hints(Config)[section])
        if spec.metadata.get("key") == "model.name"
    }

    @pytest.mark.parametrize("name", utils.layers.MODELS)
    def test_are_those_that_it_reads(self, make_config, monkeypatch, name):
        config, read = make_config(model__name=name, data__image_size=64), set()
        for section in self.SECTIONS:
            part = type(getattr(config, section))

            def reading(self, key, section=section):
                read.add(f"{section}.{key}")
                return object.__getattribute__(self, key)

            monkeypatch.setattr(part, "__getattribute__", reading)
        model, batch = build_model(config), labelled_batch()
        if model.one_pass or model.fits:
            model.fit([batch["image"]], seed=0)
        model.fit_statistics([batch["image"]])
        if not model.one_pass:
            optimizer, _ = make_optimizer(model.parameter_groups(config.optim), config)
            TrainingStep(model, optimizer, config)(batch)
            rate_at(config.train.iterations - 1, config)
        model.eval().predict(batch["image"])
        assert read & {*self.TAGGED} == {key for key, models in self.TAGGED.items() if name in models}

    @pytest.fixture(autouse=True)
    def _anew(self):
        utils.layers._warn.cache_clear()

    @pytest.mark.parametrize(("settings", "message"), [
        ({"loss__hard_ratio": 0.5}, "hard_ratio changes nothing with model.name uninet; it is for remind"),
        ({"model__name": "unias", "loss__terms": []}, "loss.terms .* unias; it is for uninet or remind"),
        ({"model__name": "memory-bank", "optim__lr": 0.1}, "optim.lr changes nothing with .* memory-bank"),
        ({"score__decision": "max", "score__alpha": 0.5}, "score.alpha .* score.decision max; .* weighted"),
        ({"data__augment_by_category": {"b": "hflip"}}, "by_category .* data.augment none; it is for by-cat"),
        ({"score__head_weight": 1}, "score.head_weight .* model.head none; it is for label or frame"),
        ({"model__head": "mask", "loss__supervised": "bce", "score__map_sigma": 1}, "map_sigma .*.head mask"),
    ])  # fmt: skip
    def test_are_told_once(self, caplog, settings, message):
        load(**settings)
        load("bottle", **settings)
        assert re.search(message, caplog.text) and len(caplog.records) == 1

    def test_not_where_the_value_is_the_same_or_of_a_file(self, caplog, tmp_path):
        load(model__name="memory-bank", model__width=1.0, optim__lr=5e-3)
        path = tmp_path / "parts.yaml"  # for several models
        path.write_text("data: {name: folder}\nmodel: {name: remind}\nloss: {temperature: 3}")
        assert load_config(path, {"loss.hard_ratio": 0.2}).loss.temperature == 3 and not caplog.records

    def test_also_of_a_complete_file(self, caplog, tmp_path):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(load(model__name="remind").to_dict()))
        load_config(path, {"loss.hard_ratio": 0.2, "loss.kd_weight": 0.7})
        assert not caplog.records
        load_config(path, {"loss.kd_weight": 0.5})
        assert "loss.kd_weight changes nothing with model.name remind" in caplog.text


# --- what a file may hold: it becomes a Config or a ConfigError, nothing else -------------------------------

SCALARS = """.inf -.inf .nan 1e400 1:30 1:30:00 010 0o17 0x1F 0b11 1_000 +1 -1 0 1.5 .5 5e-3 1e9 on off yes no
TRUE ~ null 2024-01-01 2024-13-45 = << ! !!int !!float !!str [a] [] [[1]] {} {a} {a:{b:1}} &a *a | > ? : -
uninet paper supervised all '' 'x' "\\0" "\\ud800" @x `x %x \u00e9 ../x /dev/null {1:2,1:3} 256 [8,16]"""
LONG = ("9" * 5000, "a" * 5000, "[" * 50, "- " * 99)
BLOCKS = ("settings: ", "categories: ", "flavors: ", "flavors: {paper: ", "settings: {one-class: ", "new: ")


def wild_texts(number):
    """Config files that nobody meant: one key, one section, or a few characters of base.yaml changed."""
    rng, keys, section = random.Random(0), [], ""
    lines = [line.partition("#")[0].rstrip() for line in (CONFIGS / "base.yaml").read_text().splitlines()]
    lines = [line for line in lines if line]
    for line in lines:
        section = section if line.startswith(" ") else line
        keys += [f"{section}\n{line.partition(':')[0]}: "] if line.startswith(" ") else []
    for i in range(number):
        value = rng.choice(LONG) if i % 20 == 0 else rng.choice(SCALARS.split())
        if i % 3 == 0:
            yield rng.choice(keys) + value
        elif i % 3 == 1:
            block = rng.choice([*BLOCKS, *(key.partition("\n")[0] + " " for key in keys)])
            yield f"{block}{value}{'}' * block.count('{')}\n{rng.choice(['', 'model: {name: unias}'])}"
        else:
            text = list(rng.choice(keys) + "1\n" + rng.choice(keys) + "[0.5, 'a']")
            for _ in range(rng.randint(1, 3)):
                text[rng.randrange(len(text))] = rng.choice("\n\t:{}[]&*!|>'\"%@#-?,\0\x85\ufeffa0 ")
            yield "".join(text)


def test_any_file_gives_a_config_or_a_config_error(tmp_path, monkeypatch):
    known = cache(read_yaml)  # the repository's own files are read once

    def read(path):
        return copy.deepcopy(known(path)) if CONFIGS in path.parents else read_yaml(path)

    monkeypatch.setattr(utils.layers, "read_yaml", read)
    refused = good = 0
    for text in wild_texts(500):
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            config = load_config(tmp_path / "c.yaml", {}, category="01")
        except ConfigError as error:
            refused += 1
            assert len(str(error)) < 1000, text
        else:
            good += 1
            numbers = [n for part in asdict(config).values() for n in part.values() if isinstance(n, float)]
            assert all(map(math.isfinite, numbers)), text
    assert refused > 300 and good > 10


@pytest.mark.parametrize(("text", "message"), [
    ("settings: [a]", "'settings' is a section"),
    ("settings: {one-class: 3}", "'settings.one-class' is a section"),
    ("categories: {bottle: [1]}", "'categories.bottle' is a section"),
    ("flavors: x", "'flavors' is a section"),
    ("flavors: {paper: {settings: x}}", "'settings' is a section"),
    ("model: uninet", "'model' is a section"),
    ("data: 3", "'data' is a section"),
    ("train: {iterations: 1:30}", "train.iterations is '1:30'; expected int"),
    ("train: {iterations: 5}\ntrain: {seed: 1}", "'train' in line 2 is there a second time"),
    ("train: {seed: 1, seed: 2}", "'seed' in line 1 is there a second time"),
    ("model: {name: !!str unias}", "tags .* are not allowed"),
    ("train: " + "[" * 1000, "not readable YAML"),
    ("? [a]\n: 1", "a key in line 1 is no plain text"),
])  # fmt: skip
def test_wrong_shapes_in_a_file(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml", {})


def test_values_are_read_as_they_are_written():
    texts = ("01", "1:30", "no", "on", "2024-01-01", "0x10", "1_000", "5e-3", "=")
    for text in texts:
        assert parse_override(f"data.category={text}") == ("data.category", text)
        assert load(data__category=text).data.category == text
        dumped = yaml.safe_dump({"a": text, "b": [1e-6, -3, True, None, "010", "1e3"]})
        assert read_text(dumped) == {"a": text, "b": [1e-6, -3, True, None, "010", "1e3"]}
    assert parse_override("a.b=[1, -2.5, .5, 1.0e-3, true, null]")[1] == [1, -2.5, 0.5, 1e-3, True, None]
    assert load(train__iterations="2e3").train.iterations == 2000


def test_every_number_has_bounds():
    for section in fields(Config):
        for spec in fields(get_type_hints(Config)[section.name]):
            text = str(spec.type)
            assert bool(spec.metadata) == ("int" in text or "float" in text) or "Literal" in text, spec.name


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
    assert merge([{"a": {"x": 1}}, {"a": {}}, {"a": None}]) == {"a": {"x": 1}}  # sections without keys


@pytest.mark.parametrize("value", [{}, {"pill": ["hflip"]}])
def test_a_setting_that_is_a_mapping_is_replaced(make_config, value):
    assert "screw" in make_config(model__name="unias").data.augment_by_category
    config = make_config(model__name="unias", data__augment_by_category=value)
    assert config.data.augment_by_category == {name: tuple(kinds) for name, kinds in value.items()}


def test_hash_covers_what_changes_the_result():
    base = config_hash(load())
    same = [{"run__data_root": "/x"}, {"run__device": "cuda"}, {"run__workers": 3}, {"run__save_every": 7}]
    assert all(config_hash(load(**s)) == base for s in same)
    other = [
        {"loss__temperature": 1},
        {"train__iterations": 7},
        {"eval__split": "validation"},
        {"data__resize": "bicubic"},
    ]
    assert len({config_hash(load(**s)) for s in other} | {base}) == 5


def test_settings_are_few_and_flags_are_none():
    tree = load().to_dict()
    assert sum(map(len, tree.values())) <= 74 and "run" not in tree


def test_how_a_run_is_computed_stands_in_no_file(tmp_path):
    assert load(run__workers=3).run.workers == 3
    with pytest.raises(ConfigError, match="allowed are 1 to"):
        load(run__eval_batch_size=0)
    (tmp_path / "c.yaml").write_text("run: {workers: 3}")
    with pytest.raises(ConfigError, match="is no section of a config; flags"):
        load_config(tmp_path / "c.yaml", {})


def test_every_key_of_base_has_a_meaning_beside_it():
    lines = [line for line in (ROOT / "configs/base.yaml").read_text().splitlines() if line.startswith("  ")]
    assert [line for line in lines if "#" not in line] == []


class TestDatasets:
    def load(self, name, category=None, **settings):
        chosen = {k.replace("__", "."): v for k, v in settings.items()}
        return load_config(CONFIGS / f"{name}.yaml", chosen, category=category)

    @pytest.mark.parametrize("flavor", ["paper", "released"])
    def test_crops_belong_to_both_flavours(self, flavor):
        names = read_yaml(CONFIGS / "mvtec3d.yaml")["categories"]
        assert list(names) == list(SPECS["mvtec3d"].counts)
        crops = {c: self.load("mvtec3d", c, model__flavor=flavor).data.center_crop for c in names}
        assert crops["potato"] == 384 and crops["rope"] == 900 and crops["tire"] == 512
        foam = self.load("mvtec3d", "foam", model__flavor=flavor)
        assert foam.loss.temperature == (2 if flavor == "paper" else 0.1) and foam.data.center_crop == 700
        wins = self.load("mvtec3d", "foam", model__flavor=flavor, data__center_crop=100)
        assert wins.data.center_crop == 100

    def test_one_model_for_all_has_no_category(self):
        assert self.load("mvtec3d", "all", model__setting="multi-class").data.center_crop is None
        assert self.load("mvtec3d").data.center_crop is None

    def test_order_of_the_blocks(self, tmp_path):
        (tmp_path / "c.yaml").write_text(
            "data: {name: mvtec}\n"
            "loss: {terms: [], temperature: 0.1, kd_weight: 0.1}\n"
            "settings: {one-class: {loss: {terms: [margin], temperature: 0.2}}}\n"
            "categories: {x: {loss: {terms: [], temperature: 0.3, kd_weight: 0.3}}}\n"
            "flavors: {released: {loss: {temperature: 0.4}, categories: {x: {loss: {kd_weight: 0.5}}}}}\n"
        )

        def values(category, flavor):
            loss = load_config(tmp_path / "c.yaml", {"model.flavor": flavor}, category=category).loss
            return loss.terms, loss.temperature, loss.kd_weight

        assert values(None, "paper") == (("margin",), 0.2, 0.1)
        assert values("x", "paper") == ((), 0.3, 0.3)
        assert values("x", "released") == ((), 0.4, 0.5)
        assert values("y", "released") == (("margin",), 0.4, 0.1)

    def test_released_exceptions(self):
        for name in ("aptos", "oct2017", "isic2018", "vad"):
            paper, released = self.load(name), self.load(name, model__flavor="released")
            assert (paper.loss.stop_grad, released.loss.stop_grad) == ("kd", "all")
            assert released.loss.temperature == (0.1 if name == "vad" else 2) and paper.loss.temperature == 2
            assert (
                paper.train.iterations == (2000 if name == "isic2018" else 1000)
                and paper.train.epochs is None
            )
        assert self.load("isic2018", model__flavor="released").data.image_size == (224, 224)
        assert self.load("btad", model__flavor="released").data.resize == "lanczos"
        assert self.load("mvtec3d", model__flavor="released").data.resize == "bicubic"
        assert self.load("kolektor").data.image_size == (640, 256)


class TestCompleteFiles:
    """A run's config.yaml stands alone."""

    @pytest.fixture
    def write(self, tmp_path):
        def write(category=None, without=(), **settings):
            tree = load(category, **settings).to_dict()
            for section, key in without:
                del tree[section][key]
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
            return tmp_path / "config.yaml"

        return write

    def test_gives_the_same_settings_again(self, write):
        for settings in (
            {"model__flavor": "released"},
            {"model__name": "memory-bank"},
            {"loss__kd_weight": 0.5},
        ):
            settings |= {"data__category": "bottle"}
            path, config = write("bottle", **settings), load("bottle", **settings)
            assert load_config(path, {"data.category": "bottle"}, category="bottle") == config
            assert load_config(path, {"train.iterations": 7}).train.iterations == 7

    @pytest.mark.parametrize(("key", "value"), [
        ("model.flavor", "released"), ("model.name", "memory-bank"), ("model.setting", "multi-class"),
        ("model.backbone", "resnet18"), ("data.name", "btad"), ("data.category", "screw"),
    ])  # fmt: skip
    def test_refuses_what_would_choose_another_layer(self, write, key, value):
        path = write(data__category="bottle")
        own = load(data__category="bottle").to_dict()
        section, _, name = key.partition(".")
        assert load_config(path, {key: own[section][name]}) == load(data__category="bottle")
        with pytest.raises(ConfigError, match=f"every setting of a run, with {key} .* Leave that out"):
            load_config(path, {key: value})

    def test_settings_younger_than_the_file(self, write):
        path = write(without=[("data", "tile"), ("loss", "hard_ratio")], model__flavor="released")
        assert load_config(path, {}) == load(model__flavor="released")
        with pytest.raises(ConfigError, match="every setting of a run"):
            load_config(path, {"model.flavor": "paper"})

    def test_files_of_the_repository_are_not_complete(self):
        for path in CONFIGS.glob("*.yaml"):
            if path.stem != "base":
                config = load_config(path, {"model.flavor": "released"})
                assert (config.model.name, config.loss.reduction) == ("uninet", "released")
