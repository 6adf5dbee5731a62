#!/usr/bin/env bash
# Sourced by the other scripts: goes to the repository and puts a Python with the requirements on the path.
# An active virtual environment is used as it is; else .venv is made once, and updated when requirements change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

prepare() {
    local requirements=$1 stamp
    if [[ -z "${VIRTUAL_ENV:-}" ]]; then
        [[ -x .venv/bin/python ]] || "${PYTHON:-python3}" -m venv .venv
        # shellcheck disable=SC1091
        source .venv/bin/activate
        stamp=".venv/.$(cat requirements*.txt | cksum | cut -d' ' -f1)-"
        if [[ ! -f "$stamp$requirements" && ! -f "${stamp}requirements-dev.txt" ]]; then  # the latter holds the former
            echo "installing $requirements into .venv (PyTorch: some minutes, about 6 GB) ..." >&2
            python -m pip install --quiet --disable-pip-version-check -r "$requirements"
            touch "$stamp$requirements"
        fi
    fi
}
