#!/usr/bin/env bash
# Table 3 of the paper:  bash scripts/table03.sh --data DIR [--dry-run and other flags of scripts/tables.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" 03 "$@"
