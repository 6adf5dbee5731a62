#!/usr/bin/env bash
# The table of the unias card:  bash scripts/tables/table_unias.sh --data DIR [--dry-run and other flags]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
