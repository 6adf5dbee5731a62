#!/usr/bin/env bash
# Figure 1c of the paper:  bash scripts/figure01c.sh --data DIR [--dry-run and other flags of scripts/figures.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/figure.sh" 01c "$@"
