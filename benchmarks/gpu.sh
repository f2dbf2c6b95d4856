#!/usr/bin/env bash
# Tests and benchmarks that need a GPU, in at most nine minutes:
#   bash benchmarks/gpu.sh [--log FILE] [flags of benchmarks.gpu, such as --device cpu]
# Needs torch, numpy, pandas and tqdm; installs nothing. Exits with 1 if a check fails.
set -euo pipefail
log=/dev/null
if [ "${1:-}" = --log ]; then
    log=$(realpath "$(dirname "$2")")/$(basename "$2")
    shift 2
fi
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3

find='import importlib.util as u; print(*(n for n in ("torch", "numpy", "pandas", "tqdm") if not u.find_spec(n)))'
missing=$("$python" -c "$find")
[ -z "$missing" ] || { echo "error: $python has no $missing: install it, or run bash run_all.sh first" >&2; exit 2; }

code=0
PYTHONUNBUFFERED=1 timeout --kill-after=5 530 "$python" -m benchmarks.gpu "$@" 2>&1 | tee "$log" || code=$?
[ "$code" != 124 ] || echo "error: stopped after nine minutes; the results above are valid" | tee -a "$log" >&2
exit "$code"
