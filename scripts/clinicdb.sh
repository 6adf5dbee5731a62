#!/usr/bin/env bash
# Train and test on CVC-ClinicDB:  bash scripts/clinicdb.sh DIR [flags of train.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/dataset.sh" clinicdb "$@"
