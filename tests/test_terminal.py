"""What all commands print and set."""

import errno
import os
import subprocess
import sys

import pytest

from mergevq.terminal import file_problem, in_options, let_threads_sleep, print_table


def test_a_table_has_a_title_and_two_columns(capsys):
    print_table("versions", {"torch": "2.13", "a_very_long_name": "1"})
    assert capsys.readouterr().out == "versions\n  torch          2.13\n  a_very_long_name 1\n"


OPTIONS = {
    "val_path": "--data.val-path",
    "train.seed": "--train.seed",
    "seed": "--train.seed",
    "num_kept": "--model.num-kept",
}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("give val_path its own images", "give --data.val-path its own images"),
        ("seed (-1) must be above 0", "--train.seed (-1) must be above 0"),
        ("a.png: seed (-1) must be above", "a.png: --train.seed (-1) must be above"),
        ("train.seed (-1) must be above", "--train.seed (-1) must be above"),
        (
            "num_kept (3) is too few for num_kept.",
            "--model.num-kept (3) is too few for --model.num-kept.",
        ),
        # A word of the language, paths, options and longer names stay.
        ("the seed is new, and of the seed (3)", "the seed is new, and of the seed (3)"),
        ("runs/val_path/x, val_path.png", "runs/val_path/x, val_path.png"),
        ("'val_path' and --val_path", "'val_path' and --val_path"),
        ("old_val_path and val_paths", "old_val_path and val_paths"),
    ],
)
def test_settings_are_called_as_on_the_command_line(message, said):
    assert in_options(message, OPTIONS) == said


def test_without_options_a_message_stays():
    assert in_options("num_kept (3) is too few", {}) == "num_kept (3) is too few"


@pytest.mark.parametrize(
    ("error", "out", "said"),
    [
        (OSError(errno.ENOSPC, "full"), "x", "no space is left to write x: make room, or choose"),
        (OSError(errno.ENOSPC, "full", "y"), "x", "no space is left to write y: make room, or"),
        (FileExistsError(errno.EEXIST, "there", "y"), "x", "y needs a folder where there is a"),
        (PermissionError(errno.EACCES, "no", "y"), None, "y may not be read or written by this"),
        (OSError(errno.EIO, "bad", "y"), None, f"y: {os.strerror(errno.EIO)}"),
        (OSError("the hub says no"), "x", "the hub says no"),
        (OSError(errno.ENOSPC, "full"), None, f"[Errno {errno.ENOSPC}] full"),
    ],
    ids=str,
)
def test_an_error_of_a_file_has_its_path_and_a_way_out(error, out, said):
    problem = file_problem(error, out)
    assert problem.startswith(said)
    assert ("--out" in problem) == (out is not None and error.errno is not None)


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
