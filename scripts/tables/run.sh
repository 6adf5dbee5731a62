#!/usr/bin/env bash
# One table of the paper; the scripts tableNN.sh source this one, and their names say which table.
name=$(basename "$0" .sh)
name=${name#table}
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
prepare requirements.txt
python -m scripts.tables.reproduce "${name#_}" "$@"
