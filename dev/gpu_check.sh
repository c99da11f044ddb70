#!/bin/sh
# make gpu-check: the kernel tests on the device, whole steps against the CPU, compute-sanitizer where there is one, then speeds,
# written to dev/bench/gpu-NAME.md. Wants the programs of the Makefile's target already built in $1.
set -eu
build=$1
command -v nvidia-smi >/dev/null 2>&1 || { echo "make gpu-check: no nvidia-smi here, so no usable GPU; 'make test' runs the same tests in the emulator" >&2; exit 1; }
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
            compute-sanitizer --tool "$tool" --error-exitcode 1 "$build/test_gpu_${t}_bf16" >"$build/sanitizer.log" 2>&1 || { tail -n 40 "$build/sanitizer.log"; exit 1; }
        done
    done
    sanitizer="compute-sanitizer memcheck and racecheck: the kernel tests pass, nothing reported"
fi

echo "== speed"
{
    echo "# $name"
    echo
    echo "Written by \`make gpu-check\`, $(date +%F), driver $driver, $(nvcc --version | grep -o 'release [0-9.]*'). The kernel tests and whole steps against the CPU"
    echo "pass on this device, in bf16 and fp32. $sanitizer."
    echo
    echo "| model | numbers | batch | ms a step: median (range) | tokens/s | MFU | memory |"
    echo "| --- | --- | --- | --- | --- | --- | --- |"
    "$build/bench_gpu_bf16" gpt2 gpt2-large
    "$build/bench_gpu_fp32" gpt2
} >"$out.tmp"
mv "$out.tmp" "$out"
cat "$out"
