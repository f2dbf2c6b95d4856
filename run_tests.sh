#!/usr/bin/env bash
# Makes the environment and runs the tests; arguments go to pytest, as in: bash run_tests.sh -k reference
set -euo pipefail
cd "$(dirname "$0")"
bash make_venv.sh requirements-dev.txt
exec .venv/bin/python -m pytest tests "$@"
