#!/usr/bin/env bash
# The table of the library card:  bash scripts/table_library.sh --data DIR [flags of scripts/tables.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" library "$@"
