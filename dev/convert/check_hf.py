#!/usr/bin/env python3
"""Checks ./convert_gpt2 and ./export_tokenizer with the transformers library. Random models are saved by
transformers, converted, converted back and loaded again; they must have the same bits and cause no warning.
A model of characters is trained for some steps and exported; in transformers its tokenizer must give the same
tokens on all poems, and its pipeline the same text as ./sample_gpt2. Prints time and peak memory.

    make prepare_data train_gpt2 sample_gpt2 convert_gpt2 export_tokenizer tokenize
    dev/convert/check_hf.py [--programs .] [--poems FILE] [--only NAME] [--full] [--xl]

--poems names a CSV file with a column poem_text; by default the built-in poems. --only runs one check, e.g.
character_poet. --full adds GPT-2 124M with its real config (takes 2 GB of disk while it runs); --xl measures
the time and memory of converting 1.5 billion parameters (13 GB of disk). Needs torch, transformers,
safetensors and GNU time; peft where it is installed.
"""

import argparse
import csv
import importlib.util
import json
import logging
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from array import array

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RUST_BACKTRACE"] = "0"
import tokenizers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

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


def program(name):
    return os.path.join(args.programs, name)


def convert(*words):
    code, output, usage = run(program("convert_gpt2"), *words)
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
    code, output, _ = run(program("convert_gpt2"), "from-hf", folder, os.path.join(work, "old.bin"))
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


EOT = "<|endoftext|>"


def random_folder(name, **config):
    """A folder of transformers with a random model; returns the model and the folder."""
    folder = os.path.join(work, name)
    model = randomise(GPT2LMHeadModel(GPT2Config(**{**SMALL, **config})))
    model.save_pretrained(folder)
    return model, folder


def saved_by_users():
    """What transformers loads is the same model here; what it refuses is refused here."""
    model, folder = random_folder("tied")
    save_model(model, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with safe_open(os.path.join(folder, "model.safetensors"), "pt") as f:
        assert "lm_head.weight" in f.keys() and "transformer.wte.weight" not in f.keys()
    compare(model, load(folder, "save_model"), torch.float32, "save_model, by transformers")
    convert("from-hf", folder, os.path.join(work, "tied.bin"))
    convert("to-hf", os.path.join(work, "tied.bin"), os.path.join(work, "tied_back"))
    compare(model, load(os.path.join(work, "tied_back"), "save_model"), torch.float32, "save_model")

    for name, wrapped in (("compile", torch.compile(model)), ("ddp", torch.nn.ModuleDict({"module": model})),
                          ("both", torch.nn.ModuleDict({"module": torch.compile(model)}))):
        folder = os.path.join(work, name)
        model.config.save_pretrained(folder)
        tensors = {k: v.clone().contiguous() for k, v in wrapped.state_dict().items()}
        assert all(k.startswith(("_orig_mod.", "module.")) for k in tensors), list(tensors)[:3]
        save_file(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})
        convert("from-hf", folder, os.path.join(work, f"{name}.bin"))
        convert("to-hf", os.path.join(work, f"{name}.bin"), os.path.join(work, f"{name}_back"))
        compare(model, load(os.path.join(work, f"{name}_back"), name), torch.float32, name)
    print("ok  save_model, torch.compile, DistributedDataParallel")

    model = randomise(GPT2LMHeadModel(GPT2Config(**SMALL)))
    model.resize_token_embeddings(SMALL["vocab_size"], pad_to_multiple_of=64)
    assert model.config.vocab_size == 320
    there_and_back("padded", model)
    folder = os.path.join(work, "padded_hf")
    config = json.load(open(os.path.join(folder, "config.json")))
    config["vocab_size"] = SMALL["vocab_size"]
    json.dump(config, open(os.path.join(folder, "config.json"), "w"))
    try:
        GPT2LMHeadModel.from_pretrained(folder)
        raise AssertionError("transformers loads 320 rows as 301")
    except RuntimeError as e:
        assert "mismatch" in str(e), e
    code, output, _ = run(program("convert_gpt2"), "from-hf", folder, os.path.join(work, "padded.bin"))
    assert code == 1 and "set vocab_size to 320" in output and output.count("\n") == 1, output


