"""Your own images: train/good is enough; test/<type> and ground_truth/<type> as in MVTec AD are optional."""

from __future__ import annotations

from pathlib import Path

from datasets.industrial import list_categories
from datasets.layouts import Tree, list_tree
from datasets.samples import DatasetSpec, Sample


def list_folder_categories(root: Path) -> list[str]:
    """Categories below `root`, or the folder's own name if `root` itself holds train/good."""
    if (root / "train" / "good").is_dir():
        return [root.resolve().name]
    return list_categories(root)


def list_folder(root: Path, category: str) -> list[Sample]:
    """Samples of one category; images without masks are fine (pixel metrics need them all)."""
    base = root if (root / "train" / "good").is_dir() else root / category
    return list_tree(base, category, Tree(need_masks=False))


FOLDER = DatasetSpec(
    "folder",
    list_folder_categories,
    list_folder,
    counts={},
    has_masks=False,
    layout="train/good or <category>/train/good",
    needs_test=False,
)
