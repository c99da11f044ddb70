#!/usr/bin/env python3
"""Rehearses dev/gpu_check.py without a GPU: emulated programs, and tools that hang, crash or are missing.

    build/test_gpu_check      make copies this file there; the programs are in the same folder

It runs in the project's folder. Its last line is "N passed, N failed".
"""
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

BUILD = os.path.dirname(os.path.abspath(__file__))
CHECK = os.path.abspath(os.path.join("dev", "gpu_check.py"))
passed = failed = 0

NVIDIA_SMI = r"""#!/bin/sh
case "$*" in
    *compute-apps*) echo "4711, python3, 1024 MiB" ;;
    *--query-gpu=name*)
        echo "Fake GPU, 570.01, 81559, 4, 345, 1980, 2619, 2619, 71.2, 700.00, 31, 0, Disabled, Enabled" ;;
    *) echo "1755, 650.5, 55" ;;
esac
"""
MEMCHECK = r"""#!/bin/sh
case "$*" in
    *racecheck*) trap '' TERM; sleep 1000 & echo $! $$ >>"$FAKE/pids"; wait; wait ;;
esac
while [ "${1#--}" != "$1" ]; do shift 2; done
"$@" && echo "========= ERROR SUMMARY: 0 errors"
"""
NCU = r"""#!/bin/sh
echo '==PROF== Connected to process 1'
echo '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","adamw_kernel(a, b)","gpu__time_duration.sum","nsecond","1,000"'
echo '"0","adamw_kernel(a, b)","launch__registers_per_thread","register/thread","40"'
echo '"7","adamw_kernel(a, b)","gpu__time_duration.sum","nsecond","9,999"'
"""
TORCH = r"""#!/bin/sh
case "$*" in
    *import*) exit 0 ;;
    *eager*)
        echo '{"record": "eager", "torch": "2.9", "step_ms": 50.5, "tokens_per_s": 324435.6, "memory": 1}'
        echo '{"record": "cudnn", "torch": "2.9", "error": "RuntimeError: no cuDNN"}'
        echo '{"record": "products", "torch": "2.9", "qkv": 612.5}'
        echo '{"record": "atten'; kill -KILL $$ ;;
    *) exec sleep 1000 ;;
esac
"""
OLD_GLIBC = r"""#!/bin/sh
echo "$0: /lib/x86_64-linux-gnu/libc.so.6: version \`GLIBC_2.38' not found (required by $0)" >&2
exit 1
"""
NO_LIBRARY = r"""#!/bin/sh
[ -n "$LD_LIBRARY_PATH" ] && unset LD_LIBRARY_PATH && exec BENCH "$@"
echo "$0: error while loading shared libraries: libc.so.6: cannot open shared object file" >&2
exit 127
"""
# Stands in for make: puts a working program where the rule would have put it.
MAKE = r"""#!/bin/sh
for word; do case "$word" in BUILD=*) build=${word#BUILD=} ;; esac; done
mkdir -p "$build/device/bin"
cp -P "$FAKE/good/"* "$build/device/bin/"
"""


def check(promise, truth, said=""):
    global passed, failed
    if truth:
        passed += 1
    else:
        failed += 1
        print(f"FAILED: gpu check: {promise}\n{str(said)[-3000:]}", flush=True)


class Place:
    """A folder with programs, fake tools and reports."""

    def __init__(self, folder):
        self.folder = folder
        self.good, self.tools = os.path.join(folder, "good"), os.path.join(folder, "tools")
        for d in (self.good, self.tools):
            os.makedirs(d)
        for p in ("bf16", "fp32"):
            self.link(f"train_gpt2cu_{p}", "train_gpt2cu_emu" + ("_fp32" if p == "fp32" else ""))
            for t in ("kernels", "attention", "model"):
                if os.path.exists(os.path.join(BUILD, f"test_gpu_{t}_{p}")):
                    self.link(f"test_gpu_{t}_{p}", f"test_gpu_{t}_{p}")
        self.link("bench_gpu_bf16", "bench_gpu_emu")
        for name in ("train_gpt2", "prepare_data", "sample_gpt2"):
            os.symlink(os.path.abspath(name), os.path.join(self.good, name))
        self.script(self.good, "bench_gpu_fp32", "#!/bin/sh\nkill -SEGV $$\n")
        # The tools that the fakes use, and no others: the machine may have a GPU.
        for name in "sh sleep cp mkdir kill cat env".split():
            if shutil.which(name):
                os.symlink(shutil.which(name), os.path.join(self.tools, name))
        self.script(self.tools, "nvidia-smi", NVIDIA_SMI)

    def link(self, name, program):
        os.symlink(os.path.join(BUILD, program), os.path.join(self.good, name))

    def script(self, folder, name, text):
        path = os.path.join(folder, name)
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
        os.chmod(path, 0o755)
        return path

    def command(self, out, *flags):
        return [sys.executable, CHECK, "--rehearsal", "--bin", self.good, "--out",
                os.path.join(self.folder, out), "--python", "/bin/false", *flags]

    def env(self):
        return dict(os.environ, PATH=self.tools, FAKE=self.folder, OMP_NUM_THREADS="2", LD_LIBRARY_PATH="",
                    EMU_HOST_GUARD="0")

    def run(self, out, *flags):
        r = subprocess.run(self.command(out, *flags), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env=self.env(), universal_newlines=True, timeout=300)
        return r.returncode, r.stdout

    def report(self, out):
        with open(os.path.join(self.folder, out, "gpu-check.json"), encoding="utf-8") as f:
            data = json.load(f)
        with open(os.path.join(self.folder, out, "gpu-check.md"), encoding="utf-8") as f:
            return data, f.read()


