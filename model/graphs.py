"""Predictions replayed as CUDA graphs: one launch in place of hundreds, for which a GPU waits at batch 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.decision import Prediction
from model.tiled import Tiled

WARM_UP = 3  # calls before a recording, so that libraries have chosen their kernels and made their workspaces


class GraphedPredictor(nn.Module):
    """A deployed model whose `predict` is recorded once for each kind of input, and replayed after that.

    The kind is shape, type and autocast. What is seen once, as the last batch of a folder, is computed as it
    is; the second time it is recorded. The model's weights must stay where they are.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._seen: set[tuple] = set()
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, Prediction]] = {}

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Prediction:
        """As the model's `predict`."""
        kind = (tuple(images.shape), images.dtype, torch.is_autocast_enabled("cuda"))
        kind += (torch.get_autocast_dtype("cuda"),)
        if kind not in self._graphs:
            if kind not in self._seen:
                self._seen.add(kind)
                return self.model.predict(images)
            self._graphs[kind] = self._recorded(images)
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


def graphed(model: nn.Module) -> nn.Module:
    """A deployed model as a `GraphedPredictor` where it is on a CUDA device; any other model as it is.

    On tiles the model below is recorded, as each of its batches has one shape.
    """
    weights = list(model.parameters())
    if not all(w.device.type == "cuda" and not w.requires_grad for w in weights):
        return model
    if isinstance(model, Tiled):
        return Tiled(
            GraphedPredictor(model.model), tile=model.tile, overlap=model.overlap, batch_size=model.batch_size
        )
    return GraphedPredictor(model)
