"""The file of export.py as a model: on a CPU ONNX Runtime is faster than PyTorch (benchmarks/README.md)."""

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from datasets.transforms import Normalise
from model.base import AnomalyModel
from model.decision import Prediction
from utils.config import Config

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FILE = "model.onnx"  # beside its checkpoint
OUTPUTS = ("score", "anomaly_map")
_log = logging.getLogger("uninet")


class ExportedModel(AnomalyModel):
    """An opened file; it takes images of its working size, which it does not resize again."""

    def __init__(self, session: "InferenceSession", normalise: Normalise) -> None:
        super().__init__()
        self.session, self.normalise = session, normalise

    def predict(self, images: Tensor) -> Prediction:
        """As the model's `predict`, within what export.py allows (1e-4 of the range)."""
        found = self.session.run(OUTPUTS, {"image": self.normalise.pixels(images)})
        score, anomaly_map = map(torch.from_numpy, found)
        return Prediction(anomaly_map, score)


def exported_model(
    file: Path, model: AnomalyModel, config: Config, normalise: Normalise
) -> ExportedModel | None:
    """The file, if it is there, has these very weights and settings, and ONNX Runtime is installed.

    Not for frames of video and centre crops, which the file makes of whole images, or for another score.
    """
    makes_more = config.data.stack_frames or config.data.center_crop or config.model.head == "frame"
    if makes_more or model.decision.score_map != "raw" or not file.is_file():
        return None
    try:
        session = open_session(file)
    except ImportError:
        _log.info("onnxruntime is not installed, so PyTorch predicts in place of %s", file)
        return None
    except Exception as error:  # onnxruntime's own kinds, which share no other class
        _log.warning("%s cannot be opened, so PyTorch predicts: %s", file, str(error).partition("\n")[0])
        return None
    own, held = contents(model, config), session.get_modelmeta().custom_metadata_map
    if any(held.get(name) != own[name] for name in ("weights", "outputs")):
        _log.warning("%s is of other weights or settings, so PyTorch predicts; run export.py again", file)
        return None
    _log.info("ONNX Runtime predicts with %s", file)
    return ExportedModel(session, normalise)


def contents(model: nn.Module, config: Config) -> dict[str, str]:
    """Metadata of a file: which weights and settings it has, and those that its outputs depend on."""
    digest = hashlib.sha256()
    for name, values in model.state_dict().items():
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    tree = config.to_dict()
    outputs = tree["model"], tree["score"], [tree["data"][key] for key in ("image_size", "resize", "tile")]
    return {"weights": digest.hexdigest(), "outputs": json.dumps(outputs), "config": json.dumps(tree)}


def open_session(model: Path | bytes) -> "InferenceSession":
    """An onnxruntime session on the CPU, with as many threads as PyTorch has. Raises ImportError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # else it warns that `rate` is an input
    content = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
