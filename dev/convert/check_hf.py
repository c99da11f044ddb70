#!/usr/bin/env python3
"""Checks ./convert_gpt2 with the transformers library. Random models are saved by transformers, converted,
converted back and loaded again; they must have the same bits and cause no warning. Prints time and peak
memory.

    dev/convert/check_hf.py [--convert ./convert_gpt2] [--full] [--xl]

--full adds GPT-2 124M with its real config (takes 2 GB of disk while it runs); --xl measures the time and
memory of converting 1.5 billion parameters (13 GB of disk). Needs torch, transformers, safetensors and GNU
time.
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

SMALL = dict(n_embd=36, n_layer=3, n_head=3, vocab_size=301, n_positions=29, bos_token_id=None,
             eos_token_id=None)

# AraGPT2-large and -mega are published with their own model class. This one has the same tensor names, and
# only what loading needs.
ARAGPT2_CONFIG = """
from transformers import GPT2Config

class AraGPT2Config(GPT2Config):
    model_type = "aragpt2"
"""
ARAGPT2_MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from .configuration_aragpt2 import AraGPT2Config

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(3 * c, c), Conv1D(c, c)

class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(4 * c, c), Conv1D(c, 4 * c)

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(c), Attention(c), nn.LayerNorm(c), MLP(c)

class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.emb_norm = nn.LayerNorm(config.n_embd)
        self.h = nn.ModuleList(Block(config.n_embd) for _ in range(config.n_layer))

class AraGPT2LMHeadModel(PreTrainedModel):
    config_class = AraGPT2Config
    base_model_prefix = "transformer"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head
"""


class Caught(logging.Handler):
    """Collects all warnings, from logging and from the warnings module."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []
        logging.getLogger("transformers").addHandler(self)
        warnings.showwarning = lambda message, *rest: self.lines.append(str(message))
        warnings.simplefilter("always")

    def emit(self, record):
        self.lines.append(record.getMessage())


def run(*command):
    """Runs a program; returns its exit code, output, and "seconds megabytes" of time and peak memory."""
    with tempfile.NamedTemporaryFile("r") as usage:
        p = subprocess.run(["/usr/bin/time", "-q", "-o", usage.name, "-f", "%e %M", *command],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seconds, kilobytes = usage.read().split()[-2:]
    return p.returncode, p.stdout, f"{float(seconds):6.2f} s {int(kilobytes) / 1024:7.1f} MB"


def convert(*words):
    code, output, usage = run(args.convert, *words)
    assert code == 0, f"{words}: {output}"
    return usage


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def randomise(model):
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def compare(a, b, dtype, name):
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys(), f"{name}: {x.keys() ^ y.keys()}"
    for key in x:
        want = x[key].to(dtype)
        assert y[key].dtype == dtype, f"{name}: {key} is {y[key].dtype}, wanted {dtype}"
        assert torch.equal(bits(want), bits(y[key])), f"{name}: {key} differs"


def load(folder, name, cls=GPT2LMHeadModel, **more):
    del caught.lines[:]
    model, info = cls.from_pretrained(folder, output_loading_info=True, **more)
    assert not caught.lines, f"{name}: {caught.lines}"
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{name}: {kind}: {info[kind]}"
    return model


def there_and_back(name, model, dtype=torch.float32, **save):
    """Saves the model, converts it with from-hf and to-hf, loads and compares; returns to-hf's folder."""
    hf, bin_file, back = (os.path.join(work, name + end) for end in ("_hf", ".bin", "_back"))
    model.to(dtype).save_pretrained(hf, **save)
    want = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    first = convert("from-hf", hf, bin_file)
    second = convert("to-hf", bin_file, back)
    again = load(back, name)
    compare(model, again, want, name)
    for key in GPT2Config().to_dict():
        mine, theirs = getattr(again.config, key, None), getattr(model.config, key, None)
        if not key.startswith("_") and key not in ("dtype", "architectures", "transformers_version"):
            theirs = "gelu_new" if theirs == "gelu_pytorch_tanh" else theirs  # two names of the same function
            assert mine == theirs, f"{name}: config {key} is {mine!r}, was {theirs!r}"
    print(f"ok  {name:28} from-hf {first}   to-hf {second}")
    return back


def small_models():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for activation in ("gelu_new", "gelu", "gelu_pytorch_tanh"):
            model = randomise(GPT2LMHeadModel(GPT2Config(**SMALL, activation_function=activation)))
            there_and_back(f"{str(dtype)[6:]}_{activation}", model, dtype)
    model = randomise(GPT2LMHeadModel(GPT2Config(**SMALL)))
    there_and_back("sharded", model, max_shard_size="50KB")
    assert os.path.exists(os.path.join(work, "sharded_hf", "model.safetensors.index.json"))


