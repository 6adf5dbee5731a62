#!/usr/bin/env bash
# Figure 4 of the paper:  bash scripts/figures/figure04.sh --data DIR [--dry-run and other flags]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
