"""The process keeps what it frees, where malloc is left to align."""

import os
import platform
import subprocess
import sys

import pytest

from align.environment import OWN_MALLOC, keep_freed_memory

PROBE = """
import resource, sys
from align.environment import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    blocks = [bytearray(4 << 20) for _ in range(16)]
    return sum(block[-1] for block in blocks)
work()
before = faults()
for _ in range(20):
    work()
print(faults() - before)
"""


def faults(mode: str) -> int:
    bare = {name: value for name, value in os.environ.items() if name not in OWN_MALLOC}
    command = [sys.executable, "-c", PROBE, mode]
    found = subprocess.run(command, env=bare, capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_blocks_are_used_again():
    kept, usual = faults("kept"), faults("usual")
    assert kept < usual / 10, (kept, usual)


@pytest.mark.parametrize("name", OWN_MALLOC)
def test_malloc_tuned_by_the_user_is_left_alone(name, monkeypatch):
    monkeypatch.setenv(name, "1000000")
    assert not keep_freed_memory()
