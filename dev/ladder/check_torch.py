#!/usr/bin/env python3
"""Rung 8 in PyTorch: trains with ./train_gpt2's initial weights and batches, and compares the losses.

    make train_gpt2 export_run prepare_data
    ./prepare_data poems.csv -o out/data
    venv/bin/python dev/ladder/check_torch.py --data out/data --out out/check

Exports weights and batches with ./export_run. Trains 100 steps with ./train_gpt2 (fp32, dropout 0), and the
same 100 steps with the model below, which is written like nanoGPT with torch.nn and torch.optim.AdamW.
Compares the training loss of every step, writes OUT/losses.csv, and exits with 1 if a difference is above
1e-3.
"""

import argparse
import csv
import math
import pathlib
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(self.ln1(x)).split(C, dim=2)
        q, k, v = (y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, T, V, L, heads, C):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(Block(C, heads) for _ in range(L))
        self.lnf = nn.LayerNorm(C)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.lnf(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def load_model(path):
    """Loads a model file as in lib/gpt2.h: 256 int32, then 16 tensors, each of all layers."""
    header = np.fromfile(path, dtype=np.int32, count=256)
    assert header[0] == 20240326 and header[1] == 3, f"{path}: is not an fp32 model file"
    T, V, L, heads, C, padded = (int(n) for n in header[2:8])
    data = np.fromfile(path, dtype=np.float32, offset=1024)
    model, at = GPT(T, V, L, heads, C), 0

    def take(*shape):
        nonlocal at
        n = math.prod(shape)
        at += n
        return torch.from_numpy(data[at - n : at].reshape(shape).copy())

    with torch.no_grad():
        model.wte.weight.copy_(take(padded, C)[:V])
        model.wpe.weight.copy_(take(T, C))
        for name in ("ln1", "qkv", "attproj", "ln2", "fc", "fcproj"):
            layers = [getattr(block, name) for block in model.blocks]
            for kind in ("weight", "bias"):
                values = take(L, *getattr(layers[0], kind).shape)
                for layer, value in zip(layers, values):
                    getattr(layer, kind).copy_(value)
        model.lnf.weight.copy_(take(C))
        model.lnf.bias.copy_(take(C))
    assert at == len(data), f"{path}: has {len(data)} parameters, wanted {at} by its header"
    return model


def learning_rate(step, steps, peak, warmup, final):
    """Linear warmup to `peak`, then a cosine down to the fraction `final` of it, as in ./train_gpt2."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def run(*command):
    print("$", *command, flush=True)
    subprocess.run([str(c) for c in command], check=True)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--data", default="out/data", help="folder made by ./prepare_data")
    a.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/check"))
    a.add_argument("--preset", default="char")
    a.add_argument("--seq_len", type=int, default=256)
    a.add_argument("--batch_size", type=int, default=4)
    a.add_argument("--steps", type=int, default=100)
    a.add_argument("--learning_rate", type=float, default=5e-4)
    o = a.parse_args()

    sizes = ["--data", o.data, "--preset", o.preset, "--seq_len", o.seq_len, "--batch_size", o.batch_size]
    run("./export_run", *sizes, "--steps", o.steps, "-o", o.out)
    run("./train_gpt2", *sizes, "--max_steps", o.steps, "--learning_rate", o.learning_rate,
        "--warmup_steps", o.steps // 20, "--dropout", 0, "--dtype", "fp32", "--optimizer", "adamw",
        "--val_every", 0, "--sample_every", 0, "--save_every", 0, "--log_every", 20, "-o", o.out / "run",
        "--overwrite")
    with open(o.out / "run/log.csv") as f:
        ours = [float(row["train_loss"]) for row in csv.DictReader(f) if row["train_loss"]]
    assert len(ours) == o.steps, f"{o.out}/run/log.csv has {len(ours)} steps, wanted {o.steps}"

    model = load_model(o.out / "init.bin")
    windows = np.fromfile(o.out / "batches.bin", dtype=np.uint16, offset=1024).astype(np.int64)
    batches = torch.from_numpy(windows).view(o.steps, o.batch_size, o.seq_len + 1)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    theirs, start = [], time.time()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, o.steps, o.learning_rate, o.steps // 20, 0.1)
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        theirs.append(loss.item())
        if (step + 1) % 20 == 0:
            print(f"PyTorch step {step + 1}: loss {theirs[-1]:.4f}, ours {ours[step]:.4f}", flush=True)
    print(f"PyTorch {torch.__version__}: {(time.time() - start) / o.steps:.2f} s per step, "
          f"{torch.get_num_threads()} threads")

    with open(o.out / "losses.csv", "w") as f:
        f.write("step,ours,pytorch,difference\n")
        f.writelines(f"{i + 1},{x:.9g},{y:.9g},{x - y:.3g}\n" for i, (x, y) in enumerate(zip(ours, theirs)))
    worst = max(range(o.steps), key=lambda i: abs(ours[i] - theirs[i]))
    print(f"losses from {ours[0]:.4f} to {ours[-1]:.4f}; "
          f"largest difference {abs(ours[worst] - theirs[worst]):.2e} at step {worst + 1}")
    if not all(abs(x - y) <= 1e-3 for x, y in zip(ours, theirs)):
        sys.exit("the losses differ by more than 1e-3")
    print("the losses agree to 1e-3 at every step")


if __name__ == "__main__":
    main()
