# %% [markdown]
# # Find similar images
#
# The class token of the tokenizer's encoder is a representation of the whole image: neighbours by
# its cosine are images of the same kind. This tokenizer's was trained with the labels, so it is
# tried on digits that were held out of its training.

# %%
from pathlib import Path

import torch
from torch.nn import functional

import mergevq
from mergevq.data.batches import split
from mergevq.report.pictures import contact_sheet

OUT = Path("runs/examples/retrieval")
NUM_SHOWN, NUM_NEIGHBOURS = 6, 7

# %%
tokenizer = mergevq.Tokenizer.from_pretrained("digits32")
_, digits = split(mergevq.open_images("digits"), mergevq.recipe("digits32").data.val_fraction)
pictures = [digits.read(k).resize((32, 32)) for k in range(len(digits))]
labels = torch.tensor([digits.label(k) for k in range(len(digits))])

# %% [markdown]
# `features` gives the representation at any depth; `pool="class"` is the class token.

# %%
with torch.inference_mode():
    features = torch.cat(
        [
            functional.normalize(tokenizer.features(pictures[k : k + 100], pool="class"), dim=1)
            for k in range(0, len(digits), 100)
        ]
    )
similarity = features @ features.T
similarity.fill_diagonal_(-1)
nearest = similarity.topk(NUM_NEIGHBOURS, dim=1).indices

# %%
OUT.mkdir(parents=True, exist_ok=True)
rows = [[pictures[k], *(pictures[n] for n in nearest[k].tolist())] for k in range(NUM_SHOWN)]
titles = ["query", *(f"{n + 1}." for n in range(NUM_NEIGHBOURS))]
contact_sheet(rows, titles).save(OUT / "neighbours.png")
share = (labels[nearest[:, 0]] == labels).float().mean()
print(f"the nearest of {len(digits)} digits is of the same class for {share:.0%}: {OUT}")
