#!/usr/bin/env python3
"""Checks and times the GPU trainer on this machine's GPU, in at most ten minutes:

    make gpu-check                     in the repository, or without make, in an unpacked gpu-pack.tar.gz:
    dev/gpu_check.py [--stages speed,numbers] [--out DIR]

Each stage has its own time limit. One that fails, hangs or lacks a tool is recorded with the reason, and the
next one runs. DIR/gpu-check.json and DIR/gpu-check.md are written after each part of a stage, so that they
hold what was found even where the machine goes away; DIR/logs has what the programs printed. Nothing is
downloaded or installed. Needs Python 3.8 and nothing else. The exit code is 0 if all stages ran or lacked
only a tool, 1 if something failed.
"""
import argparse
import csv
import datetime
import glob
import importlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Seconds that a stage may take, in the order in which they run. Together they are the ten minutes.
LIMITS = {"programs": 40, "device": 20, "speed": 60, "switches": 70, "kernels": 30, "pytorch": 90,
          "numbers": 105, "ncu": 35, "774M": 40, "fp32": 30, "memcheck": 40, "racecheck": 40}
MINUTES = 10
REBUILD_LIMIT = 300
BATCHES = 8, 16, 32  # of the stage speed. The stages that compare with it take the second one.
START = "bench_gpu_bf16"  # the program that tells whether the programs start

OK, MISSING, FAILED, TIMEOUT = "ok", "missing", "failed", "timeout"


class Problem(Exception):
    """Why something has no result; output, errors and values are what there is nevertheless."""

    def __init__(self, status, reason, output="", errors="", values=None):
        super().__init__(reason)
        self.status, self.reason, self.output, self.errors = status, reason, output, errors
        self.values = values


# ---------------------------------------------------------------------------------------------
# The report

def write_atomically(path, text):
    temporary = f"{path}.tmp{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def say(line):
    """Prints a line. Output that nobody reads any more ends nothing: the report is in files."""
    try:
        print(line, flush=True)
    except OSError:
        pass


class Report:
    """What gpu-check.json holds: stages, each with parts, each with a status and its values or the reason."""

    def __init__(self, out):
        self.out = out
        self.move_earlier()
        now = datetime.datetime.now().astimezone()
        self.data = {"format": 1, "started": now.isoformat(timespec="seconds"), "finished": False,
                     "seconds": 0.0, "host": platform.platform(), "stages": {}}
        self.start = time.monotonic()

    def move_earlier(self):
        """An earlier report, and its logs, go to previous/N."""
        names = [n for n in ("gpu-check.json", "gpu-check.md", "logs")
                 if os.path.exists(os.path.join(self.out, n))]
        if "gpu-check.json" not in names:
            return
        number = 1
        while os.path.exists(os.path.join(self.out, "previous", str(number))):
            number += 1
        to = os.path.join(self.out, "previous", str(number))
        os.makedirs(to)
        for n in names:
            os.rename(os.path.join(self.out, n), os.path.join(to, n))
        say(f"the earlier report is now in {to}")

    def save(self):
        self.data["seconds"] = round(time.monotonic() - self.start, 1)
        write_atomically(os.path.join(self.out, "gpu-check.json"), json.dumps(self.data, indent=1) + "\n")
        try:
            text = markdown(self.data)
        except Exception:  # the numbers are safe in the JSON file
            text = "# GPU check\n\nThe tables could not be written:\n\n    " + \
                traceback.format_exc().replace("\n", "\n    ") + "\n"
        write_atomically(os.path.join(self.out, "gpu-check.md"), text)


class Stage:
    def __init__(self, check, name, limit):
        self.check, self.name, self.limit = check, name, limit
        self.start = time.monotonic()
        self.data = {"status": OK, "seconds": 0.0, "limit": round(limit, 1), "parts": []}
        check.report.data["stages"][name] = self.data
        check.report.save()

    def left(self):
        return self.limit - (time.monotonic() - self.start)

    def add(self, name, status, seconds, **fields):
        part = {"name": name, "status": status, "seconds": round(seconds, 1), **fields}
        self.data["parts"].append(part)
        self.finish()
        say((f"  {name}: {status}" + (f": {fields['reason']}" if "reason" in fields else ""))[:300])

    def finish(self):
        """The stage's status is the worst of its parts', its reason all that went wrong."""
        self.data["seconds"] = round(time.monotonic() - self.start, 1)
        severity = (FAILED, TIMEOUT, MISSING, OK)
        parts, why = sorted(self.data["parts"], key=lambda p: severity.index(p["status"])), {}
        for p in parts:
            if p["status"] != OK:
                why.setdefault(p["reason"], []).append(p["name"])
        if why:
            self.data["status"] = parts[0]["status"]
            self.data["reason"] = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in why.items())
        self.check.report.save()

    def part(self, name, f):
        """Runs f, and records what it returns or why it did not. Returns the values, or {}."""
        start, values = time.monotonic(), {}
        try:
            values = f()
            self.add(name, OK, time.monotonic() - start, values=values)
        except Problem as p:
            self.add(name, p.status, time.monotonic() - start, reason=p.reason,
                     **({"values": p.values} if p.values else {}))
        except Exception as e:
            traceback.print_exc()
            self.add(name, FAILED, time.monotonic() - start,
                     reason=f"gpu_check.py could not read the result: {type(e).__name__}: {e}")
        return values


# ---------------------------------------------------------------------------------------------
# Running a program

def end_group(process):
    """Ends a program and all that it has started. One that the driver holds is not waited for long."""
    for sig, seconds in ((signal.SIGTERM, 1), (signal.SIGKILL, 3)):
        try:
            os.killpg(process.pid, sig)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


