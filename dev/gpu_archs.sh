#!/bin/sh
# dev/gpu_archs.sh NVCC: prints the architectures that NVCC is to compile for, e.g. "80 90": those of this
# machine's GPUs, or, where there is none, of Ampere, Hopper and Blackwell. For a GPU that NVCC does not know
# yet, it prints the newest architecture before it, whose PTX the GPU's driver compiles. GPUs before Ampere
# are left out; where there are only such, or NVCC is too old, the script fails with one line.
set -eu
nvcc=$1
fail() { echo "make train_gpt2cu: $*" >&2; exit 1; }

known=$("$nvcc" --list-gpu-code 2>/dev/null | sed -n 's/^sm_\([0-9]*\)$/\1/p' | sort -n || true)
gpus=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
    sed -n 's/^\([0-9]*\)\.\([0-9]\)$/\1\2/p' || true)

# Prints the newest known architecture from Ampere up to $1.
newest() {
    found=
    for k in $known; do
        if [ "$k" -ge 80 ] && [ "$k" -le "$1" ]; then found=$k; fi
    done
    echo "$found"
}
[ -n "$(newest 999)" ] || fail "$nvcc --list-gpu-code names no architecture from sm_80 (Ampere) on;" \
    "install the CUDA Toolkit, 12 or later, or name its compiler: make train_gpt2cu NVCC=FILE"

archs=
for g in ${gpus:-80 90 100}; do
    [ "$g" -ge 80 ] || continue
    archs="$archs $(newest "$g")"
done
if [ -z "$archs" ]; then
    first=$(echo "$gpus" | head -n 1)
    fail "GPU 0 has compute capability ${first%?}.${first#"${first%?}"}, wanted 8.0 (Ampere) or later;" \
        "make train_gpt2 builds the CPU trainer"
fi
echo $archs | tr ' ' '\n' | sort -nu | paste -sd ' ' -
