"""How the weights of a prompt act on what an encoder makes of it: one function for every encoder."""

from __future__ import annotations

import torch
from torch import Tensor


def emphasised(states: Tensor, weights: Tensor) -> Tensor:
    """The states [B,L,D] of tokens times their weights [B,L], then each row scaled back to the mean that it had, as
    AUTOMATIC1111's web UI does it; of T5 and Gemma as of CLIP. A row whose weights are all 1 keeps every bit.

    A mean near 0 says nothing of the size of a row: where the two means differ by more than a factor of 2, or in sign, the row
    gets its mean magnitude back instead.
    """
    if bool((weights == 1).all()):
        return states
    own = states.to(torch.promote_types(states.dtype, torch.float32))
    changed = own * weights.to(own)[..., None]
    ratio = own.mean((1, 2)) / changed.mean((1, 2))
    size = (own.abs().mean((1, 2)) / changed.abs().mean((1, 2))).nan_to_num(1.0, 1.0, 1.0)  # weights of 0 leave nothing
    ratio = torch.where((ratio >= 0.5) & (ratio <= 2), ratio, size)
    return (changed * ratio[:, None, None]).to(states)
