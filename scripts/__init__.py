"""One command per dataset, table and figure; modules run by python -m from the repository's folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
