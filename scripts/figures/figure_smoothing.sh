#!/usr/bin/env bash
# What smoothing image scores along the list does to AUROC:  bash scripts/figures/figure_smoothing.sh [--output DIR]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
