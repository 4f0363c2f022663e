# %% [markdown]
# # Token files for somebody's own model
#
# Encode a data set once into files, then read rows of it in any loop: `open_tokens` is a
# `torch.utils.data.Dataset`, whose rows have `indices`, `source` and `label`. Here a small
# transformer tells digits by their tokens and by the cells that each stands for.

# %%
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, random_split

import mergevq
from mergevq.tokenizer.encode import encode

OUT = Path("runs/examples/tokens_for_a_classifier")
NUM_KEPT, EPOCHS, DIM = 20, 6, 64

# %%
encode("digits32", "digits", OUT / "tokens", num_kept=[NUM_KEPT], num_workers=0)
tokens = mergevq.open_tokens(OUT / "tokens")
draw = torch.Generator().manual_seed(0)
train_set, held_out = random_split(tokens, [0.8, 0.2], generator=draw)


# %%
class Classifier(nn.Module):
    """Each cell of the grid is the sum of its token's embedding and its own."""

    def __init__(self, num_values, num_cells, num_classes):
        super().__init__()
        self.token = nn.Embedding(num_values, DIM)
        self.cell = nn.Parameter(0.02 * torch.randn(num_cells, DIM))
        self.block = nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, dropout=0.0, batch_first=True)
        self.out = nn.Linear(DIM, num_classes)

    def forward(self, row):
        of_cell = row["indices"].gather(1, row["source"])
        return self.out(self.block(self.token(of_cell) + self.cell).mean(1))


# %%
torch.manual_seed(0)
model = Classifier(tokens.record.num_values, tokens.record.num_tokens, 10)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(EPOCHS):
    for row in DataLoader(train_set, batch_size=64, shuffle=True, generator=draw):
        loss = nn.functional.cross_entropy(model(row), row["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

# %%
with torch.inference_mode():
    row = next(iter(DataLoader(held_out, batch_size=len(held_out))))
    accuracy = (model(row).argmax(1) == row["label"]).float().mean()
print(f"{accuracy:.0%} of {len(held_out)} digits are told by {NUM_KEPT} tokens and their cells")
