#!/usr/bin/env bash
# How step time and checkpoint size grow with items, length, channels and tasks: bash benchmarks/growth.sh
# Prints a BENCH line for each; all other settings are the original's.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { .venv/bin/python -m benchmarks.train_step "$@"; }

for items in 3308 33080 330800; do step --items "$items"; done
for length in 25 50 100 200; do step --length "$length"; done
for channels in 64 128 256 512; do step --channels "$channels"; done
for task in 2 3 5 9; do step --task "$task"; done
