"""An NPU that is not there: torch_npu's operators as plain PyTorch, which refuses what they would refuse.

The real ones have not run. What is tested: that attention and experts choose them, the arguments that
they get, and that a training step with them learns what a step on a CPU learns.
"""

import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from test_checkpoint import forked
from test_syncs import four_rows, small, waits_of_a_step, warm

from attention import Segments, attend_one_by_one, packed_attention
from kernels.npu import attend_by_npu, grouped_product_npu
from stage import Stage
from vlm import PRESETS, SailVL

__all__ = ["small", "warm"]  # fixtures

HALF = (torch.float16, torch.bfloat16)


class Operators(SimpleNamespace):
    """A stand-in for the module torch_npu: the two operators, and how often each was called."""

    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()

    def npu_fusion_attention(
        self,
        query,
        key,
        value,
        head_num,
        input_layout,
        *,
        atten_mask=None,
        scale=1.0,
        actual_seq_qlen=None,
        actual_seq_kvlen=None,
        sparse_mode=0,
    ):
        assert input_layout == "TND" and query.dtype in HALF
        assert query.dtype == key.dtype == value.dtype and key.shape == value.shape
        assert head_num == query.shape[1] and head_num % key.shape[1] == 0
        assert scale == query.shape[2] ** -0.5
        lengths = []
        for ends, tokens in ((actual_seq_qlen, query), (actual_seq_kvlen, key)):
            assert isinstance(ends, list) and all(isinstance(end, int) for end in ends)
            assert ends[-1] == len(tokens) and ends[0] > 0
            lengths.append([end - begin for begin, end in zip([0, *ends], ends)])
        assert len(lengths[0]) == len(lengths[1])

        # A mask of the one size it may have, where later keys are hidden; or none
        assert (sparse_mode, atten_mask is None) in ((0, True), (3, False))
        if atten_mask is not None:
            assert atten_mask.dtype == torch.bool and atten_mask.shape == (2048, 2048)
        self.calls["causal" if sparse_mode else "full"] += 1
        segments, visible = (Segments.of(n) for n in lengths)
        out = attend_one_by_one(query, key, value, segments, visible, causal=sparse_mode == 3)
        return out, None, None, None, 0, 0, 0

    def npu_grouped_matmul(self, x, weight, *, group_list, group_list_type, group_type, split_item):
        (a,), (b,) = x, weight
        assert group_list.dtype == torch.int64 and group_list_type == 0 and split_item in (2, 3)
        assert a.ndim == 2 and a.dtype == b.dtype
        if group_type == 2:
            # what is summed over lies in rows: a transposed view, and no copy of it
            assert b.ndim == 2 and a.stride(0) == 1 and a.shape[1] == b.shape[0]
        else:
            assert group_type == 0 and b.ndim == 3 and group_list.shape == b.shape[:1]
        self.calls["summed over" if group_type else "rows"] += 1
        return [F.grouped_mm(a, b, offs=group_list.to(torch.int32))]


def test_attention_asks_for_what_packed_documents_are(monkeypatch):
    """Grouped heads, documents that continue another, both directions."""
    operators = Operators()
    monkeypatch.setitem(sys.modules, "torch_npu", operators)
    g = torch.Generator().manual_seed(0)
    q = torch.randn(16, 4, 8, generator=g).bfloat16()
    k = torch.randn(16, 2, 8, generator=g).bfloat16()
    v = torch.randn(16, 2, 8, generator=g).bfloat16()

    plain = Segments.of([6, 3, 7])
    for causal in (True, False):
        found = attend_by_npu(q, k, v, plain, plain, causal)
        assert torch.equal(found, packed_attention(q, k, v, plain, causal))

    answers = Segments.of([6, 4, 6], after=(0, 0, 0))
    places, visible = answers.keys
    found = attend_by_npu(q, k[places], v[places], answers, visible, True)
    assert torch.equal(found, packed_attention(q, k, v, answers, True))
    assert operators.calls == {"causal": 2, "full": 1}


def test_grouped_products_are_torchs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", Operators())
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 16, generator=g)
    others = torch.randn(10, 8, generator=g)
    weights = torch.randn(3, 8, 16, generator=g)
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)
    by_row = grouped_product_npu(rows, weights.transpose(1, 2), offs=ends)
    for e, (begin, end) in enumerate(((0, 4), (4, 4), (4, 10))):
        torch.testing.assert_close(by_row[begin:end], rows[begin:end] @ weights[e].T)
    summed = grouped_product_npu(rows.T, others, offs=ends)
    torch.testing.assert_close(summed[2], rows[4:].T @ others[4:])
    assert not summed[1].any()


def test_a_step_on_an_npu_takes_both_operators(small, tokenizer):
    """In bf16, the experts' too; and the host waits no more often than anywhere."""
    micro_batches = four_rows(tokenizer)
    text = replace(PRESETS["toy-moe"].text, vocab_size=448, num_hidden_layers=1)
    model = SailVL(replace(small, text=text)).init_weights(0).bfloat16()
    stage = Stage(steps=1, optimizer="adamw", precision="fp32")

    def work():
        operators = Operators()
        sys.modules["torch_npu"] = operators
        waits = waits_of_a_step(model, stage, micro_batches, "npu:0", tolerance=1e-2)
        assert waits == {"to the host": 2}
        assert operators.calls["causal"] == 4  # a layer, four micro-batches
        assert operators.calls["rows"] == 4 * 4 and operators.calls["summed over"] == 4 * 2

    assert forked(work) == 0
