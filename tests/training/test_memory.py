"""Freed memory is kept: the same work asks the system for far fewer pages; a user's own settings are left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WORK = """
import resource, sys
import torch
from ganexport.training.memory import keep_freed_memory
asked = keep_freed_memory() if sys.argv[1] == "keep" else False
def work():
    for _ in range(20):
        a = torch.ones(12, 1024, 1024); b = a + 1; del a, b   # 48 MiB each
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(asked, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **variables: str) -> tuple[bool, int]:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", WORK, how], env={**clean, **variables}, capture_output=True, text=True, check=True
    )
    asked, count = done.stdout.split()
    return asked == "True", int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_pages_are_not_asked_for_again():
    assert faults("keep") == (True, pytest.approx(0, abs=2000))
    asked, count = faults("leave")
    assert not asked
    assert count > 10_000


def test_the_users_own_settings_stay():
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] is False
