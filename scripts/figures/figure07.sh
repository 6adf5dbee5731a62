#!/usr/bin/env bash
# Figure 7 of the paper:  bash scripts/figures/figure07.sh --data DIR [--dry-run and other flags]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
