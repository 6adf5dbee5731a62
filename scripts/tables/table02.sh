#!/usr/bin/env bash
# Table 2 of the paper:  bash scripts/tables/table02.sh --data DIR [--dry-run and other flags]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
