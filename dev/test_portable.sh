#!/bin/sh
# Tests for each set of instructions: dev/test_portable.sh ISA... runs build/ISA/test_gpt2 of those that this processor
# has, then (dev/test_portable.sh choice ISA..., a test program like the others) what build/portable/train_gpt2 promises:
# it chooses the last one that the processor has, obeys ARAPOET_ISA, and learns the same with each.
program=build/portable/train_gpt2
has() { ARAPOET_ISA=$1 $program --help >/dev/null 2>&1; }

if [ "$1" != choice ]; then
    isas=$* n=$#
    for isa in $isas; do
        if has "$isa"; then set -- "$@" "build/$isa/test_gpt2"; else set -- "$@" "skip:build/$isa/test_gpt2: this processor has no $isa"; fi
    done
    shift "$n"
    choice=$(mktemp) && trap 'rm -f "$choice"' EXIT || exit 1
    printf '#!/bin/sh\nexec %s choice %s\n' "$0" "$isas" >"$choice"
    chmod +x "$choice"
    dev/run_tests.sh "$@" "$choice"
    exit
fi

shift
passed=0 failed=0 skipped=0
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT || exit 1
check() { # NAME STATUS
    if [ "$2" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "FAILED: $1"; fi
}
# The losses of 5 steps, a line each.
losses() { # ISA or "" and flags
    isa=$1 && shift
    env ${isa:+ARAPOET_ISA=$isa} $program --data "$dir/data" -o "$dir/out" --overwrite --max_steps 5 "$@" >"$dir/log" 2>&1 && sed 1,2d "$dir/out/log.csv" | cut -d, -f2
}
./prepare_data data/sample_poems.csv -o "$dir/data" >/dev/null || exit 1
losses generic >"$dir/want"
check "the first loss is about ln V" "$(awk 'NR == 1 {exit !($1 > 3 && $1 < 4.5)}' "$dir/want"; echo $?)"
for isa in "$@"; do
    if ! has "$isa"; then
        skipped=$((skipped + 1)) && echo "skipped: $isa: this processor has none"
        message=$(ARAPOET_ISA=$isa $program --help 2>&1)
        check "$isa is refused by name: $message" "$(case $message in *"ARAPOET_ISA is '$isa', but this processor has only generic"*) echo 0 ;; *) echo 1 ;; esac)"
        continue
    fi
    best=$isa
    for dtype in fp32 bf16; do
        losses "$isa" --dtype $dtype >"$dir/got"
        check "$isa, $dtype: the losses of 5 steps are those of generic fp32, within 0.002" \
            "$(paste "$dir/want" "$dir/got" | awk '{d = $1 - $2; if (NF < 2 || d > 0.002 || d < -0.002) bad = 1} END {exit bad || NR != 5}'; echo $?)"
    done
    machine=$(grep '^machine' "$dir/log" | sed 's/, peak.*//')
    case $isa in
        generic) bits=128 ;;
        avx2) bits=256 ;;
        *) bits=512 ;;
    esac
    check "$isa computes with $bits-bit vectors: $machine" "$(case $machine in *" $bits-bit"*) echo 0 ;; *) echo 1 ;; esac)"
done
losses "$best" >"$dir/want" && sed 's/, peak.*//' "$dir/log" | grep '^machine' >"$dir/want.machine"
losses "" >"$dir/got" && sed 's/, peak.*//' "$dir/log" | grep '^machine' >"$dir/got.machine"
check "$best is chosen where nothing is said" "$(cmp -s "$dir/want" "$dir/got" && cmp -s "$dir/want.machine" "$dir/got.machine"; echo $?)"
message=$(ARAPOET_ISA=mmx $program --help 2>&1)
code=$?
check "an unknown name exits with 2, here with $code" "$([ $code = 2 ]; echo $?)"
check "an unknown name is answered with the known ones: $message" "$(case $message in "train_gpt2: ARAPOET_ISA is 'mmx', known are generic"*) echo 0 ;; *) echo 1 ;; esac)"
printf '%s passed, %s failed' $passed $failed
[ $skipped = 0 ] || printf ', %s skipped' $skipped
echo
[ $failed = 0 ]
