"""PyTorch's side of `make bench` and `make gpu-check`: a minimal GPT-2 with the settings that were fastest.

    peer_torch.py step ROW fp32|bf16 STEPS      prints "ms X" per step: forward, backward, clipping, AdamW
    peer_torch.py sample fp32|bf16 N TOKENS     prints "tokens/s X" per run, for all N sequences together
    peer_torch.py gpu ROW PART...               times parts on the GPU in bf16, one line of JSON for each:
                                                eager, cudnn, compile: steps; attention; products
    peer_torch.py check                         prints PyTorch's version; exits with 1 if there is none

ROW is L,NH,C,V,B,T; OMP_NUM_THREADS sets the threads. bench.cpp sets MALLOC_* and GLIBC_TUNABLES for this
process, so that it keeps freed pages. On a Zen 5 EPYC with two cores (PyTorch 2.15), GPT-2 124M, B=4 T=64,
this reduced a step from between 1.15 and 1.36 s to 1.02 s in fp32, and from 0.54 s to 0.40 s in bf16.
TORCH_COMPILE=1 adds torch.compile: 1.05 to 1.07 s and 0.38 s. PyTorch's documentation recommends fused AdamW,
scaled_dot_product_attention, a padded vocabulary and gradients set to None. Debian's PyTorch 1.13 has no
fused AdamW and no torch.compile, has the attention under a private name, and multiplies with the system's
BLAS.
"""
import json
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
        x = self.wte(tokens) + self.wpe(torch.arange(pos, pos + tokens.shape[1], device=tokens.device))
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


# --- on a GPU. PEER_DEVICE=cpu tries the code without one.
DEVICE = os.environ.get("PEER_DEVICE", "cuda")


def finish():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median_ms(f, runs, warm=3):
    """Milliseconds of one call, which is waited for."""
    times = []
    for i in range(warm + runs):
        finish()
        t0 = time.perf_counter()
        f()
        finish()
        times.append((time.perf_counter() - t0) * 1e3)
    return sorted(times[warm:])[runs // 2]


def mean_ms(f, runs=20):
    """Milliseconds of one call among many that are launched at once."""
    for _ in range(3):
        f()
    finish()
    t0 = time.perf_counter()
    for _ in range(runs):
        f()
    finish()
    return (time.perf_counter() - t0) * 1e3 / runs


def backend(name):
    """Attention by cuDNN, or else by FlashAttention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    if DEVICE != "cuda":
        return sdpa_kernel([SDPBackend.MATH])
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION if name == "cudnn" else SDPBackend.FLASH_ATTENTION])


def gpu_step(sizes, how, runs=15):
    L, NH, C, V, B, T = sizes
    model = GPT2(L, NH, C, V, T).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=True)
    run = torch.compile(model) if how == "compile" else model
    x, y = (torch.randint(0, V, (B, T), device=DEVICE) for _ in range(2))

    def one():
        with torch.autocast(DEVICE, dtype=torch.bfloat16), backend(how):
            loss = run(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    ms = median_ms(one, runs)
    memory = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    return {"step_ms": ms, "tokens_per_s": B * T / ms * 1e3, "memory": memory}


def gpu_attention(sizes):
    """Forward, and forward with backward, of one layer's attention alone."""
    L, NH, C, V, B, T = sizes
    shape = (B, NH, T, C // NH)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    d = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    found = {}
    for name in ("flash", "cudnn"):
        try:
            with backend(name):
                forward = mean_ms(lambda: attention(q, k, v, True))
                both = mean_ms(lambda: torch.autograd.grad(attention(q, k, v, True), (q, k, v), d))
            found.update({name + "_forward_ms": forward, name + "_backward_ms": both - forward})
        except RuntimeError as e:
            found[name] = str(e).splitlines()[0]
    return found


def gpu_products(sizes):
    """TFLOP/s of a layer's products and the head's: Y = X W^T, dX = dY W and dW = dY^T X, all in bf16."""
    L, NH, C, V, B, T = sizes
    M, found = B * T, {}
    for name, K, N in (("qkv", C, 3 * C), ("attproj", C, C), ("fc", C, 4 * C), ("fcproj", 4 * C, C),
                       ("head", C, (V + 63) // 64 * 64)):
        x, w, dy = (torch.randn(s, device=DEVICE, dtype=torch.bfloat16) for s in ((M, K), (N, K), (M, N)))
        for what, f in (("", lambda: torch.mm(x, w.t())), (" dX", lambda: torch.mm(dy, w)),
                        (" dW", lambda: torch.mm(dy.t(), x))):
            found[name + what] = 2e-9 * M * K * N / mean_ms(f)
    return found


def gpu(row, parts):
    sizes = [int(x) for x in row.split(",")]
    for part in parts:
        try:
            values = (gpu_attention(sizes) if part == "attention" else gpu_products(sizes)
                      if part == "products" else gpu_step(sizes, part))
        except Exception as e:  # the other parts still run
            values = {"error": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"}
        print(json.dumps({"record": part, "torch": torch.__version__, **values}), flush=True)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1] == "check":
        print(torch.__version__)
    elif sys.argv[1] == "step":
        step(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1] == "gpu":
        gpu(sys.argv[2], sys.argv[3:])
    else:
        sample(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
