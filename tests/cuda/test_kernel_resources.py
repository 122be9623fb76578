"""The kernels as NVRTC compiles them, without a GPU: a table of all of them, checked by compiling a sample."""

import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import kernel_resources
import pytest
from support import tally
from support.simt import nvrtc

from xent_array import _kernels
from xent_array._engines import _model, cuda

ABOUT, ROWS = nvrtc.read(kernel_resources.TABLE)
ITEMS = list(kernel_resources.work())


def parameters(row):
    """(vectors, lanes, cluster, stream, even) of a kernel of rows.cu, from its name."""
    found = re.search(r"_(\d+)_(\d+)_(\d+)_(true|false)_(true|false)_\d+_\d+$", row["kernel"])
    return int(found[1]), int(found[2]), int(found[3]), found[4] == "true", found[5] == "true"


def test_the_table_has_every_kernel_and_is_of_this_code():
    tally.COUNTS["table"] = len(ROWS)
    assert {(row["file"], row["kernel"], row["chip"]) for row in ROWS} == {(i.file, i.kernel, i.chip) for i in ITEMS}
    assert len(ROWS) == len(ITEMS)
    assert ABOUT["digest"] == kernel_resources.digest(), "python tests/cuda/kernel_resources.py --write"
    assert all(set(nvrtc.NUMBERS) <= set(row) for row in ROWS), "python tests/cuda/kernel_resources.py --write"


def test_what_ships_is_what_the_table_says_of_one_chip():
    shipped = kernel_resources.counts_file().read_text()
    assert shipped == kernel_resources.counts(ABOUT, ROWS)
    here = {item.kernel for item in ITEMS if item.chip == kernel_resources.SHIPPED}
    assert set(_model.counts()) == {kernel for kernel in here if kernel_resources.is_explained(kernel)}
    assert set(_model.counts()) < here


