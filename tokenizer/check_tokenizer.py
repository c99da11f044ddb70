#!/usr/bin/env python3
"""Compares ./tokenize with tiktoken and Hugging Face's tokenizers, token by token, and in speed.

    pip install tiktoken==0.14.0 tokenizers==0.23.3
    make export_tokenizer tokenize
    python3 tokenizer/check_tokenizer.py GPT2_FOLDER poems.csv

GPT2_FOLDER has GPT-2's vocab.json and merges.txt; poems.csv has a column poem_text. Two vocabularies are
checked: GPT-2's, and one trained here the way AraGPT2's was, with special tokens first and a space before
every text. Nothing is downloaded.
"""
import argparse
import csv
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from array import array

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RUST_BACKTRACE"] = "0"
import tiktoken
import tokenizers

# GPT-2's pattern in tiktoken's form. In the form that OpenAI first published, a long run
# overflows tiktoken's stack.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
SPECIAL = ["<|endoftext|>", "<s>", "<pad>", "</s>"]


def byte_of_character():
    """How GPT-2's files spell bytes: printable Latin-1 as itself, the other bytes as U+0100 and up."""
    visible = [b for b in range(256) if 0x21 <= b <= 0x7E or (b >= 0xA1 and b != 0xAD)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + k): b for k, b in enumerate(hidden)}


class Ours:
    def __init__(self, programs, folder, file):
        subprocess.run([f"{programs}/export_tokenizer", folder, file], check=True)
        self.command = [f"{programs}/tokenize", file]

    @staticmethod
    def frames(texts):
        return b"".join(struct.pack("<I", len(t)) + t for t in texts)

    def encode(self, texts):
        out = subprocess.run(self.command + ["--framed"], input=self.frames(texts), stdout=subprocess.PIPE,
                             check=True).stdout
        numbers, ids, i = array("I", out), [], 0
        while i < len(numbers):
            ids.append(numbers[i + 1:i + 1 + numbers[i]].tolist())
            i += 1 + numbers[i]
        return ids

    def seconds(self, texts):
        out = subprocess.run(self.command + ["--framed", "--time", "1"], input=self.frames(texts),
                             stdout=subprocess.PIPE, check=True, text=False).stdout
        return float(out.split()[0])

    def decode(self, ids):
        text = " ".join(map(str, ids)).encode()
        return subprocess.run(self.command + ["--decode"], input=text, stdout=subprocess.PIPE,
                              check=True).stdout


