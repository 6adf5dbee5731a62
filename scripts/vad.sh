#!/usr/bin/env bash
# Train and test on VAD:  bash scripts/vad.sh DIR [flags of train.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/dataset.sh" vad "$@"