def lora():
    """The command in the error message merges an adapter, and the result is converted."""
    if not importlib.util.find_spec("peft"):
        print("--  LoRA: peft is not installed")
        return
    import peft
    _, base = random_folder("lora_base")
    folder = os.path.join(work, "my lora")
    model = GPT2LMHeadModel.from_pretrained(base)  # the adapter's files name this folder
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    randomise(adapted).save_pretrained(folder)
    code, output, _ = run(program("convert_gpt2"), "from-hf", folder, os.path.join(work, "lora.bin"))
    assert code == 1 and output.count("\n") == 1, output
    command = re.search(r"python3 -c .*", output).group(0).replace("python3", sys.executable)
    subprocess.run(command, shell=True, check=True)
    convert("from-hf", folder + "-merged", os.path.join(work, "lora.bin"))
    convert("to-hf", os.path.join(work, "lora.bin"), os.path.join(work, "lora_back"))
    want = GPT2LMHeadModel.from_pretrained(folder + "-merged")
    compare(want, load(os.path.join(work, "lora_back"), "LoRA"), torch.float32, "LoRA")
    before = GPT2LMHeadModel.from_pretrained(base).transformer.h[0].attn.c_attn.weight
    assert not torch.equal(before, want.transformer.h[0].attn.c_attn.weight)
    print("ok  LoRA, merged as the message says")


def write_model(path, vocab_size, context=64):
    """A model file with one layer of one channel, whose numbers are all 0.5."""
    padded = (vocab_size + 127) // 128 * 128
    numbers = array("f", [0.5] * vocab_size + [0.0] * (padded - vocab_size) + [0.5] * (context + 27))
    with open(path, "wb") as f:
        f.write(struct.pack("<256i", 20240326, 3, context, vocab_size, 1, 1, 1, padded, *[0] * 248))
        f.write(numbers.tobytes())


def write_characters(path, characters, tags=()):
    """A tokenizer file of these characters, and of tags."""
    tokens = [t.encode() for t in (*characters, EOT, *tags)]
    with open(path, "wb") as f:
        f.write(struct.pack("<256i", 20240328, 2, len(tokens), len(characters), 1, 0, len(tags), *[0] * 249))
        f.write(b"".join(bytes([len(t)]) + t for t in tokens))


def read_tokens(path):
    """The bytes of a tokenizer file's tokens."""
    data, tokens, i = open(path, "rb").read(), [], 1024
    for _ in range(struct.unpack_from("<3i", data)[2]):
        tokens.append(data[i + 1:i + 1 + data[i]])
        i += 1 + data[i]
    return tokens


def to_hf(tokenizer_file):
    """Exports a model with this tokenizer; returns the folder and its AutoTokenizer."""
    folder = tempfile.mkdtemp(dir=work)
    shutil.copy(tokenizer_file, os.path.join(folder, "tokenizer.bin"))
    write_model(os.path.join(folder, "model.bin"), len(read_tokens(tokenizer_file)))
    convert("to-hf", os.path.join(folder, "model.bin"), os.path.join(folder, "hf"))
    del caught.lines[:]
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(folder, "hf"))
    assert not caught.lines, caught.lines
    return os.path.join(folder, "hf"), tokenizer


def refused(tokenizer, text):
    try:
        tokenizer(text)
    except Exception:
        return True
    return False


def check_characters(tokenizer, text, ids):
    eot = len(tokenizer) - 1
    both = tokenizer(text)
    # Not token_type_ids: the model would add their embeddings to the tokens'.
    assert set(both) == {"input_ids", "attention_mask"}, set(both)
    assert both["input_ids"] == [eot] + ids, text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([eot] + ids + [eot], skip_special_tokens=True) == text
    assert tokenizer.decode([eot] + ids) == EOT + text
    assert tokenizer.convert_ids_to_tokens(ids) == list(text)


def odd_vocabularies():
    rng = random.Random(1)
    odd = "\0\t\n\r !\"#$%&'(),-./0:;<=>?@A[\\]^_`a{|}~\x7f\x85\xa0\u0300\u0301\u0621\u0640\u064b\u0651" \
          "\u200c\u200d\u200f\u2028\u2029\u202e\u2581\u3000\ufdfa\ufe0f\ufeff\ufffd\U0001f600\U0010ffff"
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    for characters in (odd, "ab", "x", "", "\n a\u010a\u0120", "".join(sorted(rng.sample(every, 5000)))):
        file = os.path.join(work, "odd.bin")
        write_characters(file, characters)
        folder, tokenizer = to_hf(file)
        for kind in ("bos", "eos", "pad"):
            assert getattr(tokenizer, kind + "_token_id") == len(characters)
        for length in (0, 1, 2, 5, 50, 2000):
            ids = [rng.randrange(len(characters)) for _ in range(length)] if characters else []
            check_characters(tokenizer, "".join(characters[i] for i in ids), ids)
        everyone = list(range(len(characters)))
        check_characters(tokenizer, characters, everyone)
        for stranger in "\u0633z\v\U0001f601":  # never another token in silence
            assert stranger in characters or refused(tokenizer, characters[:1] + stranger), stranger
        assert tokenizer(EOT, add_special_tokens=False)["input_ids"] == [len(characters)]
        again = os.path.join(work, "again.bin")
        subprocess.run([program("export_tokenizer"), folder, again], check=True, stdout=subprocess.DEVNULL)
        assert open(again, "rb").read() == open(file, "rb").read()
        resaved = os.path.join(work, "resaved")  # as a user does after fine-tuning in transformers
        tokenizer.save_pretrained(resaved)
        subprocess.run([program("export_tokenizer"), resaved, again], check=True, stdout=subprocess.DEVNULL)
        assert open(again, "rb").read() == open(file, "rb").read()
    print("ok  odd characters")


