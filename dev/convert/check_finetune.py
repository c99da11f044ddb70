"""Fine-tunes a GPT-2 that transformers wrote, gives it back, and compares the loss in PyTorch with ours.

    python3 dev/convert/check_finetune.py VOCABULARY_DIR POEMS.csv [--steps 10] [--full] [--work DIR]

VOCABULARY_DIR holds GPT-2's vocab.json and merges.txt. The model has random weights: --full takes the sizes of
gpt2 (124M), the default a small one. Runs `make finetune` and `make export` as a user would, loads the result by
from_pretrained, and asserts that the mean loss on the same validation tokens agrees to 1e-4.
Needs torch, transformers and numpy (dev/golden/requirements.txt).
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import tempfile

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel


def run(*command):
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("vocabulary", type=pathlib.Path)
    a.add_argument("poems")
    a.add_argument("--steps", type=int, default=10)
    a.add_argument("--full", action="store_true")
    a.add_argument("--work", type=pathlib.Path)
    o = a.parse_args()
    work = o.work or pathlib.Path(tempfile.mkdtemp(prefix="arapoet_finetune_"))
    hf, out, seq_len, tokens = work / "hf", work / "out", 128, 4097

    torch.manual_seed(1)
    sizes = {} if o.full else dict(n_layer=3, n_head=4, n_embd=64, n_positions=seq_len)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(hf)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(o.vocabulary / name, hf / name)

    flags = f"--seq_len {seq_len} --batch_size 4 --total_batch_size {8 * seq_len} --max_steps {o.steps} --val_every 5 --val_batches 4 --sample_every 0 --save_every 0"
    run("make", "finetune", f"HF={hf}", f"POEMS={o.poems}", f"OUT={out}", f"TRAIN_FLAGS={flags}")
    run("make", "export", f"HF={hf}", f"OUT={out}")

    # a piece of the validation file in whole windows, so that both sides see the same contexts
    header = np.fromfile(out / "data/val.bin", dtype=np.int32, count=256)
    text = np.fromfile(out / "data/val.bin", dtype=np.uint16, offset=1024)
    text = text[: (min(len(text), tokens) - 1) // seq_len * seq_len + 1]
    header[2] = len(text)
    with open(work / "piece.bin", "wb") as f:
        f.write(header.tobytes() + text.tobytes())
    said = subprocess.run(["./train_gpt2", "-e", out / "model.bin", "--data", out / "data", "-j", work / "piece.bin",
                           "--max_steps", "0", "--seq_len", str(seq_len), "--batch_size", "4"], check=True, capture_output=True, text=True).stdout
    print(said)
    ours = float(re.search(r"validation loss ([0-9.]+) nats per token", said)[1])

    model = GPT2LMHeadModel.from_pretrained(out / "hf").eval()
    ids = torch.tensor(text.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[:-1].view(-1, seq_len)).logits
    theirs = torch.nn.functional.cross_entropy(logits.double().view(-1, logits.shape[-1]), ids[1:]).item()
    print(f"after {o.steps} steps of fine-tuning: loss {ours:.6f} here, {theirs:.6f} in transformers, difference {abs(ours - theirs):.1e}")
    assert abs(ours - theirs) < 1e-4
    print("equal to 1e-4")


if __name__ == "__main__":
    main()
