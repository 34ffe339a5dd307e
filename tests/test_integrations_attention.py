"""One layer of attn_implementation="dlcore", and its masks, against transformers' own."""

from __future__ import annotations

import pytest
import torch
from attention_oracles import normal
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.13")

import transformers
from tiny_transformers import LENGTH, Paths, close, padding, paths_of
from transformers import masking_utils as masks

from dlcore.integrations.transformers import attention


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Paths:
    return paths_of(monkeypatch)


# --- a layer ------------------------------------------------------------------------------------------------


def layer(causal: bool = True, groups: int = 2) -> nn.Module:
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = causal, groups
    return module


def qkv(rows: int, keys: int) -> list[Tensor]:
    """q (2, 4, S, 8), k (2, 2, T, 8) and v (2, 2, T, 12)."""
    shapes = [(2, 4, rows, 8), (2, 2, keys, 8), (2, 2, keys, 12)]
    return [normal(*shape, dtype=torch.float32, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 9), (5, 5), (5, 9), (9, 5)])
@pytest.mark.parametrize("module_is_causal", [True, False])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_without_a_mask(rows: int, keys: int, module_is_causal: bool, is_causal: bool | None) -> None:
    module = layer(module_is_causal)
    q, k, v = qkv(rows, keys)
    wanted, _ = attention.sdpa_attention_forward(module, q, k, v, None, is_causal=is_causal, scaling=0.3)
    out, weights = attention.attend(module, q, k, v, None, is_causal=is_causal, scaling=0.3)
    close(out, wanted)
    assert (out.shape, out.is_contiguous(), weights) == ((2, rows, 4, 12), True, None)


@pytest.mark.parametrize("packed", [True, False])
def test_rows_without_keys_give_zeros(packed: bool) -> None:
    mask = torch.ones(2, 1, 5, 9, dtype=torch.bool)
    mask[0, :, 2] = False
    q, k, v = (x.requires_grad_() for x in qkv(5, 9))
    given = attention.runs(mask.squeeze(1)) if packed else mask
    out, _ = attention.attend(layer(), q, k, v, given)
    close(out.detach(), attention.sdpa_attention_forward(layer(), q, k, v, mask)[0].nan_to_num().detach())
    assert not out[0, 2].any()
    assert out[1].all()
    sunk, _ = attention.attend(layer(), q, k, v, given, s_aux=torch.zeros(4, requires_grad=True))
    assert not sunk[0, 2].any()
    (out + sunk).sum().backward()
    assert not q.grad[0, :, 2].any()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, v))


REFUSED = [
    ({"dropout": 0.5}, "attention dropout"),
    ({"position_bias": normal(2, 4, 5, 9, dtype=torch.float32, seed=8)}, "a position bias"),
    ({"attention_mask": torch.zeros(2, 1, 5, 9)}, "a mask of torch.float32"),
    ({"attention_mask": torch.ones(2, 4, 5, 9).bool()}, "a mask that is not (B or 1, 1, S, T)"),
    (
        {"attention_mask": (torch.arange(9) % 2 == 0).expand(2, 1, 5, 9)},
        "more than two runs of keys in a row",
    ),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_fallbacks(options, reason: str, paths: Paths, caplog: pytest.LogCaptureFixture) -> None:
    """SDPA attends under the same arguments; where it would leave out a softcap or sinks, nobody does."""
    q, k, v = qkv(5, 9)
    mask = options.get("attention_mask", torch.ones(2, 1, 5, 9, dtype=torch.bool))
    options = {name: value for name, value in options.items() if name != "attention_mask"}
    results = []
    for function in (attention.attend, attention.sdpa_attention_forward):
        torch.manual_seed(0)
        results.append(function(layer(), q, k, v, mask, scaling=0.3, **options)[0])
    close(*results)
    assert (paths.kernel, paths.sdpa) == (0, 2)
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    for extra in ({"softcap": 5.0}, {"s_aux": torch.zeros(4)}):
        with pytest.raises(NotImplementedError, match=r"softcap and sinks cannot run with .*; use attn_impl"):
            attention.attend(layer(), q, k, v, mask, **extra, **options)


def test_dropout_under_intervals_sees_the_same_keys() -> None:
    q, k, v = qkv(5, 9)
    mask = attention.make_mask(2, 5, 9, q_offset=2, attention_mask=padding("hole")[:, :9].bool())
    wanted = attention.sdpa_attention_forward(layer(), q, k, v, attention._dense(mask, 9), dropout=1e-9)
    close(attention.attend(layer(), q, k, v, mask, dropout=1e-9)[0], wanted[0])
    close(attention.attend(layer(), q, k, v, mask)[0], wanted[0])


def test_learned_queries_without_a_batch(paths: Paths) -> None:
    """SDPA broadcasts them."""
    q, k, v = qkv(5, 9)
    wanted, _ = attention.attend(layer(groups=2), q[:1].expand(2, -1, -1, -1), k, v, None)
    close(attention.attend(layer(groups=2), q[:1], k, v, None)[0], wanted)
    assert (paths.kernel, paths.sdpa) == (1, 1)


def test_what_only_sdpa_takes(paths: Paths) -> None:
    """Heads too large for the kernels, and dtypes that differ where autocast makes them one."""
    large = [normal(1, 1, 3, 600, dtype=torch.float32, seed=seed) for seed in range(3)]
    wanted = nn.functional.scaled_dot_product_attention(*large).transpose(1, 2)
    close(attention.attend(layer(causal=False, groups=1), *large, None)[0], wanted)
    q, k, v = qkv(5, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = attention.attend(layer(), q, k.bfloat16(), v, None)
    assert out.dtype == torch.bfloat16
    assert (paths.kernel, paths.sdpa) == (0, 2)


# --- masks --------------------------------------------------------------------------------------------------

BLOCKS = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, 1, -1, -1, 2, 2, -1, -1, -1]]).expand(2, -1)
FUNCTIONS = {
    "causal": masks.causal_mask_function,
    "bidirectional": masks.bidirectional_mask_function,
    "window": masks.sliding_window_causal_mask_function(4),
    "window on both sides": masks.sliding_window_bidirectional_mask_function(2),
    "chunks": masks.chunked_causal_mask_function(4, torch.tensor([3, 0])),
    "blocks": masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(BLOCKS)),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", ["none", "left", "right", "hole", "ends", "holes"])
