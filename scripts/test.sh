#!/usr/bin/env bash
# The whole test suite, from a fresh machine. Further arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare requirements-dev.txt

ruff check .
ruff format --check .
python -m pytest --numprocesses auto --maxprocesses 8 "$@"
