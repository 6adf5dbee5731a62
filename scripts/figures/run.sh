#!/usr/bin/env bash
# One figure; the scripts figureNN.sh and figure_NAME.sh source this one, and their names say which figure.
name=$(basename "$0" .sh)
name=${name#figure}
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
prepare requirements.txt
case "$name" in
    _*) python -m scripts.figures.theory "${name#_}" "$@" ;; # needs no run
    *) python -m scripts.figures.reproduce "$name" "$@" ;;
esac
