"""Models made ready for inference: deployed, and on a GPU replayed as CUDA graphs.

A graph is one launch in place of hundreds, for which a GPU would wait at batch 1.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from model.base import AnomalyModel
from model.decision import Prediction

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
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        kind = (tuple(images.shape), images.dtype, *autocast)
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
