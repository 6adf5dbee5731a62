#!/usr/bin/env bash
# The table of the unias card:  bash scripts/table_unias.sh --data DIR [flags of scripts/tables.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" unias "$@"
