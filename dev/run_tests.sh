#!/bin/sh
# Runs test programs, each of which prints "N passed, N failed[, N skipped]" as its last line, and prints the
# sums in the same form:
#     dev/run_tests.sh PROGRAM... ["skip:NAME: REASON"...]
# A program without such a last line counts as one failed test, a skipped program as one skipped test. Before
# the sums, at most 40 lines of each failed program that tell of its failures are repeated.
passed=0 failed=0 skipped=0
log=$(mktemp) && failures=$(mktemp) && trap 'rm -f "$log" "$failures"' EXIT || exit 1
for program in "$@"; do
    case "$program" in
        skip:*) echo "skipped: ${program#skip:}"; skipped=$((skipped + 1)); continue ;;
    esac
    echo "== $program"
    { "$program"; echo "exit code $?"; } 2>&1 | tee "$log"
    code=$(sed -n '$s/.*exit code //p' "$log")
    counts='s/^\([0-9]*\) passed, \([0-9]*\) failed\(, \([0-9]*\) skipped\)\{0,1\}$/\1 \2 \4/p'
    set -- $(tail -2 "$log" | sed -n "1$counts")
    if [ $# -lt 2 ] || { [ "$code" != 0 ] && [ "$2" = 0 ]; }; then
        echo "$program ended early, with exit code $code" | tee -a "$log"
        set -- "${1:-0}" 1 "${3:-0}"
    fi
    if [ "$2" != 0 ]; then
        echo "$2 failed in $program:" >>"$failures"
        found=$(grep -A 3 -E '^TEST CASE:|ERROR:|FAILED' "$log" | head -n 40)
        printf '%s\n' "${found:-$(tail -n 10 "$log")}" >>"$failures"
    fi
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + ${3:-0}))
done
cat "$failures"
printf '%s passed, %s failed' $passed $failed
[ $skipped = 0 ] || printf ', %s skipped' $skipped
echo
[ $failed = 0 ]