def empty_fields(value, path=""):
    """The paths of all fields without a value."""
    if value is None or value == "" and not path.endswith(("library_path", "switch")):
        return [path]
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [p for k, v in pairs for p in empty_fields(v, f"{path}.{k}")]


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
            return f.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def parts(data, stage):
    return {p["name"]: p for p in data["stages"][stage]["parts"]}


def all_stages(place):
    place.script(place.tools, "compute-sanitizer", MEMCHECK)
    code, said = place.run("all", "--limit", "racecheck=1.5")
    data, text = place.report("all")
    stages = data["stages"]
    check("the exit code tells that something failed", code == 1, said)
    names = "programs device speed switches kernels pytorch numbers ncu 774M fp32 memcheck racecheck"
    check("every stage is in the report, in order", list(stages) == names.split(), said)
    check("the report is finished", data["finished"] is True, said)
    want = dict.fromkeys(stages, "ok")
    want.update(pytorch="missing", ncu="missing", fp32="failed", racecheck="timeout")
    check("stages that can work do, the others say how they ended",
          {n: s["status"] for n, s in stages.items()} == want, said)
    check("no field of a finished stage is empty", empty_fields(data) == [], empty_fields(data))
    for stage, words in (("pytorch", "no Python here has PyTorch"), ("ncu", "ncu is not installed"),
                         ("fp32", "ended by SIGSEGV"), ("racecheck", "ran longer than")):
        check(f"{stage} says why it has no result", words in stages[stage]["reason"], stages[stage])
        check(f"{stage}: the reason is in gpu-check.md", words in text, text)
    with open(os.path.join(place.folder, "pids"), encoding="utf-8") as f:
        pids = f.read().split()
    check("a tool that hangs, and ignores SIGTERM, is ended with its children",
          len(pids) >= 2 and all(map(gone, pids)), pids)
    check("the limits of all stages are ten minutes", sum(limits().values()) == 600, limits())
    speed_and_kernels(data, text)
    numbers(data, text)


def limits():
    with open(CHECK, encoding="utf-8") as f:
        return eval(re.search(r"^LIMITS = (\{.*?\})", f.read(), re.M | re.S).group(1))


def speed_and_kernels(data, text):
    speed = parts(data, "speed")
    check("speed: each batch size", [n for n in speed] == ["B = 2", "B = 4", "B = 8", "clocks"], speed)
    for name in ("B = 2", "B = 4", "B = 8"):
        v = speed[name]["values"]
        # In the emulator each operation takes one millisecond, so the parts add up.
        together = sum(v[k] for k in ("forward_ms", "backward_ms", "update_ms", "host_gap_ms"))
        check(f"speed, {name}: forward, backward, update and gap are the step",
              abs(together - v["step_ms"]) < 1e-3 and v["update_ms"] == 2 and v["host_gap_ms"] == 0, v)
        check(f"speed, {name}: attention counted once is less than in full",
              0 < v["mfu_causal"] < v["mfu_full"], v)
    check("speed: the clocks while the steps ran",
          speed["clocks"]["values"]["clocks.sm"]["most"] == 1755, speed)
    switches = parts(data, "switches")
    check("switches: each that the program lists, between two runs without",
          list(switches)[1:] == ["none"] + switches["names"]["values"]["switches"] + ["none, again"]
          and "use_graphs=0" in switches and "head_logits=1073741824" in switches, switches)
    check("switches: the program was given them",
          all(p["values"]["switch"] == n for n, p in switches.items() if "=" in n), switches)
    update = {n: switches[n]["values"]["update_ms"] for n in ("none", "muon=1")}
    check("switches: Muon's update is timed", update["none"] == 2 and update["muon=1"] > 2, update)
    rows = parts(data, "kernels")["table"]["values"]["rows"]
    unknown = [r["name"] for r in rows if "bound_ms" not in r]
    check("kernels: each of the step's kernels is in KERNEL_ROWS and in roofline.py", unknown == [], unknown)
    wrong = {r["name"]: (r["launches"], r.get("launches_on_paper")) for r in rows
             if r["launches"] != r.get("launches_on_paper")}
    check("kernels: they are launched as often as roofline.py counts", wrong == {}, wrong)
    check("device: what nvidia-smi, the programs and CUDA say", all(
        w in text for w in ("Fake GPU", "power.limit 700", "4711", "emulated")), text)


