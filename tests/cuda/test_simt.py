"""The emulation, tested on kernels of its own: correct ones pass in every order, each kind of mistake is caught."""

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support import simt, tally
from support.process import TESTS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")

DEVICE = (Path(__file__).parents[2] / "kernels" / "device.cuh").read_text(encoding="utf-8")
ORDERS = simt.build.ORDERS

# ------------------------------------------------------------------------------------------------------ correct kernels
# name: (the kernel, its arguments and results). Every mistake below is one of these with a patch.

KERNELS = {}


def kernel(text, **launch):
    """Registers a kernel, under the name of the function that makes (arguments, {index: wanted}) for it."""

    def register(case):
        KERNELS[case.__name__] = text, launch, case
        return case

    return register


def run(name, mode, order="fifo", seed=0, patches=()):
    """Launch a kernel, with bugs planted; assert its results."""
    text, launch, case = KERNELS[name]
    for old, new in patches:
        text = simt.patch(text, old, new)
    args, wanted = case()
    simt.compile(DEVICE + text, [name], mode).launch(name, args=args, order=order, seed=seed, **launch)
    for index, value in wanted.items():
        np.testing.assert_array_equal(args[index], value)


@kernel(
    """
extern "C" __global__ void block_sum(const int* x, i64 n, int* out) {
    XE_SHARED(int, parts, 8);
    for (int round = 0; round < 2; ++round) {
        int s = round;
        for (i64 i = threadIdx.x; i < n; i += blockDim.x) s += x[i];
        s = lanes_sum<32>(s);
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = s;
        sync_block();  // written
        s = 0;
        for (u32 w = 0; w < blockDim.x / 32; ++w) s += parts[w];
        sync_block();  // read
        if (threadIdx.x == 0) out[blockIdx.x + gridDim.x * round] = s;
    }
}
""",
    grid=3,
    block=256,
)
def block_sum():
    x = np.arange(1000, dtype=np.int32)
    x.flags.writeable = False
    return [x, 1000, simt.empty(6, np.int32)], {2: np.repeat([x.sum(), x.sum() + 256], 3)}


@kernel(
    """
extern "C" __global__ void lanes(u32* out) {
    const int lane = threadIdx.x % 32;
    u32* mine = out + threadIdx.x * 6;
    mine[0] = shfl(lane * 10, 5);
    mine[1] = shfl(lane * 10, (lane + 1) % 32);
    mine[2] = shfl_xor(lane, 9);
    mine[3] = ballot(lane % 3 == 0);
    mine[4] = any_lane(threadIdx.x == 40);
    mine[5] = static_cast<u32>(shfl_xor(1ll << lane, 31) >> 3);
}
""",
    grid=1,
    block=64,
)
def lanes():
    lane = np.arange(64) % 32
    columns = [
        np.full(64, 50),
        (lane + 1) % 32 * 10,
        lane ^ 9,
        np.full(64, sum(1 << i for i in range(0, 32, 3))),
        np.arange(64) // 32 == 1,
        (1 << (31 - lane)) >> 3,
    ]
    return [simt.empty((64, 6), np.uint32)], {0: np.stack(columns, 1)}


@kernel(
    """
extern "C" __global__ void reversed(float* x, i64 vectors) {  // in place, by way of shared memory
    XE_SHARED(uint4, tile, 100);
    for (i64 i = threadIdx.x; i < vectors; i += blockDim.x) st16(&tile[i], ld16(x + 4 * i));
    const bool last = any_thread(threadIdx.x == 31);
    for (i64 i = threadIdx.x; i < vectors; i += blockDim.x) st16(x + 4 * i, ld16(&tile[vectors - 1 - i]));
    if (!last) x[0] = -1;
}
""",
    grid=1,
    block=64,
)
def reversed():
    x = np.arange(400, dtype=np.float32)
    return [x, 100], {0: x.reshape(100, 4)[::-1].reshape(-1).copy()}


