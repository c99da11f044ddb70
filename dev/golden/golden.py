#!/usr/bin/env python3
"""Writes golden.bin: PyTorch's values for small models, with which test_golden.cpp compares the C++ trainers.

    python3 -m venv venv && venv/bin/pip install -r dev/golden/requirements.txt
    venv/bin/python dev/golden/golden.py --out dev/golden/golden.bin

Three cases share the same weights, tokens and targets:
    gpt2         transformers' GPT2LMHeadModel (tanh GELU)
    grover_erf   GROVER, the architecture of AraGPT2-large and -mega, implemented below from its definition
    grover_tanh  the same with the tanh GELU
Everything is computed in float64 by one thread, but for Muon's iteration, which PyTorch computes in bfloat16.
Results are stored as float32, so every run on one kind of processor writes the same bytes. This needs torch
2.9 or newer (torch.optim.Muon) and a transformers that accepts it; Debian 12's python3-torch 1.13 is too old.

The sizes are chosen to reveal mistakes. T < maxT and V < Vp, and no two of B, T, L, NH, hs, C and V are
equal, so that swapped sizes are noticed. Weights are far larger than GPT-2's initial ones, biases are not
zero and LayerNorm weights are not one, so that every term matters. Embedding rows differ in size, so that
some variances come near LayerNorm's eps. Some targets are -1, which the loss leaves out.

The file is little-endian:
    int32  0x444c4f47 ("GOLD"), 1 (format), number of tensors, number of bytes of the text
    text   one line: the script and the versions that wrote the file
    and for each tensor:
    name   24 bytes, zero-padded
    int32  type (0 = float32, 1 = int32), number of dimensions (1 to 4), 4 dimensions (unused ones are 1)
    data
Its tensors:
    config (8)       maxT V L NH C Vp arch activation of the case "gpt2", as in lib/gpt2.h's header
    tokens, targets  (B,T)
    PARAMETER        each of the 16, with lib/gpt2.h's names and shapes; wte is padded with zero rows to Vp
    muon/losses (11), muon/norms (10), muon/PARAMETER: of the case "gpt2", below, with Muon instead of AdamW
                     for the blocks' matrices; the matrices after the last step
and for each CASE:
    CASE/switches    (2), arch and activation
    CASE/logits      (B,T,V)
    CASE/loss        (1), the mean over the targets
    CASE/PARAMETER   its gradient
    CASE/losses      (11), before each of ten AdamW steps on the same batch and after the last
    CASE/norms       (10), the gradients' norms before clipping
"""

import argparse
import math
import os
import struct

import numpy as np
import torch
import torch.nn.functional as F
import transformers

MAX_T, V, L, NH, C, VP = 40, 97, 3, 2, 24, 128
B, T = 4, 29
GPT2, GROVER = 0, 1
TANH, ERF = 0, 1
EPS = 1e-5
STEPS = 10

SHAPES = {
    "wte": (V, C), "wpe": (MAX_T, C), "ln1w": (L, C), "ln1b": (L, C),
    "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C), "attprojw": (L, C, C), "attprojb": (L, C),
    "ln2w": (L, C), "ln2b": (L, C), "fcw": (L, 4 * C, C), "fcb": (L, 4 * C),
    "fcprojw": (L, C, 4 * C), "fcprojb": (L, C), "lnfw": (C,), "lnfb": (C,),
}
DECAYED = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")


def draw(seed):
    """Weights, tokens and targets. RandomState yields the same numbers in every version of numpy."""
    rng = np.random.RandomState(seed)
    weights = {}
    for name, shape in SHAPES.items():
        x = rng.standard_normal(shape)
        if name in ("wte", "wpe"):
            x *= 0.5 * rng.uniform(0.1, 1, (shape[0], 1))
        elif name in ("ln1w", "ln2w", "lnfw"):
            x = 1 + 0.2 * x
        else:
            x *= 0.3 if name in DECAYED else 0.15
        weights[name] = x.astype(np.float32)
    tokens = rng.randint(0, V, (B, T)).astype(np.int32)
    tokens[0, 0], tokens[-1, -1] = 0, V - 1
    targets = rng.randint(0, V, (B, T)).astype(np.int32)
    targets[rng.uniform(size=(B, T)) < 0.1] = -1
    return weights, tokens, targets


