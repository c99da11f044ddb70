#!/usr/bin/env python3
"""Compares Muon with AdamW in three experiments, each optimizer at its best of three learning rates.

    dev/ladder/optimizers.py poems.csv                          all three, to out/optimizers
    dev/ladder/optimizers.py poems.csv --parts a                one of them
    dev/ladder/optimizers.py poems.csv --steps 20 --out out/q   a quick look

    a   the built-in diwan, tiny preset, for 400 and for 700 steps
    b   characters of poems.csv, char preset without dropout, 16 x 256 tokens
    c   a small model of poems.csv without one poet, fine-tuned on that poet

Started again, it goes on where it stopped. A rate is --learning_rate; the blocks' matrices learn at 5 times
that rate with Muon (--muon_learning_rate), and so their weights decay 5 times as fast. With the best of its
three rates each optimizer is also trained with seed 2 instead of 1, and with the wsd schedule instead of
cosine. Muon is trained twice more, with both seeds, for only as many steps as fit into AdamW's time. The step
time used for this is the 10th percentile of the optimizer's steps; slower ones are due to the machine. A run's
loss is its lowest validation loss, in b on the first 50,000 tokens of the validation file. Runs alternate
between the optimizers, so that slow phases of the machine meet both.

OUT/a.md, OUT/a_long.md, OUT/b.md and OUT/c.md have the tables, written when all rates have been run and
rewritten as further runs end; OUT/report.md has all that there are; OUT/a_steps.svg, OUT/a_seconds.svg, ...
the curves. Other arguments need another OUT."""

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import zlib

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
        wanted, saved = " ".join(str(f) for f in self.flags), self.folder + ".flags"
        if not os.path.exists(saved) and not os.path.exists(self.folder):
            with open(saved, "w") as f:
                f.write(wanted)
        if not os.path.exists(saved) or open(saved).read() != wanted:
            sys.exit(f"optimizers.py: {self.folder} was trained with other flags, or not by this script; "
                     "take another --out")
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

    def times(self):
        """Milliseconds of each step."""
        return [float(r["ms"]) for r in self.rows() if r["ms"]]


def command(words, log):
    words = [str(w) for w in words]
    print(shlex.join(words), flush=True)
    with open(log, "a") as out:
        if subprocess.run(words, stdout=out, stderr=subprocess.STDOUT).returncode:
            out.flush()
            last = open(log).read().strip().splitlines()[-1:]
            sys.exit(f"optimizers.py: {words[0]} failed: {' '.join(last)}")


