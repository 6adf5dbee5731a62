#!/usr/bin/env bash
# Table 4 of the paper:  bash scripts/tables/table04.sh --data DIR [--dry-run and other flags]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
