#!/usr/bin/env python3
"""Tests serve_gpt2 through its port, with any model of Arabic poems.

    dev/demo/test_serve.py --command './serve_gpt2 out/model.bin --data DIR' [--tagged MODEL] [--openai]
                           [--only WORD]

--command is the program, a model, and its flags without --port; the tests start it themselves, on free ports.
--tagged is a model in another folder that learnt tags of two columns. --openai also tries the package
`openai` (pip install openai), if it is installed. The last line is "N passed, N failed". The exit code is 1
if a test failed. It takes a minute and a half.
"""
import argparse
import collections
import contextlib
import http.client
import json
import random
import re
import resource
import shlex
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import traceback

TESTS = []
FLAGS = None  # the command line's
PROMPT = "يا ليل"
# Takes 13 seconds on two cores of a Zen 5, longer with --threads 1: verses with a rhyme that hardly any word
# has are drawn again and again.
LONG = {"prompt": PROMPT, "verses": 100, "rhyme": "ظظظظظظ", "max_tokens": 16384, "stream": True}


def test(promise):
    def register(run):
        TESTS.append((promise, run))
        return run
    return register


class Skipped(Exception):
    """Why a promise cannot be tested here."""


def check(condition, *found):
    if not condition:
        raise AssertionError(" ".join(str(f) for f in found) or "not so")


def same(found, wanted, what=""):
    check(found == wanted, f"{what} is {found!r}, wanted {wanted!r}")


