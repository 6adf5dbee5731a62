#!/usr/bin/env bash
# From a fresh machine to results: environment, demo images, memory bank and UniNet trained and tested, heatmaps.
# Further arguments go to train.py, e.g.  bash scripts/demo.sh --iterations 30
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare requirements.txt

python -m datasets.demo --output data/demo
python train.py --config configs/demo.yaml --model memory-bank --resume "$@"
python train.py --config configs/demo.yaml --resume "$@"
