"""Tests of `mergevq.runtime.migrate`: models and tokens of format 1.

The models in tests/data/format1 were saved by the last release that wrote format 1, with the tokens
and pictures that they gave then: `cnn` has a CNN stem, `patch` a patch stem with norm, positions
and the square schedule, `plain` a patch stem without norm and a patch decoder.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergevq.data.tokens.files import TokenRecord
from mergevq.runtime.artefacts import load_model, read_record, tokens_hash
from mergevq.runtime.migrate import migrate_tokenizer, migrate_tokens
from mergevq.runtime.settings import from_json
from mergevq.tokenizer.tokenizer import Tokenizer

FORMAT1 = Path(__file__).parents[1] / "data" / "format1"
NAMES = ("cnn", "patch", "plain")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_format_1_gives_the_tokens_and_pictures_it_gave(name):
    expected = load_file(FORMAT1 / "expected.safetensors")
    model = Tokenizer.from_pretrained(FORMAT1 / name)
    with torch.no_grad():
        encoded = model.encode(expected["image"])
        given = model.decode(encoded.indices, encoded.source)
        recovered = model.decode(encoded.indices, model.recover(encoded.indices))
    assert torch.equal(encoded.indices, expected[f"{name}.indices"])
    assert torch.equal(encoded.source.index, expected[f"{name}.source"])
    # Kernels of other processors round otherwise.
    torch.testing.assert_close(given, expected[f"{name}.given"], rtol=0, atol=1e-5)
    torch.testing.assert_close(recovered, expected[f"{name}.recovered"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_its_tokens_keep_their_hash(name):
    hashes = json.loads((FORMAT1 / "tokens_hash.json").read_text(encoding="utf-8"))
    assert tokens_hash(FORMAT1 / name) == hashes[name]


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_saved_in_the_format_of_today(tmp_path, name):
    model = Tokenizer.from_pretrained(FORMAT1 / name)
    model.save_pretrained(tmp_path / name)
    again = Tokenizer.from_pretrained(tmp_path / name)
    assert again.config == model.config
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_settings_that_a_record_lacks_have_the_defaults_of_format_1():
    new = migrate_tokenizer({"num_bits": 6})
    assert new["quantizer"] == {"kind": "lfq", "num_bits": 6}
    assert new["stem"]["channels"] == new["decoder"]["channels"] == 64
    assert (new["reducer"]["num_layers"], new["expander"]["dim"]) == (12, 384)


def test_a_setting_that_never_was_is_refused(tmp_path):
    shutil.copytree(FORMAT1 / "cnn", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["config"]["num_eyes"] = 2
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match="num_eyes is not a setting of a tokenizer of format 1"):
        read_record(tmp_path / "model")


def test_weights_have_the_names_of_today():
    names = load_model(FORMAT1 / "plain", "tokenizer").state
    assert not [name for name in names if name.startswith(("encoder.blocks", "source_predictor"))]
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder", "expander"}


def test_the_bits_of_tokens_become_the_size_of_their_one_part():
    old = {
        "tokenizer": "a" * 64,
        "num_kept": [4],
        "num_bits": 63,
        "grid_shape": [3, 3],
        "data": "elsewhere",
        "images": "b" * 64,
        "num_images": 5,
        "class_names": [],
    }
    record = from_json(TokenRecord, migrate_tokens(old))
    assert (record.sizes, record.bits) == ((2**63,), 63.0)
    with pytest.raises(ValueError, match=r"num_bits \(64\) must be between 1 and 63"):
        migrate_tokens({**old, "num_bits": 64})
