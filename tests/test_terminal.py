"""What all commands print and set."""

import os
import subprocess
import sys

import pytest

from mergevq.terminal import let_threads_sleep, print_table


def test_a_table_has_a_title_and_two_columns(capsys):
    print_table("versions", {"torch": "2.13", "a_very_long_name": "1"})
    assert capsys.readouterr().out == "versions\n  torch          2.13\n  a_very_long_name 1\n"


def test_the_users_choice_of_waiting_stays(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize("chosen", [None, "PASSIVE"])
def test_threads_sleep_soon_and_not_at_once(monkeypatch, chosen):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        # Set first, so that the test's own changes are taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if chosen is not None:
        os.environ["OMP_WAIT_POLICY"] = chosen
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["GOMP_SPINCOUNT"] == "2000"


FREE_AND_TAKE = """
import resource
from mergevq.terminal import keep_freed_memory

def take():
    blocks = [bytes([1]) * 2**24 for _ in range(8)]

keep_freed_memory()
take(), take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_freed_memory_is_kept_unless_the_user_chose():
    def num_faults(**chosen):
        plain = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
        printed = subprocess.run(
            [sys.executable, "-c", FREE_AND_TAKE],
            env=plain | chosen,
            check=True,
            capture_output=True,
            text=True,
        )
        return int(printed.stdout)

    num_pages = 2**27 // os.sysconf("SC_PAGESIZE")
    assert num_faults() < num_pages / 10
    assert num_faults(MALLOC_MMAP_THRESHOLD_="4096") > num_pages / 2
