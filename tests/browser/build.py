"""Builds the page into the package, as everybody does."""

import functools
import subprocess
from pathlib import Path


@functools.cache
def build_page() -> None:
    """Run ``make web``, once in a test run."""
    subprocess.run(["make", "--silent", "web"], cwd=Path(__file__).parents[2], check=True)
