# %% [markdown]
# # Edit an image by its tokens
#
# A source map says which token each cell of the grid copies. So a part of one image is put into
# another by its cells: take the tokens of the left half of one digit and of the right half of
# another, make a map of them, and decode. The decoder joins the strokes.

# %%
from pathlib import Path

import torch

import mergevq
from mergevq.report.pictures import contact_sheet, to_pil

OUT = Path("runs/examples/edit")
PAIRS = 8

# %%
tokenizer = mergevq.Tokenizer.from_pretrained("digits32")
digits = mergevq.open_images("digits")
pictures = [digits.read(k).resize((32, 32)) for k in range(2 * PAIRS)]
with torch.inference_mode():
    encoded = tokenizer.encode(pictures)
cells = encoded.indices.gather(1, encoded.source.index)
rows, columns = encoded.grid_shape

# %% [markdown]
# Cells of equal tokens become one again. In canonical order a token is numbered by the first cell
# that has it, as every source map has them.


# %%
def merged(cells):
    """Distinct tokens of an image by their first cell, and the map of its cells to them."""
    distinct = list(dict.fromkeys(cells.tolist()))
    index = torch.tensor([[distinct.index(cell) for cell in cells.tolist()]])
    return torch.tensor([distinct]), mergevq.Source(index, len(distinct))


is_left = (torch.arange(rows * columns) % columns) < columns // 2
edited, counts = [], []
for first, second in zip(cells[0::2], cells[1::2], strict=True):
    tokens, source = merged(torch.where(is_left, first, second))
    with torch.inference_mode():
        edited.append(to_pil(tokenizer.decode(tokens, source)[0]))
    counts.append(source.num_kept)

# %%
OUT.mkdir(parents=True, exist_ok=True)
table = [pictures[0::2], pictures[1::2], edited]
contact_sheet(table, row_titles=["left of", "right of", "edited"]).save(OUT / "edited.png")
print(f"{PAIRS} digits of two halves, {min(counts)} to {max(counts)} tokens: {OUT / 'edited.png'}")
