#!/bin/bash
# Tests the CPU trainer built with MPI=1 over MPI's processes on this machine (make test-mpi):
#     dev/test_mpi.sh build/train_gpt2_mpi
# It runs in the project's folder and needs ./prepare_data and ./train_gpt2, the latter without MPI.
set -u
trainer=$1 passed=0 failed=0
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
# Only ranks of one machine, more than it has cores, also as root
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_btl=self,vader OMPI_MCA_mpi_yield_when_idle=1 OMP_NUM_THREADS=1

check() { # PROMISE COMMAND...
    local promise=$1
    shift
    if "$@" >"$dir/said" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $promise"
        tail -20 "$dir/said"
    fi
}
flags=(--data "$dir/data" --depth 2 --heads 2 --channels 16 -t 16 --total_batch_size 192 --dropout 0.1 -s 0
    --val_every 5 --save_every 0 --optimizer adamw)
train() { # RANKS OUT FLAGS...
    mpirun -n "$1" "$trainer" "${flags[@]}" -o "$dir/$2" "${@:3}"
}
# Steps, losses, norms and learning rates of two logs agree to 1e-6.
same_losses() {
    paste -d, <(cut -d, -f1-7 "$dir/$1/log.csv") <(cut -d, -f1-7 "$dir/$2/log.csv") | awk -F, '
        NR == 1 { next }
        {
            for (i = 1; i <= 7; i++) {
                d = $i - $(i + 7)
                if (d < 0) d = -d
                if (d > 1e-6 * (1 + $i)) bad = 1
            }
        }
        END { if (NR < 12 || bad) { print NR " rows, a difference above 1e-6: " bad + 0; exit 1 } }'
}
# One of the ranks that write to OUT; mpirun, whose command line is similar, is not one.
rank_pid() {
    pgrep -f "$trainer .*-o $dir/$1( |$)" | grep -v "^$(pgrep -o -f "mpirun .*$dir/$1")\$" | tail -1
}
wait_for_step() { until grep -qs "s:$2 trl" "$dir/$1/main.log"; do sleep 0.05; done; }

./prepare_data data/sample_poems.csv -o "$dir/data" >/dev/null || exit 1

one_rank() { train 1 one -b 12 --max_steps 12; }
ranks() { train "$1" "ranks$1" -b $((12 / $1)) --max_steps 12 && same_losses one "ranks$1"; }
check "one rank trains" one_rank
for n in 2 3 4; do check "$n ranks come to one rank's losses" ranks $n; done

muon() {
    train 1 muon1 -b 12 --max_steps 12 --optimizer muon &&
        train 3 muon3 -b 4 --max_steps 12 --optimizer muon && same_losses muon1 muon3
}
check "three ranks come to one rank's losses by Muon" muon

stopped() {
    train 2 stopped -b 6 --max_steps 100000 &
    wait_for_step stopped 20
    kill -TERM "$(rank_pid stopped)"
    wait $! && ls "$dir"/stopped/state_*.bin && mpirun -n 3 "$trainer" -o "$dir/stopped" --resume -b 4 \
        --max_steps 1000
}
check "SIGTERM to one rank stops all with a checkpoint, which resumes on three ranks" timeout 60 bash -c "$(
    declare -p flags dir trainer; declare -f train wait_for_step rank_pid stopped); stopped"

killed() {
    train 2 killed -b 6 --max_steps 1000000 &
    wait_for_step killed 20
    kill -KILL "$(rank_pid killed)"
    ! wait $!
}
check "a rank that is killed ends all, within seconds" timeout 30 bash -c "$(
    declare -p flags dir trainer; declare -f train wait_for_step rank_pid killed); killed"

without() { ! mpirun -n 2 ./train_gpt2 "${flags[@]}" -o "$dir/without" -b 6 && [ ! -e "$dir/without" ]; }
check "a trainer built without MPI refuses to be one of several" without

echo "$passed passed, $failed failed"
[ $failed = 0 ]
