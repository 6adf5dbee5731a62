#!/usr/bin/env bash
# Table 12 of the paper:  bash scripts/table12.sh --data DIR [--dry-run and other flags of scripts/tables.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" 12 "$@"
