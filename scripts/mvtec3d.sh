#!/usr/bin/env bash
# Train and test on MVTec 3D-AD:  bash scripts/mvtec3d.sh DIR [--category bagel] [further flags of train.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/dataset.sh" mvtec3d "$@"
