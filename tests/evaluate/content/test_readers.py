"""The reader reads words that are as large as print."""

import pytest
import torch

from mergevq.data.prepare import to_tensor
from mergevq.evaluate.content.readers import RapidOcr
from mergevq.evaluate.content.text import cut_out
from mergevq.evaluate.content.words import rendered
from mergevq.metrics.image import to_uint8


@pytest.mark.slow
def test_large_words_are_read_and_grey_is_not():
    pytest.importorskip("rapidocr")
    reader = RapidOcr()
    found = [
        (to_uint8(to_tensor(each.image)), word)
        for each in rendered(6, 128, 0)
        for word in each.words
    ]
    large = [(pixels, word) for pixels, word in found if word.height >= 12]
    assert len(large) >= 3
    assert reader.read([cut_out(*pair) for pair in large]) == [word.text for _, word in large]
    assert reader.read([torch.full((3, 48, 120), 128, dtype=torch.uint8)]) == [""]
    assert reader.record["name"] == "rapidocr"
    assert len(reader.record["sha256"]) == 64