def test_a_part_of_the_table_is_made_and_the_rest_kept(tmp_path, monkeypatch):
    """As when it is continued after an interruption; rows from other code are not kept."""
    asked = []

    def compiled(items):
        items = list(items)
        asked.extend(items)
        of = dict.fromkeys(nvrtc.NUMBERS, 1)
        return [{"file": i.file, "kernel": i.kernel, "chip": i.chip, **of} for i in items]

    monkeypatch.setattr(kernel_resources, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(kernel_resources, "counts_file", lambda: tmp_path / "counts.json")
    monkeypatch.setattr(kernel_resources, "compiled", compiled)
    monkeypatch.setattr(nvrtc, "version", lambda: "13.5")
    monkeypatch.setattr(kernel_resources, "work", lambda: iter(ITEMS[::9]))
    here = [i for i in ITEMS[::9] if i.chip == "sm_90" and "loss" in i.kernel]
    assert len(here) > 4
    assert kernel_resources.main(["--write", "--chip", "90", "--only", "loss"]) == 0
    assert asked == here
    asked.clear()
    assert kernel_resources.main(["--write"]) == 0
    assert sorted(asked + here) == sorted(ITEMS[::9])
    assert len(nvrtc.read(tmp_path / "table.json")[1]) == len(ITEMS[::9])
    assert set(json.loads((tmp_path / "counts.json").read_text())["kernels"]) == {
        i.kernel for i in ITEMS[::9] if i.chip == "sm_90" and kernel_resources.is_explained(i.kernel)
    }
    monkeypatch.setattr(kernel_resources, "digest", lambda: "another")
    asked.clear()
    kernel_resources.main(["--write", "--chip", "90"])
    assert {row["chip"] for row in nvrtc.read(tmp_path / "table.json")[1]} == {"sm_90"}


def test_the_matrix_is_whole():
    """Every family × dtype × the jobs that need most, without options, on five chips; all jobs and options on one."""
    dtypes, chips = ("f16", "bf16", "float", "double"), [f"sm_{chip}" for chip in kernel_resources.PLAIN_CHIPS]
    have = {(i.family, i.dtype, i.job, i.variant, i.chip) for i in ITEMS if i.family in cuda.FAMILIES}
    here, two = ["sm_90"], kernel_resources.TELLING[:2]
    whole = [family for family in cuda.FAMILIES if family != "SPLIT"]
    wanted = set(itertools.product(whole, dtypes, two, ["PLAIN"], chips))
    wanted |= set(itertools.product(whole, dtypes, cuda.JOBS, ["PLAIN"], here))
    wanted |= set(itertools.product(["SPLIT"], dtypes, ["STATS", "GRAD"], ["PLAIN"], chips))
    wanted |= set(itertools.product(["SPLIT"], dtypes, ["LOG_SOFTMAX"], ["PLAIN"], here))
    # More general variants take these.
    without = {"TINY": {"SMOOTH", "SOFT", "CAPPED"}, "COLUMNS": {"SOFT"}, "SPLIT": {"SMOOTH", "SOFT"}}
    for family in cuda.FAMILIES:
        variants = set(cuda.VARIANTS[1:]) - without.get(family, set())
        jobs = ["STATS", "GRAD"] if family == "SPLIT" else kernel_resources.TELLING
        wanted |= set(itertools.product([family], dtypes, jobs, variants, here))
    # Slices: two jobs with every option on one chip; the gradient, without options, on five.
    for family in cuda.FAMILIES:
        variants = [f"{variant}{cuda.SLICE}" for variant in set(cuda.VARIANTS) - without.get(family, set())]
        wanted |= set(itertools.product([family], dtypes, cuda.OF_SLICES, variants, here))
        wanted |= set(itertools.product([family], dtypes, ["GRAD"], ["PLAIN_SLICE"], chips))
    # Clusters hold what other chips stream: all rows of at most 32 bits per logit, with labels.
    with_grad = [job for job in cuda.JOBS if cuda.writes_grad(job)]
    of_clusters = [chip for chip in chips if chip not in ("sm_75", "sm_80")]
    held = ["PLAIN", "SMOOTH", "PLAIN_SLICE", "SMOOTH_SLICE"]
    wanted -= set(itertools.product(["STREAM"], ["float"], with_grad, held, of_clusters))
    # Newer chips lack the registers for that in 16 bits.
    wanted -= set(itertools.product(["STREAM"], dtypes[:2], with_grad, held, here))
    assert have == wanted
    assert {(i.dtype, i.chip) for i in ITEMS if i.family == "MERGE"} == set(itertools.product(dtypes, chips))
    for family, of in (("SAY", ["float", "double"]), ("SLICES", ["float", "double"]), ("TOTAL", ["double"])):
        assert {(i.dtype, i.chip) for i in ITEMS if i.family == family} == set(itertools.product(of, chips))
    of_sums = {(i.dtype, i.chip) for i in ITEMS if i.family == "SUMS"}
    assert of_sums == set(itertools.product(["float", "double"], chips))


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
    # On sm_75, which packs 16-bit numbers in software, stats with a gradient do not quite fit.
    for old in (True, False):
        assert max(row["spill_stores"] for row in ROWS if (row["chip"] == "sm_75") == old) <= (96 if old else 48)


def test_rows_are_read_and_written_in_16_bytes():
    """K wide loads and, for even rows, K wide stores per thread; loads again if a row is streamed for a gradient.

    And one more of each, in loops: for confident rows, and for those that do not count. All of it twice if problems
    without options have a copy of the code.
    """
    seen = set()
    for row in ROWS:
        if row["file"] != "rows.cu" or row["chip"] != kernel_resources.SHIPPED:
            continue
        if not re.search("_(plain|smooth|capped)(_slice)?_[0-9]", row["kernel"]):  # these read nothing else by vectors
            continue
        vectors, _, cluster, stream, even = parameters(row)
        job = re.search("loss_and_grad|stats_and_grad|log_softmax|grad|loss|stats", row["kernel"])[0]
        writes = job not in ("loss", "stats")
        passes = 2 if stream and cluster and writes and job != "grad" else 1  # SPLIT reads by two launches
        texts = 1 if stream or job not in ("loss", "loss_and_grad") or "_capped_" in row["kernel"] else 2
        more = range(texts + 1)
        assert row["loads128"] - texts * passes * vectors in more, row
        assert row["stores128"] - (texts * vectors if writes and even else 0) in (more if writes and even else (0,)), (
            row
        )
        seen.add((job, even, passes))
    assert {job for job, *_ in seen} == {job.lower() for job in cuda.JOBS}
    assert {(even, passes) for _, even, passes in seen} == set(itertools.product((False, True), (1, 2)))


# BLOCK with labels and 8 vectors per thread, on sm_90: most instructions per logit on the common path; all
# instructions, if there is no copy of the code without options. At 16 bits, issuing 22 takes 0.8 times as long as
# moving the bytes.
MOST_INSTRUCTIONS = {
    ("bf16", "loss_and_grad", "plain"): 22,
    ("bf16", "loss", "plain"): 14,
    ("float", "loss_and_grad", "plain"): 28,
    ("float", "loss", "plain"): 18,
    ("bf16", "loss_and_grad", "smooth"): 25,
    ("bf16", "loss", "smooth"): 17,
    ("float", "loss_and_grad", "smooth"): 31,
    ("float", "loss", "smooth"): 21,
    ("bf16", "loss_and_grad", "soft"): 40,
    ("float", "loss_and_grad", "soft"): 40,
    ("bf16", "loss_and_grad", "capped"): 40,
    ("float", "loss_and_grad", "capped"): 60,
}


def test_there_are_no_more_instructions_than_memory_leaves_time_for():
    met = set()
    for row in ROWS:
        name = re.match(r"xent_block_(\w+?)_(\w+)_(plain|smooth|soft|capped)_8_0_1_false_true_", row["kernel"])
        if name is None or row["chip"] != kernel_resources.SHIPPED or name.groups() not in MOST_INSTRUCTIONS:
            continue
        logits = 8 * (8 if name[1] == "bf16" else 4)
        executed = row["executed"][0]
        assert (executed < row["instructions"] / 2) == (name[3] in ("plain", "smooth")), row
        assert executed <= MOST_INSTRUCTIONS[name.groups()] * logits, row
        met.add(name.groups())
    assert met == set(MOST_INSTRUCTIONS)


def test_a_slice_costs_little_more_than_whole_rows():
    """The label's class is compared with the slice, and the mass is read; nothing is added per logit."""
    of = {row["kernel"]: row for row in ROWS if row["chip"] == kernel_resources.SHIPPED}
    more = []
    for name, row in of.items():
        whole = of.get(name.replace("_slice", ""))
        if "_slice_" not in name or whole is None or "_merge_" in name:
            continue
        more.append(row["instructions"] - whole["instructions"])
        assert row["mufu"] == whole["mufu"], name
        assert row["registers"] <= whole["registers"] + 16, name
    assert len(more) > 200
    assert max(more) <= 200
    assert sum(more) / len(more) < 20


def test_no_load_tells_the_caches_to_let_go_first():
    """Evict-first loads cost 4 to 6 % of the bandwidth on an H200."""
    here = [row for row in ROWS if row["chip"] == kernel_resources.SHIPPED]
    assert len(here) > 1000
    assert all(row["once"] == 0 for row in here)


def test_tiny_rows_are_copied_in_16_bytes():
    """Unless they are one shorter access."""
    for row in ROWS:
        if row["file"] != "tiny.cu" or row["chip"] != kernel_resources.SHIPPED:
            continue
        found = re.search(r"xent_tiny_(\w+?)_(loss|stats|grad|log)\w*_(\d+)_\d+_\d+_\d+$", row["kernel"])
        size = int(found[3]) * {"float": 4, "double": 8}.get(found[1], 2)
        wide = size not in (2, 4, 8)
        assert (row["loads128"] > 0) == wide, row
        writes = re.search("_grad_|_log_softmax_", row["kernel"]) is not None
        halves = found[1] == "double" and size == 16  # of a row of two, which the compiler stores by halves
        assert (row["stores128"] > 0) == (wide and writes and not halves), row


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


def test_what_reaches_the_compiler_is_ascii():
    """Every kernel; other characters occur in comments only, and are replaced one for one."""
    texts = {item.text for item in ITEMS}
    assert all(text.isascii() for text in texts)
    for file in kernel_resources.files():
        assert kernel_resources.code_of(file).isascii(), file.name
    written = (_kernels.folder() / "stats.cuh").read_text(encoding="utf-8").splitlines()
    own = written[written.index('#include "problem.cuh"') + 1 :]
    handed_over = _kernels.source("stats.cuh").splitlines()[-len(own) :]
    assert handed_over != own, "no line here is anything but ASCII"
    assert [re.sub(r"[^\x00-\x7f]", "?", line) for line in own] == handed_over


COMPILES = """
import json, sys
from cupy.cuda import compiler
compiler._get_arch_for_options_for_nvrtc = lambda arch: (f"-arch=compute_{arch}", "ptx")  # asks a GPU
done = 0
for text, chip in json.load(sys.stdin):
    code, _ = compiler.compile_using_nvrtc(text, ("-ftz=true",), chip, "kernel.cu")
    done += b".entry" in code
print(done, "compiled")
"""


def compiled_by_cupy(items):
    """How CuPy hands a text to NVRTC, by a file, in a process whose locale is "C"."""
    given = json.dumps([(item.text, item.chip.removeprefix("sm_")) for item in items])
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES], input=given, env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or done.stderr[-2000:]


