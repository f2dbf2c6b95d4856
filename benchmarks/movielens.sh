#!/usr/bin/env bash
# The eight scripts on MovieLens task files with small settings, once per seed, then everything scored again.
#   bash benchmarks/movielens.sh DATA_DIR OUTPUT_DIR SEED…      (then benchmarks/movielens_table.py OUTPUT_DIR)
# FLAGS=--as_original before it gives every script that flag too.
# Prints all RESULT lines of the test part, and those of the whole held-out part, which the original scores.
set -euo pipefail
data=$(realpath "$1") output=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/.."
python=.venv/bin/python
files=(pretrain finetune_click_nouserID finetune_like_nouserID gender)

for seed in "$@"; do
    echo "seed $seed"
    folder=$output/seed_$seed
    for task in 1 2 3 4; do
        for stage in tp ret; do
            case "$stage$task" in
                tp1) flags=(--epochs 20 --channels 64 --dilations 1,4,1,4) ;;
                ret1) flags=(--epochs 20) ;;
                *) flags=(--epochs 4 --batch_size 128 --learning_rate 0.001) ;;
            esac
            "$python" "conure_${stage}_t$task.py" --data_path "$data/original_desen_${files[task - 1]}.csv" \
                --index_path "$folder/index.csv" --checkpoint_dir "$folder" --seed "$seed" "${flags[@]}" ${FLAGS:-} |
                grep -E "^RESULT .*split=test|^versions|^device"
        done
    done
    "$python" evaluate.py --checkpoint_dir "$folder" --split heldout
done
