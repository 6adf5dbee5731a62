#!/usr/bin/env bash
# What smoothing image scores along the list does to AUROC:  bash scripts/figure_smoothing.sh [--output DIR]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare requirements.txt
python scripts/figure_theory.py smoothing "$@"
