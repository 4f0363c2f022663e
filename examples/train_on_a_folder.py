# %% [markdown]
# # Train a tokenizer on a folder of images
#
# A folder is all it takes: sub-folders are classes, names and sizes do not matter. Here the
# folder is filled with handwritten digits first; point `FOLDER` at pictures of your own, and take
# a recipe of their size (`mergevq recipes`): `photos64` instead of `digits32`.

# %%
from dataclasses import replace
from pathlib import Path

import mergevq
from mergevq.report.pictures import contact_sheet, to_pil

OUT = Path("runs/examples/train_on_a_folder")
FOLDER = OUT / "pictures"
STEPS = 30  # Of 640, which take minutes: enough to see that it learns.

# %% [markdown]
# ## A folder

# %%
digits = mergevq.open_images("digits")
for k in range(200):
    place = FOLDER / digits.class_names[digits.label(k)]
    place.mkdir(parents=True, exist_ok=True)
    digits.read(k).save(place / f"{k:04d}.png")

# %% [markdown]
# ## A recipe, with a few fields of its own
#
# Settings are values: `replace` makes another run of a run. `mergevq train digits32 --data.path
# ..` does the same from the command line.

# %%
run = mergevq.recipe("digits32")
run = replace(
    run,
    data=replace(run.data, path=str(FOLDER)),
    optim=replace(run.optim, warmup_steps=5),
    train=replace(run.train, num_steps=STEPS, batch_size=16, eval_every=STEPS, image_every=STEPS),
    out=str(OUT / "run"),
)
model = mergevq.train(run)

# %% [markdown]
# ## Some of what it makes of pictures that it has not seen

# %%
tokenizer = mergevq.Tokenizer.from_pretrained(model)
pictures = [digits.read(k).resize((32, 32)) for k in range(1000, 1008)]
again = tokenizer.reconstruct(pictures).image
contact_sheet([pictures, [to_pil(image) for image in again.detach()]]).save(OUT / "again.png")
print(f"{STEPS} steps: {model}, pictures in {OUT / 'again.png'}")
