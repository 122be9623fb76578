"""The kernels on a slice of the classes: what they say of it merges with other slices to what whole rows have."""

import dataclasses
import shutil

import numpy as np
import pytest
from support import emulated, simt
from support.simt.build import ORDERS
from test_kernels import (
    CASES,
    DTYPES,
    FAMILIES,
    assert_correct,
    assert_grad,
    assert_loss,
    in_place_of,
    mode_of,
    plans,
    problem,
    truth_of,
)

from xent_array import cross_entropy_grad, merge_stats, row_stats
from xent_array._engines import cpu, cuda

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")

LEFT, RIGHT = 3, 2  # classes of other slices, before and after


class Slice:
    """An engine for a slice of the classes."""

    def __init__(self, engine, start, vocabulary):
        self.engine, self.slice = engine, (start, vocabulary)

    def __getattr__(self, name):
        return getattr(self.engine, name)


def sliced(family, dtype, variant, kind=""):
    """(logits of the slice, those of all classes, target, options, chip); `kind`: what is special about the rows."""
    here, target, options, chip, *_ = problem(family, dtype, variant)
    rng = np.random.default_rng([*family.encode(), *variant.encode()])
    shape = [*here.shape]
    if kind == "confident":
        here[...] /= here.dtype.type(16)
        here[:, here.shape[1] // 2] = 20
        options |= {"z_loss": 0.0}
    if kind == "ignored class":
        here[:, here.shape[1] // 2] = 20  # so that it would be correct
    rest = [(rng.standard_normal([shape[0], n, *shape[2:]]) * 3).astype(here.dtype) for n in (LEFT, RIGHT)]
    whole = np.concatenate([rest[0], here, rest[1]], axis=1)
    classes, rows = whole.shape[1], whole.shape[:1] + whole.shape[2:]
    options["weight"] = rng.random(classes) * 2 if "weight" in options else None
    if target.ndim == whole.ndim:
        soft = rng.random(whole.shape)
        target = (soft / soft.sum(axis=1, keepdims=True)).astype(target.dtype)
    else:
        target = rng.integers(classes, size=rows)
        target.flat[::3] = rng.integers(LEFT, size=target.flat[::3].shape)  # many labels elsewhere
        target.flat[0] = classes - 1
        target.flat[1::5] = -100
        target.flat[2::7] = [classes, -3, classes + 5][target.size % 3]
        if target.size < 8:  # elsewhere, here, ignored
            target.flat[...] = [classes - 1, LEFT + shape[1] // 3, -100, 0, LEFT, -3, classes][: target.size]
        if kind == "confident":
            target.flat[3::4] = LEFT + shape[1] // 2
        if kind == "ignored class":  # its number is that of a class, here and where the slice begins with 0
            options["ignore_index"] = LEFT + shape[1] // 2
            target.flat[3::4] = LEFT + shape[1] // 2
    return here, whole, target, options, chip


def of_slice(target, whole, start, stop):
    return np.ascontiguousarray(target[:, start:stop]) if target.ndim == whole.ndim else target


def stats_of_slices(here, whole, target, options, engine):
    """The stats of three slices, of which the kernels read the second."""
    given = {name: value for name, value in options.items() if name != "reduction"}
    classes = whole.shape[1]
    parts = []
    for start, stop in ((0, LEFT), (LEFT, classes - RIGHT), (classes - RIGHT, classes)):
        which = engine if start == LEFT else cpu.numpy_engine
        x = here if start == LEFT else np.ascontiguousarray(whole[:, start:stop])
        on = Slice(which, start, classes)
        parts.append(row_stats(x, of_slice(target, whole, start, stop), engine=on, **given))
    return merge_stats(*parts)


def check(here, whole, target, options, engine):
    classes = whole.shape[1]
    truth = truth_of(whole, target, options)
    stats = stats_of_slices(here, whole, target, options, engine)
    plain = {name: options[name] for name in ("axis", "weight", "label_smoothing", "softcap") if name in options}
    rows = truth_of(whole, target, plain | {"reduction": "none"})
    if target.ndim < whole.ndim:
        good = (target >= 0) & (target < classes)
        ignored = target == options.get("ignore_index", -100)
        assert np.isnan(stats.loss[~good & ~ignored]).all()
        counts = good & ~ignored
        found = whole.astype(np.float64).argmax(1) == target
        assert_correct(stats, counts & found & ~np.isnan(rows.lse))
    else:
        counts = np.ones(stats.loss.shape, bool)
    only = dataclasses.replace(rows, loss=rows.loss[counts], unit_loss=rows.unit_loss[counts])
    assert_loss(stats.loss[counts], only)
    part = slice(LEFT, classes - RIGHT)
    truth = dataclasses.replace(truth, grad=truth.grad[:, part], unit_grad=truth.unit_grad[:, part])
    on = Slice(engine, LEFT, classes)
    given = of_slice(target, whole, LEFT, classes - RIGHT)
    assert_grad(cross_entropy_grad(here, given, engine=on, stats=stats, **options), truth)
    in_place = in_place_of(here)
    assert_grad(cross_entropy_grad(in_place, given, engine=on, stats=stats, out=in_place, **options), truth)


@pytest.mark.full(but_one_per="family")
@pytest.mark.parametrize(("family", "dtype", "variant"), CASES)
def test_a_slice(family, dtype, variant):
    number = CASES.index((family, dtype, variant))
    here, whole, target, options, chip = sliced(family, dtype, variant)
    engine = emulated.engine(
        mode=mode_of(family, dtype), order=ORDERS[number % 4], seed=number, chip=chip, jobs=cuda.OF_SLICES
    )
    check(here, whole, target, options, engine)
    over_rows = [name for name in engine.launcher.launches if "_sums_" not in name]
    assert over_rows
    assert all("_slice_" in name for name in over_rows)
    assert {name.split("_")[1].upper() for name in over_rows} >= {plans(family, dtype, variant)["STATS", True].family}


@pytest.mark.full(but_one_per="kind")
@pytest.mark.parametrize("kind", ["confident", "ignored class"])
@pytest.mark.parametrize("variant", [variant for variant in cuda.VARIANTS if variant != "SOFT"])
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in ("TINY two rows", "TINY one access")]
)
def test_special_rows_of_a_slice(family, variant, kind):
    here, whole, target, options, chip = sliced(family, "float32", variant, kind)
    check(here, whole, target, options, emulated.engine(chip=chip, jobs=cuda.OF_SLICES))


def test_a_slice_without_classes():
    """Nothing is launched, and its stats change nothing."""
    x, y = np.random.default_rng(0).standard_normal((7, 5), dtype=np.float32), np.array([0, 1, 2, 3, 4, -100, 9])
    engine = emulated.engine()
    for start in (0, 3, 5):
        none = row_stats(x[:, :0], y, engine=Slice(engine, start, 5), validate=False)
        whole = row_stats(x, y, engine="numpy", validate=False)
        for parts in ((none, whole), (whole, none)):
            for one, other in zip(merge_stats(*parts), whole, strict=True):
                np.testing.assert_array_equal(one, other)
        grad = cross_entropy_grad(x[:, :0], y, engine=Slice(engine, start, 5), stats=whole, validate=False)
        assert grad.shape == (7, 0)
    assert engine.launcher.launches == []


# (file, correct source text, what replaces it, case, variant, kind). Each must be caught.
BUGS = {
    "labels are those of the slice": (
        "problem.cuh", "(is_slice(VARIANT) ? static_cast<u64>(p.start) : 0)", "0", "BLOCK", "PLAIN", ""),
    "a label elsewhere is no class": (
        "problem.cuh", "static_cast<u64>(is_slice(VARIANT) ? p.vocabulary : p.classes)", "static_cast<u64>(p.classes)",
        "WARP 8 lanes", "PLAIN", ""),
    "a label elsewhere is here": (
        "problem.cuh", "const bool here = found && !elsewhere;", "const bool here = found;", "TINY", "PLAIN", ""),
    "a label elsewhere has mass here": (
        "problem.cuh", "on_label = !here ? 0", "on_label = !found ? 0", "WARP 8 lanes", "PLAIN", ""),
    "smoothing counts only where the label is": (
        "stats.cuh", "(row.label >= 0 || (VARIANT >= SLICE && row.elsewhere))", "row.label >= 0",
        "WARP 8 lanes", "SMOOTH", ""),
    "the gap of smoothing only where the label is": (
        "rows.cu", "row.label < 0 && (VARIANT < SLICE || !row.elsewhere)\n", "row.label < 0\n",
        "WARP 8 lanes", "SMOOTH", ""),
    "the same of classes that lie apart": (
        "columns.cu", "!every_class(VARIANT) || row.label >= 0 || (VARIANT >= SLICE && row.elsewhere)",
        "!every_class(VARIANT) || row.label >= 0", "COLUMNS 8 warps", "SMOOTH", ""),
    "the mass is that of the slice": (
        "stats.cuh", "if (VARIANT < SLICE || !given) {", "{", "BLOCK", "PLAIN", ""),
    "few classes: the mass of no row": (
        "tiny.cu", "if (by_class(VARIANT) || is_slice(VARIANT)) stats.mass", "if (by_class(VARIANT)) stats.mass",
        "TINY", "PLAIN", ""),
    "classes that lie apart: the mass of no row": (
        "columns.cu", "if (by_class(VARIANT) || is_slice(VARIANT)) stats.mass", "if (by_class(VARIANT)) stats.mass",
        "COLUMNS", "PLAIN", ""),
    "the ignored class is that of the slice": (
        "stats.cuh", "row.label + (is_slice(VARIANT) ? p.start : 0) == p.ignore_index", "row.label == p.ignore_index",
        "COLUMNS 24 classes", "PLAIN", "ignored class"),
    "parts are merged as those of whole rows": (
        "merge.cu", "XE_MERGE_VARIANT(name, T, GENERAL_SLICE)", "XE_MERGE_VARIANT(name, T, GENERAL)",
        "SPLIT of an older chip", "PLAIN", ""),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    file, old, new, family, variant, kind = BUGS[bug]
    assert (cuda._kernels.folder() / file).read_text(encoding="utf-8").count(old) == 1
    here, whole, target, options, chip = sliced(family, "float32", variant, kind)
    check(here, whole, target, options, emulated.engine(chip=chip))
    with pytest.raises((AssertionError, simt.SimtError)):
        check(here, whole, target, options, emulated.engine(mode="check", chip=chip, patches=[(old, new)]))


def test_every_dtype_is_met():
    assert {dtype for _, dtype, _ in CASES} == set(DTYPES)