def tokens_and_logits():
    """GPT-2's vocabulary size tells end-of-text without a tokenizer; the logits have the same bits."""
    config = GPT2Config(n_embd=24, n_layer=2, n_head=2, n_positions=16)
    model = randomise(GPT2LMHeadModel(config)).eval()
    again = load(there_and_back("gpt2_vocabulary", model), "gpt2_vocabulary").eval()
    assert again.config.eos_token_id == 50256 == again.generation_config.eos_token_id
    tokens = torch.arange(16)[None] * 3000
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def pytorch_bin():
    """The command in the error message converts pytorch_model.bin to a file that from-hf reads."""
    folder = os.path.join(work, "it's old")
    model = randomise(GPT2LMHeadModel(GPT2Config(**SMALL)))
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), os.path.join(folder, "pytorch_model.bin"))
    code, output, _ = run(args.convert, "from-hf", folder, os.path.join(work, "old.bin"))
    command = re.search(r"cd .*", output).group(0).replace("python3", sys.executable)
    assert code == 1 and output.count("\n") == 1
    subprocess.run(command, shell=True, check=True)
    convert("from-hf", folder, os.path.join(work, "old.bin"))
    convert("to-hf", os.path.join(work, "old.bin"), os.path.join(work, "old_back"))
    compare(model, load(os.path.join(work, "old_back"), "old"), torch.float32, "old")
    print("ok  pytorch_model.bin")


def grover():
    src, bin_file, back = (os.path.join(work, name) for name in ("ara_hf", "ara.bin", "ara_back"))
    os.makedirs(src)
    for name, text in (("configuration_aragpt2.py", ARAGPT2_CONFIG), ("modeling_aragpt2.py", ARAGPT2_MODEL)):
        with open(os.path.join(src, name), "w") as f:
            f.write(text)
    with open(os.path.join(src, "tokenizer.json"), "w") as f:
        json.dump({"added_tokens": [{"content": "<|endoftext|>", "id": 7}]}, f)
    config = {**SMALL, "model_type": "aragpt2", "activation_function": "gelu", "auto_map": {
        "AutoConfig": "configuration_aragpt2.AraGPT2Config",
        "AutoModelForCausalLM": "modeling_aragpt2.AraGPT2LMHeadModel"}}
    with open(os.path.join(src, "config.json"), "w") as f:
        json.dump(config, f)
    auto = transformers.AutoConfig.from_pretrained(src, trust_remote_code=True)
    model = randomise(AutoModelForCausalLM.from_config(auto, trust_remote_code=True))
    model.save_pretrained(src)
    with open(os.path.join(src, "config.json"), "w") as f:
        json.dump(config, f)
    convert("from-hf", src, bin_file)
    convert("to-hf", bin_file, back, "--tokenizer_dir", src)
    again = load(back, "GROVER", AutoModelForCausalLM, trust_remote_code=True)
    compare(model, again, torch.float32, "GROVER")
    assert type(again).__name__ == "AraGPT2LMHeadModel" and again.config.eos_token_id == 7
    with safe_open(os.path.join(src, "model.safetensors"), "pt") as a, \
            safe_open(os.path.join(back, "model.safetensors"), "pt") as b:
        assert set(a.keys()) == set(b.keys()), set(a.keys()) ^ set(b.keys())
    print("ok  GROVER with AraGPT2's tensor names")


def xl():
    """A model of gpt2-xl's sizes whose numbers are all zero, a hole in the file."""
    folder, bin_file, back = (os.path.join(work, name) for name in ("xl_hf", "xl.bin", "xl_back"))
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25))
    model.config.save_pretrained(folder)
    header, pos = {}, 0
    for name, p in model.state_dict().items():
        if name != "lm_head.weight":
            end = pos + 4 * p.numel()
            header[name] = {"dtype": "F32", "shape": list(p.shape), "data_offsets": [pos, end]}
            pos = end
    text = json.dumps(header).encode()
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + pos)
    first = convert("from-hf", folder, bin_file)
    second = convert("to-hf", bin_file, back)
    print(f"ok  {'gpt2-xl (zeros)':28} from-hf {first}   to-hf {second}")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--convert", default="./convert_gpt2", help="the program to check")
parser.add_argument("--full", action="store_true", help="also GPT-2 124M")
parser.add_argument("--xl", action="store_true", help="also the time and memory of 1.5 billion parameters")
args = parser.parse_args()
args.convert = os.path.abspath(args.convert)
torch.manual_seed(1)
caught = Caught()
with tempfile.TemporaryDirectory() as work:
    small_models()
    tokens_and_logits()
    pytorch_bin()
    grover()
    if args.full:
        there_and_back("gpt2_124M", randomise(GPT2LMHeadModel(GPT2Config())))
    if args.xl:
        xl()
print(f"all agree with transformers {transformers.__version__}, torch {torch.__version__}")
