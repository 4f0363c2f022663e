"""Graphs of tokenizers in files, run beside the library."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from mergevq.config.kinds import unions
from mergevq.config.recipes.digits import digits32
from mergevq.config.recipes.photos import photos64
from mergevq.config.training import TokenizerRun
from mergevq.data.layouts import require_source
from mergevq.generator.export.folder import export_folder
from mergevq.tokenizer.export import files
from mergevq.tokenizer.export.files import compare, traced, write_graphs
from mergevq.tokenizer.export.graphs import Graph, tokenizer_graphs
from mergevq.tokenizer.tokenizer import Tokenizer
from tests.support.export import export
from tests.support.leaves import replaced
from tests.support.parts import tokenizer_config
from tests.support.small import shrink

TINY = tokenizer_config(
    image_size=16,
    stem="patch",
    patch_dim=16,
    channels=16,
    channel_mult=(1, 1, 1),
    decoder="patch",
    decoder_width=16,
    decoder_blocks="ca",
    num_layers=2,
    num_heads=2,
    layer_scale=0.1,
    num_kept=8,
    num_bits=4,
    num_decoder_heads=2,
    source_dim=16,
    num_source_layers=1,
    num_source_heads=2,
)
PARTS = [
    f"{union.name}.kind={kind}"
    for union in unions(TokenizerRun)
    if union.name.startswith("model.")
    for kind in union.members
]


def random(config):
    """A tokenizer whose every part shows in the results."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(config)
    for parameter in tokenizer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return tokenizer.eval().requires_grad_(False)


@functools.cache
def tiny():
    return random(TINY)


def images(model, batch):
    side = model.config.image_size
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("num_kept", "locality"), [(4, 0.0), (7, 0.0), (16, 0.0), (7, 0.5)])
def test_modules_of_graphs_are_the_librarys_calls(batch, num_kept, locality):
    model = random(replace(TINY, reducer=replace(TINY.reducer, locality=locality)))
    graphs = {graph.name: graph for graph in tokenizer_graphs(model, (num_kept,))}
    image = images(model, batch)
    encoded = model.encode(image, num_kept)
    indices, source = graphs[f"encoder_{num_kept}"].module(image)
    assert torch.equal(indices, encoded.indices)
    assert torch.equal(source, encoded.source.index)
    decoded = graphs["decoder"].module(indices, source)
    torch.testing.assert_close(decoded, model.decode(indices, encoded.layout))
    inferred = require_source(model.recover(indices), "the test")
    assert torch.equal(graphs["recovery"].module(indices), inferred.index)


class _Half(nn.Module):
    def forward(self, x):
        return x / 2, x.long()


def half():
    examples = {"x": torch.tensor([[1.0, 3.0], [4.0, 6.0]])}
    return Graph("half", _Half(), examples, ("a", "b"), {"x": {0: "batch"}}, {})


def test_a_difference_counts_whole_numbers_and_measures_others():
    """Rows 0, then 0, 1, 0: one of 8 whole numbers is wrong in each first cell."""

    def run(inputs):
        wrong = inputs[0].long()
        wrong[0, 0] += 1
        return inputs[0] / 2 + 0.25, wrong

    assert compare(half(), run) == (0.75, 0.25)


def test_a_difference_that_is_no_number_is_the_largest():
    assert compare(half(), lambda inputs: (inputs[0] * torch.nan, inputs[0].long())) == (
        1,
        torch.inf,
    )


def test_a_file_with_other_results_is_an_error(tmp_path, monkeypatch):
    wrong = [lambda inputs: (inputs[0], inputs[0].long())]
    monkeypatch.setattr(files, "_write_onnx", lambda *_: wrong)
    with pytest.raises(RuntimeError, match=r"half\.onnx gives other results than the model: 100"):
        write_graphs([half()], tmp_path, "onnx")


def test_a_program_has_no_paths_of_this_machine():
    program = traced(half())
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)


def test_no_k_is_an_error():
    with pytest.raises(ValueError, match="num_kept has no value and must have one or more"):
        tokenizer_graphs(tiny(), ())


def test_a_k_that_the_layers_do_not_reach_is_an_error():
    with pytest.raises(ValueError, match=r"num_kept \(3\) must be at least 4"):
        tokenizer_graphs(tiny(), (3,))


@pytest.mark.parametrize("part", PARTS)
def test_graphs_of_every_kind_of_part_compute_what_it_does(part):
    name, _, kind = part.partition("=")
    model = random(replaced(shrink(digits32()), {name: kind}).model)
    if kind in {"kl", "none"} and name == "model.quantizer.kind":
        with pytest.raises(ValueError, match="a graph needs tokens with indices"):
            tokenizer_graphs(model, (16,))
        return
    if name == "model.condition.kind" and kind != "none":
        with pytest.raises(ValueError, match="a graph has no place for a condition"):
            tokenizer_graphs(model, (16,))
        return
    graphs = {graph.name: graph for graph in tokenizer_graphs(model, (16,))}
    image = images(model, 2)
    encoded = model.encode(image, 16)
    tokens = graphs["encoder_16"].module(image)
    assert torch.equal(tokens[0], encoded.indices)
    decoded = graphs["decoder"].module(*tokens)
    torch.testing.assert_close(decoded, model.decode(encoded.indices, encoded.layout))
    assert ("recovery" in graphs) == (model.has_maps and model.expander.can_infer)


OTHER_REDUCERS = sorted({part.partition("=")[2] for part in PARTS if "reducer" in part} - {"merge"})
NOT_EXPORTED = {*OTHER_REDUCERS, "mask_tokens", "fuse"}


@pytest.mark.parametrize("kind", OTHER_REDUCERS)
def test_a_tokenizer_that_does_not_merge_is_refused_before_anything_is_written(kind, tmp_path):
    run = replaced(shrink(digits32()), {"model.reducer.kind": kind})
    random(run.model).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"reducer of kind {kind}, and those of kind merge"):
        export_folder(str(tmp_path / "model"), tmp_path / "out", "pt2")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", [each for each in PARTS if each.partition("=")[2] not in NOT_EXPORTED]
)
def test_every_kind_of_part_can_be_exported(part, tmp_path):
    name, _, kind = part.partition("=")
    random(replaced(shrink(digits32()), {name: kind}).model).save_pretrained(tmp_path / "model")
    require_exact(tmp_path, "16")


@pytest.mark.slow
def test_photographs_can_be_exported(tmp_path):
    random(photos64().model).save_pretrained(tmp_path / "model")
    require_exact(tmp_path, "36,144")


def require_exact(folder, num_kept):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    options = ["--out", folder / "out", "--num-kept", num_kept]
    done = export("onnx", folder / "model", *options)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "out" / "export.json").read_text(encoding="utf-8"))
    for graph in record["graphs"]:
        assert graph["equal"] == 1, graph
        assert graph["largest_difference"] < 1e-4, graph
