#!/bin/sh
# Rung 8: the trainer itself with the char preset, on many poems.
#
#     dev/ladder/rung8.sh POEMS.csv [OUT]     default: out/rung8
#
# Run it in the project's folder. Started again, it goes on where it stopped.
# POEMS has the columns poet_name and poem_meter. Twelve poets (UNSEEN) are left out of the training. A model
# is judged on val.bin, held-out poems of the poets it was trained on, and on those twelve. The runs, each in
# OUT/RUN:
#
#   muon adamw            the large run with each optimizer: STEPS steps of BATCH x 256 tokens, no dropout
#   small                 as many tokens, with muon, for a model of 4 layers and 192 channels
#   try_none try_dropout  a fifth of the steps, with muon, without dropout and with 0.1
#   one_none one_dropout  POET's poems alone, 3/10 of the steps, with adamw, without dropout and with 0.2:
#                         what is read often enough is learnt by heart
#   tuned                 muon's finished model, fine-tuned by make finetune on TUNED, one of the twelve, and
#                         judged by TUNED's poems alone; if it was stopped, it starts over
#
# OUT/RUN/losses.txt has the model's losses beside those of a 5-gram of the run's training text. poems.txt has
# WRITTEN poems of at most 8 verses, an equal number (rounded up) for each line of ASK, which is passed to
# --tags; rhymed.txt as many with --rhyme auto; scores.md what ./score_poems says of both and of val.bin.
# OUT/large.svg draws muon, adamw and small, as far as they are done with these settings.
#
# RUNS, STEPS, BATCH, TAGS, UNSEEN, ASK, POET, TUNED, WRITTEN and TRAIN_FLAGS (more flags for ./train_gpt2,
# e.g. '--dtype bf16'; not used for tuned) are variables, with defaults for a corpus of classical poems. A run
# goes on only with the settings and the poems that it began with (OUT/RUN.settings), but ASK and WRITTEN may
# change until its poems are written.
set -e
poems=${1:?"usage: dev/ladder/rung8.sh POEMS.csv [OUT]"}
out=${2:-out/rung8}
RUNS=${RUNS:-muon adamw small try_none try_dropout one_none one_dropout tuned}
STEPS=${STEPS:-5000}
[ "$STEPS" -ge 20 ] 2>/dev/null || { echo "rung8.sh: STEPS is '$STEPS', wanted at least 20" >&2; exit 2; }
BATCH=${BATCH:-16} WRITTEN=${WRITTEN:-200}
TAGS=${TAGS-poem_meter,poet_name} POET=${POET:-كشاجم} TUNED=${TUNED:-عمر ابن أبي ربيعة}
# Every seventh of the corpus's 86 poets, ordered by how many letters each wrote
UNSEEN=${UNSEEN-\
السري الرفاء|عمر ابن أبي ربيعة|عنترة بن شداد|النابغة الشيباني|أبو حية النميري|أبو طالب|\
الإمام الشافعي|عمارة بن عقيل|ربيعة الرقي|علقمة الفحل|عبد الله بن المبارك|علي بن جبلة}
# The five most frequent metres, with the two poets who wrote the most letters in known metres
if [ -z "${ASK+set}" ] && [ "$TAGS" = poem_meter,poet_name ]; then
    for metre in طويل كامل بسيط وافر خفيف; do
        for poet in 'الشريف الرضي' 'الشريف المرتضى'; do
            ASK="$ASK${ASK:+
}poem_meter=$metre,poet_name=$poet"
        done
    done
fi
for run in $RUNS; do
    case $run in
    muon | adamw | small | try_none | try_dropout | one_none | one_dropout | tuned) ;;
    *) echo "rung8.sh: '$run' is no run; the first lines of this script list them" >&2; exit 2 ;;
    esac
done
make -s train_gpt2 sample_gpt2 prepare_data score_poems ngram
mkdir -p "$out"
checksum=$(cksum <"$poems")

# data FOLDER FLAGS...: makes token files, unless those are there that the same poems and flags gave
data() {
    folder=$out/$1
    shift
    if [ ! -s "$folder/train.bin" ] || [ "$checksum $*" != "$(cat "$folder.settings" 2>/dev/null)" ]; then
        rm -f "$folder.settings"
        ./prepare_data "$poems" -o "$folder" "$@"
        printf '%s\n' "$checksum $*" >"$folder.settings"
    fi
}
# finished STEPS: ends this script unless the run in $dir has taken them
finished() {
    [ "$(tail -n 1 "$dir/log.csv" | cut -d, -f1)" = "$1" ] ||
        { echo "rung8.sh: $dir stopped before step $1; start this script again" >&2; exit 1; }
}
# train STEPS FLAGS...: the run in $dir, to its last step, from the last checkpoint where there is one
train() {
    steps=$1
    shift
    if ls "$dir"/state_*.bin >/dev/null 2>&1; then
        ./train_gpt2 -o "$dir" --resume $TRAIN_FLAGS
    else
        ./train_gpt2 --data "$from" --preset char --batch_size "$BATCH" --log_every 50 --max_steps "$steps" \
            "$@" -o "$dir" --overwrite $TRAIN_FLAGS
    fi
    finished "$steps"
}
# losses DIR DATA FILE...: of the model in DIR and of a 5-gram of DATA, on each token file
losses() {
    dir=$1 from=$2
    shift 2
    for file; do
        ./train_gpt2 -e "$dir/model.bin" --data "$from" --val_data "$file" --batch_size "$BATCH" --max_steps 0
        ./ngram --data "$from" "$file"
        echo
    done
}
# write_poems DIR WISHES FLAGS...: WRITTEN poems, as many with each wish
write_poems() {
    dir=$1 wishes=$2
    shift 2
    each=$(((WRITTEN - 1) / $(printf '%s\n' "$wishes" | wc -l) + 1))
    printf '%s\n' "$wishes" | while read -r wish; do
        ./sample_gpt2 -e "$dir/model.bin" --num $each --verses 8 --temperature 0.8 --seed 1 \
            ${wish:+--tags "$wish"} "$@"
        echo
    done
}

