#!/usr/bin/env bash
# Figure 7 of the paper:  bash scripts/figure07.sh --data DIR [--dry-run and other flags of scripts/figures.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/figure.sh" 07 "$@"
