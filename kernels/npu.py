"""Attention and experts on an Ascend NPU, by torch_npu's own operators.

What it teaches: another accelerator is two functions. Everything else of the model runs there as it is;
packed attention and grouped products would run as well, as loops over documents and experts, and these two
operators take a whole row, or all experts, at once. Each stands behind the signature of what it replaces:

    attend_by_npu      attention.attend_by_flash    torch_npu.npu_fusion_attention, layout "TND"
    grouped_product_npu    F.grouped_mm                 torch_npu.npu_grouped_matmul

Not run here: there is no NPU. The tests put a module of plain PyTorch in torch_npu's place, which refuses
arguments that its documentation does not allow. What else the model asks of an NPU (`embedding_bag`,
`scatter_add_`, `searchsorted`) is left to torch_npu, and untested too.

Legend: S tokens (T in the operator's words), K keys, H query heads (N), G key/value heads, D head size, E
experts. Sources: the pages of torch_npu.npu_fusion_attention and torch_npu.npu_grouped_matmul at
hiascend.com, for PyTorch 7.0.0.
"""

from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

NOTHING_MASKED = 0  # values of `sparse_mode`
CAUSAL_AT_THE_END = (
    3  # the last query of a document sees all of its keys, the one before all but one
)
MASK = 2048  # side of the one mask that CAUSAL_AT_THE_END wants, whatever the lengths


def attend_by_npu(q: Tensor, k: Tensor, v: Tensor, segments, visible, causal: bool) -> Tensor:
    """All documents in one call: q (S, H, D), k and v (K, G, D) -> (S, H, D). Half precision.

    segments, visible: the `attention.Segments` of queries and of keys.
    The operator wants running sums of lengths without their leading 0, as Python numbers: they are known
    on the host, so nothing waits for the device.
    """
    import torch_npu  # other machines do not have it

    out, *_ = torch_npu.npu_fusion_attention(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        q.shape[1],
        input_layout="TND",
        atten_mask=later_keys(q.device) if causal else None,
        scale=q.shape[2] ** -0.5,
        actual_seq_qlen=list(accumulate(segments.lengths)),
        actual_seq_kvlen=list(accumulate(visible.lengths)),
        sparse_mode=CAUSAL_AT_THE_END if causal else NOTHING_MASKED,
    )
    return out


@cache
def later_keys(device: torch.device) -> Tensor:
    """(2048, 2048) bool: what a query may not see."""
    return torch.ones(MASK, MASK, dtype=torch.bool, device=device).triu(1)


def grouped_product_npu(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """`F.grouped_mm`: group e of the products is of the rows offs[e - 1] : offs[e].

    a (R, M), b (E, M, N) -> (R, N): rows are grouped. a (M, R), b (R, N) -> (E, M, N): what is summed
    over is; the operator wants `a` as a transposed view there, and not as a copy.
    """
    import torch_npu

    summed_over = b.ndim == 2
    (out,) = torch_npu.npu_grouped_matmul(
        [a],
        [b],
        group_list=offs.to(torch.int64),
        group_list_type=0,  # running sums, not counts
        group_type=2 if summed_over else 0,
        split_item=3,  # one tensor in, one out
    )
    return out