class Experiment:
    """Both optimizers with the model and data of `flags`, each run for `steps` steps. `rates` has three, or
    three for each optimizer."""

    def __init__(self, name, title, out, flags, rates, steps, validations):
        self.name, self.title, self.steps, self.validations = name, title, steps, validations
        self.rates = rates if isinstance(rates, dict) else {o: rates for o in OPTIMIZERS}
        self.out = os.path.join(out, name)
        self.flags = flags + ["--sample_every", 0, "--log_every", 100]
        self.runs = {}                  # by optimizer and rate
        self.wsd, self.second = {}, {}  # by optimizer, at its best rate: with wsd, with seed 2
        self.in_time = []               # Muon's, as long as AdamW's, with seeds 1 and 2

    def run(self, optimizer, rate, steps, seed=1, schedule="cosine"):
        name = f"{optimizer}_{rate:g}_seed{seed}_{schedule}_{steps}"
        run = Run(os.path.join(self.out, name),
                  self.flags + ["--optimizer", optimizer, "--learning_rate", rate, "--seed", seed,
                                "--lr_schedule", schedule, "--val_every", max(1, steps // self.validations)],
                  steps)
        run.train()
        return run

    def best(self, optimizer):
        """The best of an optimizer's rates."""
        return min(self.rates[optimizer], key=lambda rate: self.runs[optimizer, rate].best())

    def best_run(self, optimizer):
        return self.runs[optimizer, self.best(optimizer)]

    def ms(self, optimizer):
        times = sorted(ms for rate in self.rates[optimizer] for ms in self.runs[optimizer, rate].times())
        return times[len(times) // 10]

    def measure(self):
        os.makedirs(self.out, exist_ok=True)
        for i in range(3):
            for o in OPTIMIZERS:
                self.runs[o, self.rates[o][i]] = self.run(o, self.rates[o][i], self.steps)
        self.write()
        fewer = max(1, min(self.steps, round(self.steps * self.ms("adamw") / self.ms("muon"))))
        for seed in (1, 2):
            self.in_time.append(self.run("muon", self.best("muon"), fewer, seed))
            self.write()
        for o in OPTIMIZERS:
            self.second[o] = self.run(o, self.best(o), self.steps, seed=2)
            self.write()
        for o in OPTIMIZERS:
            self.wsd[o] = self.run(o, self.best(o), self.steps, schedule="wsd")
            self.write()

    def write(self):
        """The table and the curves of the runs that are done."""
        header = ["optimizer", "rate", f"{self.steps} steps", "with wsd", "with seed 2"]
        rows = [header, ["---"] * len(header)]
        for o in OPTIMIZERS:
            for rate in self.rates[o]:
                row = [self.runs[o, rate]]
                row += [self.wsd.get(o), self.second.get(o)] if rate == self.best(o) else [None, None]
                rows.append([o, f"{rate:g}"] + [f"{run.best():.3f}" if run else "" for run in row])
        lines = [f"## {self.title}", ""] + [f"| {' | '.join(row)} |" for row in rows] + [""]
        if self.in_time:
            lines += ["A step takes "
                      + " and ".join(f"{self.ms(o):.0f} ms with {o}" for o in OPTIMIZERS) + ".",
                      "In the time of AdamW's steps, Muon takes fewer and comes to " + ", ".join(
                          f"{run.best():.3f} (seed {seed}, {run.steps} steps)"
                          for seed, run in enumerate(self.in_time, 1)) + ".", self.reached(), ""]
        with open(os.path.join(os.path.dirname(self.out), self.name + ".md"), "w") as f:
            f.write("\n".join(lines))
        self.draw([self.best_run("adamw"), self.best_run("muon"), *self.in_time[:1]])

    def draw(self, runs):
        if not shutil.which("gnuplot"):
            return
        for axis in ("steps", "seconds"):
            image = os.path.join(os.path.dirname(self.out), f"{self.name}_{axis}.svg")
            if subprocess.run(["dev/plot/compare.sh", axis, image, *(run.folder for run in runs)]).returncode:
                print(f"optimizers.py: {image} could not be drawn", flush=True)

    def reached(self):
        adamw = self.best_run("adamw").best()
        steps = [step for step, loss in sorted(self.best_run("muon").losses().items()) if loss <= adamw]
        return (f"Muon first validates at AdamW's lowest loss or below after step {steps[0]} of {self.steps}."
                if steps else "Muon does not reach AdamW's lowest loss.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("poems", help="poems with a column poet_name, for b and c")
    parser.add_argument("--out", default="out/optimizers", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--parts", default="abc", help="which experiments (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="steps of b (default: %(default)s); a and c "
                        "have 400, 700 and 300, or as many as b where those are fewer than 300")
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
    with open(o.poems, "rb") as f:
        arguments = {"poems": zlib.crc32(f.read()), "steps": o.steps, "dtype": o.dtype, "poet": o.poet}
    saved = os.path.join(o.out, "arguments.json")
    if os.path.exists(saved) and json.load(open(saved)) != arguments:
        sys.exit(f"optimizers.py: {o.out} has runs with other arguments ({saved}); take another --out")

    def data(name, *flags, source=o.poems):
        folder = os.path.join(o.out, name)
        wanted, made = json.dumps([arguments["poems"], *flags]), folder + ".flags"
        if not os.path.exists(made) or open(made).read() != wanted:
            command(["./prepare_data", source, "-o", folder, *flags], os.path.join(o.out, "data.txt"))
            with open(made, "w") as f:
                f.write(wanted)
        return folder

    experiments = []
    if "a" in o.parts:
        for name, steps in (("a", 400), ("a_long", 700)) if o.steps >= 300 else (("a", o.steps),):
            experiments.append(Experiment(
                name, f"(a) The built-in diwan, tiny preset, {steps} steps", o.out,
                ["--data", data("diwan", source="data/sample_poems.csv"), "--preset", "tiny"],
                (2e-3, 4e-3, 8e-3), steps=steps, validations=20))
    if "b" in o.parts:
        experiments.append(Experiment(
            "b", "(b) Characters of many poets, char preset, 16 x 256 tokens", o.out,
            ["--data", data("corpus"), "--preset", "char", "--batch_size", 16, "--dropout", 0, "--dtype",
             o.dtype, "--val_tokens", 50000],
            {"adamw": (1e-3, 2e-3, 4e-3), "muon": (5e-4, 1e-3, 2e-3)}, steps=o.steps, validations=12))
    if "c" in o.parts:
        others = data("others", "--except", f"poet_name={o.poet}")
        one = data("one", "--where", f"poet_name={o.poet}",
                   "--tokenizer", os.path.join(others, "tokenizer.bin"))
    with open(saved + ".part", "w") as f:  # now that all data could be made of them
        json.dump(arguments, f)
    os.replace(saved + ".part", saved)
    if "c" in o.parts:
        small = ["--preset", "tiny", "--batch_size", 32, "--dropout", 0, "--optimizer", "adamw"]
        pretrained = Run(os.path.join(o.out, "pretrained"),
                         ["--data", others, *small, "--val_every", 0, "--sample_every", 0],
                         2000 if o.steps >= 300 else 4 * o.steps)
        model = os.path.join(pretrained.folder, f"model_{pretrained.steps:08d}.bin")
        pretrained.done = lambda: os.path.exists(model)
        pretrained.train()
        experiments.append(Experiment(
            "c", "(c) Fine-tuning on one poet", o.out,
            ["--init_from", model, "--data", one, "--batch_size", 32], (3e-4, 1e-3, 3e-3),
            steps=min(300, o.steps), validations=20))
    for e in experiments:
        e.measure()
    tables = [open(path).read() for name in ("a", "a_long", "b", "c")
              for path in [os.path.join(o.out, name + ".md")] if os.path.exists(path)]
    report = os.path.join(o.out, "report.md")
    with open(report, "w") as f:
        f.write("\n".join(tables))
    print("\n".join(tables))
    print(f"wrote {report}")
    if not shutil.which("gnuplot"):
        print("no curves: gnuplot is missing; sudo apt-get install gnuplot-nox, then start this script again")


if __name__ == "__main__":
    main()
