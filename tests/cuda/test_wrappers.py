"""Micro-tests of every wrapper in kernels/device.cuh: the same small kernels under emulation and, with CuPy, on a GPU.

The results must be the same in both, up to the accuracy of a GPU's functions. The kernels on which the emulation is
tested (test_simt.py) run here on the GPU, too.
"""

import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import test_simt
from support import simt
from support.simt import nvrtc
from test_simt import DEVICE

PLACES = ["emulated", "cupy"]


@pytest.fixture(params=PLACES)
def launch(request):
    """Compiles a text and launches a kernel of it on NumPy arrays, which then hold its results."""
    if request.param == "emulated":
        if shutil.which("g++") is None:
            pytest.skip("the emulation needs g++")
        return emulated_launch
    cupy = request.getfixturevalue("cupy")

    def on_gpu(text, name, args, grid=1, block=32, cluster=1, mode=""):
        if re.search("cluster_|mbar_|st_async", text) and int(cupy.cuda.Device().compute_capability) < 90:
            pytest.skip("clusters and transaction barriers need compute capability 9.0")
        moved = [cupy.asarray(bits(arg)) if isinstance(arg, np.ndarray) else arg for arg in args]
        cupy.RawKernel(for_gpu(text, cluster), name)((grid,), (block,), tuple(moved))
        for arg, there in zip(args, moved, strict=True):
            if isinstance(arg, np.ndarray) and arg.flags.writeable:
                bits(arg)[...] = there.get()

    return on_gpu


def emulated_launch(text, name, args, mode="check", **launch):
    launch = {"grid": 1, "block": 32, **launch}
    simt.compile(DEVICE + text, [name], mode).launch(name, args=args, **launch)
    if nvrtc.missing() is None:  # the cubin that the GPU will run
        assert nvrtc.cubin(for_gpu(text, launch.get("cluster", 1)), "sm_90")[0]


def for_gpu(text, cluster):
    if cluster > 1:
        text = text.replace("__global__ void", f"__global__ void XE_CLUSTER({cluster})")
    return DEVICE + text


def bits(array):
    """An array of a dtype that every library has."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


@pytest.mark.parametrize("name", test_simt.KERNELS)
def test_the_kernels_of_the_emulation(name, launch):
    text, how, case = test_simt.KERNELS[name]
    args, wanted = case()
    launch(text, name, args, **how)
    for index, value in wanted.items():
        np.testing.assert_array_equal(args[index], value)


def test_memory_of_every_width(launch):
    text = """
template <class T> XE_DEVICE void moved(T* x) { x[32 + threadIdx.x] = x[threadIdx.x]; }
template <class T> XE_DEVICE void moved_l2(T* x) {
    moved(x);
    x[64 + threadIdx.x] = ld_l2(x + threadIdx.x);
}
extern "C" __global__ void memory(
    float* f, double* d, u32* u, u64* l, u16* s, f16* h, bf16* b, uint2* w, uint4* v
) {
    prefetch(f), prefetch(v, 96 * 16);
    moved_l2(f), moved_l2(d), moved_l2(u), moved_l2(l), moved_l2(s), moved(h), moved(b);
    XE_SHARED(uint2, short_tile, 32);
    XE_SHARED(uint4, tile, 32);
    XE_SHARED(uint4, other, 32);
    st8(w + 32 + threadIdx.x, ld8(w + threadIdx.x));
    st16(v + 32 + threadIdx.x, ld16(v + threadIdx.x));
    st8(short_tile + threadIdx.x, ld8(w + threadIdx.x));
    st16(tile + threadIdx.x, ld16(v + threadIdx.x));
    sync_block();
    st8(w + 95 - threadIdx.x, ld8(short_tile + 31 - threadIdx.x));
    st16(other + threadIdx.x, ld16(tile + 31 - threadIdx.x));
    sync_block();
    st16(v + 64 + threadIdx.x, ld16(other + 31 - threadIdx.x));
}
"""
    kinds = {
        **dict.fromkeys((np.float32, np.float64, np.uint32, np.uint64, np.uint16), (3, 32)),
        **dict.fromkeys((np.float16, ml_dtypes.bfloat16), (2, 32)),
    }
    words = (3, 32, 2), (3, 32, 4)
    rng = np.random.default_rng(0)
    arrays = []
    for kind, shape in [*kinds.items(), *((np.uint32, shape) for shape in words)]:
        array = np.zeros(shape, kind)
        array[0] = rng.integers(1, 200, shape[1:])
        arrays.append(array)
    launch(text, "memory", arrays)
    for array in arrays:
        for row in array[1:]:
            np.testing.assert_array_equal(row, array[0])


def test_shuffles_of_every_width(launch):
    text = """
