"""The models: nn.Modules that know no dataset, category or file name."""

from model.build import build_model, for_inference

__all__ = ["build_model", "for_inference"]
