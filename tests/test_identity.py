"""What makes a run this run: data and weights boiled down to a few bytes."""

import subprocess

import pytest
import torch

from infra import identity
from infra.identity import ENDS, data_identity, differences, fingerprint, revision


def test_data_is_known_by_sizes_heads_tails_names_and_order(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    whole = bytes(range(256)) * 2048
    assert len(whole) > 2 * ENDS

    def identity(content: bytes) -> str:
        a.write_bytes(content)
        return data_identity([a, b])

    b.write_bytes(b"")
    first = identity(whole)
    assert identity(whole) == first
    for changed in (whole + b"x", b"x" + whole[1:], whole[:-1] + b"x", whole[:-1], b""):
        assert identity(changed) != first
    identity(whole)
    assert data_identity([b, a]) != first
    with pytest.raises(OSError):
        data_identity([tmp_path / "none"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_flipped_bit_of_any_weight_is_seen(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7)).to(dtype)
    first = fingerprint(model)
    assert fingerprint(model) == first
    with torch.no_grad():
        model[0].weight[3, 2] = torch.nextafter(
            model[0].weight[3, 2], torch.tensor(9.0, dtype=dtype)
        )
    assert fingerprint(model) != first


def test_flags_and_counters_are_weights_too():
    model = torch.nn.BatchNorm1d(3)
    model.register_buffer("flag", torch.tensor([True, False]))
    seen = {fingerprint(model)}
    model.flag[1] = True
    seen.add(fingerprint(model))
    model.num_batches_tracked += 1
    seen.add(fingerprint(model))
    assert len(seen) == 3


def test_differences_are_named_by_their_way():
    old = {"a": {"b": 1, "c": [1]}, "d": {}}
    assert differences(old, {"a": {"b": 2, "c": [1]}, "e": 3}) == {
        "a.b": (1, 2),
        "d": ({}, None),
        "e": (None, 3),
    }


def test_the_revision_tells_changes_apart(tmp_path, monkeypatch):
    """In a repository of its own: clean, changed, changed otherwise; and outside of any."""

    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True
        )

    def now() -> str:
        revision.cache_clear()
        return revision()

    monkeypatch.setattr(identity, "__file__", str(tmp_path / "identity.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert now() == "unknown"
    (tmp_path / "a.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    clean = now()
    assert len(clean) == 40
    (tmp_path / "a.py").write_text("2")
    changed = now()
    (tmp_path / "a.py").write_text("3")
    assert len({clean, changed, now()}) == 3 and changed.startswith(f"{clean} with changes ")
    revision.cache_clear()