def numbers(data, text):
    found = parts(data, "numbers")
    errors = found["test of kernels, bf16"]["values"]["errors"]
    check("numbers: the tests' errors and what is allowed", errors and all(
        0 <= e["error"] <= e["allowed"] for e in errors.values()), errors)
    for name in ("ten steps, bf16", "ten steps, fp32", "CPU, then GPU, fp32", "GPU, then CPU, bf16"):
        v = found.get(name, {}).get("values", {"losses": [], "worst": 1})
        check(f"numbers, {name}: ten losses, close to the CPU's",
              len(v["losses"]) == 10 and v["worst"] <= 5e-3, found)


def tools(place):
    """Nsight Compute and PyTorch, as fakes that print what the real ones print."""
    place.script(place.tools, "ncu", NCU)
    torch = place.script(place.folder, "torch", TORCH)
    place.run("tools", "--stages", "speed,kernels,pytorch,ncu", "--limit", "pytorch=1.5", "--python", torch)
    data, text = place.report("tools")
    kernels = parts(data, "ncu")["eight kernels"]["values"]["kernels"]
    check("ncu: each kernel's first launch", kernels == {
        "adamw": {"time": [1000.0, "nsecond"], "registers": [40.0, "register/thread"]}}, kernels)
    torch = parts(data, "pytorch")
    check("pytorch: a part's time", torch["eager"].get("values", {}).get("step_ms") == 50.5, torch)
    check("pytorch: a part's error is its reason, and the next part runs",
          torch["cudnn"].get("reason") == "RuntimeError: no cuDNN" and torch["products"]["status"] == "ok",
          torch)
    check("pytorch: a part that was not reached says why",
          torch["attention"]["status"] == "failed" and "SIGKILL" in torch["attention"]["reason"], torch)
    check("pytorch: compiling has a limit", torch["compile"]["status"] == "timeout", torch)
    check("pytorch: its times and products are beside Arapoet's", "PyTorch 2.9, eager | 50.50" in text
          and re.search(r"\| qkv \| \d+ \| 612 \|", text), text)
    place.script(place.tools, "ncu", "#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM' >&2; exit 1\n")
    place.run("tools", "--stages", "ncu")
    data, text = place.report("tools")
    check("ncu: not permitted is missing, not failed", data["stages"]["ncu"]["status"] == "missing"
          and "not permitted" in text, data)


def broken_programs(place):
    os.unlink(os.path.join(place.good, "bench_gpu_bf16"))
    place.script(place.good, "bench_gpu_bf16", OLD_GLIBC)
    code, said = place.run("old", "--stages", "device,speed")
    data, text = place.report("old")
    check("programs that do not start: the report says which library is too old",
          code == 1 and "C library is older than GLIBC_2.38" in data["stages"]["programs"]["reason"], said)
    check("and why they were not built again", "nvcc is not installed" in text, text)
    check("and what works is still done", parts(data, "device")["nvidia-smi"]["status"] == "ok"
          and data["stages"]["speed"]["status"] == "failed", said)
    os.unlink(os.path.join(place.good, "bench_gpu_bf16"))
    place.link("bench_gpu_bf16", "bench_gpu_emu")
    bad = os.path.join(place.folder, "bad")
    os.makedirs(bad)
    place.script(bad, "bench_gpu_bf16", OLD_GLIBC)
    place.script(place.tools, "make", MAKE)
    for name in ("nvcc", "g++"):
        place.script(place.tools, name, "#!/bin/sh\n")
    code, said = place.run("again", "--stages", "device", "--bin", bad)
    data, _ = place.report("again")
    check("with nvcc they are built again, and used", data["stages"]["device"]["status"] == "ok"
          and parts(data, "programs")["build again"]["status"] == "ok", said)


