#!/usr/bin/env bash
# Table 1 of the paper:  bash scripts/table01.sh --data DIR [--dry-run and other flags of scripts/tables.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" 01 "$@"
