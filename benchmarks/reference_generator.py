"""Decoding loops as they are usually written: what the package's cached decoding is timed against.

Source: Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image
Generation", section 2 (arXiv:2406.06525); Li et al. 2025, "MergeVQ", figure 6
(arXiv:2504.00999); Pang et al. 2024, "RandAR", section 3 (arXiv:2412.01827).

Three loops over one network:

    recompute    no cache: every step runs the whole sequence so far
    concatenate  a cache that grows: every layer of every step copies it to append to it
    buffer       a cache of the final length: every step reads all of it, under a mask

MergeAR's duplicates are hidden by a mask, none is ever dropped. Needs torch alone: nothing here is
the package's. Weights are a state dict of `Generator`, a configuration is anything with the fields
of `GeneratorConfig`.

Shape letters: B batch, N inputs, M keys, T tokens, P parts of a token, C channels, H heads,
D channels of a head.
"""

import torch
from torch import Tensor
from torch.nn import functional

WAYS = ("recompute", "concatenate", "buffer")


class Loop:
    """Decodes a batch, one pass of the transformer a step; chosen tokens gather in `parts`."""

    def __init__(
        self,
        state: dict[str, Tensor],
        config,
        labels: Tensor,
        num_kept: int,
        way: str,
        *,
        greedy: bool = False,
        guidance: float | None = None,
        order: Tensor | None = None,
        counts: list[int] | None = None,
    ) -> None:
        """Embed the prefix.

        Args:
            state: weights by name.
            config: sizes and order.
            labels: classes (B,); with guidance the second half is those of no class.
            num_kept: K.
            way: one of `WAYS`.
            greedy: take the most likely value, instead of drawing from torch's default generator.
            guidance: scale, between the two halves of the batch; both get the same tokens.
            order: of order `random`, slots (B, K) as they are decoded.
            counts: of order `random`, tokens decoded in each step.
        """
        self.state, self.config, self.num_kept = state, config, num_kept
        self.way, self.greedy, self.order, self.counts = way, greedy, order, counts
        self.guidance = guidance
        self.kv_bytes = 0
        self.device = state["class_embedding.weight"].device
        cells = torch.arange(config.num_tokens, device=self.device)
        self.cells = torch.stack(
            [cells // config.grid_size[1] + 1, cells % config.grid_size[1] + 1], -1
        ).float()
        prefix = state["class_embedding.weight"][labels][:, None]
        if config.kept_candidates:
            row = config.kept_candidates.index(num_kept)
            kept = state["kept_embedding.weight"][row].expand_as(prefix)
            prefix = torch.cat([prefix, kept], dim=1)
        self.prefix = prefix
        self.seek(prefix.new_zeros(len(labels), 0, len(config.part_sizes), dtype=torch.int64), 0)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        whole = self.config.order.kind in ("raster", "merge")
        return self.config.num_tokens if whole else self.num_kept

    def seek(self, parts: Tensor, num_steps: int) -> None:
        """Go on from tokens (B, T, P) that so many steps chose; what the cache holds is made up."""
        self.parts, self.num_steps = parts, num_steps
        batch, num_tokens, _ = parts.shape
        self.inputs, self.num_old = self.prefix, 0
        self.positions = torch.zeros(batch, self.prefix.shape[1], 2, device=self.device)
        self.memory: list[list[Tensor]] = []
        if num_tokens:
            self._append_inputs(0, num_tokens)
        if self.way == "recompute":
            return
        if num_tokens:
            # The last step's tokens have not been through the network.
            num_new = 2 * self.counts[num_steps - 1] if self.config.order.kind == "random" else 1
            self.num_old = self.inputs.shape[1] - num_new
            self.inputs = self.inputs[:, self.num_old :]
            self.positions = self.positions[:, self.num_old :]
        self._make_up_memory(batch)

    def _make_up_memory(self, batch: int) -> None:
        config = self.config
        shape = (batch, config.key_heads, self._most_inputs, config.head_dim)
        self.kv_bytes = (
            2 * config.num_layers * self.prefix.element_size() * torch.Size(shape).numel()
        )
        held = self._most_inputs if self.way == "buffer" else self.num_old
        for _ in range(config.num_layers):
            made_up = torch.randn(config.head_dim, dtype=self.prefix.dtype, device=self.device)
            pair = [made_up.expand(*shape[:2], held, -1).clone() for _ in range(2)]
            self.memory.append(pair)

    @property
    def _most_inputs(self) -> int:
        """Inputs there can be at once, those that only ask included."""
        if self.config.order.kind == "random":
            return self.prefix.shape[1] + 2 * self.num_kept
        return self.prefix.shape[1] + self.length

    @torch.no_grad()
    def step(self) -> None:
        """Choose the next token of each image, or the next few in order `random`."""
        if self.config.order.kind == "random":
            self._step_random()
            return
        state = self._states(self.inputs, self.positions, self._mask())[:, -1]
        token = self.parts.shape[1]
        chosen = self._choose(state, self._gap_mask(token))
        self.parts = torch.cat([self.parts, chosen[:, None]], dim=1)
        self._append_inputs(token, 1)

    def _step_random(self) -> None:
        """Ask for some slots at once; their instructions see all inputs and themselves."""
        done = self.parts.shape[1]
        wanted = self.order[:, done : done + self.counts[self.num_steps]]
        where = self._slot_positions(wanted)
        num_inputs, num_wanted = self.num_old + self.inputs.shape[1], wanted.shape[1]
        side = num_inputs + num_wanted
        mask = torch.ones(side, side, device=self.device).tril().bool()
        mask[num_inputs:, num_inputs:] = torch.eye(num_wanted, device=self.device).bool()
        inputs = torch.cat([self.inputs, self._instruction(where)], dim=1)
        positions = torch.cat([self.positions, where], dim=1)
        mask = mask[None, self.num_old :]
        states = self._states(inputs, positions, mask, num_forgotten=num_wanted)[:, -num_wanted:]
        chosen = self._choose(states.flatten(0, 1), None).unflatten(0, wanted.shape)
        self.parts = torch.cat([self.parts, chosen], dim=1)
        self._append_inputs(done, num_wanted)
        self.num_steps += 1

    def _append_inputs(self, first: int, count: int) -> None:
        """Embed tokens that were chosen."""
        parts = self.parts[:, first : first + count]
        embedded = sum(
            self.state[f"part_embeddings.{part}.weight"][parts[..., part]]
            for part in range(parts.shape[-1])
        )
        if self.config.order.kind == "random":
            where = self._slot_positions(self.order[:, first : first + count])
            embedded = torch.stack([self._instruction(where), embedded], dim=2).flatten(1, 2)
            where = where.repeat_interleave(2, dim=1)
        elif self.config.order.kind == "anchor":
            where = self.cells[parts[..., 0]]
        else:
            where = self.cells[first : first + count].expand(len(parts), -1, -1)
        self.inputs = torch.cat([self.inputs, embedded], dim=1)
        self.positions = torch.cat([self.positions, where], dim=1)

    def _mask(self) -> Tensor | None:
        """Which inputs the new ones see, (B or 1, N, M); None is all."""
        num_new, num_prefix = self.inputs.shape[1], self.prefix.shape[1]
        index = torch.arange(self.num_old + num_new, device=self.device)
        distance = index[self.num_old :, None] - index[None, :]
        if self.config.order.kind != "merge":
            lone = num_new == 1 and self.way == "concatenate"
            return None if lone else (distance >= 0)[None]
        tokens = self.parts
        same = (tokens[:, :, None] == tokens[:, None, :]).all(-1)
        is_first = ~(same & torch.ones_like(same[0]).tril(-1)).any(-1)
        is_first = functional.pad(is_first, (num_prefix, 0), value=True)
        return (distance >= 0) & ((distance <= self.config.order.window) | is_first[:, None, :])

    def _gap_mask(self, token: int) -> Tensor | None:
        """Which gaps to the next anchor leave room for the tokens after it."""
        if self.config.order.kind != "anchor":
            return None
        gaps = torch.arange(self.config.num_tokens, device=self.device)
        if token == 0:
            return (gaps == 0)[None]
        most = self.config.num_tokens - self.num_kept + token - self.parts[:, -1:, 0]
        return (gaps >= 1) & (gaps <= most)

    def _choose(self, state: Tensor, allowed: Tensor | None) -> Tensor:
        """Choose the parts of a token in turn, (B, P)."""
        x, chosen = state[:, None], []
        for part in range(len(self.config.part_sizes)):
            hidden = x
            mask = torch.ones(x.shape[1], x.shape[1], device=self.device).tril().bool()[None]
            for layer in range(self.config.head.num_layers):
                hidden = self._block(hidden, f"head.blocks.{layer}", None, mask, None)
            hidden = self._norm(hidden[:, -1], "head.norm.weight")
            logits = functional.linear(hidden, self.state[f"head.outputs.{part}.weight"]).float()
            if part == 0 and allowed is not None:
                logits = logits.masked_fill(~allowed, -torch.inf)
            if self.guidance is not None:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + self.guidance * (conditional - unconditional)
            drawn = logits.softmax(-1).multinomial(1)[:, 0]
            value = logits.argmax(-1) if self.greedy else drawn
            value = value if self.guidance is None else value.repeat(2)
            if part == 0 and self.config.order.kind == "anchor" and self.parts.shape[1]:
                value = self.parts[:, -1, 0] + value
            chosen.append(value)
            embedded = self.state[f"part_embeddings.{part}.weight"][value]
            x = torch.cat([x, embedded[:, None]], dim=1)
        return torch.stack(chosen, dim=-1)

    def _states(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, num_forgotten: int = 0
    ) -> Tensor:
        """Run the trunk over what it has not seen, which without a cache is everything."""
        num_held = self.num_old + x.shape[1]
        if self.way == "buffer":
            mask = functional.pad(mask, (0, self._most_inputs - num_held))
        angles = self._angles(positions)
        for layer in range(self.config.num_layers):
            x = self._block(x, f"blocks.{layer}", angles, mask, layer)
        if self.way != "recompute":
            self.num_old = num_held - num_forgotten
            self.inputs, self.positions = self.inputs[:, :0], self.positions[:, :0]
        for pair in self.memory if self.way == "concatenate" and num_forgotten else []:
            pair[:] = [held[:, :, : self.num_old] for held in pair]
        return x

    def _block(
        self,
        x: Tensor,
        name: str,
        angles: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        layer: int | None,
    ) -> Tensor:
        """Attention and feed-forward; `layer` has a cache unless it is None."""
        config, state = self.config, self.state
        heads = functional.linear(
            self._norm(x, f"{name}.attention_norm.weight"), state[f"{name}.attention.qkv.weight"]
        )
        heads = heads.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        sizes = [config.num_heads, config.key_heads, config.key_heads]
        query, key, value = heads.split(sizes, dim=1)
        if config.qk_norm:
            query = self._norm(query, f"{name}.attention.query_norm.weight")
            key = self._norm(key, f"{name}.attention.key_norm.weight")
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        if layer is not None and self.way != "recompute":
            key, value = self._remember(layer, key, value)
        groups = config.num_heads // config.key_heads
        attended = functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(groups, dim=1) if groups > 1 else key,
            value.repeat_interleave(groups, dim=1) if groups > 1 else value,
            attn_mask=None if mask is None else mask[:, None],
        )
        attended = attended.transpose(1, 2).flatten(2)
        x = x + functional.linear(attended, state[f"{name}.attention.out.weight"])
        hidden = functional.linear(
            self._norm(x, f"{name}.ffn_norm.weight"), state[f"{name}.ffn.up.weight"]
        )
        gate, hidden = hidden.chunk(2, dim=-1)
        hidden = functional.silu(gate) * hidden
        return x + functional.linear(hidden, state[f"{name}.ffn.down.weight"])

    def _remember(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values after the old ones, or in their places."""
        pair = self.memory[layer]
        for number, new in enumerate((key, value)):
            if self.way == "concatenate":
                pair[number] = torch.cat([pair[number], new], dim=2)
            else:
                pair[number][:, :, self.num_old : self.num_old + new.shape[2]] = new
        return pair[0], pair[1]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """Divide by the root mean square, in float32."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return wide.to(x.dtype) * self.state[name]

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine for each pair of a head's channels, (B, 1, N, D/2): half turn by row."""
        pairs = self.config.head_dim // 4
        frequencies = 10000.0 ** (-torch.arange(pairs, device=self.device) / pairs)
        angles = (positions[..., None] * frequencies).flatten(2)[:, None]
        return angles.cos(), angles.sin()

    def _instruction(self, positions: Tensor) -> Tensor:
        """Position instructions, (B, N, C)."""
        batch, length, _ = positions.shape
        vector = self.state["instruction"].expand(batch, length, -1)
        if not self.config.order.rotate_instruction:
            return vector
        heads = vector.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
        return rotate(heads, self._angles(positions)).transpose(1, 2).flatten(2)

    def _slot_positions(self, slots: Tensor) -> Tensor:
        """Row and column at which slots of the K are rotated."""
        return self.cells[slots * self.config.num_tokens // self.num_kept]


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of neighbouring channels."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