def library_found(place):
    """A library that is in none of the linker's folders, but in one of LIBRARY_FOLDERS."""
    if not os.path.exists("/usr/lib/x86_64-linux-gnu/libc.so.6"):
        return
    os.unlink(os.path.join(place.good, "bench_gpu_bf16"))
    program = os.path.join(BUILD, "bench_gpu_emu")
    place.script(place.good, "bench_gpu_bf16", NO_LIBRARY.replace("BENCH", program))
    place.run("library", "--stages", "programs")
    data, _ = place.report("library")
    start = parts(data, "programs")["start"]
    check("a library that the linker does not find is looked for, and used", start["status"] == "ok"
          and start["values"]["library_path"] == "/usr/lib/x86_64-linux-gnu", data)


def interrupted(place):
    place.script(place.tools, "nvidia-smi", "#!/bin/sh\nexec sleep 1000\n")
    process = subprocess.Popen(place.command("ended", "--stages", "device", "--limit", "device=100"),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=place.env())
    path, end = os.path.join(place.folder, "ended", "gpu-check.json"), time.monotonic() + 60
    while time.monotonic() < end and not (os.path.exists(path) and '"device"' in open(path).read()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code = process.wait(30)
    data, text = place.report("ended")
    check("a check that is ended leaves its report", code == 130 and not data["finished"]
          and "SIGTERM" in data["stages"]["device"]["reason"] and "has not finished" in text, (code, data))
    code, said = place.run("none", "--stages", "speeed")
    check("an unknown stage is a mistake, exit code 2", code == 2 and "'speeed' is unknown" in said, said)
    code, said = place.run("time", "--stages", "device,speed", "--minutes", "0.05")
    data, _ = place.report("time")
    check("when the minutes are used up, the other stages say so",
          "used up before" in data["stages"]["speed"].get("reason", ""), said)


def wrong_numbers(place):
    """What must not count as a success: other losses than the CPU's, failed tests, tests that end early."""
    spec = importlib.util.spec_from_file_location("gpu_check", CHECK)
    gpu_check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_check)
    training = gpu_check.Training.__new__(gpu_check.Training)
    training.dir = os.path.join(place.folder, "runs")

    def log(run, losses):
        os.makedirs(training.path(run), exist_ok=True)
        with open(os.path.join(training.path(run), "log.csv"), "w", encoding="utf-8") as f:
            f.write("step,train_loss\n" + "".join(f"{i + 1},{x}\n" for i, x in enumerate(losses)))

    def reason(f):
        try:
            return f"no problem: {f()}"
        except gpu_check.Problem as p:
            return f"{p.status}: {p.reason}"

    log("cpu", [2.0] * 10)
    for losses, words in (([2.0] * 9 + [2.001], "no problem"), (["nan"] * 10, "losses differ"),
                          ([2.0] * 9 + [2.1], "losses differ by 5.0e-02"), ([2.0] * 9, "9 and 10 steps")):
        log("gpu", losses)
        said = reason(lambda: training.compared("gpu", 5e-3))
        check(f"losses {losses[-1]}, {len(losses)} of them: {words}", words in said, said)

    class Fake:
        options = type("options", (), {"rehearsal": False})

        def program(self, name):
            return name

        def run(self, command, limit=None):
            if self.code:
                raise gpu_check.Problem("failed", f"exit code {self.code}: no line", self.text)
            return self.text

    for text, code, words in (
            ("  kernel x      1.0e-03 of 2e-03\n5 passed, 0 failed\n", 0, "no problem"),
            ("TEST CASE:  a sum\n4 passed, 1 failed\n", 1, "failed: 1 of 5 tests failed, first: a sum"),
            ("5 passed, 0 failed\n", 99, "exit code 99"), ("5 tests follow\n", 1, "exit code 1"),
            ("0 passed, 0 failed\n", 0, "no test ran"), ("", 0, "without its last line")):
        fake = Fake()
        fake.text, fake.code = text, code
        said = reason(lambda: gpu_check.test_results(fake, "test", 1))
        check(f"a test that ends with {code} and prints {text!r}: {words}", words in said, said)


def main():
    wanted = "bench_gpu_emu train_gpt2cu_emu train_gpt2cu_emu_fp32 test_gpu_kernels_bf16".split()
    missing = [p for p in wanted if not os.path.exists(os.path.join(BUILD, p))]
    if missing:
        sys.exit(f"{sys.argv[0]}: {BUILD}/{missing[0]} is missing; make builds it")
    with tempfile.TemporaryDirectory() as folder:
        place = Place(folder)
        for test in (wrong_numbers, all_stages, tools, broken_programs, library_found, interrupted):
            if sys.argv[1:] and test.__name__ not in sys.argv[1:]:
                continue
            start = time.monotonic()
            test(place)
            print(f"{test.__name__}: {time.monotonic() - start:.1f} s", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
