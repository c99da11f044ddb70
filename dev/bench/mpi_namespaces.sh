#!/bin/bash
# Tests and times the CPU trainer built with MPI=1 on two hosts, hostA and hostB. Both are network namespaces
# of this machine, with a host name each, so OpenMPI connects their ranks by TCP. Linux only, as root, in the
# project's folder:
#     make build/train_gpt2_mpi prepare_data && sudo dev/bench/mpi_namespaces.sh build/train_gpt2_mpi [ROUNDS]
# A round trains the character model for 5 steps of 4,096 tokens, one thread per rank, on one rank, on two in
# hostA, and on one in each host for each of RATES ("10gbit 1gbit"; also "unlimited"). ROUNDS is 3. Printed
# are the least and the median time of a step over all rounds, without the first step of each run.
set -u
die() { echo "dev/bench/mpi_namespaces.sh: $1" >&2; exit "${2:-1}"; }

case $# in 1 | 2) ;; *) die "usage: dev/bench/mpi_namespaces.sh TRAINER [ROUNDS]" 2 ;; esac
case ${2-3} in *[!0-9]* | '' | 0) die "ROUNDS is \"$2\"; it must be 1 or more" 2 ;; esac
rounds=${2-3}
[ "$(uname -s)" = Linux ] || die "needs Linux, since the hosts are network namespaces"
[ "$(id -u)" = 0 ] || die "needs root, to make network namespaces; start it with sudo"
for c in ip tc unshare mpirun; do
    command -v $c >/dev/null || die "$c is missing; install iproute2, util-linux and openmpi-bin"
done
trainer=$(realpath -- "$1") && [ -x "$trainer" ] || die "$1 is not a program; make build/train_gpt2_mpi"
[ -x ./prepare_data ] || die "./prepare_data is missing; make prepare_data"

