#!/usr/bin/env bash
# Table 6 of the paper:  bash scripts/table06.sh --data DIR [--dry-run and other flags of scripts/tables.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" 06 "$@"
