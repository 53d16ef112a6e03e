"""Every example runs to its end, as a user would start it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = [[path.name] for path in sorted((ROOT / "examples").glob("*.py"))]
COMMANDS.append(["explain.py", "--layer", "2"])  # a feature without a spatial shape


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_example(command, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / command[0]), *command[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
