"""The models, which know no dataset, category or file name; `load_detector` gives a trained one to use."""

import utils  # noqa: F401  # isort: skip  # before PyTorch
from model.build import build_model
from model.detector import Detection, Detector, load_detector
from model.inference import for_inference

__all__ = ["Detection", "Detector", "build_model", "for_inference", "load_detector"]
