"""PyTorch's side of `make bench`: a minimal GPT-2 with the settings that were fastest on a CPU.

    peer_torch.py step ROW fp32|bf16 STEPS      prints "ms X" per step: forward, backward, clipping, AdamW
    peer_torch.py sample fp32|bf16 N TOKENS     prints "tokens/s X" per run, for all N sequences together
    peer_torch.py check                         prints PyTorch's version; exits with 1 if there is none

ROW is L,NH,C,V,B,T; OMP_NUM_THREADS sets the threads. bench.cpp sets MALLOC_* and GLIBC_TUNABLES for this
process, so that it keeps freed pages. On a Zen 5 EPYC with two cores (PyTorch 2.15), GPT-2 124M, B=4 T=64,
this reduced a step from between 1.15 and 1.36 s to 1.02 s in fp32, and from 0.54 s to 0.40 s in bf16.
TORCH_COMPILE=1 adds torch.compile: 1.05 to 1.07 s and 0.38 s. PyTorch's documentation recommends fused AdamW,
scaled_dot_product_attention, a padded vocabulary and gradients set to None. Debian's PyTorch 1.13 has no
fused AdamW and no torch.compile, has the attention under a private name, and multiplies with the system's
BLAS.
"""
import math
import os
import sys
import time

try:
    import torch
except ImportError:
    sys.exit("PyTorch is missing")
import torch.nn as nn
import torch.nn.functional as F

NEW = int(torch.__version__.split(".")[0]) >= 2


# PyTorch's package multiplies fp32 with MKL, which uses its AVX2 code on AMD's processors: 40% of a Zen 5's
# peak. The oneDNN in the same package reaches 87%. TORCH_LINEAR=onednn makes the linear layers use it. This
# is more than a setting, so `make bench` lists it as a separate contestant.
class OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        ctx.bias = b is not None
        return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = torch.ops.mkldnn._linear_pointwise(dy, w.t(), None, "none", [], "")
        columns = x.reshape(-1, x.shape[-1]).t()
        dw = torch.ops.mkldnn._linear_pointwise(rows.t(), columns, None, "none", [], "")
        return dx, dw, rows.sum(0) if ctx.bias else None


def linear(x, w, b=None):
    if os.environ.get("TORCH_LINEAR") == "onednn" and not torch.is_autocast_enabled("cpu"):
        return OneDNNLinear.apply(x, w, b)
    return F.linear(x, w, b)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def attention(q, k, v, is_causal):
    if NEW:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return F._scaled_dot_product_attention(q, k, v, is_causal=is_causal)[0]


class Block(nn.Module):
    def __init__(self, C, NH):
        super().__init__()
        self.NH = NH
        self.ln1, self.qkv, self.attproj = nn.LayerNorm(C), Linear(C, 3 * C), Linear(C, C)
        self.ln2, self.fc, self.fcproj = nn.LayerNorm(C), Linear(C, 4 * C), Linear(4 * C, C)

    def forward(self, x, cache=None, pos=0):
        B, T, C = x.shape
        qkv = self.qkv(self.ln1(x)).split(C, 2)
        q, k, v = (z.view(B, T, self.NH, C // self.NH).transpose(1, 2) for z in qkv)
        if cache is not None:
            cache[0][:, :, pos:pos + T], cache[1][:, :, pos:pos + T] = k, v
            k, v = cache[0][:, :, :pos + T], cache[1][:, :, :pos + T]
        y = attention(q, k, v, is_causal=cache is None)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, L, NH, C, V, maxT):
        super().__init__()
        self.wte, self.wpe = nn.Embedding((V + 63) // 64 * 64, C), nn.Embedding(maxT, C)
        self.lnf = nn.LayerNorm(C)
        self.blocks = nn.ModuleList([Block(C, NH) for _ in range(L)])
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, 0, 0.02)

    def body(self, tokens, caches=None, pos=0):
        x = self.wte(tokens) + self.wpe(torch.arange(pos, pos + tokens.shape[1]))
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], pos)
        return self.lnf(x)

    def forward(self, tokens, targets):
        logits = linear(self.body(tokens), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def step(row, dtype, steps):
    L, NH, C, V, B, T = (int(x) for x in row.split(","))
    model = GPT2(L, NH, C, V, max(T, 1024 if V > 1000 else T))
    fused = {"fused": os.environ.get("FUSED", "1") == "1"} if NEW else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **fused)
    run = torch.compile(model) if os.environ.get("TORCH_COMPILE") == "1" else model
    x = torch.randint(0, V, (B, T))
    y = torch.randint(0, V, (B, T))
    for s in range(steps):
        t0 = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            loss = run(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss = loss.item()
        print(f"ms {(time.perf_counter() - t0) * 1e3:.2f}", flush=True)
        assert s or abs(loss - math.log(V)) < 1, loss


@torch.inference_mode()
def sample(dtype, N, tokens):
    model = GPT2(12, 12, 768, 50257, 1024).eval()
    if dtype == "bf16":
        model = model.bfloat16()
    shape, kind = (N, 12, tokens, 64), model.wte.weight.dtype
    caches = [(torch.empty(shape, dtype=kind), torch.empty(shape, dtype=kind)) for _ in range(12)]
    for _ in range(4):
        token = torch.full((N, 1), 50256)
        t0 = time.perf_counter()
        for pos in range(tokens):
            logits = linear(model.body(token, caches, pos)[:, -1], model.wte.weight)
            token = logits[:, :50257].argmax(-1, keepdim=True)
        print(f"tokens/s {N * tokens / (time.perf_counter() - t0):.2f}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1] == "check":
        print(torch.__version__)
    elif sys.argv[1] == "step":
        step(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        sample(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