@kernel(
    """
extern "C" __global__ void neighbours(int* out) {  // lanes meet in memory
    XE_SHARED(int, shared, 32);
    shared[threadIdx.x] = threadIdx.x;
    sync_warp();
    out[threadIdx.x] = shared[31 - threadIdx.x];
}
""",
    grid=1,
    block=32,
)
def neighbours():
    return [simt.empty(32, np.int32)], {0: np.arange(32)[::-1]}


@kernel(
    """
extern "C" __global__ void one_byte_each(bool* out) {
    out[threadIdx.x] = threadIdx.x % 3 == 0;
}
""",
    grid=1,
    block=64,
)
def one_byte_each():
    return [simt.empty(64, np.bool_)], {0: np.arange(64) % 3 == 0}


@kernel(
    """
extern "C" __global__ void two_bytes_each(const f16* x, bf16* y) {
    XE_SHARED(bf16, held, 64);
    held[threadIdx.x] = y[threadIdx.x];
    sync_block();
    y[threadIdx.x] = from_acc(to_acc(held[63 - threadIdx.x]) + to_acc(x[threadIdx.x]), bf16());
}
""",
    grid=1,
    block=64,
)
def two_bytes_each():
    x, y = np.arange(64, dtype=np.float16), np.arange(64).astype(ml_dtypes.bfloat16)
    return [x, y], {1: np.full(64, 63)}


@kernel(
    """
extern "C" __global__ void last_block(double* parts, u32* ticket, double* out) {
    XE_SHARED(u32, taken, 1);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = blockIdx.x + 1;
        fence_gpu();
        taken[0] = take_ticket(ticket);
    }
    sync_block();
    if (taken[0] != gridDim.x - 1) return;
    double sum = 0;
    for (u32 i = threadIdx.x; i < gridDim.x; i += blockDim.x) sum += ld_l2(parts + i);
    sum = lanes_sum<32>(sum);
    if (threadIdx.x == 0) out[0] = sum;
}
""",
    grid=50,
    block=32,
)
def last_block():
    return [simt.empty(50), np.zeros(1, np.uint32), simt.empty(1)], {2: [1275.0]}


@kernel(
    """
extern "C" __global__ void cluster_sum(const int* x, int* out, i64 rounds) {  // all blocks of a cluster tell all
    XE_SHARED(uint4, inbox, 2 * 4);
    XE_SHARED(u64, arrived, 2);
    const int rank = cluster_rank();
    if (threadIdx.x == 0) {
        mbar_init(&arrived[0], 1);
        mbar_init(&arrived[1], 1);
        mbar_init_fence();
    }
    cluster_arrive();
    cluster_wait();
    for (int round = 0; round < rounds; ++round) {
        const int stage = round % 2;
        const int s = lanes_sum<32>(x[(round * gridDim.x + blockIdx.x) * 32 + threadIdx.x]);
        if (threadIdx.x == 0) mbar_expect(&arrived[stage], 4 * 16);
        const uint4 says = make_uint4(s, rank, round, 0);
        if (threadIdx.x < 4) st_async16(&inbox[stage * 4 + rank], threadIdx.x, says, &arrived[stage]);
        mbar_wait(&arrived[stage], round / 2 % 2);
        int sum = 0;
        for (int r = 0; r < 4; ++r) sum += inbox[stage * 4 + r].x;
        sync_warp();  // everyone has read
        if (threadIdx.x == 0) out[round * gridDim.x + blockIdx.x] = sum;
    }
}
""",
    grid=8,
    block=32,
    cluster=4,
)
def cluster_sum():
    x = np.random.default_rng(0).integers(-99, 99, (7, 2, 4, 32), dtype=np.int32)
    return [x, simt.empty((7, 8), np.int32), 7], {1: np.repeat(x.sum((2, 3)), 4, axis=1)}


