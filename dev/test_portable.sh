#!/bin/sh
# Tests of the portable programs:
#     dev/test_portable.sh DIR ISA...
# runs DIR/test_gpt2.ISA for each set of instructions that this processor has, and then the program
#     dev/test_portable.sh choice DIR ISA...
# which tests the choice: DIR/train_gpt2 uses the last set that the processor has, or ARAPOET_ISA, and learns
# the same with each set; DIR/sample_gpt2 has each set, too.
[ "$1" = choice ] && choice=1 && shift
dir=$1 program=$1/train_gpt2
shift
has() { ARAPOET_ISA=$1 $program --help >/dev/null 2>&1; }

if [ -z "$choice" ]; then
    isas=$* n=$#
    for isa in $isas; do
        test=$dir/test_gpt2.$isa
        if has "$isa"; then set -- "$@" "$test"; else set -- "$@" "skip:$test: this processor has no $isa"; fi
    done
    shift "$n"
    choice=$(mktemp) && trap 'rm -f "$choice"' EXIT || exit 1
    printf '#!/bin/sh\nexec %s choice %s %s\n' "$0" "$dir" "$isas" >"$choice"
    chmod +x "$choice"
    dev/run_tests.sh "$@" "$choice"
    exit
fi

passed=0 failed=0 skipped=0
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT || exit 1
check() { # NAME STATUS
    if [ "$2" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "FAILED: $1"; fi
}
is_like() { # TEXT PATTERN
    case $1 in $2) echo 0 ;; *) echo 1 ;; esac
}
# Prints the losses of 5 steps, one per line.
losses() { # ISA or "" and flags
    isa=$1 && shift
    set -- --data "$tmp/data" -o "$tmp/out" --overwrite --max_steps 5 "$@"
    env ${isa:+ARAPOET_ISA=$isa} $program "$@" >"$tmp/log" 2>&1 &&
        sed 1,2d "$tmp/out/log.csv" | cut -d, -f2
}
machine() { sed -n 's/, peak.*//; /^machine/p' "$tmp/log"; }

./prepare_data data/sample_poems.csv -o "$tmp/data" >/dev/null || exit 1
losses generic >"$tmp/want"
check "the first loss is about ln V" "$(awk 'NR == 1 {exit !($1 > 3 && $1 < 4.5)}' "$tmp/want"; echo $?)"
for isa in "$@"; do
    if ! has "$isa"; then
        skipped=$((skipped + 1)) && echo "skipped: this processor has no $isa"
        message=$(ARAPOET_ISA=$isa $program --help 2>&1)
        check "$isa is refused by name: $message" \
            "$(is_like "$message" "*ARAPOET_ISA is '$isa', but this processor has only generic*")"
        continue
    fi
    best=$isa
    for dtype in fp32 bf16; do
        losses "$isa" --dtype $dtype >"$tmp/got"
        check "$isa, $dtype: the losses of 5 steps agree with generic fp32's to 0.002" "$(
            paste "$tmp/want" "$tmp/got" |
                awk '{d = $1 - $2; if (NF < 2 || d > 0.002 || d < -0.002) bad = 1} END {exit bad || NR != 5}'
            echo $?
        )"
    done
    case $isa in
        generic) bits=128 ;;
        avx2) bits=256 ;;
        *) bits=512 ;;
    esac
    check "$isa uses $bits-bit vectors: $(machine)" "$(is_like "$(machine)" "* $bits-bit*")"
    poem=$(ARAPOET_ISA=$isa "$dir/sample_gpt2" -e "$tmp/out/model.bin" --tokens 20 --ignore_end 2>&1)
    code=$?
    check "$isa: sample_gpt2 writes a poem: $poem" "$([ $code = 0 ] && [ -n "$poem" ]; echo $?)"
done
losses "$best" >"$tmp/want" && machine >"$tmp/want.machine"
losses "" >"$tmp/got" && machine >"$tmp/got.machine"
check "without ARAPOET_ISA, $best is chosen" \
    "$(cmp -s "$tmp/want" "$tmp/got" && cmp -s "$tmp/want.machine" "$tmp/got.machine"; echo $?)"
for p in train_gpt2 sample_gpt2; do
    message=$(ARAPOET_ISA=mmx "$dir/$p" --help 2>&1)
    code=$?
    check "$p: an unknown ARAPOET_ISA exits with 2, here with $code" "$([ $code = 2 ]; echo $?)"
    check "$p: an unknown ARAPOET_ISA is an error that lists the known ones: $message" \
        "$(is_like "$message" "$p: ARAPOET_ISA is 'mmx', known are generic*")"
done
printf '%s passed, %s failed' $passed $failed
[ $skipped = 0 ] || printf ', %s skipped' $skipped
echo
[ $failed = 0 ]
