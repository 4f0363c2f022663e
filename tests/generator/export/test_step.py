"""One step of MergeAR with its cache outside, beside the full masked forward."""

import pytest
import torch

from mergevq.generator.export.step import generator_graphs
from mergevq.generator.orders.merge import first_occurrence
from tests.support.generators import tiny_batch, tiny_generator


def chained(run, model, sequences):
    """Logits of all tokens, one step after the other, by MergeAR's rules."""
    config = model.config
    row = torch.full_like(sequences.class_label, config.kept_candidates.index(sequences.num_kept))
    state, keys, values = run["generator_start"]([sequences.class_label, row])
    first, parts = first_occurrence(sequences.indices), model.network.codes(sequences.indices)
    logits = []
    for token in range(config.num_tokens):
        logits.append(run["generator_head"]([state, parts[:, token]]))
        visible = torch.ones(len(state), keys.shape[3], dtype=torch.bool)
        for old in range(token):
            recent = token - old <= config.order.window
            visible[:, config.num_prefix + old] = first[:, old] | recent
        inputs = [sequences.indices[:, token], torch.tensor(token), keys, values, visible]
        state, keys, values = run["generator_step"](inputs)
    return [torch.stack(part, 1) for part in zip(*logits, strict=True)]


@pytest.mark.parametrize("batch", [1, 3])
def test_steps_give_the_logits_of_the_full_masked_forward(batch):
    model = tiny_generator("merge").requires_grad_(False)
    sequences = tiny_batch("merge", batch=batch)
    modules = {graph.name: graph.module for graph in generator_graphs(model)}
    run = {name: lambda inputs, each=each: each(*inputs) for name, each in modules.items()}
    with torch.no_grad():
        wanted = model.logits(sequences)
        for part, right in zip(chained(run, model, sequences), wanted, strict=True):
            torch.testing.assert_close(part, right, atol=1e-4, rtol=1e-4)


def test_a_hidden_input_has_no_effect():
    """Every key and value that is not seen is replaced, and the state stays."""
    graphs = generator_graphs(tiny_generator("merge").requires_grad_(False))
    step = graphs[1]
    inputs = dict(step.inputs)
    hidden = torch.tensor([[True, True, False], [True, False, True]])
    inputs["visible"] = hidden
    with torch.no_grad():
        state, _, _ = step.module(*inputs.values())
        for name in ("keys", "values"):
            inputs[name] = inputs[name].masked_fill(~hidden[None, :, None, :, None], 7.0)
        again, _, _ = step.module(*inputs.values())
        inputs["visible"] = torch.ones_like(hidden)
        other, _, _ = step.module(*inputs.values())
    assert torch.equal(state, again)
    assert not torch.allclose(state, other)


@pytest.mark.parametrize("order", ["raster", "random", "anchor"])
def test_other_orders_are_refused_by_name(order):
    with pytest.raises(ValueError, match=rf"order \({order}\w*\) must be merge: .* leave out"):
        generator_graphs(tiny_generator(order))