@pytest.mark.parametrize(
    ("rows", "keys", "offsets"),
    [
        (LENGTH, LENGTH, (0, 0)),
        (1, LENGTH, (12, 0)),
        (4, 9, (9, 4)),
        (4, 16, (9, 0)),
        (4, 7, (torch.tensor(9), 6)),
        (4, 7, (2, 6)),
    ],
)
def test_masks_are_those_of_transformers(function, kind, rows, keys, offsets, monkeypatch) -> None:
    """Intervals wherever two are enough, and never by way of (S, T) where the function is plain."""
    pad = None if padding(kind) is None else padding(kind).bool()
    options = {
        "q_offset": offsets[0],
        "kv_offset": offsets[1],
        "mask_function": FUNCTIONS[function],
        "attention_mask": pad,
        "allow_is_causal_skip": False,
    }
    wanted = masks.sdpa_mask(2, rows, keys, **options)
    few = (nn.functional.pad(wanted, (1, 0)).int().diff(dim=-1) == 1).sum(-1).max() <= 2
    calls = []
    monkeypatch.setattr(attention, "sdpa_mask", lambda *a, **k: calls.append(1) or masks.sdpa_mask(*a, **k))
    got = attention.make_mask(2, rows, keys, dtype=torch.float32, local_size=4, **options)
    assert got.dtype == (torch.int32 if few else torch.bool)
    shared = kind == "none" and function not in ("chunks", "blocks")
    assert got.shape == (1 if shared else 2, 1, rows, 4 if few else keys)
    assert torch.equal(attention._dense(got, keys).expand_as(wanted), wanted)
    assert not (calls and kind != "holes" and function in ("causal", "bidirectional"))


def test_runs() -> None:
    """Every mask of six keys: all of its runs, or None."""
    every = torch.tensor([[bool(n >> i & 1) for i in range(6)] for n in range(64)])
    count = (nn.functional.pad(every, (1, 0)).int().diff(dim=-1) == 1).sum(-1)
    few, many = every[count <= 2], every[count > 2]
    assert torch.equal(attention._dense(attention.runs(few[None]), 6)[0, 0], few)
    assert len(many) == 64 - len(few) > 0
    assert all(attention.runs(row.view(1, 1, 6)) is None for row in many)
    assert attention.runs(torch.ones(2, 0, 3, dtype=torch.bool)).shape == (2, 1, 0, 4)
    assert not attention.runs(torch.ones(2, 3, 0, dtype=torch.bool)).any()


def test_registered_twice_is_registered() -> None:
    attention.register()
    assert transformers.AttentionInterface._global_mapping["dlcore"] is attention.attend
    assert transformers.AttentionMaskInterface._global_mapping["dlcore"] is attention.make_mask
