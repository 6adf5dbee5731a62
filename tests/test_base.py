"""What every model of the registry answers."""

import pytest

from model import build_model
from model.base import AnomalyModel
from utils.layers import MODELS


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tile", [None, 64])
def test_each_model_says_how_it_learns(make_config, name, tile):
    """By `loss` or by `fit`; the other one says so, in place of an attribute that is missing."""
    settings = {"data__tile": tile, "data__image_size": [128, 128]} if tile else {}
    settings |= {"model__bank_fraction": 0} if name == "remind" else {}  # with a bank it learns by both
    model = build_model(make_config(model__name=name, **settings))
    assert isinstance(model, AnomalyModel)
    assert model.one_pass == (name == "memory-bank")
    with pytest.raises(NotImplementedError, match="learns by"):
        model.loss({}, 0.0) if model.one_pass else model.fit([], seed=0)
