#!/usr/bin/env bash
# Figure 3 of the paper:  bash scripts/figure03.sh --data DIR [--dry-run and other flags of scripts/figures.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/figure.sh" 03 "$@"