dir=$(mktemp -d) passed=0 failed=0
export NETNS=arapoet$$
cleanup() {
    for host in hostA hostB; do
        ip netns pids $NETNS-$host 2>/dev/null | xargs -r kill -KILL
        ip netns del $NETNS-$host 2>/dev/null
    done
    rm -rf "$dir"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

for host in hostA hostB; do
    ip netns add $NETNS-$host && ip -n $NETNS-$host link set lo up ||
        die "cannot make a network namespace, see above; it needs CAP_SYS_ADMIN and CAP_NET_ADMIN"
done
ip link add link0 netns $NETNS-hostA type veth peer name link0 netns $NETNS-hostB &&
    ip -n $NETNS-hostA addr add 10.77.0.1/24 dev link0 && ip -n $NETNS-hostA link set link0 up &&
    ip -n $NETNS-hostB addr add 10.77.0.2/24 dev link0 && ip -n $NETNS-hostB link set link0 up ||
    die "cannot connect the namespaces by a veth pair, see above; the kernel needs CONFIG_VETH"
set_rate() { # RATE of both directions
    for host in hostA hostB; do
        tc -n $NETNS-$host qdisc del dev link0 root 2>/dev/null
        [ "$1" = unlimited ] ||
            tc -n $NETNS-$host qdisc add dev link0 root tbf rate "$1" burst 512kb latency 50ms ||
            die "cannot limit the link to $1, see above; the kernel needs CONFIG_NET_SCH_TBF"
    done
}
sent() { ip netns exec $NETNS-hostA cat /sys/class/net/link0/statistics/tx_bytes; }

# mpirun calls this instead of ssh, so it takes what ssh takes: HOST COMMAND..., words for a shell
cat >"$dir/on_host" <<'END'
#!/bin/bash
host=$1 && shift
exec ip netns exec "$NETNS-$host" unshare --uts bash -c 'hostname "$1" && exec bash -c "$2"' - "$host" "$*"
END
chmod +x "$dir/on_host"

# TMPDIR takes OpenMPI's session files. Without --bind-to none, each host's first rank is bound to core 0,
# which is the same core here.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1 TMPDIR=$dir
export OMPI_MCA_plm_rsh_agent=$dir/on_host OMPI_MCA_hwloc_base_binding_policy=none
export OMPI_MCA_pml=ob1 OMPI_MCA_btl_tcp_if_include=link0 OMPI_MCA_oob_tcp_if_include=link0
# HOSTS is hostA (one rank), hostA:2 (two) or hostA,hostB. The time limit is for a machine that is busy.
train() { # HOSTS OUT FLAGS...
    local btl=self,vader
    [ "$1" = hostA,hostB ] && btl=self,tcp
    timeout --foreground 300 "$dir/on_host" hostA "$(printf '%q ' mpirun --mca btl $btl --host "$1" \
        "$trainer" --data "$dir/data" -o "$dir/$2" -s 0 --save_every 0 --val_every 0 "${@:3}")"
}

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

# Losses, norms and learning rates of two logs of 5 steps agree to 1e-6.
same_losses() {
    paste -d, <(cut -d, -f1-7 "$1") <(cut -d, -f1-7 "$2") | awk -F, '
        NR == 1 { next }
        {
            for (i = 1; i <= 7; i++) {
                d = $i - $(i + 7)
                if (d < 0) d = -d
                if (d > 1e-6 * (1 + $i)) bad = 1
            }
        }
        END { if (NR != 6 || bad) { print NR " rows, a difference above 1e-6: " bad + 0; exit 1 } }'
}
# A sum over two ranks takes a gradient's bytes in each direction: 4 for each of 10.8 million parameters.
over_the_link() { # MB HOSTS
    if [ "$2" = hostA,hostB ]; then grep -q "1 of them on this machine" "$dir/out" && [ "$1" -ge 43 ]; else
        [ "$1" = 0 ]
    fi || { echo "$1 MB a step"; grep ^ranks "$dir/out"; return 1; }
}
variant() { # NAME HOSTS B
    local log=$dir/$1.log before mb
    before=$(sent)
    check "$1 trains" train "$2" run --preset char --optimizer adamw -d 4096 -b "$3" --threads 1 \
        --max_steps 5
    mb=$((($(sent) - before) / 5000000))
    mv "$dir/said" "$dir/out"
    mv "$dir/run/log.csv" "$log" && rm -rf "$dir/run"
    check "$1 has one rank's losses" same_losses "$dir/one.log" "$log"
    check "$1: gradients cross the link where the ranks are on two hosts, only there" over_the_link $mb "$2"
    tail -n +3 "$log" | cut -d, -f8 >>"$dir/$1.ms"
    echo $mb >"$dir/$1.mb"
}
row() { # NAME
    sort -n "$dir/$1.ms" | awk -v name="$1" -v mb="$(cat "$dir/$1.mb")" '
        { ms[NR] = $1 }
        END {
            median = (ms[int((NR + 1) / 2)] + ms[int(NR / 2) + 1]) / 2
            printf "%-16s %7.0f %7.0f %9d\n", name, ms[1], median, mb
        }'
}

trainers() { # HOST: the trainer's processes there
    for pid in $(ip netns pids $NETNS-"$1"); do
        [ "$(readlink "/proc/$pid/exe")" != "$trainer" ] || echo "$pid"
    done
}
killed() {
    train hostA,hostB killed -d 192 -b 6 -t 16 --depth 2 --heads 2 --channels 16 --max_steps 1000000 &
    local mpirun=$! code since
    until grep -qs "s:20 trl" "$dir/killed/main.log"; do
        kill -0 $mpirun || return 1
        sleep 0.1
    done
    since=$SECONDS
    kill -KILL "$(trainers hostB)" || { kill $mpirun; return 1; }
    wait $mpirun
    code=$?
    echo "exit code $code after $((SECONDS - since)) s; left: $(trainers hostA) $(trainers hostB)"
    [ $code != 0 ] && [ $((SECONDS - since)) -lt 20 ] && [ -z "$(trainers hostA)$(trainers hostB)" ]
}

./prepare_data data/sample_poems.csv -o "$dir/data" >/dev/null || exit 1
read -ra rates <<<"${RATES-10gbit 1gbit}"
for ((round = 1; round <= rounds; round++)); do
    echo "round $round of $rounds, load averages $(cut -d' ' -f1-3 /proc/loadavg), $(nproc --all) cores"
    variant one hostA 16
    variant two_on_hostA hostA:2 8
    for rate in "${rates[@]}"; do
        set_rate "$rate"
        variant "two_$rate" hostA,hostB 8
    done
done
check "a rank that is killed on hostB ends all, within 20 seconds" killed

echo "ms of a step:     least  median  MB a step sent by hostA"
for name in one two_on_hostA "${rates[@]/#/two_}"; do row "$name"; done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
