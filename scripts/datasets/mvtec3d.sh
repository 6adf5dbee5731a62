#!/usr/bin/env bash
# Train and test on MVTec 3D-AD:  bash scripts/datasets/mvtec3d.sh DIR [--category bagel] [further flags of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
