#!/usr/bin/env bash
# Table 12 of the paper:  bash scripts/tables/table12.sh --data DIR [--dry-run and other flags]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