class Check:
    def __init__(self, options):
        self.options = options
        self.report = Report(options.out)
        self.logs = os.path.join(options.out, "logs")
        os.makedirs(self.logs, exist_ok=True)
        self.env = dict(os.environ, LC_ALL="C", XDG_CACHE_HOME=os.path.join(options.out, "cache"))
        self.bin = options.bin
        self.batches = (2, 4, 8) if options.rehearsal else BATCHES
        self.batch = self.batches[1]
        self.ends = time.monotonic() + 60 * options.minutes
        self.process = self.stage = None
        self.logged = 0

    def run(self, command, limit=None, env=None):
        """A program's output. Throws Problem if it is missing, takes too long, or fails."""
        limit = min(self.stage.left(), limit or 1e9)
        if limit <= 0:
            raise Problem(TIMEOUT, "the stage's time was used up before")
        self.logged += 1
        base = os.path.join(self.logs, f"{self.logged:02d}-{os.path.basename(command[0])}")
        with open(base + ".out", "wb") as out, open(base + ".err", "wb") as err:
            try:
                self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                                env=dict(self.env, **(env or {})), cwd=ROOT,
                                                start_new_session=True)
            except OSError as e:
                raise Problem(MISSING if isinstance(e, FileNotFoundError) else FAILED,
                              f"{command[0]}: {e.strerror}")
            try:
                code = self.process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end_group(self.process)
                self.process = None
        output, errors = (open(base + end, encoding="utf-8", errors="replace").read()
                          for end in (".out", ".err"))
        if code is None:
            raise Problem(TIMEOUT, f"it ran longer than {limit:.0f} s and was ended", output, errors)
        if code != 0:
            how = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
            raise Problem(FAILED, f"{how}: {last_line(errors or output)}", output, errors)
        return output

    def program(self, name):
        path = os.path.join(self.bin, name)
        if not os.path.exists(path):
            raise Problem(MISSING, f"{path} is missing")
        return path

    def tool(self, name):
        """A tool of the CUDA Toolkit: on the PATH, or in one of the folders where it is installed."""
        places = [f"/usr/local/cuda*/bin/{name}", f"/opt/nvidia/*/*/{name}"]
        if self.options.rehearsal:
            places = []
        elsewhere = sorted((path for place in places for path in glob.glob(place)), reverse=True)
        for path in [shutil.which(name, path=self.env.get("PATH")), *elsewhere]:
            if path:
                return path
        raise Problem(MISSING, f"{name} is not installed")

    def bench(self, name, *words, steps=20, warm=5, limit=None):
        """The records that bench_gpu prints, and the Problem that ended it early, or None."""
        problem = None
        if self.options.rehearsal:
            words = [str(self.batch) if w == "max" else w for w in words if w != "--rehearsal"]
            words, steps, warm = [*words, "--rehearsal"], min(steps, 2), 1
        try:
            text = self.run([self.program(name), *words, "--steps", str(steps), "--warm", str(warm)], limit)
        except Problem as p:
            text, problem = p.output, p
        return records(text), problem


def records(text):
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:  # a line that a program which was ended had begun
                pass
    return found


def only(found, problem, kind="speed"):
    """The one record of this kind."""
    for r in found:
        if r["record"] == kind:
            return r
        if r["record"] == "does not fit":
            raise Problem(MISSING, f"needs {r['needs'] / 2**30:.1f} GiB of GPU memory, "
                          f"{r['available'] / 2**30:.1f} GiB are free")
    raise problem or Problem(FAILED, "the program printed no result")


# ---------------------------------------------------------------------------------------------
# programs: whether they start here; if not, why, and they are built again

LIBRARY_FOLDERS = ["/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/x86_64-linux/lib",
                   "/usr/lib/x86_64-linux-gnu", "/opt/conda/lib", "/opt/*/lib", "/usr/local/lib",
                   *(f"{root}/lib/python3*/{kind}-packages/nvidia/*/lib" for kind in ("site", "dist")
                     for root in (sys.prefix, "/usr", "/usr/local", "/opt/*", os.path.expanduser("~/*")))]
# What a program that does not start says, and what it means
NO_START = [
    (r"version `(GLIBC_[0-9.]+)' not found", "this machine's C library is older than {0}, which it needs"),
    (r"version `(GLIBCXX_[0-9.]+|CXXABI_[0-9.]+)' not found", "this machine's libstdc++ is older than {0}"),
    (r"while loading shared libraries: ([^:]+):", "{0} is not on this machine"),
    (r"(driver supports CUDA up to [^:]+)", "the driver is too old for it: the NVIDIA {0}"),
    (r"(no kernel image|NoKernelImage|InvalidPtx|unsupported toolchain)",
     "it has no code for this GPU ({0})"),
    (r"(SIGILL)", "this processor lacks instructions that it uses (AVX2): {0}"),
    (r"(Exec format error)", "it was built for another kind of processor: {0}"),
]


def why_not_started(problem):
    for pattern, meaning in NO_START:
        match = re.search(pattern, problem.errors + problem.reason)
        if match:
            return meaning.format(match.group(1))
    return None


def try_to_start(check):
    """Starts a program, with the library folders that it needs. Throws Problem."""
    for _ in range(6):
        found, problem = check.bench(START, "--rehearsal", "--batches", "1", steps=1, warm=1)
        missing = re.search(r"while loading shared libraries: ([^:]+):", problem.errors) if problem else None
        folders = missing and [folder for pattern in LIBRARY_FOLDERS for folder in sorted(glob.glob(pattern))
                               if os.path.exists(os.path.join(folder, missing.group(1)))]
        if not folders:
            break
        check.env["LD_LIBRARY_PATH"] = ":".join(
            [folders[0]] + [p for p in [check.env.get("LD_LIBRARY_PATH")] if p])
    if problem:
        raise problem
    return {"folder": check.bin, "loss": only(found, problem)["loss"],
            "library_path": check.env.get("LD_LIBRARY_PATH", "")}


def pack_facts():
    path = os.path.join(ROOT, "pack.json")
    return json.load(open(path)) if os.path.exists(path) else {}


def rebuild(check):
    """Builds the programs for this machine into OUT/build, and uses what was built."""
    nvcc, build = check.tool("nvcc"), os.path.join(os.path.abspath(check.options.out), "build")
    for name in ("make", "g++"):
        check.tool(name)
    command = ["make", "-k", "-j", str(os.cpu_count() or 1), "-C", ROOT, f"BUILD={build}", f"NVCC={nvcc}",
               f"COMMIT={pack_facts().get('commit', 'unknown')}", "device-programs"]
    problem = None
    try:
        check.run(command, REBUILD_LIMIT)
    except Problem as p:
        problem = p
    check.bin = os.path.join(build, "device", "bin")
    built = sorted(os.listdir(check.bin)) if os.path.isdir(check.bin) else []
    if START not in built:
        raise problem or Problem(FAILED, "make built nothing")
    return {"built": built, "complete": problem is None, **try_to_start(check)}


def programs(check, stage):
    def start():
        try:
            return try_to_start(check)
        except Problem as p:
            why = why_not_started(p)
            start.build_again = why is not None or p.status == MISSING
            raise Problem(p.status, f"{START} does not start: {why}" if why else p.reason)

    start.build_again = False
    stage.part("start", start)
    if start.build_again:
        stage.limit = min(REBUILD_LIMIT, check.ends - time.monotonic())
        stage.part("build again", lambda: rebuild(check))


# ---------------------------------------------------------------------------------------------
# device

FIELDS = ("name driver_version memory.total memory.used clocks.sm clocks.max.sm clocks.mem clocks.max.mem "
          "power.draw power.limit temperature.gpu utilization.gpu mig.mode.current "
          "ecc.mode.current").split()
WATCHED = "clocks.sm power.draw temperature.gpu".split()


def parsed(value):
    """A number where it is one, else the text."""
    value = value.strip()
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def query(check, fields, limit=None):
    """A dict for each GPU, in MHz, W, MiB and degrees Celsius."""
    text = check.run([check.tool("nvidia-smi"), "--query-gpu=" + ",".join(fields),
                      "--format=csv,noheader,nounits"], limit)
    return [dict(zip(fields, map(parsed, row))) for row in csv.reader(io.StringIO(text)) if row]


def other_processes(check):
    text = check.run([check.tool("nvidia-smi"), "--query-compute-apps=pid,process_name,used_memory",
                      "--format=csv,noheader"])
    return {"processes": [line for line in text.splitlines() if line.strip()]}


def device(check, stage):
    stage.part("nvidia-smi", lambda: {"gpus": query(check, FIELDS)})
    stage.part("other processes", lambda: other_processes(check))
    for name in ("train_gpt2cu_bf16", "bench_gpu_bf16"):
        stage.part(name + " --version",
                   lambda: {"text": check.run([check.program(name), "--version"]).strip()})
    stage.part("as CUDA sees it", lambda: device_record(check))


def device_record(check):
    found, problem = check.bench("bench_gpu_bf16", "--rehearsal", "--batches", "1", steps=1, warm=1)
    return only(found, problem, "device")


class Watch:
    """Reads the GPU's clocks every second while something runs."""

    def __init__(self, check):
        self.rows, self.stopped = [], threading.Event()
        tool = shutil.which("nvidia-smi", path=check.env.get("PATH"))
        command = [tool, "--query-gpu=" + ",".join(WATCHED), "--format=csv,noheader,nounits"]
        self.thread = threading.Thread(target=self.read, args=(command, check.env), daemon=True)
        if tool:
            self.thread.start()

    def read(self, command, env):
        while not self.stopped.wait(1):
            try:
                text = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5,
                                      env=env, universal_newlines=True).stdout
                row = [parsed(x) for x in text.splitlines()[0].split(",")]
                if all(isinstance(x, float) for x in row) and len(row) == len(WATCHED):
                    self.rows.append(row)
            except (OSError, IndexError, subprocess.SubprocessError):
                pass

    def stop(self):
        self.stopped.set()
        if not self.rows:
            raise Problem(MISSING, "nvidia-smi gave no clocks while the steps ran")
        return {name: {"least": min(column), "median": statistics.median(column), "most": max(column)}
                for name, column in zip(WATCHED, zip(*self.rows))}


# ---------------------------------------------------------------------------------------------
# speed, switches, 774M, fp32

def speed(check, stage):
    watch = Watch(check)
    sizes = ",".join(map(str, check.batches))
    found, problem = check.bench("bench_gpu_bf16", "--model", "gpt2", "--batches", sizes)
    for B in check.batches:
        mine = [r for r in found if r.get("batch") == B]
        stage.part(f"B = {B}", lambda: only(mine, problem))
    stage.part("clocks", watch.stop)


def few_steps(check, stage, program, model, batches):
    """A model with which a step takes a second on an A100."""
    found, problem = check.bench(program, "--model", model, "--batches", batches, steps=6, warm=2)
    stage.part(model, lambda: only(found, problem))


def switches(check, stage):
    def one(words, limit=20):
        return only(*check.bench("bench_gpu_bf16", "--model", "gpt2", "--batches", str(check.batch), *words,
                                 steps=10, warm=3, limit=limit))

    listed = []

    def known():
        listed.extend(check.run([check.program("bench_gpu_bf16"), "--list_switches"]).split())
        return {"switches": listed}

    stage.part("names", known)
    if listed:
        stage.part("none", lambda: one([]))
        for way in listed:
            stage.part(way, lambda: one(["--switch", way]))
        stage.part("none, again", lambda: one([]))


# ---------------------------------------------------------------------------------------------
# kernels: their times beside the lower bounds of dev/bench/roofline.py

# The kernel's name, and the rows of roofline.py that it is part of
KERNEL_ROWS = [
    ("embedding_forward", ["embedding_forward"]),
    ("layernorm_forward_kernel<true>", ["residual_layernorm_forward"]),
    ("layernorm_forward", ["layernorm_forward"]),
    ("attention_forward", ["attention_forward"]),
    ("attention_backward_query", ["attention_backward dQ"]),
    ("attention_backward_key", ["attention_backward dK dV"]),
    ("attention_row_stats", ["attention_row_stats"]),
    ("attention_add_dq", ["attention_add_dq"]),
    ("cross_entropy", ["cross_entropy"]),
    ("sum_losses", ["sum_losses"]),
    ("layernorm_backward", ["layernorm_backward", "layernorm_backward (last)"]),
    ("add_partials", ["layernorm_backward", "layernorm_backward (last)"]),
    ("wpe_backward", ["embedding_backward"]),
    ("wte_backward", ["embedding_backward"]),
    ("add_to", ["bias gradients (from BGRADB)"]),
    ("bias_backward", ["bias gradients (from BGRADB)"]),
    ("grad_norm", ["gradient norm"]),
    ("adamw", ["AdamW"]),
]
KINDS = {"forward": "", "input_gradient": " dX", "weight_gradient": " dW"}


def rows_of(name, C, Vp):
    """The rows of roofline.py that a launch with this name is part of; [name] where none is known."""
    product = re.match(r"(\w+) \w+ M \d+ K (\d+) N (\d+) ", name)
    if product:
        kind, K, N = KINDS[product.group(1)], int(product.group(2)), int(product.group(3))
        layer = {(C, 3 * C): "qkv", (C, C): "attproj", (4 * C, C): "fcproj", (C, Vp): "head",
                 (C, 4 * C): "fc"}.get((K, N))
        if layer == "head":
            return {"": ["head logits"], " dX": ["head dX"],
                    " dW": ["head dW", "head dW, later chunks"]}[kind]
        if layer:
            return ["fc + GELU" if (layer, kind) == ("fc", "") else layer + kind]
    for part, rows in KERNEL_ROWS:
        if part in name:
            return rows
    return [name]


def lower_bounds(record, gpu):
    """From dev/bench/roofline.py: {row: (FLOPs, bytes, seconds, launches)} of a step with the record's shapes
    on a GPU with these peak_flops, bandwidth and multiprocessors."""
    sys.path.insert(0, os.path.join(ROOT, "dev", "bench"))
    roofline = importlib.import_module("roofline")
    roofline.VP, roofline.MAX_T = record["vocabulary"], record["seq_len"]
    roofline.MULTIPROCESSORS = gpu["multiprocessors"]
    model = dict(L=record["layers"], NH=record["heads"], C=record["channels"])
    return {k.name: (k.flops, k.bytes, max(k.flops / gpu["peak_flops"], k.bytes / gpu["bandwidth"]),
                     k.launches)
            for k in roofline.arapoet(model, record["batch"], record["seq_len"])}


def kernel_table(record, gpu):
    """Rows of the step, the longest first: measured times, and lower bounds where roofline.py has the row."""
    bounds, rows = lower_bounds(record, gpu), {}
    for k in record["kernels"]:
        parts = rows_of(k["name"], record["channels"], record["vocabulary"])
        row = rows.setdefault(parts[0], {"name": parts[0], "launches": 0, "ms": 0.0, "kernels": []})
        row["launches"] += k["launches"]
        row["ms"] += k["ms"]
        row["kernels"].append(k["name"])
        known = [bounds[p] for p in parts if p in bounds]
        if known:
            row["bound_ms"] = 1e3 * sum(b[2] for b in known)
            row["tflops"] = sum(b[0] for b in known) / 1e12
            row["gb"] = sum(b[1] for b in known) / 1e9
            row["launches_on_paper"] = sum(b[3] for b in known)
    for row in rows.values():
        row["ms"] = round(row["ms"], 5)
    return sorted(rows.values(), key=lambda row: -row["ms"])


def kernels(check, stage):
    def table():
        found, problem = check.bench("bench_gpu_bf16", "--model", "gpt2", "--batches", str(check.batch),
                                     "--kernels")
        record, gpu = only(found, problem, "kernels"), only(found, problem, "device")
        rows = kernel_table(record, gpu)
        return {"batch": record["batch"], "step_ms": record["step_ms"], "rows": rows,
                "sum_ms": round(sum(row["ms"] for row in rows), 4),
                "bound_ms": round(sum(row.get("bound_ms", 0) for row in rows), 4),
                "peak_flops": gpu["peak_flops"], "bandwidth": gpu["bandwidth"]}

    stage.part("table", table)


# ---------------------------------------------------------------------------------------------
# PyTorch beside it

