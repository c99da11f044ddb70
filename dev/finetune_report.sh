#!/bin/sh
# What fine-tuning did, as a table and a poem of each: before, after, and the poems held out for validation.
#
#     dev/finetune_report.sh BEFORE.bin TOKENIZER.bin OUT DATA      writes OUT/finetune.md and prints it
#
# BEFORE is the model that training began with, OUT the run, DATA its token files. Both models write
# POEMS_WRITTEN poems (8) of at most POEM_TOKENS tokens (300) from the same seed. ./score_poems judges them,
# and dev/ladder/score_poems.cpp defines the measures. The losses are those of the run's log: at step 0, and
# where they were best. Run it in the repository's root, as `make finetune` does.
set -eu
test $# -eq 4 || { echo "usage: dev/finetune_report.sh BEFORE.bin TOKENIZER.bin OUT DATA" >&2; exit 2; }
before=$1 tokenizer=$2 out=$3 data=$4
POEMS=${POEMS_WRITTEN:-8} TOKENS=${POEM_TOKENS:-300}
# A run that began with OUT/model.bin has moved it.
if [ "$before" -ef "$out/model.bin" ]; then before=$(ls -dt "$out"/previous/*/model.bin | head -n 1); fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# loss COLUMN WHICH: a number of log.csv, at step 0 (first) or at the lowest loss (best); "-" if there is none
loss() {
    awk -F, -v column="$1" -v which="$2" '
        NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next }
        $at["val_loss"] == "" { next }
        which == "first" && $at["step"] == 0 { found = $at[column] }
        which == "best" && (low == "" || $at["val_loss"] + 0 < low + 0) {
            low = $at["val_loss"]; found = $at[column]
        }
        END { if (found == "") print "-"; else printf "%.4f", found }' "$out/log.csv"
}
# An untrained model of bytes also writes some that are no text.
write() {
    echo "writing $POEMS poems with $1" >&2
    ./sample_gpt2 -e "$1" --tokenizer "$2" --num "$POEMS" --tokens "$TOKENS" --temperature 0.8 --dtype bf16 \
        >"$work/bytes"
    { iconv -c -f UTF-8 -t UTF-8 "$work/bytes" || true; } | tr -d '\000-\010\013-\037'
}
write "$before" "$tokenizer" >"$work/before.txt"
write "$out/model.bin" "$tokenizer" >"$work/after.txt"
# A model that wrote nothing in the poems' letters has no scores.
for text in before after; do
    ./score_poems "$work/$text.txt" --data "$data" --skip_last >"$work/$text.md" 2>"$work/$text.err" ||
        grep -q 'has no poem' "$work/$text.err" || { cat "$work/$text.err" >&2; exit 1; }
done
test ! -f "$data/val.bin" || ./score_poems "$data/val.bin" --data "$data" >"$work/val.md"
# score FILE ROW: a cell of ./score_poems' table, or "-"
score() {
    test -f "$work/$1.md" || { echo -; return; }
    awk -F'|' -v row="$2" '$2 == " " row " " { gsub(/^ | $/, "", $3); found = $3 }
        END { print found == "" ? "-" : found }' "$work/$1.md"
}
# The first poem: what is before the line "--- 2 ---", without the line "--- 1 ---". A single poem has none.
poem() {
    awk '/^--- [0-9]+ ---$/ { n++; next } n < 2' "$work/$1.txt" | sed -e :a -e '/^\n*$/{$d;N;ba' -e '}'
}
{
    echo "# Fine-tuning, before and after"
    echo
    echo "Model: $before. Losses on the poems held out in $data; measures of $POEMS poems"
    echo "of at most $TOKENS tokens that each model wrote at temperature 0.8."
    echo "dev/ladder/score_poems.cpp defines the measures."
    echo
    echo "| | before | after | held-out poems |"
    echo "| --- | --- | --- | --- |"
    echo "| loss, nats per token | $(loss val_loss first) | $(loss val_loss best) | |"
    echo "| loss, bits per character | $(loss val_bits_per_char first) | $(loss val_bits_per_char best) | |"
    for row in "rhyme agrees (by chance)" "words known" "words known, of 5 letters and more" \
        "verses of two hemistichs" "longest run in a verse, mean" "longest run of all" "copied verses"; do
        echo "| $row | $(score before "$row") | $(score after "$row") | $(score val "$row") |"
    done
    for text in before after; do
        printf '\n## A poem %s\n\n' "$text"
        poem "$text" | sed 's/^/    /'
    done
} >"$work/finetune.md"
cp "$work/finetune.md" "$out/finetune.md"
cat "$out/finetune.md"
echo
echo "saved as $out/finetune.md"
