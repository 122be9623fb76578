"""kernels/device.cuh on real compilers: each wrapper compiles for every chip, to the instruction it stands for.

And each is used by a kernel.
"""

import re
from pathlib import Path

import pytest
from support.simt import nvrtc

needs_compiler = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

KERNELS = Path(__file__).parents[2] / "kernels"
DEVICE = (KERNELS / "device.cuh").read_text(encoding="utf-8")
CHIPS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

# (body of a kernel of `float* f, double* d, u32* u, u16* s`, instructions on sm_90)
WRAPPERS = [
    ("st16(f, ld16(f + 4));", r"LDG\.E\.128", r"STG\.E\.128"),
    ("st8(f, ld8(f + 2));", r"LDG\.E\.64", r"STG\.E\.64"),
    ("d[0] = ld_l2(d + 1);", r"LDG\.E\.64\.STRONG\.GPU"),
    ("prefetch(f + u[0]);", r"CCTL\.E\.PF2"),
    ("prefetch(f, u[0]);", r"UBLKPF\.L2"),
    ("XE_SHARED(uint4, x, 64); st16(x + u[0], ld16(f)); sync_block(); f[9] = x[u[1]].x;", r"STS\.128"),
    ("XE_SHARED(uint4, x, 64); x[u[0]].y = 1; sync_block(); st16(f, ld16(x + u[1]));", r"LDS\.128"),
    ("XE_SHARED(float, x, 64); x[u[0]] = 1; sync_block(); f[0] = x[u[1]];", r"STS ", r"LDS ", r"BAR\.SYNC"),
    ("f[0] = shfl(f[threadIdx.x], u[0]);", r"SHFL\.IDX"),
    ("f[0] = shfl_xor(f[threadIdx.x], 1);", r"SHFL\.BFLY"),
    ("u[0] = ballot(f[threadIdx.x] > 0);", r"VOTE\.ANY"),
    ("if (any_lane(f[threadIdx.x] > 0)) u[0] = 1;", r"VOTE\.ANY"),
    ("f[threadIdx.x] = 1; sync_warp(); u[0] = f[1];", r"STG"),
    ("if (any_thread(f[threadIdx.x] > 0)) u[0] = 1;", r"BAR\.RED\.OR"),
    ("f[0] = 1; fence_gpu(); u[0] = take_ticket(u + 1);", r"MEMBAR\.SC\.GPU|MEMBAR\.ALL\.GPU", r"ATOMG\.E\.ADD"),
    ("f[0] = exp2_fast(f[1]);", r"MUFU\.EX2"),
    ("f[0] = multiply_rounded(f[1], f[2]) + f[3];", r"FMUL", r"FADD"),
    ("d[0] = multiply_rounded(d[1], d[2]) + d[3];", r"DMUL", r"DADD"),
    ("f[0] = to_acc(f16_or_bf16<f16>(s[0]));", r"HADD2\.F32"),
    ("s[0] = from_acc(f[0], f16()).bits;", r"F2FP?\.F16"),
    ("s[0] = from_acc(f[0], bf16()).bits;", r"F2FP\.BF16"),
    ("u[0] = pack2(f[0], f[1], f16());", r"F2FP\.F16\.F32\.PACK_AB "),
    ("u[0] = pack2(f[0], f[1], bf16());", r"F2FP\.BF16\.F32\.PACK_AB "),
    ("u[0] = max2(u[0], u[1], f16());", r"HMNMX2 "),
    ("u[0] = max2(u[0], u[1], bf16());", r"HMNMX2\.BF16"),
    ("f[0] = log1p_acc(f[0]) + reciprocal(f[1]) + max_acc(f[2], f[3]) + exp_acc(f[4]);", r"FMNMX"),
    ("d[0] = log1p_acc(d[0]) + reciprocal(d[1]) + max_acc(d[2], d[3]) + exp_acc(d[4]);", r"DFMA"),
    ("f[threadIdx.x] = lanes_max<8>(f[threadIdx.x]) + lanes_sum<32>(f[32]);", r"SHFL\.BFLY"),
]
BARRIER = "XE_SHARED(u64, bar, 1); XE_SHARED(uint4, x, 64);\n"
CLUSTER_WRAPPERS = [  # sm_90 and above
    ("cluster_arrive(); cluster_wait(); u[0] = cluster_rank();", r"UCGABAR_ARV", r"UCGABAR_WAIT", r"MEMBAR"),
    (BARRIER + "mbar_init(bar, u[0]); mbar_init_fence();", r"SYNCS\.EXCH"),
    (BARRIER + "mbar_expect(bar, 64); mbar_wait(bar, u[0]);", r"SYNCS\.ARRIVE", r"SYNCS\.PHASECHK"),
    (BARRIER + "st_async16(x, u[0], ld16(f), bar); mbar_wait(bar, 0); u[3] = x[0].x;", r"STAS\.128"),
]


