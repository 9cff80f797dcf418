"""Several responses to one prompt in one row: the prompt is read once, and nothing is padded between responses.

A row is the prompt's tokens and after them each response's own, all responses at the positions that follow the prompt:

    prompt prompt prompt | first first | second second second
    0      1      2        3     4       3      4      5

A token reads what stands before it in its own segment, and the prompt. So each response is read as if it stood alone.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlhf_lightning.networks.packing import Packed, arranged, first_fit


def share_prompts(
    tokens: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    prompt_index: Int[Tensor, " B"],
    *,
    packing: bool = False,
    in_one_row: bool = False,
) -> Packed:
    """Rearrange sequences padded on the right, those of one prompt next to each other, into a row for each prompt.

    What the sequences of a prompt have in common at their beginning is kept once, but no sequence's last token. With
    ``packing`` a row has several prompts where they are no longer together than the longest, or it has all of them.
    """
    device = tokens.device
    lengths = attention_mask.sum(dim=1)
    is_first = torch.ones_like(prompt_index, dtype=torch.bool)
    is_first[1:] = prompt_index[1:] != prompt_index[:-1]
    first = is_first.nonzero().squeeze(1)[prompt_index]
    common = (tokens == tokens[first]).int().cumprod(dim=1).sum(dim=1).minimum(lengths - 1)
    shared = common.new_full((int(is_first.sum()),), tokens.shape[1])
    shared = shared.scatter_reduce(0, prompt_index, common, reduce="amin")[prompt_index].unsqueeze(1)
    # Where the own part of a sequence begins: behind the shared part and the own parts of those before it.
    own = lengths.unsqueeze(1) - shared
    before = own.cumsum(dim=0) - own
    before = before - before[first]
    time = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    columns = torch.where(time < shared, time, time + before)
    kept = attention_mask & ((time >= shared) | is_first.unsqueeze(1))
    # The last sequence of a prompt says how long all that is read of the prompt is.
    ends = (shared + before + own).squeeze(1)
    sizes = ends.new_zeros(int(is_first.sum())).scatter_reduce(0, prompt_index, ends, reduce="amax").tolist()
    size, count = max(sizes), len(sizes)
    rows = prompt_index.unsqueeze(1)
    if packing or in_one_row:
        size = sum(sizes) if in_one_row else size
        of_prompt, starts = (torch.tensor(x, device=device) for x in first_fit(sizes, size))
        count = int(of_prompt.max()) + 1
        rows, columns = of_prompt[rows], columns + starts[rows]
    place = (kept, rows, columns, (count, size))
    return Packed(
        tokens=arranged(tokens, *place),
        position_ids=arranged(time, *place),
        kept=kept,
        rows=rows,
        columns=columns.clamp(max=size - 1),
        shared=shared,
        leader=first,
    )
