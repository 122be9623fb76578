"""The CUDA kernels, run from source by the emulation in support/simt through the public functions, against the oracle.

Every case of FAMILIES × variant × job, in float32 and in 16 bits, and every family × dtype × variant; every order in
which threads may run; with the checker for races, bounds and unwritten memory. Then the same with bugs planted in the
source, each of which must be caught.
"""

import dataclasses
import itertools
import mmap
import os
import re
import shutil
import subprocess
import sys
from typing import get_type_hints

import ml_dtypes
import numpy as np
import pytest
from support import emulated, simt, tally
from support.close import assert_confident, assert_grad, assert_loss
from support.oracle import oracle
from support.simt.build import ORDERS

from xent_array import (
    CrossEntropyLoss,
    _engines,
    _problem,
    cross_entropy,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    row_stats,
)
from xent_array._engines import ENGINES, cuda
from xent_array._engines.parallel import device
from xent_array._rows import Asked, Rows

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")

SPARSE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since 3.13
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}

# Cases of every family: (rows, bytes of a row, chip, layout, attributes the plan must have). Rows are one element
# shorter than these bytes, so that there are heads and tails. "apart": logits that start off 16 bytes, with a gap
# between rows; "off": without a gap; "columns": classes along axis 1.
FAMILIES = {
    "TINY": (319, 28, 90, "flat", {"family": "TINY"}),
    "TINY one access": (301, 6, 90, "flat", {"family": "TINY"}),
    "TINY two rows": (301, 12, 90, "flat", {"family": "TINY", "width": 2}),
    "TINY two vectors": (150, 36, 90, "flat", {"family": "TINY"}),
    "TINY four vectors": (150, 68, 80, "flat", {"family": "TINY"}),
    "TINY widest": (260, 128, 90, "flat", {"family": "TINY"}),
    "TINY off 16 bytes": (141, 44, 75, "off", {"family": "TINY"}),
    "WARP shorter than a vector": (300, 12, 90, "apart", {"family": "WARP", "lanes": 4}),
    "WARP few classes": (300, 40, 90, "apart", {"family": "WARP", "lanes": 4}),
    "COLUMNS": (536, 16, 90, "columns", {"family": "COLUMNS", "lanes": 1, "width": 4}),
    "COLUMNS 24 classes": (140, 80, 90, "columns", {"family": "COLUMNS"}),
    "COLUMNS 8 warps": (136, 128, 90, "columns", {"family": "COLUMNS", "lanes": 8, "width": 4}),
    "COLUMNS 8 warps unaligned": (70, 380, 90, "columns", {"family": "COLUMNS", "lanes": 8, "width": 1}),
    "COLUMNS stream": (68, 2510, 90, "columns", {"family": "COLUMNS", "stream": True}),
    "WARP 4 lanes": (37, 240, 90, "apart", {"family": "WARP", "lanes": 4}),
    "WARP 8 lanes": (19, 1000, 90, "apart", {"family": "WARP", "lanes": 8}),
    "WARP 16 lanes": (9, 1500, 90, "flat", {"family": "WARP", "lanes": 16}),
    "WARP 32 lanes": (5, 2500, 90, "apart", {"family": "WARP", "lanes": 32}),
    "BLOCK": (3, 6000, 90, "apart", {"family": "BLOCK", "cluster": 1}),
    "BLOCK 2 blocks": (2, 140_000, 90, "flat", {"family": "BLOCK"}),  # in float32; 4 blocks in 16 bits
    "BLOCK 8 blocks": (1, 530_000, 90, "flat", {"cluster": 8}),
    "BLOCK 16 vectors": (1, 600_000, 90, "apart", {"family": "BLOCK", "vectors": 16}),
    "BLOCK of an older chip": (2, 15_000, 75, "flat", {"family": "BLOCK", "cluster": 1}),
    "STREAM": (2, 150_000, 80, "apart", {"family": "STREAM", "cluster": 1}),
    "STREAM 8 blocks": (1, 600_000, 90, "apart", {"cluster": 8}),
    "SPLIT": (2, 1_100_000, 90, "apart", {"family": "SPLIT"}),
    "SPLIT of an older chip": (2, 300_000, 80, "flat", {"family": "SPLIT"}),
}  # fmt: skip
# Run without the checker, except in float32.
LARGE = {"BLOCK 8 blocks", "BLOCK 16 vectors", "STREAM", "STREAM 8 blocks", "SPLIT", "SPLIT of an older chip"}


