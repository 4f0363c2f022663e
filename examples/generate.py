# %% [markdown]
# # Make images of a class
#
# The generator that comes with the package writes the tokens of a handwritten digit, and its
# tokenizer decodes them. Image k of a run depends on its seed and on k alone.

# %%
from pathlib import Path

import torch

import mergevq
from mergevq.config.generator import (
    SampleRun,
    SamplingSettings,
)
from mergevq.report.pictures import contact_sheet, to_pil

OUT = Path("runs/examples/generate")
ROWS = 4

# %%
pair = mergevq.load_pair("digits32_ar", "digits32", torch.device("cpu"))
pair.generator  # A notebook shows it.

# %% [markdown]
# `guidance_scale` trades variety for images that are plainly of their class; 1 is none, and twice
# as fast.

# %%
run = SampleRun(
    model="digits32_ar",
    tokenizer="digits32",
    num_images=10 * ROWS,
    seed=0,
    settings=SamplingSettings(guidance_scale=2.0),
)
sampled, images = mergevq.generate(pair, run, range(10 * ROWS))

# %%
rows = [[to_pil(image) for image in row] for row in images.split(10)]
OUT.mkdir(parents=True, exist_ok=True)
contact_sheet(rows, [str(k) for k in range(10)]).save(OUT / "samples.png")
print(
    f"{len(images)} digits of {sampled.indices.shape[1]} cells in {sampled.num_forward} passes: "
    f"{OUT / 'samples.png'}"
)
