#!/bin/bash
# Tests dev/slurm/*.sbatch without Slurm, with an srun and an scontrol that only write down how they were
# called. With the name of a CPU trainer and of prepare_data it also trains, stops and resumes a small model:
#     dev/test_slurm.sh [./train_gpt2 ./prepare_data]
# It runs in the project's folder.
trainer=$1 prepare=$2 passed=0 failed=0 skipped=0
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT || exit 1
mkdir "$dir/bin" "$dir/out"
export PATH=$dir/bin:$PATH FAKE=$dir

# srun writes its words to FAKE/srun, one a line, and does what FAKE/ranks says; scontrol writes them, too.
cat >"$dir/bin/srun" <<'END'
#!/bin/bash
printf '%s\n' "$@" >"$FAKE/srun"
. "$FAKE/ranks"
END
cat >"$dir/bin/scontrol" <<'END'
#!/bin/bash
echo "$*" >>"$FAKE/scontrol"
exit "${SCONTROL_CODE:-0}"
END
cat >"$dir/bin/sleep" <<'END'
#!/bin/bash
echo "sleep $*" >>"$FAKE/scontrol"
END
chmod +x "$dir"/bin/*

check() { # PROMISE COMMAND...
    local promise=$1
    shift
    if "$@" >"$dir/log" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $promise"
        tail -20 "$dir/log" "$dir/said" "$dir/srun" 2>/dev/null
    fi
}
# Runs a script as Slurm would; the ranks do what the command says. The script's output is in $dir/said.
job() { # SCRIPT NTASKS COMMAND VARIABLE=VALUE...
    local script=$1 tasks=$2
    echo "$3" >"$dir/ranks"
    shift 3
    rm -f "$dir/srun" "$dir/scontrol"
    env SLURM_JOB_ID=77 SLURM_JOB_NAME=arapoet SLURM_JOB_NODELIST=gpu01 SLURM_NTASKS="$tasks" \
        SLURM_CPUS_PER_TASK=8 OUT="$dir/out" "$@" bash "dev/slurm/$script.sbatch" >"$dir/said" 2>&1
}
requeued() { [ "$(cat "$dir/scontrol" 2>/dev/null)" = "requeue 77" ]; }
left_alone() { [ ! -e "$dir/scontrol" ]; }
passes() { # WORDS: srun was given them, in this order and next to each other
    { echo && cat "$dir/srun"; } | tr '\n' ' ' | grep -qF -- " $* "
}
sbatch_lines() { grep -qx -- "#SBATCH $2" "dev/slurm/$1.sbatch"; }
starts_anew() { ! passes --resume && passes -e pretrained.bin --overwrite; }
resumes() { passes --resume && ! passes -e && ! passes --overwrite; }

finish='echo "1000 steps in 1:00:00 of training."'
stop='echo "stopped by SIGUSR1 after step 7; go on with: ./train_gpt2cu -o out --resume"'
for script in one_node many_nodes; do
    check "$script: bash reads it" bash -n "dev/slurm/$script.sbatch"
    for line in --requeue --open-mode=append --signal=USR1@120 --ntasks-per-node=4 --gpus-per-node=4; do
        check "$script: #SBATCH $line" sbatch_lines $script $line
    done
    check "$script: a finished run ends with 0" job $script 4 "$finish"
    check "$script: a finished run is not requeued" left_alone
    check "$script: all ranks end when one fails" passes --kill-on-bad-exit=1 --cpus-per-task=8 ./train_gpt2cu
    check "$script: without a checkpoint the run starts from MODEL" starts_anew
    check "$script: 4 GPUs x 32 sequences, 524,288 tokens a step, learning rate 3e-5" \
        passes -b 32 -t 1024 --total_batch_size 524288 -l 3e-5 --max_steps 1000

    check "$script: a stopped run ends with 0" job $script 4 "$stop"
    check "$script: a stopped run is requeued" requeued
    job $script 4 'echo "stopped before the first step; nothing to resume"'
    check "$script: so is one that was stopped before the first step" requeued
    job $script 4 "$stop" SCONTROL_CODE=1
    check "$script: a requeue that fails is an error" [ $? = 1 ]
    check "$script: which says what to do" grep -q "submit it again" "$dir/said"
    job $script 4 'echo "stopped words"; exit 3'
    check "$script: the trainer's exit code is the job's" [ $? = 3 ]
    check "$script: a run that failed is not requeued" left_alone
    job $script 4 "kill -TERM \$PPID; $stop"
    check "$script: after scancel the script waits for its end, and requeues nothing" \
        [ "$(cat "$dir/scontrol")" = "sleep 600" ]

    touch "$dir/out/state_00000007.bin"
    job $script 4 "$finish" SLURM_RESTART_COUNT=1
    check "$script: with a checkpoint the run is resumed" resumes
    check "$script: the start is counted" grep -q "start 2 on gpu01" "$dir/said"
    rm "$dir/out/state_00000007.bin"
    job $script 4 "$finish" "FLAGS=--zero_stage 2 --recompute 3" BATCH=8 STEPS=5 DATA="$dir/my data"
    check "$script: FLAGS are added" passes --zero_stage 2 --recompute 3
    check "$script: BATCH, STEPS" passes -b 8 -t 1024 --total_batch_size 524288 -l 3e-5 --max_steps 5
    check "$script: names with spaces" grep -qx "$dir/my data" "$dir/srun"
done
for case in 8:32 16:32 32:16 64:8 512:1; do
    job many_nodes ${case%:*} "$finish"
    check "many_nodes: ${case%:*} GPUs take ${case#*:} sequences at once" passes -b ${case#*:}
done
job many_nodes 1024 "$finish"
check "many_nodes: more GPUs than sequences are a mistake, exit code 2" [ $? = 2 ]
body() { sed -n '/^# --- the same/,$p' "dev/slurm/$1.sbatch"; }
check "both scripts have the same body" cmp <(body one_node) <(body many_nodes)

# The real trainer behind the same scripts: it is stopped by SIGUSR1, requeued, resumed, and finishes.
real() { # STEPS COMMAND: the ranks are one CPU trainer; COMMAND runs beside it
    job one_node 1 "set -- \"\${@:4}\"; $2 exec '$trainer' \"\$@\"" DATA="$dir/data" MODEL="$dir/small.bin" \
        OUT="$dir/real" BATCH=32 STEPS="$1" FLAGS="-s 0 --val_every 0"
}
real_small_model() {
    "$prepare" data/sample_poems.csv -o "$dir/data" &&
        "$trainer" --data "$dir/data" --depth 1 --heads 1 --channels 16 -t 1024 -b 1 --max_steps 1 -s 0 \
            --val_every 0 -o "$dir/start" && cp "$dir/start/model.bin" "$dir/small.bin"
}
if [ -n "$trainer" ]; then
    usr1="(while kill -0 \$\$ 2>/dev/null; do
        if grep -qs 's:0 trl' '$dir/real/main.log'; then kill -USR1 \$\$ && break; fi
        /bin/sleep 0.1
    done) &"
    check "a small model to start from" real_small_model
    check "the trainer takes the script's flags, and SIGUSR1 ends it with 0" real 100000 "$usr1"
    check "the job is requeued" requeued
    steps=$(find "$dir/real" -name 'state_*.bin' | sort | tail -1 | tr -dc 0-9 | tail -c 8)
    check "the restarted job resumes and finishes" real $((10#$steps + 1)) ""
    check "and is not requeued again" left_alone
    check "it went on after step $((10#$steps))" grep -q "($((10#$steps)) done)" "$dir/said"
else
    skipped=$((skipped + 1))
fi

printf '%s passed, %s failed' $passed $failed
[ $skipped = 0 ] || printf ', %s skipped' $skipped
echo
[ $failed = 0 ]
