#!/usr/bin/env python3
"""Kills and breaks the programs at chosen and random moments, and checks that nothing is lost (make soak).

    dev/soak/soak.py --faults build/soak/faults.so --seconds 60     random cases for a minute
    dev/soak/soak.py --faults build/soak/faults.so --all            every call of every scenario, every kind

A scenario is a command that writes. Its calls that change files are made to fail one at a time
(dev/soak/faults.cpp), or the process is killed there, or at a random moment. Afterwards must hold:
  - an error is one line that names a file, with exit code 1; an interrupted or short write is no error;
  - the folder holds a whole run: --resume, or the command once more, ends with the model of an unbroken run,
    byte for byte, and with no step twice in log.csv;
  - an earlier run's files are all there, in the folder or in previous/1, unchanged.
"""
import argparse
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

SMALL = ("--depth 1 --heads 2 --channels 16 --seq_len 16 --batch_size 4 "
         "--sample_every 0 --val_every 4 --keep 2").split()
STEPS = 12
KINDS = ["KILL", "ENOSPC", "EIO", "EINTR", "SHORT"]


class Scenario:
    """A folder as it is before, the command, and what must be true afterwards."""

    def __init__(self, name, before, command, unbroken, result=None):
        self.name, self.before, self.command = name, before, command
        self.unbroken, self.result = unbroken, result


def run(command, **more):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, **more)


def must(condition, message):
    if not condition:
        raise AssertionError(message)


def train(data, out, *more):
    return ["./train_gpt2", "--data", data, *SMALL, "--max_steps", STEPS, "--save_every", 3, "-o", out, *more]


def files_of(folder):
    """The files of a run, by name, with their contents."""
    return {p.name: p.read_bytes() for p in pathlib.Path(folder).glob("*")
            if p.is_file() and ".tmp" not in p.name
            and p.name not in (".arapoet.lock", "log.csv", "main.log")}


def make_scenarios(work):
    data = work / "data"
    must(run(["./prepare_data", "data/sample_poems.csv", "-o", data]).returncode == 0, "prepare_data")
    whole, half, other = work / "whole", work / "half", work / "other"
    must(run(train(data, whole)).returncode == 0, "train")
    must(run(train(data, half, "--keep", 9)).returncode == 0, "train")
    for step in (9, 12):  # as if the run had been killed after step 6 was saved
        for kind in ("model", "state"):
            (half / f"{kind}_{step:08d}.bin").unlink()
    must(run(train(data, other, "--seed", 7)).returncode == 0, "train")
    final = (whole / f"model_{STEPS:08d}.bin").read_bytes()
    recipe = ["./prepare_data", "data/sample_poems.csv", "--normalize_alef", "--val_fraction", 0, "-o"]
    must(run([*recipe, work / "normalized"]).returncode == 0, "prepare_data")
    empty = work / "empty"
    empty.mkdir()
    published = work / "published"
    must(run(["./convert_gpt2", "to-hf", whole / "model.bin", published]).returncode == 0, "convert_gpt2")
    convert = ["./convert_gpt2", "from-hf", published]
    converted, exported = work / "converted", work / "exported"
    converted.mkdir()
    must(run([*convert, converted / "out.bin"]).returncode == 0, "convert_gpt2")
    must(run(["./convert_gpt2", "to-hf", other / "model.bin", exported]).returncode == 0, "convert_gpt2")
    return [
        Scenario("a new run", empty, lambda out: train(data, out), final),
        Scenario("a resumed run", half, lambda out: ["./train_gpt2", "--resume", "-o", out], final),
        Scenario("a run in place of another", other, lambda out: train(data, out, "--overwrite"), final),
        Scenario("prepare_data over other data", data, lambda out: [*recipe, out], None,
                 files_of(work / "normalized")),
        Scenario("convert_gpt2 from-hf", empty, lambda out: [*convert, out / "out.bin"], None,
                 files_of(converted)),
        Scenario("convert_gpt2 to-hf over another model", exported,
                 lambda out: ["./convert_gpt2", "to-hf", whole / "model.bin", out], None,
                 files_of(published)),
    ]


