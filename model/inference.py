"""The one loop by which images are scored, and models made ready for it: deployed, on a GPU as CUDA graphs.

A graph is one launch in place of hundreds, for which a GPU would wait at batch 1.

Legend: B images, H x W their working size (data.image_size).
"""

import logging
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

log = logging.getLogger("uninet")
WARM_UP = 3  # calls before a capture, so that libraries have chosen their kernels and made their workspaces


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
    """A model whose `predict` is captured once for each kind of input (shape, type, autocast), then replayed.

    A new kind of input runs eagerly first, as the last batch of a folder is seen once only; from its second
    occurrence on it is captured and replayed. The model's weights must stay where they are.
    """

    def __init__(self, model: AnomalyModel) -> None:
        super().__init__()
        self.model = model
        self._seen: set[tuple] = set()
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, Prediction] | None] = {}

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Prediction:
        """As the model's `predict`."""
        cast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        kind = (tuple(images.shape), images.dtype, *cast)
        if kind in self._seen and kind not in self._graphs:
            try:
                self._graphs[kind] = self._capture(images)
            except RuntimeError as error:
                log.warning("predictions are not captured as a CUDA graph, which would be faster: %s", error)
                self._graphs[kind] = None
        self._seen.add(kind)
        captured = self._graphs.get(kind)
        if captured is None:
            return self.model.predict(images)
        graph, static_input, output = captured
        static_input.copy_(images)
        graph.replay()
        return Prediction(output.anomaly_map.clone(), output.score.clone())  # the next replay overwrites them

    def _capture(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Prediction]:
        static_input, side = images.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.model.predict(static_input)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.model.predict(static_input)
        return graph, static_input, output


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
