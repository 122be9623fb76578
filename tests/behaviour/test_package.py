"""The package as it is shipped: what it names, what it imports, what is in the wheel, what the linters say."""

import inspect
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import xent_array

ROOT = Path(__file__).parents[2]


def run(*command, **options):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_public_names_are_those_of_the_readme():
    public = {
        name for name, value in vars(xent_array).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(xent_array.__all__)
    table = (ROOT / "README.md").read_text().partition("## Functions")[2].partition("## Semantics")[0]
    assert set(xent_array.__all__) - {"RowStats"} == set(
        re.findall(r"`(\w+)\(", " ".join(row.split("|")[1] for row in table.splitlines() if "|" in row))
    )


@pytest.mark.parametrize("name", sorted(set(xent_array.__all__) - {"RowStats"}))
def test_docstring_has_every_section(name):
    documented = getattr(xent_array, name)
    sections = re.findall(r"^ *([A-Z][\w ]+)\n *-{3,}$", documented.__doc__, re.MULTILINE)
    wanted = ["Parameters", "See Also", "Examples"] + (["Returns", "Raises"] if inspect.isfunction(documented) else [])
    assert set(wanted) <= set(sections)
    for parameter in inspect.signature(documented).parameters:
        assert re.search(rf"^ *\*?(\w+, )*{parameter}(, \w+)*( :|$)", documented.__doc__, re.MULTILINE), parameter


def test_the_same_options_everywhere():
    signatures = {name: inspect.signature(getattr(xent_array, name)).parameters for name in xent_array.__all__}
    loss = signatures["cross_entropy"]
    for name in ("cross_entropy_value_and_grad", "cross_entropy_grad", "row_stats", "CrossEntropyLoss"):
        shared = set(loss) & set(signatures[name])
        missing = {"CrossEntropyLoss": {"logits", "target"}, "row_stats": {"reduction", "denominator"}}.get(name, set())
        assert shared == set(loss) - missing
        assert all(str(loss[option]) == str(signatures[name][option]) for option in shared)


def test_import_brings_no_other_library():
    heavy = (
        "cupy",
        "llvmlite",
        "numba",
        "dask",
        "torch",
        "jax",
        "scipy",
        "concurrent.futures.thread",
        "importlib.metadata",
    )
    loaded = run("-c", f"import xent_array, sys; print([name for name in {heavy} if name in sys.modules])")
    assert loaded.strip() == "[]"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_its_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    kernels = {path.name for path in (ROOT / "kernels").iterdir()}
    assert {f"xent_array/kernels/{name}" for name in kernels} <= names
    modules = {
        str(path.relative_to(ROOT)) for path in (ROOT / "xent_array").rglob("*") if path.suffix in {".py", ".typed"}
    }
    assert modules == {name for name in names if name.endswith((".py", ".typed"))}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.name.startswith(f"xent_array-{xent_array.__version__}-py3-none-any")


def test_sdist_holds_no_stray_file(tmp_path):
    pytest.importorskip("hatchling")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path), cwd=ROOT)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.split("/")[1] for name in archive.getnames()}
    folders = {".ci", "bench", "docs", "kernels", "tests", "xent_array"}
    files = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml"}
    assert folders | files - {"CONTRIBUTING.md"} <= names <= folders | files | {".gitignore", "PKG-INFO"}


def test_the_changelog_begins_with_this_version():
    versions = re.findall(
        r"^## \[([\d.]+)\] - (?:unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert versions[0] == xent_array.__version__


@pytest.mark.full
def test_wheel_runs_from_another_folder(wheel, tmp_path):
    site = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(site), str(wheel))
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import numpy, xent_array\n"
        f"assert xent_array.__file__.startswith({str(site)!r}), xent_array.__file__\n"
        "print(round(float(xent_array.cross_entropy(numpy.array([[2, 1, .1], [.1, 2, 1.9]]), [1, 0])), 3))"
    )
    assert run("-c", program, cwd=tmp_path).strip() == "2.019"


@pytest.mark.full
def test_types_and_style_are_clean():
    pytest.importorskip("mypy")
    pytest.importorskip("ruff")
    run("-m", "mypy", cwd=ROOT)
    run("-m", "ruff", "check", cwd=ROOT)
    run("-m", "ruff", "format", "--check", cwd=ROOT)


def test_first_example_of_the_readme_runs():
    example = re.search(r"^```python\n(import.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    names = {}
    exec(example, names)
    assert names["rows"].shape == (4096,)
    assert names["grad"] is names["logits"]


def test_ci_begins_with_the_commands_of_the_readme(tmp_path):
    """Word for word: the script's own lines take them from README.md, where there are these two and no other."""
    read = re.search(r"^\{ read -r FIRST.*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)[0]
    command = f'work={shlex.quote(str(tmp_path))}; {read}; echo "$FIRST"; echo "$SECOND"'
    (tmp_path / "clone").symlink_to(ROOT)
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == re.findall(r"^\$ (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert said == ['pip install ".[cpu]" && python -P -m xent_array', 'pip install -e ".[test]" && pytest']
