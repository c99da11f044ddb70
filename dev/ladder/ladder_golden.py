#!/usr/bin/env python3
"""Writes dev/ladder/golden.bin: PyTorch's values for a small model of each rung, for test_ladder.cpp.

    venv/bin/python dev/ladder/ladder_golden.py

The rungs are implemented from their definitions in float64 with PyTorch's layers and autograd. Only the
dropout masks are not PyTorch's: both sides must drop the same elements, so Philox4x32-10 (lib/rng.h) is
implemented here again. The file's format is that of dev/golden/golden.py. Its tensors are:
    sizes (6) = V C T B blocks heads
    tokens, targets (B,T)
and for each CASE, rung0 ... rung7 and two variants:
    CASE/p/NAME     a parameter with its name in ladder.cpp
    CASE/g/NAME     its gradient
    CASE/logits     (B,T,V)
    CASE/losses     (6), the losses before each of five AdamW steps and after the last
"""

import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden"))
from golden import write  # noqa: E402

V, C, T, B, BLOCKS, HEADS = 9, 6, 5, 3, 2, 2
SEED, STEPS = 1337, 5
ATT_DROPOUT, ATTPROJ_DROPOUT, FCPROJ_DROPOUT = 1, 2, 3

# heads, blocks, hidden, residual, projection, layernorm, dropout
CASES = {
    "rung0": (0, 0, 0, 0, 0, 0, 0.0),
    "rung1": (1, 1, 0, 0, 0, 0, 0.0),
    "rung2": (HEADS, 1, 0, 0, 0, 0, 0.0),
    "rung3": (HEADS, 1, 1, 0, 0, 0, 0.0),
    "rung4": (HEADS, BLOCKS, 1, 0, 0, 0, 0.0),
    "rung5": (HEADS, BLOCKS, 4, 1, 1, 0, 0.0),
    "rung6": (HEADS, BLOCKS, 4, 1, 1, 1, 0.0),
    "rung7": (HEADS, BLOCKS, 4, 1, 1, 1, 0.25),
    "no_projection": (HEADS, BLOCKS, 1, 1, 0, 0, 0.0),
    "no_residual": (HEADS, BLOCKS, 2, 0, 1, 1, 0.25),
}


def keep(p, n, step, site, layer):
    """Dropout's factors of elements 0 to n-1, from Philox4x32-10 with the key SEED and the counter
    (element / 4, step, site | layer). Each counter gives the random numbers of four elements."""
    blocks = np.arange((n + 3) // 4, dtype=np.uint64)
    mask, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = [blocks & mask, blocks >> high, np.full_like(blocks, step), np.full_like(blocks, site << 16 | layer)]
    k0, k1 = SEED & 0xFFFFFFFF, SEED >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> high) ^ c[1] ^ np.uint64(k0), p1 & mask, (p0 >> high) ^ c[3] ^ np.uint64(k1), p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    draws = np.stack(c, axis=1).reshape(-1)[:n]
    return torch.tensor((draws >= int(float(np.float32(p)) * 2**32)) / (1 - p))


def shapes(case):
    heads, blocks, hidden, _, projection, norm, _ = case
    if not heads:
        return {"table": (V, V)}
    s = {"wte": (V, C), "wpe": (T, C), "qkvw": (blocks, 3 * C, C), "qkvb": (blocks, 3 * C),
         "headw": (V, C), "headb": (V,)}
    if projection:
        s.update(projw=(blocks, C, C), projb=(blocks, C))
    if hidden:
        s.update(fcw=(blocks, hidden * C, C), fcb=(blocks, hidden * C))
    if hidden and projection:
        s.update(fcprojw=(blocks, C, hidden * C), fcprojb=(blocks, C))
    if norm:
        s.update(ln1w=(blocks, C), ln1b=(blocks, C), lnfw=(C,), lnfb=(C,))
        s.update(ln2w=(blocks, C), ln2b=(blocks, C))
    return s


def logits(case, p, tokens, step):
    heads, blocks, hidden, residual, projection, norm, dropout = case
    if not heads:
        return p["table"][tokens]
    n = B * T * C

    def drop(x, site, layer):
        return x * keep(dropout, x.numel(), step, site, layer).view_as(x) if dropout else x

    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    x = p["wte"][tokens] + p["wpe"]
    for i in range(blocks):
        h = F.layer_norm(x, (C,), p["ln1w"][i], p["ln1b"][i]) if norm else x
        qkv = F.linear(h, p["qkvw"][i], p["qkvb"][i]).split(C, dim=2)
        q, k, v = (y.view(B, T, heads, C // heads).transpose(1, 2) for y in qkv)
        weights = (q @ k.transpose(2, 3) / (C // heads) ** 0.5).masked_fill(future, -torch.inf).softmax(dim=3)
        y = (drop(weights, ATT_DROPOUT, i) @ v).transpose(1, 2).reshape(B, T, C)
        if projection:
            y = F.linear(y, p["projw"][i], p["projb"][i])
        x = x * residual + drop(y, ATTPROJ_DROPOUT, i)
        if hidden:
            h = F.layer_norm(x, (C,), p["ln2w"][i], p["ln2b"][i]) if norm else x
            y = F.relu(F.linear(h, p["fcw"][i], p["fcb"][i]))
            if projection:
                y = F.linear(y, p["fcprojw"][i], p["fcprojb"][i])
            x = x * residual + drop(y, FCPROJ_DROPOUT, i)
    assert x.numel() == n
    if norm:
        x = F.layer_norm(x, (C,), p["lnfw"], p["lnfb"])
    return F.linear(x, p["headw"], p["headb"])


def main():
    torch.set_num_threads(1)
    rng = np.random.RandomState(6)  # a legacy generator, which yields the same numbers in every numpy version
    tokens, targets = rng.randint(0, V, (B, T)).astype(np.int32), rng.randint(0, V, (B, T)).astype(np.int32)
    tensors = {"sizes": [V, C, T, B, BLOCKS, HEADS], "tokens": tokens, "targets": targets}
    tokens, targets = torch.tensor(tokens).long(), torch.tensor(targets).long()
    for name, case in CASES.items():
        p = {}
        for tensor, shape in shapes(case).items():
            x = rng.standard_normal(shape)
            x = 1 + 0.2 * x if tensor in ("ln1w", "ln2w", "lnfw") else x / shape[-1] ** 0.5
            p[tensor] = torch.tensor(x.astype(np.float32).astype(np.float64), requires_grad=True)
            tensors[f"{name}/p/{tensor}"] = p[tensor].detach().numpy().copy()
        optimizer = torch.optim.AdamW(p.values(), lr=1e-2)
        losses = []
        for step in range(STEPS + 1):
            out = logits(case, p, tokens, step)
            loss = F.cross_entropy(out.view(-1, V), targets.view(-1))
            losses.append(loss.item())
            if step == STEPS:
                break
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                tensors[f"{name}/logits"] = out.detach().numpy()
                tensors.update((f"{name}/g/{tensor}", x.grad.numpy().copy()) for tensor, x in p.items())
            optimizer.step()
        tensors[f"{name}/losses"] = losses
        print(f"{name}: losses {losses[0]:.4f} to {losses[-1]:.4f}")
    origin = f"dev/ladder/ladder_golden.py, torch {torch.__version__}, numpy {np.__version__}"
    write("dev/ladder/golden.bin", origin, tensors)


if __name__ == "__main__":
    main()
