"""The launch plan, a property over random shapes: it covers every row, fits the chip, moves what the formula says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        "width": st.sampled_from([1, 2, 4]),
    }
)


@given(problems)
def test_every_logit_of_every_row_has_a_thread(problem):
    p = cuda.plan(**problem)
    size = cuda.DTYPES[p.dtype][1]
    assert (p.blocks // p.cluster) * p.rows_per_block >= p.rows > (p.blocks // p.cluster - 1) * p.rows_per_block
    if p.family in "WB":
        threads = p.lanes or p.threads * p.cluster
        assert threads * p.vectors * 16 >= p.classes * size  # however the row is cut, its vectors have room
    if p.family == "P":
        assert p.stream or p.lanes * p.vectors >= p.classes
        assert p.width <= (problem["width"] if problem["layout"] == "columns" else 1)
        assert p.width * size <= 16
        assert p.threads // 32 % p.lanes == 0  # whole tiles


@given(problems)
def test_the_launch_is_one_that_the_chip_takes(problem):
    p = cuda.plan(**problem)
    assert p.threads % 32 == 0
    assert 32 <= p.threads <= p.bound[0] <= 1024
    assert p.bound[0] * p.bound[1] <= (1024 if p.chip == 75 else 2048)
    assert p.blocks % p.cluster == 0
    assert p.cluster == 1 or (p.chip >= 90 and p.cluster in (2, 4, 8) and p.family in "BO")
    assert p.shared <= 48 << 10
    assert (p.shared > 0) <= (p.family in "TP")


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
        assert 0 <= p.bytes(job) - arrays * p.rows * p.classes * size <= p.rows * (9 + numbers * max(4, size))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("variant", cuda.VARIANTS)
def test_the_catalogue_has_every_kernel_of_a_random_plan(chip, variant):
    known = set(cuda.catalogue(chip, variant))
    rng = np.random.default_rng(chip)
    for _ in range(300):
        dtype, layout = rng.choice(list(cuda.DTYPES)), rng.choice(["flat", "rows", "columns"])
        classes, job, width = int(2 ** rng.uniform(0, 22)), str(rng.choice(cuda.JOBS[:-1])), int(rng.choice([1, 2, 4]))
        options = {"layout": str(layout), "variant": variant, "writes": cuda.writes_grad(job), "width": width}
        assert cuda.plan(1, classes, str(dtype), chip, **options).kernel(job) in known


@given(problems)
def test_what_may_be_read_at_once_changes_no_sum(problem):
    """Which classes a thread adds up, in which order, and how threads share a row."""
    wide, narrow = (cuda.plan(**{**problem, "width": width}) for width in (4, 1))
    assert (wide.family, wide.lanes, wide.cluster, wide.stream) == (
        narrow.family, narrow.lanes, narrow.cluster, narrow.stream,
    )  # fmt: skip
    assert wide.vectors == narrow.vectors or not wide.stream


def test_rows_of_a_vocabulary_are_read_once_where_there_are_clusters():
    for classes in (32_000, 50_257, 128_256, 151_936, 262_144):
        assert cuda.plan(4096, classes, "bfloat16", 90).family == "B"
    assert cuda.plan(4096, 1 << 20, "bfloat16", 90).stream


@pytest.mark.parametrize(
    "shape", ["4096x50257:bf16@sm90", "128x10:fp32", "32768x1000:float16@sm80", "8x1000000:fp64@sm75"]
)
def test_explain(shape):
    text = cuda.explain(shape)
    rows, _, rest = shape.partition("x")
    assert f"{rows} rows of {rest.partition(':')[0]}" in text
    assert "at least" in text
    assert text.isascii()  # where the output goes has an encoding that may have no µ


@pytest.mark.parametrize("shape", ["", "3x4", "3x0:fp32", "3x4:int8", "3x4:fp32@sm70", "x4:fp32"])
def test_explain_says_what_it_takes(shape):
    with pytest.raises(ValueError, match=r"is not like 4096x50257:bf16@sm90|the oldest chip is sm75"):
        cuda.explain(shape)
