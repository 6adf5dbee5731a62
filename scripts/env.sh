#!/usr/bin/env bash
# Sourced by the other scripts: goes to the repository and puts a Python with the requirements on the path.
# An active virtual environment is used as it is; else .venv is made once, and updated when requirements change.
# Relative paths of flags stay relative to where the user stands: they become absolute, in the script's own "$@".
set -euo pipefail
stands=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

absolute() { # PATH, --flag=PATH, or NAME=PATH of --data
    if [[ "$1" == -*=* || ("${flag-}" == --data && "$1" == *=*) ]]; then
        echo "${1%%=*}=$(absolute "${1#*=}")"
        return
    fi
    case "$1" in
        /* | "") echo "$1" ;;
        "~" | "~/"*) echo "$HOME${1#"~"}" ;; # the shell leaves it in --output=~/runs
        *) echo "$stands/$1" ;;
    esac
}

if [[ "$PWD" != "$stands" ]]; then
    words=() flag=""
    for word in "$@"; do
        [[ "$word" != -* ]] || flag=${word%%=*}
        case "$flag" in
            --output | --data | --data-root | --runs | --weights | --config | --csv | --spec)
                [[ "$word" == -* && "$word" != *=* ]] || word=$(absolute "$word") ;;
        esac
        words+=("$word")
    done
    set -- ${words[@]+"${words[@]}"}
fi

prepare() {
    local requirements=$1 stamp
    if [[ -z "${VIRTUAL_ENV:-}" ]]; then
        if [[ ! -x .venv/bin/python ]]; then
            require_python "${PYTHON:-python3}"
            "${PYTHON:-python3}" -m venv .venv
        fi
        # shellcheck disable=SC1091
        source .venv/bin/activate
        require_python python
        stamp=".venv/.$(cat requirements*.txt | cksum | cut -d' ' -f1)-"
        if [[ ! -f "$stamp$requirements" && ! -f "${stamp}requirements-dev.txt" ]]; then  # the latter holds the former
            install_requirements "$requirements"
            touch "$stamp$requirements"
        fi
    else
        require_python python
    fi
}

require_python() { # PROGRAM
    if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' > /dev/null 2>&1; then
        echo "error: Python 3.10 or newer is needed, and $1 is $("$1" --version 2>&1 || true)." \
            "Set PYTHON=/path/to/python3, or activate an environment that has it." >&2
        exit 1
    fi
}

install_requirements() {
    local requirements=$1 cpu_index=https://download.pytorch.org/whl/cpu index=() size="about 6 GB" unpack=${TMPDIR:-/tmp}
    # PyPI's PyTorch for Linux brings CUDA; without an NVIDIA driver a third of the size does.
    if [[ "$(uname -s)" == Linux ]] && ! command -v nvidia-smi >/dev/null && [[ ! -e /proc/driver/nvidia ]] \
        && python -c "import urllib.request as r; r.urlopen('$cpu_index/torch/', timeout=5)" 2>/dev/null; then
        index=(--extra-index-url "$cpu_index") size="about 2 GB"
    fi
    # pip unpacks gigabytes before it installs them, and /tmp is often small or in memory
    if (($(free_mib "$unpack") < $(free_mib .))); then
        unpack=$PWD/.venv/tmp
        mkdir -p "$unpack"
    fi
    echo "installing $requirements into .venv (PyTorch: some minutes, $size) ..." >&2
    if ! TMPDIR=$unpack python -m pip install --quiet --disable-pip-version-check ${index[@]+"${index[@]}"} -r "$requirements"; then
        echo "error: installing $requirements failed, pip's message is above; it takes $size in $PWD/.venv" \
            "($(free_mib .) MiB left), half as much for a while in $unpack ($(free_mib "$unpack") MiB left)." \
            "Run the script again, or activate an environment that has the requirements." >&2
        exit 1
    fi
    rm -rf .venv/tmp
}

free_mib() { df -Pm "$1" | awk 'NR == 2 { print $4 }'; }
