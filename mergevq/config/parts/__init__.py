"""Settings of a tokenizer's parts, a tagged union for each seam; no torch.

Adding a part is a class in one of these files, a module, and a line in `mergevq.tokenizer.build`:
see docs/adding-a-part.md.
"""

from mergevq.config.parts.branches import Branches, OneBranch, TwoBranches
from mergevq.config.parts.checks import LayoutKind, require_heads
from mergevq.config.parts.decoders import CnnDecoder, Decoder, PatchDecoder
from mergevq.config.parts.expanders import Expander, MaskTokens, Unmerge
from mergevq.config.parts.flows import FlowDecoder, PrefixFlow
from mergevq.config.parts.quantizers import (
    Bernoulli,
    Binary,
    Branched,
    Bsq,
    Codebook,
    Continuous,
    Dimensions,
    EmaUpdate,
    Fsq,
    GradientUpdate,
    GroupedLfq,
    Kl,
    Lfq,
    Product,
    Quantizer,
    Residual,
    Shared,
    Unquantized,
    Update,
    bits_of,
    latent_dim,
    per_token,
    weights_of,
)
from mergevq.config.parts.reducers import (
    NUM_KEYS,
    DivPrune,
    LearnedMerge,
    Merge,
    MergeShape,
    Pool,
    Queries,
    Reducer,
    Select,
)
from mergevq.config.parts.regularizers import NoRegularizer, Perturb, Regularizer, TailDrop
from mergevq.config.parts.stems import CnnStem, PatchStem, Stem

__all__ = [
    "NUM_KEYS",
    "Bernoulli",
    "Binary",
    "Branched",
    "Branches",
    "Bsq",
    "CnnDecoder",
    "CnnStem",
    "Codebook",
    "Continuous",
    "Decoder",
    "Dimensions",
    "DivPrune",
    "EmaUpdate",
    "Expander",
    "FlowDecoder",
    "Fsq",
    "GradientUpdate",
    "GroupedLfq",
    "Kl",
    "LayoutKind",
    "LearnedMerge",
    "Lfq",
    "MaskTokens",
    "Merge",
    "MergeShape",
    "NoRegularizer",
    "OneBranch",
    "PatchDecoder",
    "PatchStem",
    "Perturb",
    "Pool",
    "PrefixFlow",
    "Product",
    "Quantizer",
    "Queries",
    "Reducer",
    "Regularizer",
    "Residual",
    "Select",
    "Shared",
    "Stem",
    "TailDrop",
    "TwoBranches",
    "Unmerge",
    "Unquantized",
    "Update",
    "bits_of",
    "latent_dim",
    "per_token",
    "require_heads",
    "weights_of",
]