template <class T> XE_DEVICE void all(T* x) {
    const T mine = x[threadIdx.x];
    x[32 + threadIdx.x] = shfl(mine, 7);
    x[64 + threadIdx.x] = shfl_xor(mine, 5);
}
extern "C" __global__ void shuffles(int* i, u64* l, float* f, double* d, float* wide, u32* says) {
    all(i), all(l), all(f), all(d);
    wide[threadIdx.x] = lanes_max<8>(f[threadIdx.x]);
    wide[32 + threadIdx.x] = lanes_sum<16>(f[threadIdx.x]);
    says[threadIdx.x] = any_lane(threadIdx.x == 9) + 2 * any_lane(false) + 4 * any_thread(threadIdx.x == 3);
    says[32 + threadIdx.x] = ballot(threadIdx.x > 30);
    says[64 + threadIdx.x] = lowest_bit(40u << threadIdx.x % 8);
}
"""
    lane, rng = np.arange(32), np.random.default_rng(1)
    places = [lane * 0 + 7, lane ^ 5]
    arrays = []
    for kind in (np.int32, np.uint64, np.float32, np.float64):
        array = np.zeros((3, 32), kind)
        array[0] = rng.integers(1, 1 << 20, 32) * (kind(3) if kind is not np.uint64 else kind(1 << 40))
        arrays.append(array)
    wide, says = np.zeros((2, 32), np.float32), np.zeros((3, 32), np.uint32)
    launch(text, "shuffles", [*arrays, wide, says])
    for array in arrays:
        np.testing.assert_array_equal(array[1:], array[0][np.stack(places)])
    np.testing.assert_array_equal(says[2], 3 + lane % 8)  # of 40, and of its multiples
    f = arrays[2][0]
    np.testing.assert_array_equal(wide[0], np.repeat(f.reshape(4, 8).max(1), 8))
    np.testing.assert_allclose(wide[1], np.repeat(f.reshape(2, 16).sum(1), 16), rtol=1e-6)
    np.testing.assert_array_equal(says[:2], np.repeat([[5], [1 << 31]], 32, axis=1))


def test_tickets_and_bits(launch):
    text = """
extern "C" __global__ void tickets(u32* taken, u32* order, const float* x, float* y, u32* z) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    order[i] = take_ticket(taken);
    fence_gpu();
    z[i] = float_bits(x[i]);
    y[i] = bits_float(float_bits(x[i]) ^ 0x80000000u);
}
"""
    x = np.random.default_rng(2).normal(size=64).astype(np.float32)
    taken, order = np.zeros(1, np.uint32), np.zeros(64, np.uint32)
    y, z = np.zeros(64, np.float32), np.zeros(64, np.uint32)
    launch(text, "tickets", [taken, order, x, y, z], grid=2)
    assert taken[0] == 64
    assert sorted(order) == list(range(64))
    np.testing.assert_array_equal(y, -x)
    np.testing.assert_array_equal(z, x.view(np.uint32))


def test_messages_of_16_bytes_in_a_cluster(launch):
    text = """
extern "C" __global__ void messages(const uint4* x, uint4* y) {
    XE_SHARED(uint4, inbox, 4);
    XE_SHARED(u64, bar, 1);
    const int rank = cluster_rank();
    if (threadIdx.x == 0) {
        mbar_init(bar, 4);
        mbar_init_fence();
    }
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x < 4) {
        mbar_expect(bar, 16);
        st_async16(inbox + rank, threadIdx.x, ld16(x + 4 * rank + threadIdx.x), bar);
    }
    mbar_wait(bar, 0);
    if (threadIdx.x < 4) st16(y + 4 * blockIdx.x + threadIdx.x, ld16(inbox + threadIdx.x));
}
"""
    x = np.random.default_rng(3).integers(1 << 30, size=(4, 4, 4), dtype=np.uint32)
    y = np.zeros((8, 4, 4), np.uint32)
    launch(text, "messages", [x, y], grid=8, cluster=4)
    np.testing.assert_array_equal(y, np.tile(x.transpose(1, 0, 2), (2, 1, 1)))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)], ids=lambda dtype: dtype.name)
def test_16_bit_conversions_and_pairs(dtype, launch):
    text = """
template <class T> XE_DEVICE void all(const float* x, i64 n, u16* narrow, float* wide, u32* pairs, float* two) {
    const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) narrow[i] = from_acc(x[i], T()).bits;
    if (i < 65536) {
        wide[i] = to_acc(f16_or_bf16<T>(static_cast<u16>(i)));
        const u32 pair = pack2(x[2 * i], x[2 * i + 1], T());
        pairs[i] = max2(pair, pack2(0.5f, -0.5f, T()), T());
        two[2 * i] = low2<T>(pair), two[2 * i + 1] = high2<T>(pair);
    }
}
#define ALL(name, T) extern "C" __global__ void name(const float* x, i64 n, u16* a, float* b, u32* c, float* d) { \\
    all<T>(x, n, a, b, c, d); }
