"""Scripts in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def environment(**changed):
    """Of a process that finds the package of this checkout, and what tests share."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])} | changed


def run(script, *arguments, **changed):
    """The output of a script, where warnings are errors; it must end well."""
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    ran = subprocess.run(command, env=environment(**changed), capture_output=True, text=True, timeout=300, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout
