"""Tests of `benchmarks.photographs`."""

import json

import pytest

from benchmarks.photographs import main, parser
from mergevq.config.recipes import RECIPES
from mergevq.tokenizer.tokenizer import Tokenizer


def test_its_recipes_exist_and_are_written_for_each_other():
    options = parser().parse_args(["data", "--minutes", "1"])
    tokenizer = RECIPES[options.tokenizer]()
    for name in options.generators:
        generator = RECIPES[name]()
        assert generator.kept.candidates == (int(options.num_kept),)
        assert generator.resolved_model.num_tokens == tokenizer.model.num_tokens
        assert generator.model.num_codes == 2**tokenizer.model.quantizer.num_bits


@pytest.mark.slow
def test_models_come_out_in_the_time_they_were_given(tmp_path, capfd):
    pytest.importorskip("sklearn")
    out = tmp_path / "out"
    few = "--train.num-eval-images 8 --train.batch-size 8 --train.num-steps 2"
    command = ["digits", "--minutes", "2", "--out", str(out), "--tokenizer", "digits32"]
    command += ["--generators", "digits32_ar", "--num-kept", "12,16,20,24,32"]
    command += [f"--tokenizer-options={few}", f"--generator-options={few}", "--num-workers", "0"]
    assert main([*command, "--val", "digits", "--num-images", "4"]) == 0
    record = json.loads((out / "photographs.json").read_text())
    assert list(record["seconds"]) == ["tokenizer", "encode", "digits32_ar", "reconstruction"]
    assert "reconstruction: mergevq evaluate reconstruction" in capfd.readouterr().out
    half = Tokenizer.from_pretrained(out / "models" / "tokenizer")
    whole = Tokenizer.from_pretrained(out / "tokenizer" / "model")
    for name, tensor in whole.state_dict().items():
        assert half.state_dict()[name].equal(tensor.half().float()), name
    with pytest.raises(SystemExit, match=r"0.01 minutes leave none for the generators|failed with"):
        main(["digits", "--minutes", "0.01", *command[3:4], str(tmp_path / "b"), *command[5:]])