ALL(float16, f16)
ALL(bfloat16, bf16)
"""
    exact = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    finite = np.sort(exact[np.isfinite(exact)])
    ties = (finite[:-1] / 2 + finite[1:] / 2).astype(np.float32)
    normal = np.random.default_rng(0).normal(size=70_000)
    ends = [1e38, -1e38, 3.4e38, 65519, 65520]
    x = np.concatenate([exact, ties, normal, ends], dtype=np.float32, casting="same_kind")
    narrow, wide, pairs = np.zeros(len(x), np.uint16), np.zeros(65536, np.float32), np.zeros(65536, np.uint32)
    two = np.zeros((65536, 2), np.float32)
    launch(text, dtype.name, [x, len(x), narrow, wide, pairs, two], grid=-(-len(x) // 1024), block=1024)
    np.testing.assert_array_equal(wide, exact)
    with np.errstate(all="ignore"):  # NaN and overflow are intended
        rounded = x.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(narrow.view(dtype).astype(np.float32), rounded)
    np.testing.assert_array_equal(two, rounded[:131072].reshape(-1, 2))
    wanted = np.fmax(two, np.array([0.5, -0.5], np.float32))
    largest = pairs.view(dtype).astype(np.float32).reshape(-1, 2)
    np.testing.assert_allclose(largest, wanted, rtol=0, atol=np.finfo(np.float32).tiny)  # sm_75 flushes


def test_exp_log1p_reciprocal_max(launch):
    text = """
extern "C" __global__ void functions(const float* x, const double* xx, float* y, double* yy) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[4 * i] = exp_acc(-x[i]), y[4 * i + 1] = log1p_acc(x[i]), y[4 * i + 2] = reciprocal(x[i]);
    yy[4 * i] = exp_acc(-xx[i]), yy[4 * i + 1] = log1p_acc(xx[i]), yy[4 * i + 2] = reciprocal(xx[i]);
    y[4 * i + 3] = max_acc(bits_float(0x7fc00000u), max_acc(x[i], 1.0f));  // ignores NaN
    yy[4 * i + 3] = max_acc(static_cast<double>(bits_float(0x7fc00000u)), max_acc(xx[i], 1.0));
}
"""
    x = np.geomspace(1e-30, 80, 1024)
    y, yy = np.zeros((1024, 4), np.float32), np.zeros((1024, 4))
    launch(text, "functions", [x.astype(np.float32), x, y, yy], grid=4, block=256)
    for got, at in [(y, x.astype(np.float32).astype(float)), (yy, x)]:
        wanted = np.stack([np.exp(-at), np.log1p(at), 1 / at, np.maximum(at, 1)], 1)
        bar = np.finfo(got.dtype).eps * (2 + at[:, None] / 2)
        assert np.all(abs(got - wanted) <= bar * abs(wanted))


def test_the_bits_of_doubles(launch):
    text = """
