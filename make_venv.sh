#!/usr/bin/env bash
# Makes .venv and installs a requirements file, unless that is done already: bash make_venv.sh requirements.txt
# PYTHON names the interpreter; by default it is the first Python 3.11, 3.12 or 3.13 found.
set -euo pipefail
cd "$(dirname "$0")"
requirements=$1

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
if ! .venv/bin/python -c "import pip; $supported" 2>/dev/null; then  # an interrupted `venv` leaves no pip
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        "$candidate" -c "$supported" 2>/dev/null && found=$candidate && break
    done
    if [ -z "${found:-}" ]; then
        echo "error: no Python 3.11, 3.12 or 3.13 found: install one, or name it, as in PYTHON=/path/to/python3.12 bash $0" >&2
        exit 2
    fi
    rm -rf .venv
    "$found" -m venv .venv
fi

# A stamp file holds the text of the installed requirements, so that a later run starts at once.
wanted=$(cat requirements.txt "$requirements")
if [ "$wanted" != "$(cat ".venv/$requirements.done" 2>/dev/null)" ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    echo "$wanted" > ".venv/$requirements.done"
fi