def kernels(wrappers, attribute=""):
    head = f'extern "C" __global__ void {attribute} k'
    parameters = "(float* f, double* d, u32* u, u16* s)"
    return DEVICE + "".join(f"{head}{i}{parameters} {{ {case[0]} }}\n" for i, case in enumerate(wrappers))


def without_comments(code):
    """C++ code without comments and string literals."""
    return re.sub(r'//[^\n]*|/\*.*?\*/|"[^"\n]*"', "", code, flags=re.DOTALL)


def called(code):
    return set(re.findall(r"\b(\w+)(?:<[^<>()]*>)?\(", code))


def test_every_wrapper_is_there_for_a_kernel():
    """By name: a kernel calls it, or a wrapper that a kernel calls does; macros may be used anywhere."""
    here = without_comments(DEVICE)
    kernels = [without_comments(file.read_text("utf-8")) for file in KERNELS.glob("*.cu*") if file.name != "device.cuh"]
    calls = {}  # by each wrapper, in all its overloads
    for form in re.split(r"(?<!#define )\bXE_DEVICE ", here)[1:]:
        head, _, body = form.partition("(")
        name = head.split()[-1].lstrip("*&")
        calls[name] = calls.get(name, set()) | called(body)
    assert len(calls) > 40
    assert {"ld16", "reciprocal", "mbar_wait", "lanes_sum", "max2"} <= set(calls)
    used, new = set(), called("\n".join(kernels))
    while new:
        used |= new
        new = set().union(*(calls[name] for name in used & set(calls))) - used
    assert set(calls) - used == set()
    elsewhere = re.sub(r"#define \w+", "", "\n".join([here, *kernels]))
    assert set(re.findall(r"#define (\w+)", here)) - set(re.findall(r"\w+", elsewhere)) == set()


@needs_compiler
@pytest.mark.parametrize("chip", CHIPS)
def test_every_wrapper_compiles(chip):
    both = kernels(WRAPPERS)
    if int(chip[3:]) >= 90:
        both += kernels(CLUSTER_WRAPPERS, "XE_CLUSTER(2)").removeprefix(DEVICE).replace(" k", " c")
    found = nvrtc.resources(both, chip)
    assert len(found) == len(WRAPPERS) + (len(CLUSTER_WRAPPERS) if int(chip[3:]) >= 90 else 0)


@needs_compiler
def test_every_wrapper_becomes_its_instruction():
    for wrappers, attribute in [(WRAPPERS, ""), (CLUSTER_WRAPPERS, "XE_CLUSTER(2)")]:
        machine_code = nvrtc.disassembly(nvrtc.cubin(kernels(wrappers, attribute), "sm_90")[0])
        for i, (does, *instructions) in enumerate(wrappers):
            for instruction in instructions:
                assert re.search(rf"\b({instruction})", machine_code[f"k{i}"] + " "), (does, instruction)


@needs_compiler
def test_resources_are_read_from_log_and_machine_code():
    text = """
extern "C" __global__ void wide(const float* x, float* y) {
    XE_SHARED(double, held, 100);
    held[threadIdx.x] = x[1001 + threadIdx.x];
    sync_block();
    uint4 v[3];
    #pragma unroll
    for (int j = 0; j < 3; ++j) v[j] = ld16(x + 128 * j);
    #pragma unroll
    for (int j = 0; j < 2; ++j) st16(y + 128 * j, v[j]);
    y[1001] = held[(v[2].x + v[2].y + v[2].z + v[2].w) & 63];
}
extern "C" __global__ void __launch_bounds__(1024, 2) spills(const double* x, double* y) {
    double v[40];
    #pragma unroll
    for (int j = 0; j < 40; ++j) v[j] = x[32 * j];
    sync_block();
    #pragma unroll
    for (int j = 0; j < 40; ++j) y[32 * j] = v[j] + v[39 - j];
}
"""
    spills, wide = nvrtc.resources(DEVICE + text, "sm_90")
    assert (spills.kernel, wide.kernel) == ("spills", "wide")
    assert (wide.loads128, wide.stores128, wide.shared, wide.spill_stores) == (3, 2, 800, 0)
    assert 16 < wide.registers < 64
    assert spills.registers <= 32
    assert spills.spill_stores > 100
    assert spills.spill_loads > 100
    assert spills.stack > 100


CODE = """
.text.k:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   MUFU.EX2 R5, R4 ;
.L_x_1:
        /*0030*/                   LDS.U16 R6, [R7] ;
        /*0040*/                   LDS.U16 R6, [R7+0x80] ;
        /*0050*/                   STS [R7], R6 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   BRA.DIV UR4, `(.L_x_3) ;
.L_x_2:
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0090*/               @P1 BRA `(.L_x_0) ;
        /*00a0*/               @P2 EXIT ;
.L_x_4:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0], R1 ;
        /*00c0*/              @!P0 BRA `(.L_x_4) ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   MUFU.RCP R5, R4 ;
        /*00f0*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*0100*/                   BRA `(.L_x_5);
        /*0110*/                   NOP;
"""


