"""Images come back as the tokenizer itself brings them back, at each K and by each map."""

from dataclasses import replace

import torch

from mergevq.config.evaluation import Reconstructor
from mergevq.config.parts.expanders import MaskTokens
from mergevq.config.parts.reducers import Queries
from mergevq.data.layouts import Ordered
from mergevq.evaluate.content.passes import Numbered, Way, open_passes
from mergevq.tokenizer.flows.decoder import Noise
from tests.support.evaluations import CONFIG, write_tokenizer

BATCH = Numbered(torch.tensor([0, 1]), torch.tensor([-1, -1]))


def images(seed=0):
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def opened(path, config, *num_kept):
    write_tokenizer(path, config)
    return open_passes(Reconstructor(model=str(path), num_kept=num_kept, device="cpu"))


def test_merged_tokens_come_back_at_each_k_by_both_maps(tmp_path):
    passes = opened(tmp_path, CONFIG, 4, 8, 4)
    assert passes.ways == [Way(k, source) for k in (4, 8) for source in ("given", "recovered")]
    for way in passes.ways:
        with torch.no_grad():
            wanted = passes.tokenizer.reconstruct(
                images(), way.num_kept, way.source, Noise(0, [0, 1])
            )
        assert torch.equal(passes.reconstruct(images(), way, BATCH), wanted.image)


def test_of_ordered_tokens_the_first_ones_come_back(tmp_path):
    config = replace(
        CONFIG,
        reducer=Queries(num_layers=1, num_heads=2, num_queries=8),
        expander=MaskTokens(num_layers=1, num_heads=2),
    )
    passes = opened(tmp_path, config, 3, 8)
    assert passes.ways == [Way(3, "given"), Way(8, "given")]
    tokenizer = passes.tokenizer
    with torch.no_grad():
        codes = tokenizer.encode(images()).codes
        first = tokenizer.decode(codes[:, :3], Ordered(3))
        whole = tokenizer.reconstruct(images()).image
    assert torch.equal(passes.reconstruct(images(), passes.ways[0], BATCH), first)
    assert torch.equal(passes.reconstruct(images(), passes.ways[1], BATCH), whole)
