"""The public docstrings in numpydoc's form: every parameter with its type and default, every section, live examples."""

import doctest
import importlib
import inspect
import re

import pytest

import xent_array
from xent_array import RowStats

FUNCTIONS = sorted(name for name in xent_array.__all__ if inspect.isfunction(getattr(xent_array, name)))
METHODS = [
    "CrossEntropyLoss.forward",
    "CrossEntropyLoss.backward",
    "torch.CrossEntropyLoss.forward",
    "torch.LinearCrossEntropyLoss.forward",
]
CLASSES = ["CrossEntropyLoss", "torch.CrossEntropyLoss", "torch.LinearCrossEntropyLoss"]


def _documented(name):
    if name.startswith("torch."):
        pytest.importorskip("torch")
        importlib.import_module("xent_array.torch")
    found = xent_array
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _sections(documented):
    """The lines of each section, by its title."""
    parts = re.split(r"^([A-Z][\w ]+)\n-{3,}\n", inspect.cleandoc(documented.__doc__), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _entries(section):
    """(name, type) of everything that a section describes, in its order."""
    described = re.findall(r"^\*?(\w+(?:, \w+)*) : (\S.*)$", section, re.MULTILINE)
    return [(name, kind) for names, kind in described for name in names.split(", ")]


def _shown(default):
    return f'"{default}"' if isinstance(default, str) else repr(default)


@pytest.mark.parametrize("name", ["RowStats", *FUNCTIONS, *METHODS, *CLASSES])
def test_every_parameter_has_its_type_and_default(name):
    documented = _documented(name)
    parameters = inspect.signature(documented).parameters
    entries = _entries(_sections(documented)["Parameters"])
    assert [entry for entry, _ in entries] == [parameter for parameter in parameters if parameter != "self"]
    for parameter, kind in entries:
        default = parameters[parameter].default
        said = re.findall(r"default (.*)$", kind)
        assert said == ([] if default is inspect.Parameter.empty else [_shown(default)]), f"{parameter} : {kind}"
        assert kind.partition(", default")[0].strip(), f"{parameter} has no type"


@pytest.mark.parametrize("name", FUNCTIONS + METHODS + CLASSES)
def test_every_section_is_there(name):
    sections = _sections(_documented(name))
    assert {"Parameters", "Raises", "See Also", "Examples"} <= set(sections)
    assert ("Returns" in sections) == (name not in CLASSES)
    assert all(text.strip() for text in sections.values())


@pytest.mark.parametrize("name", ["RowStats", *FUNCTIONS, *METHODS, *CLASSES])
def test_there_is_an_example_with_a_result(name):
    examples = doctest.DocTestParser().get_examples(_documented(name).__doc__)
    assert any(example.want for example in examples)


def test_row_stats_name_the_results_before_their_parts():
    properties = {name for name, value in vars(RowStats).items() if isinstance(value, property)}
    attributes = [name for name, _ in _entries(_sections(RowStats)["Attributes"])]
    assert attributes[:2] == ["lse", "loss"]
    assert set(attributes) == properties
    summary = inspect.cleandoc(RowStats.__doc__).partition("\n")[0]
    assert re.findall(r"``(\w+)``", summary) == ["lse", "loss", "max", "p_max"]


@pytest.mark.parametrize("name", ["RowStats", *FUNCTIONS, *METHODS, *CLASSES])
def test_every_reference_is_cited(name):
    documented = _documented(name)
    defined = re.findall(r"^\.\. \[(\d+)\] ", _sections(documented).get("References", ""), re.MULTILINE)
    assert defined == [str(number) for number in range(1, len(defined) + 1)]
    assert set(re.findall(r"\[(\d+)\]_", documented.__doc__)) == set(defined)


def test_the_loss_cites_where_its_options_are_from():
    assert len(re.findall(r"^\.\. \[\d+\] ", _sections(xent_array.cross_entropy)["References"], re.MULTILINE)) == 4
