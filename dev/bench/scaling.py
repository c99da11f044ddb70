#!/usr/bin/env python3
"""Computes, on paper, how long a training step on several GPUs takes, and how much memory it needs.

It writes dev/bench/SCALING.md, whose beginning says how it counts. Other uses:
    scaling.py --check             writes nothing; fails if SCALING.md differs from what is computed here, or
                                   a file dev/bench/scaling-counts/*.txt from the collectives assumed here
    scaling.py --counts FILE...    compares the collectives that the emulator counted with those assumed
    scaling.py --emulator PROGRAM  trains with train_gpt2cu_emu, on one and several ranks, and compares the
                                   memory that it prints and the collectives that it calls

A file of counts is what train_gpt2cu_emu writes with EMU_NCCL_LOG=FILE, a line for each rank's collective:
    rank 0 collective 7 ncclReduceScatter float32 count 98 bytes_in 784 bytes_out 392 stream_priority -5
after a first line that names the model's sizes as lib/gpt2.h does, and the run's settings:
    # L 4 C 128 maxT 64 Vp 128 zero_stage 1 micro_steps 2 steps 3
"""
import argparse, collections, glob, math, os, re, struct, subprocess, sys, tempfile, textwrap

import roofline
from roofline import BF16, FP32

HERE = os.path.dirname(os.path.abspath(__file__))
Shape = collections.namedtuple("Shape", "L NH C maxT V Vp")
MODELS = {"124M": Shape(12, 12, 768, 1024, 50257, 50304), "774M": Shape(36, 20, 1280, 1024, 50257, 50304),
          "1.5B": Shape(48, 25, 1600, 1024, 50257, 50304)}
T = 1024
STEP = 512 * T  # tokens of a step, where it is fixed
LARGEST_B = {"124M": 64, "774M": 32, "1.5B": 16}  # sequences at once; they fit into 80 GB without recomputing
# Dense bf16 FLOP/s and memory's bytes/s are roofline.GPUS. NVLink: bytes/s in one direction; NVIDIA's data
# sheets give both directions together, A100 600 GB/s and H100 900 GB/s.
NVLINK = {"A100": 300e9, "H100": 450e9}
GPUS_PER_NODE = 8
# InfiniBand's bytes/s in one direction, of all adapters of a node of eight GPUs. NDR is 400 Gb/s an adapter;
# NVIDIA's DGX H100 has eight of them.
NETWORKS = {"8 adapters": 8 * 50e9, "1 adapter": 50e9}

# Assumed. MATH was chosen so that the published figures come out, for the A100 the first of them.
MATH = {"A100": 0.66, "H100": 0.53}  # share of the peak that products and attention reach
MEMORY = 0.85         # share of the memory's bandwidth that other kernels reach
LAUNCH = 3e-6         # seconds that a kernel takes beyond its work: launch, and filling the GPU
WIRE = 0.8            # share of a link's bandwidth that a large collective reaches
TAKEN = 16 / 132      # share of the multiprocessors that a running collective occupies
ROUND_TRIP = 50e-6    # seconds between hosts over TCP
MESSAGE = 5e-6        # seconds of rank 0's CPU for one message
CUDA_AND_NCCL = 1.5e9  # bytes of a GPU that the trainer's own arrays do not get, and a 32nd of the rest

# ---------------------------------------------------------------------------------------------
# The collectives of a step

Collective = collections.namedtuple("Collective", "op dtype count part")  # count: as NCCL is given it
BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}


