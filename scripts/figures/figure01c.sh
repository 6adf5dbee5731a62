#!/usr/bin/env bash
# Figure 1c of the paper:  bash scripts/figures/figure01c.sh --data DIR [--dry-run and other flags]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