class Tiktoken:
    """tiktoken has no add_prefix_space, so encode() puts the space before a text."""
    name = "tiktoken"

    def __init__(self, folder, prefix_space):
        vocab = json.load(open(f"{folder}/vocab.json", encoding="utf-8"))
        byte_of = byte_of_character()
        ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items() if token not in SPECIAL}
        self.bpe = tiktoken.Encoding("checked", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        self.prefix_space = prefix_space

    def encode(self, texts):
        if self.prefix_space:
            texts = [" " + t if t and t[0] != " " else t for t in texts]
        return [self.encode_one(t) for t in texts]

    def encode_one(self, text):
        try:
            return self.bpe.encode_ordinary(text)
        except BaseException as e:  # a long run of white space before a word overflows tiktoken's stack
            if type(e).__name__ != "PanicException":
                raise
            return None


class HuggingFace:
    name = "tokenizers"

    def __init__(self, folder, prefix_space):
        self.bpe = tokenizers.ByteLevelBPETokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt",
                                                    add_prefix_space=prefix_space)

    def encode(self, texts):
        return [e.ids for e in self.bpe._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


class Check:
    def __init__(self, ours, peers):
        self.ours, self.peers, self.failed = ours, peers, 0

    def difference(self, what, text, ours, theirs):
        i = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        print(f"DIFFERENT from {what} at token {i} of {ascii(text[:200])}: "
              f"{ours[i:i + 8]}, wanted {theirs[i:i + 8]}")
        self.failed += 1

    def texts(self, what, texts):
        texts = list(texts)
        tokens, before, refused = 0, self.failed, {}
        for begin in range(0, len(texts), 50000):
            part = texts[begin:begin + 50000]
            ours = self.ours.encode([t.encode() for t in part])
            tokens += sum(map(len, ours))
            assert len(ours) == len(part)
            for peer in self.peers:
                for text, a, b in zip(part, ours, peer.encode(part)):
                    if b is None:
                        refused[peer.name] = refused.get(peer.name, 0) + 1
                    elif a != b and self.failed < before + 5:
                        self.difference(peer.name, text, a, b)
        equal = "equal to " + " and ".join(p.name for p in self.peers)
        verdict = equal if self.failed == before else "DIFFERENT"
        verdict += "".join(f", but {name} failed on {n}" for name, n in refused.items())
        print(f"{what}: {len(texts):,} texts, {tokens:,} tokens: {verdict}", flush=True)

    def invalid(self, what, texts, bpe, prefix_space):
        """Compares on bytes that are not valid UTF-8, which both peers refuse as a text. Each invalid byte is
        replaced by U+FFFD, tokenizers cuts this text into pieces, and tiktoken merges the original bytes of
        each piece."""
        cut = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        before = self.failed
        for raw, ours in zip(texts, self.ours.encode(texts)):
            prefixed = b" " + raw if prefix_space and raw[:1] not in (b" ", b"") else raw
            text = prefixed.decode("utf-8", "surrogateescape")
            shown = "".join("\uFFFD" if 0xD800 <= ord(c) <= 0xDFFF else c for c in text)
            spans = [span for _, span in cut.pre_tokenize_str(shown)]
            pieces = [text[a:b].encode("utf-8", "surrogateescape") for a, b in spans]
            theirs = [i for p in pieces for i in bpe._encode_single_piece(p)]
            if ours != theirs and self.failed < before + 5:
                self.difference("U+FFFD in place of invalid bytes", raw, ours, theirs)
        joined = b"".join(texts)
        back = self.ours.decode(self.ours.encode([joined])[0])
        if back not in (joined, b" " + joined):
            print("DIFFERENT after decoding")
            self.failed += 1
        verdict = "cut like U+FFFD, and decoded to the same" if self.failed == before else "DIFFERENT"
        print(f"{what}: {len(texts):,} texts: {verdict}", flush=True)


def code_points():
    return [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]


def random_mixes(rng, count):
    white = [chr(c) for c in (*range(9, 14), *range(0x1C, 0x20), 0x20, 0x85, 0xA0, 0x1680,
                              *range(0x2000, 0x200C), 0x2028, 0x2029, 0x202F, 0x205F, 0x2060, 0x3000, 0xFEFF)]
    ranges = [(0x0621, 0x064A), (0x064B, 0x0655), (0x0600, 0x06FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC),
              (0x41, 0x7A), (0x30, 0x39), (0x0660, 0x0669), (0x21, 0x2F), (0xA1, 0x24F), (0x1F300, 0x1F64F),
              (0x1F1E6, 0x1F1FF), (0x4E00, 0x9FFF)]
    words = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "''", " ", " ", "  ", "\n\n", "<|endoftext|>",
             "<s>", "\u200D", "\uFE0F"]
    for _ in range(count):
        text = ""
        while len(text) < rng.choice((3, 12, 80)):
            kind = rng.randrange(4)
            if kind == 0:
                text += rng.choice(words)
            elif kind == 1:
                text += "".join(rng.choice(white) for _ in range(rng.randint(1, 3)))
            else:
                first, last = rng.choice(ranges)
                text += "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))
        yield text


def without_space(rng, poems):
    n = 1_000_000
    arabic = "".join(poems).replace(" ", "").replace("\n", "").replace("\t", "")
    yield "\u0628" * n
    yield "a" * n
    yield "!" * n
    yield " " * n
    yield "\n" * n + "a"
    yield "".join(chr(rng.randint(0x61, 0x7A)) for _ in range(n))
    yield "".join(chr(rng.randint(0x0621, 0x064A)) for _ in range(n))
    yield "".join(c for c in arabic[:n] if "\u0621" <= c <= "\u064A")
    yield "".join(rng.choice("0123456789") for _ in range(n))


def random_bytes(rng, count):
    for _ in range(count):
        kind, n = rng.randrange(3), rng.randint(0, 60)
        if kind == 0:
            yield rng.randbytes(n)
        elif kind == 1:  # a text with some random bytes
            letters = (chr(rng.randint(0x0621, 0x064A)) + rng.choice(("", " ", "a")) for _ in range(n))
            text = bytearray("".join(letters).encode())
            for _ in range(rng.randint(1, 3)):
                if text:
                    text[rng.randrange(len(text))] = rng.randrange(256)
            yield bytes(text)
        else:  # a text that may end within a character
            text = "".join(rng.choice("\u0628\u20AC\U0001F600 a1'") for _ in range(n)).encode()
            yield text[:rng.randint(0, len(text))]


