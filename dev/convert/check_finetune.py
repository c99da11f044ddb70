"""Fine-tunes a model that Python wrote, converts it back, and compares its loss in PyTorch with train_gpt2's.

    python3 dev/convert/check_finetune.py POEMS.csv --vocabulary DIR [--full] [--steps 10] [--work DIR]
    python3 dev/convert/check_finetune.py POEMS.csv --grover [--steps 10] [--work DIR]

With --vocabulary the model is a GPT-2 written by transformers, with random weights and GPT-2's vocab.json and
merges.txt from DIR: a small one, or with --full one of gpt2's sizes (124M). With --grover it is a GROVER with
the tensor names of AraGPT2-large and -mega, and with a byte-level BPE of 3000 tokens trained on the poems.
Runs `make finetune` and `make export` as a user would. Loads the result with from_pretrained, or into a
GROVER implemented below from its definition, and asserts that the mean loss on the same validation tokens
agrees to 1e-4. Needs torch, transformers, tokenizers, safetensors and numpy (dev/golden/requirements.txt).
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

SEQ_LEN, PIECE = 128, 4097  # tokens in a context, and in the text whose loss is compared
GROVER = dict(model_type="aragpt2", architectures=["AraGPT2LMHeadModel"], activation_function="gelu",
              layer_norm_epsilon=1e-3, n_layer=3, n_head=4, n_embd=64, n_positions=SEQ_LEN)


def run(*command):
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


def write_gpt2(hf, vocabulary, full):
    sizes = {} if full else dict(n_layer=3, n_head=4, n_embd=64, n_positions=SEQ_LEN, layer_norm_epsilon=1e-3)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(hf)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(vocabulary / name, hf / name)


def write_grover(hf, poems):
    hf.mkdir(parents=True)
    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train([poems], vocab_size=3000, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(hf))
    bpe.save(str(hf / "tokenizer.json"))
    tokenizer_config = dict(add_prefix_space=True, eos_token="<|endoftext|>")
    (hf / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (hf / "config.json").write_text(json.dumps(dict(GROVER, vocab_size=bpe.get_vocab_size())))
    C = GROVER["n_embd"]
    state = {"wte.weight": (bpe.get_vocab_size(), C), "wpe.weight": (SEQ_LEN, C), "emb_norm": (C,)}
    for i in range(GROVER["n_layer"]):
        state.update({f"h.{i}.attn.c_attn.weight": (C, 3 * C), f"h.{i}.attn.c_attn.bias": (3 * C,),
                      f"h.{i}.attn.c_proj.weight": (C, C), f"h.{i}.attn.c_proj.bias": (C,),
                      f"h.{i}.mlp.c_fc.weight": (C, 4 * C), f"h.{i}.mlp.c_fc.bias": (4 * C,),
                      f"h.{i}.mlp.c_proj.weight": (4 * C, C), f"h.{i}.mlp.c_proj.bias": (C,),
                      f"h.{i}.ln_1": (C,), f"h.{i}.ln_2": (C,)})
    tensors = {}
    for name, shape in state.items():
        if len(shape) == 1 and "bias" not in name:
            tensors[name + ".weight"] = 1 + 0.1 * torch.randn(shape)
            tensors[name + ".bias"] = 0.1 * torch.randn(shape)
        else:
            tensors[name] = 0.1 * torch.randn(shape)
    tensors = {"transformer." + name: t for name, t in tensors.items()}
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})


def grover_logits(config, p, ids):
    """GROVER's logits (Zellers et al. 2019) for ids (B,T), in double precision. Matrices are (in, out)."""
    C, NH, (B, T) = config["n_embd"], config["n_head"], ids.shape
    p = {name.removeprefix("transformer."): t.double() for name, t in p.items()}

    def norm(x, name):
        return F.layer_norm(x, (C,), p[name + ".weight"], p[name + ".bias"], config["layer_norm_epsilon"])

    def linear(x, name):
        return x @ p[name + ".weight"] + p[name + ".bias"]

    h = norm(p["wte.weight"][ids] + p["wpe.weight"][:T], "emb_norm")
    for i in range(config["n_layer"]):
        qkv = linear(h, f"h.{i}.attn.c_attn")
        q, k, v = (y.view(B, T, NH, C // NH).transpose(1, 2) for y in qkv.split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        r = h + linear(y, f"h.{i}.attn.c_proj")
        x = r + linear(F.gelu(linear(norm(r, f"h.{i}.ln_1"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
        h = norm(x, f"h.{i}.ln_2")
    return h @ p["wte.weight"].T


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("poems")
    which = a.add_mutually_exclusive_group(required=True)
    which.add_argument("--vocabulary", type=pathlib.Path)
    which.add_argument("--grover", action="store_true")
    a.add_argument("--steps", type=int, default=10)
    a.add_argument("--full", action="store_true")
    a.add_argument("--work", type=pathlib.Path)
    o = a.parse_args()
    work = o.work or pathlib.Path(tempfile.mkdtemp(prefix="arapoet_finetune_"))
    hf, out = work / "hf", work / "out"

    torch.manual_seed(1)
    if o.grover:
        write_grover(hf, o.poems)
    else:
        write_gpt2(hf, o.vocabulary, o.full)
    flags = (f"--seq_len {SEQ_LEN} --batch_size 4 --total_batch_size {8 * SEQ_LEN} --max_steps {o.steps} "
             "--val_every 5 --val_batches 4 --sample_every 0 --save_every 0")
    run("make", "finetune", f"HF={hf}", f"POEMS={o.poems}", f"OUT={out}", f"TRAIN_FLAGS={flags}")
    run("make", "export", f"HF={hf}", f"OUT={out}")

    # The beginning of the validation file, cut to whole windows, so that both sides see the same contexts.
    header = np.fromfile(out / "data/val.bin", dtype=np.int32, count=256)
    text = np.fromfile(out / "data/val.bin", dtype=np.uint16, offset=1024)
    text = text[: (min(len(text), PIECE) - 1) // SEQ_LEN * SEQ_LEN + 1]
    header[2] = len(text)
    with open(work / "piece.bin", "wb") as f:
        f.write(header.tobytes() + text.tobytes())

    def our_loss(model):
        command = ["./train_gpt2", "-e", model, "--data", out / "data", "-j", work / "piece.bin",
                   "--max_steps", "0", "--seq_len", str(SEQ_LEN), "--batch_size", "4"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(printed)
        return float(re.search(r"validation loss ([0-9.]+) nats per token", printed)[1])

    before, ours = our_loss(out / "pretrained.bin"), our_loss(out / "model.bin")
    ids = torch.tensor(text.astype(np.int64))
    windows = ids[:-1].view(-1, SEQ_LEN)
    config = json.loads((out / "hf/config.json").read_text())
    with torch.no_grad():
        if o.grover:
            given, back = load_file(hf / "model.safetensors"), load_file(out / "hf/model.safetensors")
            assert {n: t.shape for n, t in given.items()} == {n: t.shape for n, t in back.items()}
            assert all(config[key] == value for key, value in GROVER.items())
            for f in ("tokenizer.json", "vocab.json", "merges.txt"):
                assert (out / "hf" / f).read_bytes() == (hf / f).read_bytes()
            logits = grover_logits(config, back, windows)
        else:
            logits = GPT2LMHeadModel.from_pretrained(out / "hf").eval()(windows).logits
    theirs = F.cross_entropy(logits.double().view(-1, logits.shape[-1]), ids[1:]).item()
    print(f"loss {before:.6f} before; after {o.steps} steps of fine-tuning {ours:.6f} here, {theirs:.6f} in "
          f"{'a GROVER in PyTorch' if o.grover else 'transformers'}, difference {abs(ours - theirs):.1e}")
    assert abs(ours - theirs) < 1e-4 < before - ours
    print("equal to 1e-4, and lower than before")


if __name__ == "__main__":
    main()
