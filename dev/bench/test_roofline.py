#!/usr/bin/env python3
"""Holds roofline.py to a real training step in the emulator: its launches and its bytes, which are counted,
and the FLOPs of its products, from their shapes.

    build/test_roofline      make copies this file there; count_step_emu is in the same folder

It runs in the project's folder. Its last line is "N passed, N failed".
"""
import json
import os
import re
import subprocess
import sys
import tempfile

BUILD = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.abspath("dev"), os.path.abspath(os.path.join("dev", "bench"))]
import gpu_check
import roofline

# roofline.py leaves out small reads and writes: AdamW's table of tensors (56 bytes each), the step's state,
# the report. TOLERANCE is their largest share of a row's bytes, in models as small as those below.
TOLERANCE = 0.002
HEAD_LOGITS = roofline.HEAD_LOGITS  # which compare() changes
passed = failed = 0


def check(name, fine, found=""):
    global passed, failed
    passed, failed = passed + bool(fine), failed + (not fine)
    if not fine:
        print(f"FAILED: {name}\n  {found}", flush=True)


def count(*flags):
    """What count_step.cu counts. Products are chosen anew, so that none is computed as an earlier run did."""
    with tempfile.TemporaryDirectory() as cache:
        run = subprocess.run([os.path.join(BUILD, "count_step_emu"), *map(str, flags)], capture_output=True,
                             text=True, env={**os.environ, "XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1"})
    if run.returncode:
        sys.exit(f"count_step_emu {' '.join(map(str, flags))}: exit code {run.returncode}\n{run.stderr}")
    return json.loads(run.stdout)


def rows_of(name, step):
    """The rows of roofline.py that a launch with this name is part of."""
    if name == "memset":
        return ("memset of accumulated gradients",)
    return tuple(gpu_check.rows_of(name, step["channels"], step["vocabulary"]))


def compare(case, step, micro_steps, five_products):
    roofline.VP, roofline.MAX_T = step["vocabulary"], step["seq_len"]
    roofline.MULTIPROCESSORS, roofline.HEAD_LOGITS = step["multiprocessors"], step["head_logits"]
    model = dict(L=step["layers"], NH=step["heads"], C=step["channels"])
    rows = {}
    for k in roofline.arapoet(model, step["batch"], step["seq_len"], micro_steps, five_products):
        row = rows.setdefault(k.name, [0, 0, 0])
        row[:] = row[0] + k.launches, row[1] + k.bytes, row[2] + k.flops
    counted, seen = {}, set()
    for k in step["kernels"]:
        parts = rows_of(k["name"], step)
        seen.update(parts)
        group = counted.setdefault(parts, [0, 0, 0])
        product = re.match(r"\w+ \w+ M (\d+) K (\d+) N (\d+) ", k["name"])
        M, K, N = map(int, product.groups()) if product else (0, 0, 0)
        group[:] = (group[0] + k["launches"], group[1] + k["read"] + k["written"],
                    group[2] + 2 * M * K * N * k["launches"])
    check(f"{case}: every row of roofline.py is launched, and nothing else", seen == set(rows),
          f"only there: {set(rows) - seen}; only launched: {seen - set(rows)}")
    written = {k["name"]: k["written"] for k in step["kernels"]}
    embedded = step["batch"] * step["seq_len"] * step["channels"] * roofline.BF16
    check(f"{case}: what is written counts as written",
          written["gpu::embedding_forward_kernel"] == micro_steps * embedded and
          [k["read"] for k in step["kernels"] if k["name"] == "memset"] == [0], written)
    worst = 0
    for parts, (launches, moved, flops) in counted.items():
        paper = [sum(rows[p][i] for p in parts if p in rows) for i in range(3)]
        name = f"{case}: {' and '.join(parts)}"
        check(f"{name}: launches", launches == paper[0], f"{launches} counted, {paper[0]} in roofline.py")
        difference = abs(moved - paper[1]) / moved
        worst = max(worst, difference)
        check(f"{name}: bytes", difference <= TOLERANCE,
              f"{moved:,} counted, {paper[1]:,.0f} in roofline.py, {100 * difference:.2f}% apart")
        if flops:
            check(f"{name}: FLOPs", flops == paper[2], f"{flops:,} counted, {paper[2]:,.0f} in roofline.py")
    total, on_paper = sum(g[1] for g in counted.values()), sum(r[1] for r in rows.values())
    print(f"{case}: {len(counted)} rows, {total / 1e6:.1f} MB, bytes {100 * worst:.2f}% apart at most")
    check(f"{case}: bytes of the step", abs(total - on_paper) <= TOLERANCE / 5 * total, (total, on_paper))


def formulas():
    """Numbers that are known from elsewhere."""
    m = roofline.MODELS["GPT-2 124M"]
    check("llm.c prints num_parameters 124475904 for 124M", roofline.parameters(m) == 124475904)
    flops = roofline.model_flops(m, 1024)
    check("llm.c's formula is 6 N + 6 L C T", flops["llm.c"] == 6 * 124475904 + 6 * 12 * 768 * 1024, flops)
    kernels = roofline.arapoet(m, 8, 1024)
    products = sum(k.flops for k in kernels if k.kind == "product")
    attention = sum(k.flops for k in kernels) - products
    per_token = flops["causal"] * 8 * 1024
    square = 2 * 8 * 1024 * 1024 * 768 / 2 * 12  # a causal product of all layers
    check("the products' FLOPs are those of the causal count without attention's six products",
          products == per_token - 6 * square, (products, per_token))
    check("attention computes 2 products forward and 7 backward", attention == 9 * square, attention / square)
    five = sum(k.flops for k in roofline.arapoet(m, 8, 1024, five_products=True))
    check("with five products two less", five == products + 7 * square, (five - products) / square)
    for g in roofline.GPUS:
        best, worst = roofline.forecast(kernels, g)
        check(f"{g}: the forecast is above the lower bound", roofline.lower_bound(kernels, g) < best < worst)


def bounds_of(step):
    bytes_of = {}
    for n in (2, 4):
        gpu = {"peak_flops": 1, "bandwidth": 1, "multiprocessors": n}
        bytes_of[n] = gpu_check.lower_bounds(step, gpu)["gradient norm"][1]
    check("gpu_check.py counts a norm's partial sums, 8 per multiprocessor, for the GPU that it is given",
          bytes_of[4] - bytes_of[2] == 8 * 2 * roofline.FP64, bytes_of)


def main():
    formulas()
    # T is a multiple of 64, because attention's statistics of a head are padded to that many rows, which
    # would count; it is no multiple of attention's 128 keys. The head computes in two chunks or in one.
    compare("two batches", count("--layers=2", "--heads=2", "--channels=64", "--batch=2", "--seq_len=192",
                                 "--vocabulary=400", "--micro_steps=2", f"--head_logits={200 * 512}"),
            2, False)
    step = count("--layers=1", "--heads=1", "--channels=48", "--batch=1", "--seq_len=320", "--vocabulary=330",
                 "--five_products", "--late_results")
    compare("five products", step, 1, True)
    check("HEAD_LOGITS is the trainer's", step["head_logits"] == HEAD_LOGITS, step["head_logits"])
    bounds_of(step)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