extern "C" __global__ void negates(const double* x, double* y) {
    y[threadIdx.x] = bits_double(double_bits(x[threadIdx.x]) ^ 1ull << 63);
}
"""
    x, y = np.linspace(-1e300, 1e-300, 32), np.zeros(32)
    launch(text, "negates", [x, y])
    np.testing.assert_array_equal(y, -x)


EXP_OF_DOUBLES = """
extern "C" __global__ void exps(const double* x, double* y, i64 each) {
    const i64 first = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * each;
    for (i64 i = first; i < first + each; ++i) y[i] = exp_acc(x[i]);
}
"""
LAST_POWERS = -708.395996, 709.782226  # beyond these the result is 0 or infinite


def doubles():
    """2^20 numbers: in range, near 0, near odd multiples of ln 2 / 2 (where n changes), the ends, and beyond."""
    rng = np.random.default_rng(0)
    halves = (np.arange(-1024, 1024) + 0.5) * np.log(2)
    about = halves[:, None] + np.spacing(halves)[:, None] * np.arange(-8, 8)
    ends = np.concatenate([end + np.arange(-200, 200) * np.spacing(end) * 2.0**28 for end in LAST_POWERS])
    special = [0.0, -0.0, 5e-324, -5e-324, 1e-300, np.inf, -np.inf, np.nan, -np.nan, 1e308, -1e308, 710, -709, -746]
    odd_nan = np.array([0xFFF8000000000001, 0x7FF8FFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF], np.uint64).view(np.float64)
    tiny = rng.choice([-1, 1], 100_000) * np.exp(rng.uniform(-700, 0, 100_000))
    found = np.concatenate([about.ravel(), ends, special, odd_nan, tiny, -rng.exponential(4, 300_000)])
    return np.concatenate([found, rng.uniform(-709, 710, 2**20 - len(found))])


def assert_exp_is_right(x, y):
    with np.errstate(all="ignore"):
        wanted = np.exp(x.astype(np.longdouble))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    low, high = LAST_POWERS
    assert (y[x < low - 1e-3] == 0).all()
    assert (y[x > high + 1e-3] == np.inf).all()
    inside = (low <= x) & (x <= high)
    wrong = abs(y[inside].astype(np.longdouble) - wanted[inside]) / wanted[inside]
    assert inside.sum() > 1_000_000
    assert wrong.max() <= 0.7 * np.finfo(np.float64).eps
    assert not ((y > 0) & (y < np.finfo(np.float64).tiny)).any()


needs_longdouble = pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="no wider numbers to compare with")


@needs_longdouble
def test_exp_of_doubles(launch):
    x = doubles()
    y = np.full(len(x), 7.0)
    launch(EXP_OF_DOUBLES, "exps", [x, y, 64], grid=len(x) // 64 // 128, block=128)
    assert_exp_is_right(x, y)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.5000000000000012", "0.5000000000000042"),
        ("2.5024639266311035e-08", "2.0e-08"),
        ("fma(n, -2.3190468138462996e-17,", "fma(n, -2.319e-15,"),
        ("given >= 0xc086232bu", "given >= 0xc086242bu"),
        ("static_cast<int>(given) >= 0x40862e42", "static_cast<int>(given) >= 0x40862e43"),
        ("high = given > 0xfff00000u ? given : 0", "high = 0"),
        ("high = given > 0x7ff00000u ? given : 0x7ff00000u", "high = 0x7ff00000u"),
        ("(below || above ? 0 : static_cast<u32>(power))", "static_cast<u32>(power)"),
        ("6755399441055744.0), n = shifted", "6755399441055745.0), n = shifted"),
    ],
)
@needs_longdouble
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")
def test_a_wrong_exp_of_doubles_is_noticed(old, new):
    x = doubles()
    y = np.full(len(x), 7.0)
    simt.compile(simt.patch(DEVICE, old, new) + EXP_OF_DOUBLES, ["exps"], "plain").launch(
        "exps", len(x) // 64 // 128, 128, [x, y, 64]
    )
    with pytest.raises(AssertionError):
        assert_exp_is_right(x, y)


def test_exp2_at_its_ends(launch):
    text = """
extern "C" __global__ void ends(const float* x, float* y) { y[threadIdx.x] = exp2_fast(x[threadIdx.x]); }
"""
    x = np.full(32, -np.inf, np.float32)
    x[1:8] = [0, 1, -1, -126, -150, np.nan, np.inf]
    y = np.zeros(32, np.float32)
    launch(text, "ends", [x, y])
    np.testing.assert_array_equal(y[:8], np.array([0, 1, 2, 0.5, 2.0**-126, 0, np.nan, np.inf], np.float32))


def test_a_product_that_is_rounded_before_it_is_a_term(launch):
    text = """
extern "C" __global__ void products(float* f, double* d) {
    f[threadIdx.x] = multiply_rounded(f[threadIdx.x], f[threadIdx.x]) - f[32 + threadIdx.x];
    d[threadIdx.x] = multiply_rounded(d[threadIdx.x], d[threadIdx.x]) - d[32 + threadIdx.x];
}
"""
    arrays = []
    for kind, bits in ((np.float32, 12), (np.float64, 27)):
        one = np.full(32, 1 + 2.0**-bits, kind)
        arrays.append(np.stack([one, one * one]))  # the product has a bit beyond the last
    launch(text, "products", arrays, mode="plain")  # this mode fuses products
    for array in arrays:
        np.testing.assert_array_equal(array[0], 0)


def test_every_wrapper_has_a_test():
    """By name, here or in test_simt.py, or as part of another wrapper that has one."""
    named = set(re.findall(r"XE_DEVICE [\w ]*?\*?(\w+)\(", DEVICE)) | set(re.findall(r"XE_DEVICE A (\w+)\(", DEVICE))
    assert len(named) > 40
    tests = Path(__file__).read_text() + "".join(text for text, *_ in test_simt.KERNELS.values())
    named.remove("rare_path")  # does nothing; test_device.py finds it in the SASS
    inside = {"to_float", "f16_float", "f16_bits", "bf16_bits", "mbar_try", "shared_address"}
    assert {name for name in named - inside if not re.search(rf"\b{name}(<[\w<>]+>)?\(", tests)} == set()
    assert all(len(re.findall(rf"\b{name}\(", DEVICE)) >= 2 for name in inside)
