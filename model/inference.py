"""The one loop by which images are scored, and models made ready for it: deployed, on a GPU as CUDA graphs.

Legend: B images, H x W their working size (data.image_size).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.loader import ImageSet, batches
from model.base import AnomalyModel, Batch
from model.decision import Prediction
from utils.device import autocast
from utils.files import printable
from utils.graphs import Replayed, Tensors


def for_inference(model: AnomalyModel) -> AnomalyModel:
    """A copy that only predicts: batch norms folded, and on a GPU replayed as CUDA graphs.

    predict.py and calibration score with it, so that p-values compare like with like.
    """
    return replayed(model.deploy())


def replayed(model: AnomalyModel) -> AnomalyModel:
    """A model on a GPU that allows it as a `GraphedPredictor`; any other model as it is."""
    on_gpu = all(w.device.type == "cuda" for w in model.parameters())
    return GraphedPredictor(model) if on_gpu and model.cuda_graphs else model


class GraphedPredictor(AnomalyModel):
    """A model whose `predict` is replayed as CUDA graphs, each kind of input from its second occurrence on.

    The last batch of a folder is seen once only.
    """

    def __init__(self, model: AnomalyModel) -> None:
        super().__init__()
        self.model = model
        self._predict = Replayed(self._tensors, "the prediction", eager=1)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Prediction:
        """As the model's `predict`."""
        found = self._predict({"images": images})
        return Prediction(found["map"].clone(), found["score"].clone())  # the next replay overwrites them

    def _tensors(self, inputs: Tensors) -> Tensors:
        found = self.model.predict(inputs["images"])
        return {"map": found.anomaly_map, "score": found.score}


@dataclass(frozen=True)
class Predicted:
    """A batch and what a model makes of it: score (B,), maps (B, H, W) float32; the model's own seconds."""

    batch: Batch
    score: np.ndarray
    maps: np.ndarray
    seconds: float

    @property
    def indices(self) -> list[int]:
        """Places of the images in their set."""
        return self.batch["index"].tolist()

    @property
    def images(self) -> Tensor:
        """What is judged, normalised: (B, 3, H, W); of frames the last ones."""
        return self.batch["frames"][:, -1] if "frames" in self.batch else self.batch["image"]


@dataclass(frozen=True)
class ScoringOptions:
    """How images are scored; precision is fp32 or bf16."""

    batch_size: int
    device: torch.device
    precision: str
    quiet: bool = False


@torch.inference_mode()
def predictions(
    model: AnomalyModel, data: ImageSet, options: ScoringOptions, *, indices: Sequence[int] | None = None
) -> Iterator[Predicted]:
    """Predict every image of `data` (or those of `indices`) once, in order; nothing is kept. Raises
    FloatingPointError naming the first image whose score or map is not finite.
    """
    was_training = model.training
    model.eval()
    loader = batches(data, options.batch_size, indices=indices)
    for batch in tqdm(loader, desc="scoring", unit="batch", leave=False, disable=options.quiet or None):
        images = inputs_of(to_device(batch, options.device))
        start = time.perf_counter()
        with autocast(options.device, options.precision):
            prediction = model.predict(images)
        score = prediction.score.double().cpu().numpy()  # waits for the device
        seconds = time.perf_counter() - start
        maps = prediction.anomaly_map.float().cpu().numpy()
        for i in np.flatnonzero(~(np.isfinite(score) & np.isfinite(maps).all(axis=(1, 2)))):
            found = f"the score or map of {printable(data.samples[batch['index'][i]].path)} is not finite"
            raise FloatingPointError(f"{found}; use --precision fp32, or train with a lower optim.lr")
        yield Predicted(batch, score, maps, seconds)
    model.train(was_training)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch, images in channels-last order."""
    formats = {"image": torch.channels_last}
    return {
        k: v.to(device, non_blocking=True, memory_format=formats.get(k, torch.preserve_format))
        for k, v in batch.items()
    }


def inputs_of(batch: Batch) -> Tensor:
    """What `predict` takes: images (B, 3, H, W), or frames (B, F, 3, H, W) of video."""
    return batch["frames"] if "frames" in batch else batch["image"]
