"""What every model answers, so that training, scoring and export need not know which one it is."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model.backbone import BackboneInfo
from model.bottleneck import Bottleneck
from model.decision import Decision, Prediction
from model.layers import fold_batch_norms
from utils.config import Config, LossConfig, ModelConfig, OptimConfig

Batch = dict[str, Tensor]


class AnomalyModel(nn.Module):
    """A model of normal images: a subclass gives `predict`, and `loss` or (with `one_pass`) `fit`."""

    one_pass: bool = False  # True: learns by `fit` from one pass over the training normals, without gradients
    fits: int = 0  # images at most that `fit` takes before the first step; 0: none
    cuda_graphs: bool = False  # True: `predict` has no sync point, so a GPU can replay it as a graph
    info: BackboneInfo
    config: ModelConfig
    loss_config: LossConfig
    decision: Decision
    deployed: bool = False
    bank: Tensor  # of models that have one

    def configure(self, info: BackboneInfo, config: Config) -> None:
        """Keep what a model knows of its backbone and its settings."""
        self.info, self.config, self.loss_config = info, config.model, config.loss
        self.decision = Decision(**vars(config.score))

    def predict(self, images: Tensor) -> Prediction:
        """Images (B, 3, H, W) to maps (B, H, W) and scores (B,); each result depends on its image alone."""
        raise NotImplementedError

    def loss(self, batch: Batch, progress: float | Tensor) -> dict[str, Tensor]:
        """Loss terms of a batch, scalars; `total` has the gradient. `progress`: share of training done.

        A sync point in it would keep the whole step from being replayed as a CUDA graph (`model.step`).
        """
        raise NotImplementedError(f"{type(self).__name__} learns by fit(), without a loss")

    def fit(self, images: Iterable[Tensor], *, seed: int) -> None:
        """Learn from batches (B, 3, H, W) of all training normals, each seen once."""
        raise NotImplementedError(f"{type(self).__name__} learns by gradient steps on its loss")

    def fit_statistics(self, images: Iterable[Tensor]) -> None:
        """Measure what is needed before the first step on batches of training normals; nothing here."""

    def fit_score(self, images: Iterable[Tensor]) -> None:
        """Measure what a score of several parts needs on batches of normals; nothing here."""

    def parameter_groups(self, optim: OptimConfig) -> list[dict]:
        """Parameter groups of the optimiser; here all that learn, at one rate."""
        learning = [p for p in self.parameters() if p.requires_grad]
        return [{"name": "model", "params": learning, "lr": optim.lr}]

    def diagnostics(self) -> dict[str, float]:
        """Values of the last step for curves, beyond its losses (may be a sync point); none here."""
        return {}

    def parts_to_fold(self) -> list[nn.Module]:
        """Parts whose batch norms `deploy` folds into their convolutions; none here."""
        return []

    def example(self) -> Tensor:
        """One input of `predict`, normal noise: what parts are folded on."""
        noise = torch.randn(1, 3, *self.info.image_size, generator=torch.Generator().manual_seed(0))
        return noise.to(next(self.parameters()), memory_format=torch.channels_last)

    def deploy(self) -> "AnomalyModel":
        """A copy for inference: parallel kernels merged, batch norms folded (Eq. 3).

        It predicts the same, which is checked part by part on `example`, and cannot be trained.
        """
        model = copy.deepcopy(self).eval().requires_grad_(False)
        parts = model.parts_to_fold()
        for part in parts:
            if isinstance(part, Bottleneck):
                part.deploy()
        for part, inputs in _inputs(model, parts).items():
            fold_batch_norms(part, *inputs)
        model.deployed = True
        return model

    def load_state_dict(self, state_dict: Mapping[str, Any], **how: bool) -> object:  # type: ignore[override]
        """As usual; a bank of patches, where the model has one, takes the stored size."""
        if "bank" in state_dict and hasattr(self, "bank"):
            self.bank = torch.empty_like(state_dict["bank"], device=self.bank.device)
        return super().load_state_dict(state_dict, **how)

    def train(self, mode: bool = True) -> "AnomalyModel":
        """As of any module, but frozen parts stay in eval. Raises RuntimeError for a deployed model."""
        if mode and self.deployed:
            raise RuntimeError("this model was folded by deploy(); load the checkpoint to train on")
        super().train(mode and _learns(self))
        for part in self.children():
            if not _learns(part):
                part.eval()
        return self


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


@torch.no_grad()
def _inputs(model: AnomalyModel, parts: list[nn.Module]) -> dict[nn.Module, tuple]:
    """What each part takes as the example is predicted; its first call counts."""
    inputs: dict[nn.Module, tuple] = {}

    def keep(part: nn.Module, args: tuple) -> None:
        inputs.setdefault(part, copy.deepcopy(args))

    hooks = [part.register_forward_pre_hook(keep) for part in parts]
    if parts:
        model.predict(model.example())
    for hook in hooks:
        hook.remove()
    return inputs
