#!/usr/bin/env bash
# Makes the environment and runs the tests on all cores.
#   bash run_tests.sh                everything
#   bash run_tests.sh --fast         what takes under a minute: no chain of scripts, no process of its own
#   bash run_tests.sh -k reference   further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")"
bash make_venv.sh requirements-dev.txt
fast=()
if [ "${1:-}" = "--fast" ]; then
    shift
    fast=(-m "not slow")
fi
# One thread a process: the tests' models are too small for more, and there is a process for each core. The tests of a
# file share what one of them makes, so a file stays in one process.
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder ${fast[@]+"${fast[@]}"} "$@"
