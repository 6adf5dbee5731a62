#!/usr/bin/env bash
# Train and test on ISIC2018 as scripts/prepare_isic2018.py writes it:  bash scripts/isic2018.sh DIR [flags of train.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/dataset.sh" isic2018 "$@"
