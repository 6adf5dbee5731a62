#!/usr/bin/env bash
# Linter, types, and the test suite, from a fresh machine; with UNINET_SLOW_TESTS=1 its slow tests, too. Further arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare requirements-dev.txt

ruff check .
ruff format --check .
python -m mypy .
# worksteal: neighbours stay together, so what a file prepares is prepared once
python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --durations 20 "$@"
