#!/usr/bin/env bash
# Table 9 of the paper:  bash scripts/table09.sh --data DIR [--dry-run and other flags of scripts/tables.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" 09 "$@"