@pytest.mark.skipif(nvrtc.missing() is not None, reason=f"kernels cannot be compiled here: {nvrtc.missing()}")
def test_kernels_compile_in_a_locale_that_knows_ascii_only():
    of_file = list({item.file: item for item in ITEMS}.values())
    assert compiled_by_cupy(of_file) == f"{len(of_file)} compiled"
    greek = of_file[0]._replace(text=of_file[0].text + "// Σ")
    assert "UnicodeEncodeError" in compiled_by_cupy([greek]), "the locale knows more than ASCII"


@pytest.mark.full
@pytest.mark.skipif(nvrtc.missing() is not None, reason=f"kernels cannot be compiled here: {nvrtc.missing()}")
def test_kernels_of_every_kind_compile_in_a_locale_that_knows_ascii_only():
    """All of them are ASCII, by test_what_reaches_the_compiler_is_ascii."""
    texts = list({item.text: item for item in kernel_resources.some(ITEMS)}.values())[::3]
    assert compiled_by_cupy(texts) == f"{len(texts)} compiled"


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
    fail_to_compile(monkeypatch, OSError("CuPy failed to load libnvrtc.so.12: no such file"), runtime, driver)
    with pytest.raises(RuntimeError, match=f"{re.escape(advice)}.*CuPy says: CuPy failed to load libnvrtc"):
        compile_one()


