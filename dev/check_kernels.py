#!/usr/bin/env python3
"""What nvcc made of the kernels of train_gpt2.cu, without a GPU: make check-kernels

Compiles for sm_80, 86, 89, 90, 100 and 120, as far as nvcc knows them, and prints a table for each:
registers, spilled bytes, shared memory, the most threads of a block, and the numbers of tensor-core (HMMA),
ldmatrix (LDSM), asynchronous-copy (LDGSTS) and 16-byte load and store instructions. Fails when a kernel
spills, when registers x threads exceed the 65,536 of an SM, or when a kernel whose name contains "attention"
and whose numbers are bf16 has no HMMA.

Registers, spills and shared memory are those that ptxas -v reports. The instructions are counted in the
cubin, an ELF file: 16 bytes each, the opcode in the low 12 bits, the width of a memory access in bits 73 to
75. That encoding is not documented. So instructions are first counted in a small kernel whose instructions
are known; where that count is wrong, a message says so and the table has question marks.
"""
import argparse, collections, os, re, struct, subprocess, sys, tempfile

OPCODES = {0x23C: "HMMA", 0x83B: "LDSM", 0xFAE: "LDGSTS", 0x381: "LDG", 0x981: "LDG", 0x386: "STG",
           0x986: "STG"}
REGISTERS_OF_AN_SM = 65536
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

CHECK_KERNEL = r"""
#include <cstdint>
extern "C" __global__ void check(float4* y, const float4* x, const uint32_t* a) {
    __shared__ __align__(16) uint32_t s[128];
    uint32_t to = (uint32_t)__cvta_generic_to_shared(s + 4 * threadIdx.x), r0, r1, r2, r3;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\ncp.async.wait_all;\n" ::"r"(to),
                 "l"(a + 4 * threadIdx.x) : "memory");
    __syncthreads();
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(to));
    float4 c = x[threadIdx.x];
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
                 : "r"(r0), "r"(r1), "r"(r2), "r"(r3), "r"(r0), "r"(r1));
    y[threadIdx.x] = c;
}
"""
CHECK_COUNTS = {"HMMA": 1, "LDSM": 1, "LDGSTS": 1, "LDG.128": 1, "STG.128": 1}


def compile_cubin(nvcc, source, arch, flags, out):
    """Compiles to a cubin; returns ptxas's report, {mangled name: numbers}."""
    command = [nvcc, "-cubin", "-arch=" + arch, "-Xptxas", "-v", *flags, source, "-o", out]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"check_kernels.py: {source}: nvcc failed for {arch}:\n{run.stderr}")
    kernels, name = {}, None
    for line in run.stderr.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)'", line):
            name = m[1]
            kernels[name] = dict(registers=0, spilled=0, shared=0)
        elif name and (m := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            kernels[name]["spilled"] += int(m[1]) + int(m[2])
        elif name and (m := re.search(r"Used (\d+) registers", line)):
            kernels[name]["registers"] = int(m[1])
            if m := re.search(r"(\d+) bytes smem", line):
                kernels[name]["shared"] = int(m[1])
    return kernels


def sections(path):
    """The sections of a 64-bit little-endian ELF file, {name: bytes}."""
    data = open(path, "rb").read()
    at, size, count, names = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, at + i * size) for i in range(count)]
    strings = data[headers[names][4]:headers[names][4] + headers[names][5]]
    name = lambda h: strings[h[0]:strings.index(b"\0", h[0])].decode()
    return {name(h): data[h[4]:h[4] + h[5]] for h in headers if h[1] != 8}


