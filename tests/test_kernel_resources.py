"""The kernels as NVRTC compiles them, on a machine without a GPU: all of them are held against a table, many anew."""

import itertools
import json
import re
import sys
from types import SimpleNamespace

import kernel_resources
import pytest
import tally
from simt import nvrtc

from xent_array import _kernels
from xent_array._engines import cuda

ABOUT, ROWS = nvrtc.read(kernel_resources.TABLE)
ITEMS = list(kernel_resources.work())


def parameters(row):
    """(vectors, lanes, cluster, stream) of a kernel of rows.cu, from its name."""
    found = re.search(r"_(\d+)_(\d+)_(\d+)_(true|false)_\d+_\d+$", row["kernel"])
    return int(found[1]), int(found[2]), int(found[3]), found[4] == "true"


def test_the_table_has_every_kernel_and_is_of_this_code():
    tally.COUNTS["table"] = len(ROWS)
    assert {(row["file"], row["kernel"], row["chip"]) for row in ROWS} == {(i.file, i.kernel, i.chip) for i in ITEMS}
    assert len(ROWS) == len(ITEMS)
    assert ABOUT["digest"] == kernel_resources.digest(), "python tests/kernel_resources.py --write"


def test_the_matrix_is_whole():
    """Every family × dtype × job without options on seven chips; with options, on two, but for logarithms."""
    families, dtypes = "TPWBO", ("f16", "bf16", "float", "double")
    have = {(i.family, i.dtype, i.job, i.variant, i.chip) for i in ITEMS if i.family != "D"}
    chips = [f"sm_{chip}" for chip in kernel_resources.PLAIN_CHIPS]
    wanted = set(itertools.product(families, dtypes, cuda.JOBS, ["PLAIN"], chips))
    wanted |= set(itertools.product(families, dtypes, cuda.JOBS[:-1], ["GENERAL", "CAPPED"], ["sm_80", "sm_90"]))
    assert have == wanted
    assert {(i.dtype, i.chip) for i in ITEMS if i.family == "D"} == set(itertools.product(["float", "double"], chips))


def test_what_is_compiled_anew_meets_every_part_of_the_matrix():
    chosen = kernel_resources.some(ITEMS)
    for parts in kernel_resources.MET:
        met, all_ = ({tuple(getattr(i, part) for part in parts.split()) for i in of} for of in (chosen, ITEMS))
        assert met == all_, parts


def assert_no_spills(rows):
    for row in rows:
        if row["chip"] == "sm_90" and "_double" not in row["kernel"]:
            assert (row["spill_stores"], row["spill_loads"]) == (0, 0), row


def test_nothing_spills_where_it_matters():
    assert_no_spills(ROWS)
    assert max(row["spill_stores"] for row in ROWS) <= 32


def test_rows_are_read_and_written_in_16_bytes():
    """K wide loads and K wide stores per thread, and loads again where a row is streamed or read for its logarithm."""
    for row in ROWS:
        if row["file"] != "rows.cu":
            continue
        vectors, lanes, _, stream = parameters(row)
        job = re.search("loss_and_grad|log_softmax|grad|loss|stats", row["kernel"])[0]
        passes = (
            2 if (stream and job in ("loss_and_grad", "log_softmax")) or (job == "log_softmax" and not lanes) else 1
        )
        assert row["loads128"] == passes * vectors, row
        assert row["stores128"] == (vectors if job not in ("loss", "stats") else 0), row


def test_tiny_rows_are_copied_in_16_bytes():
    for row in ROWS:
        if row["file"] == "tiny.cu":
            assert row["loads128"] >= 1, row
            writes = re.search("_grad_|_log_softmax_", row["kernel"]) is not None
            assert (row["stores128"] > 0) == writes, row


@pytest.mark.full
@pytest.mark.skipif(nvrtc.missing() is not None, reason=f"kernels cannot be compiled here: {nvrtc.missing()}")
def test_kernels_compile_as_the_table_says():
    chosen = kernel_resources.some(ITEMS)
    rows = kernel_resources.compiled(chosen)
    tally.COUNTS["compiled"] += len(rows)
    assert {(row["kernel"], row["chip"]) for row in rows} == {(i.kernel, i.chip) for i in chosen}
    assert_no_spills(rows)
    if nvrtc.version() != ABOUT["nvrtc"]:
        version = ABOUT["nvrtc"]
        pytest.skip(f"{len(rows)} kernels compile; the table is by NVRTC {version}, this is {nvrtc.version()}")
    names = {(row["file"], row["kernel"], row["chip"]) for row in rows}
    committed = [row for row in ROWS if (row["file"], row["kernel"], row["chip"]) in names]
    assert nvrtc.differences(committed, rows) == []


def test_a_text_is_complete_and_names_one_kernel():
    for kernel in list(cuda.catalogue(90, "PLAIN"))[::20]:
        assert "#include" not in kernel.text
        assert kernel.text.count(kernel.name) == 1
        assert json.dumps(kernel.line).count(kernel.name) == 1
    assert _kernels.source("rows.cu").count("struct Problem") == 1


@pytest.mark.parametrize(
    ("runtime", "driver", "advice"),
    [
        (13020, 13000, "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime, or xent_array[cuda13]"),
        (12090, 13000, "pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12, or xent_array[cuda12]"),
        (13020, 12080, "install cupy-cuda12x instead"),
        (13020, 0, "no NVIDIA driver"),
    ],
    ids=["CUDA 13", "CUDA 12", "an older driver", "no driver"],
)
def test_where_nothing_compiles_it_is_said_what_to_install(monkeypatch, runtime, driver, advice):
    def fails():
        raise OSError("libnvrtc is not there")

    class Kernel:
        def __init__(self, text, name):
            self.compile = fails

    versions = SimpleNamespace(runtimeGetVersion=lambda: runtime, driverGetVersion=lambda: driver)
    compiler = SimpleNamespace(CompileException=type("CompileException", (Exception,), {}))
    fake = SimpleNamespace(RawKernel=Kernel, cuda=SimpleNamespace(runtime=versions, compiler=compiler))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    with pytest.raises(RuntimeError, match=f"{re.escape(advice)}.*libnvrtc is not there"):
        _kernels.compiled.__wrapped__(next(cuda.catalogue(90, "PLAIN")), 0)
