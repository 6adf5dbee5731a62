#!/usr/bin/env bash
# The table of the library card:  bash scripts/tables/table_library.sh --data DIR [--dry-run and other flags]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
