#!/bin/sh
# make gpu-check: runs the kernels' tests and whole training steps on the device, and compute-sanitizer if it
# is installed; then measures speeds and writes them to dev/bench/gpu-NAME.md. The argument is the folder in
# which make device-programs has built the programs.
set -eu
build=$1
command -v nvidia-smi >/dev/null 2>&1 || {
    echo "make gpu-check: nvidia-smi is missing, so there is no usable GPU;" \
        "make test runs the same tests in the emulator" >&2
    exit 1
}
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
out=dev/bench/gpu-$(echo "$name" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-').md

for p in bf16 fp32; do
    for t in kernels attention model; do
        echo "== $t, $p, on the device"
        "$build/test_gpu_${t}_$p"
    done
done

sanitizer="compute-sanitizer is not installed, so memory and races were not checked on the device"
if command -v compute-sanitizer >/dev/null 2>&1; then
    for tool in memcheck racecheck; do
        for t in kernels attention; do
            echo "== compute-sanitizer $tool: $t"
            compute-sanitizer --tool "$tool" --error-exitcode 1 "$build/test_gpu_${t}_bf16" \
                >"$build/sanitizer.log" 2>&1 || { tail -n 40 "$build/sanitizer.log"; exit 1; }
        done
    done
    sanitizer="compute-sanitizer's memcheck and racecheck report nothing in the kernel tests"
fi

echo "== speed"
{
    echo "# $name"
    echo
    release=$(nvcc --version | grep -o 'release [0-9.]*')
    echo "Written by \`make gpu-check\` on $(date +%F), driver $driver, nvcc $release. The kernel tests pass"
    echo "on this device in bf16 and fp32, and whole steps agree with the CPU. $sanitizer."
    echo
    echo "| model | numbers | batch | ms per step: median (range) | tokens/s | MFU | memory |"
    echo "| --- | --- | --- | --- | --- | --- | --- |"
    "$build/bench_gpu_bf16" gpt2 gpt2-large
    "$build/bench_gpu_fp32" gpt2
} >"$out.tmp"
mv "$out.tmp" "$out"
cat "$out"