def tags():
    """A text begins with end-of-text and the tag "other", or as the user writes; no tag is generated."""
    file = os.path.join(work, "tags.bin")
    write_characters(file, "ab", ["<|metre=other|>", "<|metre=\u0628|>"])
    folder, tokenizer = to_hf(file)
    assert tokenizer("ab")["input_ids"] == [2, 3, 0, 1]
    assert tokenizer(EOT + "<|metre=\u0628|>ab", add_special_tokens=False)["input_ids"] == [2, 4, 0, 1]
    assert tokenizer.decode([2, 4, 0, 1], skip_special_tokens=True) == "ab"
    torch.manual_seed(1)
    poet = AutoModelForCausalLM.from_pretrained(folder)  # whose tokens are all equally likely
    drawn = poet.generate(torch.tensor([[2, 3, 0]] * 50), do_sample=True, pad_token_id=2)
    assert set(drawn[:, 3:].flatten().tolist()) == {0, 1, 2}
    print("ok  tags")


def corpus():
    """All poems, prepared here, are the same tokens in transformers."""
    data = os.path.join(work, "corpus data")
    for keep in ("letters", "all"):
        subprocess.run([program("prepare_data"), args.poems, "-o", data, "--keep", keep], check=True,
                       stdout=subprocess.DEVNULL)
        tokens = [t.decode() for t in read_tokens(os.path.join(data, "tokenizer.bin"))]
        eot, count = tokens.index(EOT), 0
        _, tokenizer = to_hf(os.path.join(data, "tokenizer.bin"))
        assert len(tokenizer) == len(tokens)
        poems, ids = [], []
        for name in ("train.bin", "val.bin"):
            stream = array("H", open(os.path.join(data, name), "rb").read()[1024:]).tolist()
            ends = [i for i, t in enumerate(stream) if t == eot] + [len(stream)]
            for begin, end in zip(ends, ends[1:]):
                ids.append(stream[begin + 1:end])
                poems.append("".join(tokens[i] for i in ids[-1]))
        for begin in range(0, len(poems), 1000):
            part = slice(begin, begin + 1000)
            assert tokenizer(poems[part], add_special_tokens=False)["input_ids"] == ids[part]
            assert tokenizer(poems[part])["input_ids"] == [[eot] + i for i in ids[part]]
            assert tokenizer.batch_decode(ids[part]) == poems[part]
            count += sum(map(len, ids[part]))
        print(f"ok  {len(poems):,} poems, {count:,} tokens, {len(tokens)} characters ({keep})")


def greedy_here(model, prompt, tokens):
    command = [program("sample_gpt2"), "-e", model, "--temperature", "0", "--prompt", prompt]
    done = subprocess.run([*command, "--tokens", str(tokens)], check=True, stdout=subprocess.PIPE)
    return done.stdout.decode()[:-1]


def character_poet():
    """A model trained here on characters writes the same text in transformers' pipeline."""
    out, data = (os.path.join(work, n) for n in ("a poet", "a poet's data"))
    subprocess.run([program("prepare_data"), args.poems, "-o", data], check=True, stdout=subprocess.DEVNULL)
    train = ["--data", data, "--preset", "tiny", "-o", out, "--max_steps", "150", "--sample_every", "0"]
    subprocess.run([program("train_gpt2"), *train], check=True, stdout=subprocess.DEVNULL)
    model, hf = os.path.join(out, "model.bin"), os.path.join(out, "hf")
    convert("to-hf", model, hf)
    convert("from-hf", hf, os.path.join(work, "poet.bin"))
    assert open(model, "rb").read() == open(os.path.join(work, "poet.bin"), "rb").read()
    del caught.lines[:]
    poet = pipeline("text-generation", hf)
    prompts = ["", "قفا", "قفا نبك من ذكرى", "\n", " ", "ا\tل\n"]
    for prompt in prompts:
        # Up to the whole context, which is 64 tokens with end-of-text: transformers stops there by itself.
        theirs = poet(prompt, do_sample=False)[0]["generated_text"]
        assert theirs == greedy_here(model, prompt, 63 - len(prompt)), (prompt, theirs)
        assert prompt or len(theirs) > 20
    assert not caught.lines, caught.lines
    many = [p for p in prompts if p]
    for prompt, answers in zip(many, poet(many, do_sample=False, batch_size=len(many), max_new_tokens=30)):
        assert answers[0]["generated_text"] == greedy_here(model, prompt, 30), prompt  # padded on the left
    assert refused(poet, "x")
    text = poet("", do_sample=False)[0]["generated_text"]
    print(f"ok  a poet of characters writes in transformers: {text[:30]!r}...")


