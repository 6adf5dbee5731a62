#!/usr/bin/env bash
# Train and test on ISIC2018 as scripts/prepare/isic2018.py writes it:  bash scripts/datasets/isic2018.sh DIR [flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
