#!/usr/bin/env bash
# Train and test on MVTec AD:  bash scripts/mvtec.sh DIR [--category screw] [--setting multi-class] [further flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/dataset.sh" mvtec "$@"