# settings_with POETS: what a run goes on only with
settings_with() {
    printf '%s\n' "$checksum $STEPS $BATCH $TAGS $1 $TRAIN_FLAGS"
}
# began_with POETS RUN: whether RUN began with these settings
began_with() {
    [ "$(settings_with "$1")" = "$(cat "$out/$2.settings" 2>/dev/null)" ]
}

tags=${TAGS:+--tags $TAGS}
for run in $RUNS; do
    dir=$out/$run from=$out/poets wishes=$ASK
    case $run in
    one_*) poets=$POET ;;
    tuned) poets="$UNSEEN $TUNED" ;;
    *) poets=$UNSEEN ;;
    esac
    if [ -e "$dir" ] && ! began_with "$poets" $run; then
        echo "rung8.sh: $dir began with other settings or poems ($dir.settings); take another OUT" >&2
        exit 2
    fi
    [ ! -s "$dir/scores.md" ] || { echo "$run is done"; continue; }
    case $run in
    one_*)
        from=$out/one wishes=
        data one --where "poet_name=$POET" ;;
    tuned)
        # The poet has no tag: muon's model has not read him.
        from=$dir/data wishes=$(printf '%s\n' "$ASK" | sed 's/,poet_name=[^,]*//' | sort -u)
        case "|$UNSEEN|" in
        *"|$TUNED|"*) ;;
        *) echo "rung8.sh: TUNED is '$TUNED', wanted one of UNSEEN" >&2; exit 2 ;;
        esac
        { [ -s "$out/muon/scores.md" ] && began_with "$UNSEEN" muon; } ||
            { echo "rung8.sh: tuned needs muon's model of these settings; RUNS='muon tuned'" >&2; exit 2; } ;;
    *)
        data poets $tags ${UNSEEN:+--except "poet_name=$UNSEEN"}
        [ -z "$UNSEEN" ] || data unseen $tags --where "poet_name=$UNSEEN" --val_fraction 0 \
            --tokenizer "$out/poets/tokenizer.bin" ;;
    esac
    settings_with "$poets" >"$dir.settings"
    case $run in
    muon | adamw) train "$STEPS" --optimizer "$run" --dropout 0 ;;
    small) train "$STEPS" --optimizer muon --dropout 0 --depth 4 --channels 192 ;;
    try_none) train $((STEPS / 5)) --optimizer muon --dropout 0 ;;
    try_dropout) train $((STEPS / 5)) --optimizer muon --dropout 0.1 ;;
    one_none) train $((STEPS * 3 / 10)) --optimizer adamw --dropout 0 ;;
    one_dropout) train $((STEPS * 3 / 10)) --optimizer adamw --dropout 0.2 ;;
    tuned)
        make finetune FROM="$out/muon/model.bin" POEMS="$poems" OUT="$dir" \
            PREPARE_FLAGS="$tags --where 'poet_name=$TUNED'" TRAIN_FLAGS="--batch_size $BATCH \
--learning_rate 3e-4 --lr_schedule cosine --max_steps $((STEPS / 20)) --optimizer adamw"
        finished $((STEPS / 20)) ;;
    esac
    set -- "$from/val.bin"
    [ "$from" != "$out/poets" ] || [ -z "$UNSEEN" ] || set -- "$from/val.bin" "$out/unseen/train.bin"
    losses "$dir" "$from" "$@" >"$dir/losses.txt"
    cat "$dir/losses.txt"
    write_poems "$dir" "$wishes" >"$dir/poems.txt"
    write_poems "$dir" "$wishes" --rhyme auto >"$dir/rhymed.txt"
    ./score_poems "$dir/poems.txt" "$dir/rhymed.txt" "$from/val.bin" --data "$from" >"$dir/scores.part"
    mv "$dir/scores.part" "$dir/scores.md"  # says that the run is done
    cat "$dir/scores.md"
done
set --
for run in muon adamw small; do
    [ ! -s "$out/$run/scores.md" ] || ! began_with "$UNSEEN" $run || set -- "$@" "$out/$run"
done
if [ $# -ge 2 ]; then
    if command -v gnuplot >/dev/null; then
        dev/plot/compare.sh tokens "$out/large.svg" "$@"
    else
        echo "no curves: gnuplot is missing; sudo apt-get install gnuplot-nox"
    fi
fi
