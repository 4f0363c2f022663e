"""The tokenizer: image to discrete tokens with a source map, and back.

Source: Li et al. 2025, "MergeVQ: A Unified Framework for Visual Generation and Representation with
Disentangled Token Merging and Quantization", section 3 and appendix A (arXiv:2504.00999).

Differs: kept tokens leave in canonical order; the source map is returned and passed in, nothing is
left behind in a module; the source predictor sees positions of cells and of slots, lets kept codes
look at each other, and answers with the best map that is in canonical order; a patch stem has fixed
positions where the authors' code has none.

Shape letters: B batch, L grid tokens, K kept tokens, C channels, D bits, H and W pixels or cells.
"""

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from mergevq.config.base import Pool, Precision, RecoverySource, Stage, check_choice
from mergevq.config.parts import per_token
from mergevq.config.tokenizer import TokenizerConfig
from mergevq.data.layouts import Bits, Layout, grid_of, source_bits
from mergevq.data.prepare import Pictures, to_batch
from mergevq.nn.checks import require_finite
from mergevq.report.publication import Facts, upload, write_publication
from mergevq.runtime.artefacts import build_for, load_model, resolve, save_model, tokens_hash
from mergevq.runtime.device import autocast, lay_out, resolve_precision
from mergevq.runtime.settings import from_json
from mergevq.tokenizer.build import build_decoder, build_expander, build_quantizer, count_layers
from mergevq.tokenizer.conditions.values import checked
from mergevq.tokenizer.encoder import Embedded, Encoder
from mergevq.tokenizer.features import features
from mergevq.tokenizer.flows.decoder import FlowDecoder, Noise
from mergevq.tokenizer.seams import (
    Condition,
    Encoded,
    LaysOut,
    Quantized,
    Reconstruction,
    Regularized,
    TokenizerOutput,
    TokenSet,
)