def fail_to_compile(monkeypatch, error, runtime=13020, driver=13000):
    """CuPy, whose compiler raises `error`."""

    def fails():
        raise error

    class Kernel:
        def __init__(self, text, name):
            self.compile = fails

    versions = SimpleNamespace(runtimeGetVersion=lambda: runtime, driverGetVersion=lambda: driver)
    fake = SimpleNamespace(RawKernel=Kernel, cuda=SimpleNamespace(runtime=versions))
    monkeypatch.setitem(sys.modules, "cupy", fake)


def compile_one():
    _kernels.compiled.__wrapped__(next(cuda.catalogue(90, "PLAIN")), 0)


@pytest.mark.parametrize(
    "said",
    [
        "CuPy failed to load nvrtc64_120_0.dll: FileNotFoundError: Could not find module",
        'Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such file',
        "CuPy failed to load libcudart.so.13: OSError: libcudart.so.13: cannot open shared object file",
        "Failed to find CUDA headers. Please install the CUDA Toolkit or set CUDA_PATH",
        'catastrophic error: cannot open source file "vector_types.h"',
        "nvrtc: error: failed to open libnvrtc-builtins.so.12.4.",
        "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version",
    ],
    ids=[*"abcdefg"],  # an id that contains "cupy" would be taken for a test on a GPU
)
def test_advice_is_given_where_something_is_missing(said, monkeypatch):
    fail_to_compile(monkeypatch, RuntimeError(said))
    with pytest.raises(RuntimeError, match=f"pip install nvidia-cuda-nvrtc.*{re.escape(said)}"):
        compile_one()


@pytest.mark.parametrize(
    "error",
    [
        UnicodeEncodeError("ascii", "Σ", 0, 1, "ordinal not in range(128)"),
        PermissionError(13, "Permission denied", "/root/.cupy/kernel_cache/tmp0"),
        OSError(28, "No space left on device"),
        MemoryError(),
        RuntimeError("cudaErrorMemoryAllocation: out of memory"),
        RuntimeError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid"),
        RuntimeError('cannot open source file "C:\\Users\\name\\tmp0\\kernel.cu"'),
        RuntimeError("nvrtc: error: invalid value for --gpu-architecture (-arch)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_another_failure_passes_as_it_is(error, monkeypatch):
    fail_to_compile(monkeypatch, error)
    with pytest.raises(type(error)) as raised:
        compile_one()
    assert raised.value is error
