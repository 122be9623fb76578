"""Properties of the launch plan, over random shapes: it covers every row, fits the chip, moves the expected bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import assert_it_covers, assert_it_fits

from xent_array._engines import cuda

CHIPS = (75, 80, 86, 89, 90, 100, 120)
problems = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 1 << 40),
        "classes": st.one_of(st.integers(1, 300), st.integers(1, 300_000), st.integers(1, (1 << 31) - 1)),
        "dtype": st.sampled_from(list(cuda.DTYPES)),
        "chip": st.sampled_from(CHIPS),
        "layout": st.sampled_from(["flat", "rows", "columns"]),
        "variant": st.sampled_from(cuda.VARIANTS),
        "job": st.sampled_from(cuda.JOBS[:-1]),
        "access": st.sampled_from([1, 2, 4]),
    }
)


@given(problems)
def test_every_logit_of_every_row_has_a_thread(problem):
    p = cuda.plan(**problem)
    assert_it_covers(p)
    assert p.width <= {"COLUMNS": problem["access"], "TINY": 2}.get(p.family, 1)


@given(problems)
def test_the_launch_is_one_that_the_chip_takes(problem):
    assert_it_fits(cuda.plan(**problem))


@given(problems, st.integers(1, 1 << 40))
def test_the_number_of_rows_changes_the_number_of_blocks_only(problem, rows):
    one, other = cuda.plan(**problem), cuda.plan(**{**problem, "rows": rows})
    for field in one.__slots__:
        if field not in ("rows", "blocks"):
            assert getattr(one, field) == getattr(other, field), field
    assert one.kernel("LOSS") == other.kernel("LOSS")


@given(problems)
def test_bytes_are_the_logits_the_gradient_and_little_else(problem):
    p = cuda.plan(**problem)
    size = cuda.DTYPES[p.dtype][1]
    for job, arrays in {"STATS": 1, "LOSS": 1, "GRAD": 2, "LOSS_AND_GRAD": 2, "STATS_AND_GRAD": 2}.items():
        numbers = 5 if job == "STATS_AND_GRAD" else 4
        if p.parts > 1:  # a gradient reads the logits twice; the stats of parts are written and read
            arrays, numbers = arrays + (arrays == 2 and job != "GRAD"), numbers + 8 * p.parts + 4
        assert 0 <= p.bytes(job) - arrays * p.rows * p.classes * size <= p.rows * (18 + numbers * max(4, size))


@pytest.mark.parametrize(
    "chip", [chip if chip in (75, 90) else pytest.param(chip, marks=pytest.mark.full) for chip in CHIPS]
)
def test_the_catalogue_has_every_kernel_of_a_random_plan(chip):
    """Except TINY, which is compiled for each number of classes: here numbers in FEW stand for all of them.

    A plan may choose a more general variant than requested; the kernel is in the catalogue of that variant.
    """
    known = {variant: set(cuda.catalogue(chip, variant)) for variant in cuda.VARIANTS}
    rng = np.random.default_rng(chip)
    met = set()
    for _ in range(2500):
        dtype, layout = str(rng.choice(list(cuda.DTYPES))), str(rng.choice(["flat", "rows", "columns"]))
        classes = int(rng.choice(cuda.FEW) if rng.random() < 0.3 else 2 ** rng.uniform(0, 22))
        variant, job = str(rng.choice(cuda.VARIANTS)), str(rng.choice(cuda.JOBS[:-1]))
        p = cuda.plan(1, classes, dtype, chip, layout=layout, variant=variant, job=job)
        if p.family != "TINY" or classes in cuda.FEW:
            assert set(p.kernels(job)) <= known[p.variant]
            met.add((p.family, p.variant))
    # TINY has three variants, COLUMNS all but SOFT, SPLIT all but SOFT and SMOOTH.
    assert len(met) == 3 + 5 + 4 + 3 * len(cuda.VARIANTS)


def test_rows_of_few_classes_are_one_threads_and_compiled_for_their_number():
    for dtype, (_, itemsize) in cuda.DTYPES.items():
        for variant in cuda.VARIANTS:
            most = min(128 // itemsize, cuda.TINY_CAPPED if "CAPPED" in variant else 64)
            plans = [cuda.plan(1000, c, dtype, variant=variant) for c in range(1, most + 1)]
            assert {p.family for p in plans} == {"TINY"}
            assert len({p.kernel("LOSS") for p in plans}) == len(plans)
            assert cuda.plan(1000, most + 1, dtype, variant=variant).family == "WARP"
            assert cuda.plan(1000, 3, dtype, variant=variant, layout="rows").family == "WARP"
            assert cuda.plan(1000, 3, dtype, variant=variant, layout="columns").family == "COLUMNS"


@given(problems)
def test_what_may_be_read_at_once_changes_no_sum(problem):
    """Which classes a thread sums, in which order, and how threads share a row."""
    wide, narrow = (cuda.plan(**{**problem, "layout": "columns", "access": access}) for access in (4, 1))
    assert (wide.family, wide.lanes, wide.cluster, wide.stream) == (
        narrow.family, narrow.lanes, narrow.cluster, narrow.stream,
    )  # fmt: skip
    assert wide.vectors == narrow.vectors or not wide.stream


def test_rows_of_a_vocabulary_are_read_once_where_there_are_clusters():
    for classes in (32_000, 50_257, 128_256, 151_936, 262_144):
        assert cuda.plan(4096, classes, "bfloat16", 90).family == "BLOCK"
    longer = cuda.plan(4096, 1 << 20, "bfloat16", 90)
    assert [step for step, _ in longer.over_rows("LOSS_AND_GRAD")] == ["STATS", "GRAD"]
    assert [step for step, _ in longer.over_rows("LOG_SOFTMAX")] == ["STATS", "LOG_SOFTMAX"]
    assert longer.over_rows("STATS") == [("STATS", cuda.plan(4096, 1 << 20, "bfloat16", 90, job="STATS"))]
    assert [step for step, _ in longer.over_rows("GRAD")] == ["GRAD"]


def test_the_loss_of_a_few_long_rows_keeps_many_blocks_busy():
    """Even for few rows: 32 of a vocabulary, or a single one."""
    for rows, classes in ((32, 128_256), (8, 262_144), (1, 1 << 27)):
        assert cuda.plan(rows, classes, "bfloat16", 90, job="LOSS").blocks >= 64
        assert cuda.plan(rows, classes, "float32", 90, job="LOSS").blocks >= 64
        assert cuda.plan(rows, classes, "float32", 80, job="LOSS").blocks >= 128