def python_with_torch(check):
    places = [sys.executable, *(shutil.which(n, path=check.env.get("PATH")) for n in ("python3", "python")),
              *sorted(path for folder in ("/opt/*", "/venv/*", "/workspace/*")
                      for path in glob.glob(folder + "/bin/python3"))]
    if check.options.python:
        places = [check.options.python]
    probe = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec('torch') else 3)"
    for python in dict.fromkeys(p for p in places if p):
        try:
            check.run([python, "-c", probe], 10)
            return python
        except Problem:
            pass
    raise Problem(MISSING, "no Python here has PyTorch")


def pytorch(check, stage):
    sizes = "1,2,64,512,2,32" if check.options.rehearsal else f"12,12,768,50257,{check.batch},1024"
    script = os.path.join(ROOT, "dev", "bench", "peer_torch.py")
    place = {}

    def find():
        place["python"] = python_with_torch(check)
        return {"batch": check.batch, **place}

    stage.part("Python", find)
    if not place:
        return
    for parts, limit in ((("eager", "cudnn", "attention", "products"), 45), (("compile",), 90)):
        problem = None
        try:
            # The libraries that the programs here need may be others than PyTorch's own.
            text = check.run([place["python"], script, "gpu", sizes, *parts], limit,
                             env={"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")})
        except Problem as p:
            text, problem = p.output, p
        for name in parts:
            stage.part(name, lambda: torch_values(records(text), problem, name))


def torch_values(found, problem, name):
    values = only(found, problem, name)
    if "error" in values:
        raise Problem(FAILED, values["error"])
    return values


# ---------------------------------------------------------------------------------------------
# numbers: the tests on the device, and training beside the CPU

def test_results(check, name, limit, prefix=()):
    """The counts and the largest errors that a test program prints."""
    problem = None
    some = "--test-case=*GELU and its derivative*,*head sizes that no kernel*,*sizes without a kernel*"
    only_some = [some] if check.options.rehearsal else []
    try:
        text = check.run([*prefix, check.program(name), *only_some], limit)
    except Problem as p:
        text, problem = p.output, p
    counts = re.findall(r"^(\d+) passed, (\d+) failed(?:, (\d+) skipped)?$", text, re.M)
    errors = {kind.strip(): {"error": parsed(error), "allowed": parsed(allowed)} for kind, error, allowed in
              re.findall(r"^  (\S.*?) +([0-9.e+-]+|-?nan|inf) of ([0-9.e+-]+)$", text, re.M)}
    if not counts:
        raise problem or Problem(FAILED, "it ended without its last line, N passed, N failed")
    passed, failed, skipped = (int(n or 0) for n in counts[-1])
    values = {"passed": passed, "failed": failed, "skipped": skipped, "errors": errors}
    if failed:
        first = re.search(r"^TEST CASE:\s*(.*)$", text, re.M)
        raise Problem(FAILED, f"{failed} of {passed + failed} tests failed, first: "
                      f"{first.group(1) if first else 'unknown'}", text, values=values)
    if problem or not passed:
        raise problem or Problem(FAILED, "no test ran", text)
    return values


class Training:
    """Runs of the CPU's and the GPU's trainers on the built-in poems, and their losses."""
    STEPS = 10

    def __init__(self, check):
        self.check, self.dir = check, tempfile.mkdtemp(prefix="runs-", dir=os.path.abspath(check.options.out))
        small = check.options.rehearsal
        sizes = (1, 2, 64, 16, 4, 128) if small else (4, 4, 256, 64, 16, 2048)
        names = "depth heads channels seq_len batch_size total_batch_size".split()
        self.flags = [w for n, v in zip(names, sizes) for w in ("--" + n, str(v))]
        self.flags += "--lr_schedule constant --learning_rate 0.001 --warmup_steps 0 --dropout 0.1 " \
                      "--sample_every 0 --val_every 0 --save_every 0".split()

    def prepare(self):
        self.check.run([self.check.program("prepare_data"), os.path.join(ROOT, "data", "sample_poems.csv"),
                        "-o", self.path("data")], 20)

    def path(self, name):
        return os.path.join(self.dir, name)

    def train(self, program, run, steps, resume=False):
        flags = ["--resume"] if resume else ["--data", self.path("data"), *self.flags]
        self.check.run([self.check.program(program), *flags, "--max_steps", str(steps), "-o",
                        self.path(run)], 30)

    def losses(self, run):
        with open(os.path.join(self.path(run), "log.csv"), encoding="utf-8") as f:
            rows = [r for r in csv.DictReader(line for line in f if not line.startswith("#"))]
        return [float(r["train_loss"]) for r in rows if r["train_loss"]]

    def compared(self, run, allowed):
        """A run's losses beside the CPU's. Throws Problem where they differ by more than is allowed."""
        got, want = self.losses(run), self.losses("cpu")
        if len(got) != self.STEPS or len(want) != self.STEPS:
            raise Problem(FAILED, f"the logs have {len(got)} and {len(want)} steps, wanted {self.STEPS}")
        worst = max(abs(a / b - 1) for a, b in zip(got, want))
        values = {"losses": got, "cpu": want, "worst": worst, "allowed": allowed}
        if not worst <= allowed:
            raise Problem(FAILED, f"losses differ by {worst:.1e}, allowed are {allowed:.0e}", values=values)
        return values


ALLOWED = {"bf16": 5e-3, "fp32": 1e-4}