def wait_for(what, condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        check(time.monotonic() < end, f"{what}: not within {seconds} s")
        time.sleep(0.02)


def figure(text):
    print(f"  {text}", flush=True)


# ---------------------------------------------------------------------------------------------
# The server and its clients

Answer = collections.namedtuple("Answer", "status headers body")  # body: bytes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def program():
    return shlex.split(FLAGS.command)[0]


def model():
    return shlex.split(FLAGS.command)[1]


def run_to_end(*arguments):
    """Exit code, stdout and stderr of the program."""
    p = subprocess.run([program(), *arguments], capture_output=True, text=True, timeout=20)
    return p.returncode, p.stdout, p.stderr


class Server:
    def __init__(self, *flags):
        self.port = free_port()
        command = [*shlex.split(FLAGS.command), *flags, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.line = self.process.stdout.readline()
        check(f":{self.port}" in self.line, "the server says:", self.line, self.process.poll())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def rss(self):
        """MiB of memory."""
        with open(f"/proc/{self.process.pid}/status") as f:
            return int(re.search(r"VmRSS:\s+(\d+)", f.read())[1]) / 1024

    def models(self):
        return json.loads(self.ask("GET", "/v1/models").body)["data"]

    def ask(self, method, path, body=None, headers=(), seconds=30):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        with contextlib.closing(c):
            c.request(method, path, body, dict(headers))
            r = c.getresponse()
            return Answer(r.status, r.headers, r.read())

    def post(self, body, path="/v1/completions", kind="application/json", seconds=30):
        if not isinstance(body, (bytes, str)):
            body = json.dumps(body, ensure_ascii=False)
        body = body.encode() if isinstance(body, str) else body
        return self.ask("POST", path, body, {"Content-Type": kind}, seconds)

    def complete(self, **fields):
        """The answer's object. The prompt is PROMPT, and the text does not end before max_tokens."""
        a = self.post({"prompt": PROMPT, "verses": 100, **fields})
        same(a.status, 200, a.body.decode())
        return json.loads(a.body)

    def text(self, **fields):
        return self.complete(**fields)["choices"][0]["text"]

    @contextlib.contextmanager
    def stream(self, **fields):
        """Gives the events of a stream, as they come; the last one is "[DONE]". Hangs up at the end."""
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(c):
            body = {"prompt": PROMPT, "verses": 100, "stream": True, **fields}
            c.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            with c.getresponse() as r:
                same(r.status, 200, r.headers)
                check(r.headers["Content-Type"].startswith("text/event-stream"), r.headers)
                yield events(r)

    def connect(self, data=b""):
        s = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        s.sendall(data)
        return s

    def raw(self, data):
        """What the server answers to these bytes."""
        with self.connect(data) as s:
            return b"".join(iter(lambda: s.recv(65536), b""))


def events(response):
    while line := response.readline():
        check(line.startswith(b"data: ") and response.readline() == b"\n", line)
        if line == b"data: [DONE]\n":
            yield "[DONE]"
            same(response.read(), b"", "after [DONE]")
            return
        yield json.loads(line[6:])


def whole(all_events, index=0):
    """The choice that a stream's events amount to."""
    all_events = list(all_events)
    same(all_events[-1], "[DONE]", "the last event")
    parts = [c for e in all_events[:-1] for c in e["choices"] if c["index"] == index]
    check(all(p["finish_reason"] is None for p in parts[:-1]), "finish_reason before the last event")
    choice = {**parts[-1], "text": "".join(p["text"] for p in parts)}
    if parts[0]["logprobs"]:
        for name in parts[0]["logprobs"]:
            choice["logprobs"] = {**choice["logprobs"], name: sum((p["logprobs"][name] for p in parts), [])}
    return choice


# A verse's rhyme, as data/verses.h defines it: the last letter, with the letters before it as long as those
# are ا و ي ه, three at most.
def letters_of(verse):
    letters = re.sub(r"[^\u0621-\u063A\u0641-\u064A\u066E-\u06D3]", "", verse)
    return letters.replace("ة", "ه").replace("ى", "ا")


def rhyme_of(verse):
    letters = letters_of(verse)
    return letters[-min(3, 1 + len(re.search("[اويه]*$", letters)[0])):]


def verses_of(text):
    return [line for line in text.split("\n") if letters_of(line)]


# ---------------------------------------------------------------------------------------------
# Texts

@test("the answer has OpenAI's fields, and the token counts add up")
def _(server):
    a = server.complete(max_tokens=20, n=2)
    same(set(a), {"id", "object", "created", "model", "prompt", "seed", "choices", "usage"}, "fields")
    same(a["object"], "text_completion", "object")
    check(abs(a["created"] - time.time()) < 10 and a["id"].startswith("cmpl-"), a)
    same([c["index"] for c in a["choices"]], [0, 1], "indices")
    for c in a["choices"]:
        same(set(c), {"index", "text", "logprobs", "finish_reason", "rhyme"}, "a choice's fields")
        same((c["logprobs"], c["rhyme"]), (None, None), "logprobs and rhyme")
    u = a["usage"]
    same(u["total_tokens"], u["prompt_tokens"] + u["completion_tokens"], "total_tokens")
    same(u["completion_tokens"], 2 * 20, "completion_tokens")
    check(u["prompt_tokens"] > 1, u)


@test("a text that max_tokens cuts has the finish_reason length, one that ends itself has stop")
def _(server):
    same(server.complete(max_tokens=1)["choices"][0]["finish_reason"], "length")
    same(server.complete(max_tokens=3000, verses=1)["choices"][0]["finish_reason"], "stop")


@test("one seed gives one text, other seeds and the n texts of a request differ")
def _(server):
    first = [c["text"] for c in server.complete(seed=1, n=3, max_tokens=30)["choices"]]
    again = [c["text"] for c in server.complete(seed=1, n=3, max_tokens=30)["choices"]]
    same(again, first, "the second answer")
    same(len(set(first)), 3, "different texts")
    same(server.text(seed=1, max_tokens=30), first[0], "the text with n=1")
    check(server.text(seed=2, max_tokens=30) not in first)
    a = server.complete(max_tokens=30)
    same(server.text(seed=a["seed"], max_tokens=30), a["choices"][0]["text"], "with the seed that was drawn")
    check(server.text(seed=2**53, max_tokens=30) != server.text(seed=2**53 - 1, max_tokens=30))


@test("temperature 0 writes the likeliest text, as do top_k 1 and a tiny top_p")
def _(server):
    greedy = server.text(temperature=0, max_tokens=30)
    same(server.text(top_k=1, max_tokens=30), greedy, "top_k 1")
    same(server.text(top_p=1e-6, max_tokens=30), greedy, "top_p 1e-6")


@test("a stop string ends the text before it, also across tokens and in a stream")
def _(server):
    text = server.text(seed=3, max_tokens=80)
    for at, length in (0, 1), (1, 2), (5, 3), (9, 6), (20, 12), (30, 25):
        stop = text[at:at + length]
        fields = dict(seed=3, max_tokens=80, stop=["never written", stop])
        choice = server.complete(**fields)["choices"][0]
        same((choice["text"], choice["finish_reason"]), (text[:text.find(stop)], "stop"), repr(stop))
        with server.stream(**fields) as s:
            same(whole(s), choice, "streamed")
    same(server.text(seed=3, max_tokens=80, stop=text[70:] + "!"), text, "where a stop string only begins")
    same(server.text(seed=3, max_tokens=80, stop=""), text, "with an empty stop string")


@test("a stream amounts to the text that comes without it, and ends with [DONE]")
def _(server):
    for fields in (dict(n=3, logprobs=2, max_tokens=40), dict(verses=3, rhyme="auto", logprobs=0),
                   dict(prompt="", max_tokens=1)):
        at_once = server.complete(seed=4, **fields)
        with server.stream(seed=4, **fields) as s:
            came = list(s)
        for i, choice in enumerate(at_once["choices"]):
            same(whole(came, i), choice, f"choice {i} streamed")
        same(came[-2]["usage"], at_once["usage"], "usage of the last event")
        check(all("usage" not in e for e in came[:-2]), "usage before the last event")
        check(len(came) > 3 or fields.get("max_tokens") == 1, f"only {len(came)} events")
        same(len({e["id"] for e in came[:-1]}), 1, "ids of a stream")


@test("logprobs: one a token, at most 0, the likeliest first, and it is what temperature 0 takes")
def _(server):
    for top, temperature in (3, 0), (20, 1.5), (0, 0.8):
        a = server.complete(logprobs=top, temperature=temperature, max_tokens=50, seed=5)
        text, l = a["choices"][0]["text"], a["choices"][0]["logprobs"]
        same({len(l[name]) for name in l}, {a["usage"]["completion_tokens"]}, "lengths")
        same(set(l), {"tokens", "token_logprobs", "top_logprobs", "text_offset"}, "fields")
        check(all(p <= 0 for p in l["token_logprobs"]), l["token_logprobs"])
        whole_characters = not any(t.startswith("bytes:") for t in l["tokens"])
        if whole_characters:
            same("".join(l["tokens"]), text, "the tokens' text")
        for i, likeliest in enumerate(l["top_logprobs"]):
            same(len(likeliest), top, "alternatives")
            values, token, own = list(likeliest.values()), l["tokens"][i], l["token_logprobs"][i]
            same(values, sorted(values, reverse=True), "alternatives")
            check(not top or own <= values[0], "a token is likelier than the likeliest")
            check(likeliest.get(token, own) == own, "a token has two probabilities")
            check(sum(2.718281828 ** v for v in values) < 1.0001, "more than 1 in all", values)
            if temperature == 0:
                same(token, next(iter(likeliest)), "the greedy token")
            if whole_characters:
                same(l["text_offset"][i], len("".join(l["tokens"][:i])), f"text_offset {i}")


@test("a text has the same bits alone and beside seven others")
def _(server):
    fields = dict(seed=6, max_tokens=60, logprobs=5, prompt=PROMPT + " ")
    alone = server.complete(**fields)["choices"]
    with server.stream(n=7, max_tokens=16384) as others:
        next(others)
        same(server.complete(**fields)["choices"], alone, "beside others")
        same(server.complete(**fields)["choices"], alone, "beside others")


@test("eight texts at once are written together: sooner than one after the other")
def _(_):
    def seconds(n):
        started = time.monotonic()
        same(server.complete(n=n, max_tokens=200)["usage"]["completion_tokens"], n * 200, "tokens")
        return time.monotonic() - started
    # One thread, and the shortest times, because other programs may use the processor.
    with Server("--threads", "1") as server:
        one, eight = (min(times) for times in zip(*[(seconds(1), seconds(8)) for _ in range(6)]))
    figure(f"200 tokens on one thread: one text {one * 1e3:.0f} ms, eight at once {eight * 1e3:.0f} ms, "
           f"{eight / one:.2f} times as long")
    check(eight < 6 * one, f"{eight / one:.1f} times")  # one after the other it is 8 times


@test("the first letter comes within 500 ms")
def _(server):
    def seconds():
        started = time.monotonic()
        with server.stream(max_tokens=50) as s:
            check(next(s)["choices"][0]["text"])
            return time.monotonic() - started
    times = sorted(seconds() for _ in range(9))
    figure(f"first letter: median {statistics.median(times) * 1e3:.0f} ms, worst {times[-1] * 1e3:.0f} ms")
    check(statistics.median(times) < 0.5, times)


# ---------------------------------------------------------------------------------------------
# Prompts, verses, rhymes

@test("a prompt is cleaned as the training text was: vowel signs are no part of it")
def _(server):
    a = server.complete(prompt="قِفَا نَبْكِ", seed=7, max_tokens=20)
    same(a["prompt"], "قفا نبك", "prompt")
    same(a["choices"][0]["text"], server.text(prompt="قفا نبك", seed=7, max_tokens=20), "text")
    with server.stream(prompt="قِفَا نَبْكِ", max_tokens=200) as s:  # an event may have several tokens
        first, *others = [e.get("prompt") for e in s if e != "[DONE]"]
    same(first, "قفا نبك", "the first event's prompt")
    check(others and not any(others), "the other events' prompts:", others)


@test("a prompt that is longer than the context goes on, and so does a text")
def _(server):
    context = server.models()[0]["context"]
    a = server.complete(prompt="قفا نبك من ذكرى حبيب ومنزل\n" * (context // 4), max_tokens=20, seed=8)
    check(a["usage"]["prompt_tokens"] > context, a["usage"])
    same(a["usage"]["completion_tokens"], 20, "completion_tokens")
    a = server.complete(max_tokens=2 * context + 10)
    same(a["usage"]["completion_tokens"], 2 * context + 10, "completion_tokens")


@test("the text ends after the wished verses, and the prompt's are among them")
def _(server):
    for prompt in "", PROMPT, "قفا نبك\n", "قفا نبك\nمن ذكرى\n":
        a = server.complete(prompt=prompt, verses=3, max_tokens=3000)
        same(len(verses_of(a["prompt"] + a["choices"][0]["text"])), 3, f"verses after {prompt!r}")


@test("all verses end in the wished letters, and unrhymed names those that do not")
def _(server):
    for wish, wanted in ("ر", "ر[اويه]{0,2}$"), ("با", "با$"), ("ان", "ان$"), ("رِ", "ر[اويه]{0,2}$"):
        a = server.complete(verses=3, rhyme=wish, max_tokens=3000, seed=9)
        choice = a["choices"][0]
        verses, found = verses_of(a["prompt"] + choice["text"]), choice["rhyme"]
        same(len(verses), 3, "verses")
        for number, verse in enumerate(verses, 1):
            ending = letters_of(verse)
            kept = ending.endswith(found["letters"]) and bool(re.search(wanted, ending))
            same(kept, number not in found["unrhymed"], f"{wish}: verse {number}, {verse}: {found}; kept")


@test("rhyme auto: all verses rhyme as the prompt's first")
def _(server):
    a = server.complete(prompt="قفا نبك من ذكرى حبيب\tعلى دار\n", verses=4, rhyme="auto", max_tokens=3000)
    found = a["choices"][0]["rhyme"]
    same(found["letters"], "ر", "letters")
    for number, verse in enumerate(verses_of(a["prompt"] + a["choices"][0]["text"]), 1):
        same(rhyme_of(verse) == "ر", number not in found["unrhymed"], f"verse {number}: {verse}")


@test("verses of the prompt that do not rhyme are told, and stay")
def _(server):
    prompt = "قفا نبك من ذكرى حبيب\tعلى دار\nسكن الأنام ونام كل مسهد\n"
    for rhyme, wrong in ("auto", {2}), ("د", {1}), ("ب", {1, 2}):
        a = server.complete(prompt=prompt, verses=3, rhyme=rhyme, max_tokens=3000)
        same(a["prompt"], prompt)
        unrhymed = set(a["choices"][0]["rhyme"]["unrhymed"])
        same(unrhymed - {3}, wrong, f"{rhyme}: unrhymed verses of the prompt")


@test("measures count a text's verses and what it copies")
def _(server):
    if not server.models()[0]["measures"]:
        raise Skipped("the model's training text is not there")
    text = server.text(verses=4, max_tokens=3000)
    m = json.loads(server.post({"text": text}, "/v1/measures").body)
    same(set(m), {"verses", "rhyme_kept", "words", "words_known", "longest_run", "longest_run_text"})
    same(m["verses"], len(verses_of(text)), "verses")
    check(0 <= m["rhyme_kept"] <= 1 and 0 <= m["words_known"] <= 1 and m["words"] > 3, m)
    check(m["longest_run_text"] in text, m)
    refused(server.post({"text": "\u0628 " * 11000}, "/v1/measures"), 400, "text")
    m = json.loads(server.post({"text": ""}, "/v1/measures").body)
    same((m["verses"], m["rhyme_kept"], m["words_known"]), (0, None, None), "of an empty text")


@test("of many measures at once some are refused with 429 and Retry-After, and the others are made")
def _(server):
    if not server.models()[0]["measures"]:
        raise Skipped("the model's training text is not there")
    body = json.dumps({"text": "قفا نبك من ذكرى حبيب ومنزل\n" * 600}, ensure_ascii=False).encode()
    head = (b"POST /v1/measures HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body))
    clients = [server.connect(head + body[:-1]) for _ in range(40)]
    for c in clients:
        c.sendall(body[-1:])
    answers = [b"".join(iter(lambda: c.recv(65536), b"")) for c in clients]
    for c in clients:
        c.close()
    made = [a for a in answers if a.startswith(b"HTTP/1.1 200")]
    refused = [a for a in answers if a.startswith(b"HTTP/1.1 429")]
    same(len(made) + len(refused), len(clients), "answers")
    check(len(made) >= 9 and refused, f"{len(made)} are made, {len(refused)} refused")
    check(all(b"\r\nRetry-After: " in a for a in refused), refused[0])


@test("two models are served at once, each under its own name")
def _(_):
    with Server(model()) as server:
        ids = [m["id"] for m in server.models()]
        same(ids[1], ids[0] + "-2", "the second name")
        alone = server.text(model=ids[0], max_tokens=100, seed=12)
        with server.stream(model=ids[0], **LONG):
            for name in ids:
                a = server.complete(model=name, max_tokens=100, seed=12)
                same((a["model"], a["choices"][0]["text"]), (name, alone), "beside a text of the first")


@test("a text begins with the tags that are asked for; others are refused")
def _(_):
    if not FLAGS.tagged:
        raise Skipped("needs --tagged")
    with Server(FLAGS.tagged) as server:
        plain, tagged = server.models()
        same(plain["tags"], {}, "tags of the model without")
        (column, values), (column2, values2) = tagged["tags"].items()
        value, value2 = values[0], values2[0]

        def likeliest(tags):
            a = server.complete(model=tagged["id"], tags=tags, max_tokens=1, logprobs=5)
            return a["choices"][0]["logprobs"]["top_logprobs"][0]
        found = [likeliest({column: v}) for v in values]
        check(all(a != b for a, b in zip(found, found[1:])), "tags make no difference")
        same(likeliest({column: "other"}), likeliest({}), "with the tag that stands for none")
        both = likeliest({column: value, column2: value2})
        same(likeliest({column2: value2, column: value}), both, "in the other order")
        check(both not in (likeliest({column: value}), likeliest({column2: value2})))
        for tags in ({column: "none"}, {"none": value}, {column: f"{value},{column2}={value2}"},
                     {f"{column}={value},{column2}": value2}, {column: ""}):
            refused(server.post({"model": tagged["id"], "tags": tags}), 400, "tags")


# ---------------------------------------------------------------------------------------------
# Wrong requests

def refused(answer, status, field=None, word=""):
    same(answer.status, status, answer.body.decode(errors="replace"))
    same(answer.headers["Content-Type"], "application/json", "Content-Type")
    error = json.loads(answer.body)["error"]
    same(set(error), {"message", "type", "param", "code"}, "fields")
    same(error["param"], field, f"param of {error['message']!r}")
    check((field or word) in error["message"], error, f"wanted {field or word} in it")


@test("a field with a wrong value is refused with 400 and an error that names it")
def _(server):
    wrong = {
        "prompt": [5, {}, ["a", "b"], "abc", "ا\u4e2d", True],
        "max_tokens": [0, -1, 16385, 1e300, 10**40, 1.5, "5", [5]],
        "temperature": [-0.1, 2.1, "hot", 1e308, {}],
        "top_p": [0, 1.01, -1], "top_k": [-1, 10**30, 0.5], "repetition_penalty": [0, 11],
        "seed": [-1, 2**53 + 2, 2**64, 0.1, "1"], "n": [0, 9, 1e9], "logprobs": [-1, 21, True],
        "stop": [5, [1], list("abcde"), {}], "stream": ["yes", 1], "verses": [-1, 101, 2.5],
        "rhyme": [5, "x", "ب" * 9, "5", "َ", "ا\u4e2d"],
        "tags": ["a", [1], {"poem_meter": 5}, {"no such": "tag"}],
        "model": [5], "best_of": [2], "echo": [True], "suffix": ["x"], "logit_bias": [{"5": 1}],
        "presence_penalty": [1], "frequency_penalty": [-2],
    }
    for field, values in wrong.items():
        for value in values:
            refused(server.post({"max_tokens": 1, field: value}), 400, field)


@test("fields that are null, and those of OpenAI's that change nothing, are taken")
def _(server):
    names = ("prompt max_tokens temperature top_p top_k repetition_penalty seed n logprobs stop stream "
             "tags verses rhyme model best_of echo suffix logit_bias presence_penalty frequency_penalty "
             "user").split()
    same(server.post({name: None for name in names if name != "max_tokens"} | {"max_tokens": 1}).status, 200)
    same(server.post({"max_tokens": 1, "best_of": 1, "echo": False, "logit_bias": {}, "user": "me",
                      "presence_penalty": 0, "frequency_penalty": 0.0, "suffix": ""}).status, 200)


@test("an object of 30,000 keys is answered within a second")
def _(server):
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    keys = [a + b + c for a in digits for b in digits for c in digits][:30000]
    started = time.monotonic()
    same(server.post('{"max_tokens":1,' + ",".join(f'"{k}":0' for k in keys) + "}").status, 200)
    check(time.monotonic() - started < 1, f"{time.monotonic() - started:.1f} s")


@test("a body that is no JSON object is refused with 400")
def _(server):
    for body, word in ((b"", "JSON"), (b"[]", "object"), (b"5", "object"), (b'{"prompt":', "byte"),
                       (b'{"top_p": NaN}', "byte"), (b'{"top_p": Infinity}', "byte"),
                       (b'{"seed": 1e999}', "number"),
                       (b'{"prompt": "\xff\xfe"}', "0xFF"), (b'{"prompt": "\xd9"}', "UTF-8"),
                       (b'{"prompt": "\\ud800"}', "byte"), (b'{"prompt": "a\nb"}', "byte"),
                       (b'{"x":' + b"[" * 120000, "byte"), (b'{"x":' + b'{"x":' * 50000, "byte")):
        refused(server.post(body), 400, word=word)
    deep = b'{"n": 99, "x":' + b"[" * 120000 + b"]" * 120000 + b"}"
    refused(server.post(deep), 400, "n")
    same(server.post(b'\xef\xbb\xbf{"max_tokens": 1}').status, 200, "with a byte order mark")


@test("unknown models and paths are 404, other methods 405 or 404, other content types 415, long bodies 413")
def _(server):
    refused(server.post({"model": "none"}), 404, "model")
    refused(server.post({"model": "none"}, "/v1/measures"), 404, "model")
    for path in "/v1", "/v1/chat/completions", "/v1/completions/", "/page.cpp":
        refused(server.ask("GET", path), 404, word=path)
    for path in "/v1/completions", "/v1/measures":
        refused(server.ask("GET", path), 405, word="POST")
    refused(server.ask("PUT", "/v1/completions", b"{}"), 404, word="PUT")
    refused(server.post({}, "/health"), 404, word="POST")
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data",
                 "multipart/form-data; boundary=x", "a/json"):
        for length in 1, 10000:
            refused(server.post({"prompt": length * "a"}, kind=kind), 415, word=f"is '{kind}', wanted app")
    same(server.post({"max_tokens": 1}, kind="application/json; charset=utf-8").status, 200)
    refused(server.post({"prompt": "ا" * 150000}), 413, word="256 KiB")
    same(server.post({"prompt": "ا" * 120000, "max_tokens": 1}).status, 200, "240 KB")


@test("bodies whose length the library does not limit are refused: chunked, compressed, of unknown length")
def _(server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for method in b"POST", b"PUT", b"PATCH", b"DELETE", b"PRI":
        answer = server.raw(method + head[4:] + b"\r\n{}")
        check(answer.startswith(b"HTTP/1.1 411"), method, answer)
    refused(server.ask("DELETE", "/v1/completions", b" " * 300000), 413, word="256 KiB")
    for header, status in ((b"Transfer-Encoding: chunked\r\n", b"411"),
                           (b"Content-Length: 2\r\nContent-Encoding: gzip\r\n", b"415")):
        answer = server.raw(head + header + b"\r\n{}")
        check(answer.startswith(b"HTTP/1.1 " + status), answer)


@test("the header Range is ignored: the page, and an error, are sent whole and once")
def _(server):
    wanted = {path: server.ask("GET", path).body for path in ("/page.js", "/none")}
    for path, body in wanted.items():
        for ranges in "0-5", "5-", ",".join(1000 * ["0-"]):
            a = server.ask("GET", path, headers={"Range": "bytes=" + ranges})
            status = 200 if path == "/page.js" else 404
            same((a.status, a.body == body), (status, True), f"{path} {ranges[:9]}")
    a = server.ask("GET", "/page.js", headers={"Range": "bytes=" + 1000 * "0-," + "9-5"})  # not a range
    check(len(a.body) <= len(wanted["/page.js"]), len(a.body))


@test("another site's name as the Host is refused, so that its page cannot use the server")
def _(server):
    for host in "example.org", f"example.org:{server.port}", "127.0.0.1.example.org", "[::2]":
        refused(server.ask("GET", "/v1/models", headers={"Host": host}), 403, word="Host")
    for host in "localhost", f"localhost:{server.port}", f"127.0.0.1:{server.port}", f"[::1]:{server.port}":
        same(server.ask("GET", "/v1/models", headers={"Host": host}).status, 200, host)


@test("no path reads a file beside the page's three")
def _(server):
    for path in ("/../etc/passwd", "/../../../../etc/passwd", "/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd",
                 "/page.css/../../../etc/passwd", "/page.css/..", "//etc/passwd", "/etc/passwd",
                 "/page.css%00.html", "/./page.cpp", "/dev/demo/serve_gpt2.cpp", "\\..\\etc\\passwd",
                 "file:///etc/passwd"):
        answer = server.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        check(re.match(rb"HTTP/1.1 40[04] ", answer) and b"root:" not in answer, path, answer)
    for path, kind in ("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript"):
        a = server.ask("GET", path)
        check(a.status == 200 and a.headers["Content-Type"].startswith(kind) and len(a.body) > 100, path)
        same(a.headers["X-Content-Type-Options"], "nosniff")
        check("default-src 'self'" in a.headers["Content-Security-Policy"], a.headers)


@test("no answer allows other origins unless --origin names one")
def _(server):
    def allowed(s):
        headers = {"Origin": "http://example.org", "Access-Control-Request-Method": "POST"}
        return [s.ask(method, path, headers=headers).headers["Access-Control-Allow-Origin"]
                for method, path in (("OPTIONS", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/none"))]
    same(allowed(server), [None] * 3)
    with Server("--origin", "http://example.org") as other:
        same(allowed(other), ["http://example.org"] * 3)


# ---------------------------------------------------------------------------------------------
# Many clients, bad clients

@test("where the queue is full a text is refused with 429 and Retry-After; who hangs up frees the place")
def _(_):
    with Server("--slots", "1", "--queue", "1") as server:
        answers = []
        with server.stream(**LONG):
            waiting = threading.Thread(target=lambda: answers.append(server.post({"max_tokens": 5})))
            waiting.start()
            time.sleep(0.3)
            refusal = server.post({"max_tokens": 1})
            refused(refusal, 429, word="wait")
            check(int(refusal.headers["Retry-After"]) > 0, refusal.headers)
            same(server.ask("GET", "/health").status, 200, "meanwhile /health")
            same(answers, [], "answers of the text that waits")
        hung_up = time.monotonic()
        waiting.join(3)
        figure(f"the next text is there {(time.monotonic() - hung_up) * 1e3:.0f} ms after a client hangs up")
        check(answers and answers[0].status == 200, "the waiting text has not come 3 s after the other's end")
        same(server.post({"max_tokens": 1}).status, 200)
        refused(server.post({"n": 3}), 400, "n", word="at most 2")  # more than there is ever room for


@test("a client that waits in the queue and hangs up leaves its place")
def _(_):
    with Server("--slots", "1", "--queue", "1") as server, server.stream(**LONG):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        server.connect(head + b"Content-Length: 2\r\n\r\n{}").close()

        def taken():
            with server.connect(head + b"Content-Length: 2\r\n\r\n{}") as s:
                s.settimeout(0.4)
                try:
                    return b"429" not in s.recv(100)
                except TimeoutError:
                    return True
        wait_for("a place in the queue", taken, 5)


@test("clients that send half a request, or nothing, do not stop others")
def _(server):
    halves = [server.connect(data) for data in 20 * [
        b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: local",
        b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"]]
    started = time.monotonic()
    same(server.ask("GET", "/health").status, 200)
    server.text(max_tokens=5)
    check(time.monotonic() - started < 4, f"{time.monotonic() - started:.1f} s")
    for s in halves:
        s.close()


@test("silent clients, more than there are threads, are cut off after five seconds, and others answered")
def _(_):
    with Server("--slots", "1", "--queue", "0") as server:  # 65 threads
        silent = [server.connect() for _ in range(100)]
        started = time.monotonic()
        same(server.ask("GET", "/health").status, 200)
        check(time.monotonic() - started < 9, f"{time.monotonic() - started:.1f} s")
        silent[0].settimeout(1)
        same(silent[0].recv(100), b"", "what a silent client is sent")
        for s in silent:
            s.close()


def cut_off(server, clients, send, more=lambda: time.sleep(0.1)):
    """Checks that another client is answered once those that `send` keeps busy are cut off, after 10 seconds.
    `more` is called until twelve have passed."""
    ended = threading.Event()

    def go_on(client):
        with contextlib.suppress(OSError):
            while not ended.is_set():
                send(client)
    threads = [threading.Thread(target=go_on, args=[client]) for client in clients]
    for thread in threads:
        thread.start()
    try:
        started = time.monotonic()
        same(server.ask("GET", "/health").status, 200)
        check(time.monotonic() - started < 14, f"{time.monotonic() - started:.1f} s")
    finally:
        ended.set()
    while time.monotonic() < started + 12:
        more()
    for thread, client in zip(threads, clients):
        thread.join()
        client.close()


def drip(client):
    client.send(b" ")
    time.sleep(1)


SLOW = [b"GET /health HTTP/1.1\r\nX: ", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"]


@test("clients that send a byte now and then are cut off after ten seconds, others are answered")
def _(_):
    slots = "--slots", "1", "--queue", "0"  # 65 threads for connections
    with Server(*slots, "--threads", "1") as server, server.stream(**LONG) as s:
        cut_off(server, [server.connect(data) for data in 50 * SLOW], drip, lambda: next(s, None))
        check(next(s, None) not in (None, "[DONE]"), "an answer that takes longer has ended")


@test("slow clients are cut off also where they have taken all the files that the server can open")
def _(_):
    with Server("--slots", "1", "--queue", "0") as server:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (80, 80))
        cut_off(server, [server.connect(data) for data in 50 * SLOW], drip)


@test("a client whose body never ends is cut off after ten seconds, however fast it sends")
def _(server):
    with server.connect(SLOW[1].replace(b"100", b"999999999999")) as client:
        def flood():
            with contextlib.suppress(OSError):
                while True:
                    client.sendall(bytes(1 << 20))
        sender = threading.Thread(target=flood)
        started = time.monotonic()
        sender.start()
        with contextlib.suppress(ConnectionResetError):
            same(client.recv(1), b"", "what the client is sent before the end")
        took = time.monotonic() - started
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)  # ends a sendall that waits
        sender.join()
        check(9 < took < 14, f"{took:.1f} s")


@test("clients that connect all at once are answered within three seconds")
def _(server):
    started = time.monotonic()
    sockets = [server.connect() for _ in range(60)]
    for s in sockets:
        s.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for s in sockets:
        check(s.recv(100).startswith(b"HTTP/1.1 200"))
        s.close()
    check(time.monotonic() - started < 3, f"{time.monotonic() - started:.1f} s")


def cut_connections(server, count, rng):
    """Opens connections that end somewhere, half of them by a reset."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": 30, "stream": True}).encode()
    request = (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
               b"Content-Length: %d\r\n\r\n" % len(body)) + body
    for _ in range(count):
        with server.connect() as s:
            s.sendall(request[:rng.randrange(2 * len(request))])
            if rng.random() < 0.3:
                s.settimeout(0.005)
                with contextlib.suppress(OSError):
                    s.recv(rng.randrange(1, 2000))
            if rng.random() < 0.5:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@test("after 1,000 connections that were cut anywhere the server answers, with no more memory than before")
def _(server):
    rng, used = random.Random(10), []
    for _ in range(2):  # the first round is the warm-up
        cut_connections(server, 1000, rng)
        wait_for("a text", lambda: server.post({"max_tokens": 1}).status == 200)
        used.append(server.rss())
    figure(f"memory after 1,000 cut connections {used[0]:.1f} MiB, after 2,000 {used[1]:.1f} MiB")
    check(used[1] - used[0] < 4, used)


# ---------------------------------------------------------------------------------------------
# Beginning and end

@test("SIGTERM lets a stream come to its [DONE], and the exit code is 0")
def _(_):
    with Server() as server:
        with server.stream(max_tokens=600) as s:
            first = next(s)
            server.process.send_signal(signal.SIGTERM)
            rest = list(s)
        whole([first, *rest])
        same(rest[-2]["usage"]["completion_tokens"], 600, "completion_tokens")
        same(server.process.wait(5), 0, "exit code")


@test("SIGTERM ends a server within 13 s, with exit code 0, whatever its clients do")
def _(_):
    with Server() as server, server.stream(n=8, **LONG) as s, server.connect(b"GET /health HT") as slow:
        same(server.ask("GET", "/health").status, 200)  # so the slow client before it has been accepted
        came = []
        reader = threading.Thread(target=lambda: came.extend(s))
        reader.start()
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(OSError):
            while server.process.poll() is None and time.monotonic() < started + 20:
                time.sleep(0.5)
                slow.send(b"a")  # a request that never ends
        same(server.process.wait(1), 0, "exit code")
        check(time.monotonic() - started < 13.5, f"{time.monotonic() - started:.1f} s")
        reader.join(1)
        check(came, "no event came")
        same(whole(came)["finish_reason"], "length", "finish_reason")


@test("SIGTERM while the model is loaded or right after ends the server, too")
def _(_):
    for wait in range(12):
        command = [*shlex.split(FLAGS.command), "--port", str(free_port())]
        p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.003 * wait)
        p.send_signal(signal.SIGTERM)
        try:
            check(p.wait(5) in (0, -signal.SIGTERM), p.returncode)
        finally:
            p.kill()


@test("a port that is taken is one line of error and exit code 1")
def _(server):
    code, _, err = run_to_end(*shlex.split(FLAGS.command)[1:], "--port", str(server.port))
    same((code, err.count("\n")), (1, 1), err)
    check(str(server.port) in err and "--port" in err, err)


@test("a missing model is one line of error and exit code 1; no model, or a wrong flag, is exit code 2")
def _(_):
    for _ in range(40):  # the thread that waits for signals may begin before the error or after it
        code, _, err = run_to_end("no/such/model.bin", "--port", str(free_port()))
        same((code, err.count("\n")), (1, 1), err)
        check("no/such/model.bin" in err, err)
    for arguments, word in (([], "model"), (["x", "--port", "0"], "port"), (["x", "--no-such"], "no-such"),
                            (["x", "--queue", "5000"], "--queue"),
                            (["x", "y", "--slots", "100", "--queue", "500"], "1200 texts")):
        code, _, err = run_to_end(*arguments)
        check(code == 2 and word in err, arguments, code, err)


@test("--help tells the flags")
def _(_):
    code, out, _ = run_to_end("--help")
    check(code == 0 and all(f in out for f in ("--port", "--slots", "--queue", "--origin", "--data")), out)


@test("the package openai completes, streams, lists the models, and understands errors")
def _(server):
    if not FLAGS.openai:
        raise Skipped("needs --openai")
    try:
        import openai
    except ImportError:
        raise Skipped("the package openai is not installed") from None
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    fields = dict(model=model, prompt=PROMPT, max_tokens=20, seed=11, extra_body={"verses": 100})
    a = client.completions.create(**fields, logprobs=2, n=2)
    same(a.choices[0].text, server.text(max_tokens=20, seed=11), "text")
    same((a.usage.completion_tokens, a.choices[1].finish_reason), (40, "length"))
    same(len(a.choices[0].logprobs.top_logprobs), 20, "top_logprobs")
    text = "".join(e.choices[0].text for e in client.completions.create(**fields, stream=True))
    same(text, a.choices[0].text, "streamed")
    try:
        client.completions.create(model=model, prompt=PROMPT, temperature=9)
        check(False, "temperature 9 is taken")
    except openai.BadRequestError as e:
        same(e.param, "temperature", "param")


# ---------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--command", required=True, help="the program, a model, and flags other than --port")
    parser.add_argument("--tagged", metavar="MODEL", help="a model that learnt tags of two columns")
    parser.add_argument("--openai", action="store_true", help="also tries the package openai")
    parser.add_argument("--only", default="", metavar="WORD", help="the tests whose promise has this word")
    global FLAGS
    FLAGS = parser.parse_args()
    threading.excepthook = lambda _: None  # the tests check what their threads have brought
    passed = failed = skipped = 0
    with Server() as server:
        for promise, body in TESTS:
            if FLAGS.only not in promise:
                continue
            started = time.monotonic()
            try:
                body(server)
                check(server.process.poll() is None, "the server has ended:", server.process.returncode)
                passed += 1
            except Skipped as reason:
                skipped += 1
                print(f"skipped  {promise}: {reason}", flush=True)
            except Exception as error:
                failed += 1
                line = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.name == "_"][-1:]
                print(f"FAILED   {promise}: line {line}: {type(error).__name__}: {error}", flush=True)
            if (seconds := time.monotonic() - started) > 5:
                figure(f"({promise}: {seconds:.0f} s)")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