@kernel(
    """
extern "C" __global__ void scaled(const float* x, int ld, float* y, double by, bool twice) {
    float held[4];
    for (int i = 0; i < 4; ++i) held[i] = x[ld * i + threadIdx.x];
    for (int i = 0; i < 4; ++i) y[ld * i + threadIdx.x] = held[i] * static_cast<float>(by) * (twice ? 2 : 1);
}
""",
    grid=1,
    block=32,
)
def scaled():
    x = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    return [x, np.int32(32), simt.empty(x.shape, np.float32), 0.25, True], {2: 0.5 * x}


@pytest.mark.full(but_one_per="name")
@pytest.mark.parametrize("mode", ["plain", "check"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_right_kernel_passes_in_every_order(name, mode):
    for order in ORDERS:
        for seed in range(5):
            run(name, mode, order, seed)


# ------------------------------------------------------------------------------------------------------------- mistakes

# kernel, mistake, the kinds that may be reported (the order decides which comes first), and (old, new) of each patch.
# fmt: off
MISTAKES = [
    ("block_sum", "no barrier before the read", "race uninitialised",
     ("sync_block();  // written", "")),
    ("block_sum", "no barrier before the next write", "race",
     ("sync_block();  // read", "")),
    ("block_sum", "a barrier that one warp does not reach", "barrier deadlock race",
     ("sync_block();  // read", "if (threadIdx.x >= 32) sync_block();")),
    ("block_sum", "two barriers for one", "barrier",
     ("sync_block();  // read", "if (threadIdx.x < 32) sync_block();\nelse sync_block();")),
    ("block_sum", "return before a barrier", "barrier divergence race",
     ("int s = round;", "if (threadIdx.x == 255 && round) return; int s = round;")),
    ("block_sum", "shuffle in a branch", "divergence deadlock",
     ("s = lanes_sum<32>(s);", "if (threadIdx.x % 32 < 31) s = lanes_sum<32>(s);")),
    ("block_sum", "read past the end", "bounds",
     ("i < n;", "i <= n;")),
    ("block_sum", "shared array too small", "bounds",
     ("parts, 8", "parts, 7")),
    ("block_sum", "more shared memory than a block can declare", "shared",
     ("parts, 8", "parts, 12 * 1024 + 1")),
    ("block_sum", "write to the input", "bounds",
     ("out[blockIdx.x +", "const_cast<int*>(x)[blockIdx.x +")),
    ("block_sum", "all threads write the same", "race",
     ("if (threadIdx.x == 0) out", "out")),
    ("block_sum", "output read before it is written", "uninitialised race",
     ("int s = round;", "int s = out[0];")),
    ("lanes", "lanes in different shuffles", "divergence",
     ("mine[2] = shfl_xor(lane, 9);",
      "if (lane < 16) mine[2] = shfl_xor(lane, 9);\nelse mine[2] = shfl_xor(lane, 9);")),
    ("lanes", "write past the end", "bounds",
     ("threadIdx.x * 6", "threadIdx.x * 6 + 6")),
    ("reversed", "no barrier between load and use", "race uninitialised",
     ("any_thread(threadIdx.x == 31)", "true")),
    ("reversed", "misaligned vector", "misaligned",
     ("ld16(x + 4 * i)", "ld16(x + 4 * i + 1)")),
    ("reversed", "misaligned scalar", "misaligned",
     ("x[0] = -1;", ""),
     ("if (!last)", "*reinterpret_cast<float*>(reinterpret_cast<char*>(x) + 2) = 1;")),
    ("reversed", "vector past the end", "bounds race",
     ("i += blockDim.x) st16(x + 4 * i", "i += blockDim.x) st16(x + 4 * (i + 1)")),
    ("neighbours", "no barrier between lanes", "race uninitialised",
     ("sync_warp();", "")),
    ("two_bytes_each", "no barrier between store and load", "race uninitialised",
     ("sync_block();", "")),
    ("two_bytes_each", "an argument from past the end", "bounds",
     ("to_acc(x[threadIdx.x])", "to_acc(x[threadIdx.x + 1])")),
    ("two_bytes_each", "a result past the end", "bounds",
     ("y[threadIdx.x] = from", "y[threadIdx.x + 1] = from")),
    ("two_bytes_each", "misaligned", "misaligned",
     ("y[threadIdx.x] = from", "reinterpret_cast<bf16*>(reinterpret_cast<char*>(y) + 1)[threadIdx.x / 2] = from")),
    ("last_block", "no fence before the ticket", "race",
     ("fence_gpu();", "")),
    ("last_block", "fence before the write", "race",
     ("parts[blockIdx.x] = blockIdx.x + 1;", ""),
     ("fence_gpu();", "fence_gpu(); parts[blockIdx.x] = blockIdx.x + 1;")),
    ("last_block", "read through L1", "l1",
     ("ld_l2(parts + i)", "parts[i]")),
    ("last_block", "no barrier after the ticket", "race uninitialised",
     ("sync_block();", "")),
    ("last_block", "wrong block is the last", "uninitialised",
     ("gridDim.x - 1", "gridDim.x / 2")),
    ("cluster_sum", "no wait for the messages", "race uninitialised mbarrier",
     ("mbar_wait(&arrived[stage], round / 2 % 2);", "")),
    ("cluster_sum", "wait for the other phase", "race uninitialised deadlock mbarrier",
     ("round / 2 % 2);", "1 - round / 2 % 2);")),
    ("cluster_sum", "no second stage", "race",
     ("const int stage = round % 2", "const int stage = 0"),
     ("round / 2 % 2);", "round % 2);"),
     ("sync_warp();  // everyone has read", "")),
    ("cluster_sum", "too few bytes expected", "race uninitialised deadlock mbarrier cluster",
     ("4 * 16);", "3 * 16);")),
    ("cluster_sum", "too many bytes expected", "deadlock",
     ("4 * 16);", "5 * 16);")),
    ("cluster_sum", "more arrivals than counted", "mbarrier",
     ("if (threadIdx.x == 0) mbar_expect", "mbar_expect")),
    ("cluster_sum", "barrier not initialised", "mbarrier",
     ("mbar_init(&arrived[1], 1);", "")),
    ("cluster_sum", "message before the first cluster barrier", "cluster mbarrier",
     ("cluster_arrive();\n    cluster_wait();\n    for", "sync_block();\n    for")),
    ("cluster_sum", "arrive without wait", "cluster mbarrier",
     ("cluster_wait();\n    for", "for")),
    ("cluster_sum", "a block that is not there", "cluster",
     ("(&inbox[stage * 4 + rank], threadIdx.x,", "(&inbox[stage * 4 + rank], threadIdx.x + 1,")),
    ("cluster_sum", "message past the inbox", "bounds",
     ("inbox[stage * 4 + rank]", "inbox[stage * 8 + rank]")),
    ("cluster_sum", "misaligned message", "misaligned",
     ("&inbox[stage * 4 + rank]", "&inbox[stage * 4 + rank].z")),
    ("scaled", "local array too small", "ubsan",
     ("held[4]", "held[3]")),
    ("scaled", "offset in 32 bits", "ubsan",
     ("y[ld * i +", "y[(ld + 2147483647) * i +")),
]
# fmt: on


@pytest.mark.full
@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: f"{case[0]}: {case[1]}")
def test_the_checker_catches_in_every_order(case):
    name, _, kinds, *patches = case
    tally.COUNTS["mistakes"] += 1
    for order in ORDERS:
        with pytest.raises(simt.SimtError) as caught:
            run(name, "check", order, patches=patches)
        assert caught.value.kind in kinds.split(), caught.value
    tally.COUNTS["mistakes caught"] += 1


# Mistakes that show in values, or that the machine rejects, without the checker: in some order, not in every one.
# fmt: off
EXPOSED = [
    ("block_sum", ("sync_block();  // written", "")),
    ("block_sum", ("sync_block();  // read", "")),
    ("reversed", ("any_thread(threadIdx.x == 31)", "true")),
    ("neighbours", ("sync_warp();", "")),
    ("cluster_sum", ("mbar_wait(&arrived[stage], round / 2 % 2);", "")),
    ("cluster_sum", ("const int stage = round % 2", "const int stage = 0"), ("round / 2 % 2);", "round % 2);")),
    ("scaled", ("x[ld * i", "x[(1ll << 40) + ld * i")),
]
# fmt: on


@pytest.mark.parametrize("case", EXPOSED, ids=lambda case: f"{case[0]}: {case[1][0]}")
def test_the_schedulers_expose(case):
    name, *patches = case
    failures = 0
    for order in ORDERS:
        for seed in range(10):
            try:
                run(name, "plain", order, seed, patches)
            except (AssertionError, simt.SimtError):
                failures += 1
    assert failures


def test_a_local_that_is_never_written():
    with pytest.raises(simt.SimtError, match="uninitialised"):
        run("block_sum", "plain", patches=[("int s = round;", "int s;")])
    with pytest.raises(AssertionError):  # by its value, NaN
        run("scaled", "check", patches=[("held[i] = x[", "if (i) held[i] = x[")])


def test_orders_differ_and_follow_from_the_seed():
    text = """
extern "C" __global__ void who(u32* n, int* order) {
    for (int turn = 0; turn < 2; ++turn) { order[take_ticket(n)] = threadIdx.x + 1000 * blockIdx.x; sync_warp(); }
}
"""
    library = simt.compile(DEVICE + text, ["who"])

    def trace(order, seed=0):
        seen = np.zeros(2 * 2 * 64, np.int32)
        library.launch("who", 2, 64, [np.zeros(1, np.uint32), seen], order=order, seed=seed)
        assert sorted(seen) == sorted([*range(64), *range(1000, 1064)] * 2)
        return tuple(seen)

    assert trace("fifo")[:32] == tuple(range(32))
    assert trace("lifo")[:32] == tuple(range(1063, 1031, -1))
    assert len({trace(order, seed) for order in ORDERS for seed in range(5)}) == 2 + 5 + 5
    assert trace("random", 3) == trace("random", 3)
    assert trace("priority", 3) == trace("priority", 3)


def test_a_report_names_thread_and_line():
    race = r"(?s)race: thread 0 of block \(0, 0, 0\) writes .*, which thread 255 of block 0 reads;.*line \d+: .*parts\["
    with pytest.raises(simt.SimtError, match=race):
        run("block_sum", "check", patches=[("sync_block();  // read", "")])
    with pytest.raises(simt.SimtError, match=r"(?s)deadlock: .* 128 threads .* in mbar_wait, line \d+"):
        run("cluster_sum", "check", patches=[("4 * 16);", "5 * 16);")])
    run("cluster_sum", "check")  # and the next launch is unaffected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([None, 1, None, 0.5, True], "argument 1 is i8, not i4"),
        ([None, np.int32(1), None, np.float32(0.5), True], "argument 3 is f4, not f8"),
        ([None, np.int32(1), None, 0.5, 1], "argument 4 is i8, not b1"),
        ([None, np.int32(1), 7, 0.5, True], "argument 2 is i8, not p8"),
        ([None, np.int32(1), None, 0.5], "their number"),
    ],
)
def test_arguments_must_be_of_the_kind_that_the_kernel_takes(args, message):
    library = simt.compile(DEVICE + KERNELS["scaled"][0], ["scaled"])
    assert library.parameters("scaled") == ["p8", "i4", "p8", "f8", "b1"]
    with pytest.raises(TypeError, match=message):
        library.launch("scaled", 1, 32, args)