def test_instructions_are_counted_and_those_of_loops_apart():
    """A nested loop, rare code that branches back, a wait for a barrier, an unreachable end, padding."""
    assert nvrtc.counted(CODE) == {
        "loads128": 1,
        "stores128": 0,
        "once": 1,
        "instructions": 17,
        "mufu": 2,
        "loops": [[7, 2, 16, 16], [4, 0, 4, 0], [2, 0, 0, 0]],
        "executed": [16, 2, [[7, 2, 16, 16], [4, 0, 4, 0], [2, 0, 0, 0]]],
    }
    # Behind the mark: the code at the end. Where it branches back to is reached on another path.
    marked = CODE.replace(
        "/*00e0*/                   MUFU", "/*00d8*/      PMTRIG 0x80 ;\n /*00e0*/                   MUFU"
    )
    assert nvrtc.counted(marked)["executed"] == [14, 1, [[5, 1, 16, 16], [4, 0, 4, 0], [2, 0, 0, 0]]]
    # Everything after the mark, and the path that leads only there; what a predicate turns off is executed.
    for mark, instructions in (("      ", 7), ("@P3   ", 17)):
        marked = CODE.replace("/*0080*/  ", f"/*0078*/ {mark} PMTRIG 0x80 ;\n /*0080*/  ")
        assert nvrtc.counted(marked)["executed"][0] == instructions, mark


@needs_compiler
def test_what_a_kernel_does_is_counted():
    text = """
extern "C" __global__ void flat(const float* x, float* y) {
    #pragma unroll
    for (int j = 0; j < 7; ++j) y[j * 32 + threadIdx.x] = exp2_fast(x[j * 32 + threadIdx.x]);
}
extern "C" __global__ void loops(const float* x, float* y, int n) {
    float sum = 0;
    #pragma unroll 1
    for (int k = threadIdx.x; k < n; k += 64) sum += exp2_fast(x[k]) + exp2_fast(x[k + 32]);
    y[threadIdx.x] = sum;
}
extern "C" __global__ void divides(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x] / y[threadIdx.x]; }
"""
    divides, flat, loops = nvrtc.resources(DEVICE + text, "sm_90")
    assert (flat.mufu, flat.loops) == (7, [])
    ((instructions, mufu, moved, widest),) = loops.loops
    assert (mufu, moved, widest) == (2, 8, 4)
    assert 8 <= instructions < loops.instructions
    assert loops.mufu == 2
    assert divides.instructions > 60, "the function that divides subnormal numbers is part of the text"
    one, *_ = nvrtc.resources(DEVICE + text, "sm_90", disassembled=False)
    assert (one.registers, one.loads128, one.loops) == (divides.registers, None, None)


@needs_compiler
def test_what_a_usual_warp_executes_is_counted():
    """With its rare paths marked, a kernel has the executed counts of one that lacks them."""
    text = """
extern "C" __global__ void NAME(const float* x, float* y, const float* w, int n, long long rows) {
    float v = x[threadIdx.x];
    if (NO_OPTIONS && w) {
        rare_path();
        for (int k = 0; k < n; ++k) v += exp2_fast(w[k] * v);
    } else if (NO_OPTIONS && rows < 0) {
        rare_path();
        v = static_cast<float>(rows / n);
    }
    y[threadIdx.x] = exp2_fast(v);
    if (NO_OPTIONS && n > 5) {
        rare_path();
        y[threadIdx.x + n] = v / (n + y[n]);
        return;
    }
    y[threadIdx.x + 32] = exp2_fast(-v);
}
"""
    marked, straight = (
        nvrtc.resources(DEVICE + text.replace("NAME", "k").replace("NO_OPTIONS", condition), "sm_90")[0]
        for condition in ("true", "false")
    )
    assert straight.executed == [straight.instructions - 1, 2, []]  # without the branch to itself at the end
    instructions, mufu, loops = marked.executed
    assert (mufu, loops) == (2, [])
    assert marked.instructions > 5 * straight.instructions
    assert len(marked.loops) >= 1
    assert straight.executed[0] < instructions <= straight.executed[0] + 16  # three conditions


@needs_compiler
def test_the_table_tells_what_changed(tmp_path):
    rows = nvrtc.table([("one", kernels(WRAPPERS[:1]), "sm_80"), ("two", kernels(WRAPPERS[1:2]), "sm_90")])
    assert [(row["file"], row["kernel"], row["loads128"]) for row in rows] == [("one", "k0", 1), ("two", "k0", 0)]
    nvrtc.write(tmp_path / "table.json", {"nvrtc": "13.5"}, rows)
    assert nvrtc.read(tmp_path / "table.json") == ({"nvrtc": "13.5"}, rows)
    assert nvrtc.differences(rows, rows) == []
    other = [{**rows[0], "registers": 99}]
    assert nvrtc.differences(rows, other) == [
        "two k0 sm_90: only in the old table",
        f"one k0 sm_80: registers {rows[0]['registers']} → 99",
    ]