def problem(family, dtype, variant, seed=0):
    """(logits, target, options, chip, plan, wanted) of a problem for this case."""
    rows, _, chip, layout, wanted = FAMILIES[family]
    rng = np.random.default_rng([seed, *family.encode(), *dtype.encode(), *variant.encode()])
    dtype_ = np.dtype(DTYPES[dtype])
    classes = classes_of(family, dtype)
    if layout == "columns":
        logits = (rng.standard_normal((2, classes, rows // 2)) * 3).astype(dtype_)
    elif layout == "apart":
        room = (rng.standard_normal(1 + rows * (classes + 3)) * 3).astype(dtype_)
        logits = room[1:].reshape(rows, classes + 3)[:, :classes]
    elif layout == "off":
        logits = (rng.standard_normal(1 + rows * classes) * 3).astype(dtype_)[1:].reshape(rows, classes)
    else:
        logits = (rng.standard_normal((rows, classes)) * 3).astype(dtype_)
    axis = 1
    row_shape = logits.shape[:1] + logits.shape[2:]
    target = rng.integers(classes, size=row_shape)
    options = {"axis": axis, "reduction": str(rng.choice(["mean", "sum"])), "validate": False}
    first = (0,) * len(row_shape)
    if variant in ("PLAIN", "SMOOTH", "CAPPED"):
        target[rng.random(row_shape) < 0.1] = -100
        target[first] = rng.choice([0, classes - 1])  # in head or tail
    if variant != "PLAIN" or rng.random() < 0.5:
        options |= {"z_loss": 1e-3, "sample_weight": rng.random(row_shape) * (rng.random(row_shape) > 0.1)}
        options["sample_weight"][first] = 1.5
    if variant not in ("SMOOTH", "SOFT"):
        options["weight"] = rng.random(classes) * 2
    if variant not in ("PLAIN", "CAPPED"):
        options["label_smoothing"] = 0.1
        if variant == "SOFT" or (variant != "SMOOTH" and rng.random() < 0.5):
            target = rng.random(logits.shape)
            target = target.astype(dtype_ if variant == "SOFT" or rng.random() < 0.5 else np.float32)
            whole = target.sum(axis=axis, keepdims=True, dtype=np.float64)
            target = (target / whole).astype(target.dtype)
    if "CAPPED" in variant:
        options["softcap"] = 5.0
    return (
        logits,
        target,
        options,
        chip,
        plans(family, dtype, variant)["LOSS_AND_GRAD", is_even(family, variant)],
        wanted,
    )


def is_even(family, variant, job="LOSS_AND_GRAD", in_place=False):
    """Whether a job's rows usually are even: class weights are 16-byte aligned, rows of odd length are not."""
    if variant in ("GENERAL", "CAPPED_GENERAL"):
        return False
    apart = FAMILIES[family][3] in ("apart", "off")
    return cuda.is_always_even(job, variant) or not apart or (in_place and variant != "SOFT")


def plans(family, dtype, variant, otherwise=None):
    """The plan for each job, for even rows and for others (those whose gradient is aligned differently)."""
    rows, _, chip, layout, _ = FAMILIES[family]
    classes = classes_of(family, dtype)
    how = {"layout": otherwise or {"columns": "columns", "apart": "rows"}.get(layout, "flat"), "variant": variant}
    width = cuda._width(np.empty((2, classes, rows // 2), DTYPES[dtype])) if layout == "columns" else None
    return {
        (job, even): cuda.plan(rows, classes, dtype, chip, **how, job=job, access=width or (4 if even else 1))
        for job in cuda.JOBS[:-1]
        for even in (True, False)
    }


def word(family):
    """The family of a case."""
    return family.split()[0]


def classes_of(family, dtype):
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    return max(1, FAMILIES[family][1] // itemsize - (family != "TINY widest" and itemsize < 8))


def truth_of(logits, target, options, **more):
    with np.errstate(all="ignore"):
        return oracle(logits, target, **{k: v for k, v in options.items() if k != "validate"}, **more)


DEFAULTS = {
    "axis": -1, "reduction": "mean", "weight": None, "sample_weight": None, "ignore_index": -100,
    "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "validate": False,
}  # fmt: skip


def all_three(engine, logits, target, options, out=None):
    """Loss, gradient and stats from one launch over the rows."""
    problem = _problem.problem_of(logits, target, Asked(engine=engine, **{**DEFAULTS, **options}))
    into = _problem.Output(problem, out)
    with np.errstate(all="ignore"):
        loss, grad, stats = _engines.loss_grad_and_stats(problem.engine, problem.rows, into.view)
    return problem.loss(loss), into.result(grad), problem.user_stats(stats)


def correct_rows(logits, target, options, truth):
    """Whether the label is the argmax, in rows that count and have a softmax; None for distributions."""
    if target.ndim == logits.ndim:
        return None
    axis = options.get("axis", -1)
    hit = logits.astype(np.float64).argmax(axis) == target
    return hit & (target != options.get("ignore_index", -100)) & ~np.isnan(truth.lse)


def assert_correct(stats, wanted):
    if wanted is None:
        assert stats.correct is None
    else:
        assert stats.correct.dtype == bool
        np.testing.assert_array_equal(stats.correct, wanted)


def in_place_of(logits):
    """A copy of the logits with the same alignment and the same gap between rows."""
    if logits.base is None:
        return logits.copy("K")
    room = logits.base.copy().view(np.uint8)
    start = logits.ctypes.data - logits.base.ctypes.data
    return np.ndarray(logits.shape, logits.dtype, room, start, logits.strides)


def check(engine, logits, target, options):
    """Checks every job on one problem."""
    truth = truth_of(logits, target, options)
    loss, grad = cross_entropy_value_and_grad(logits, target, engine=engine, **options)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    assert_loss(cross_entropy(logits, target, engine=engine, **options), truth)
    stats = row_stats(logits, target, engine=engine, **{k: v for k, v in options.items() if k != "reduction"})
    assert_grad(cross_entropy_grad(logits, target, engine=engine, stats=stats, **options), truth)
    in_place = in_place_of(logits)
    _, same = cross_entropy_value_and_grad(in_place, target, engine=engine, out=in_place, **options)
    assert same is in_place
    assert_grad(same, truth)
    correct = correct_rows(logits, target, options, truth)
    assert_correct(stats, correct)
    in_place = in_place_of(logits)
    for x, out in ((logits, None), (in_place, in_place)):
        loss, grad, also = all_three(engine, x, target, options, out)
        assert_loss(loss, truth)
        assert_grad(grad, truth)
        np.testing.assert_array_equal(also.max, stats.max)
        # A row that is divided differently among threads is rounded differently.
        for one, other in zip(stats[:4], also[:4], strict=True):
            np.testing.assert_allclose(one, other, rtol=64 * np.finfo(one.dtype).eps)
        assert_correct(also, correct)


def is_case(family, dtype, variant):
    """Float32 always; also one 16-bit dtype, in turn; and float64 with each variant in some case of the family."""
    alike = [other for other in FAMILIES if word(other) == word(family)]
    turn, number = cuda.VARIANTS.index(variant), alike.index(family)
    if dtype == "float64":
        return (turn - number) % min(len(alike), len(cuda.VARIANTS)) == 0
    return dtype == "float32" or dtype == ("float16", "bfloat16")[(turn + number) % 2]


CASES = [case for case in itertools.product(FAMILIES, DTYPES, cuda.VARIANTS) if is_case(*case)]


def test_the_cases_show_every_combination_that_they_should():
    """Case × variant × width; case × dtype; family × dtype × variant."""
    shown = {(family, variant, dtype[-2:]) for family, dtype, variant in CASES}
    assert shown >= set(itertools.product(FAMILIES, cuda.VARIANTS, ["16", "32"]))
    assert {(family, dtype) for family, dtype, _ in CASES} == set(itertools.product(FAMILIES, DTYPES))
    words = {(word(family), dtype, variant) for family, dtype, variant in CASES}
    assert words == set(itertools.product(cuda.FAMILIES, DTYPES, cuda.VARIANTS))


IN_PLACE = ("LOSS_AND_GRAD", "STATS_AND_GRAD")  # jobs that also run in place


def mode_of(family, dtype):
    return "plain" if family in LARGE and dtype != "float32" else "check"


@pytest.fixture(scope="module")
def compiled(request):
    """Compiles most of what the cases of this run need: one text per case, in parallel."""
    wanted = []
    for item in request.session.items:
        if not item.name.startswith("test_every_job["):
            continue
        family, dtype, variant = (item.callspec.params[name] for name in ("family", "dtype", "variant"))
        mode = os.environ.get("SIMT_MODE", mode_of(family, dtype))
        of_jobs = plans(family, dtype, variant).items()
        kernels = [
            kernel
            for (job, even), chosen in of_jobs
            if even in (is_even(family, variant, job), is_even(family, variant, job, job in IN_PLACE))
            for kernel in chosen.kernels(job)
        ]
        wanted += [(kernels, mode), ([cuda.sums_kernel(dtype, 1)], mode)]
    emulated.prepare(wanted)


@pytest.mark.full(but_one_per="family")
@pytest.mark.parametrize(("family", "dtype", "variant"), CASES)
def test_every_job(family, dtype, variant, compiled):
    logits, target, options, chip, chosen, wanted = problem(family, dtype, variant)
    if not (dtype == "float64" or variant != "PLAIN"):  # with these, threads hold less of a row
        assert {name: getattr(chosen, name) for name in wanted} == wanted
    number = CASES.index((family, dtype, variant))
    engine = emulated.engine(mode=mode_of(family, dtype), order=ORDERS[number % 4], seed=number, chip=chip)
    check(engine, logits, target, options)
    tally.COUNTS["cases"] += 1
    names = {k.name for (job, _), plan in plans(family, dtype, variant).items() for k in plan.kernels(job)}
    if word(family) == "WARP":  # for a gradient in place, they are copied to be contiguous
        flat = plans(family, dtype, variant, "flat")
        names |= {k.name for (job, _), plan in flat.items() for k in plan.kernels(job)}
    assert {name for name in names if "_grad_" in name} & set(engine.launcher.launches)
    assert set(engine.launcher.launches) <= names | {cuda.sums_kernel(dtype, 1).name}


@pytest.mark.full
def test_under_asan_and_ubsan():
    """The same cases in a process with AddressSanitizer, in float32, without options and with all of them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--full", __file__]
    command += ["-k", "test_every_job and float32 and (PLAIN or CAPPED_GENERAL)"]
    environment = {**simt.build.asan_environment(), "SIMT_MODE": "asan"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    tally.COUNTS["sanitized"] += int(re.search(r"(\d+) passed.* in [\d.]+s", done.stdout)[1])
    assert f"{len(FAMILIES) * 2} passed" in done.stdout


# TINY would take the last two, if their rows were whole vectors.
NO_OPTIONS_LEFT_OUT = LARGE | {"WARP shorter than a vector", "WARP few classes"}


def no_options(family, dtype):
    """A problem without options, which has code of its own; for WARP and BLOCK its rows are whole vectors."""
    logits, target, options, *chip = problem(family, dtype, "PLAIN")
    if word(family) in cuda.HOLDING:
        logits = np.ascontiguousarray(logits[:, : logits.shape[1] // 8 * 8])
        target = np.where(target < 0, target, target % logits.shape[1])
    return logits, target, {name: options[name] for name in ("axis", "reduction", "validate")}, *chip


NO_OPTIONS = [
    family
    for family in FAMILIES
    if word(family) in (*cuda.HOLDING, *cuda.MANY_ROWS) and family not in NO_OPTIONS_LEFT_OUT
]


@pytest.mark.full(but_one_per="dtype")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        (family, dtype)
        for (number, family), dtype in itertools.product(enumerate(NO_OPTIONS), DTYPES)
        if word(family) in cuda.MANY_ROWS or dtype in ("float32", ("float16", "bfloat16")[number % 2])
    ],
)
def test_every_job_without_options(family, dtype, compiled):
    logits, target, options, chip, *_ = no_options(family, dtype)
    check(emulated.engine(mode="check", chip=chip), logits, target, options)
    target = np.where(target < 0, logits.shape[1], target)  # not a class
    upstream = np.arange(target.size, dtype=logits.dtype if dtype == "float64" else np.float32).reshape(target.shape)
    options |= {"reduction": "none", "grad_output": upstream}
    loss, grad = cross_entropy_value_and_grad(logits, target, engine=emulated.engine(chip=chip), **options)
    truth = truth_of(logits, target, options)
    assert_loss(loss, truth)
    assert_grad(grad, truth)


def tied(family, dtype, variant, turn):
    """A problem whose largest logit occurs in up to three places; labels are one of them, or another class.

    In a case of many rows some are ignored, although the label is a class. Softcap makes more logits equal.
    """
    logits, target, options, chip, *_ = problem(family, dtype, variant)
    rng = np.random.default_rng([turn, *family.encode()])
    moved = np.moveaxis(logits, 1, -1)
    moved[...] = rng.integers(-3, 3, moved.shape)
    places = np.sort(rng.integers(moved.shape[-1], size=(*moved.shape[:-1], 3)))
    np.put_along_axis(moved, places, 3, -1)
    if variant == "CAPPED":
        logits *= logits.dtype.type(40)
    which = (np.arange(places[..., 0].size).reshape(places.shape[:-1]) + turn) % 4
    of_each = np.concatenate([places, rng.integers(moved.shape[-1], size=(*moved.shape[:-1], 1))], -1)
    target = np.take_along_axis(of_each, which[..., None], -1)[..., 0]
    if target.size > 4:
        options["ignore_index"] = int(target.flat[-1])
    return logits, target, options, chip


@pytest.mark.full
@pytest.mark.parametrize("variant", [variant for variant in cuda.VARIANTS if variant != "SOFT"])  # SOFT has no labels
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_of_the_largest_logits_is_correct(family, variant, compiled):
    number = list(FAMILIES).index(family) + cuda.VARIANTS.index(variant)
    dtypes = [dtype for dtype in DTYPES if is_case(family, dtype, variant)]  # whose kernels are compiled already
    dtype = dtypes[number % len(dtypes)] if family not in LARGE else "float32"
    seen = []
    for turn in range(4):
        logits, target, options, chip = tied(family, dtype, variant, turn)
        engine = emulated.engine(mode="check", order=ORDERS[turn], seed=turn, chip=chip)
        wanted = correct_rows(logits, target, options, truth_of(logits, target, options))
        in_place = in_place_of(logits)
        assert_correct(all_three(engine, in_place, target, options, in_place)[2], wanted)
        made = [name for name in engine.launcher.launches if "_grad_" in name or "_merge_" in name]
        assert len(made) == (2 if word(family) == "SPLIT" else 1)  # no launch but the gradient's, and the merge
        stats = row_stats(logits, target, engine=engine, **{k: v for k, v in options.items() if k != "reduction"})
        assert_correct(stats, wanted)
        seen += wanted.flat
    assert {True, False} <= set(seen) or logits.shape[1] < 4  # all may be ignored


def alike(classes, dtype, rows=24):
    """Rows whose largest logit occurs in two neighbouring places and dominates; one of them is the label."""
    rng = np.random.default_rng(classes)
    logits = np.full((rows, classes), -60, dtype)
    at = classes // 2 // 8 * 8 + 4
    logits[:, at : at + 2] = rng.standard_normal((rows, 1)) * 5
    return logits, np.full(rows, at)


@pytest.mark.full(but_one_per="classes")
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 90.0}], ids=str)
@pytest.mark.parametrize("classes", [9, 200, 5000])
def test_two_that_are_as_large_are_not_one(classes, options):
    """Each has p = 1/2, though a sum of exponentials may come out slightly above."""
    check(
        emulated.engine(), *alike(classes, np.float32), {"axis": 1, "reduction": "none", "validate": False, **options}
    )


@pytest.mark.parametrize("classes", [40, 300])
def test_a_large_weight_under_a_small_scale(classes):
    """The product of weight, smoothing and scale is in range; that of smoothing and scale is not."""
    x, y = np.full((4, classes), 1, np.float32), np.arange(4)
    x[:, ::2] = -np.inf
    y = 2 * y + 1
    options = {"weight": np.full(classes, 1e17), "label_smoothing": 1e-12, "sample_weight": np.full(4, 1e-30)}
    options |= {"reduction": "sum", "validate": False}
    grad = cross_entropy_grad(x, y, engine=emulated.engine(), **options)
    assert_grad(grad, truth_of(x, y, options))
    assert (grad[:, ::2] < 0).all()


@pytest.mark.parametrize("softcap", [None, 9.0])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("classes", [12, 40, 300])
def test_an_infinite_weight_of_the_largest_logit(classes, axis, softcap):
    """The largest of a thread, or of the row, for which 0·inf counts as 0; some are the largest by softcap only."""
    rng = np.random.default_rng(classes)
    x, y = rng.standard_normal((classes, classes), dtype=np.float32), rng.integers(classes, size=classes)
    x[::2, 7] = 8
    x[::3, 3], x[::3, 7] = 2000, 1000
    x = x if axis else np.ascontiguousarray(x.T)
    options = {"weight": np.where(np.arange(classes) == 7, np.inf, 1), "label_smoothing": 0.1, "softcap": softcap}
    options |= {"axis": axis, "reduction": "none", "validate": False}
    loss = cross_entropy(x, y, engine=emulated.engine(), **options)
    assert_loss(loss, truth_of(x, y, options))
    assert np.isinf(loss).any()


@pytest.mark.full(but_one_per="variant")
@pytest.mark.parametrize("variant", ["PLAIN", "CAPPED", "GENERAL", "CAPPED_GENERAL"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_infinite_weight_of_the_label(family, variant):
    """Infinity times its probability, minus infinity, is NaN, also if the product is fused into the subtraction."""
    dtypes = [dtype for dtype in DTYPES if is_case(family, dtype, variant)]
    dtype = dtypes[list(FAMILIES).index(family) % len(dtypes)]
    logits, target, options, chip, *_ = problem(family, dtype, variant)
    met = 0
    if target.ndim < logits.ndim:
        met = target[(0,) * target.ndim]
    else:
        target[1::2, met] = 0
    options["weight"][met] = np.inf
    options["reduction"] = "none"
    truth = truth_of(logits, target, options)
    assert np.isnan(np.take(truth.grad, met, 1)).any()
    engine = emulated.engine(chip=chip)
    loss, grad = cross_entropy_value_and_grad(logits, target, engine=engine, **options)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    stats = row_stats(logits, target, engine=engine, **{k: v for k, v in options.items() if k != "reduction"})
    assert_grad(cross_entropy_grad(logits, target, engine=engine, stats=stats, **options), truth)


@pytest.mark.full(but_one_per="classes")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("classes", [6, 60, 3000])
def test_correct_in_rows_that_are_special(classes, softcap):
    x = np.full((11, classes), -1, np.float32)
    y = np.full(11, 4)
    x[:, 4] = 1
    x[1, 2] = np.nan
    x[2, 4] = np.nan
    x[3, 4] = np.inf
    x[4] = -np.inf
    y[5] = -100
    y[6], y[7] = classes, -3
    x[8, 2:5] = [-0.0, -1, 0.0]  # equal to the label's, and before it
    x[9, 2:5] = [-1, -1, -0.0]
    x[9, 5] = 0.0  # equal to the label's, and after it
    sample_weight = np.ones(11)
    sample_weight[10] = 0
    wanted = [True, False, False, softcap is not None, False, False, False, False, False, True, True]
    options = {"softcap": softcap, "sample_weight": sample_weight, "validate": False}
    for more in (options, options | {"label_smoothing": 0.2, "weight": np.linspace(0, 2, classes)}):
        engine = emulated.engine(mode="check")
        assert_correct(row_stats(x, y, engine=engine, **more), wanted)
        assert_correct(all_three(engine, x, y, more)[2], wanted)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_the_same_in_every_order_and_place(family):
    """Bitwise, if rows start on 16 bytes: alone, in any batch, at any position, however threads are scheduled."""
    _, size, chip, layout, _ = FAMILIES[family]
    rng = np.random.default_rng(1)
    classes = max(1, size // 16) * 4
    logits = rng.standard_normal((7, classes), dtype=np.float32) * 3
    target = rng.integers(classes, size=7)
    place = [3, 0, 6, 1, 5, 2, 4]
    seen = []
    for order, rows in itertools.product(ORDERS, [list(range(7)), place, [4]]):
        x = logits[rows]
        if layout == "columns":
            beside = 8 + len(seen) % 2  # neighbouring rows are read four at a time, or one by one
            x = np.ascontiguousarray(np.broadcast_to(x.T[None, :, :, None], (1, classes, len(rows), beside)))
            target_ = np.repeat(target[rows][None, :, None], beside, axis=2)
        else:
            target_ = target[rows]
        engine = emulated.engine(order=order, seed=len(seen), chip=chip)
        loss, grad = cross_entropy_value_and_grad(x, target_, engine=engine, reduction="none", axis=1, validate=False)
        if layout == "columns":
            loss, grad = loss[0, :, 0], grad[0, :, :, 0].T
        seen.append((loss[rows.index(4)].tobytes(), grad[rows.index(4)].tobytes()))
    assert len(set(seen)) == 1


def confident(family, dtype, variant="PLAIN"):
    """A problem whose labels are classes with nearly all the probability; GENERAL: given as a distribution."""
    logits, *_, chip, _, _ = problem(family, dtype, "PLAIN")
    target = np.random.default_rng(9).integers(logits.shape[1], size=logits.shape[:1] + logits.shape[2:])
    logits = logits / logits.dtype.type(16)  # all about as far from the maximum as the runner-up
    np.put_along_axis(logits, np.expand_dims(target, 1), np.asarray(30, logits.dtype), 1)
    if variant == "GENERAL":
        target = (np.arange(logits.shape[1]) == target[..., None]).astype(np.float32)
        target = np.ascontiguousarray(np.moveaxis(target, -1, 1))
    return logits, target, {"axis": 1, "reduction": "none", "validate": False}, chip


@pytest.mark.full(but_one_per="dtype")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["PLAIN", "GENERAL"])
@pytest.mark.parametrize(
    "family",
    [
        "TINY",
        "TINY four vectors",
        "COLUMNS",
        "COLUMNS 8 warps",
        "COLUMNS stream",
        "WARP 4 lanes",
        "WARP 8 lanes",
        "BLOCK",
        "BLOCK 2 blocks",
        "STREAM",
        "STREAM 8 blocks",
    ],
)
def test_confident_rows(family, variant, dtype):
    logits, target, options, chip = confident(family, dtype, variant)
    loss, grad = cross_entropy_value_and_grad(logits, target, engine=emulated.engine(chip=chip), **options)
    assert_confident(loss, grad, truth_of(logits, target, options), exact=False)


@pytest.mark.full(but_one_per="classes")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [(600, 70), (300, 300), (80, 2500), (20, 9000)])
def test_rows_around_the_threshold(rows, classes, dtype):
    """A thousand rows whose largest logit, anywhere in the row, has a probability near 1/2: below, above and at it."""
    rng = np.random.default_rng([classes, *dtype.encode()])
    x = rng.standard_normal((rows, classes))
    place, shift = rng.integers(classes, size=rows), rng.choice([0, 0, 3, -40], rows)
    np.put_along_axis(x, place[:, None], -np.inf, 1)
    rest = np.concatenate(
        [np.full(rows // 4, 1.0), 1 + rng.uniform(-1, 1, rows // 4) * 1e-6, rng.random(rows // 2) * 2]
    )
    top = np.log(np.exp(x).sum(1)) - np.log(rest)
    np.put_along_axis(x, place[:, None], top[:, None], 1)
    x = (x + shift[:, None]).astype(DTYPES[dtype])
    target = np.where(rng.random(rows) < 0.5, place, rng.integers(classes, size=rows))
    options = {"reduction": "none", "validate": False}
    truth = truth_of(x, target, options)
    engine = emulated.engine()
    loss, grad = cross_entropy_value_and_grad(x, target, engine=engine, **options)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    for name, value in {"z_loss": 1e-3, "label_smoothing": 0.1}.items():
        more = options | {name: value}
        both = cross_entropy_value_and_grad(x, target, engine=engine, **more)
        assert_loss(both[0], truth_of(x, target, more))
        assert_grad(both[1], truth_of(x, target, more))
    found = x.astype(np.float64).argmax(1)
    mine = (np.partition(x.astype(np.float64), -2, axis=1)[:, -2] < x.astype(np.float64).max(1)) & (found == target)
    mine &= np.exp(-truth.loss.astype(np.float64)) > 0.5
    assert mine.sum() > rows // 10
    assert_confident(loss[mine], grad[mine], truth_of(x[mine], target[mine], options), exact=False)


# Row lengths of every kind: one access of 2 to 16 bytes; odd numbers of words, of word pairs, of vectors; even numbers.
OF_EVERY_KIND = (1, 2, 3, 4, 5, 7, 8, 10, 12, 16, 20, 21, 24, 31, 32, 33, 40, 63, 64)


@pytest.mark.full(but_one_per="dtype")
@pytest.mark.parametrize(
    ("dtype", "classes"),
    [
        (dtype, classes)
        for dtype, classes in itertools.product(DTYPES, OF_EVERY_KIND[::-1])
        if classes * np.dtype(DTYPES[dtype]).itemsize <= cuda.TINY_BYTES
    ],
)
def test_few_classes_wherever_arrays_start(dtype, classes):
    """Logits, gradient and a distribution 16-byte aligned or not; and rows whose sum without the maximum is near 1."""
    dtype_ = np.dtype(DTYPES[dtype])
    rng = np.random.default_rng(classes)
    rows = 75
    engine = emulated.engine(mode="check", order=ORDERS[classes % 4], seed=classes)

    def placed(values, off):
        room = np.empty(values.size + off, values.dtype)
        room[off:] = values.ravel()
        return room[off:].reshape(values.shape)

    x = rng.standard_normal((rows, classes)) * 2
    x[: rows // 2, 0] = 2 + np.log(max(1, classes)) + rng.normal(0, 0.02, rows // 2)  # p of the maximum is near 1/2
    x[5], x[6, :] = 1, -np.inf
    x[7, classes // 2], x[8, classes // 2] = np.nan, np.inf
    y = rng.integers(-1, classes + 1, rows)
    y[:5] = 0
    q = rng.random((rows, classes))
    for off, to in ((0, 0), (1, 1), (0, 1), (1, 0)):
        logits = placed(x.astype(dtype_), off)
        for target, options in (
            (y, {"ignore_index": -1}),
            (placed(q.astype(dtype_), to), {}),
            (placed(q.astype(np.float32), to), {"weight": rng.random(classes)}),
            (placed(np.repeat(q, 2, 1).astype(np.float32), to)[:, ::2], {}),
        ):
            options = {"reduction": "none", "validate": False, **options}
            truth = truth_of(logits, target, options)
            out = placed(np.zeros_like(logits), to)
            loss, grad = cross_entropy_value_and_grad(logits, target, engine=engine, out=out, **options)
            assert_loss(loss, truth)
            assert_grad(grad, truth)
        same = placed(logits, off)
        options = {"reduction": "none", "validate": False, "ignore_index": -1}
        truth = truth_of(logits, y, options)
        loss, _ = cross_entropy_value_and_grad(same, y, engine=engine, out=same, **options)
        assert_loss(loss, truth)
        assert_grad(same, truth)
    assert all(name.startswith("xent_tiny_") for name in engine.launcher.launches)


@pytest.mark.full(but_one_per="variant")
@pytest.mark.parametrize("variant", ["PLAIN", "SMOOTH", "GENERAL", "CAPPED"])
@pytest.mark.parametrize("family", ["COLUMNS", "COLUMNS 24 classes", "COLUMNS 8 warps", "COLUMNS stream"])
def test_rows_whose_maximum_has_about_half(family, variant):
    """On both sides of rest = 1, with the maximum and its rest in any thread."""
    logits, target, options, chip, *_ = problem(family, "float32", variant)
    rng, classes = np.random.default_rng(10), logits.shape[1]
    rest = rng.choice([0.9, 1 - 1e-6, 1, 1 + 1e-6, 1.1], (len(logits), 1, logits.shape[2]))
    some = rng.random(logits.shape) < rng.choice([0.1, 0.9], rest.shape)
    some[:, :2] = True
    top = np.where(rng.random(rest.shape) < 0.5, 0, rng.integers(classes, size=rest.shape))
    np.put_along_axis(some, top, False, 1)
    logits[...] = np.where(some, np.log(rest / some.sum(1, keepdims=True)), -90)
    np.put_along_axis(logits, top, 0, 1)
    if target.ndim < 3:
        target = np.where(rng.random(target.shape) < 0.5, top[:, 0], target)
    check(emulated.engine(chip=chip, jobs=cuda.JOBS[:-1]), logits, target, options)


def vast(family, variant):
    """A problem with rows whose gradients are products that overflow, among ordinary rows."""
    logits, target, options, *_ = problem(family, "float32", variant)
    rng = np.random.default_rng(11)
    logits[...] = rng.uniform(-85, -50, logits.shape)
    np.put_along_axis(logits, rng.integers(logits.shape[1], size=logits[:, :1].shape), 5, 1)
    heavy = rng.choice(np.float32([1, 1, 1, 1e30]), logits.shape[:1] + logits.shape[2:])
    return logits, target, {**options, "reduction": "none", "z_loss": 1e10, "sample_weight": heavy}


@pytest.mark.full(but_one_per="variant")
@pytest.mark.parametrize("variant", ["PLAIN", "SMOOTH", "GENERAL"])
@pytest.mark.parametrize("family", ["COLUMNS", "COLUMNS 8 warps", "COLUMNS stream"])
def test_products_beyond_the_range(family, variant):
    """Also in place, where the thread that writes a lane's rows is the one that reads them."""
    check(emulated.engine(mode="check", jobs=cuda.JOBS[:-1]), *vast(family, variant))


@pytest.mark.full(but_one_per="family")
@pytest.mark.parametrize("variant", ["SOFT", "GENERAL"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if word(family) != "TINY" or "two" in family])
def test_a_share_beyond_the_range(family, variant):
    """z-loss cancels most of a share that overflows, so that the rest is in range, and coef never left it."""
    logits, _, _, chip, *_ = problem(family, "float32", variant)
    logits[...] = -100
    logits[:, :2] = -10
    target = np.zeros(logits.shape, np.float32)
    target[:, 0] = 2.0**29
    z_loss = 2.0**26 / (10 - np.log(2))
    options = {"axis": 1, "reduction": "none", "validate": False, "z_loss": z_loss, "grad_output": 2.0**99}
    if variant == "GENERAL":
        options["weight"] = np.ones(logits.shape[1], np.float32)
    truth = truth_of(logits, target, options)
    assert np.isfinite(truth.grad).all()
    engine = emulated.engine(chip=chip)
    assert_grad(cross_entropy_value_and_grad(logits, target, engine=engine, **options)[1], truth)


@pytest.mark.full(but_one_per="classes")
@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("classes", [5, 40, 300])
def test_neighbouring_rows_are_read_by_what_both_ends_allow(classes, start):
    """Unaligned logits and gradients, and odd extents: a wide access would fail in ASan, and on a GPU."""
    rng = np.random.default_rng(start)
    for inner, width in ((8, 4), (10, 2), (9, 1)):
        room = rng.standard_normal(start + 2 * classes * inner).astype(np.float32)
        logits = room[start:].reshape(2, classes, inner)
        least = min(width, 4 if start == 0 else start & -start)
        assert cuda._width(logits) == least
        elsewhere = np.zeros(1 + logits.size, np.float32)[1:].reshape(logits.shape)
        assert cuda._width(logits, elsewhere) == 1
        target = rng.integers(classes, size=(2, inner))
        options = {"axis": 1, "reduction": "none", "validate": False}
        truth = truth_of(logits, target, options)
        engine = emulated.engine(mode="check")
        for out in (None, elsewhere, logits):
            loss, grad = cross_entropy_value_and_grad(logits, target, engine=engine, out=out, **options)
            assert_loss(loss, truth)
            assert_grad(grad, truth)
    every_other = np.zeros((2, classes, 16), np.float32)[..., ::2]
    assert cuda._width(every_other) == 1


LABELS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("dtype", LABELS)
def test_labels_of_every_integer_dtype_are_read_as_they_are(dtype):
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((40, 100), dtype=np.float32)
    target = rng.integers(100, size=(40, 2)).astype(dtype)[:, 0]  # every second label: strided
    target[0] = np.iinfo(dtype).max  # not a class
    target[1] = np.iinfo(dtype).min if dtype[0] == "i" else 7  # not a class, or ignored
    options = {"reduction": "none", "validate": False, "ignore_index": 7}
    loss, grad = cross_entropy_value_and_grad(logits, target, engine=emulated.engine(mode="check"), **options)
    truth = truth_of(logits, target, options)
    assert np.isnan(loss[0])
    assert_loss(loss, truth)
    assert_grad(grad, truth)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_and_its_logarithm(dtype, monkeypatch):
    from xent_array import log_softmax, logsumexp, softmax

    for name in list(ENGINES):
        monkeypatch.delitem(ENGINES, name)
    monkeypatch.setitem(ENGINES, "cuda", emulated.engine(mode="check"))
    for family in ("TINY", "COLUMNS", "COLUMNS 8 warps", "COLUMNS stream", "WARP 32 lanes", "BLOCK"):
        logits, *_ = problem(family, dtype, "PLAIN")
        wide = logits.astype(np.float64)
        lse = np.log(np.exp(wide).sum(axis=1, keepdims=True))
        step = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 3e-6, "float64": 1e-14}[dtype]
        np.testing.assert_allclose(softmax(logits, axis=1).astype(np.float64), np.exp(wide - lse), rtol=step, atol=1e-7)
        np.testing.assert_allclose(log_softmax(logits, axis=1).astype(np.float64), wide - lse, rtol=step, atol=step)
        np.testing.assert_allclose(logsumexp(logits, axis=1), lse[:, 0], rtol=1e-5)
    assert len(ENGINES["cuda"].launcher.launches) == 18


def test_launches(compiled):
    """One for losses per row, three for a mean that must count its rows, none without rows."""
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((9, 100), dtype=np.float32), rng.integers(100, size=9)

    def launched(**options):
        engine = emulated.engine()
        cross_entropy_value_and_grad(x, y, engine=engine, **{"validate": False, **options})
        both = len(engine.launcher.launches)
        cross_entropy(x, y, engine=engine, **{"validate": False, **options})
        return both, len(engine.launcher.launches) - both

    assert launched(reduction="none") == (1, 1)
    assert launched(reduction="none", sample_weight=np.ones(9), weight=np.ones(100)) == (1, 1)
    assert launched(reduction="sum") == (2, 2)
    assert launched() == (3, 2)
    assert launched(validate=True) == (2, 2)  # no label is ignored, and none is bad
    engine = emulated.engine()
    loss, grad = cross_entropy_value_and_grad(x[:0], y[:0], engine=engine, reduction="none", validate=False)
    assert (loss.shape, grad.shape, engine.launcher.launches) == ((0,), (0, 100), [])
    assert np.isnan(cross_entropy(x[:0], y[:0], engine=engine, validate=False))
    assert cross_entropy(x[:0], y[:0], engine=engine, reduction="sum", validate=False) == 0


class Watched:
    """A namespace that records which of its functions are used."""

    def __init__(self, xp):
        self.xp, self.asked, self.__name__ = xp, [], xp.__name__

    def __getattr__(self, name):
        found = getattr(self.xp, name)
        if callable(found) and not isinstance(found, type):
            self.asked.append(name)
        return found


def denominators(d):
    """The same number in every form it may have: from the host, or where the logits are."""
    return {"number": d, "float64": np.array(d), "float32": np.array(d, np.float32)}


@pytest.mark.full(but_one_per="kind")
@pytest.mark.parametrize("upstream", [None, 3.0, np.array(3.0, np.float32)], ids=["none", "number", "array"])
@pytest.mark.parametrize("kind", denominators(1.0))
@pytest.mark.parametrize("options", ["ignored", "weights", "distributions"])
def test_the_mean_divides_by_the_denominator_of_the_caller(options, kind, upstream):
    """Nothing is counted, and nothing on the device is read by the host."""
    rng = np.random.default_rng(8)
    x, y = rng.standard_normal((9, 100), dtype=np.float32), rng.integers(100, size=9)
    y[::3] = -100
    more = {"weight": rng.random(100), "sample_weight": rng.random(9)} if options == "weights" else {}
    if options == "distributions":
        y = rng.random(x.shape, dtype=np.float32)
    d = 36.5
    given = {**DEFAULTS, **more}
    truth = truth_of(x, y, {**more, "reduction": "sum"}, grad_output=(3.0 if upstream is not None else 1.0) / d)
    truth = dataclasses.replace(truth, loss=truth.loss / d, unit_loss=truth.unit_loss / d)
    launched = {}

    def ask(name, *arguments):
        engine = emulated.engine(mode="check")
        rows = _problem.problem_of(x, y, Asked(engine=engine, **given)).rows
        rows = rows._replace(denominator=denominators(d)[kind], upstream=upstream)  # as from a device: not read
        found = getattr(_engines, name)(engine, rows, *arguments)
        launched[name] = len(engine.launcher.launches)
        return found

    assert_loss(ask("loss")[()], truth)
    assert_loss(ask("stats_and_loss")[1][()], truth)
    for loss, grad, *_ in (ask("loss_and_grad", None), ask("loss_grad_and_stats", None)):
        assert_loss(loss[()], truth)
        assert_grad(grad[:, :, 0], truth)
    both = 2 if kind == "number" and not isinstance(upstream, np.ndarray) else 3
    assert launched == {"loss": 2, "stats_and_loss": 2, "loss_and_grad": both, "loss_grad_and_stats": both}


@pytest.mark.parametrize("kind", denominators(1.0))
def test_a_denominator_of_0(kind):
    x, y = np.zeros((3, 5), np.float32), np.array([1, -100, 2])
    engine = emulated.engine(mode="check")
    rows = _problem.problem_of(x, y, Asked(engine=engine, **DEFAULTS)).rows
    loss, grad = _engines.loss_and_grad(engine, rows._replace(denominator=denominators(0.0)[kind]), None)
    assert np.isnan(loss)
    assert np.isnan(grad[[0, 2]]).all()
    assert (grad[1] == 0).all()


CALLS = {  # (function of (logits, target, gradient, engine, options), launches for "none", "sum", "mean")
    "cross_entropy": (lambda x, y, out, o: cross_entropy(x, y, **o), 1, 2, 2),
    "cross_entropy_value_and_grad": (lambda x, y, out, o: cross_entropy_value_and_grad(x, y, out=out, **o), 1, 2, 3),
    "cross_entropy_grad": (lambda x, y, out, o: cross_entropy_grad(x, y, out=out, **o), 1, 1, 2),
    "all three": (
        lambda x, y, out, o: all_three(o["engine"], x, y, {k: v for k, v in o.items() if k != "engine"}, out),
        1,
        2,
        3,
    ),
    "forward": (lambda x, y, out, o: CrossEntropyLoss(**o).forward(x, y), 1, 2, 2),
    "row_stats": (lambda x, y, out, o: row_stats(x, y, **{k: v for k, v in o.items() if k != "reduction"}), 1, 1, 1),
}


@pytest.mark.full(but_one_per="call")
@pytest.mark.parametrize("rows", ["few", "many", "very many"])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_few_launches_and_nothing_else(call, axis, rows, monkeypatch):
    """The array library is asked for nothing that could launch, copy or wait: only views and uninitialised arrays."""
    if rows != "few":
        monkeypatch.setattr(cuda, "SUM_ALONE", 50)
    if rows == "very many":
        monkeypatch.setattr(cuda, "SUM_TOGETHER", 50)
    watched = Watched(np)
    monkeypatch.setattr(_problem, "namespace", lambda array: watched)
    rng = np.random.default_rng(7)
    shape, row_shape = ((60, 6), (60,)) if axis == -1 else ((3, 6, 20), (3, 20))
    x, y = rng.standard_normal(shape, dtype=np.float32), rng.integers(-1, 6, row_shape)
    weights = {"weight": rng.random(6, dtype=np.float32), "sample_weight": rng.random(row_shape, dtype=np.float32)}
    function, *wanted = CALLS[call]
    for options in ({}, weights, weights | {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 9.0}):
        for reduction, launches in zip(("none", "sum", "mean"), wanted, strict=True):
            engine = emulated.engine()
            monkeypatch.setattr(engine.launcher, "declines", lambda rows: None)
            watched.asked.clear()
            given = {"axis": axis, "reduction": reduction, "engine": engine, "ignore_index": -1, **options}
            function(x, y, np.empty_like(x), given)
            counted_before = reduction == "mean" and ("grad" in call or call == "all three")
            assert len(engine.launcher.launches) == launches + (counted_before and rows == "very many")
            assert set(watched.asked) <= {"reshape", "permute_dims", "finfo", "astype"}
            assert engine.launcher.copies == 0
            # an array that has the right dtype already is not converted
            assert watched.asked.count("astype") <= len(options)


def test_a_known_divisor_costs_no_launch(monkeypatch):
    """For any number of rows: one for the rows, one for the sum of their losses."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((60, 6), dtype=np.float32)
    for alone in (cuda.SUM_ALONE, 50):
        monkeypatch.setattr(cuda, "SUM_ALONE", alone)
        monkeypatch.setattr(cuda, "SUM_TOGETHER", alone)
        for y, options in (
            (rng.random((60, 6), dtype=np.float32), {}),
            (rng.integers(6, size=60), {"denominator": 7.0, "validate": False}),
            (rng.integers(6, size=60), {"validate": True}),
        ):
            for function in (cross_entropy, cross_entropy_value_and_grad, cross_entropy_grad):
                engine = emulated.engine()
                function(x, y, engine=engine, **options)
                assert len(engine.launcher.launches) == (1 if function is cross_entropy_grad else 2)


@pytest.mark.parametrize("off", [0, 1])
@pytest.mark.parametrize("classes", [40, 256, 3000])
def test_class_weights_wherever_they_start(classes, off):
    """An access of 16 bytes that is not aligned would be an error, on a GPU as well."""
    rng = np.random.default_rng(13)
    x, y = rng.standard_normal((5, classes), dtype=np.float32), rng.integers(classes, size=5)
    options = {"label_smoothing": 0.1, "validate": False}
    for apart in (1, 2):  # a copy is made of those that lie apart
        weight = rng.random(off + apart * classes, np.float32)[off::apart]
        truth = truth_of(x, y, {**options, "weight": weight})
        loss, grad = cross_entropy_value_and_grad(x, y, engine=emulated.engine(mode="check"), weight=weight, **options)
        assert_loss(loss, truth)
        assert_grad(grad, truth)


SPACED = {  # strides of logits of 3 × 5 × 8 × 9, the axis of the classes, the resulting `inner`
    "classes last": (lambda x: x, -1, 1),
    "classes first in memory": (lambda x: np.ascontiguousarray(x.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0), -1, 1),
    "classes last in memory": (lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2), 1, 1),
    "classes first": (lambda x: x, 0, 1),
    "classes between": (lambda x: x, 1, 72),
    "every other row": (lambda x: np.repeat(x, 2, 2)[:, :, ::2], -1, 1),
}


@pytest.mark.parametrize("grad", ["new", "out", "in place"])
@pytest.mark.parametrize("how", SPACED)
def test_rows_that_are_evenly_spaced_are_one_axis(how, grad, monkeypatch):
    """Evenly spaced in all arrays, so that kernels need no division; and the result is correct."""
    place, axis, inner = SPACED[how]
    rng = np.random.default_rng(11)
    x = place(rng.standard_normal((3, 5, 8, 9), dtype=np.float32))
    y = rng.integers(x.shape[axis], size=np.delete(x.shape, axis))
    arguments = []
    real = cuda._packed
    monkeypatch.setattr(cuda, "_packed", lambda argument: (arguments.append(argument), real(argument))[1])
    truth = truth_of(x, y, {"axis": axis})
    out = {"new": None, "out": np.empty_like(x), "in place": x}[grad]
    loss, got = cross_entropy_value_and_grad(x, y, axis=axis, engine=emulated.engine(mode="check"), out=out)
    assert_loss(loss, truth)
    assert_grad(got, truth)
    assert [(type(a).__name__, a.inner) for a in arguments] == [("Sum", 1), ("Problem", inner), ("Sum", 1)]


def test_rows_are_one_axis_only_where_they_are_evenly_spaced_in_every_array():
    """As an engine may be given them, whatever the public functions do with axes."""
    rng = np.random.default_rng(12)
    dense = rng.standard_normal((6, 4, 5), dtype=np.float32).transpose(0, 2, 1)  # outer, class, inner
    apart = np.tile(dense.transpose(0, 2, 1), (1, 2, 1))[:, :4].transpose(0, 2, 1)  # a gap after every 4 rows
    labels, spread = rng.integers(5, size=(6, 4)), np.tile(rng.integers(5, size=(6, 4)), 2)[:, :4]
    for logits, target, grad, inner in (
        (dense, labels, np.empty_like(dense), 1),
        (apart, labels, np.empty_like(dense), 4),
        (dense, spread, np.empty_like(dense), 4),
        (dense, labels, np.empty((6, 8, 5), np.float32)[:, :4].transpose(0, 2, 1), 4),
    ):
        assert cuda._steps(6, 4, logits, grad, target)[0] == inner
        engine = emulated.engine(mode="check")
        losses, got = engine.loss_and_grad(Rows(np, logits, np.dtype("float32"), target), grad)
        truth = truth_of(logits, target, {"axis": 1, "reduction": "none"})
        assert_loss(losses, truth)
        assert_grad(got, truth)


ARGUMENTS = [
    ("problem.cuh", cuda.Problem), ("sums.cu", cuda.Sum),
    ("slices.cu", device.Say), ("slices.cu", device.Slices), ("slices.cu", device.Total),
]  # fmt: skip


@pytest.mark.parametrize(("file", "python"), ARGUMENTS, ids=lambda value: getattr(value, "__name__", value))
def test_an_argument_is_the_same_in_python_and_in_cuda(file, python):
    name = python.__name__
    text = re.search(rf"struct {name} {{\n(.*?)\n}};", (cuda._kernels.folder() / file).read_text("utf-8"), re.DOTALL)[1]
    found = {}
    text = re.sub(r"//.*|.*typedef.*|Problem<A> rows;", "", text).replace(
        "alignas(8) A", "i64"
    )  # a word of which it uses some bits
    for kind, fields in re.findall(r"((?:const )?\w+) ?([^;]+);", text):
        for field in fields.split(","):
            found[field.strip(" *")] = "pointer" if "*" in field or kind.endswith("*") else kind
    kinds = {int: "i64", float: "double"}
    fields = {field: kinds.get(kind, "pointer") for field, kind in get_type_hints(python).items()}
    assert list(found.items()) == list(fields.items())


@pytest.mark.parametrize("order", [ORDERS[0], *(pytest.param(o, marks=pytest.mark.full) for o in ORDERS[1:])])
@pytest.mark.parametrize("how", ["by a cluster", "by blocks apart", "where there are no clusters"])
def test_sums_over_many_rows(how, order, monkeypatch):
    """When more than one block sums and counts: by messages, or by partial sums, with or without a ticket."""
    if how == "by blocks apart":
        monkeypatch.setattr(cuda, "SUM_TOGETHER", cuda.SUM_ALONE)
    chip = 80 if how == "where there are no clusters" else 90
    monkeypatch.setattr(cuda, "COUNT_ALONE", cuda.SUM_ALONE)
    rng = np.random.default_rng(4)
    n = cuda.SUM_ALONE + 1000
    x, y = rng.standard_normal((n, 3), dtype=np.float32), rng.integers(-1, 3, size=n)
    options = {"ignore_index": -1, "weight": np.array([0.5, 1, 2]), "sample_weight": rng.random(n), "validate": False}
    engine = emulated.engine(order=order, seed=1, chip=chip)
    loss, grad = cross_entropy_value_and_grad(x, y, engine=engine, grad_output=3.0, **options)
    truth = truth_of(x, y, options, grad_output=3.0)
    assert_loss(loss, truth)
    assert_grad(grad, truth)
    again, _ = cross_entropy_value_and_grad(x, y, engine=emulated.engine(chip=chip), grad_output=3.0, **options)
    assert loss.tobytes() == again.tobytes()


@pytest.mark.parametrize(("classes", "layout"), [(300, "rows"), (2100, "rows"), (10, "rows"), (40, "columns")])
def test_rows_more_than_2_31_elements_apart(classes, layout):
    """A sparse mapping: only the pages of two rows are touched."""
    apart = (1 << 31) + 4
    memory = mmap.mmap(-1, 4 * (apart + 65536), flags=SPARSE)
    flat = np.frombuffer(memory, np.float32)
    rng = np.random.default_rng(5)
    if layout == "rows":
        x = np.lib.stride_tricks.as_strided(flat, (2, classes), (4 * apart, 4))
        y = rng.integers(classes, size=2)
    else:
        x = np.lib.stride_tricks.as_strided(flat, (2, classes, 9), (4 * apart, 36, 4))
        y = rng.integers(classes, size=(2, 9))
    x[...] = rng.standard_normal(x.shape, dtype=np.float32)
    options = {"axis": 1, "reduction": "none", "validate": False}
    truth = truth_of(x, y, options)
    loss, grad = cross_entropy_value_and_grad(x, y, engine=emulated.engine(), out=x, **options)
    assert_loss(loss, truth)
    assert_grad(grad.copy(), truth)


def test_what_it_declines():
    rows = Rows(np, np.zeros((2, 3, 1), np.float32), np.dtype("float32"))
    assert "takes CuPy arrays, and these are of numpy" in ENGINES["cuda"].declines(rows)
    assert emulated.engine().declines(rows) is None
    assert "7.5" in emulated.engine(chip=70).declines(rows)
    wide = np.broadcast_to(np.float32(0), (1, 1 << 31, 1))
    assert "2^31" in emulated.engine().declines(rows._replace(logits=wide))


# Planted bugs: (file, correct source text, what replaces it, case, variant). Each must be caught.
BUGS = {
    # rows.cu: WARP
    "WARP: a row past the last": (
        "rows.cu",
        "const bool exists = !LANES || mine < p.rows;",
        "const bool exists = true;",
        "WARP 8 lanes",
        "PLAIN",
    ),
    "WARP: a lane leaves before the shuffles": (
        "rows.cu",
        "    const bool needed = exists &&",
        "    if (!exists) return;\n    const bool needed = exists &&",
        "WARP 8 lanes",
        "PLAIN",
    ),
    "WARP: one vector too many": (
        "rows.cu",
        "first + j * STEP < vectors ? ld16",
        "first + j * STEP <= vectors ? ld16",
        "WARP 8 lanes",
        "PLAIN",
    ),
    "WARP: one element of the tail too many": (
        "numbers.cuh",
        "tail = count - head - vectors * Vector<T>::SIZE;",
        "tail = count - head - vectors * Vector<T>::SIZE + 1;",
        "WARP 32 lanes",
        "PLAIN",
    ),
    "WARP: the tail is forgotten": (
        "rows.cu",
        "place < cut.head + cut.tail ?",
        "place < cut.head ?",
        "WARP 32 lanes",
        "PLAIN",
    ),
    "WARP: the head is skipped": (
        "numbers.cuh",
        "head = before < count ? before : count;",
        "head = 0 * before;",
        "WARP 32 lanes",
        "PLAIN",
    ),
    "WARP: rows of a warp are mixed": (
        "rows.cu",
        "part = merge_lanes<WIDTH, VARIANT>(part, leader);",
        "part = merge_lanes<32, VARIANT>(part, leader);",
        "WARP 8 lanes",
        "GENERAL",
    ),
    "WARP: every lane leads": (
        "rows.cu",
        "lanes_sum<WIDTH>(lane == static_cast<u32>(leader) ?",
        "lanes_sum<WIDTH>(part.max == max ?",
        "WARP the same everywhere",
        "PLAIN",
    ),
    "WARP: the maximum's own 1 is in rest": (
        "rows.cu",
        "whole.sum + (whole.top - 1)",
        "whole.sum + whole.top",
        "WARP 8 lanes",
        "PLAIN",
    ),
    "WARP: a confident row keeps the rest that has cancelled": (
        "rows.cu",
        "if (confident) stats.rest = rest;",
        "",
        "WARP 8 lanes confident",
        "PLAIN",
    ),
    "WARP: the maximum is among the others": (
        "rows.cu",
        "if (kept[i] < most) sum += kept[i];",
        "sum += kept[i];",
        "WARP 8 lanes confident",
        "PLAIN",
    ),
    "WARP: a tie of the maximum is forgotten": (
        "rows.cu",
        "(others + static_cast<A>(ties - 1))",
        "others",
        "WARP 8 lanes alike",
        "PLAIN",
    ),
    "WARP: the gradient at the maximum cancels": (
        "rows.cu",
        "else if (every_class(VARIANT)) top = k, at_top = x;",
        "",
        "WARP 8 lanes confident",
        "SOFT",
    ),
    "WARP: the gradient at the label has no share of the target": (
        "rows.cu",
        "const int label_here = owner ? row.label : -1;",
        "const int label_here = -1;",
        "WARP 8 lanes",
        "PLAIN",
    ),
    "WARP: an ignored row has a gradient": (
        "rows.cu",
        "if (silent) return held.clear(last);",
        "",
        "WARP 8 lanes ignored NaN",
        "PLAIN",
    ),
    "WARP: an ignored row's last vector is not cleared": (
        "rows.cu",
        "for (int j = 0; j < K && has(j); ++j, to += STEP * SIZE) put",
        "for (int j = 0; j < K - 1 && has(j + 1); ++j, to += STEP * SIZE) put",
        "WARP 8 lanes ignored NaN",
        "PLAIN",
    ),
    "WARP: the gap of smoothing is against 0": (
        "rows.cu",
        "half_gap + half_mass * (",
        "half_gap + 0 * (",
        "WARP 8 lanes",
        "SMOOTH",
    ),
    "WARP: the common factor of the exponentials is forgotten": (
        "rows.cu",
        "sum.sum * sum.powers.correction",
        "sum.sum",
        "WARP large confident",
        "PLAIN",
    ),
    "WARP: exponents beyond 2^31 overflow": (
        "stats.cuh",
        ">= 2147483648.0f ?",
        ">= 1e38f ?",
        "WARP huge",
        "PLAIN",
    ),
    "WARP: products that overflow": (
        "rows.cu",
        "JOB != LOG_SOFTMAX && !answer.products_are_finite()",
        "false",
        "WARP overflow",
        "PLAIN",
    ),
    # rows.cu: BLOCK
    "BLOCK: no barrier between writing parts and reading them": (
        "rows.cu",
        "sync_block();  // the part of every warp",
        "// the part of every warp",
        "BLOCK",
        "PLAIN",
    ),
    "BLOCK: too little shared memory": (
        "rows.cu",
        "XE_SHARED(uint4, parts, LANES ? 1 : 32 * Of::WORDS)",
        "XE_SHARED(uint4, parts, 1)",
        "BLOCK",
        "GENERAL",
    ),
    "BLOCK: parts of warps that do not exist": (
        "rows.cu",
        "if (lane < blockDim.x / 32) {",
        "if (lane <= blockDim.x / 32) {",
        "BLOCK",
        "PLAIN",
    ),
    "BLOCK: the label's owner is another": (
        "rows.cu",
        "turn < STEP * K && turn % STEP == 0",
        "turn < STEP * K && turn % STEP == 1",
        "BLOCK",
        "PLAIN",
    ),
    "BLOCK: padding counts": (
        "rows.cu",
        "if (VARIANT % SLICE != PLAIN && !has(j)) continue;",
        "",
        "BLOCK",
        "CAPPED",
    ),
    "BLOCK: padding counts in the gap of smoothing": (
        "rows.cu",
        "if (VARIANT % SLICE != PLAIN && !has(j)) continue;",
        "",
        "BLOCK",
        "SMOOTH",
    ),
    "BLOCK: nobody waits for the holder": (
        "rows.cu",
        "sync_block();  // the holder has written",
        "// the holder has written",
        "BLOCK confident",
        "PLAIN",
    ),
    "BLOCK: another warp's lane is the holder too": (
        "rows.cu",
        "        holder &= warp == static_cast<u32>(leading);\n",
        "",
        "BLOCK confident",
        "PLAIN",
    ),
    # rows.cu: BLOCK in clusters
    "BLOCK cluster: a message before the mailbox is open": (
        "rows.cu",
        "cluster_wait();  // the mailboxes",
        "// the mailboxes",
        "BLOCK 2 blocks",
        "PLAIN",
    ),
    "BLOCK cluster: nobody waits for the messages": (
        "rows.cu",
        "mbar_wait(arrived, 0);",
        "",
        "BLOCK 2 blocks",
        "PLAIN",
    ),
    "BLOCK cluster: the mailbox expects too little": (
        "rows.cu",
        "mbar_expect(arrived, CLUSTER * WORDS * 16)",
        "mbar_expect(arrived, WORDS * 16)",
        "BLOCK 2 blocks",
        "PLAIN",
    ),
    "BLOCK cluster: all messages in one place": (
        "rows.cu",
        "st_async16(inbox + rank * WORDS + i,",
        "st_async16(inbox + i,",
        "BLOCK 2 blocks",
        "PLAIN",
    ),
    "BLOCK cluster: each block takes the first half": (
        "rows.cu",
        "team.rank * blockDim.x + threadIdx.x",
        "threadIdx.x",
        "BLOCK 2 blocks",
        "PLAIN",
    ),
    "BLOCK cluster: nobody waits for what the holder says": (
        "rows.cu",
        "            mbar_wait(settled, 0);\n            bits.v[0]",
        "            bits.v[0]",
        "BLOCK 2 blocks confident",
        "PLAIN",
    ),
    "BLOCK cluster: the holder of every block speaks": (
        "rows.cu",
        "        holder &= rank == leading % CLUSTER;\n",
        "",
        "BLOCK 2 blocks confident",
        "PLAIN",
    ),
    # rows.cu: STREAM
    "STREAM: the edges count in every piece": (
        "rows.cu",
        "held.template part<false>(held.first == first,",
        "held.template part<false>(true,",
        "STREAM edges",
        "PLAIN",
    ),
    "STREAM: pieces are not merged": (
        "rows.cu",
        "part = merge<VARIANT>(part, piece);",
        "part = piece;",
        "STREAM",
        "PLAIN",
    ),
    "STREAM: pieces are not brought to one maximum": (
        "rows.cu",
        "(low.sum + low.top) * drop(low.max, high.max)",
        "(low.sum + low.top)",
        "STREAM",
        "PLAIN",
    ),
    "STREAM: the first piece has no gradient": (
        "rows.cu",
        "held.first >= first; held.first -= stride",
        "held.first > first; held.first -= stride",
        "STREAM",
        "PLAIN",
    ),
    "STREAM: pieces overlap": (
        "rows.cu",
        "stride = threads * K;",
        "stride = threads * K - 32;",
        "STREAM",
        "GENERAL",
    ),
    "STREAM: the maximum is among the others": (
        "rows.cu",
        "if (its != stats.max) others +=",
        "if (its == its) others +=",
        "STREAM confident",
        "PLAIN",
    ),
    "STREAM: the wrong piece is added up again": (
        "rows.cu",
        "                held.first = highest;",
        "                held.first = first;",
        "STREAM confident",
        "PLAIN",
    ),
    # correct
    "WARP: the last of the largest is correct": (
        "stats.cuh",
        "k < label ? other >= x : other > x",
        "k > label ? other >= x : other > x",
        "WARP few classes ties",
        "PLAIN",
    ),
    "WARP: every one of the largest is correct": (
        "rows.cu",
        "found |= rival.is_beaten_by(x, k);",
        "",
        "WARP 8 lanes ties",
        "PLAIN",
    ),
    "WARP: a label is beaten in another row of the warp": (
        "rows.cu",
        "(ballot(yes) >> group & 0xffffffffu >> (32 - WIDTH)) != 0",
        "ballot(yes) != 0",
        "WARP 8 lanes ties",
        "GENERAL",
    ),
    "WARP: the label is compared after softcap": (
        "rows.cu",
        "rival.x = at_label;",
        "rival.x = has_softcap(VARIANT) ? cap.of(at_label).x : at_label;",
        "WARP 32 lanes ties",
        "CAPPED",
    ),
    "BLOCK: a vote stays in its warp": (
        "rows.cu",
        "yes = any_thread(yes);",
        "yes = any_lane(yes);",
        "BLOCK far ties",
        "PLAIN",
    ),
    "BLOCK: an edge beats nothing": (
        "rows.cu",
        "int at = with_edge ? -EDGES : 0; at < K * SIZE",
        "int at = 0; at < K * SIZE",
        "BLOCK far ties",
        "GENERAL",
    ),
    "BLOCK cluster: a vote stays in its block": (
        "rows.cu",
        "yes = any_lane(ld16(answers",
        "any_lane(ld16(answers",
        "BLOCK 2 blocks far ties",
        "PLAIN",
    ),
    "BLOCK cluster: the message is in the place of another": (
        "rows.cu",
        "st_async16(answers + rank, threadIdx.x",
        "st_async16(answers, threadIdx.x",
        "BLOCK 2 blocks far ties",
        "PLAIN",
    ),
    "STREAM: the last piece decides": (
        "rows.cu",
        "found |= rival.is_beaten_by(x, k);",
        "found = rival.is_beaten_by(x, k);",
        "STREAM ties",
        "PLAIN",
    ),
    "COLUMNS: an ignored row is correct": (
        "stats.cuh",
        "!(p.ignores && row.label + (is_slice(VARIANT) ? p.start : 0) == p.ignore_index)",
        "true",
        "COLUMNS ties",
        "PLAIN",
    ),
    "COLUMNS: a row of NaN is correct": (
        "stats.cuh",
        "!beaten && answer.tail == answer.tail",
        "!beaten",
        "COLUMNS 8 warps NaN",
        "PLAIN",
    ),
    "COLUMNS: the last of a thread's largest is correct": (
        "columns.cu",
        "x[c] == raw[c] ? min(at[c], k)",
        "x[c] == raw[c] ? k",
        "COLUMNS 24 classes ties",
        "PLAIN",
    ),
    "COLUMNS: the last of the warps' largest is correct": (
        "columns.cu",
        "mine == its ? min(first, other.first)",
        "mine == its ? first + other.first - min(first, other.first)",
        "COLUMNS 8 warps ties",
        "GENERAL",
    ),
    "COLUMNS: correct by capped logits": (
        "columns.cu",
        "static constexpr bool RAW = writes_stats(JOB) && has_softcap(VARIANT);",
        "static constexpr bool RAW = false;",
        "COLUMNS stream ties",
        "CAPPED",
    ),
    # stats.cuh
    "0 times infinity": (
        "rows.cu",
        "if (any_target(VARIANT) ? a != 0 && half != 0 : a != 0) half_gap",
        "half_gap",
        "WARP masked",
        "GENERAL",
    ),
    # problem.cuh
    "a bad label is used": (
        "problem.cuh",
        "named_one && static_cast<u64>(named) < static_cast<u64>(is_slice(VARIANT) ? p.vocabulary : p.classes);",
        "named_one;",
        "WARP bad label",
        "PLAIN",
    ),
    "row offsets of 32 bits": (
        "rows.cu",
        "const T* logits = p.logits + (at.o * p.logits_outer",
        "const T* logits = p.logits + static_cast<int>(at.o * p.logits_outer",
        "WARP far",
        "PLAIN",
    ),
    "WARP: every row without options is whole": (
        "lean.cuh",
        "static_cast<int>(p.whole) && weights",
        "weights",
        "WARP ragged",
        "PLAIN",
    ),
    "WARP: rows that count are not read": (
        "problem.cuh",
        "[element] != p.ignore_index;",
        "[element] == p.ignore_index;",
        "WARP 16 lanes",
        "PLAIN",
    ),
    "BLOCK: rows with a weight are not read": (
        "problem.cuh",
        "p.sample_weight[r] == 0) return false;",
        "p.sample_weight[r] != 0) return false;",
        "BLOCK",
        "CAPPED",
    ),
    "WARP: the row after the last is prefetched": (
        "rows.cu",
        "p.ahead != 0 && next < p.rows &&",
        "p.ahead != 0 &&",
        "WARP 16 lanes",
        "PLAIN",
    ),
    "BLOCK: more than the row is prefetched": (
        "rows.cu",
        "min((first + count) * SIZE, static_cast<int>(p.classes))",
        "(first + count) * SIZE",
        "BLOCK no options",
        "PLAIN",
    ),
    "BLOCK: prefetched from where the row begins": (
        "rows.cu",
        "(x + first * SIZE) + 15) / 16 * 16",
        "(x + first * SIZE))",
        "BLOCK",
        "PLAIN",
    ),
    # tiny.cu
    "TINY: rows are read before they are in shared memory": (
        "tiny.cu",
        "sync_warp();  // the rows are in shared",
        "// the rows are in shared",
        "TINY",
        "PLAIN",
    ),
    "TINY: a gradient is stored before it is complete": (
        "tiny.cu",
        "sync_warp();  // the gradients of all rows",
        "// the gradients of all rows",
        "TINY",
        "PLAIN",
    ),
    "TINY: a distribution takes the place of a row not yet read": (
        "tiny.cu",
        "sync_warp();  // all rows have been read, before those of a distribution",
        "// all rows have been read, before those of a distribution",
        "TINY distribution",
        "GENERAL",
    ),
    "TINY: a gradient takes the place of a distribution not yet read": (
        "tiny.cu",
        "sync_warp();  // all rows have been read, before gradients",
        "// all rows have been read, before gradients",
        "TINY distribution",
        "GENERAL",
    ),
    "TINY: a row past the last": ("tiny.cu", "if (at >= here || !thread", "if (!thread", "TINY", "PLAIN"),
    "TINY: a row past the last, in memory": (
        "tiny.cu",
        "if (at >= here || !thread",
        "if (!thread",
        "TINY one access",
        "PLAIN",
    ),
    "TINY: the last warp is full": (
        "tiny.cu",
        "dense && p.rows - first >= 32 * EACH && ",
        "dense && ",
        "TINY two rows no options",
        "PLAIN",
    ),
    "TINY: the rows of a thread have one label": (
        "tiny.cu",
        "rows[n] = Row<T, VARIANT>(p, named[n],",
        "rows[n] = Row<T, VARIANT>(p, named[0],",
        "TINY two rows no options",
        "PLAIN",
    ),
    "TINY: any labels lie side by side": (
        "tiny.cu",
        "p.inner == 1 && p.target_outer == 1 &&",
        "p.inner == 1 &&",
        "TINY two rows strided",
        "PLAIN",
    ),
    "TINY: rows without options are aligned": ("tiny.cu", " && places % 16 == 0;", ";", "TINY off pairs", "PLAIN"),
    "TINY: any labels have 64 bits": (
        "lean.cuh",
        "static_cast<int>(p.kind) == INT64 && static_cast<int>(p.whole)",
        "static_cast<int>(p.whole)",
        "TINY two rows int32",
        "PLAIN",
    ),
    "TINY: weights are no option": (
        "lean.cuh",
        "(p.whole) && weights == 0 &&",
        "(p.whole) &&",
        "TINY two rows weighted",
        "PLAIN",
    ),
    "TINY: z-loss is no option": (
        "lean.cuh",
        "weights == 0 && p.z_loss == 0;",
        "weights == 0;",
        "TINY two rows z-loss",
        "PLAIN",
    ),
    "TINY: the tail is forgotten": (
        "tiny.cu",
        "for (int e = vectors * SIZE + lane; e < here * C; e += 32) tile",
        "for (int e = here * C; e < here * C; e += 32) tile",
        "TINY",
        "PLAIN",
    ),
    "TINY: the gradient's tail is forgotten": (
        "tiny.cu",
        "for (int e = vectors * SIZE + lane; e < here * C; e += 32) to[e]",
        "for (int e = here * C; e < here * C; e += 32) to[e]",
        "TINY",
        "PLAIN",
    ),
    "TINY: any array is on 16 bytes": (
        "tiny.cu",
        "return lies_on(at, 16) ? here * C / SIZE : 0;",
        "return here * C / SIZE;",
        "TINY off 16 bytes",
        "PLAIN",
    ),
    "TINY: any row is on its accesses": (
        "tiny.cu",
        "if (aligned) get(from, x);",
        "if (true) get(from, x);",
        "TINY off direct",
        "PLAIN",
    ),
    "TINY: any gradient is on its accesses": (
        "tiny.cu",
        "NO_OPTIONS || !DIRECT || Of::lies_on(grad, Of::WIDTH);",
        "true;",
        "TINY off direct",
        "PLAIN",
    ),
    "TINY: the next warp's rows": (
        "tiny.cu",
        "const T* const logits = p.logits + first * C;",
        "const T* const logits = p.logits + (first + 32) * C;",
        "TINY",
        "PLAIN",
    ),
    "TINY: vectors go where rows are not": (
        "tiny.cu",
        "return APART == C ? e : e + e / C * SIZE;",
        "return e;",
        "TINY widest",
        "PLAIN",
    ),
    "TINY: vectors are forgotten": (
        "tiny.cu",
        "TURNS = (EACH * BYTES + 15) / 16;",
        "TURNS = EACH * BYTES / 16;",
        "TINY",
        "PLAIN",
    ),
    "TINY: too little shared memory": (
        "tiny.cu",
        "ROOM ? THREADS / 32 * ROOM : 1",
        "ROOM ? THREADS / 32 * ROOM - 2 : 1",
        "TINY widest",
        "PLAIN",
    ),
    "TINY: no room for distributions that are wider than the logits": (
        "tiny.cu",
        "BESIDE = by_class(VARIANT) && !Wide::direct(false) ? Wide::SHARED : 0;",
        "BESIDE = 0;",
        "TINY distribution of float16",
        "GENERAL",
    ),
    "TINY: rows of a distribution are side by side": (
        "tiny.cu",
        "p.target_outer == C * p.inner && (",
        "(",
        "TINY roomy distribution",
        "GENERAL",
    ),
    "TINY: a distribution is not smoothed": (
        "tiny.cu",
        "a[k] = row.each + row.keep * a[k];",
        "a[k] = row.keep * a[k];",
        "TINY distribution",
        "GENERAL",
    ),
    "TINY: the label's own share is forgotten": (
        "tiny.cu",
        "a[k] += k == label ? row.on_label : 0;",
        "",
        "TINY",
        "SMOOTH",
    ),
    "TINY: the maximum is in rest": ("tiny.cu", "else others += e;", "others += e;", "TINY", "PLAIN"),
    "TINY: one of the largest is forgotten": (
        "tiny.cu",
        "+ (ties - 1), stats.gap",
        "+ (ties > 2), stats.gap",
        "TINY ties",
        "PLAIN",
    ),
    "TINY: the maximum cancels": (
        "tiny.cu",
        "others * powers.correction + (ties - 1), stats.gap",
        "(others * powers.correction + ties) - 1, stats.gap",
        "TINY confident",
        "PLAIN",
    ),
    "TINY: the gradient at the maximum cancels": (
        "tiny.cu",
        "answer.confident ? top : -1;",
        "-1;",
        "TINY confident",
        "GENERAL",
    ),
    "TINY: the gradient at the label cancels": (
        "tiny.cu",
        "answer.grad(at.x, row.on_label, at.slope);",
        "(exp_acc(at.x - stats.max) * answer.p_max - 1) * answer.scale;",
        "TINY confident",
        "PLAIN",
    ),
    "TINY: the last of the largest is correct": (
        "tiny.cu",
        "for (int k = C - 1; k >= 0; --k)",
        "for (int k = 0; k < C; ++k)",
        "TINY ties",
        "PLAIN",
    ),
    "TINY: every label is correct": ("tiny.cu", "rival.label != top);", "false);", "TINY ties", "PLAIN"),
    "TINY: an ignored row of NaN has a gradient": (
        "tiny.cu",
        "w[i] = silent ? 0 : w[i];",
        "w[i] = w[i];",
        "TINY ignored",
        "PLAIN",
    ),
    "TINY: the slope of softcap is forgotten": (
        "tiny.cu",
        "has_softcap(VARIANT) ? y * slope[k] : y;",
        "y;",
        "TINY",
        "CAPPED",
    ),
    "TINY: stats of other logits": (
        "tiny.cu",
        "stats.max = JOB == GRAD ? p.max[r] : highest.x;",
        "stats.max = JOB == GRAD ? p.max[0] : highest.x;",
        "TINY stats",
        "PLAIN",
    ),
    # columns.cu, a warp per tile
    "COLUMNS: a row past the last": (
        "columns.cu",
        "const bool exists = mine < p.rows;",
        "const bool exists = true;",
        "COLUMNS",
        "PLAIN",
    ),
    "COLUMNS: a class past the last is read": (
        "columns.cu",
        "if (j * WARPS < left()) v[j].load(from);",
        "if (j * WARPS <= left()) v[j].load(from);",
        "COLUMNS",
        "PLAIN",
    ),
    "COLUMNS: a class past the last is written": (
        "columns.cu",
        "if (!EXACTLY || j * WARPS < left()) f(",
        "if (j * WARPS <= left()) f(",
        "COLUMNS 24 classes",
        "PLAIN",
    ),
    "COLUMNS: padding counts": (
        "columns.cu",
        "each_class<VARIANT % SLICE != PLAIN || writes_stats(JOB)>",
        "each_class<false>",
        "COLUMNS 24 classes",
        "SMOOTH",
    ),
    "COLUMNS: the rows of a lane have one label": (
        "columns.cu",
        "row(p, named[n], weight, upstream);",
        "row(p, named[0], weight, upstream);",
        "COLUMNS",
        "PLAIN",
    ),
    "COLUMNS: the label's logit is its neighbour's": (
        "columns.cu",
        "held.at(max(row.label, 0), c, x_step);",
        "held.at(max(row.label, 0), 0, x_step);",
        "COLUMNS",
        "PLAIN",
    ),
    "COLUMNS: ... of many classes": (
        "columns.cu",
        "held.at(max(row.label, 0), c, x_step);",
        "held.at(max(row.label, 0), 0, x_step);",
        "COLUMNS 24 classes",
        "PLAIN",
    ),
    "COLUMNS: weights are no option": (
        "lean.cuh",
        "(p.whole) && weights == 0 &&",
        "(p.whole) &&",
        "COLUMNS weighted",
        "PLAIN",
    ),
    "COLUMNS: an odd row is cleared with its neighbour": (
        "columns.cu",
        "if constexpr (sizeof(T) == 2) w[c / 2] &= c % 2 ? 0xffffu : 0xffff0000u;",
        "if constexpr (sizeof(T) == 2) w[c / 2] = 0;",
        "COLUMNS float16",
        "PLAIN",
    ),
    "COLUMNS: NaN in a row that does not count": ("columns.cu", "v[j].clear(c);", ";", "COLUMNS ignored NaN", "PLAIN"),
    "COLUMNS: the maximum is in rest": (
        "columns.cu",
        "(any ? ties[c] : 0) - 1",
        "(any ? ties[c] : 0)",
        "COLUMNS",
        "PLAIN",
    ),
    "COLUMNS: the maximum is added and taken out": (
        "columns.cu",
        "if (value == top[c]) ties[c] += 1;",
        "if (false) ties[c] += 1;",
        "COLUMNS confident",
        "PLAIN",
    ),
    "COLUMNS: the maximum of a confident row cancels": (
        "columns.cu",
        "top = answer.confident && !silent ? max : not_a_number<A>();",
        "top = not_a_number<A>();",
        "COLUMNS confident",
        "GENERAL",
    ),
    "COLUMNS: products that overflow": ("columns.cu", "label = EXACT;", ";", "COLUMNS vast", "SMOOTH"),
    "COLUMNS: rows of a lane that needs some of them exactly are left out": (
        "columns.cu",
        "for (int c = 0; c < VEC; ++c) {\n            const A* const from = known",
        "for (int c = 0; c < 1; ++c) {\n            const A* const from = known",
        "COLUMNS vast",
        "PLAIN",
    ),
    # columns.cu, several warps per tile
    "COLUMNS: parts are read before they are written": (
        "columns.cu",
        "sync_block();  // the parts of all warps",
        "// the parts of all warps",
        "COLUMNS 8 warps",
        "PLAIN",
    ),
    "COLUMNS: the board is read before it is written": (
        "columns.cu",
        "if (!ALONE) sync_block();  // what follows of every row",
        "// what follows of every row",
        "COLUMNS 8 warps",
        "PLAIN",
    ),
    "COLUMNS: a lane leaves before the barrier": (
        "columns.cu",
        "if (ALONE && !exists) return;",
        "if (!exists) return;",
        "COLUMNS 8 warps",
        "PLAIN",
    ),
    "COLUMNS: the last warp is left out": (
        "columns.cu",
        "for (int w = 1; w < WARPS; ++w) {",
        "for (int w = 1; w < WARPS - 1; ++w) {",
        "COLUMNS 8 warps",
        "PLAIN",
    ),
    "COLUMNS: too little shared memory": (
        "columns.cu",
        "ALONE || READS_STATS ? 1 : WARPS * P::NUMBERS * ROWS",
        "ALONE || READS_STATS ? 1 : (WARPS - 1) * P::NUMBERS * ROWS",
        "COLUMNS 8 warps",
        "GENERAL",
    ),
    "COLUMNS: rest is not rescaled": (
        "columns.cu",
        "(1 + (high ? other.rest : rest)) * drop",
        "(1 + (high ? other.rest : rest))",
        "COLUMNS 8 warps",
        "PLAIN",
    ),
    "COLUMNS: a logit is read after others have written": (
        "columns.cu",
        "    if (!exists) return;\n    if (!ALONE) {\n",
        "    if (!exists) return;\n    if (finishes && to_acc(*held.x) == 77) return;\n    if (!ALONE) {\n",
        "COLUMNS 8 warps",
        "PLAIN",
    ),
    "COLUMNS: the label's class is written by nobody": (
        "columns.cu",
        "if (label < 0 || label % WARPS != warp) continue;",
        "continue;",
        "COLUMNS 8 warps",
        "PLAIN",
    ),
    "COLUMNS: the label's class is written by every warp": (
        "columns.cu",
        "if (label < 0 || label % WARPS != warp) continue;",
        "if (label < 0) continue;",
        "COLUMNS 8 warps",
        "PLAIN",
    ),
    "COLUMNS: the gap of another maximum": (
        "columns.cu",
        "times(high ? other.mass : mass, half_below(top, low))",
        "0",
        "COLUMNS 8 warps",
        "SMOOTH",
    ),
    # columns.cu, streamed
    "COLUMNS: pieces of a stream are not merged": (
        "columns.cu",
        "part[c].merge(piece[c]);",
        "part[c] = piece[c];",
        "COLUMNS stream",
        "PLAIN",
    ),
    "COLUMNS: the last piece of a stream is lost": (
        "columns.cu",
        "(held.left() - 1) / (WARPS * K) + 1 : 0;",
        "held.left() / (WARPS * K) : 0;",
        "COLUMNS stream",
        "PLAIN",
    ),
    "COLUMNS: the first piece of a stream has no gradient": (
        "columns.cu",
        "for (int n = pieces - 1; n >= 0; --n) {",
        "for (int n = pieces - 1; n > 0; --n) {",
        "COLUMNS stream",
        "PLAIN",
    ),
    "COLUMNS: a stream forgets the mass of its first pieces": (
        "columns.cu",
        "mass += other.mass;",
        "mass = other.mass;",
        "COLUMNS stream",
        "GENERAL",
    ),
    # sums.cu
    "SUMS: no barrier between writing sums and reading them": (
        "sums.cu",
        "sync_block();  // every warp's sums",
        "// every warp's sums",
        "SUMS",
        "PLAIN",
    ),
    "SUMS: no fence before the ticket": (
        "sums.cu",
        "fence_gpu();  // the partials,",
        "// the partials,",
        "SUMS",
        "PLAIN",
    ),
    "SUMS: the ticket is not 0 at the start": ("problem.cuh", "*p.ticket = 0;", ";", "SUMS no bad label", "PLAIN"),
    "SUMS: the sums of blocks, but one": (
        "sums.cu",
        "i64 b = threadIdx.x;",
        "i64 b = threadIdx.x + 1;",
        "SUMS",
        "PLAIN",
    ),
    "SUMS: rows are counted twice": ("sums.cu", "start += AHEAD * step", "start += step", "SUMS one block", "PLAIN"),
    "SUMS: the last but one block sums": ("sums.cu", "== gridDim.x - 1", "== gridDim.x - 2", "SUMS", "PLAIN"),
    "SUMS: a row past the last": (
        "sums.cu",
        "if (r >= p.rows) break;",
        "if (r > p.rows) break;",
        "SUMS one block",
        "PLAIN",
    ),
    "SUMS cluster: nobody waits for the messages": ("sums.cu", "mbar_wait(arrived, 0);", "", "SUMS cluster", "PLAIN"),
    "SUMS cluster: messages before there is a mailbox": (
        "sums.cu",
        "cluster_wait();  // the",
        "// the",
        "SUMS cluster",
        "PLAIN",
    ),
    "SUMS cluster: the sums of blocks, but one": (
        "sums.cu",
        "int b = 0; b < CLUSTER",
        "int b = 1; b < CLUSTER",
        "SUMS cluster",
        "PLAIN",
    ),
    "SUMS: the labels of a row further on": (
        "sums.cu",
        "labels_at(p.target, start * p.target_outer, step",
        "labels_at(p.target, start * p.target_outer, 1 + step",
        "SUMS whole turns",
        "PLAIN",
    ),
    "SUMS: bad labels count": (
        "sums.cu",
        "if (label[u] < 0 || label[u] >= p.classes) continue;",
        ";",
        "SUMS",
        "PLAIN",
    ),
}


def buggy(family, variant):
    """The problem of a planted bug: a case, possibly followed by words that change it."""
    if family in ("SUMS", "SUMS no bad label", "SUMS one block", "SUMS whole turns", "SUMS cluster"):
        rng = np.random.default_rng(6)
        n = 8192 if family == "SUMS whole turns" else 1077
        options = {"ignore_index": -1, "weight": rng.random(3), "validate": False}
        return (
            rng.standard_normal((n, 3), dtype=np.float32),
            rng.integers(-1 if family == "SUMS no bad label" else -2, 3, size=n),
            options,
            90,
        )
    if family == "WARP large confident":
        x = np.float32(1000) + np.random.default_rng(9).integers(0, 4, (5, 200)).astype(np.float32)
        x[:, 100] += 15
        return x, np.full(5, 100), {"reduction": "none", "validate": False}, 90
    if family == "WARP huge":
        x = np.full((4, 200), -3.3e38, np.float32)
        x[1:, ::2] = [[-3e38], [5e9], [3.3e38]]
        return x, np.arange(4), {"reduction": "none", "validate": False}, 90
    if family == "WARP overflow":
        x = np.zeros((4, 200), np.float32)
        x[:, 7] = 80
        options = {"weight": np.full(200, 1e20), "grad_output": np.full(4, 1e25, np.float32)}
        return x, np.arange(4), {"reduction": "none", "validate": False, **options}, 90
    if family.startswith("TINY") and family.endswith(" confident"):
        return confident(family.removesuffix(" confident"), "float32", variant)
    if family.startswith(("TINY distribution", "TINY roomy distribution")):
        rng = np.random.default_rng(7)
        logits = rng.standard_normal((77, 21)).astype(np.float16 if "float16" in family else np.float32)
        target = rng.random((77, 24), dtype=np.float32)[:, :21]
        target = target if "roomy" in family else np.ascontiguousarray(target)
        return logits, target, {"label_smoothing": 0.1, "reduction": "sum", "validate": False}, 90
    if family == "TINY off pairs":
        logits = np.ones(150 * 2 + 1, np.float32)[1:].reshape(150, 2)
        return logits, np.arange(150) % 2, {"reduction": "sum", "validate": False}, 90
    if family == "TINY off direct":
        logits = np.ones(4 * 40 + 1, np.float32)[1:].reshape(40, 4)
        return logits, np.arange(40) % 4, {"reduction": "sum", "validate": False}, 90
    if family == "TINY ignored":
        logits = np.zeros((40, 6), np.float32)
        logits[::3] = np.nan
        target = np.where(np.arange(40) % 3, 1, -100)
        return logits, target, {"reduction": "sum", "validate": False}, 90
    if family == "WARP the same everywhere":
        return np.zeros((4, 200), np.float32), np.arange(4), {"reduction": "none", "validate": False}, 90
    if family == "WARP masked":
        x = np.zeros((4, 60), np.float32)
        x[:, ::2] = -np.inf
        return x, np.eye(60, dtype=np.float32)[[1, 3, 5, 7]], {"validate": False}, 90
    if family == "WARP bad label":
        return (
            np.zeros((4, 60), np.float32),
            np.array([1, 1 << 40, -7, 60]),
            {"reduction": "none", "validate": False},
            90,
        )
    if family == "WARP ragged":
        x = np.random.default_rng(8).standard_normal((9, 203), dtype=np.float32)
        return x, np.arange(9), {"reduction": "none", "validate": False}, 90
    if family == "WARP far":
        apart = (1 << 31) + 4
        memory = mmap.mmap(-1, 4 * (apart + 65536), flags=SPARSE)
        x = np.lib.stride_tricks.as_strided(np.frombuffer(memory, np.float32), (2, 300), (4 * apart, 4))
        x[...] = 1
        return x, np.array([1, 2]), {"reduction": "none", "validate": False}, 90
    if family.endswith(" far ties"):  # ties: the first element, an edge, and the label near the end
        logits, target, options, chip, *_ = problem(family.removesuffix(" far ties"), "float32", variant)
        logits[...] = 0
        logits[:, [0, -9]] = 1
        return logits, np.full(len(logits), logits.shape[1] - 9), options, chip
    for kind in (" no options", " int32", " strided", " z-loss", " weighted"):
        if family.endswith(kind):
            logits, target, options, chip, *_ = no_options(family.removesuffix(kind), "float32")
            target = {" int32": target.astype(np.int32), " strided": np.repeat(target, 2)[::2]}.get(kind, target)
            options |= {" z-loss": {"z_loss": 0.5}, " weighted": {"weight": np.arange(logits.shape[1]) + 2.0}}.get(
                kind, {}
            )
            return logits, target, options, chip
    if family.endswith(" float16"):
        logits, target, options, chip, *_ = problem(family.removesuffix(" float16"), "float16", variant)
        return logits, target, options, chip
    if family.endswith(" ignored NaN"):
        logits, target, options, chip, *_ = problem(family.removesuffix(" ignored NaN"), "float32", variant)
        return np.where((target == -100)[:, None], np.float32(np.nan), logits), target, options, chip
    if family.endswith(" vast"):
        logits, target, options = vast(family.removesuffix(" vast"), variant)
        return logits, target, options, 90
    if family.startswith("COLUMNS") and family.endswith(" confident"):
        return confident(family.removesuffix(" confident"), "float32", variant)
    if family.endswith(" confident"):  # the maximum is in the middle of the row, at the label
        logits, target, options, chip, *_ = problem(family.removesuffix(" confident"), "float32", variant)
        logits[:, logits.shape[1] // 2] = 30
        options = {"axis": 1, "reduction": "none", "validate": False}
        target = np.full(len(logits), logits.shape[1] // 2)
        if variant == "SOFT":
            target = np.eye(logits.shape[1], dtype=logits.dtype)[target]
        return logits, target, options, chip
    if family.endswith(" alike"):
        *_, chip, chosen, _ = problem(family.removesuffix(" alike"), "float32", variant)
        return *alike(chosen.classes, np.float32), {"reduction": "none", "validate": False}, chip
    if family.endswith(" ties"):
        return tied(family.removesuffix(" ties"), "float32", variant, 0)
    if family.endswith(" NaN"):
        logits, target, options, chip = tied(family.removesuffix(" NaN"), "float32", variant, 0)
        logits[:, 0] = np.nan
        return logits, np.maximum(target, 1), options, chip
    logits, target, options, chip, *_ = problem(
        family.removesuffix(" edges").removesuffix(" stats"), "float32", variant
    )
    if family == "STREAM edges":
        logits[:, 0] = 12
    return logits, target, options, chip


@pytest.mark.full
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, monkeypatch):
    file, old, new, family, variant = BUGS[bug]
    if family in ("SUMS", "SUMS no bad label", "SUMS cluster"):  # fewer rows count as many
        monkeypatch.setattr(cuda, "SUM_ALONE", 1000)
    if family in ("SUMS", "SUMS no bad label"):
        monkeypatch.setattr(cuda, "SUM_TOGETHER", 1000)
    tally.COUNTS["planted"] += 1
    logits, target, options, chip = buggy(family, variant)
    mode = "plain" if family == "WARP far" else "check"
    truth = truth_of(logits, target, options)
    caught = []
    for order, seed in (("fifo", 0), ("priority", 1), ("priority", 2), ("lifo", 0)):
        engine = emulated.engine(mode=mode, order=order, seed=seed, chip=chip, patches=[(old, new)])
        out = logits.copy() if family != "WARP 8 lanes" else logits
        try:
            buffer = (in_place_of(logits) if " off " in family else out.copy("K")) if family != "WARP far" else None
            loss, grad = cross_entropy_value_and_grad(logits, target, engine=engine, out=buffer, **options)
            assert_loss(loss, truth)
            assert_grad(grad, truth)
            if family.endswith(" confident"):
                assert_confident(loss, grad, truth, exact=False)
            if family.endswith(" stats"):
                given = {k: v for k, v in options.items() if k != "reduction"}
                stats = row_stats(logits, target, engine=engine, **given)
                assert_grad(cross_entropy_grad(logits, target, engine=engine, stats=stats, **options), truth)
            if family.endswith((" ties", " NaN")) and target.ndim < logits.ndim:
                in_place = in_place_of(logits)
                stats = all_three(engine, in_place, target, options, in_place)[2]
                assert_correct(stats, correct_rows(logits, target, options, truth))
            elif buffer is not None:
                cross_entropy_value_and_grad(buffer_of(logits, buffer), target, engine=engine, out=buffer, **options)
        except (simt.SimtError, AssertionError) as error:
            caught.append(error)
            break
    assert caught, f"{bug}: nobody noticed"
    tally.COUNTS["caught"] += 1
    assert old in (cuda._kernels.folder() / file).read_text(encoding="utf-8")


def buffer_of(logits, buffer):
    """`buffer` filled with the logits, for a gradient in place."""
    buffer[...] = logits
    return buffer


def test_every_family_has_its_bugs():
    count = {
        family: sum(name.startswith((f"{family}:", f"{family} cluster:")) for name in BUGS)
        for family in {*cuda.FAMILIES, "SUMS"} - {"SPLIT"}  # see test_parts.py
    }
    assert min(count.values()) >= 3, count
