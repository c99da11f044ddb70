#!/usr/bin/env python3
"""Counts the memory traffic and the FLOPs of one GPU training step, on paper: make roofline

For every kernel of train_gpt2.cu it counts the launches, the FLOPs and the bytes that must move to or from
the GPU's memory, and the same for llm.c's train_gpt2.cu. From that it computes a lower bound of a step's
time, and a forecast. It writes dev/bench/ROOFLINE.md; with --check it writes nothing, and fails if the
committed file differs. dev/bench/test_roofline.py holds launches and bytes to those of an emulated step.
"""
import argparse, collections, os, sys, textwrap

# How it counts: the page's first paragraph.
COUNTING = """A tensor that a kernel reads or writes counts once per kernel, in the type it is stored in,
since repeated reads are served by a cache. A tensor that is updated in place counts twice. All tokens of a
batch are taken to be different. A product of (M,K) by (K,N) takes 2MKN FLOPs. Attention counts the causal
half where tiles above the diagonal are skipped, and the full square in llm.c without cuDNN. A kernel's lower
bound is the longer of two times: its FLOPs at the peak rate and its bytes at the peak bandwidth. A step's
lower bound is the sum over its kernels, so no two kernels overlap."""

BF16, FP32, FP64 = 2, 4, 8
MODELS = {"GPT-2 124M": dict(L=12, NH=12, C=768), "GPT-2 350M": dict(L=24, NH=16, C=1024),
          "GPT-2 774M": dict(L=36, NH=20, C=1280), "GPT-2 1558M": dict(L=48, NH=25, C=1600)}
V, VP, MAX_T = 50257, 50304, 1024
# Dense bf16 FLOP/s and bytes/s, from NVIDIA's data sheets (A100 80 GB SXM; H100 SXM; H200 SXM) and NVIDIA's
# Ada architecture white paper (GeForce RTX 4090, products summed in fp32).
GPUS = {"A100": (312e12, 2.039e12), "H100": (989.4e12, 3.35e12), "H200": (989.4e12, 4.8e12),
        "RTX 4090": (165.2e12, 1.008e12)}
# Some kernels write a partial sum for each block, and have 2 or 8 blocks per multiprocessor. The tables are
# for the 132 of an H100 SXM (NVIDIA's H100 white paper).
MULTIPROCESSORS = 132
HEAD_LOGITS = 1 << 27  # held at once: GPT2::head_logits in train_gpt2.cu

# kind: "product", "attention" or "other". It decides which share of the peak a forecast assumes; the FLOPs of
# the others do not count.
Kernel = collections.namedtuple("Kernel", "name launches flops bytes kind")


def parameters(m):
    L, C = m["L"], m["C"]
    return VP * C + MAX_T * C + L * (12 * C * C + 13 * C) + 2 * C