def check_after(s, out, result, kind, struck):
    """What must hold after a command was broken; then it is finished, and its result compared."""
    if struck and kind in ("ENOSPC", "EIO") and result.returncode != 0:
        must(result.returncode == 1, f"exit code {result.returncode}")
        must(result.stderr.count("\n") == 1 and str(out) in result.stderr, f"stderr: {result.stderr}")
    elif struck and kind in ("EINTR", "SHORT"):
        must(result.returncode == 0, f"an interrupted or short call failed: {result.stderr}")
    if s.unbroken is None:
        # A reader completes a data set's move; then the files are all old or all new.
        run(["./train_gpt2", "--data", out, "--max_steps", 1, "--prompt", "no such letter",
             "-o", out / "none"])
        must(files_of(out) in (files_of(s.before), s.result),
             "the files are neither the old nor the new ones")
        must(run(s.command(out)).returncode == 0, "the command fails when it is repeated")
        must(files_of(out) == s.result, "the files are not what an unbroken command writes")
        must(not list(out.glob(".*")) and not list(out.glob("*.tmp*")), "files are left over")
        return
    if s.name == "a run in place of another":
        there = files_of(out)
        moved = files_of(out / "previous" / "1")
        for name, content in files_of(s.before).items():
            must(content in (there.get(name), moved.get(name)), f"{name} of the earlier run is lost")
    again = run(["./train_gpt2", "--resume", "--max_steps", STEPS, "-o", out])
    earlier = s.name == "a run in place of another" and not (out / "previous" / "1").exists()
    if again.returncode != 0 or earlier:
        must(earlier or "holds no checkpoint" in again.stderr, f"it cannot be resumed: {again.stderr}")
        again = run([c for c in s.command(out) if c not in ("--resume", "--overwrite")] + ["--overwrite"])
        must(again.returncode == 0, f"it cannot be started anew: {again.stderr}")
    must((out / f"model_{STEPS:08d}.bin").read_bytes() == s.unbroken,
         "the final model is not that of an unbroken run")
    steps = [line.split(",")[0] for line in (out / "log.csv").read_text().splitlines()[1:]]
    must(steps == [str(i) for i in range(STEPS + 1)], f"log.csv has steps {steps}")
    must(not list(out.glob("*.tmp*")) and not (out / ".new").exists(), "files are left over")


def attempt(s, work, faults, kind, at):
    """Breaks call number `at`; at 0: kills at a random moment. Returns whether there was such a call."""
    out, mark = work / "out", work / "mark"
    shutil.rmtree(out, ignore_errors=True)
    mark.unlink(missing_ok=True)
    shutil.copytree(s.before, out)
    command = [str(c) for c in s.command(out)]
    if at == 0:
        p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0, 0.6))
        p.send_signal(signal.SIGKILL)
        p.wait()
        check_after(s, out, None, "KILL", False)
        return True
    env = dict(os.environ, LD_PRELOAD=faults, FAULT_DIR=str(out), FAULT_AT=str(at), FAULT_KIND=kind,
               FAULT_MARK=str(mark), GOMP_SPINCOUNT="2000")
    result = run(command, env=env)
    struck = mark.exists()
    check_after(s, out, result, kind, struck)
    return struck


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--faults", required=True, help="the library that breaks calls (make soak builds it)")
    a.add_argument("--seconds", type=float, default=60, help="how long to try random cases")
    a.add_argument("--all", action="store_true", help="instead every call of every scenario, every kind")
    a.add_argument("--kills", type=int, default=0, help="with --all: kills at random moments after that")
    a.add_argument("--seed", type=int, default=None)
    o = a.parse_args()
    o.faults = str(pathlib.Path(o.faults).resolve())
    seed = random.randrange(10**6) if o.seed is None else o.seed
    random.seed(seed)
    count = {"broken calls": 0, "kills": 0}
    work = pathlib.Path(tempfile.mkdtemp(prefix="arapoet_soak_"))
    case = None
    try:
        scenarios = make_scenarios(work)
        if o.all:
            for s in scenarios:
                for kind in KINDS:
                    at = 1
                    case = (s.name, kind, at)
                    while attempt(s, work, o.faults, kind, at):
                        count["broken calls"] += 1
                        at += 1
                        case = (s.name, kind, at)
                    print(f"{s.name}, {kind}: {at - 1} calls", flush=True)
            for i in range(o.kills):
                s = scenarios[i % len(scenarios)]
                case = (s.name, "kill at a random moment", i)
                attempt(s, work, o.faults, "KILL", 0)
                count["kills"] += 1
        end = time.time() + o.seconds
        while not o.all and time.time() < end:
            s, kind = random.choice(scenarios), random.choice(KINDS)
            at = random.choice([0, random.randrange(1, 80)])
            case = (s.name, kind, at)
            if attempt(s, work, o.faults, kind, at):
                count["kills" if at == 0 else "broken calls"] += 1
    except (AssertionError, subprocess.TimeoutExpired) as e:
        print(f"soak: seed {seed}, {case}: {e}\nthe folder is kept: {work}", file=sys.stderr)
        return 1
    shutil.rmtree(work)
    print(f"soak: nothing lost in {count['broken calls']} broken calls and {count['kills']} kills "
          f"(seed {seed})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
