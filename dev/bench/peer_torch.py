"""PyTorch's side of `make bench`: a minimal GPT-2 with the settings that were fastest on a CPU.

    peer_torch.py step ROW fp32|bf16 STEPS      one line "ms X" a training step: forward, backward, clipping, AdamW
    peer_torch.py sample fp32|bf16 N TOKENS     one line "tokens/s X" a run, all N sequences counted
    peer_torch.py check                         exit 0 where PyTorch is there, and its version

ROW is L,NH,C,V,B,T. Threads: OMP_NUM_THREADS. bench.cpp sets MALLOC_* and GLIBC_TUNABLES for this process, so that freed
pages are kept: on a Zen 5 EPYC with two cores (PyTorch 2.15), GPT-2 124M, B=4 T=64, a step then took 1.02 s in fp32 where
it had taken 1.15 to 1.36, and 0.40 s in bf16 where it had taken 0.54. TORCH_COMPILE=1 adds torch.compile: 1.05 to 1.07 s and
0.38 s. Fused AdamW, scaled_dot_product_attention, a padded vocabulary and gradients set to None are PyTorch's own advice.
PyTorch 1.13, Debian's, has no fused AdamW, no torch.compile, and the attention under a private name; it multiplies with the system's BLAS.
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


# PyTorch's own package multiplies fp32 with MKL, which on AMD's processors takes its AVX2 path: 40% of a Zen 5's peak.
# The oneDNN inside the same package reaches 87% of it. TORCH_LINEAR=onednn sends the linear layers there; it is more
# than a setting, so `make bench` shows it as a column of its own.
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
        dw = torch.ops.mkldnn._linear_pointwise(rows.t(), x.reshape(-1, x.shape[-1]).t(), None, "none", [], "")
        return dx, dw, rows.sum(0) if ctx.bias else None


def linear(x, w, b=None):
    if os.environ.get("TORCH_LINEAR") == "onednn" and not torch.is_autocast_enabled("cpu"):
        return OneDNNLinear.apply(x, w, b)
    return F.linear(x, w, b)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Block(nn.Module):
    def __init__(self, C, NH):
        super().__init__()
        self.NH = NH
        self.ln1, self.qkv, self.attproj = nn.LayerNorm(C), Linear(C, 3 * C), Linear(C, C)
        self.ln2, self.fc, self.fcproj = nn.LayerNorm(C), Linear(C, 4 * C), Linear(4 * C, C)

    def forward(self, x, cache=None, pos=0):
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.NH, C // self.NH).transpose(1, 2) for z in self.qkv(self.ln1(x)).split(C, 2))
        if cache is not None:
            cache[0][:, :, pos:pos + T], cache[1][:, :, pos:pos + T] = k, v
            k, v = cache[0][:, :, :pos + T], cache[1][:, :, :pos + T]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None) if NEW else F._scaled_dot_product_attention(q, k, v, is_causal=cache is None)[0]
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, L, NH, C, V, maxT):
        super().__init__()
        self.wte, self.wpe, self.lnf = nn.Embedding((V + 63) // 64 * 64, C), nn.Embedding(maxT, C), nn.LayerNorm(C)
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
    shape = (N, 12, tokens, 64)
    caches = [(torch.empty(shape, dtype=model.wte.weight.dtype), torch.empty(shape, dtype=model.wte.weight.dtype)) for _ in range(12)]
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
