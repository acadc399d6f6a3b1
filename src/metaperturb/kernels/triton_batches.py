"""A training batch on a GPU in one Triton launch: images gathered, cropped, flipped and normalized, labels looked up.

Equal to the tensor code in data/batches.py to the bit, given the same draws.
"""

import torch
from torch import Tensor

from metaperturb.kernels.triton_blocks import constexpr, jit, tl, triton

BLOCK = 1024  # values a program


@jit
def _batch(
    images, labels, table, rows, draws, out, out_labels, C: constexpr, S: constexpr, P: constexpr, BLOCK: constexpr
):
    b, part = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + b)
    draw = tl.load(draws + b).to(tl.int32)
    span: constexpr = 2 * P + 1
    flip, left, top = draw % 2, (draw // 2) % span, draw // (2 * span)

    offset = part * BLOCK + tl.arange(0, BLOCK)
    inside = offset < C * S * S
    c, y, x = offset // (S * S), (offset // S) % S, offset % S
    y += top - P
    x = tl.where(flip == 1, S - 1 - x, x) + left - P
    seen = inside & (y >= 0) & (y < S) & (x >= 0) & (x < S)  # the border is black
    value = tl.load(images + row * (C * S * S) + c * (S * S) + y * S + x, mask=seen, other=0)
    tl.store(out + b.to(tl.int64) * (C * S * S) + offset, tl.div_rn(value.to(tl.float32), 127.5) - 1.0, mask=inside)
    if part == 0:
        label = tl.load(labels + row)
        tl.store(out_labels + b, label if table is None else tl.load(table + label))


def training_batch(
    images: Tensor, labels: Tensor, table: Tensor | None, rows: Tensor, draws: Tensor, padding: int
) -> tuple[Tensor, Tensor]:
    """Float images `[B, 3, S, S]` in [-1, 1] and labels `[B]`.

    Args:
        images, labels: the data set, uint8 `[N, 3, S, S]` and int64 `[N]`.
        table: label of the data set → label here, or None.
        rows: which images, int64 `[B]`.
        draws: `[B]` from 0 to 2·(2p + 1)² − 1: flip + 2·(left + (2p + 1)·top), p the padding.
        padding: p, the border of black pixels in which the crop moves.
    """
    batch, (channels, size, _) = len(rows), images.shape[1:]
    out = torch.empty(batch, channels, size, size, device=images.device)
    out_labels = torch.empty_like(rows)
    grid = (batch, triton.cdiv(channels * size * size, BLOCK))
    with torch.cuda.device_of(images):
        _batch[grid](images, labels, table, rows, draws, out, out_labels, channels, size, padding, BLOCK)
    return out, out_labels