def train_and_compare(check, stage):
    t = Training(check)

    def reference():
        t.prepare()
        t.train("train_gpt2", "cpu", t.STEPS)
        return {"losses": t.losses("cpu")}

    def gpu(p):
        t.train("train_gpt2cu_" + p, "gpu_" + p, t.STEPS)
        return t.compared("gpu_" + p, ALLOWED[p])

    def across(p, first, second):
        run = f"{first}_then_{second}"
        t.train(first, run, t.STEPS // 2)
        t.train(second, run, t.STEPS, resume=True)
        return t.compared(run, ALLOWED[p])

    if not stage.part("ten steps on the CPU", reference):
        return
    for p in ("bf16", "fp32"):
        stage.part(f"ten steps, {p}", lambda: gpu(p))
        stage.part(f"CPU, then GPU, {p}", lambda: across(p, "train_gpt2", "train_gpt2cu_" + p))
        stage.part(f"GPU, then CPU, {p}", lambda: across(p, "train_gpt2cu_" + p, "train_gpt2"))


def numbers(check, stage):
    for t in ("kernels", "attention"):
        stage.part(f"test of {t}, bf16", lambda: test_results(check, f"test_gpu_{t}_bf16", 25))
    train_and_compare(check, stage)
    for t, p in (("model", "bf16"), ("kernels", "fp32"), ("attention", "fp32"), ("model", "fp32")):
        stage.part(f"test of {t}, {p}", lambda: test_results(check, f"test_gpu_{t}_{p}", 25))


# ---------------------------------------------------------------------------------------------
# NVIDIA's tools

NCU_KERNELS = ("attention_forward attention_backward_query attention_backward_key layernorm_forward "
               "layernorm_backward cross_entropy grad_norm adamw").split()
NCU_METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute_percent",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}


def ncu_rows(text):
    """{kernel: {metric: [value, unit]}} of ncu --csv, for the first launch of each kernel."""
    start, found, first = text.find('"ID"'), {}, {}
    if start < 0:
        return {}
    for row in csv.DictReader(io.StringIO(text[start:])):
        name, metric = row.get("Kernel Name", ""), NCU_METRICS.get(row.get("Metric Name", ""))
        kernel = next((k for k in NCU_KERNELS if k in name), None)
        if kernel and metric and first.setdefault(kernel, row["ID"]) == row["ID"]:
            found.setdefault(kernel, {})[metric] = [parsed(row["Metric Value"].replace(",", "")),
                                                    row.get("Metric Unit", "")]
    return found


def ncu(check, stage):
    def profile():
        tool = check.tool("ncu")
        prefix = [tool, "--csv", "--metrics", ",".join(NCU_METRICS), "--kernel-name",
                  f"regex:({'|'.join(NCU_KERNELS)})", "--launch-count", "40"]
        problem = None
        try:
            text = check.run([*prefix, check.program("bench_gpu_bf16"), "--model", "gpt2", "--layers", "1",
                              "--batches", "8", "--warm", "1", "--steps", "1", "--switch",
                              "use_graphs=0"])
        except Problem as p:
            text, problem = p.output, p
        if "ERR_NVGPUCTRPERM" in text + (problem.errors if problem else ""):
            raise Problem(MISSING, "ncu is not permitted to read the GPU's counters here (ERR_NVGPUCTRPERM); "
                          "the machine's owner can allow it: NVreg_RestrictProfilingToAdminUsers=0")
        rows = ncu_rows(text)
        if not rows:
            raise problem or Problem(FAILED, f"ncu profiled no kernel: {last_line(text)}")
        return {"kernels": rows}

    stage.part("eight kernels", profile)


def sanitizer(check, stage, what):
    tool = {}

    def find():
        tool["path"] = check.tool("compute-sanitizer")
        return dict(tool)

    stage.part("compute-sanitizer", find)
    if not tool:
        return
    for t in ("kernels", "attention"):
        def one():
            prefix = [tool["path"], "--tool", what, "--error-exitcode", "99"]
            try:
                share = 0.6 if t == "kernels" else 1
                return test_results(check, f"test_gpu_{t}_bf16", share * stage.left(), prefix=prefix)
            except Problem as p:
                summary = re.search(r"(ERROR|RACECHECK) SUMMARY: .*", p.output + p.errors)
                if summary and p.status == FAILED:
                    p.reason = f"{summary.group(0)}; {p.reason}"
                raise

        stage.part(t, one)


STAGES = {
    "programs": programs, "device": device, "speed": speed, "switches": switches, "kernels": kernels,
    "pytorch": pytorch, "numbers": numbers, "ncu": ncu,
    "774M": lambda c, s: few_steps(c, s, "bench_gpu_bf16", "gpt2-large", "max"),
    "fp32": lambda c, s: few_steps(c, s, "bench_gpu_fp32", "gpt2", "8"),
    "memcheck": lambda c, s: sanitizer(c, s, "memcheck"),
    "racecheck": lambda c, s: sanitizer(c, s, "racecheck"),
}


# ---------------------------------------------------------------------------------------------
# gpu-check.md

def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows] + [""]


def finished(data, stage):
    return [(p["name"], p["values"]) for p in data["stages"].get(stage, {}).get("parts", [])
            if p["status"] == OK]


def speed_rows(parts):
    head = ["", "B", "ms per step (range)", "forward", "backward", "update", "host gap", "tokens/s",
            "MFU, attention in full", "MFU, causal half", "memory"]
    rows = [[name, v["batch"], f"{v['step_ms']:.2f} ({v['step_ms_least']:.2f} to {v['step_ms_most']:.2f})",
             f"{v['forward_ms']:.2f}", f"{v['backward_ms']:.2f}", f"{v['update_ms']:.2f}",
             f"{v['host_gap_ms']:.2f}", f"{v['tokens_per_s']:,.0f}", f"{100 * v['mfu_full']:.1f}%",
             f"{100 * v['mfu_causal']:.1f}%", f"{v['memory'] / 2**30:.2f} GiB"] for name, v in parts]
    return table(head, rows)


