"""The plan of linear cross-entropy: it covers the logits and fits the budget, or says what it needs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xent_array import __main__ as program
from xent_array._linear import plan as planning
from xent_array._linear.plan import MIB, Sizes, bytes_of, needed, plan, shown

lengths = st.integers(0, 1 << 20) | st.integers(0, 300)
sizes = st.builds(
    lambda dtype, narrow, **rest: Sizes(item=dtype // (1 + narrow), acc=dtype, **rest),
    dtype=st.sampled_from([4, 8]),
    narrow=st.booleans(),
    rows=lengths,
    features=lengths,
    classes=lengths.map(lambda count: count + 1),
    wants_hidden=st.booleans(),
    wants_weight=st.booleans(),
    adds=st.booleans(),
    copies_hidden=st.booleans(),
    copies_weight=st.booleans(),
    scatters=st.booleans(),
    target=st.sampled_from([0, 1, 4, 8]),
    temporaries=st.sampled_from([0, 10]),
    of_slices=st.sampled_from([0, 10]),
)
budgets = st.integers(0, 35).flatmap(lambda power: st.integers(1 << power, 2 << power))


@given(sizes, budgets)
def test_a_plan_fits_or_says_what_it_needs(sizes, budget):
    if budget < needed(sizes):
        with pytest.raises(ValueError, match=rf"at least {needed(sizes)} bytes .* got {budget} bytes"):
            plan(sizes, budget)
        return
    found = plan(sizes, budget)
    assert found.needs == sum(found.buffers.values()) <= budget
    assert found.chunks * found.rows >= sizes.rows > (found.chunks - 1) * found.rows or sizes.rows == 0
    assert found.blocks * found.classes >= sizes.classes > (found.blocks - 1) * found.classes
    assert found.rows >= min(sizes.rows, planning.LEAST_ROWS) or found.chunks * found.rows - sizes.rows < found.chunks
    assert found.classes >= min(sizes.classes, planning.LEAST_ROWS)
    wanted = sizes.wants_hidden + sizes.wants_weight
    assert 1 + wanted <= found.products <= 1 + wanted + (wanted if found.blocks > 1 else 0)


@given(sizes, budgets)
def test_a_larger_budget_is_never_slower(sizes, budget):
    if budget >= needed(sizes):
        costs = [planning._cost(plan(sizes, factor * budget))[0] for factor in (1, 2)]
        assert costs[1] <= 1.02 * costs[0]  # the scratch grows too, and chunks are made even


@given(sizes)
def test_everything_at_once_where_there_is_room(sizes):
    found = plan(sizes, 1 << 62)
    assert (found.chunks, found.blocks) == (1, 1)


def test_the_problem_of_the_readme():
    found = plan(Sizes(8192, 512, 50257, 4, 4), 64 * MIB)
    assert found.blocks == 1
    assert found.rows >= 256
    assert found.products == 3
    assert found.needs <= 64 * MIB


def test_slices_of_the_classes_where_few_rows_would_fit():
    found = plan(Sizes(8192, 2304, 256000, 4, 4), 64 * MIB)
    assert found.products == 4
    assert min(found.rows, found.classes) >= 256


def test_sums_of_16_bits():
    """Of one gradient if there is room for those, of none if there is not."""
    narrow = Sizes(8192, 2304, 256000, 2, 4, adds=True, copies_hidden=True, copies_weight=True)
    assert (plan(narrow, 256 * MIB).products, plan(narrow, 64 * MIB).products) == (4, 5)


@pytest.mark.parametrize(
    ("text", "count"),
    [("64MB", 64_000_000), ("64 MiB", 64 << 20), ("1.5GiB", 3 << 29), ("10b", 10), ("2kib", 2048), ("7", None),
     ("MB", None), ("-1MB", None), ("64 apples", None)],
)  # fmt: skip
def test_bytes_of_text(text, count):
    assert bytes_of(text) == count


def test_shown():
    assert [shown(size) for size in (7, 1536, 64 * MIB, 3 << 29)] == ["7 bytes", "1.5 KiB", "64.0 MiB", "1.5 GiB"]


def test_explain(capsys):
    assert program.main(["--explain-linear", "8192x512x50257:float32"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("8192 rows of 512 features, 50257 classes, float32; NumPy arrays on a CPU\n")
    found = plan(Sizes(8192, 512, 50257, 4, 4), 64 * MIB)
    assert f"{found.chunks} × {found.rows} rows, 1 × 50257 classes at a time; 3 products" in said
    assert f"{shown(found.needs)}, of a budget of 64.0 MiB\n" in said
    assert program.main(["--explain-linear", "100x1000x7:bfloat16@1MB+loss+gpu"]) == 0
    assert "CuPy arrays on a GPU" in capsys.readouterr().out
    for wrong in ("8192x512", "8192x512x50257:int8", "8192x512x50257:float32@64parrots", "1x1x0:float32"):
        with pytest.raises(SystemExit, match=r"^2$"):
            program.main(["--explain-linear", wrong])
        assert repr(wrong) in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^2$"):
        program.main(["--explain-linear", "8192x512x50257:float32@1kB"])
    assert "memory_budget must be at least" in capsys.readouterr().err
