"""The kernels under compute-sanitizer, where a machine has it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .layers import NEEDS_GPU

pytestmark = NEEDS_GPU

SCRIPT = Path(__file__).with_name("sanitize_case.py")
SANITIZER = shutil.which("compute-sanitizer")


def run(*command: str) -> str:
    done = subprocess.run(
        [*command, sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_case_itself():
    assert run().count("as defined") == 4


@pytest.mark.soak
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on the path")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_clean_under(tool):
    output = run(str(SANITIZER), "--tool", tool, "--error-exitcode", "7")
    assert output.count("as defined") == 4
