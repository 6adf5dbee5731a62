"""The models, which know no dataset, category or file name; `load_detector` gives a trained one to use."""

from model.build import build_model, for_inference
from model.detector import Detection, Detector, load_detector

__all__ = ["Detection", "Detector", "build_model", "for_inference", "load_detector"]