def speed_section(data):
    lines = []
    for stage, title in (("speed", "124M, bf16, T = 1024"), ("774M", "774M, bf16"), ("fp32", "124M, fp32")):
        parts = [(n, v) for n, v in finished(data, stage) if "step_ms" in v]
        if parts:
            lines += [f"## {title}", "", *speed_rows(parts)]
    for name, v in finished(data, "speed"):
        if name == "clocks":
            lines += ["While these steps ran: " + ", ".join(
                f"{what} {x['least']:g} to {x['most']:g}" for what, x in v.items()) + ".", ""]
    return lines


def switches_section(data):
    parts = [(n, v) for n, v in finished(data, "switches") if "step_ms" in v]
    base = [v["step_ms"] for n, v in parts if n.startswith("none")]
    if not base:
        return []
    rows = [[n, f"{v['step_ms']:.2f}", f"{100 * (v['step_ms'] / min(base) - 1):+.1f}%",
             f"{v['update_ms']:.2f}", f"{v['host_gap_ms']:.2f}", f"{v['memory'] / 2**30:.2f} GiB"]
            for n, v in parts]
    return ["## One switch at a time", "",
            *table(["switch", "ms per step", "against none", "update", "host gap", "memory"], rows)]


def kernels_section(data):
    lines = []
    for _, v in finished(data, "kernels"):
        rows = [[r["name"], r["launches"], f"{r['ms']:.3f}", f"{100 * r['ms'] / v['sum_ms']:.1f}%",
                 *([f"{r['bound_ms']:.3f}", f"{100 * r['bound_ms'] / max(r['ms'], 1e-9):.0f}%"]
                   if "bound_ms" in r else ["", ""])] for r in v["rows"]]
        rows.append(["sum", sum(r["launches"] for r in v["rows"]), f"{v['sum_ms']:.3f}", "100%",
                     f"{v['bound_ms']:.3f}", f"{100 * v['bound_ms'] / v['sum_ms']:.0f}%"])
        lines += [f"## Kernels of a step, 124M, B = {v['batch']}", "",
                  "Each launch lies between two events and no graph is used, which adds a few microseconds "
                  "to each. The lower bounds are those of dev/bench/roofline.py at "
                  f"{v['peak_flops'] / 1e12:.0f} TFLOP/s and {v['bandwidth'] / 1e12:.2f} TB/s.", "",
                  *table(["row", "launches", "ms", "share", "lower bound, ms", "bound reached"], rows)]
    return lines


def pytorch_section(data):
    parts, lines, rows = dict(finished(data, "pytorch")), [], []
    batch = parts.get("Python", {}).get("batch")
    for name, v in finished(data, "speed"):
        if batch and v.get("batch") == batch:
            rows.append([f"Arapoet, {name}", f"{v['step_ms']:.2f}", f"{v['tokens_per_s']:,.0f}"])
    for name in ("eager", "cudnn", "compile"):
        if name in parts:
            v = parts[name]
            rows.append([f"PyTorch {v['torch']}, {name}", f"{v['step_ms']:.2f}", f"{v['tokens_per_s']:,.0f}"])
    if len(rows) > 1:
        lines += ["## PyTorch beside it, 124M", "",
                  *table(["", "ms per step", "tokens/s"], rows)]
    mine = {r["name"]: r for _, v in finished(data, "kernels") for r in v["rows"]}
    names = {"qkv": "qkv", "attproj": "attproj", "fc": "fc + GELU", "fcproj": "fcproj", "head": "head logits"}
    rows = []
    for name, tflops in parts.get("products", {}).items():
        r = mine.get(names.get(name, name))
        if r and r.get("tflops") and r["ms"]:
            rows.append([r["name"], f"{1e3 * r['tflops'] / r['ms']:.0f}", f"{tflops:.0f}"])
    if rows:
        lines += ["TFLOP/s of the products, here with their epilogues:", "",
                  *table(["product", "Arapoet", "torch.mm"], rows)]
    if "attention" in parts:
        lines += ["Attention of one layer alone, in ms: " + ", ".join(
            f"{k} {x:.3f}" if isinstance(x, float) else f"{k} {x}" for k, x in parts["attention"].items()
            if k not in ("record", "torch")) + ".", ""]
    return lines


def numbers_section(data):
    rows, errors = [], []
    for part in data["stages"].get("numbers", {}).get("parts", []):
        v = part.get("values", {})
        if "passed" in v:
            rows.append([part["name"], f"{v['passed']} passed, {v['failed']} failed"])
            errors += [[part["name"], kind, f"{e['error']:.1e}", f"{e['allowed']:.0e}"]
                       for kind, e in v["errors"].items()]
        elif "worst" in v:
            rows.append([part["name"], f"largest difference {v['worst']:.1e}, allowed {v['allowed']:.0e}"])
    lines = ["## Numbers", "", *table(["", ""], rows)] if rows else []
    if errors:
        lines += ["Largest errors (relative L2 where nothing else is said):", "",
                  *table(["test", "of", "error", "allowed"], errors)]
    return lines


def ncu_section(data):
    lines = []
    for _, v in finished(data, "ncu"):
        names = list(NCU_METRICS.values())
        rows = [[k] + [" ".join(str(x) for x in m.get(n, [""])) for n in names]
                for k, m in v["kernels"].items()]
        lines += ["## Nsight Compute", "", *table(["kernel"] + names, rows)]
    return lines