def compare(check, folder, poems, prefix_space):
    rng = random.Random(1)
    check.texts("the corpus", poems)
    check.texts("the corpus in one text", ["\n".join(poems)])
    check.texts("every code point alone", code_points())
    points = code_points()
    around = ["\u0628{}b", "1{}!", " {0}{0}\n"]
    check.texts("every code point between others",
                ("".join(a.format(c) + " " for c in points[i:i + 512])
                 for a in around for i in range(0, len(points), 512)))
    check.texts("random mixes", random_mixes(rng, 100000))
    check.texts("random bytes as text", (b.decode("utf-8", "replace") for b in random_bytes(rng, 30000)))
    check.texts("1 MB without a space", without_space(rng, poems))
    check.texts("no text", [""])
    check.invalid("random bytes", [b for b in random_bytes(rng, 30000)], check.peers[0].bpe, prefix_space)


def speed(ours, folder, poems, prefix_space, repetitions):
    raw = [p.encode() for p in poems]
    size = sum(map(len, raw)) / 1e6
    seconds = {"tokenize": [], "tiktoken": [], "tokenizers": []}
    for _ in range(repetitions):  # alternately, so that other load on the machine slows all of them
        seconds["tokenize"].append(ours.seconds(raw))
        for Peer in (Tiktoken, HuggingFace):
            peer = Peer(folder, prefix_space)  # a new one, because encoders cache words
            if Peer is Tiktoken:
                start = time.process_time()
                for p in poems:
                    peer.bpe.encode_ordinary(p)
            else:
                start = time.process_time()
                peer.bpe._tokenizer.encode_batch_fast(poems, add_special_tokens=False)
            seconds[Peer.name].append(time.process_time() - start)
    ours_median = statistics.median(seconds["tokenize"])
    print(f"speed on one core, {size:.1f} MB of poems, CPU time, median of {repetitions}:")
    for name, s in seconds.items():
        median = statistics.median(s)
        ratio = "" if name == "tokenize" else f"; tokenize is {median / ours_median:.1f} times as fast"
        print(f"  {name:10} {median:7.3f} s  {size / median:6.1f} MB/s  "
              f"(from {min(s):.3f} s to {max(s):.3f} s){ratio}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder"), parser.add_argument("corpus")
    parser.add_argument("--programs", default=".", help="the folder of export_tokenizer and tokenize")
    parser.add_argument("--only", choices=("equal", "speed"), help="compare only tokens, or only speed")
    parser.add_argument("--repetitions", type=int, default=5)
    o = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    csv.field_size_limit(1 << 30)
    with open(o.corpus, encoding="utf-8", newline="") as f:
        poems = [row["poem_text"] for row in csv.DictReader(f)]
    print(f"tiktoken {tiktoken.__version__}, tokenizers {tokenizers.__version__}, {len(poems):,} poems",
          flush=True)

    failed = 0
    with tempfile.TemporaryDirectory() as temp:
        trained = tokenizers.ByteLevelBPETokenizer(add_prefix_space=True)
        trained.train_from_iterator(poems, vocab_size=8000, special_tokens=SPECIAL, show_progress=False)
        for folder in ("files", "json"):
            os.mkdir(f"{temp}/{folder}")
        trained.save_model(f"{temp}/files")
        json.dump({"add_prefix_space": True}, open(f"{temp}/files/tokenizer_config.json", "w"))
        trained.save(f"{temp}/json/tokenizer.json")
        for title, folder, prefix_space in (("GPT-2", o.folder, False),
                                            ("trained like AraGPT2", f"{temp}/files", True)):
            print(f"\n--- {title}", flush=True)
            ours = Ours(o.programs, folder, f"{temp}/tokenizer.bin")
            if o.only != "speed":
                check = Check(ours, [Tiktoken(folder, prefix_space), HuggingFace(folder, prefix_space)])
                compare(check, folder, poems, prefix_space)
                failed += check.failed
            if o.only != "equal":
                speed(ours, folder, poems, prefix_space, o.repetitions)
        Ours(o.programs, f"{temp}/json", f"{temp}/from_json.bin")
        same = open(f"{temp}/from_json.bin", "rb").read() == open(f"{temp}/tokenizer.bin", "rb").read()
        verdict = "the same file" if same else "DIFFERENT files"
        print(f"\ntokenizer.json and vocab.json + merges.txt make {verdict}")
        failed += not same
    sys.exit(f"{failed} differences" if failed else 0)


if __name__ == "__main__":
    main()
