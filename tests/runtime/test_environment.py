"""Optional packages: the cause and the command, wherever one cannot be imported."""

import importlib.metadata
import os
import shlex
import subprocess
import sys

import pytest

from mergevq.runtime.environment import EXTRAS, install_command, let_threads_sleep, missing, needing


def test_a_missing_package_is_named_with_a_command_that_works_from_anywhere():
    with (
        pytest.raises(RuntimeError, match=r"^drawing needs no_such_thing, which is not ins"),
        needing("eval", "drawing"),
    ):
        importlib.import_module("no_such_thing.inner")


@pytest.mark.parametrize(
    "content",
    ["import no_such_name from tomlkit", "raise OSError('libgomp.so.1: cannot open')", "1 / 0"],
)
def test_a_package_that_does_not_import_comes_with_the_cause(tmp_path, monkeypatch, content):
    """Not with "is not installed", which sends its reader round in a circle."""
    (tmp_path / "of_another_time.py").write_text(content + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with (
        pytest.raises(RuntimeError, match="do not import") as raised,
        needing("demo", "the web page"),
    ):
        importlib.import_module("of_another_time")
    cause = raised.value.__cause__
    assert f"({type(cause).__name__}: {cause}" in str(raised.value)
    assert "not installed" not in str(raised.value)
    assert str(raised.value).endswith(install_command("demo", upgrade=True))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_command_is_of_this_python_and_names_what_a_registry_has(extra, monkeypatch):
    """The package itself is on no registry, so its extras are not either."""
    monkeypatch.setattr(sys, "executable", "/home/a user/bin/python")
    python, *rest = shlex.split(install_command(extra))
    assert python == sys.executable
    assert rest == ["-m", "pip", "install", *EXTRAS[extra]]


def test_an_environment_without_pip_gets_the_command_of_uv(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)
    assert install_command("hub") == f"uv pip install --python {sys.executable} huggingface_hub"


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("3.18.0", ["gradio>=6"]), ("6.0", []), ("6.31.0", []), ("10.1", [])],
)
def test_too_old_a_version_is_missing(monkeypatch, version, wanted):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    assert missing("demo") == wanted


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
from mergevq.runtime.environment import keep_freed_memory

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


KEEP_AND_GIVE = """
from pathlib import Path
from mergevq.runtime.environment import give_back_freed_memory, keep_freed_memory

def resident():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])

keep_freed_memory()
blocks = [bytes([1]) * 2**20 for _ in range(128)]
full = resident()
del blocks
kept = resident()
give_back_freed_memory()
print(full - kept, full - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read on Linux")
def test_memory_that_was_kept_is_given_back_when_asked_for():
    plain = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
    printed = subprocess.run(
        [sys.executable, "-c", KEEP_AND_GIVE], env=plain, check=True, capture_output=True, text=True
    )
    kept, given = map(int, printed.stdout.split())
    assert kept < 2**24
    assert given > 0.9 * 2**27
