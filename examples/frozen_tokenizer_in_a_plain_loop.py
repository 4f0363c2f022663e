# %% [markdown]
# # A frozen tokenizer in a plain training loop
#
# The tokenizer is an `nn.Module` that is asked for tokens inside somebody's own loop: here a
# linear classifier of handwritten digits that sees a bag of tokens, and no pixel.

# %%
import torch
from torch import nn

import mergevq

NUM_IMAGES, NUM_HELD_OUT, NUM_KEPT, STEPS = 320, 80, 20, 40

# %%
tokenizer = mergevq.Tokenizer.from_pretrained("digits32").requires_grad_(requires_grad=False)
digits = mergevq.open_images("digits", max_images=NUM_IMAGES)
# One conversion for pictures, arrays and tensors; the pictures of a list have one size.
pictures = [digits.read(k).resize((32, 32)) for k in range(NUM_IMAGES)]
labels = torch.tensor([digits.label(k) for k in range(NUM_IMAGES)])

# %% [markdown]
# A token is a number below `2**bits`. Tokens are encoded once, as nothing in them is learned
# here.

# %%
with torch.inference_mode():
    indices = torch.cat(
        [tokenizer.encode(pictures[k : k + 80], NUM_KEPT).indices for k in range(0, NUM_IMAGES, 80)]
    )
train, held_out = slice(NUM_HELD_OUT, None), slice(NUM_HELD_OUT)

# %%
model = nn.EmbeddingBag(2**8, digits.num_classes, mode="mean")
optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
for _ in range(STEPS):
    loss = nn.functional.cross_entropy(model(indices[train].clone()), labels[train])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
with torch.inference_mode():
    accuracy = (model(indices[held_out]).argmax(1) == labels[held_out]).float().mean()
print(f"{accuracy:.0%} of {NUM_HELD_OUT} digits are told by a bag of {NUM_KEPT} tokens")
