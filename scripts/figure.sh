#!/usr/bin/env bash
# Called by scripts/figureNN.sh:  bash scripts/figure.sh NN --data DIR [flags of scripts/figures.py]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare requirements.txt
python scripts/figures.py "$@"
