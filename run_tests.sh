#!/usr/bin/env bash
# Makes .venv and runs the tests on all cores.
#   bash run_tests.sh                all tests
#   bash run_tests.sh --fast         under a minute: without the tests that start scripts
#   bash run_tests.sh -k reference   further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")"
bash make_venv.sh requirements-dev.txt
fast=()
if [ "${1:-}" = "--fast" ]; then
    shift
    fast=(-m "not slow")
fi
# One thread per process, as there is a process for each core and the models are small. The tests of a file share
# fixtures, so a file stays in one process.
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder ${fast[@]+"${fast[@]}"} "$@"
