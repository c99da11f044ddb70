#!/bin/sh
# Rung 9: fine-tuning. A model that has read every poet but one is fine-tuned on that poet. For comparison, a
# model of the same size is trained on that poet alone, for as many steps as the fine-tuning.
#
#     dev/ladder/rung9.sh POEMS.csv [OUT] [STEPS] [TUNING_STEPS]     defaults: out/rung9 2000 300
#
# POET is the poet (default أبو نواس); SIZE gives the model's flags for ./train_gpt2 (default: the tiny
# preset). OUT/pretrained, OUT/tuned and OUT/alone hold the three runs, each with poems.txt, and with
# validation.txt on the poet's held-out poems.
set -e
poems=${1:?"usage: dev/ladder/rung9.sh POEMS.csv [OUT] [STEPS] [TUNING_STEPS]"}
out=${2:-out/rung9} steps=${3:-2000} tuning=${4:-300} poet=${POET:-أبو نواس}
size=${SIZE:---preset tiny --batch_size 32 --dropout 0 --optimizer adamw --learning_rate 2e-3}
logging="--val_every 25 --log_every 50 --sample_every 0"
make -s train_gpt2 sample_gpt2 prepare_data score_poems
make train POEMS="$poems" PREPARE_FLAGS="--except 'poet_name=$poet'" OUT="$out/pretrained" \
    TRAIN_FLAGS="$size --max_steps $steps --log_every 100 --sample_every 0"
# AdamW, as the runs it is compared with
make finetune FROM="$out/pretrained/model.bin" POEMS="$poems" PREPARE_FLAGS="--where 'poet_name=$poet'" \
    OUT="$out/tuned" \
    TRAIN_FLAGS="--batch_size 32 --optimizer adamw --learning_rate 5e-4 --lr_schedule cosine \
--max_steps $tuning $logging"
./train_gpt2 --data "$out/tuned/data" $size --max_steps "$tuning" $logging -o "$out/alone" --overwrite
for run in pretrained tuned alone; do
    echo "== $run"
    ./train_gpt2 -e "$out/$run/model.bin" --data "$out/tuned/data" --max_steps 0 |
        tee "$out/$run/validation.txt"
    ./sample_gpt2 -e "$out/$run/model.bin" --num 50 --tokens 300 --seed 1 >"$out/$run/poems.txt"
done
./score_poems "$out/pretrained/poems.txt" "$out/tuned/poems.txt" "$out/alone/poems.txt" \
    "$out/tuned/data/val.bin" --data "$out/tuned/data" --skip_last
