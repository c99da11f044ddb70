#!/usr/bin/env python3
"""Compares Muon with AdamW: three experiments, each optimizer at its best of three learning rates.

    dev/ladder/optimizers.py poems.csv                  all three, to out/optimizers; resumes where it stopped
    dev/ladder/optimizers.py poems.csv --parts a        one of them
    dev/ladder/optimizers.py poems.csv --steps 20       a quick look

    a   the built-in diwan, tiny preset
    b   characters of poems.csv, char preset without dropout, 16 x 256 tokens
    c   a small model of poems.csv without one poet, fine-tuned on that poet

Of each optimizer the best rate is trained with a second seed, too, and with the wsd schedule instead of
cosine. Muon is also trained for as many seconds as AdamW: for fewer steps, by the median time of a step. A
run's loss is its lowest validation loss. Runs alternate between the optimizers, so that slow phases of the
machine meet both. OUT/a.md, OUT/b.md and OUT/c.md have the tables, OUT/report.md all that there are;
OUT/a_steps.png, OUT/a_seconds.png, ... the curves. Other arguments need another OUT."""

import argparse
import csv
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys

OPTIMIZERS = ("adamw", "muon")


class Run:
    """One training run in a folder. `flags` are those of ./train_gpt2."""

    def __init__(self, folder, flags, steps):
        self.folder, self.flags, self.steps = folder, flags, steps

    def rows(self):
        path = os.path.join(self.folder, "log.csv")
        if not os.path.exists(path):
            return []
        with open(path, newline="") as f:
            return list(csv.DictReader(f))

    def done(self):
        rows = self.rows()
        return bool(rows) and int(rows[-1]["step"]) == self.steps and rows[-1]["val_loss"] != ""

    def train(self):
        if self.done():
            return
        resume = any(name.startswith("state_") for name in os.listdir(self.folder)) \
            if os.path.isdir(self.folder) else False
        flags = ["--resume"] if resume else self.flags + ["--max_steps", self.steps, "--overwrite"]
        command(["./train_gpt2", "-o", self.folder, *flags], self.folder + ".txt")
        if not self.done():
            sys.exit(f"optimizers.py: {self.folder} stopped before its last step; start this script again")

    def losses(self):
        """Validation losses by step."""
        return {int(r["step"]): float(r["val_loss"]) for r in self.rows() if r["val_loss"]}

    def best(self):
        return min(self.losses().values())

    def ms(self):
        return statistics.median(float(r["ms"]) for r in self.rows() if r["ms"])


def command(words, log):
    words = [str(w) for w in words]
    print(shlex.join(words), flush=True)
    with open(log, "a") as out:
        if subprocess.run(words, stdout=out, stderr=subprocess.STDOUT).returncode:
            out.flush()
            last = open(log).read().strip().splitlines()[-1:]
            sys.exit(f"optimizers.py: {words[0]} failed: {' '.join(last)}")


