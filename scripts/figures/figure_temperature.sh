#!/usr/bin/env bash
# What the temperature leaves of L_SC and L_M:  bash scripts/figures/figure_temperature.sh [--output DIR]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
