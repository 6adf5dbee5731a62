#!/usr/bin/env bash
# Called by scripts/tableNN.sh:  bash scripts/table.sh NN --data DIR [flags of scripts/tables.py]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare requirements.txt
python scripts/tables.py "$@"
