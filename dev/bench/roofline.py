#!/usr/bin/env python3
"""Counts the memory traffic and the FLOPs of one GPU training step, on paper: make roofline

For every kernel of train_gpt2.cu it counts the launches, the FLOPs and the bytes that must move to or from
the GPU's memory. It counts the same for llm.c's train_gpt2.cu without cuDNN, which computes T x T attention
with permute passes, holds all logits at once and keeps gradients in bf16. It writes dev/bench/ROOFLINE.md.
With --check it writes nothing, and fails if the committed file differs.

How it counts: A tensor that a kernel reads or writes counts once per kernel, in the type it is stored in,
since repeated reads are served by a cache. A tensor that is updated in place counts twice. A product of (M,K)
by (K,N) takes 2MKN FLOPs. Attention counts the causal half where tiles above the diagonal are skipped, and
the full square in llm.c. A kernel's lower bound is the longer of two times: its FLOPs at the peak rate and
its bytes at the peak bandwidth. A step's lower bound is the sum over its kernels, so no two kernels overlap.
"""
import argparse, collections, os, sys, textwrap

BF16, FP32 = 2, 4
MODELS = {"GPT-2 124M": dict(L=12, NH=12, C=768), "GPT-2 774M": dict(L=36, NH=20, C=1280)}
V, VP, MAX_T = 50257, 50304, 1024
# dense bf16 FLOP/s and bytes/s, from NVIDIA's data sheets (A100 80 GB SXM; H100 SXM)
GPUS = {"A100": (312e12, 2.039e12), "H100": (989.4e12, 3.35e12)}
HEAD_LOGITS = 1 << 27  # held at once, as in train_gpt2.cu

Kernel = collections.namedtuple("Kernel", "name launches flops bytes gemm")


def parameters(m):
    L, C = m["L"], m["C"]
    return VP * C + MAX_T * C + L * (12 * C * C + 13 * C) + 2 * C


class Step:
    """Collects the kernels of a step. MC is the bytes of an (M,C) activation in bf16."""

    adds = False  # whether a product adds to the parameter gradients in memory or overwrites them

    def __init__(self, m, B, T):
        self.kernels, self.L, self.C, self.NH = [], m["L"], m["C"], m["NH"]
        self.B, self.T, self.M = B, T, B * T
        self.P, self.MC = parameters(m), B * T * m["C"] * BF16

    def add(self, name, bytes, flops=0, launches=1, times=1, gemm=False):
        self.kernels.append(Kernel(name, launches * times, flops * times, bytes * times, gemm))

    def product(self, name, M, K, N, out, extra=0, reads_out=False, times=1):
        """out: bytes of one element of the result; extra: bytes of what else the epilogue reads or writes."""
        moved = (M * K + K * N) * BF16 + M * N * out * (2 if reads_out else 1) + extra
        self.add(name, moved, 2 * M * K * N, times=times, gemm=True)

    def linear_backward(self, name, K, N, gradient, extra=0):
        """dX = dY W and dW = dY^T X for all layers. gradient: bytes of one parameter's gradient, which a
        step's first batch overwrites."""
        self.product(name + " dX", self.M, N, K, BF16, extra, times=self.L)
        self.product(name + " dW", N, self.M, K, gradient, reads_out=self.adds, times=self.L)


