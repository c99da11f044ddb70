#!/bin/sh
# Rung 8: the trainer itself with the char preset, with and without dropout, on many poems and on few.
#
#     dev/ladder/rung8.sh POEMS.csv [OUT] [STEPS] [BATCH]     defaults: out/rung8 1500 16
#
# RUNS chooses among the four runs. Each OUT/RUN has log.csv, model.bin, poems.txt and the loss over the whole
# validation file:
#   all/dropout all/none    every poem. 1500 steps of 16 x 256 tokens do not read a corpus of 9 M characters
#                           even once, and what is never seen twice cannot be learnt by heart
#   one/dropout one/none    the poems of POET alone (default كشاجم, 0.13 M characters): the same steps read
#                           them 54 times
# TRAIN_FLAGS adds flags for ./train_gpt2, e.g. TRAIN_FLAGS='--dtype bf16'. When the script is started again,
# it resumes a run that was stopped and skips a run that is done.
set -e
poems=${1:?"usage: dev/ladder/rung8.sh POEMS.csv [OUT] [STEPS] [BATCH]"}
out=${2:-out/rung8} steps=${3:-1500} batch=${4:-16}
make -s train_gpt2 sample_gpt2 prepare_data score_poems
mkdir -p "$out"

for run in ${RUNS:-one/none one/dropout all/dropout all/none}; do
    dir=$out/$run data=$out/${run%/*}/data dropout=0
    [ "${run#*/}" = none ] || dropout=0.2
    case $run in all/*) set -- ;; *) set -- --where "poet_name=${POET:-كشاجم}" ;; esac
    [ -s "$data/train.bin" ] || ./prepare_data "$poems" "$@" -o "$data"
    [ ! -s "$dir/poems.txt" ] || { echo "$dir is done"; continue; }
    if ls "$dir"/state_*.bin >/dev/null 2>&1; then
        ./train_gpt2 -o "$dir" --resume
    else
        ./train_gpt2 --data "$data" --preset char --batch_size "$batch" --max_steps "$steps" \
            --dropout $dropout --log_every 50 -o "$dir" --overwrite $TRAIN_FLAGS
    fi
    ./train_gpt2 -e "$dir/model.bin" --data "$data" --max_steps 0 --batch_size "$batch" |
        tee "$dir/validation.txt"
    ./sample_gpt2 -e "$dir/model.bin" --num 50 --tokens 400 --temperature 0.8 --seed 1 >"$dir/poems.txt"
    ./score_poems "$dir/poems.txt" "$data/val.bin" --data "$data" --skip_last | tee "$dir/scores.md"
done
