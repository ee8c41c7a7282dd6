"""The host runs ahead of the device: how often a step waits for it, on a pretended accelerator.

A CPU never waits, so the device is pretended: its tensors are wrappers around ordinary ones (`Remote`), and
whatever makes the host wait for their numbers goes through `Pretended`, which counts it. It also fails
where numbers of both sides meet, which a real device would refuse.
"""

import copy
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from conftest import made_up
from test_checkpoint import forked
from test_rl import SMALL, make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from packing import Batch
from scale.parallel import Ranks
from stage import BaseStage, Stage
from train import train
from vlm import PRESETS, SailVL

HERE = "pretended:0"

# What has a result whose size, or whose Python value, only the numbers tell.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "bincount",
    "equal",
    "is_nonzero",
}


class Remote(torch.Tensor):
    """A tensor that says that it lies on the pretended device; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device="meta",
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @property
    def device(self) -> torch.device:
        return torch.device(Pretended.place)

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of the pretended device")


class Pretended(TorchDispatchMode):
    """Runs everything on the CPU, and counts what makes the host wait."""

    place = HERE

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled here: without this, the first call imports the compiler, for seconds
        return False

    def __init__(self):
        super().__init__()
        self.waits: Counter = Counter()

    @staticmethod
    def kind() -> str:
        return torch.device(Pretended.place).type

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function.overloadpacket.__name__
        tensors = tensors_in((args, kwargs))
        remote = [t for t in tensors if isinstance(t, Remote)]
        device = kwargs.get("device")
        # (what composite functions make inside asks for the device that C++ sees)
        to_remote = device is not None and torch.device(device).type in (self.kind(), "meta")
        to_host = device is not None and torch.device(device).type == "cpu"
        if to_remote:
            kwargs["device"] = "cpu"

        # Copies: from the device always a wait, to it unless the host said that it need not be
        if name == "_to_copy" and remote and to_host:
            self.waits["to the host"] += 1
            return function(args[0].inner, *args[1:], **kwargs)
        if name == "_to_copy" and not remote and to_remote:
            if not kwargs.get("non_blocking"):
                self.waits["to the device"] += 1
        elif name == "copy_" and 0 < len(remote) < len(tensors):
            self.waits["copy_"] += 1
        elif remote:
            strangers = [t for t in tensors if not isinstance(t, Remote) and t.ndim]
            assert not strangers, f"{function}: numbers of the host and of the device"

        # What looks at numbers
        if remote and name in WAITS:
            self.waits[name] += 1
        if remote and name in ("index", "index_put", "index_put_", "_unsafe_index"):
            if any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1])):
                self.waits["a mask as an index"] += 1
        if remote and name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.waits[name] += 1

        out = function(*unwrapped(args), **unwrapped(kwargs))
        return wrapped(out, args) if remote or to_remote else out


def tensors_in(tree) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map(lambda leaf: found.append(leaf) if torch.is_tensor(leaf) else None, tree)
    return found


def unwrapped(tree):
    return tree_map(lambda leaf: leaf.inner if isinstance(leaf, Remote) else leaf, tree)


def wrapped(tree, args):
    """Results on the device again; what was changed in place is the same tensor as before."""
    known = {id(t.inner): t for t in tensors_in(args) if isinstance(t, Remote)}

    def wrap(leaf):
        if not torch.is_tensor(leaf):
            return leaf
        return known.get(id(leaf)) if id(leaf) in known else Remote(leaf)

    return tree_map(wrap, tree)


def pretend(place: str = HERE) -> None:
    """A device module of that name, for this process: everything that torch asks before it dispatches."""
    torch.utils.rename_privateuse1_backend(place.partition(":")[0])
    Pretended.place = place

    class Module:
        is_available = staticmethod(lambda: True)
        is_initialized = staticmethod(lambda: True)
        _is_in_bad_fork = staticmethod(lambda: False)
        _lazy_init = staticmethod(lambda: None)
        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])

    torch._register_device_module(Pretended.kind(), Module)


def waits_of_a_step(
    model: SailVL,
    stage: BaseStage,
    micro_batches: list[Batch],
    place: str = HERE,
    tolerance: float = 1e-5,
) -> Counter:
    """What the host waits for in one step on the pretended device; it must learn what a CPU learns."""
    known = train(copy.deepcopy(model), stage, iter([micro_batches])).log[0]
    pretend(place)
    with Pretended() as device:
        model.to(place)
        device.waits.clear()
        row = train(model, stage, iter([micro_batches]), ranks=Ranks(device=place)).log[0]
    assert row["loss"] == pytest.approx(known["loss"], rel=tolerance)
    assert row["grad_norm"] == pytest.approx(known["grad_norm"], rel=10 * tolerance)
    assert row["loss"] != 0 and not row["skipped"]
    return device.waits


@pytest.fixture(scope="module", autouse=True)
def warm():
    """What a first optimizer imports is imported here, once, and not in every child."""
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])


@pytest.fixture
def small(config):
    """One layer of each: every operation passes through Python here."""
    vision = replace(config.vision, num_hidden_layers=1)
    return replace(config, vision=vision, text=replace(config.text, num_hidden_layers=1))


def four_rows(tokenizer) -> list[Batch]:
    """Micro-batches of a row each: three with pictures, one without."""
    batches = [batch for (batch,) in islice(made_up(tokenizer, rows=1, length=50), 40)]
    blind = [batch for batch in batches if batch.images is None]
    seeing = [batch for batch in batches if batch.images is not None]
    return [*seeing[:3], blind[0]]


def test_the_count_is_not_blind():
    def work():
        pretend()
        with Pretended() as device:
            x = torch.arange(4.0).to(HERE)
            assert device.waits == {"to the device": 1}
            x.to("cpu", non_blocking=True)
            float(x[0])
            bool(x[1] > 0)
            x.tolist()
            x[x > 1]
            (x > 1).nonzero()
            x.repeat_interleave(torch.tensor([1, 2, 0, 1]).to(HERE, non_blocking=True))
        assert device.waits == {
            "to the device": 1,
            "to the host": 2,
            "_local_scalar_dense": 2,
            "a mask as an index": 1,
            "nonzero": 1,
            "repeat_interleave": 1,
        }
        with Pretended(), pytest.raises(AssertionError, match="of the host and of the device"):
            torch.ones(3).to(HERE) + torch.ones(3)

    assert forked(work) == 0


def test_a_step_waits_for_the_device_once(small, tokenizer):
    """Four micro-batches, one of them without a picture. At most three waits were promised."""
    micro_batches = four_rows(tokenizer)
    stage = Stage(steps=1, optimizer="adamw", precision="fp32")

    def work():
        waits = waits_of_a_step(SailVL(small).init_weights(0), stage, micro_batches)
        assert waits == {"to the host": 2}

    assert forked(work) == 0


def test_experts_do_not_make_a_step_wait_more_often(small, tokenizer):
    """Routing, balance and z-loss over real tokens, a bias on the choice, recomputed. Promised: five."""
    micro_batches = four_rows(tokenizer)
    text = replace(PRESETS["toy-moe"].text, vocab_size=448, num_hidden_layers=1)
    model = SailVL(replace(small, text=text)).init_weights(0)
    stage = Stage(steps=1, optimizer="adamw", precision="fp32", router_z=0.1, expert_bias_rate=1e-3)
    stage = replace(stage, recompute=True)

    def work():
        assert waits_of_a_step(model, stage, micro_batches) == {"to the host": 2}

    assert forked(work) == 0


def test_an_update_in_rl_waits_once(small, encoder, tokenizer):
    """Groups whose answers continue one prompt, a leash to a reference model."""
    stage = replace(
        SMALL,
        steps=1,
        accumulate=4,
        kl=0.1,
        low=0.2,
        high=0.28,
        optimizer="adamw",
        precision="fp32",
    )
    encoder = replace(encoder, config=small)
    reference = SailVL(small).init_weights(1)
    model = SailVL(small).init_weights(0)
    micro_batches = next(make(model, encoder, stage, reference=reference))

    def work():
        assert waits_of_a_step(model, stage, micro_batches) == {"to the host": 2}

    assert len(micro_batches) > 1 and any(batch.segments.after for batch in micro_batches)
    assert forked(work) == 0
