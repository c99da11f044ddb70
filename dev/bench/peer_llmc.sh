#!/bin/sh
# Builds llm.c's CPU trainer for one batch shape with llm.c's own Makefile. It builds in a copy, so that your
# checkout does not change.
#     dev/bench/peer_llmc.sh LLMC DIR B T STEPS     leaves DIR/train_gpt2_BxT
set -e
[ -f "$1/train_gpt2.c" ] && [ -f "$1/Makefile" ] || {
    echo "LLMC=$1: train_gpt2.c or Makefile is missing; wanted a checkout of llm.c" >&2
    exit 1
}
src="$2/src"
rm -rf "$src"
mkdir -p "$src"
cp -r "$1/Makefile" "$1/llmc" "$1/train_gpt2.c" "$src"

# the shape, the number of steps, and no validation: constants in its main()
edit() {
    grep -q "$1" "$src/train_gpt2.c" || {
        echo "train_gpt2.c has no '$1'; wanted llm.c as of 2024" >&2
        exit 1
    }
    sed -i "s/$1/$2/" "$src/train_gpt2.c"
}
edit 'int B = 4;' "int B = $3;"
edit 'int T = 64;' "int T = $4;"
edit 'step <= 40;' "step < $5;"
edit 'val_num_batches = 5;' 'val_num_batches = 0;'
make -C "$src" train_gpt2 CC="${CC:-gcc}" >"$2/make.log" 2>&1 || { tail -5 "$2/make.log" >&2; exit 1; }
mv "$src/train_gpt2" "$2/train_gpt2_$3x$4"
