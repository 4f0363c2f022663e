"""Optional packages: the cause and the command, wherever one cannot be imported."""

import importlib
import importlib.metadata
import shlex
import sys

import pytest

from mergevq.extras import EXTRAS, install_command, missing, needing


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