def round_up(n, to):
    return -(-n // to) * to


def parts(m, world):
    """Elements of the embeddings, a block and the final LayerNorm, padded as in lib/gpt2.h's ParamLayout."""
    multiple = world * 8 if world > 1 else 1
    return {"embeddings": round_up(m.Vp * m.C + m.maxT * m.C, multiple),
            "block": round_up(12 * m.C * m.C + 13 * m.C, multiple),
            "final": round_up(2 * m.C, multiple)}


def padded_size(m, world):
    p = parts(m, world)
    return p["embeddings"] + m.L * p["block"] + p["final"]


def reductions(m, world, stage, last):
    """The gradients' collectives of a micro-step, in the order in which backward makes them possible."""
    if not last and stage < 2:
        return []
    p, order = parts(m, world), m.L * ["block"]
    if last:
        order = ["final"] + order + ["embeddings"]
    if stage == 0:
        return [Collective("ncclAllReduce", "float32", p[part], part) for part in order]
    return [Collective("ncclReduceScatter", "float32", p[part] // world, part) for part in order]


def after_backward(m, world, stage):
    """Loss and squared norm of all ranks, and what brings the updated parameters to all of them."""
    p, totals = parts(m, world), [Collective("ncclAllReduce", "float64", 2, "totals")]
    order = ["embeddings"] + m.L * ["block"] + ["final"]
    gather = [Collective("ncclAllGather", "bfloat16", p[part] // world, part) for part in order]
    return totals + (gather if stage else [])


# When NCCL connects the GPUs
FIRST = ("ncclAllReduce", "float64", 1)


def step_collectives(m, world, stage, micro_steps):
    out = [c for k in range(micro_steps) for c in reductions(m, world, stage, k + 1 == micro_steps)]
    return out + after_backward(m, world, stage)


def whole_bytes(c, world):
    """Bytes of the whole array, of which a reduce-scatter leaves a part on each rank."""
    return c.count * BYTES[c.dtype] * (1 if c.op == "ncclAllReduce" else world)


# ---------------------------------------------------------------------------------------------
# The collectives that the emulator counted

LINE = re.compile(r"rank (\d+) collective (\d+) (\w+) (\w+) count (\d+) bytes_in (\d+) bytes_out (\d+) "
                  r"stream_priority (-?\d+)$")
HEADER = "# L 4 C 128 maxT 64 Vp 128 zero_stage 1 micro_steps 2 steps 3"
Counted = collections.namedtuple("Counted", "op dtype count bytes_in bytes_out priority")


def read_counts(path):
    """The settings, and each rank's collectives in the order in which it called them."""
    settings, ranks = {}, collections.defaultdict(dict)
    for number, line in enumerate(open(path, encoding="utf-8"), 1):
        words = line.split()
        if line.startswith("#"):
            settings.update((k, int(v)) for k, v in zip(words[1::2], words[2::2]))
        elif words:
            found = LINE.match(" ".join(words))
            if not found:
                sys.exit(f"scaling.py: {path}, line {number}: found '{line.strip()}', wanted 'rank R "
                         "collective K OP DTYPE count C bytes_in X bytes_out Y stream_priority P'")
            r, k, op, dtype, *numbers = found.groups()
            ranks[int(r)][int(k)] = Counted(op, dtype, *map(int, numbers))
    missing = [k for k in HEADER.split()[1::2] if k not in settings]
    if missing:
        sys.exit(f"scaling.py: {path}: its first line lacks {', '.join(missing)}; wanted one like: {HEADER}")
    if sorted(ranks) != list(range(len(ranks))) or len(ranks) < 2:
        sys.exit(f"scaling.py: {path}: found collectives of ranks {sorted(ranks)}, wanted 0 to 1 or more")
    return settings, {r: [c for _, c in sorted(ranks[r].items())] for r in sorted(ranks)}


def differences(path, settings, ranks):
    """What distinguishes the counted collectives from the assumed ones, a line for each."""
    m = Shape(settings["L"], 1, settings["C"], settings["maxT"], settings["Vp"], settings["Vp"])
    world, stage, steps = len(ranks), settings["zero_stage"], settings["steps"]
    assumed = step_collectives(m, world, stage, settings["micro_steps"])
    wanted = collections.Counter()
    for c in assumed:
        wanted[c[:3]] += steps
    reduce_op, faults = assumed[0].op, []
    for r, calls in ranks.items():
        if [c[:3] for c in calls[:1]] != [FIRST]:
            faults.append(f"rank {r}: its first collective is {calls[0][:3]}, wanted {FIRST}")
        calls = calls[1:]
        counted = collections.Counter(c[:3] for c in calls)
        for kind in sorted(set(wanted) | set(counted)):
            if wanted[kind] != counted[kind]:
                faults.append(f"rank {r}: {counted[kind]} x {kind[0]} of {kind[2]} {kind[1]} in {steps} "
                              f"steps, assumed {wanted[kind]}")
        for k, c in enumerate(calls):
            whole = c.count * BYTES.get(c.dtype, 0)
            bytes_in = whole * (world if c.op == "ncclReduceScatter" else 1)
            bytes_out = whole * (world if c.op == "ncclAllGather" else 1)
            if (c.bytes_in, c.bytes_out) != (bytes_in, bytes_out):
                faults.append(f"rank {r}, collective {k}: {c.bytes_in} bytes in and {c.bytes_out} out, "
                              f"wanted {bytes_in} and {bytes_out}")
            if c.op == reduce_op and c.dtype == "float32" and c.priority >= 0:
                faults.append(f"rank {r}, collective {k}: gradients on a stream of priority {c.priority}, "
                              "wanted below 0")
        reduced = [c.count for c in calls if c.op == reduce_op and c.dtype == "float32"]
        order = steps * [c.count for c in assumed if c.op == reduce_op and c.dtype == "float32"]
        if sorted(reduced) == sorted(order) and reduced != order:
            at = next(k for k in range(len(order)) if reduced[k] != order[k])
            faults.append(f"rank {r}: reduction {at} of the gradients has {reduced[at]} elements, assumed "
                          f"{order[at]}: the order differs")
    return [f"{path}: {f}" for f in faults]


def check_counts(paths):
    faults = []
    for path in paths:
        settings, ranks = read_counts(path)
        found = differences(path, settings, ranks)
        faults += found
        calls, steps, world = ranks[0][1:], settings["steps"], len(ranks)
        print(f"{path}: {world} ranks, stage {settings['zero_stage']}, {settings['micro_steps']} micro-steps:"
              f" {'as assumed' if not found else 'NOT as assumed'}; rank 0, each step:")
        for kind, n in sorted(collections.Counter(c[:3] for c in calls).items()):
            print(f"    {n / steps:g} x {kind[0]} of {kind[2]} {kind[1]}")
    if faults:
        shown = "\n".join("scaling.py: " + f for f in faults[:20])
        sys.exit(shown + (f"\nand {len(faults) - 20} more" if len(faults) > 20 else ""))


# ---------------------------------------------------------------------------------------------
# Memory, as memory_need() in train_gpt2.cu and lib/memory.h place it

# multiprocessors, bytes of cuBLASLt's workspace, and where the next array may begin after one
Machine = collections.namedtuple("Machine", "sms workspace next_piece")
GPU = Machine(132, 32 << 20, lambda end: round_up(end, 256))
EMULATOR = Machine(4, 1 << 20, lambda end: round_up(end, 256) + 2 * 4096)
HEAD_LOGITS, SLOTS = roofline.HEAD_LOGITS, 3  # SLOTS: blocks whose gradients exist at once in stage 2


def arena(machine, sizes, used=0):
    for size in sizes:
        used = machine.next_piece(used + size)
    return used


def head_rows(m, M):
    chunks = max(-(-M // max(HEAD_LOGITS // m.Vp, 1)), 1)
    return min(M, round_up(-(-M // chunks), 8))


def activation_bytes(machine, m, M, recompute):
    C, L = m.C, m.L
    kept = [L if recompute < level else 1 for level in (1, 2, 3)]  # slots of GELU, LayerNorms, blocks
    gelu, norms, blocks = kept
    x, row = M * C * BF16, M * FP32
    return arena(machine, [x, L * x, blocks * 3 * x, blocks * m.NH * row, blocks * x, blocks * x,
                           blocks * 4 * x, gelu * 4 * x, norms * x, norms * x, x]
                 + 4 * [blocks * row] + 3 * [row])


def scratch_bytes(machine, m, B, T):
    M, C = B * T, m.C
    x = M * C * BF16

    def bias(N):
        return -(-machine.sms * 4 // -(-N // 8 // 32)) * N

    batch = (16 + 2 * M + 2 + M + M + 1 + M + M // 64) * 4
    return arena(machine, [x, head_rows(m, M) * m.Vp * BF16, machine.workspace, x, x, 4 * x,
                           2 * C * 2 * machine.sms * FP32, B * m.NH * round_up(T, 64) * 8,
                           max(4 * C, bias(C), bias(3 * C), bias(4 * C)) * FP32, batch, 40])


def memory(m, B, T, recompute=0, stage=0, world=1, machine=GPU):
    """Bytes of each purpose on one rank, in bf16 with master weights."""
    P, p, sms = padded_size(m, world), parts(m, world), machine.sms
    params = arena(machine, [P * BF16])
    grads = [P * FP32]
    if stage == 2 and world > 1:  # three blocks' at a time; this rank's shards; a shard of a sum
        grads = [(p["embeddings"] + min(SLOTS, m.L) * p["block"] + p["final"]) * FP32, P // world * FP32,
                 p["block"] // world * FP32]
    state = P // world if stage and world > 1 else P
    tables = (2 if world > 1 else 1) * [(12 * m.L + 4) * 56] + ([16] if world > 1 else [])
    return {"parameters": params, "gradients": arena(machine, grads, params) - params,
            "AdamW": arena(machine, 3 * [state * FP32] + [8 * sms * 8] + tables),
            "activations": activation_bytes(machine, m, B * T, recompute),
            "scratch": scratch_bytes(machine, m, B, T)}


def room(card_gb):
    return (card_gb * 1e9 - CUDA_AND_NCCL) * 31 / 32


def largest_batch(m, card_gb, recompute, stage, world):
    fits = [B for B in (2**i for i in range(11))
            if sum(memory(m, B, T, recompute, stage, world).values()) <= room(card_gb)]
    return fits[-1] if fits else 0


def write_small_data(d, V, tokens):
    words = [b"<|endoftext|>"] + [bytes([65 + i]) for i in range(V - 1)]
    with open(f"{d}/tokenizer.bin", "wb") as f:
        f.write(struct.pack("<256i", 20240328, 2, V, 0, 1, *[0] * 251))
        f.write(b"".join(bytes([len(w)]) + w for w in words))
    with open(f"{d}/train.bin", "wb") as f:
        f.write(struct.pack("<256i", 20240520, 1, tokens, *[0] * 253))
        f.write(struct.pack(f"<{tokens}H", *[i % V for i in range(tokens)]))


def check_memory_row(what, row, need):
    print(f"{what}: {row}")
    for purpose, n in need.items():
        printed, unit = re.search(purpose + r" ([\d.]+) (\w+)", row).groups()
        computed = n / {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]
        if abs(computed - float(printed)) > 0.051:
            sys.exit(f"scaling.py: {what}: {purpose}: printed {printed} {unit}, computed {computed:.2f}")


def check_emulator(program):
    """Trains small models for 2 steps of 2 micro-steps with the emulated trainer. Compares the memory row of
    its table, and with several ranks the collectives that the emulator counted."""
    tiny, char = Shape(4, 4, 128, 64, 40, 128), Shape(6, 6, 384, 256, 40, 128)
    cases = [(tiny, "tiny", 2, 0, 1, 0), (char, "char", 3, 1, 1, 0), (tiny, "tiny", 5, 2, 1, 0),
             (char, "char", 1, 3, 1, 0)]
    cases += [(tiny, "tiny", 2, 0, world, stage) for world in (2, 3) for stage in (0, 1, 2)]
    with tempfile.TemporaryDirectory() as d:
        write_small_data(d, 40, 20000)
        for m, preset, B, recompute, world, stage in cases:
            flags = ["--data", d, "--preset", preset, "--optimizer", "adamw", "-b", B, "-r", recompute,
                     "-d", B * m.maxT * world * 2, "--max_steps", 2, "-s", 0, "-o", f"{d}/out", "--overwrite"]
            flags += ["--gpus", world, "--zero_stage", stage] if world > 1 else []
            log = f"{d}/{preset}-{world}-ranks-stage-{stage}.txt"
            ran = subprocess.run([program] + [str(f) for f in flags], capture_output=True, text=True,
                                 env=dict(os.environ, EMU_DEVICES=str(world), EMU_NCCL_LOG=log))
            row = re.search(r"^memory +(.*)$", ran.stdout, re.M)
            if not row or ran.returncode:
                sys.exit(f"scaling.py: {program}: exit code {ran.returncode}: {ran.stderr.strip()[-300:]}")
            what = f"{preset} --gpus {world} --zero_stage {stage} -b {B} --recompute {recompute}"
            check_memory_row(what, row[1], memory(m, B, m.maxT, recompute, stage, world, EMULATOR))
            if world > 1:
                lines = open(log, encoding="utf-8").read()
                with open(log, "w", encoding="utf-8") as f:
                    f.write(f"# L {m.L} C {m.C} maxT {m.maxT} Vp {m.Vp} zero_stage {stage} micro_steps 2 "
                            f"steps 2\n{lines}")
                check_counts([log])
    print("memory and collectives are as computed")


# ---------------------------------------------------------------------------------------------
# The time of a collective, as NCCL's own cost model counts it (NCCL, src/graph/tuning.cc): a latency, and the
# bytes over a bandwidth; NCCL takes the algorithm and protocol that is fastest by this count.
# Seconds: at the start, of a hop over NVLink, of a hop over the network; and the share of the bandwidth.
RING = {"LL": (3.6e-6, 0.47e-6, 2.7e-6, 1 / 4), "LL128": (10e-6, 1.9e-6, 4.0e-6, 0.92),
        "Simple": (8.4e-6, 3.4e-6, 9.6e-6, 1)}
TREE = {"LL": (4.4e-6, 0.52e-6, 5.0e-6, 0.9 / 3.8), "LL128": (4.4e-6, 1.2e-6, 8.5e-6, 0.9 * 0.915),
        "Simple": (0, 28e-6, 50e-6, 0.9)}

Cluster = collections.namedtuple("Cluster", "gpu world network per_node", defaults=[GPUS_PER_NODE])


def collective_time(c, k):
    """Seconds of collective c on cluster k, with nothing else on the wires."""
    world = k.world
    if world == 1:
        return 0.0
    nodes = max(world // k.per_node, 1)
    bandwidth = WIRE * (NVLINK[k.gpu] if nodes == 1 else min(NVLINK[k.gpu], NETWORKS[k.network]))
    bytes, times = whole_bytes(c, world), []
    rounds = 2 if c.op == "ncclAllReduce" else 1
    for start, hop, far, share in RING.values():
        hops, far_hops = rounds * (world - 1), rounds * (nodes - 1)
        times.append(start + (hops - far_hops) * hop + far_hops * far
                     + rounds * bytes * (world - 1) / world / (bandwidth * share))
    if rounds == 2:
        for start, hop, far, share in TREE.values():
            times.append(start + 2 * ((world / nodes - 1) * hop + math.log2(nodes) * far)
                         + 2 * bytes / (bandwidth * share))
    return min(times)


# ---------------------------------------------------------------------------------------------
# The time of a step

FORWARD = {"memset of accumulated gradients", "embedding_forward", "layernorm_forward", "qkv", "attproj",
           "attention_forward", "residual_layernorm_forward", "fc + GELU", "fcproj"}
UPDATE = {"gradient norm", "AdamW"}
# Seconds: to the head's end; of a LayerNorm's backward; of the rest of a block's, which has two LayerNorms;
# of the embeddings' backward; of the whole update.
Times = collections.namedtuple("Times", "forward norm block embeddings update")


def kernel_times(m, B, gpu):
    flops, bandwidth = roofline.GPUS[gpu]
    sums = collections.Counter()
    for k in roofline.arapoet(dict(L=m.L, NH=m.NH, C=m.C), B, T):
        where = ("update" if k.name in UPDATE else "norm" if k.name.startswith("layernorm_backward") else
                 "embeddings" if k.name == "embedding_backward" else
                 "forward" if k.name in FORWARD or k.name.startswith(("head", "cross", "sum")) else "block")
        work = max(k.flops / (flops * MATH[gpu]), k.bytes / (bandwidth * MEMORY))
        sums[where] += work + k.launches * LAUNCH
    return Times(sums["forward"], sums["norm"] / (2 * m.L + 1), sums["block"] / m.L, sums["embeddings"],
                 sums["update"])


def backward_time(t, L):
    return (2 * L + 1) * t.norm + L * t.block + t.embeddings


def micro_step(t, L, collectives, k, slots):
    """Seconds of a micro-step, in which each collective begins when its gradients are there and the one
    before is over. slots: blocks whose gradients memory holds; a block waits for its place there."""
    now, free, done = t.forward, 0.0, []  # done: when the blocks' collectives end, the last block's first
    queue = collections.deque(collectives)

    def compute(work):  # a collective that runs concurrently occupies some multiprocessors
        nonlocal now
        beside = max(free - now, 0)
        if work <= beside * (1 - TAKEN):
            now += work / (1 - TAKEN)
        else:
            now = max(free, now) + work - beside * (1 - TAKEN)

    def send(part):
        nonlocal free
        if queue and queue[0].part == part:
            free = max(now, free) + collective_time(queue.popleft(), k)

    for block in range(L):  # counted from the last
        if slots and block >= slots:
            now = max(now, done[block - slots])
        compute(t.norm)  # the final LayerNorm's, or that of the block above, whose gradients are now complete
        send("block" if block else "final")
        if block:
            done.append(free)
        compute(t.block + t.norm)
    compute(t.norm)
    send("block")
    compute(t.embeddings)
    send("embeddings")
    return max(now, free)


def step_time(m, B, micro_steps, stage, k):
    """Seconds of a step, and their parts."""
    t, world = kernel_times(m, B, k.gpu), k.world
    alone = t.forward + backward_time(t, m.L)
    slots = SLOTS if stage == 2 else 0
    parts = {"compute": micro_steps * alone, "reduce": 0.0}
    several = [reductions(m, world, stage, last) if world > 1 else [] for last in (False, True)]
    for last, n in ((False, micro_steps - 1), (True, 1)):
        if n and several[last]:
            parts["reduce"] += n * (micro_step(t, m.L, several[last], k, slots) - alone)
    parts["update"] = t.update / (world if stage else 1)
    after = after_backward(m, world, stage) if world > 1 else []
    parts["gather"] = sum(collective_time(c, k) for c in after)
    parts["control"] = ROUND_TRIP + 2 * (world - 1) * MESSAGE if world > 1 else 0.0
    return sum(parts.values()), parts


def flops_of(m, tokens):
    """step_flops() in lib/gpt2.h."""
    N = m.V * m.C + m.L * (12 * m.C**2 + 13 * m.C) + 2 * m.C
    return 6 * N * tokens + 12 * m.L * m.C * T * tokens



# ---------------------------------------------------------------------------------------------
# The report

def table(head, rows):
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)] + \
        ["| " + " | ".join(str(c) for c in row) + " |" for row in rows] + [""]


def paragraph(text):
    text = " ".join(text.split())
    return [textwrap.fill(text, 116, break_on_hyphens=False,
                          subsequent_indent="  " if text.startswith("- ") else ""), ""]


def ms(seconds):
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.1f}"


def gib(n):
    return f"{n / 2**30:.1f}"


def percents(shares):
    return " / ".join(f"{100 * s:.0f}" for s in shares) + "%"


INTRO = f"""
**Everything on this page is computed. Nothing of it has been measured on a GPU.** It says where several GPUs
can help and which flag to try, not how fast a machine is. dev/bench/scaling.py writes it.

A rank is a process with one GPU. A kernel takes the longer of two times, its FLOPs at
{100 * MATH["A100"]:.0f}% (A100) or {100 * MATH["H100"]:.0f}% (H100) of the peak and its bytes at
{100 * MEMORY:.0f}% of the memory's bandwidth, counted as ROOFLINE.md counts them, and {1e6 * LAUNCH:.0f} us
more. The peaks, NVLink's 900 GB/s (H100, both directions together) and InfiniBand's 400 Gb/s an adapter are
NVIDIA's data sheets'.

A collective takes a latency and its bytes over a bandwidth, as in NCCL's own cost model (its file
src/graph/tuning.cc). In a ring, n ranks send (n-1)/n of the bytes in n-1 hops, twice for an all-reduce. A
hop takes 0.5 to 3.4 us over NVLink and 2.7 to 9.6 us over the network, by NCCL's protocol. A tree takes
fewer hops, but only for an all-reduce. Large collectives reach {100 * WIRE:.0f}% of a link. Nodes have
{GPUS_PER_NODE} GPUs. Reductions inside switches (NVLS, SHARP) are left out; they would be faster.

Backward goes from the last block to the first. Each block's gradients are one collective, which begins when
they are there and the one before is over. While it runs it occupies {100 * TAKEN:.0f}% of the
multiprocessors, which slows the kernels of backward. The embeddings' come last, so that nothing hides them.
The parameters' all-gather after the update is not
hidden either. Then rank 0 exchanges a message with each rank over TCP: {1e6 * ROUND_TRIP:.0f} us for the
way, and {1e6 * MESSAGE:.0f} us of its CPU for each message. The percentages, the {1e6 * LAUNCH:.0f} us and
the costs of a message are assumptions.
"""


def section_published():
    k = Cluster("A100", 8, "8 adapters")
    small, _ = step_time(MODELS["124M"], 64, 1, 0, k)
    large, _ = step_time(MODELS["774M"], 16, 4, 1, k)
    xl, _ = step_time(MODELS["1.5B"], 16, 8, 1, Cluster("H100", 8, "8 adapters"))
    days = 150e9 / STEP * large / 86400
    share = flops_of(MODELS["1.5B"], 2 * STEP) / xl / 8 / roofline.GPUS["H100"][0]
    rows = [["8 x A100, 124M, 524,288 tokens a step", f"{ms(small)} ms", "about 300 ms (discussion 481)"],
            ["8 x A100, 774M, 150 G tokens", f"{days:.1f} days", "about 6 days (discussion 580)"],
            ["8 x H100, 1.5B, share of the peak", f"{100 * share:.0f}%", "about 50% (discussion 677)"]]
    out = ["## One node, against published figures", ""] + paragraph("""The published figures are llm.c's,
        from its discussions on GitHub. Its kernels are not Arapoet's, so that only the order of magnitude
        can agree. The shares of the peak that are assumed were chosen so that the first and the last row
        do; the second row is predicted with them.""")
    return out + table(["", "computed", "published"], rows), abs(small / 0.3 - 1)


def section_collectives():
    out = ["## What is sent", ""] + paragraph("""Bytes that a rank sends in a step of one micro-step, on
        64 ranks, and in parentheses the number of collectives. Stage 2 sends the blocks' gradients again
        in each further micro-step. Each part of the model is padded to a multiple of 8 elements a rank.
        `scaling.py --emulator` compares this, and the memory below, with the program in the emulator.""")
    rows = []
    for name, m in MODELS.items():
        p = parts(m, 64)
        row = [name] + [f"{p[part] * FP32 / 1e6:.1f} MB" for part in ("block", "embeddings")]
        steps = [step_collectives(m, 64, stage, 1) for stage in (0, 1, 2)]
        for calls in steps + [reductions(m, 64, 2, False)]:
            sent = sum(whole_bytes(c, 64) * (2 if c.op == "ncclAllReduce" else 1) * 63 / 64 for c in calls)
            row.append(f"{sent / 1e9:.2f} GB ({len(calls)})")
        rows.append(row)
    return out + table(["model", "a block's gradients", "the embeddings'", "stage 0", "stage 1", "stage 2",
                        "stage 2, a further micro-step"], rows)


def strong(name, network):
    """For 1 to 512 GPUs that share a step: sequences at once, micro-steps, and each stage's step_time()."""
    out = {}
    for n in [2**i for i in range(10)]:
        B = min(LARGEST_B[name], STEP // T // n)
        micro_steps = STEP // T // n // B
        out[n] = B, micro_steps, [step_time(MODELS[name], B, micro_steps, stage, Cluster("H100", n, network))
                                  for stage in (0, 1, 2)]
    return out


def efficiencies(runs):
    """Of the fastest stage: 1 where n GPUs are n times as fast as one."""
    best = {n: min(t for t, _ in times) for n, (_, _, times) in runs.items()}
    return {n: best[1] / n / t for n, t in best.items()}


def section_strong(runs):
    out = ["## The same step on more GPUs", ""] + paragraph("""524,288 tokens a step on H100s, with one
        InfiniBand adapter for each GPU. Sequences x micro-steps are a rank's. Then the ms of a step, by
        `--zero_stage`; the efficiency of the fastest, 100% where n GPUs are n times as fast as one; and
        of stage 1's ms: kernels other than the update's; the part of the gradients' reduction that is not
        hidden; the all-gather; the control messages. 1,024 GPUs would have less than a sequence each.""")
    for name, by_n in runs.items():
        rows, efficiency = [], efficiencies(by_n)
        for n, (B, micro_steps, times) in by_n.items():
            rows.append([n, f"{B} x {micro_steps}"] + [ms(t) for t, _ in times]
                        + [f"{100 * efficiency[n]:.0f}%"]
                        + [ms(times[1][1][what]) for what in ("compute", "reduce", "gather", "control")])
        head = ["GPUs", "sequences x micro-steps", "stage 0", "1", "2", "efficiency", "kernels", "reduction",
                "all-gather", "control"]
        out += [f"### {name}", ""] + table(head, rows)
    return out


def weak(name, n, network, micro_steps=1):
    """By stage: the time of a step on one GPU over that of n, which compute n times as many tokens."""
    m, B = MODELS[name], LARGEST_B[name]
    alone, _ = step_time(m, B, micro_steps, 0, Cluster("H100", 1, network))
    several = Cluster("H100", n, network)
    return [alone / step_time(m, B, micro_steps, stage, several)[0] for stage in (0, 1, 2)]


def section_weak():
    out = ["## A larger step on more GPUs", ""] + paragraph("""Each rank computes one micro-batch a step,
        so that the step grows with the number of GPUs. The time of a step on one GPU over that on n, for
        `--zero_stage` 0 / 1 / 2. It can exceed 100%, since stages 1 and 2 share the update.""")
    worlds = (8, 16, 64, 256, 1024)
    rows = [[f"{name}, -b {LARGEST_B[name]}", network] + [percents(weak(name, n, network)) for n in worlds]
            for name in MODELS for network in NETWORKS]
    rows.append(["tokens a step, 124M", ""] + [f"{n * 64 * T / 1e6:.1f} M" for n in worlds])
    out += table(["model", "a node's network", "8 GPUs", "16", "64", "256", "1,024"], rows)
    out += paragraph("""The same on 64 GPUs with one adapter a node, when a step accumulates more
        micro-batches (a larger `-d`):""")
    rows = [[name] + [percents(weak(name, 64, "1 adapter", n)) for n in (1, 2, 4, 8, 16)] for name in MODELS]
    return out + table(["model", "1 micro-step", "2", "4", "8", "16"], rows)


def section_breaks(runs):
    tiny = Collective("ncclReduceScatter", "float32", 1, "")
    near, far = [1e6 * collective_time(tiny, Cluster("H100", n, "8 adapters")) for n in (8, 1024)]
    m, slow = MODELS["124M"], Cluster("H100", 64, "1 adapter")
    one = kernel_times(m, 1, "H100")
    launches = sum(k.launches for k in roofline.arapoet(dict(L=m.L, NH=m.NH, C=m.C), 1, T)) * LAUNCH
    half = {name: next(n for n, e in efficiencies(r).items() if e < 0.5) for name, r in runs.items()}
    faster = ", ".join(f"{next(n for n, (_, _, t) in r.items() if n > 1 and t[0][0] < t[1][0])} GPUs ({name})"
                       for name, r in runs.items())
    few = " or ".join(str(n) for n in sorted(set(half.values())))
    xl = MODELS["1.5B"]
    sent = [sum(collective_time(c, slow) for c in reductions(xl, 64, stage, True)) for stage in (0, 1)]
    gathered = sum(collective_time(c, slow) for c in after_backward(xl, 64, 1))
    backward = backward_time(kernel_times(xl, LARGEST_B["1.5B"], "H100"), xl.L)
    texts = [
        f"""- **Too little work for a rank.** With the step fixed, the efficiency falls below a half at {few}
        GPUs. A micro-step of one sequence takes {ms(one.forward + backward_time(one, m.L))} ms with
        124M, of which {ms(launches)} ms are launches. What helps: a larger `-d`, or fewer GPUs.""",
        f"""- **Latency.** A reduce-scatter of a few bytes takes {near:.0f} us on 8 GPUs and {far:.0f} us on
        1,024, because a ring has a hop for each rank; and each block has its own collective. An all-reduce
        can take a tree: in the tables above, `--zero_stage 0` becomes faster than 1 at {faster}. What
        helps: `--zero_stage 0`, where the model fits.""",
        f"""- **Bandwidth.** With one adapter for 8 GPUs, on 64 GPUs, the reductions of 1.5B take
        {ms(sent[0])} ms in stage 0 and {ms(sent[1])} ms in stage 1, beside {ms(backward)} ms of backward
        with `-b {LARGEST_B["1.5B"]}`; and stage 1's all-gather takes {ms(gathered)} ms, which nothing
        hides. What helps: accumulating (`-d`), since stages 0 and 1 send only in a step's last micro-step.
        Stage 2 sends in each of them, so it gains less. Take it only where memory is short.""",
        f"""- **Control messages.** All go through rank 0: {ms(ROUND_TRIP + 2 * 1023 * MESSAGE)} ms a step
        on 1,024 ranks. What helps: a larger `-d`, which makes steps fewer and longer.""",
        """- **Too large a batch.** Steps of millions of tokens waste some of them. Brown et al. (2020)
        trained models of 125 M to 760 M parameters with 0.5 M tokens a step, and of 1.3 G with 1 M. By that
        measure the tables of the fixed step are what counts for these models."""]
    return ["## Where it breaks", ""] + [line for text in texts for line in paragraph(text)]


def section_memory():
    out = ["## Memory of a rank", ""] + paragraph(f"""GiB of parameters (bf16), gradients (fp32) and
        AdamW's state (fp32: two moments, master weights), without activations. Then the largest `-b` of
        1,024 tokens, a power of two up to 1,024, that fits on a card: with all activations kept / with
        `--recompute 3`. Of a card, {CUDA_AND_NCCL / 1e9:.1f} GB are left for CUDA and NCCL (assumed), and
        of the rest a 32nd, as the trainer leaves it. A dash: not even one sequence.""")
    rows = []
    for name, m in MODELS.items():
        for world, stage in ((1, 0), (4, 1), (4, 2), (64, 1), (64, 2)):
            need = memory(m, 1, T, 3, stage, world)
            state = [need[w] for w in ("parameters", "gradients", "AdamW")]
            row = [name, stage, world if stage else "any", gib(sum(state)), " + ".join(gib(s) for s in state)]
            for card in (24, 80, 141):
                fits = [largest_batch(m, card, recompute, stage, world) for recompute in (0, 3)]
                row.append(" / ".join(str(B or "-") for B in fits))
            rows.append(row)
    return out + table(["model", "stage", "ranks", "state", "parameters + gradients + AdamW", "24 GB",
                        "80 GB", "141 GB"], rows)


def report():
    for name, m in MODELS.items():
        need = sum(memory(m, LARGEST_B[name], T).values())
        if need > room(80):
            sys.exit(f"scaling.py: {name}: LARGEST_B needs {gib(need)} GiB, 80 GB have {gib(room(80))}")
    published, error = section_published()
    runs = {name: strong(name, "8 adapters") for name in MODELS}
    out = ["# Several GPUs: time and memory, computed", ""]
    for text in INTRO.strip().split("\n\n"):
        out += paragraph(text)
    out += published + section_collectives() + section_strong(runs) + section_weak() + section_breaks(runs)
    return "\n".join(out + section_memory()).rstrip() + "\n", error


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--check", action="store_true", help="compare with the committed files, and write nothing")
    p.add_argument("--counts", nargs="+", metavar="FILE", help="compare the emulator's counts of collectives")
    p.add_argument("--emulator", metavar="PROGRAM", help="compare its memory and its collectives")
    a = p.parse_args()
    if a.counts:
        check_counts(a.counts)
    if a.emulator:
        check_emulator(a.emulator)
    if a.counts or a.emulator:
        return
    path, (text, error) = os.path.join(HERE, "SCALING.md"), report()
    if error > 0.1:
        sys.exit(f"scaling.py: 8 x A100, 124M: {100 * error:.0f}% from the published step, at most 10% is "
                 "allowed")
    if not a.check:
        open(path, "w", encoding="utf-8").write(text)
        print(f"wrote {path}")
        return
    check_counts(sorted(glob.glob(os.path.join(HERE, "scaling-counts", "*.txt"))))
    if not os.path.exists(path) or open(path, encoding="utf-8").read() != text:
        sys.exit(f"scaling.py: {path} differs from what this script computes; run: dev/bench/scaling.py")
    print("dev/bench/SCALING.md matches what scaling.py computes")


if __name__ == "__main__":
    main()
