"""Names that `import mergevq` gives, and its cost."""

import importlib
import subprocess
import sys

import pytest

import mergevq


def test_importing_the_package_loads_neither_torch_nor_any_of_its_modules():
    code = (
        "import sys, mergevq; loaded = [m for m in sys.modules if m.startswith('mergevq.')];"
        "sys.exit(repr(loaded) if loaded or 'torch' in sys.modules else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("name", mergevq.__all__)
def test_a_name_is_the_one_of_its_module(name):
    value = getattr(mergevq, name)
    assert value.__name__ == name
    assert value is getattr(importlib.import_module(value.__module__), name)
    assert value.__module__.startswith("mergevq.")
    assert name in dir(mergevq)


def test_there_are_fifteen_names_and_a_star_gives_them():
    names = {}
    exec("from mergevq import *", names)
    assert {name for name in names if not name.startswith("__")} == set(mergevq.__all__)
    assert len(mergevq.__all__) == 15


def test_a_settings_name_does_not_load_torch():
    code = "import sys, mergevq; mergevq.TokenizerConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_another_name_is_an_error_like_any_other():
    with pytest.raises(AttributeError, match="module 'mergevq' has no attribute 'Tokeniser'"):
        mergevq.Tokeniser  # noqa: B018 - the look is the test
    assert not hasattr(mergevq, "psnr")