def ceil_div(a, b):
    return -(-a // b)


class Step:
    """Collects the kernels of a step. MC is the bytes of an (M,C) activation in bf16, `square` the FLOPs of
    one T x T x hs product of all heads, `stats` the bytes of a LayerNorm's mean and rstd."""

    adds = False  # whether a product adds to the parameter gradients in memory or overwrites them

    def __init__(self, m, B, T):
        self.kernels, self.L, self.C, self.NH = [], m["L"], m["C"], m["NH"]
        self.B, self.T, self.M, self.hs = B, T, B * T, m["C"] // m["NH"]
        self.P, self.MC = parameters(m), B * T * m["C"] * BF16
        self.square, self.stats = 2 * B * T * T * m["C"], 2 * B * T * FP32

    def add(self, name, bytes, flops=0, launches=1, times=1, kind="other"):
        self.kernels.append(Kernel(name, launches * times, flops * times, bytes * times, kind))

    def attention(self, name, bytes, flops=0):
        self.add(name, bytes, flops, times=self.L, kind="attention")

    def product(self, name, M, K, N, out, extra=0, reads_out=False, times=1):
        """out: bytes of one element of the result; extra: bytes of what else the epilogue reads or writes."""
        moved = (M * K + K * N) * BF16 + M * N * out * (2 if reads_out else 1) + extra
        self.add(name, moved, 2 * M * K * N, times=times, kind="product")

    def linear_backward(self, name, K, N, gradient, extra=0, bias=0):
        """dX = dY W and dW = dY^T X for all layers. gradient, bias: bytes of one element of dW and of db;
        bias = 0 if the product does not compute db. A step's first batch overwrites the gradients."""
        self.product(name + " dX", self.M, N, K, BF16, extra, times=self.L)
        self.product(name + " dW", N, self.M, K, gradient, N * bias, self.adds, times=self.L)


def layernorm_partials(M, C):
    """Bytes of layernorm_backward's partial sums."""
    warps = 1
    while warps * 768 < C:
        warps *= 2
    return min(2 * MULTIPROCESSORS, ceil_div(M, max(1, 8 // warps))) * 2 * C * FP32


def arapoet(m, B, T, micro_steps=1, five_products=False):
    """A step of micro_steps batches, dropout 0, nothing recomputed. Of train_gpt2.cu's switches it models
    five_products. late_results changes nothing here, only when the host waits. The others are off."""
    s = Step(m, B, T)
    L, C, P = s.L, s.C, s.P
    s.add("memset of accumulated gradients", (MAX_T * C + L * 13 * C + 2 * C) * FP32, launches=L + 3)
    for i in range(micro_steps):
        s.adds = i > 0
        arapoet_pass(s, five_products)
    partials = min(8 * MULTIPROCESSORS, ceil_div(P, 1024)) * FP64
    s.add("gradient norm", P * FP32 + partials)
    s.add("AdamW", P * (FP32 + 6 * FP32 + BF16) + partials)
    return s.kernels


def arapoet_pass(s, five_products):
    L, C, T, M, MC, stats, square = s.L, s.C, s.T, s.M, s.MC, s.stats, s.square / 2  # the causal half
    head_stats = M * s.NH * 2 * FP32  # of each query of each head: lse and D
    s.add("embedding_forward", 2 * MC + T * C * BF16 + M * 4)
    s.add("layernorm_forward", 2 * MC + stats + 2 * C * BF16)
    s.product("qkv", M, C, 3 * C, BF16, extra=3 * C * BF16, times=L)
    s.attention("attention_forward", 4 * MC + M * s.NH * FP32, 2 * square)
    s.product("attproj", M, C, C, BF16, extra=C * BF16, times=L)
    s.add("residual_layernorm_forward", 4 * MC + stats + 2 * C * BF16, times=2 * L)
    s.product("fc + GELU", M, C, 4 * C, BF16, extra=4 * MC + 4 * C * BF16, times=L)
    s.product("fcproj", M, 4 * C, C, BF16, extra=C * BF16, times=L)
    parts = ceil_div(M, HEAD_LOGITS // VP)
    chunks = ceil_div(M, ceil_div(ceil_div(M, parts), 8) * 8)
    rows = M / chunks
    s.product("head logits", rows, C, VP, BF16, times=chunks)
    s.add("cross_entropy", 2 * rows * VP * BF16 + rows * (4 + FP32), times=chunks)
    s.product("head dX", rows, VP, C, BF16, times=chunks)
    s.product("head dW", VP, rows, C, FP32, reads_out=s.adds)
    s.product("head dW, later chunks", VP, rows, C, FP32, reads_out=True, times=chunks - 1)
    s.add("sum_losses", M * (4 + FP32) + 2 * (FP64 + 8) + FP32)  # also loss and count, in place; grad_scale
    sums = 2 * layernorm_partials(M, C) + 4 * C * FP32 + C * BF16
    s.add("layernorm_backward", 4 * MC + stats + sums, launches=2, times=2 * L)
    s.add("layernorm_backward (last)", 3 * MC + stats + sums, launches=2)
    s.linear_backward("fcproj", 4 * C, C, FP32, extra=4 * MC, bias=FP32)
    s.linear_backward("fc", C, 4 * C, FP32, bias=FP32)
    s.linear_backward("attproj", C, C, FP32, bias=FP32)
    s.linear_backward("qkv", C, 3 * C, FP32, bias=FP32)
    s.add("bias gradients (from BGRADB)", 9 * C * 3 * FP32, launches=4, times=L)
    if five_products:
        blocks = ceil_div(T, 128)  # each owns 128 keys, and writes a part of dQ of the queries that see them
        parts = s.B * C * (blocks * T - 128 * (blocks * (blocks - 1) // 2)) * FP32
        s.attention("attention_row_stats", 2 * MC + head_stats * 3 / 2)
        s.attention("attention_backward dK dV", 6 * MC + head_stats + parts, 5 * square)
        s.attention("attention_add_dq", MC + parts)
    else:
        s.attention("attention_backward dQ", 6 * MC + head_stats * 3 / 2, 3 * square)
        s.attention("attention_backward dK dV", 6 * MC + head_stats, 4 * square)
    s.add("embedding_backward", 2 * MC + 2 * M * C * FP32 + 2 * T * C * FP32 + 3 * M * 4,
          launches=3 if M > 64 else 2)


# ---------------------------------------------------------------------------------------------
# llm.c, as read from its train_gpt2.cu and llmc/*.cuh; defaults and MFU are those of commit 5afc570. Its
# flags: -r recomputes activations in backward (0 nothing, 1 GELU), -ge computes GELU in cuBLASLt's epilogues
# (0 never, 1 forward, 2 both), -z divides AdamW's state among GPUs. Weights and partial sums of LayerNorms,
# biases and positions, about one percent, are left out.

LLMC = {"llm.c as published": dict(cudnn=True, recompute=0, gelu_fusion=0),
        "llm.c by default": dict(cudnn=False, recompute=1, gelu_fusion=0)}


def llmc(m, B, T, cudnn, recompute, gelu_fusion, micro_steps=1):
    """Gradients in bf16, fp32 master weights, all logits at once. cuDNN's attention counts as one launch
    forward and one backward, which move what they must."""
    s = Step(m, B, T)
    s.adds = True
    s.add("memset of gradients", s.P * BF16)
    for _ in range(micro_steps):
        llmc_pass(s, cudnn, recompute, gelu_fusion)
    s.add("global norm", s.P * BF16, launches=17)
    s.add("AdamW", s.P * (BF16 + 6 * FP32 + BF16), launches=16)
    return s.kernels


def llmc_pass(s, cudnn, recompute, gelu_fusion):
    L, C, T, M, MC, stats, square = s.L, s.C, s.T, s.M, s.MC, s.stats, s.square
    TT = s.B * s.NH * T * T * BF16
    s.add("encoder_forward", 2 * MC)
    s.add("layernorm_forward", 2 * MC + stats)
    s.product("qkv", M, C, 3 * C, BF16, times=L)
    if cudnn:
        s.attention("attention_forward_cudnn", 4 * MC + M * s.NH * FP32, 2 * square / 2)
    else:
        s.add("permute", 6 * MC, times=L)
        s.add("QK^T", 2 * MC + TT, square, times=L, kind="product")
        s.add("softmax_forward", TT, times=L)  # reads and writes the lower triangle
        s.add("att V", 2 * MC + TT, square, times=L, kind="product")
        s.add("unpermute", 2 * MC, times=L)
    s.product("attproj", M, C, C, BF16, times=L)
    s.add("fused_residual_forward", 4 * MC + stats, times=2 * L)
    if gelu_fusion:
        s.product("fc + GELU", M, C, 4 * C, BF16, extra=4 * MC, times=L)
    else:
        s.product("fc", M, C, 4 * C, BF16, times=L)
        s.add("gelu_forward", 8 * MC, times=L)
    s.product("fcproj", M, 4 * C, C, BF16, times=L)
    s.product("head logits", M, C, VP, BF16)
    s.add("fused_classifier", 2 * M * VP * BF16)
    s.product("head dX", M, VP, C, BF16)
    s.product("head dW", VP, M, C, BF16, reads_out=True)
    s.add("layernorm_backward", 4 * MC + stats, times=2 * L + 1)
    if recompute:
        s.add("gelu_forward, recomputed", 8 * MC, times=L)
    s.linear_backward("fcproj", 4 * C, C, BF16, extra=4 * MC if gelu_fusion == 2 else 0)
    if gelu_fusion < 2:
        s.add("gelu_backward_inplace", 12 * MC, times=L)
    s.linear_backward("fc", C, 4 * C, BF16)
    s.linear_backward("attproj", C, C, BF16)
    s.linear_backward("qkv", C, 3 * C, BF16)
    s.add("matmul_backward_bias", 9 * MC, launches=8, times=L)
    if cudnn:
        s.attention("attention_backward_cudnn", 8 * MC + M * s.NH * FP32, 5 * square / 2)
    else:
        s.add("unpermute_backward", 2 * MC, times=L)
        s.add("dAtt, dV, dQ, dK", 4 * TT + 8 * MC, 4 * square, launches=4, times=L, kind="product")
        s.add("softmax_backward", 2 * TT, times=L)  # reads two lower triangles, writes a whole square
        s.add("permute_backward", 6 * MC, times=L)
    s.add("encoder_backward", 2 * MC + 2 * MC + 2 * T * C * BF16, launches=2)


def llmc_least_traffic(m, B, T):
    """Without cuDNN, with the flags that move the least: what the goal for Arapoet's bytes is measured by."""
    return llmc(m, B, T, cudnn=False, recompute=0, gelu_fusion=2)


# What llm.c's scripts/run_gpt2_*.sh say of their own runs on eight GPUs, all built with USE_CUDNN=1, with
# -r 0 -z 1: sequences at once on each GPU, tokens and seconds of a step, -ge.
Published = collections.namedtuple("Published", "model gpu B tokens seconds gelu_fusion")
PUBLISHED = [Published("GPT-2 124M", "A100", 64, 524288, 0.3, 0),
             Published("GPT-2 350M", "A100", 64, 524288, 0.82, 0),
             Published("GPT-2 774M", "A100", 32, 524288, 1.7, 0),
             Published("GPT-2 1558M", "H100", 16, 1048576, 2.8, 1)]
# What llm.c takes for a GPU's peak (llmc/mfu.h): its H100 SXM is an H100 PCIe scaled by tensor cores and
# clock. It does not know an H200.
LLMC_PEAKS = {"A100": 312e12, "H100": 756e12 * 528 / 456 * 1830 / 1620, "RTX 4090": 165.2e12}

# ---------------------------------------------------------------------------------------------
# Shares of the peak, and the forecast


def model_flops(m, T):
    """FLOPs of a token, forward and backward, counted in three ways."""
    L, C = m["L"], m["C"]
    attention, weights = 6 * L * C * T, 12 * L * C * C + VP * C
    return {"causal": 6 * weights + attention, "llm.c": 6 * parameters(m) + attention,
            "full square": 6 * weights + 2 * attention}


# What is assumed, as (best, worst). The rates are shares of the peaks in GPUS; gaps are in seconds.
PRODUCTS, MEMORY = (0.75, 0.60), (0.90, 0.85)
ATTENTION = {"A100": (0.50, 0.25), "H100": (0.35, 0.175), "H200": (0.35, 0.175), "RTX 4090": (0.50, 0.25)}
LAUNCH_GAP, HOST_GAP = (1e-6, 2e-6), (20e-6, 100e-6)


def forecast(kernels, gpu):
    """Seconds of a step, (best, worst)."""
    peak, bandwidth = GPUS[gpu]
    times = []
    for i in (0, 1):
        share = {"product": PRODUCTS[i], "attention": ATTENTION[gpu][i], "other": 1}
        work = sum(max(k.flops / (peak * share[k.kind]), k.bytes / (bandwidth * MEMORY[i])) for k in kernels)
        times.append(work + sum(k.launches for k in kernels) * LAUNCH_GAP[i] + HOST_GAP[i])
    return times


def lower_bound(kernels, gpu):
    peak, bandwidth = GPUS[gpu]
    return sum(max(k.flops / peak, k.bytes / bandwidth) for k in kernels)


# ---------------------------------------------------------------------------------------------
# The page


def totals(kernels):
    other = [k for k in kernels if k.kind != "product"]
    return dict(launches=sum(k.launches for k in kernels), flops=sum(k.flops for k in kernels),
                gemm=sum(k.bytes for k in kernels if k.kind == "product"), other=sum(k.bytes for k in other),
                bound={g: lower_bound(kernels, g) for g in GPUS})


def paragraph(text):
    return [textwrap.fill(" ".join(text.split()), 110, break_on_hyphens=False), ""]


def table(*rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:], ""]


def span(low, high, digits=1):
    """Two numbers, the smaller one first."""
    return f"{low:,.{digits}f} to {high:,.{digits}f}"


def percents(low, high):
    return f"{100 * low:.0f} to {100 * high:.0f}%"


def totals_section():
    rows = [["model", "B", "", "launches", "TFLOP", "product GB", "other GB",
             "Arapoet's other bytes, share of these", *(f"lower bound, {g}" for g in GPUS)]]
    worst = 0
    for name in ("GPT-2 124M", "GPT-2 774M"):
        m = MODELS[name]
        for B in (8, 16, 32):
            ours = totals(arapoet(m, B, 1024))
            worst = max(worst, ours["other"] / totals(llmc_least_traffic(m, B, 1024))["other"])
            for who, t in (("Arapoet", ours), *((n, totals(llmc(m, B, 1024, **f))) for n, f in LLMC.items())):
                rows.append([name, B, who, t["launches"], f"{t['flops'] / 1e12:.2f}",
                             f"{t['gemm'] / 1e9:.1f}", f"{t['other'] / 1e9:.1f}",
                             "" if t is ours else f"{100 * ours['other'] / t['other']:.0f}%",
                             *(f"{1e3 * b:.1f} ms" for b in t["bound"].values())])
    text = f""""Other" is everything except matrix products. llm.c as published is built with USE_CUDNN=1 and
        runs with -r 0 and -ge 0, as its scripts for 124M to 774M do. By default it is built without cuDNN,
        computes T x T attention with permute passes, and recomputes GELU (-r 1); its -ge is 0 on every GPU,
        although its help says 2 for Hopper. Arapoet's other bytes are at most {100 * worst:.0f}% of those of
        llm.c without cuDNN and with the flags that move the least (-r 0, -ge 2); the goal was at most 60%.
        cuDNN's attention moves less than Arapoet's: its backward pass reads Q, K, V and dO once, Arapoet's
        two kernels read them twice. Compared with llm.c as published, Arapoet also moves more because its
        gradients are fp32, not bf16, and less because GELU and the bias gradients are computed in products.
        The 24 GB of an RTX 4090 do not hold every row; the bounds are computed anyway."""
    return ["## Totals", "", *table(*rows), *paragraph(text)], worst


def counts_section():
    rows = [["model", "causal", "llm.c's formula", "full square"]]
    for name, m in MODELS.items():
        rows.append([name, *(f"{n / 1e6:,.1f}" for n in model_flops(m, 1024).values())])
    return ["## FLOPs of a token, in millions, at T = 1024", "", *table(*rows), *paragraph("""Causal: 6 for
        each weight of a matrix product, the padded output layer included, and 6 L C T for attention: two
        products forward and four backward, the half below the diagonal. llm.c's formula (gpt2_estimate_mfu
        in its train_gpt2.cu) is 6 N + 6 L C T, with all parameters in N, also positions, LayerNorms and
        biases; so it counts attention as causal too. Full square: 6 for each weight of a product and
        12 L C T, as nanoGPT's estimate_mfu and PaLM (Chowdhery et al. 2022) count attention. What is computed
        again in attention's backward pass counts in none of them. MFU is these FLOPs per second over the
        peak.""")]


def forecast_section():
    rows = [["model", "B", "GPU", "lower bound, ms", "forecast, ms", "forecast, five products, ms",
             "tokens/s", "MFU, causal", "MFU, llm.c's formula", "MFU, full square"]]
    for name, B in (("GPT-2 124M", 8), ("GPT-2 124M", 32), ("GPT-2 774M", 8)):
        m = MODELS[name]
        for g, (peak, _) in GPUS.items():
            best, worst = forecast(kernels := arapoet(m, B, 1024), g)
            rate, slow, f = B * 1024 / best, B * 1024 / worst, model_flops(m, 1024)
            five = forecast(arapoet(m, B, 1024, five_products=True), g)
            mfu = [percents(n * slow / p, n * rate / p) if p else "llm.c has no H200 peak"
                   for n, p in ((f["causal"], peak), (f["llm.c"], LLMC_PEAKS.get(g)),
                                (f["full square"], peak))]
            rows.append([name, B, g, f"{1e3 * lower_bound(kernels, g):.1f}", span(1e3 * best, 1e3 * worst),
                         span(*(1e3 * t for t in five)), span(slow, rate, 0), *mfu])
    a100, h100 = ATTENTION["A100"], ATTENTION["H100"]
    text = f"""A forecast, not a measurement: Arapoet has not been run on a GPU. It is the sum over the
        kernels of the longer of two times, as in the lower bound, but at assumed shares of the peaks. Matrix
        products: {percents(*PRODUCTS[::-1])} of the FLOPs. Bytes: {percents(*MEMORY[::-1])} of the bandwidth.
        Attention on an A100: {percents(*a100[::-1])} of the FLOPs. FlashAttention-2 reaches 50 to 73% there
        (Dao 2023, arXiv:2307.08691, abstract). With 64 channels a head and T = 1024, its authors' newer
        kernels reach half as much with the causal mask as without (github.com/Dao-AILab/flash-attention,
        pull request 2605, on a B200). Hence {100 * a100[0]:.0f}% as the best case and {100 * a100[1]:.0f}%
        as the worst. Attention on an H100 and an H200: {100 * h100[1]:.1f} to {100 * h100[0]:.0f}%, because
        FlashAttention-2 reaches 35% on an H100; FlashAttention-3's 75% (Shah et al. 2024, arXiv:2407.08608,
        abstract) takes wgmma and TMA, which Arapoet's kernels do not use. Attention on an RTX 4090: the
        A100's shares, because its tensor-core instructions are the same; no published rate was found. cuDNN's
        attention, in the forecasts for llm.c below, is assumed to reach the same shares. They are shares of
        all products that are computed: in the backward pass seven, or five with the switch five_products and
        in cuDNN. Gaps:
        {LAUNCH_GAP[0] * 1e6:.0f} to {LAUNCH_GAP[1] * 1e6:.0f} us after each kernel in the graph, and per
        step {HOST_GAP[0] * 1e6:.0f} to {HOST_GAP[1] * 1e6:.0f} us during which the GPU waits for the host,
        which the switch late_results would hide. The shares of products and bandwidth and the gaps are
        assumed without a source. `make gpu-check` measures what this forecasts."""
    return ["## Forecast", "", *table(*rows), *paragraph(text)]


def published_section():
    rows = [["model", "GPUs", "B", "flags", "ms per step", "tokens/s on each", "MFU, llm.c's formula",
             "MFU, causal", "the forecast for llm.c, tokens/s", "the forecast for Arapoet, tokens/s"]]
    outside = []  # of the forecast for llm.c
    for p in PUBLISHED:
        m, f, micro_steps = MODELS[p.model], model_flops(MODELS[p.model], 1024), p.tokens // (8 * p.B * 1024)
        tokens, rate = p.tokens / 8, p.tokens / 8 / p.seconds
        theirs = llmc(m, p.B, 1024, True, 0, p.gelu_fusion, micro_steps)
        forecasts = [forecast(kernels, p.gpu) for kernels in (theirs, arapoet(m, p.B, 1024, micro_steps))]
        rows.append([p.model, f"8 x {p.gpu}", p.B, f"-r 0 -z 1 -ge {p.gelu_fusion}",
                     f"{1e3 * p.seconds:,.0f}", f"{rate:,.0f}",
                     f"{100 * f['llm.c'] * rate / LLMC_PEAKS[p.gpu]:.0f}%",
                     f"{100 * f['causal'] * rate / GPUS[p.gpu][0]:.0f}%",
                     *(span(tokens / worst, tokens / best, 0) for best, worst in forecasts)])
        low, high = (tokens / t for t in forecasts[0][::-1])
        if not low <= rate <= high:
            outside.append(f"{p.model}'s {rate:,.0f} tokens/s lie {'below' if rate < low else 'above'} it")
    return ["## llm.c's published figures", "", *table(*rows), *paragraph(f"""Milliseconds and flags are those
        of scripts/run_gpt2_124M.sh, _774M.sh, _1558M.sh (commit 039904e) and _350M.sh (commit 100bba0) of
        github.com/karpathy/llm.c. Their comments give about 300 ms, 1.7 s, 2.80 s and 820 ms for a step on
        eight GPUs, the A100 and H100 SXM with 80 GB. All are built with cuDNN. Where -ge is not given it is
        0. Rates and MFU are computed here from these figures. They include the exchange of gradients among
        the eight GPUs. The forecasts, one GPU with the same batches a step, do not. The forecast for
        llm.c shows how far the assumptions can be trusted: {len(PUBLISHED) - len(outside)} of the
        {len(PUBLISHED)} figures lie inside it, {" and ".join(outside)}. A part of that gap may be the
        exchange of gradients, which the forecast leaves out.""")]


def kernels_section(name, who, kernels):
    rows = [["kernel", "launches", "GFLOP", "MB", *(f"lower bound, {g}" for g in GPUS)]]
    for k in kernels:
        bounds = [f"{1e6 * max(k.flops / f, k.bytes / b):.0f} us" for f, b in GPUS.values()]
        name_of_row = k.name + (" (product)" if k.kind == "product" else "")
        rows.append([name_of_row, k.launches, f"{k.flops / 1e9:.1f}", f"{k.bytes / 1e6:.1f}", *bounds])
    return [f"## {name}, B = 8: {who}", "", *table(*rows)]


def report():
    peaks = ", ".join(f"{g} {f / 1e12:.0f} TFLOP/s and {b / 1e12:.2f} TB/s" for g, (f, b) in GPUS.items())
    totals_lines, worst = totals_section()
    out = ["# The traffic budget of a GPU training step", "",
           *paragraph(COUNTING),
           *paragraph(f"""Written by dev/bench/roofline.py (`make roofline`). Nothing of Arapoet's on this
               page is measured: it is arithmetic on the shapes, in bf16, at T = 1024, with one batch a step,
               dropout 0 and nothing recomputed. Launches and bytes of each kernel are held to those that the
               emulator counts in a real step of a small model (dev/bench/test_roofline.py). The peaks are
               NVIDIA's: {peaks} (A100 80 GB, H100 and H200: SXM)."""),
           *totals_lines, *counts_section(), *forecast_section(), *published_section()]
    for name in ("GPT-2 124M", "GPT-2 774M"):
        m = MODELS[name]
        out += kernels_section(name, "Arapoet", arapoet(m, 8, 1024))
        for who, flags in LLMC.items():
            out += kernels_section(name, who, llmc(m, 8, 1024, **flags))
    five = [k for k in arapoet(MODELS["GPT-2 124M"], 8, 1024, five_products=True)
            if k.kind == "attention"]
    out += kernels_section("GPT-2 124M", "Arapoet's attention with the switch five_products", five)
    return "\n".join(out).rstrip("\n") + "\n", worst


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