def test_a_struct_by_value_and_what_its_pointers_lead_to():
    text = """
struct Of { const float* x; double by; float* y; };
extern "C" __global__ void multiplied(const Of of) { of.y[threadIdx.x] = of.x[threadIdx.x] * float(of.by); }
"""
    library = simt.compile(DEVICE + text, ["multiplied"], "check")
    assert library.parameters("multiplied") == ["s24"]
    x, y = np.arange(32, dtype=np.float32), simt.empty(32, np.float32)
    data = struct.pack("=QdQ", simt.address(x), 3.0, simt.address(y))
    library.launch("multiplied", 1, 32, [simt.Struct(data, {0: x, 2: y})])
    assert (y == 3 * x).all()
    with pytest.raises(TypeError, match="argument 0 is s16, not s24"):
        library.launch("multiplied", 1, 32, [simt.Struct(data[:16], {0: x})])
    with pytest.raises(simt.SimtError, match=r"bounds"):
        library.launch("multiplied", 1, 32, [simt.Struct(data, {0: x, 2: y[:31]})])
    with pytest.raises(simt.SimtError, match=r"bounds"):
        library.launch("multiplied", 1, 32, [simt.Struct(data, {2: y})])


def test_a_patch_must_fit():
    with pytest.raises(ValueError, match="2 times"):
        simt.patch("a b a", "a", "c")


