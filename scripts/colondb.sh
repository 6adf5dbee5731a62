#!/usr/bin/env bash
# Train and test on CVC-ColonDB:  bash scripts/colondb.sh DIR [flags of train.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/dataset.sh" colondb "$@"
