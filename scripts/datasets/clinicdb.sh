#!/usr/bin/env bash
# Train and test on CVC-ClinicDB:  bash scripts/datasets/clinicdb.sh DIR [flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