class Experiment:
    def __init__(self, name, title, out, flags, steps, rates):
        self.name, self.title, self.steps, self.rates = name, title, steps, rates
        self.out, self.table = os.path.join(out, name), os.path.join(out, name + ".md")
        self.flags = flags + ["--val_every", max(1, steps // 20), "--sample_every", 0, "--log_every", 100]
        self.runs = {}

    def run(self, optimizer, rate, seed=1, schedule="cosine", steps=None):
        steps = steps or self.steps
        name = f"{optimizer}_{rate:g}_seed{seed}_{schedule}_{steps}"
        run = Run(os.path.join(self.out, name),
                  self.flags + ["--optimizer", optimizer, "--learning_rate", rate, "--seed", seed,
                                "--lr_schedule", schedule], steps)
        run.train()
        return run

    def measure(self):
        os.makedirs(self.out, exist_ok=True)
        tried = {o: {} for o in OPTIMIZERS}
        for rate in self.rates:
            for o in OPTIMIZERS:
                tried[o][rate] = self.run(o, rate)
        best = {o: min(self.rates, key=lambda rate: tried[o][rate].best()) for o in OPTIMIZERS}
        second = {o: self.run(o, best[o], seed=2) for o in OPTIMIZERS}
        wsd = {o: self.run(o, best[o], schedule="wsd") for o in OPTIMIZERS}
        first = {o: tried[o][best[o]] for o in OPTIMIZERS}
        ms = {o: min(first[o].ms(), second[o].ms()) for o in OPTIMIZERS}
        fewer = max(1, min(self.steps, round(self.steps * ms["adamw"] / ms["muon"])))
        timed = [self.run("muon", best["muon"], seed, steps=fewer) for seed in (1, 2)]

        lines = [f"## {self.title}", "",
                 "| optimizer | rate | loss, seed 1 | seed 2 | wsd, seed 1 | steps | ms a step |",
                 "| --- | --- | --- | --- | --- | --- | --- |"]
        for o in OPTIMIZERS:
            for rate in self.rates:
                more = f"{second[o].best():.3f} | {wsd[o].best():.3f}" if rate == best[o] else " | "
                lines.append(f"| {o} | {rate:g} | {tried[o][rate].best():.3f} | {more} | {self.steps} | "
                             f"{tried[o][rate].ms():.0f} |")
        lines.append(f"| muon, AdamW's seconds | {best['muon']:g} | {timed[0].best():.3f} | "
                     f"{timed[1].best():.3f} | | {fewer} | {timed[0].ms():.0f} |")
        mean = {o: (first[o].best() + second[o].best()) / 2 for o in OPTIMIZERS}
        in_time = (timed[0].best() + timed[1].best()) / 2
        reached = [step for step, loss in sorted(first["muon"].losses().items())
                   if loss <= first["adamw"].best()]
        lines += ["", f"Mean of two seeds: AdamW {mean['adamw']:.3f}, Muon {mean['muon']:.3f} after as many "
                      f"steps, {in_time:.3f} after as many seconds. " +
                  (f"Muon first validates at AdamW's lowest loss or below after {reached[0]} of "
                   f"{self.steps} steps." if reached else "Muon does not reach AdamW's lowest loss."), ""]
        for axis in ("steps", "seconds"):
            if not shutil.which("gnuplot"):
                print("no curves: gnuplot is missing; sudo apt-get install gnuplot-nox")
                break
            image = os.path.join(os.path.dirname(self.out), f"{self.name}_{axis}.png")
            command(["dev/plot/compare.sh", axis, image, first["adamw"].folder, first["muon"].folder,
                     timed[0].folder], image + ".txt")
        with open(self.table, "w") as f:
            f.write("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("poems", help="poems with a column poet_name, for b and c")
    parser.add_argument("--out", default="out/optimizers", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--parts", default="abc", help="which experiments (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="steps of b (default: %(default)s); a has 700 "
                        "and c 300, or as many as b where these are fewer than 300")
    parser.add_argument("--dtype", default="bf16", help="numbers that b computes with (default: %(default)s)")
    parser.add_argument("--poet", default="أبو نواس", help="the poet of c (default: %(default)s)")
    o = parser.parse_args()
    if o.steps < 1 or not set(o.parts) <= set("abc") or not o.parts:
        parser.error("--steps is at least 1, --parts some of a, b and c")
    if not os.path.exists(o.poems):
        sys.exit(f"optimizers.py: {o.poems}: not found")
    o.poems, o.out = os.path.abspath(o.poems), os.path.abspath(o.out)
    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../.."))
    for program in ("train_gpt2", "prepare_data"):
        if not os.path.exists(program):
            sys.exit(f"optimizers.py: ./{program} is missing; make builds it")
    os.makedirs(o.out, exist_ok=True)
    arguments = {"poems": o.poems, "steps": o.steps, "dtype": o.dtype, "poet": o.poet}
    saved = os.path.join(o.out, "arguments.json")
    if os.path.exists(saved) and json.load(open(saved)) != arguments:
        sys.exit(f"optimizers.py: {o.out} has runs with other arguments ({saved}); take another --out")
    with open(saved + ".part", "w") as f:
        json.dump(arguments, f)
    os.replace(saved + ".part", saved)

    def data(name, *flags, source=o.poems):
        folder = os.path.join(o.out, name)
        if not os.path.exists(os.path.join(folder, "train.bin")):
            command(["./prepare_data", source, "-o", folder, *flags], os.path.join(o.out, "data.txt"))
        return folder

    experiments = []
    if "a" in o.parts:
        experiments.append(Experiment(
            "a", "(a) The built-in diwan, tiny preset", o.out,
            ["--data", data("diwan", source="data/sample_poems.csv"), "--preset", "tiny"],
            o.steps if o.steps < 300 else 700, (1e-3, 2e-3, 4e-3)))
    if "b" in o.parts:
        experiments.append(Experiment(
            "b", "(b) Characters of many poets, char preset, 16 x 256 tokens", o.out,
            ["--data", data("corpus"), "--preset", "char", "--batch_size", 16, "--dropout", 0, "--dtype",
             o.dtype], o.steps, (5e-4, 1e-3, 2e-3)))
    if "c" in o.parts:
        others = data("others", "--except", f"poet_name={o.poet}")
        small = ["--preset", "tiny", "--batch_size", 32, "--dropout", 0, "--optimizer", "adamw"]
        pretrained = Run(os.path.join(o.out, "pretrained"),
                         ["--data", others, *small, "--val_every", 0, "--sample_every", 0],
                         min(2000, 4 * o.steps))
        pretrained.done = lambda: os.path.exists(
            os.path.join(pretrained.folder, f"model_{pretrained.steps:08d}.bin"))
        pretrained.train()
        model = os.path.join(pretrained.folder, f"model_{pretrained.steps:08d}.bin")
        one = data("one", "--where", f"poet_name={o.poet}",
                   "--tokenizer", os.path.join(others, "tokenizer.bin"))
        experiments.append(Experiment(
            "c", "(c) Fine-tuning on one poet", o.out,
            ["--init_from", model, "--data", one, "--batch_size", 32], min(300, o.steps), (1e-4, 3e-4, 1e-3)))
    for e in experiments:
        e.measure()
    tables = [open(path).read() for path in (os.path.join(o.out, part + ".md") for part in "abc")
              if os.path.exists(path)]
    report = os.path.join(o.out, "report.md")
    with open(report, "w") as f:
        f.write("\n".join(tables))
    print("\n".join(tables))
    print(f"wrote {report}")


if __name__ == "__main__":
    main()
