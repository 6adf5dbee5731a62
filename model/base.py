"""What every model answers, so that training, scoring and export need not know which one it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn

from model.backbone import BackboneInfo
from model.decision import Decision, Prediction
from utils.config import ModelConfig, OptimConfig

Batch = dict[str, Tensor]


class AnomalyModel(nn.Module):
    """A model of normal images: a subclass gives `predict`, and `loss` or (with `one_pass`) `fit`."""

    one_pass: bool = False  # True: learns by `fit` from one pass over the training normals, without gradients
    cuda_graphs: bool = False  # True: `predict` has no sync point, so a GPU can replay it as a graph
    info: BackboneInfo
    config: ModelConfig
    decision: Decision

    def predict(self, images: Tensor) -> Prediction:
        """Images (B, 3, H, W) to maps (B, H, W) and scores (B,); each result depends on its image alone."""
        raise NotImplementedError

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Loss terms of a batch, scalars; `total` has the gradient. `progress`: share of training done."""
        raise NotImplementedError(f"{type(self).__name__} learns by fit(), without a loss")

    def fit(self, images: Iterable[Tensor], *, seed: int) -> None:
        """Learn from batches (B, 3, H, W) of all training normals, each seen once."""
        raise NotImplementedError(f"{type(self).__name__} learns by gradient steps on its loss")

    def fit_statistics(self, images: Iterable[Tensor]) -> None:
        """Measure what is needed before the first step on batches of training normals; nothing here."""

    def parameter_groups(self, optim: OptimConfig) -> list[dict]:
        """Parameter groups of the optimiser; here all that learn, at one rate."""
        learning = [p for p in self.parameters() if p.requires_grad]
        return [{"name": "model", "params": learning, "lr": optim.lr}]

    def diagnostics(self) -> dict[str, float]:
        """Values of the last step for curves, beyond its losses (may be a sync point); none here."""
        return {}

    def deploy(self) -> AnomalyModel:
        """Copy for inference: same predictions, what can be folded or merged is."""
        return copy.deepcopy(self).eval()