def markdown(data):
    gpus = [v["gpus"][0]["name"] for n, v in finished(data, "device") if n == "nvidia-smi" and v["gpus"]]
    state = "" if data["finished"] else " The check has not finished."
    lines = [f"# GPU check: {gpus[0] if gpus else 'no GPU known'}", "",
             f"Written by dev/gpu_check.py, started {data['started']}, {data['seconds']:.0f} s.{state}", ""]
    for name, v in finished(data, "device"):
        if name.endswith("--version"):
            lines += [f"    {v['text']}"]
        elif name == "nvidia-smi":
            lines += ["    " + ", ".join(f"{k} {x:g}" if isinstance(x, float) else f"{k} {x}"
                                         for k, x in gpu.items()) for gpu in v["gpus"]]
        elif name == "other processes" and v["processes"]:
            lines += [f"    another process uses the GPU: {p}" for p in v["processes"]]
    lines += ["", *table(["stage", "result", "seconds", "of", "reason"],
                         [[n, s["status"], s["seconds"], s["limit"],
                           s.get("reason", "").replace("|", "/").replace("\n", " ")[:400]]
                          for n, s in data["stages"].items()])]
    for section in (speed_section, switches_section, kernels_section, pytorch_section, numbers_section,
                    ncu_section):
        lines += section(data)
    return "\n".join(lines).rstrip() + "\n"


# ---------------------------------------------------------------------------------------------
# main

def run_stages(check, names, limits):
    for name in names:
        left = check.ends - time.monotonic()
        stage = check.stage = Stage(check, name, max(0.0, min(limits[name], left)))
        print(f"== {name} (at most {stage.limit:.0f} s)", flush=True)
        if stage.limit < 1:
            stage.add("start", TIMEOUT, 0, reason="all of the check's time was used up before")
            continue
        try:
            STAGES[name](check, stage)
        except Problem as p:
            stage.add("stage", p.status, 0, reason=p.reason)
        except Exception as e:
            traceback.print_exc()
            stage.add("stage", FAILED, 0, reason=f"gpu_check.py: {type(e).__name__}: {e}")
        stage.finish()


def describe(folder, commit, archs):
    """Prints what pack.json says: what the programs in the folder need."""
    needed, libraries = set(), set()
    for name in sorted(os.listdir(folder)):
        text = subprocess.run(["objdump", "-p", os.path.join(folder, name)], stdout=subprocess.PIPE,
                              universal_newlines=True, check=True).stdout
        needed |= set(re.findall(r"GLIBC_([0-9.]+)", text))
        libraries |= set(re.findall(r"NEEDED +(\S+)", text))
    newest = max(needed, key=lambda v: [int(n) for n in v.split(".")])
    print(json.dumps({"commit": commit, "architectures": archs, "glibc": newest, "processor": "x86-64-v3",
                      "libraries": sorted(libraries)}, indent=1))


def stopped(signum, frame):
    raise KeyboardInterrupt(signal.Signals(signum).name)


def default_bin():
    for folder in ("bin", os.path.join("build", "device", "bin")):
        if os.path.isdir(os.path.join(ROOT, folder)):
            return os.path.join(ROOT, folder)
    return os.path.join(ROOT, "bin")


def options():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--stages", default=",".join(LIMITS), help="those to run; default: " + ",".join(LIMITS))
    p.add_argument("--out", default="gpu-check", help="folder for the report; default: gpu-check")
    p.add_argument("--bin", default=default_bin(), help="folder of the programs")
    p.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together")
    p.add_argument("--limit", action="append", default=[], metavar="STAGE=SECONDS", help="another limit")
    p.add_argument("--python", help="a Python that has PyTorch; default: one is looked for")
    p.add_argument("--rehearsal", action="store_true",
                   help="sizes as small as possible, to try this script without a GPU")
    p.add_argument("--describe", metavar="DIR", help=argparse.SUPPRESS)
    p.add_argument("--commit", help=argparse.SUPPRESS)
    p.add_argument("--archs", help=argparse.SUPPRESS)
    o = p.parse_args()
    o.limits = dict(LIMITS)
    for text in o.limit:
        name, _, seconds = text.partition("=")
        if name not in LIMITS or not re.fullmatch(r"[0-9.]+", seconds):
            p.error(f"--limit {text}: wanted STAGE=SECONDS, with one of the stages {', '.join(LIMITS)}")
        o.limits[name] = float(seconds)
    o.names = [n for n in o.stages.split(",") if n]
    for name in o.names:
        if name not in STAGES:
            p.error(f"--stages: '{name}' is unknown; known are {', '.join(LIMITS)}")
    if "programs" not in o.names:
        o.names.insert(0, "programs")
    o.out, o.bin = os.path.abspath(o.out), os.path.abspath(o.bin)
    return o


def main():
    o = options()
    if o.describe:
        return describe(o.describe, o.commit, o.archs)
    for sig in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, stopped)
    try:
        check = Check(o)
        check.report.data["pack"] = pack_facts()
        check.report.save()
    except OSError as e:
        sys.exit(f"gpu_check.py: --out {o.out}: cannot write: {e.strerror}")
    code = 130
    try:
        run_stages(check, o.names, o.limits)
        check.report.data["finished"] = True
        bad = [s for s in check.report.data["stages"].values() if s["status"] in (FAILED, TIMEOUT)]
        code = 1 if bad else 0
    except KeyboardInterrupt as e:
        if check.stage:
            check.stage.add("stage", FAILED, 0, reason=f"the check was ended: {e or 'SIGINT'}")
    check.report.save()
    print(open(os.path.join(o.out, "gpu-check.md"), encoding="utf-8").read())
    print(f"written to {o.out}/gpu-check.json and gpu-check.md")
    return code


if __name__ == "__main__":
    sys.exit(main())
