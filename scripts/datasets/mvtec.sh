#!/usr/bin/env bash
# Train and test on MVTec AD:  bash scripts/datasets/mvtec.sh DIR [--category screw] [--setting multi-class] [further flags]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