def definition(p, tokens, arch, activation):
    """Logits of either architecture. p has the layout of this project's model files.

    GROVER normalises the embedding and ends each block with a LayerNorm, whose output is the next block's
    residual. In order these LayerNorms are ln1[0], ln1[1], ..., lnf: the same tensors as GPT-2's."""
    def norm(x, weight, bias):
        return F.layer_norm(x, (C,), weight, bias, EPS)

    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    x = p["wte"][tokens] + p["wpe"][:T]
    for i in range(L):
        h = norm(x, p["ln1w"][i], p["ln1b"][i])
        q, k, v = (y.view(B, T, NH, C // NH).transpose(1, 2)
                   for y in F.linear(h, p["qkvw"][i], p["qkvb"][i]).split(C, dim=2))
        scores = (q @ k.transpose(2, 3) / math.sqrt(C // NH)).masked_fill(future, -math.inf)
        attention = (scores.softmax(dim=3) @ v).transpose(1, 2).reshape(B, T, C)
        r = (h if arch == GROVER else x) + F.linear(attention, p["attprojw"][i], p["attprojb"][i])
        hidden = F.linear(norm(r, p["ln2w"][i], p["ln2b"][i]), p["fcw"][i], p["fcb"][i])
        hidden = F.gelu(hidden, approximate="tanh" if activation == TANH else "none")
        x = r + F.linear(hidden, p["fcprojw"][i], p["fcprojb"][i])
    return F.linear(norm(x, p["lnfw"], p["lnfb"]), p["wte"])


class Published:
    """transformers' GPT-2, called with p in this project's layout. Its Conv1D has matrices (in, out)."""

    def __init__(self):
        config = transformers.GPT2Config(
            vocab_size=V, n_positions=MAX_T, n_embd=C, n_layer=L, n_head=NH, layer_norm_epsilon=EPS,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
            attn_implementation="eager")
        self.model = transformers.GPT2LMHeadModel(config).double()

    def __call__(self, p, tokens):
        state = {"wte.weight": p["wte"], "wpe.weight": p["wpe"],
                 "ln_f.weight": p["lnfw"], "ln_f.bias": p["lnfb"]}
        for i in range(L):
            for theirs, ours in (("ln_1", "ln1"), ("attn.c_attn", "qkv"), ("attn.c_proj", "attproj"),
                                 ("ln_2", "ln2"), ("mlp.c_fc", "fc"), ("mlp.c_proj", "fcproj")):
                weight = p[ours + "w"][i]
                state[f"h.{i}.{theirs}.weight"] = weight.t() if weight.dim() == 2 else weight
                state[f"h.{i}.{theirs}.bias"] = p[ours + "b"][i]
        state = {"transformer." + name: value for name, value in state.items()}
        state["lm_head.weight"] = p["wte"]
        missing = set(dict(self.model.named_parameters(remove_duplicate=False))) ^ set(state)
        assert not missing, f"transformers' parameters have other names: {missing}"
        return torch.func.functional_call(self.model, state, (tokens,)).logits


def train(model, weights, tokens, targets):
    """The case's tensors: the initial logits, loss and gradients; the losses and norms of ten AdamW steps."""
    p = {name: torch.tensor(w, dtype=torch.float64, requires_grad=True) for name, w in weights.items()}
    optimizer = torch.optim.AdamW(
        [{"params": [p[n] for n in p if n in DECAYED], "weight_decay": 0.1},
         {"params": [p[n] for n in p if n not in DECAYED], "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    out, losses, norms = {}, [], []
    for step in range(STEPS + 1):
        logits = model(p, tokens)
        loss = F.cross_entropy(logits.view(-1, V), targets.view(-1), ignore_index=-1)
        losses.append(loss.item())
        if step == STEPS:
            break
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            out["logits"], out["loss"] = logits.detach().numpy(), [loss.item()]
            out.update((name, pad(name, x.grad.numpy().copy())) for name, x in p.items())
        norms.append(torch.nn.utils.clip_grad_norm_(p.values(), 1.0).item())
        optimizer.step()
    out["losses"], out["norms"] = losses, norms
    return out


def train_by_muon(model, weights, tokens, targets):
    """Losses and norms as train() gives them, and the blocks' matrices after the last step, for
    torch.optim.Muon on these matrices (qkvw as three) and AdamW on the rest. Muon iterates in bfloat16."""
    def leaf(w):
        return torch.tensor(w, dtype=torch.float64, requires_grad=True)

    matrices = {n: [[leaf(m) for m in np.split(layer, 3 if n == "qkvw" else 1)] for layer in weights[n]]
                for n in ("qkvw", "attprojw", "fcw", "fcprojw")}
    others = {n: leaf(w) for n, w in weights.items() if n not in matrices}
    muon = torch.optim.Muon([m for layers in matrices.values() for parts in layers for m in parts], lr=5e-3,
                            weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": [others[n] for n in others if n in DECAYED], "weight_decay": 0.1},
         {"params": [others[n] for n in others if n not in DECAYED], "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    leaves = [m for layers in matrices.values() for parts in layers for m in parts] + list(others.values())
    losses, norms = [], []
    for step in range(STEPS + 1):
        p = others | {n: torch.stack([torch.cat(parts) for parts in layers])
                      for n, layers in matrices.items()}
        loss = F.cross_entropy(model(p, tokens).view(-1, V), targets.view(-1), ignore_index=-1)
        losses.append(loss.item())
        if step == STEPS:
            break
        muon.zero_grad(), adamw.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(leaves, 1.0).item())
        muon.step(), adamw.step()
    return {"losses": losses, "norms": norms} | {n: p[n].detach().numpy() for n in matrices}


def pad(name, x):
    return np.concatenate([x, np.zeros((VP - V, C), x.dtype)]) if name == "wte" else x


def write(path, text, tensors):
    data = text.encode()
    blob = [struct.pack("<4i", 0x444C4F47, 1, len(tensors), len(data)), data]
    for name, x in tensors.items():
        x = np.asarray(x)
        is_int = x.dtype.kind == "i"
        dims = list(x.shape) + [1] * (4 - x.ndim)
        assert len(name) < 24
        blob += [struct.pack("<24s6i", name.encode(), is_int, x.ndim, *dims),
                 x.astype("<i4" if is_int else "<f4").tobytes()]
    with open(path + ".tmp", "wb") as f:
        f.write(b"".join(blob))
    os.replace(path + ".tmp", path)
    print(f"{path}: {os.path.getsize(path)} bytes, {len(tensors)} tensors; {text}")


def main():
    about = "Writes PyTorch's values for small models, for test_golden.cpp."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", default="dev/golden/golden.bin",
                        help="the file to write (default: %(default)s)")
    out = parser.parse_args().out
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    weights, tokens, targets = draw(seed=1)
    tensors = {"config": [MAX_T, V, L, NH, C, VP, GPT2, TANH], "tokens": tokens, "targets": targets}
    tensors.update((name, pad(name, w)) for name, w in weights.items())
    tokens, targets = torch.tensor(tokens).long(), torch.tensor(targets).long()

    published = Published()
    p = {name: torch.tensor(w, dtype=torch.float64) for name, w in weights.items()}
    gap = (published(p, tokens) - definition(p, tokens, GPT2, TANH)).abs().max().item()
    assert gap < 1e-12, f"definition() and transformers' GPT-2 differ by {gap}"

    cases = {
        "gpt2": (GPT2, TANH, published),
        "grover_erf": (GROVER, ERF, lambda p, x: definition(p, x, GROVER, ERF)),
        "grover_tanh": (GROVER, TANH, lambda p, x: definition(p, x, GROVER, TANH)),
    }
    for case, (arch, activation, model) in cases.items():
        tensors[f"{case}/switches"] = [arch, activation]
        result = train(model, weights, tokens, targets)
        tensors.update((f"{case}/{name}", x) for name, x in result.items())
        print(f"{case}: losses {result['losses'][0]:.6f} to {result['losses'][-1]:.6f}, "
              f"gradient norms {min(result['norms']):.3f} to {max(result['norms']):.3f}")
    result = train_by_muon(published, weights, tokens, targets)
    tensors.update((f"muon/{name}", x) for name, x in result.items())
    print(f"muon: losses {result['losses'][0]:.6f} to {result['losses'][-1]:.6f}")
    text = (f"dev/golden/golden.py, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, numpy {np.__version__}")
    write(out, text, tensors)


if __name__ == "__main__":
    main()