def texts_for_bpe(rng, poems, added):
    pieces = added + [" ", "  ", "\n", "\t", "قفا", " نبك", "it's", "12", "!?", EOT[:5], "\U0001f600"]
    for _ in range(3000):
        yield "".join(rng.choice(pieces) for _ in range(rng.randrange(9)))
    yield from poems[:500]


def bpe():
    """Byte-level BPEs, with added tokens and padding: here as in transformers, and back."""
    with open(args.poems, encoding="utf-8", newline="") as f:
        poems = [row["poem_text"] for row in csv.DictReader(f)][:2000]
    rng = random.Random(1)
    added = ["[verse]", "[v", "قافية", "\n\n", " نبك", "<a>"]
    for space in (False, True):
        trained = tokenizers.ByteLevelBPETokenizer(add_prefix_space=space)
        trained.train_from_iterator(poems, vocab_size=600, special_tokens=[EOT, "<pad>"], show_progress=False)
        base = os.path.join(work, f"bpe{space}")
        os.mkdir(base)
        trained.save(os.path.join(base, "tokenizer.json"))
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_file=os.path.join(base, "tokenizer.json"),
                                                       eos_token=EOT, bos_token=EOT, pad_token="<pad>")
        wrapped.add_tokens(added)
        wrapped.add_special_tokens({"sep_token": "<sep>"})
        for form in ("tokenizer.json", "vocab.json"):
            folder = os.path.join(work, f"bpe{space}_{form}")
            if form == "tokenizer.json":
                wrapped.save_pretrained(folder)
            else:  # as transformers saved tokenizers that are not fast
                os.mkdir(folder)
                trained.save_model(folder)
                extra = {t: i for t, i in wrapped.get_added_vocab().items() if t not in (EOT, "<pad>")}
                for name, content in (("added_tokens.json", extra),
                                      ("special_tokens_map.json", {"sep_token": "<sep>", "eos_token": EOT,
                                                                   "bos_token": EOT, "pad_token": "<pad>"}),
                                      ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer",
                                                                 "add_prefix_space": space})):
                    json.dump(content, open(os.path.join(folder, name), "w"))
            theirs = AutoTokenizer.from_pretrained(folder)
            assert theirs("[verse]")["input_ids"] == [theirs.get_added_vocab()["[verse]"]]
            json.dump({"vocab_size": len(theirs) + 7}, open(os.path.join(folder, "config.json"), "w"))
            ours = os.path.join(work, "bpe.bin")
            subprocess.run([program("export_tokenizer"), folder, ours], check=True, stdout=subprocess.DEVNULL)
            assert len(read_tokens(ours)) == len(theirs) + 7
            texts = list(texts_for_bpe(rng, poems, added))
            frames = b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in texts)
            tokenize = [program("tokenize"), ours, "--framed"]
            output = subprocess.run(tokenize, input=frames, check=True, stdout=subprocess.PIPE).stdout
            numbers = array("I", output)
            _, back = to_hf(ours)
            i = 0
            for text in texts:
                ids = numbers[i + 1:i + 1 + numbers[i]].tolist()
                i += 1 + numbers[i]
                want = theirs(text, add_special_tokens=False)["input_ids"]
                assert ids == want, (form, space, text, ids, want)
                assert back(text, add_special_tokens=False)["input_ids"] == want, (form, space, text)
                assert back(text)["input_ids"] == [back.eos_token_id] + want
                assert back.decode(want) == theirs.decode(want)
        print(f"ok  byte-level BPE with added tokens{', add_prefix_space' if space else ''}")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--programs", default=".", help="the folder of the programs to check")
parser.add_argument("--poems", default="data/sample_poems.csv", help="CSV with a column poem_text")
parser.add_argument("--only", help="the name of one check")
parser.add_argument("--full", action="store_true", help="also GPT-2 124M")
parser.add_argument("--xl", action="store_true", help="also the time and memory of 1.5 billion parameters")
args = parser.parse_args()
args.programs = os.path.abspath(args.programs)
torch.manual_seed(1)
caught = Caught()
with tempfile.TemporaryDirectory() as work:
    for check in (small_models, tokens_and_logits, pytorch_bin, grover, saved_by_users, lora,
                  odd_vocabularies, tags, corpus, character_poet, bpe):
        if args.only in (None, check.__name__):
            check()
    if args.full:
        there_and_back("gpt2_124M", randomise(GPT2LMHeadModel(GPT2Config())))
    if args.xl:
        xl()
print(f"all agree with transformers {transformers.__version__}, torch {torch.__version__}")
