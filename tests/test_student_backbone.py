"""A student that follows another backbone than the teachers (the library card's option)."""

import pytest
import torch
from conftest import levels

from model import build_model
from model.backbone import backbone_channels, build_backbone
from model.student import Student
from utils.errors import ConfigError


def test_channels_are_those_of_the_features():
    net, info = build_backbone("resnet18", (4, 8, 16), random_weights=True)
    assert backbone_channels("resnet18", (4, 8, 16)) == info.channels == (64, 128, 256)
    assert backbone_channels("resnet18", (8, 32)) == (128, 512)
    with pytest.raises(ValueError, match="gives no feature maps"):
        backbone_channels("nosuchnet", (4, 8))


def test_stages_have_the_other_backbones_channels_and_outputs_the_teachers():
    with torch.device("meta"):
        student = Student(levels(24, 40, 112), 224, own=(64, 128, 256))
        outputs = student(torch.empty(2, 224, 2, 2), [])
        same = Student(levels(24, 40, 112), 224, own=(24, 40, 112))
    assert [tuple(f.shape) for f in outputs] == [(2, 24, 16, 16), (2, 40, 8, 8), (2, 112, 4, 4)]
    assert [stage[-1].body[-1][0].out_channels for stage in student.stages] == [256, 128, 64]
    assert [tuple(head.weight.shape[:2]) for head in student.heads] == [(112, 256), (40, 128), (24, 64)]
    assert not any(hasattr(head, "weight") for head in same.heads)


@pytest.mark.parametrize("name", ["uninet", "recontrast"])
def test_trains_and_predicts(make_config, name):
    config = make_config(model__name=name, model__student_backbone="resnet18", model__width=0.5)
    model = build_model(config, pretrained=False)
    image = torch.randn(2, 3, 64, 64)
    total = model.train().loss({"image": image, "label": torch.zeros(2)}, 0.0)["total"]
    total.backward()
    assert torch.isfinite(total)
    assert all(p.grad is not None for p in model.student.parameters())
    assert model.eval().predict(image).anomaly_map.shape == (2, 64, 64)
    assert [stage[0].body[-1][0].out_channels for stage in model.student.stages] == [128, 64, 32]


def test_only_for_models_with_a_student(make_config):
    with pytest.raises(ConfigError, match=r"is for uninet, remind, recontrast, not for memory"):
        make_config(model__name="memory-bank", model__student_backbone="resnet18")
