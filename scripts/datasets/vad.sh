#!/usr/bin/env bash
# Train and test on VAD:  bash scripts/datasets/vad.sh DIR [flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