def count_instructions(code):
    counts = collections.Counter()
    for low, high in struct.iter_unpack("<QQ", code[:len(code) // 16 * 16]):
        if name := OPCODES.get(low & 0xFFF):
            counts[name] += 1
            if name in ("LDG", "STG") and high >> 9 & 7 == 6:
                counts[name + ".128"] += 1
    return counts


def max_threads(info):
    """EIATTR_MAX_THREADS of a kernel's .nv.info section: what __launch_bounds__ promised; 1024 without."""
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        if form == 4:
            if attribute == 0x05:
                x, y, z = struct.unpack_from("<III", info, at + 4)
                return x * y * z
            at += 4 + size
        else:
            at += 4
    return 1024


def demangle(names):
    try:
        run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    except FileNotFoundError:
        return dict(zip(names, names))
    noise, arguments = r"\(anonymous namespace\)::|\bgpu::|^void ", r"\((?!anonymous).*$"
    return dict(zip(names, [re.sub(noise, "", re.sub(arguments, "", s)) for s in run.stdout.splitlines()]))


COLUMNS = ("HMMA", "LDSM", "LDGSTS", "LDG.128", "STG.128")
ROW = "%-36s %9s %8s %7s %7s" + " %7s" * len(COLUMNS)


def counts_are_right(nvcc, arch, tmp):
    """Whether the instructions of the check kernel are counted as they should be."""
    source, cubin = os.path.join(tmp, "check.cu"), os.path.join(tmp, "check.cubin")
    with open(source, "w") as f:
        f.write(CHECK_KERNEL)
    compile_cubin(nvcc, source, arch, [], cubin)
    got = count_instructions(sections(cubin)[".text.check"])
    right = all(got[k] == n for k, n in CHECK_COUNTS.items())
    if not right:
        print(f"{arch}: instructions not counted: the check kernel shows {dict(got)}, wanted {CHECK_COUNTS}")
    return right


def check(a, arch, tmp):
    """Prints the table of one architecture; returns what is wrong, a line each."""
    flags, faults = a.flags.split() + (["-DPRECISION_FP32"] if a.fp32 else []), []
    counted = counts_are_right(a.nvcc, arch, tmp)
    cubin = os.path.join(tmp, arch + ".cubin")
    kernels = compile_cubin(a.nvcc, a.source, arch, flags, cubin)
    parts, names = sections(cubin), demangle(kernels)
    print("\n" + ROW % (arch, "registers", "spilled", "shared", "threads", *COLUMNS))
    for k in sorted(kernels, key=names.get):
        v, n, name = kernels[k], count_instructions(parts.get(".text." + k, b"")), names[k]
        threads = max_threads(parts.get(".nv.info." + k, b""))
        columns = [n[c] if counted else "?" for c in COLUMNS]
        print(ROW % (name, v["registers"], v["spilled"], v["shared"], threads, *columns))
        if v["spilled"]:
            faults.append(f"{arch}: {name} spills {v['spilled']} bytes")
        if v["registers"] * threads > REGISTERS_OF_AN_SM:
            faults.append(f"{arch}: {name} needs {v['registers']} registers x {threads} threads, "
                          f"an SM has {REGISTERS_OF_AN_SM}")
        if counted and not a.fp32 and re.search(r"attention_(forward|backward)", name) and not n["HMMA"]:
            faults.append(f"{arch}: {name} uses no tensor cores")
    return faults


def known_archs(nvcc):
    """Those of ARCHS that nvcc knows; names the others."""
    run = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    known = [a for a in ARCHS if a in run.stdout.split()]
    if unknown := [a for a in ARCHS if a not in known]:
        print(f"not checked, because {nvcc} does not know them: {', '.join(unknown)}")
    if not known:
        sys.exit(f"check_kernels.py: {nvcc} --list-gpu-code names none of {', '.join(ARCHS)}; "
                 "install the CUDA Toolkit, 12 or later")
    return known


def main():
    summary, details = __doc__.split("\n\n", 1)
    p = argparse.ArgumentParser(description=summary, epilog=details,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", nargs="?", default="train_gpt2.cu")
    p.add_argument("--nvcc", default="nvcc")
    p.add_argument("--arch", help=f"comma-separated [those of {','.join(ARCHS)} that nvcc knows]")
    p.add_argument("--flags", default="-std=c++17 -O3 -I.", help="for nvcc [%(default)s]")
    p.add_argument("--fp32", action="store_true",
                   help="the fp32 build, in which attention uses no tensor cores")
    a = p.parse_args()
    archs = a.arch.split(",") if a.arch else known_archs(a.nvcc)
    with tempfile.TemporaryDirectory() as tmp:
        faults = [f for arch in archs for f in check(a, arch, tmp)]
    print()
    for f in faults:
        print("check_kernels.py: " + f, file=sys.stderr)
    if not faults:
        print("no spills, registers within an SM" + ("" if a.fp32 else ", tensor cores in attention"))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
