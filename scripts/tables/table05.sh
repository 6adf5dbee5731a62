#!/usr/bin/env bash
# Table 5 of the paper:  bash scripts/tables/table05.sh --data DIR [--dry-run and other flags]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
