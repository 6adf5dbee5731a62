"""The models: nn.Modules that know no dataset, category or file name."""

from model.build import build_model

__all__ = ["build_model"]