class Tokenizer(nn.Module):
    """Images to discrete tokens and back.

    Examples:
        >>> from mergevq.config.parts import CnnDecoder, CnnStem, Merge
        >>> from mergevq.config.tokenizer import TokenizerConfig
        >>> config = TokenizerConfig(
        ...     image_size=32, stem=CnnStem(channels=16), reducer=Merge(num_layers=3, num_heads=4),
        ...     decoder=CnnDecoder(channels=16, num_layers=1, num_heads=4), num_kept=16)
        >>> tokenizer = Tokenizer(config).eval()
        >>> encoded = tokenizer.encode(torch.zeros(2, 3, 32, 32), num_kept=20)
        >>> encoded.indices.shape, encoded.source.index.shape
        (torch.Size([2, 20]), torch.Size([2, 64]))
        >>> tokenizer.decode(encoded.indices, encoded.source).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, config: TokenizerConfig) -> None:
        """Build with random weights; `from_pretrained` loads trained ones."""
        super().__init__()
        self.config = config
        self.precision: Precision = "float32"
        """Precision of `encode`, `decode`, `recover` and features, whose results are in the type of
        the weights all the same; float32 adds nothing to an autocast around the call."""
        self.flow: FlowDecoder | None = None
        """Decoder that `decode` takes in the place of this tokenizer's own; of other weights."""
        self.encoder = Encoder(config)
        self.quantizer = build_quantizer(config.quantizer)
        dim, style_dim = config.expander.given_dims(config.decoded_dim)
        # The decoder draws first, so that a seed gives the weights it always gave.
        self.decoder = build_decoder(config, dim, style_dim)
        self.expander = build_expander(config, self.quantizer)

    def __repr__(self) -> str:
        """Size, tokens, bits and parameters in a few lines, not the tree of modules."""
        config, weight = self.config, self.encoder.class_token
        side, cells = config.image_size, config.grid_size
        trained = "" if config.kept_range is None else f", trained on {config.kept_range}"
        parts = ("stem", "reducer", "quantizer", "expander", "decoder")
        bits = self.bits(config.num_kept).total
        whole = "" if math.isnan(bits) else f", {bits:.0f} an image with its layout"
        lines = (
            f"{side} x {side} pixels, {cells} x {cells} cells of {config.patch_size} pixels",
            f"K {config.num_kept} of {config.most_kept((cells, cells))}{trained}",
            f"{per_token(config.quantizer)} a token{whole}",
            ", ".join(f"{name} {getattr(config, name).kind}" for name in parts),
            f"{sum(each.numel() for each in self.parameters()):,} parameters, "
            f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}",
        )
        return "\n  ".join(["Tokenizer(", *lines]) + "\n)"

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        precision: Precision = "auto",
        device: torch.device | str = "cpu",
        decoder: str | Path | None = None,
    ) -> "Tokenizer":
        """Load from a directory that `save_pretrained` or training wrote, or from the hub.

        A directory never touches the network; on the hub, a model is `owner/name@revision`.
        The tokenizer comes back in evaluation mode.

        Args:
            path: the directory, the name of a model of the package, or the name on the hub.
            revision: commit, tag or branch of a model on the hub, where the name has none.
            precision: of the calls. `auto` is bf16 where the device gains from it: a sign of a
                latent near 0 may then differ from float32's, and with it an index.
            device: where to compute.
            decoder: directory of a decoder that was trained for this tokenizer, or its id on the
                hub, to decode with; None is the tokenizer's own.

        Raises:
            ValueError: the artefact is of another kind or format, its weights do not fit, there is
                no such precision, or the decoder is another tokenizer's.
        """
        dtype = resolve_precision(precision, torch.device(device))
        directory = resolve(path, revision)
        saved = load_model(directory, kind="tokenizer")
        config = from_json(TokenizerConfig, saved.record["config"])
        tokenizer = cls.from_weights(config, saved.state).eval()
        tokenizer.precision = precision
        lay_out(tokenizer, torch.device(device), dtype)
        if decoder is not None:
            tokenizer.flow = FlowDecoder.from_pretrained(
                decoder, tokens_id=tokens_hash(directory), device=device
            )
        return tokenizer

    @classmethod
    def from_weights(cls, config: TokenizerConfig, state: Mapping[str, Tensor]) -> "Tokenizer":
        """Build a tokenizer that has these weights, which may be a stranger's.

        Raises:
            ValueError: the weights are not those of such a tokenizer.
        """
        return build_for(lambda: cls(config), state, layers=count_layers(config))

    def save_pretrained(self, path: str | Path) -> None:
        """Write `model.safetensors` and `config.json` into a directory."""
        save_model(Path(path), self.state_dict(), self.config, kind="tokenizer")

    def push_to_hub(self, name: str, facts: Facts) -> str:
        """Publish on Hugging Face, with a card; `mergevq publish` does it for a directory.

        Args:
            name: `owner/name`.
            facts: licence of the weights, and what else the card is made from.

        Returns:
            `owner/name@commit`, which `from_pretrained` takes.

        Raises:
            ValueError: no such name or licence, or an evaluation of another model.
            RuntimeError: the `hub` extra is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder, "model"))
            written = write_publication(Path(folder, "model"), name, facts, Path(folder, "card"))
            return upload(written, name)

    def set_checkpointing(self, *, enabled: bool) -> None:
        """Trade time for memory in training: recompute activations in the backward pass."""
        self.encoder.reducer.checkpointing = enabled
        self.decoder.checkpointing = enabled

    def num_tokens(self, image: Float[Tensor, "b 3 h w"], num_kept: int | None = None) -> int:
        """Tokens `encode` returns per image; there are no special ones.

        Raises:
            ValueError: the size or K is not legal.
        """
        return self.resolve_num_kept(self.grid_shape(image), num_kept)

    def grid_shape(self, image: Float[Tensor, "b 3 h w"]) -> tuple[int, int]:
        """(height, width) of the token grid of an image.

        Raises:
            ValueError: a side is not a multiple of the patch size; the message lists what is legal.
        """
        patch = self.config.patch_size
        height, width = image.shape[2:]
        if height % patch or width % patch or not height or not width:
            nearest = [max(patch, round(side / patch) * patch) for side in (height, width)]
            raise ValueError(
                f"image size ({height} x {width}) must be multiples of the patch size ({patch}) "
                f"in both directions, such as {nearest[0]} x {nearest[1]}; trained at "
                f"{self.config.image_size} x {self.config.image_size}. Resize, crop or tile it: "
                "mergevq.encode_image does, with size_policy 'resize' or 'tile'"
            )
        return height // patch, width // patch

    def embed(self, image: Pictures) -> Embedded:
        """Run the stem, for `encode` at several K: most of the work of a tokenizer with CNNs.

        Args:
            image: in any form of `mergevq.data.prepare.to_batch`.

        Raises:
            ValueError: wrong type, range or size.
        """
        image = self.batch(image)
        self.grid_shape(image)
        with self.computing():
            return self.encoder.embed(image)

    def encode(
        self,
        image: Pictures | Embedded,
        num_kept: int | None = None,
        condition: Condition | None = None,
    ) -> Encoded:
        """Image to tokens.

        Args:
            image: a floating-point tensor in [-1, 1], or any other form of
                `mergevq.data.prepare.to_batch`, such as a PIL image; sides are multiples of the
                patch size. Or what `embed` gave of it, which gives the same bits.
            num_kept: K, any integer from 1 to L that the layers reach; None is the nominal K, in
                proportion to the grid when the image is not of the trained size.
            condition: of the images, where the encoder sees one; see `conditions.values.checked`.

        Raises:
            ValueError: wrong type, range, size or K, or a condition is missing.
            RuntimeError: a latent is not finite, of which every sign would be a code.
        """
        embedded = image if isinstance(image, Embedded) else self.embed(image)
        tokens, grid_shape = embedded
        num_kept = self.resolve_num_kept(grid_shape, num_kept)
        if condition is not None or self.encoder.condition is not None:
            condition = self._condition(condition, len(tokens))
        with self.computing():
            out = self.encoder.reduce(embedded, num_kept, condition=condition)
            encoded, _ = self._tokens(out, grid_shape, num_kept)
        require_finite("latents", encoded.latents)
        return encoded._replace(
            codes=self.finished(encoded.codes),
            class_token=self.finished(encoded.class_token),
            latents=self.finished(encoded.latents),
        )

    def decode(
        self,
        tokens: Float[Tensor, "b k d"] | Int64[Tensor, "b k p"] | Int64[Tensor, "b k"],
        layout: Layout,
        grid_shape: tuple[int, int] | None = None,
        noise: Noise | None = None,
        condition: Condition | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Tokens to image, in about [-1, 1] and not clamped.

        Args:
            tokens: codes, parts, or indices.
            layout: places of the tokens; of a merging tokenizer the source map.
            grid_shape: (height, width) in cells; None is a square, of a layout without cells the
                trained one.
            noise: seed and numbers of the images, for a decoder that begins from noise; None is
                seed 0 and their places in the batch.
            condition: of the images, where the tokenizer has one; see `conditions.values.checked`.

        Raises:
            ValueError: the grid is not a square and no shape was given, or does not fit; or a
                condition is missing.
        """
        grid_shape = grid_of(layout, grid_shape, self.config.num_tokens)
        if tokens.shape[1] != layout.num_kept:
            raise ValueError(
                f"tokens ({tokens.shape[1]}) must be as many as the source keeps "
                f"({layout.num_kept})"
            )
        codes = self.decoded(self._read(tokens))
        condition = self._condition(condition, len(codes))
        with self.computing():
            if self.flow is not None:
                image = self.flow.decode(codes, layout, grid_shape, noise)
            else:
                given = self.expander(codes, layout, grid_shape, condition=condition)
                image = self.decoder(given)
        return self.finished(image)

    def codes_of(self, indices: Int64[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        """Codes of tokens by their indices, in the dtype of the decoder's weights.

        Raises:
            ValueError: an index is outside the codebook.
        """
        return self.codes_of_parts(self.quantizer.spec.split(indices))

    def codes_of_parts(self, parts: Int64[Tensor, "*b p"]) -> Float[Tensor, "*b d"]:
        """Codes of tokens, in the dtype of the decoder's weights.

        Raises:
            ValueError: there are other parts, or a part has no such value.
        """
        self.quantizer.spec.check(parts)
        return self.quantizer.decode(parts).to(self._dtype)

    def decoded(self, codes: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d2"]:
        """The channels of codes that expander and decoder are given: all, or the pixel branch."""
        left_out = self.config.quantizer.dim - self.config.decoded_dim
        return codes[..., left_out:] if left_out else codes

    def _read(
        self, tokens: Float[Tensor, "b k d"] | Int64[Tensor, "b k p"] | Int64[Tensor, "b k"]
    ) -> Float[Tensor, "b k d"]:
        """Codes of tokens in any form."""
        if tokens.is_floating_point():
            return tokens
        return self.codes_of(tokens) if tokens.ndim == 2 else self.codes_of_parts(tokens)

    def recover(
        self,
        tokens: Float[Tensor, "b k d"] | Int64[Tensor, "b k p"] | Int64[Tensor, "b k"],
        grid_shape: tuple[int, int] | None = None,
        anchors: Int64[Tensor, "b k"] | None = None,
    ) -> Layout:
        """The layout of kept tokens: inferred from them alone, where grid and K do not imply it.

        Args:
            tokens: codes, parts, or indices.
            grid_shape: (height, width) in cells; None is the trained one.
            anchors: cell at which each token opens, when known; None is unknown.
        """
        tokens = self._read(tokens)
        shape = grid_shape or (self.config.grid_size, self.config.grid_size)
        implied = self._implied(shape, tokens.shape[1], len(tokens))
        if implied is not None:
            return implied.to(tokens.device)
        with self.computing():
            return self.expander.infer(self.decoded(tokens), shape, anchors)

    def bits(self, num_kept: int, grid_shape: tuple[int, int] | None = None) -> Bits:
        """Bits of one image: its K tokens, its layout where the image decides it, its condition.

        Of tokens that are real numbers it is NaN.

        Args:
            num_kept: K.
            grid_shape: (height, width) in cells; None is the trained one.
        """
        shape = grid_shape or (self.config.grid_size, self.config.grid_size)
        per_token, told = self.quantizer.spec.bits, self.config.condition.bits
        implied = self._implied(shape, num_kept, 1)
        if implied is not None:
            return implied.bits(per_token)._replace(condition=told)
        return Bits(num_kept * per_token, source_bits(math.prod(shape), num_kept), told)

    @property
    def has_maps(self) -> bool:
        """Whether each image has a layout of its own, which costs bits and may be recovered."""
        cells = self.config.grid_size
        shape = (cells, cells)
        return self._implied(shape, self.config.num_kept, 1) is None

    def _implied(self, shape: tuple[int, int], num_kept: int, num_images: int) -> Layout | None:
        """The layout that grid and K imply; None where images differ (`Reducer.implied`)."""
        part = self.quantizer if isinstance(self.quantizer, LaysOut) else self.encoder.reducer
        return part.implied(shape, num_kept, num_images)

    def reconstruct(
        self,
        image: Pictures | Embedded,
        num_kept: int | None = None,
        source: RecoverySource = "given",
        noise: Noise | None = None,
        condition: Condition | None = None,
    ) -> Reconstruction:
        """Encode and decode, with the encoder's source or the one inferred from the codes."""
        check_choice("source", source, RecoverySource)
        encoded = self.encode(image, num_kept, condition)
        used = encoded.layout
        if source == "recovered":
            used = self.recover(encoded.codes, encoded.grid_shape)
        image = self.decode(encoded.codes, used, encoded.grid_shape, noise, condition)
        return Reconstruction(image, encoded, used)

    def features(
        self,
        image: Pictures,
        *,
        num_kept: int | None = None,
        layer: int | None = None,
        stage: Stage = "merged",
        pool: Pool = "none",
    ) -> Float[Tensor, "b *n c"]:
        """Representation of an image.

        Args:
            image: as `encode` takes it.
            num_kept: K; not used by `pre_merge`.
            layer: blocks to run, from 0 (the stem) to all; None is all. `latents` and `quantized`
                take all.
            stage: `pre_merge` runs with merging off (L tokens of C channels), `merged` gives the
                tokens left after `layer` blocks, `unmerged` those copied back to all L cells,
                `latents` K tokens before quantization, of D channels or of D means and D
                log-variances, `quantized` the K codes.
            pool: `none` keeps the tokens, `class` is the class token, `mean` the mean over tokens,
                `size_weighted_mean` the mean over grid cells.

        Raises:
            ValueError: the layer does not exist, or is not the last of a stage that needs it.
        """
        return features(self, image, num_kept, layer, stage, pool)

    @property
    def num_layers(self) -> int:
        """Blocks of the encoder."""
        return len(self.encoder.reducer.blocks)

    def forward(  # noqa: PLR0913 - all that differs between steps
        self,
        image: Float[Tensor, "b 3 h w"],
        num_kept: int,
        view: Float[Tensor, "b 3 v v2"] | None = None,
        *,
        quantized: bool = True,
        source_gradient: float = 0.0,
        recovers: Bool[Tensor, "b"] | None = None,
        uniforms: Float[Tensor, "b k d"] | None = None,
        regularize: Callable[[Quantized], Regularized] | None = None,
        decoder_layer: int | None = None,
        condition: Condition | None = None,
    ) -> TokenizerOutput:
        """One training pass, without checks: every parameter takes part in it.

        Args:
            image: in [-1, 1].
            num_kept: K for `image`.
            view: a second view for alignment, merged in the same proportion to its own grid.
            quantized: False lets the decoder see the latents themselves (early training).
            source_gradient: share of the source predictor's gradient that reaches the codes.
            recovers: images decoded with the recovered source instead of the given one; None is
                none.
            uniforms: numbers in [0, 1) of the tokens, for a quantizer that draws in training; None
                draws nothing.
            regularize: gives the tokens that the expander is given, of those that there are; the
                losses, and the tokens returned, are without it. None leaves them as they are.
            decoder_layer: block of the decoder whose tokens are returned too, from 1; 0 is before
                the first, None is none.
            condition: of the images, where the tokenizer has one.
        """
        out = self.encoder(image, num_kept, condition=condition)
        encoded, quantization = self._tokens(out, self.grid_shape(image), num_kept, uniforms)
        codes, lengths = encoded.codes, None
        if regularize is not None:
            codes, lengths = regularize(quantization)
        fixed = codes.detach()
        seen = fixed + source_gradient * (codes - fixed)
        # Until quantization starts, bounded latents keep the decoder's input on the codes' scale.
        tokens = codes if quantized else encoded.latents.tanh()
        expanded = self.expander.train_pass(
            self.decoded(tokens),
            self.decoded(seen),
            encoded.layout,
            encoded.grid_shape,
            inferred=recovers,
            lengths=lengths,
            condition=condition,
        )
        outputs = {} if decoder_layer is None else {decoder_layer: expanded.given.tokens}
        reconstruction = self.decoder(expanded.given, outputs)
        if view is None:
            summary = self.encoder.summary(out, encoded.codes)
        else:
            proportion = num_kept / math.prod(encoded.grid_shape)
            view_kept = self.config.kept_in_proportion(self.grid_shape(view), proportion)
            summary = self._view_summary(self.encoder(view, view_kept, condition=condition))
        losses = {**self.quantizer.losses(encoded.latents), **expanded.losses, **(out.losses or {})}
        decoded = None if decoder_layer is None else outputs[decoder_layer]
        return TokenizerOutput(reconstruction, encoded, losses, summary, decoded)

    def _view_summary(self, out: TokenSet) -> Float[Tensor, "b c"]:
        """Summary of a view, of whose tokens nothing is drawn."""
        if self.config.branches.semantic_dim == 0:
            return self.encoder.summary(out)
        return self.encoder.summary(out, self.quantizer(self.encoder.latents(out)).codes)

    def _tokens(
        self,
        out: TokenSet,
        grid_shape: tuple[int, int],
        num_kept: int,
        uniforms: Float[Tensor, "b k d"] | None = None,
    ) -> tuple[Encoded, Quantized]:
        """Tokens of what the encoder gave, and the same as the quantizer has them."""
        latents = self.encoder.latents(out)
        quantized = self.quantizer(latents, uniforms)
        layout = out.layout
        if isinstance(self.quantizer, LaysOut):
            quantized = Quantized(quantized.codes[:, :num_kept], quantized.parts[:, :num_kept])
            layout = self.quantizer.implied(grid_shape, num_kept, len(latents))
        codes, parts = quantized
        encoded = Encoded(
            codes=codes,
            parts=parts,
            layout=layout,
            grid_shape=grid_shape,
            class_token=out.class_token,
            latents=latents,
            sizes=self.quantizer.spec.sizes,
        )
        return encoded, quantized

    def _condition(self, condition: Condition | None, num_images: int) -> Condition | None:
        """A condition where the weights are; a ValueError if it is none of the tokenizer's."""
        return checked(self.config.condition, condition, num_images, self.encoder.class_token)

    def resolve_num_kept(self, grid_shape: tuple[int, int], num_kept: int | None) -> int:
        """K for a grid, checked against it and against the trained range."""
        config, num_tokens = self.config, math.prod(grid_shape)
        if num_kept is None:
            return self.config.kept_in_proportion(grid_shape, config.num_kept / config.num_tokens)
        config.kept_by.check_kept(grid_shape, num_kept)
        if config.kept_range is not None and num_tokens == config.num_tokens:
            low, high = config.kept_range
            if not low <= num_kept <= high:
                warnings.warn(
                    f"num_kept ({num_kept}) is outside the {low} to {high} tokens this tokenizer "
                    "was trained with; expect worse reconstructions",
                    stacklevel=3,
                )
        return num_kept

    def computes_in(self) -> torch.dtype | None:
        """The dtype that calls are autocast to where the weights are; None is their own."""
        device = self.encoder.class_token.device
        return None if device.type == "meta" else resolve_precision(self.precision, device)

    def computing(self) -> AbstractContextManager[object]:
        """Context of a call's precision."""
        dtype = self.computes_in()
        return nullcontext() if dtype is None else autocast(self.encoder.class_token.device, dtype)

    def finished(self, result: Tensor) -> Tensor:
        """A result in the type of the weights, where the call chose its own."""
        return result if self.computes_in() is None else result.to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """Type of the decoder's weights."""
        return next(self.decoder.parameters()).dtype

    def batch(self, image: Pictures) -> Float[Tensor, "b 3 h w"]:
        """Images as the encoder takes them; a ValueError if they are none."""
        return to_batch(image, like=self.encoder.class_token)
