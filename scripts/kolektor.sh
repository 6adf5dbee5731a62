#!/usr/bin/env bash
# Train and test on KolektorSDD:  bash scripts/kolektor.sh DIR [flags of train.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/dataset.sh" kolektor "$@"