def test_flush_makes_subnormal_numbers_zero():
    text = """
extern "C" __global__ void halved(float* x) { x[threadIdx.x] *= 0.5f; }
"""
    library = simt.compile(DEVICE + text, ["halved"])
    x = np.full(32, 1.5e-38, np.float32)
    library.launch("halved", 1, 32, [x])
    assert x[0] == np.float32(0.75e-38)
    library.launch("halved", 1, 32, [x], flush=True)
    assert x[0] == 0
    assert np.float32(1.5e-38) * np.float32(0.5) > 0  # and Python's own arithmetic is unaffected


@pytest.mark.parametrize("mode", ["plain", "check"])
@pytest.mark.parametrize(("ctype", "dtype"), [("float", np.float32), ("double", np.float64)])
def test_which_products_are_fused(ctype, dtype, mode):
    """As on a GPU, if g++ optimises and the processor can; but never a product that must be rounded."""
    text = f"""
extern "C" __global__ void fused({ctype}* x) {{
    const {ctype} a = x[threadIdx.x], b = x[32], c = x[33];
    x[threadIdx.x] = threadIdx.x % 2 ? multiply_rounded(a, b) - c : a * b - c;
}}
"""
    library = simt.compile(DEVICE + text, ["fused"], mode)
    eps = np.finfo(dtype).eps
    x = np.full(34, 1 + eps, dtype)
    x[33] = 1 + 2 * eps
    library.launch("fused", 1, 32, [x])
    fuses = mode == "plain" and simt.build.fuses()
    np.testing.assert_array_equal(x[:32], np.tile([eps**2 if fuses else 0, 0], 16))


# ----------------------------------------------------------------------------------------------------- AddressSanitizer

ASAN = """
import numpy as np, pytest, test_simt
from support import simt
for name in test_simt.KERNELS:
    for order in simt.build.ORDERS:
        test_simt.run(name, "asan", order, seed=1)
for name, patches, kind in [
    ("block_sum", [("i < n;", "i <= n;")], "asan"),
    ("block_sum", [("parts, 8", "parts, 7")], "asan"),
    ("lanes", [("threadIdx.x * 6", "threadIdx.x * 6 + 6")], "asan"),
    ("scaled", [("held[i] = x", "(&held[0])[i + 1] = x")], "asan"),
    ("scaled", [("y[ld * i +", "y[(ld + 2147483647) * i +")], "ubsan"),
]:
    for order in simt.build.ORDERS:
        with pytest.raises(simt.SimtError, match="line ") as caught:
            test_simt.run(name, "asan", order, patches=patches)
        assert caught.value.kind == kind, caught.value
"""


@pytest.mark.full
def test_address_sanitizer():
    done = subprocess.run(
        [sys.executable, "-c", ASAN],
        cwd=Path(__file__).parent,
        env=simt.build.asan_environment() | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-1000:]