def arapoet(m, B, T):
    s = Step(m, B, T)
    L, C, M, MC, P = s.L, s.C, s.M, s.MC, s.P
    stats = 2 * M * FP32
    square = 2 * B * s.NH * T * T / 2 * (C // s.NH)  # FLOPs of one causal T x T x hs product
    s.add("memset of accumulated gradients", (MAX_T * C + L * 13 * C + 2 * C) * FP32, launches=5)
    s.add("embedding_forward", 2 * MC)
    s.add("layernorm_forward", 2 * MC + stats)
    s.product("qkv", M, C, 3 * C, BF16, times=L)
    s.add("attention_forward", 4 * MC + M * s.NH * FP32, 2 * square, times=L)
    s.product("attproj", M, C, C, BF16, times=L)
    s.add("residual_layernorm_forward", 4 * MC + stats, times=2 * L)
    s.product("fc + GELU", M, C, 4 * C, BF16, extra=4 * MC, times=L)
    s.product("fcproj", M, 4 * C, C, BF16, times=L)
    chunks = -(-M // (HEAD_LOGITS // VP))
    rows = M / chunks
    s.product("head logits", rows, C, VP, BF16, times=chunks)
    s.add("cross_entropy", 2 * rows * VP * BF16, times=chunks)
    s.product("head dX", rows, VP, C, BF16, times=chunks)
    s.product("head dW", VP, rows, C, FP32)
    s.product("head dW, later chunks", VP, rows, C, FP32, reads_out=True, times=chunks - 1)
    s.add("sum_losses", M * 2 * FP32)
    s.add("layernorm_backward", 4 * MC + stats, launches=2, times=2 * L)
    s.add("layernorm_backward (last)", 3 * MC + stats, launches=2)
    s.linear_backward("fcproj", 4 * C, C, FP32, extra=4 * MC)
    s.linear_backward("fc", C, 4 * C, FP32)
    s.linear_backward("attproj", C, C, FP32)
    s.linear_backward("qkv", C, 3 * C, FP32)
    s.add("bias gradients (from BGRADB)", 9 * C * 3 * FP32 / 4, launches=4, times=L)
    s.add("attention_backward dQ", 6 * MC + M * s.NH * 2 * FP32, 3 * square, times=L)
    s.add("attention_backward dK dV", 6 * MC + M * s.NH * 2 * FP32, 4 * square, times=L)
    s.add("embedding_backward", 2 * MC + 2 * MC * FP32 // BF16 + 2 * T * C * FP32, launches=3)
    s.add("gradient norm", P * FP32)
    s.add("AdamW", P * (FP32 + 6 * FP32 + BF16))
    return s.kernels


def llmc(m, B, T):
    """As read from llm.c's train_gpt2.cu and llmc/*.cuh: no cuDNN, nothing recomputed, fp32 master weights,
    GELU in cuBLASLt's epilogues (llm.c's default on an H100; on an A100 it makes two more passes)."""
    s = Step(m, B, T)
    s.adds = True
    L, C, M, MC, P = s.L, s.C, s.M, s.MC, s.P
    hs, stats, TT = C // s.NH, 2 * M * FP32, B * s.NH * T * T * BF16
    square = 2 * B * s.NH * T * T * hs
    s.add("memset of gradients", P * BF16)
    s.add("encoder_forward", 2 * MC)
    s.add("layernorm_forward", 2 * MC + stats)
    s.product("qkv", M, C, 3 * C, BF16, times=L)
    s.add("permute", 6 * MC, times=L)
    s.add("QK^T", 2 * MC + TT, square, times=L, gemm=True)
    s.add("softmax_forward", TT, times=L)  # reads and writes the lower triangle
    s.add("att V", 2 * MC + TT, square, times=L, gemm=True)
    s.add("unpermute", 2 * MC, times=L)
    s.product("attproj", M, C, C, BF16, times=L)
    s.add("fused_residual_forward", 4 * MC + stats, times=2 * L)
    s.product("fc + GELU", M, C, 4 * C, BF16, extra=4 * MC, times=L)
    s.product("fcproj", M, 4 * C, C, BF16, times=L)
    s.product("head logits", M, C, VP, BF16)
    s.add("fused_classifier", 2 * M * VP * BF16)
    s.product("head dX", M, VP, C, BF16)
    s.product("head dW", VP, M, C, BF16, reads_out=True)
    s.add("layernorm_backward", 4 * MC + stats, times=2 * L + 1)
    s.linear_backward("fcproj", 4 * C, C, BF16, extra=4 * MC)
    s.linear_backward("fc", C, 4 * C, BF16)
    s.linear_backward("attproj", C, C, BF16)
    s.linear_backward("qkv", C, 3 * C, BF16)
    s.add("matmul_backward_bias", 9 * MC, launches=8, times=L)
    s.add("unpermute_backward", 2 * MC, times=L)
    s.add("dAtt, dV, dQ, dK", 4 * TT + 8 * MC, 4 * square, launches=4, times=L, gemm=True)
    s.add("softmax_backward", 2 * TT, times=L)  # reads two lower triangles, writes a whole square
    s.add("permute_backward", 6 * MC, times=L)
    s.add("encoder_backward", 2 * MC + 2 * MC + 2 * T * C * BF16, launches=2)
    s.add("global norm", P * BF16, launches=17)
    s.add("AdamW", P * (BF16 + 6 * FP32 + BF16), launches=16)
    return s.kernels


def totals(kernels):
    other = [k for k in kernels if not k.gemm]
    return dict(launches=sum(k.launches for k in kernels), flops=sum(k.flops for k in kernels),
                gemm=sum(k.bytes for k in kernels if k.gemm), other=sum(k.bytes for k in other),
                bound={g: sum(max(k.flops / f, k.bytes / b) for k in kernels) for g, (f, b) in GPUS.items()})


def report():
    out = ["# The traffic budget of a GPU training step", ""]
    rules = " ".join(__doc__.split("\n\n")[2].split()).split(": ", 1)[1]
    peaks = ", ".join(f"{g} {f / 1e12:.0f} TFLOP/s and {b / 1e12:.2f} TB/s" for g, (f, b) in GPUS.items())
    origin = ("Written by dev/bench/roofline.py (`make roofline`). Nothing on this page is measured: it is "
              "arithmetic on the shapes, in bf16, at T = 1024, with one batch a step, dropout 0 and nothing "
              f"recomputed. The peaks are the data sheets': {peaks}.")
    out += [textwrap.fill(rules, 110), "", textwrap.fill(origin, 110), ""]
    out += ["## Totals", "",
            "| model | B | | launches | TFLOP | product GB | other GB | other, share of llm.c's "
            "| lower bound, A100 | lower bound, H100 |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    worst = 0
    for name, m in MODELS.items():
        for B in (8, 16, 32):
            ours, theirs = totals(arapoet(m, B, 1024)), totals(llmc(m, B, 1024))
            share = ours["other"] / theirs["other"]
            worst = max(worst, share)
            for who, t, s in (("Arapoet", ours, f"{100 * share:.0f}%"), ("llm.c", theirs, "")):
                out.append(f"| {name} | {B} | {who} | {t['launches']} | {t['flops'] / 1e12:.2f} "
                           f"| {t['gemm'] / 1e9:.1f} | {t['other'] / 1e9:.1f} | {s} | "
                           + " | ".join(f"{1e3 * t['bound'][g]:.1f} ms" for g in GPUS) + " |")
    out += ["", "\"Other\" is everything except matrix products. Its largest share of llm.c's is "
            f"{100 * worst:.0f}%; the goal was at most 60%."]
    for name, m in MODELS.items():
        for who, kernels in (("Arapoet", arapoet(m, 8, 1024)), ("llm.c", llmc(m, 8, 1024))):
            out += ["", f"## {name}, B = 8: {who}", "",
                    "| kernel | launches | GFLOP | MB | lower bound, A100 | lower bound, H100 |",
                    "| --- | --- | --- | --- | --- | --- |"]
            for k in kernels:
                bound = [1e6 * max(k.flops / f, k.bytes / b) for f, b in GPUS.values()]
                out.append(f"| {k.name}{' (product)' if k.gemm else ''} | {k.launches} | {k.flops / 1e9:.1f} "
                           f"| {k.bytes / 1e6:.1f} | {bound[0]:.0f} us | {bound[1]:.0f} us |")
    return "\n".join(out) + "\n", worst


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--check", action="store_true", help="compare with the committed file, and write nothing")
    a = p.parse_args()
    path, (text, worst) = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ROOFLINE.md"), report()
    if worst > 0.6:
        sys.exit(f"roofline.py: {100 * worst:.0f}% of llm.c's bytes outside the products, "
                 "at most 60% is allowed")
    if a.check:
        if not os.path.exists(path) or open(path, encoding="utf-8").read() != text:
            sys.exit(f"roofline.py: {path} differs from what this script computes; run: make roofline")
        print("dev/bench/ROOFLINE.md matches what roofline.py computes")
    else:
        open(path, "w", encoding="utf-8").write(text)
        print(f"wrote {path}: at most {100 * worst:.0f}% of llm.c's bytes outside the products")


if __name__ == "__main__":
    main()
