"""Predictions replayed as CUDA graphs: one launch in place of hundreds, for which a GPU waits at batch 1."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from model.base import AnomalyModel
from model.decision import Prediction
from model.uninet import UniNet

log = logging.getLogger("uninet")
WARM_UP = 3  # calls before a recording, so that libraries have chosen their kernels and made their workspaces


class GraphedPredictor(AnomalyModel):
    """A deployed model whose `predict` is recorded once for each kind of input, and replayed after that.

    The kind is shape, type and autocast. What is seen once, as the last batch of a folder, is computed as it
    is; the second time it is recorded. The model's weights must stay where they are.
    """

    def __init__(self, model: AnomalyModel) -> None:
        super().__init__()
        self.model = model
        self._seen: set[tuple] = set()
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, Prediction] | None] = {}

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Prediction:
        """As the model's `predict`."""
        kind = (tuple(images.shape), images.dtype, torch.is_autocast_enabled("cuda"))
        kind += (torch.get_autocast_dtype("cuda"),)
        if kind not in self._graphs:
            if kind not in self._seen:
                self._seen.add(kind)
                return self.model.predict(images)
            try:
                self._graphs[kind] = self._recorded(images)
            except RuntimeError as error:
                log.warning("predictions are not recorded as a CUDA graph, which would be faster: %s", error)
                self._graphs[kind] = None
        if self._graphs[kind] is None:
            return self.model.predict(images)
        graph, own, found = self._graphs[kind]
        own.copy_(images)
        graph.replay()
        return Prediction(found.anomaly_map.clone(), found.score.clone())

    def _recorded(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Prediction]:
        own, side = images.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.model.predict(own)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self.model.predict(own)
        return graph, own, found


def graphed(model: AnomalyModel) -> AnomalyModel:
    """A deployed UniNet or ReContrast on a CUDA device as a `GraphedPredictor`; any other model as it is."""
    on_gpu = all(w.device.type == "cuda" for w in model.parameters())
    return GraphedPredictor(model) if on_gpu and isinstance(model, UniNet) else model
