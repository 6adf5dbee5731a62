#!/usr/bin/env bash
# What the temperature leaves of L_SC and L_M:  bash scripts/figure_temperature.sh [--output DIR]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare requirements.txt
python scripts/figure_theory.py temperature "$@"
