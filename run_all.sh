#!/usr/bin/env bash
# Installs, makes the demo data if Data/Session is empty, runs the scripts of all tasks, makes the report if matplotlib
# is there, and scores every task again.
#   bash run_all.sh          small settings: a minute or two on a laptop
#   bash run_all.sh --full   the settings at the top of the scripts
set -euo pipefail
cd "$(dirname "$0")"

case "${1:-}" in
    "") small=yes ;;
    --full) small= ;;
    *) echo "error: unknown argument $1: bash run_all.sh [--full]" >&2; exit 2 ;;
esac

bash make_venv.sh requirements.txt
python=.venv/bin/python
[ -n "$(ls Data/Session)" ] || "$python" -m Data.make_demo

trap 'stopped=yes' INT  # one Ctrl-C ends a script's training, and the script then saves
task=1
while [ -f conure_tp_t$task.py ]; do  # tasks added to the four too
    data=$(sed -n 's/^    data_path: str = "\(.*\)".*/\1/p' conure_tp_t$task.py)
    if [ ! -e "$data" ]; then
        echo
        echo "== $data is not there: the chain ends before task $task"
        break
    fi
    for stage in tp ret; do
        flags=()
        if [ "$small" ]; then
            case "$stage$task" in
                tp1) flags=(--epochs 12 --channels 64 --dilations 1,4,1,4) ;;
                ret1) flags=(--epochs 6) ;;
                tp2 | ret2 | tp3 | ret3) flags=(--epochs 5 --batch_size 256 --learning_rate 1.5e-3) ;;
                *) flags=(--epochs 8 --batch_size 128 --learning_rate 1e-3) ;;
            esac
        fi
        echo
        echo "== python conure_${stage}_t$task.py ${flags[*]:-}"
        "$python" "conure_${stage}_t$task.py" ${flags[@]+"${flags[@]}"}
        if [ "${stopped:-}" ]; then
            echo "stopped: task $task is saved, trained for less time; --overwrite redoes it, bash run_all.sh goes on" >&2
            exit 130
        fi
    done
    task=$((task + 1))
done

if "$python" -c "import matplotlib" 2> /dev/null; then
    "$python" -m tools.report > /dev/null || true  # it has said why
fi
echo
echo "== python evaluate.py"
"$python" evaluate.py
