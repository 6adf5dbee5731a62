#!/usr/bin/env bash
# Table 2 of the paper:  bash scripts/table02.sh --data DIR [--dry-run and other flags of scripts/tables.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" 02 "$@"
