"""Names of diffusers' modules beside those of the released checkpoints, read in both directions.

A row pairs one module of ours with the modules of diffusers that hold its weight and bias: several
when their rows are stacked (q, k, v).  Where diffusers keeps (scale, shift) and the release
(shift, scale), the halves of the rows are swapped.  `{i}` and `{j}` count blocks; diffusers numbers
the decoder's levels from the latent up, the release from the image down.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One module of ours and where diffusers keeps it."""

    ours: str
    theirs: tuple[str, ...]
    swapped: bool = False


_MMDIT = (
    Row("pos_embed", ("pos_embed.pos_embed",)),  # a table, the only name without weight or bias
    Row("x_embedder.proj", ("pos_embed.proj",)),
    Row("t_embedder.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
    Row("t_embedder.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
    Row("y_embedder.mlp.0", ("time_text_embed.text_embedder.linear_1",)),
    Row("y_embedder.mlp.2", ("time_text_embed.text_embedder.linear_2",)),
    Row("context_embedder", ("context_embedder",)),
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
    Row("final_layer.linear", ("proj_out",)),
)
_JOINT_BLOCK = (
    Row("x_block.adaLN_modulation.1", ("norm1.linear",)),
    Row("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Row("x_block.attn.ln_q", ("attn.norm_q",)),
    Row("x_block.attn.ln_k", ("attn.norm_k",)),
    Row("x_block.attn.proj", ("attn.to_out.0",)),
    Row("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    Row("x_block.attn2.ln_q", ("attn2.norm_q",)),
    Row("x_block.attn2.ln_k", ("attn2.norm_k",)),
    Row("x_block.attn2.proj", ("attn2.to_out.0",)),
    Row("x_block.mlp.fc1", ("ff.net.0.proj",)),
    Row("x_block.mlp.fc2", ("ff.net.2",)),
    Row("context_block.adaLN_modulation.1", ("norm1_context.linear",)),
    Row("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    Row("context_block.attn.ln_q", ("attn.norm_added_q",)),
    Row("context_block.attn.ln_k", ("attn.norm_added_k",)),
    Row("context_block.attn.proj", ("attn.to_add_out",)),
    Row("context_block.mlp.fc1", ("ff_context.net.0.proj",)),
    Row("context_block.mlp.fc2", ("ff_context.net.2",)),
)
_VAE_SIDE = (
    Row("conv_in", ("conv_in",)),
    Row("mid.attn_1.norm", ("mid_block.attentions.0.group_norm",)),
    Row("mid.attn_1.q", ("mid_block.attentions.0.to_q",)),
    Row("mid.attn_1.k", ("mid_block.attentions.0.to_k",)),
    Row("mid.attn_1.v", ("mid_block.attentions.0.to_v",)),
    Row("mid.attn_1.proj_out", ("mid_block.attentions.0.to_out.0",)),
    Row("norm_out", ("conv_norm_out",)),
    Row("conv_out", ("conv_out",)),
)
_VAE_BLOCK = (
    Row("norm1", ("norm1",)),
    Row("conv1", ("conv1",)),
    Row("norm2", ("norm2",)),
    Row("conv2", ("conv2",)),
    Row("nin_shortcut", ("conv_shortcut",)),
)


def mmdit_rows(depth: int) -> list[Row]:
    """The table of an MMDiT with so many blocks, qk norm and second attentions included."""
    rows = list(_MMDIT)
    for i in range(depth):
        for row in _JOINT_BLOCK:
            # The last text stream ends with a shift and a scale, as the final layer does.
            swapped = i == depth - 1 and row.ours == "context_block.adaLN_modulation.1"
            theirs = tuple(f"transformer_blocks.{i}.{name}" for name in row.theirs)
            rows.append(Row(f"joint_blocks.{i}.{row.ours}", theirs, swapped))
    return rows


def vae_rows(levels: int, blocks: int) -> list[Row]:
    """The table of a VAE with so many resolution levels and blocks in each encoder level."""
    rows = [_under(side, side, row) for side in ("encoder", "decoder") for row in _VAE_SIDE]
    for side in ("encoder", "decoder"):
        for j in range(2):
            ours, theirs = f"{side}.mid.block_{j + 1}", f"{side}.mid_block.resnets.{j}"
            rows += [_under(ours, theirs, row) for row in _VAE_BLOCK]
    for i in range(levels):
        ours, theirs = f"encoder.down.{i}", f"encoder.down_blocks.{i}"
        rows.append(Row(f"{ours}.downsample.conv", (f"{theirs}.downsamplers.0.conv",)))
        rows += _level_rows(ours, theirs, blocks)
        ours, theirs = f"decoder.up.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        rows.append(Row(f"{ours}.upsample.conv", (f"{theirs}.upsamplers.0.conv",)))
        rows += _level_rows(ours, theirs, blocks + 1)
    return rows


def _level_rows(ours: str, theirs: str, blocks: int) -> list[Row]:
    return [
        _under(f"{ours}.block.{j}", f"{theirs}.resnets.{j}", row)
        for j in range(blocks)
        for row in _VAE_BLOCK
    ]


def _under(ours: str, theirs: str, row: Row) -> Row:
    return Row(f"{ours}.{row.ours}", tuple(f"{theirs}.{name}" for name in row.theirs), row.swapped)


def rows_for(kind: str, their_keys: Iterable[str]) -> list[Row]:
    """The table that fits these keys of a diffusers file; kind: "mmdit" or "vae"."""
    keys = set(their_keys)
    if kind == "mmdit":
        return mmdit_rows(_count(keys, r"transformer_blocks\.(\d+)\."))
    return vae_rows(
        _count(keys, r"encoder\.down_blocks\.(\d+)\."),
        _count(keys, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
    )


def _count(keys: set[str], pattern: str) -> int:
    """How many distinct numbers stand at the pattern's place."""
    return len({found[1] for key in keys if (found := re.match(pattern, key))})


def parameters(row: Row) -> list[tuple[str, tuple[str, ...]]]:
    """(our key, their keys) of a row: its weight and its bias, or the bare table."""
    if row.ours == "pos_embed":
        return [(row.ours, row.theirs)]
    return [
        (f"{row.ours}.{end}", tuple(f"{name}.{end}" for name in row.theirs))
        for end in ("weight", "bias")
    ]


def to_diffusers(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours under diffusers' names; kind: "mmdit" or "vae"."""
    theirs: dict[str, Tensor] = {}
    for row in _rows_of_ours(kind, set(state)):
        for key, names in parameters(row):
            if key in state:
                stored = swap_halves(state[key]) if row.swapped else state[key]
                if _is_vae_attention(key) and stored.ndim == 4:
                    stored = stored.flatten(1)  # [C, C, 1, 1], a linear layer in diffusers
                theirs.update(zip(names, stored.chunk(len(names)), strict=True))
    return theirs


def _rows_of_ours(kind: str, keys: set[str]) -> list[Row]:
    if kind == "mmdit":
        return mmdit_rows(_count(keys, r"joint_blocks\.(\d+)\."))
    levels = _count(keys, r"encoder\.down\.(\d+)\.")
    return vae_rows(levels, _count(keys, r"encoder\.down\.0\.block\.(\d+)\."))


def _is_vae_attention(key: str) -> bool:
    return ".mid.attn_1." in key and key.endswith("weight")


def swap_halves(stored: Tensor) -> Tensor:
    """(shift, scale) <-> (scale, shift), stacked along the rows."""
    first, second = stored.chunk(2)
    return torch.cat([second, first])
