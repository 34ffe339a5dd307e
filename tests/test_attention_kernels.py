"""Attention's numbers: parity with float64, gradients, dtypes, head dimensions, strides, determinism."""

from __future__ import annotations

import pytest
import torch
from attention_oracles import close, dense, dtype_of, normal, qkv, training_mask
from conftest import levels
from torch.nn import functional as F

import dlcore
from dlcore import attention
from dlcore.cpu import choose_capability
from dlcore.reference import attention as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def results(call, tensors, seeds=(7, 8)):
    """out, lse and the gradients of q, k, v under random gradients of both."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = call(*leaves)
    grads = [normal(*x.shape, dtype=x.dtype, seed=seed) for x, seed in zip((out, lse), seeds, strict=True)]
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, grads)]


def sdpa(mask):
    """Torch's own attention in the inputs' dtype, with a dense mask; its lse in float32."""

    def call(q, k, v):
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        group = q.shape[2] // k.shape[2]
        scores = heads[0].float() @ heads[1].float().repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
        return out.transpose(1, 2), scores.masked_fill(~mask, -torch.inf).logsumexp(-1)

    return call


def assert_as_good_as_sdpa(length, block, heads, dims, dtype, **kw):
    mask = training_mask(length, block, **kw)
    tensors = qkv(2, len(mask), len(mask), heads, dims, dtype)

    def call(q, k, v):
        return attention.block_diffusion(q, k, v, block_size=block, return_lse=True, **kw)

    mine = results(call, tensors)
    assert dlcore.last_backend("attention.intervals") == "cpu"
    assert dlcore.last_backend("attention.intervals_backward") == "cpu"
    torch_own = results(sdpa(mask), tensors)
    with dlcore.use_backend("reference"):
        exact = results(call, [x.double() for x in tensors])
    assert [x.dtype for x in mine] == [dtype, torch.float32, dtype, dtype, dtype]
    for name, got, own, truth in zip(("out", "lse", "dq", "dk", "dv"), mine, torch_own, exact, strict=True):
        error, allowed = (x.double() - truth for x in (got, own))
        # In roundings of the largest number; float32 sums round at every step, the others once.
        ulp, full = truth.abs().max() * torch.finfo(got.dtype).eps, got.dtype == torch.float32
        assert rms(error) <= max(2 * rms(allowed), (3 if full else 0.1) * ulp), name
        assert error.abs().max() <= (32 if full else 1) * ulp, name


def rms(x):
    return x.square().mean().sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "block", "kw"),
    [
        (1, 1, {}),
        (37, 5, {"clean": "token"}),
        (64, 16, {"order": "clean_first"}),
        (50, 8, {"num_noisy": 2}),
        (200, 4, {}),
        (130, 64, {}),
    ],
)
def test_parity_over_masks(length, block, kw, dtype, poisoned):
    assert_as_good_as_sdpa(length, block, (4, 2), (64, 64), dtype, **kw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 4, 6, 8, 16, 65])
def test_parity_over_groups(group, dtype, poisoned):
    assert_as_good_as_sdpa(33, 8, (2 * group, 2), (64, 64), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dims",
    [
        *((d, d) for d in (1, 7, 32, 64, 80, 96, 128, 192, 256, 512)),
        (64, 32),
        (32, 80),
        (192, 128),
        (17, 5),
        (8, 512),
        (512, 3),
    ],
)
def test_parity_over_head_dims(dims, dtype, poisoned):
    assert_as_good_as_sdpa(33, 8, (2, 1), dims, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [4, 16, 32])
def test_parity_at_length_1024(block, dtype):
    assert_as_good_as_sdpa(1024, block, (4, 2), (64, 64), dtype)


@pytest.mark.parametrize("length", [64, 600])
def test_levels_agree(length):
    tensors = qkv(2, 2 * length, 2 * length, (4, 2), (64, 48), torch.float32)

    def call(q, k, v):
        return attention.block_diffusion(q, k, v, block_size=16, return_lse=True)

    best = results(call, tensors)
    current = dlcore._C.capability()
    try:
        for level in levels():
            choose_capability(level)
            for x, y in zip(results(call, tensors), best, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * y.abs().max().item())
    finally:
        choose_capability(current)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "rows", "keys"), [(1, 16, 1500), (3, 100, 400), (1, 600, 600)])
def test_results_are_bit_equal_for_any_number_of_threads(batch, rows, keys, dtype):
    tensors = qkv(batch, rows, keys, (4, 2), (64, 64), dtype)

    def call(q, k, v):
        return attention.block_causal(q, k, v, block_size=16, q_offset=keys - rows, return_lse=True)

    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(call, tensors))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_gradcheck(softcap):
    """The reference in float64, through out and lse, with rows that see nothing."""
    q, k, v = (x.requires_grad_() for x in qkv(2, 5, 6, (4, 2), (3, 2)))
    starts = torch.tensor([[0, 0], [3, 0], [2, 5], [4, 4], [1, 4]], dtype=torch.int32).unsqueeze(0)
    stops = torch.tensor([[6, 0], [5, 2], [4, 6], [4, 4], [2, 4]], dtype=torch.int32).unsqueeze(0)

    def call(q, k, v):
        out, lse = attention.intervals(
            q, k, v, starts, stops, softmax_scale=0.7, softcap=softcap, return_lse=True
        )
        return out, lse.masked_fill(lse == -torch.inf, 0)

    with dlcore.use_backend("reference"):
        assert torch.autograd.gradcheck(call, (q, k, v))


@pytest.mark.parametrize("softcap", [0.3, 5.0])
@pytest.mark.parametrize("scale", [1.0, -0.2])
def test_softcap_and_scale(softcap, scale):
    """Out, lse and gradients in float32 against the reference in float64."""
    tensors = qkv(2, 40, 90, (4, 2), (40, 24), torch.float32)

    def call(q, k, v):
        return attention.block_causal(
            q, k, v, block_size=7, q_offset=50, softmax_scale=scale, softcap=softcap, return_lse=True
        )

    with dlcore.use_backend("reference"):
        exact = results(call, [x.double() for x in tensors])
    for got, truth in zip(results(call, tensors), exact, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item())


def test_gradient_of_one_output_only():
    """A loss on lse alone, or on out alone."""
    tensors = qkv(1, 30, 30, dtype=torch.float32)
    for which in (0, 1):
        got, wanted = [], []
        for kind, found in (("cpu", got), ("reference", wanted)):
            leaves = [x.clone().requires_grad_() for x in tensors]
            with dlcore.use_backend(kind):
                attention.block_causal(*leaves, block_size=4, return_lse=True)[which].sum().backward()
            found += [x.grad for x in leaves]
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_noisy_rows_alone_have_the_gradient_of_their_part(backend):
    """dq of clean rows is 0; clean keys still receive theirs."""
    tensors = [x.requires_grad_() for x in qkv(2, 38, 38, dtype=dtype_of(backend))]
    kw = {"block_size": 5, "order": "clean_first"}
    weight = normal(2, 19, 4, 32, seed=9, dtype=tensors[0].dtype)
    part = (attention.block_diffusion(*tensors, rows="noisy", **kw) * weight).sum()
    whole = (attention.block_diffusion(*tensors, **kw)[:, 19:] * weight).sum()
    got, wanted = (torch.autograd.grad(x, tensors) for x in (part, whole))
    assert not got[0][:, :19].any()
    assert got[1][:, :15].any(-1).all()
    for x, y in zip(got, wanted, strict=True):
        close(x / 10, y / 10)


# --- memory layouts ----------------------------------------------------------------------------------------


def layouts(q, k, v):
    """The same numbers in other memory: (name, tensors)."""
    yield "BHSD", tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    packed = torch.cat([q, k, v], 2)
    yield "packed", tuple(packed.split([x.shape[2] for x in (q, k, v)], 2))
    yield "sequence first", tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    yield "every second row", tuple(x.repeat_interleave(2, 1)[:, ::2] for x in (q, k, v))
    yield "padded", tuple(F.pad(x, (0, 3), value=float("nan"))[..., :-3] for x in (q, k, v))
    yield "head dimension first", tuple(x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(backend, dtype):
    tensors = qkv(2, 26, 26, (4, 2), (32, 32), dtype)

    def call(q, k, v):
        return attention.block_diffusion(q, k, v, block_size=4, return_lse=True)

    wanted = results(call, tensors)
    for name, strided in layouts(*tensors):
        assert all(not x.is_contiguous() or x.shape[2] == 1 for x in strided), name
        leaves = [x.detach().requires_grad_() for x in strided]
        assert [x.stride() for x in leaves] == [x.stride() for x in strided]
        out, lse = call(*leaves)
        grads = [normal(*x.shape, dtype=x.dtype, seed=seed) for x, seed in ((out, 7), (lse, 8))]
        # The gradient may be strided too.
        grads[0] = grads[0].transpose(1, 3).contiguous().transpose(1, 3)
        got = [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, grads)]
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True)), name


def test_expanded_inputs(backend):
    """Keys shared by the batch or by heads, with stride 0; a gradient with stride 0, as sum() gives."""
    q, k, v = qkv(3, 10, 10, (4, 2), dtype=dtype_of(backend))
    for shared in ((k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1)), (k[:, :, :1], v[:, :, :1])):
        k_, v_ = (x.expand(3, 10, 2, 32) for x in shared)
        got = results(lambda *x: attention.block_causal(*x, block_size=4, return_lse=True), (q, k_, v_))
        plain = [x.contiguous() for x in (q, k_, v_)]
        wanted = results(lambda *x: attention.block_causal(*x, block_size=4, return_lse=True), plain)
        close(attention.block_causal(q, k_, v_, block_size=4), wanted[0])
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dims", [(32, 32), (48, 16)])
def test_values_may_be_keys(dims, backend):
    """V = K, or a part of it: gradients of both add up."""
    q, k, _ = qkv(2, 20, 20, (4, 2), dims, dtype_of(backend))
    k.requires_grad_()
    out = attention.block_causal(q, k, k[..., : dims[1]], block_size=4)
    (got,) = torch.autograd.grad(out.sum(), k)
    copies = [k.detach().clone().requires_grad_() for _ in range(2)]
    apart = attention.block_causal(q, copies[0], copies[1][..., : dims[1]], block_size=4)
    wanted = torch.autograd.grad(apart.sum(), copies)
    assert torch.equal(out, apart)
    close(got / 10, (wanted[0] + wanted[1]) / 10)


# --- hostile numbers ---------------------------------------------------------------------------------------


def test_huge_scores(backend):
    """Scores of ±1e4 are one-hot, or equal; the gradient is finite."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 80, 80, (1, 1), dtype=dtype_of(backend)))
    out, lse = attention.block_causal(q, k, v, block_size=8, softmax_scale=2000.0, return_lse=True)
    scores = torch.einsum("bshd,bthd->bst", q, k) * 2000.0
    assert scores.abs().max() > 1e4
    wanted, wanted_lse = dense(q, k, v, training_mask(80, 8)[80:, 80:], 2000.0)
    margin = scores.masked_fill(~training_mask(80, 8)[80:, 80:], -torch.inf).topk(2, -1).values
    sure = (margin[0, :, 0] - margin[0, :, 1]) > 20
    assert sure.sum() > 60
    torch.testing.assert_close(out[:, sure].double(), wanted[:, sure].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert all(bool(torch.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize("level_of_score", [-1e4, 0.0, 1e4])
def test_equal_scores(level_of_score, backend):
    """The mean of the values, and log count above the score."""
    dtype = dtype_of(backend)
    q, k, v = torch.ones(1, 3, 1, 4, dtype=dtype), torch.ones(1, 300, 1, 4, dtype=dtype), None
    v = normal(1, 300, 1, 4, dtype=dtype)
    out, lse = attention.block_causal(
        q, k, v, block_size=300, softmax_scale=level_of_score / 4, return_lse=True
    )
    if backend == "triton":
        # Weights of tiles that see all and of those that don't differ by the rounding of a score.
        rounding = torch.finfo(dtype).eps * abs(level_of_score) + 1e-5
        torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out), rtol=0, atol=rounding)
    else:
        close(out, v.mean(1, keepdim=True).expand_as(out))
    wanted = torch.full_like(lse, level_of_score + float(torch.tensor(300.0, dtype=torch.float64).log()))
    torch.testing.assert_close(lse, wanted, rtol=1e-6, atol=1e-5)


def test_values_of_half_precision_reach_their_range():
    """Sums beyond float16's 65504 are kept in float32 inside."""
    v = torch.full((1, 64, 1, 8), 60000.0, dtype=torch.float16)
    q = torch.zeros(1, 64, 1, 8, dtype=torch.float16)
    assert torch.equal(attention.block_causal(q, q, v, block_size=64), v)


@pytest.mark.parametrize("which", ["k", "v", "kv"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("half", ["noisy", "clean"])
def test_poison_stays_with_the_rows_that_see_it(value, which, half, backend):
    """One block of keys is poisoned: rows that don't see it keep their numbers and gradients."""
    length, block, at = 40, 5, slice(15, 20)
    mask = training_mask(length, block)
    q, k, v = qkv(1, 2 * length, 2 * length, dtype=dtype_of(backend))
    keys = torch.zeros(2 * length, dtype=torch.bool)
    keys[:length] = half == "noisy"
    poisoned = torch.zeros_like(keys)
    poisoned[slice(at.start + length, at.stop + length) if half == "clean" else at] = True
    sees = mask[:, poisoned].any(1)
    assert sees.any()
    assert not sees.all()
    # Keys that no reached row sees.
    apart = ~mask[sees].any(0)
    assert apart.any()
    weight = normal(1, 2 * length, 4, 32, seed=5, dtype=q.dtype) * ~sees[:, None, None]
    found = []
    for hurt in (False, True):
        leaves = [x.clone() for x in (q, k, v)]
        if hurt:
            for name, x in zip("kv", leaves[1:], strict=True):
                if name in which:
                    x[:, poisoned] = value
        leaves = [x.requires_grad_() for x in leaves]
        out, lse = attention.block_diffusion(*leaves, block_size=block, return_lse=True)
        grad_lse = torch.where(sees, 0, normal(1, 4, 2 * length, seed=6, dtype=lse.dtype))
        grads = torch.autograd.grad((out, lse), leaves, (weight, grad_lse))
        found.append((out.detach(), lse.detach(), *grads))
    (out, lse, dq, dk, dv), (out_, lse_, dq_, dk_, dv_) = found
    rows = ~sees
    close(out_[:, rows], out[:, rows])
    close(lse_[..., rows], lse[..., rows])
    close(dq_[:, rows], dq[:, rows])
    close(dk_[:, apart] / 10, dk[:, apart] / 10)
    close(dv_[:, apart] / 10, dv[:, apart] / 10)
    # The test can fail: rows that see the poison do change.
    assert not torch.allclose(out_[:, sees], out[:, sees])


@pytest.mark.parametrize("half", ["noisy", "clean"])
@pytest.mark.parametrize("block_at", [0, 3, 7])
def test_perturbing_a_block_leaves_other_rows_bit_equal(half, block_at, backend):
    length, block = 40, 5
    mask = training_mask(length, block)
    q, k, v = qkv(2, 2 * length, 2 * length, dtype=dtype_of(backend))
    at = block_at * block + (length if half == "clean" else 0)
    sees = mask[:, at : at + block].any(1)
    others = [x.clone() for x in (k, v)]
    for x in others:
        x[:, at : at + block] += 1
    one = attention.block_diffusion(q, k, v, block_size=block, return_lse=True)
    two = attention.block_diffusion(q, *others, block_size=block, return_lse=True)
    assert torch.equal(one[0][:, ~sees], two[0][:, ~sees])
    assert torch.equal(one[1][..., ~sees], two[1][..., ~sees])
    assert (one[0][:, sees] != two[0][:, sees]).any(-1).any(-1).all()


def test_gradients_of_what_is_not_seen_are_exactly_zero(backend):
    """A loss on one row reaches only its own query and the keys that it sees."""
    mask = training_mask(30, 4)
    for row in (0, 13, 29, 30, 47, 59):
        leaves = [x.requires_grad_() for x in qkv(1, 60, 60, (2, 2), dtype=dtype_of(backend))]
        out, lse = attention.block_diffusion(*leaves, block_size=4, return_lse=True)
        loss = (out[:, row] * normal(2, 32, dtype=out.dtype)).sum() + lse[..., row].sum()
        dq, dk, dv = torch.autograd.grad(loss, leaves)
        assert torch.equal(dq.abs().sum((0, 2, 3)) > 0, torch.arange(60) == row)
        for g in (dk, dv):
            assert torch.equal(g.abs().sum((0, 2, 3)) > 0, mask[row])


@pytest.mark.parametrize("garbage", [0.0, float("nan")])
def test_rows_that_see_nothing(garbage, backend):
    """0, -inf and no gradient, whatever stands in such a row."""
    q, k, v = qkv(2, 40, 40, dtype=dtype_of(backend))
    starts = torch.zeros(1, 40, 2, dtype=torch.int32)
    stops = torch.zeros_like(starts)
    some = torch.arange(40) % 3 == 0
    stops[0, some, 0] = 30
    q[:, ~some] += garbage
    found = []
    # With the empty rows, and without them.
    for rows, kept in ((slice(None), some), (some, slice(None))):
        leaves = [x.clone().requires_grad_() for x in (q[:, rows], k, v)]
        out, lse = attention.intervals(*leaves, starts[:, rows], stops[:, rows], return_lse=True)
        grads = torch.autograd.grad(out[:, kept].sum() + lse[..., kept].sum(), leaves)
        found.append((out, lse, *grads))
    (out, lse, dq, dk, dv), (_, _, _, dk_, dv_) = found
    assert not out[:, ~some].any()
    assert bool((lse[..., ~some] == -torch.inf).all())
    assert not dq[:, ~some].any()
    assert not dk[:, 30:].any()
    assert not dv[:, 30:].any()
    close(dk / 10, dk_ / 10)
    close(dv / 10, dv_ / 10)


@pytest.mark.parametrize("first", [1, 63, 64, 200, 511, 599])
def test_first_tiles_masked(first, backend):
    """The keys that come first in memory are seen by no row, or by one row of many."""
    q, k, v = qkv(1, 20, 600, dtype=dtype_of(backend))
    starts = torch.tensor([first, 0], dtype=torch.int32).expand(1, 20, 2).clone()
    stops = torch.tensor([600, 0], dtype=torch.int32).expand(1, 20, 2).clone()
    mask = torch.zeros(1, 20, 600, dtype=torch.bool)
    mask[..., first:] = True
    for lone in (False, True):
        if lone:
            starts[0, 7, 0] = 0
            mask[0, 7] = True
        got = attention.intervals(q, k, v, starts, stops, return_lse=True)
        for x, y in zip(got, dense(q, k, v, mask), strict=True):
            close(x, y)


def test_a_sequence_does_not_depend_on_its_batch():
    tensors = qkv(3, 80, 80, dtype=torch.float32)
    whole = results(lambda *x: attention.block_diffusion(*x, block_size=8, return_lse=True), tensors)
    grads = [normal(*x.shape, dtype=x.dtype, seed=s)[1:2] for x, s in ((whole[0], 7), (whole[1], 8))]
    leaves = [x[1:2].clone().requires_grad_() for x in tensors]
    out, lse = attention.block_diffusion(*leaves, block_size=8, return_lse=True)
    assert torch.equal(out, whole[0][1:2])
    assert torch.equal(lse, whole[1][1:2])
    for x, y in zip(torch.autograd.grad((out, lse), leaves, grads), whole[2:], strict=True):
        assert torch.equal(x, y[1:2])


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_unseen_garbage_changes_no_bit(garbage):
    """Partly visible tiles with something that isn't finite take another path, to the same numbers."""
    starts, stops = torch.zeros(1, 20, 2, dtype=torch.int32), torch.zeros(1, 20, 2, dtype=torch.int32)
    stops[0, :, 0] = torch.arange(20) + 1
    stops[0, 19, 0] = 0
    q, k, v = qkv(2, 20, 21, dtype=torch.float32)
    found = []
    for value in (0.0, garbage):
        leaves = [q.clone(), k.clone(), v.clone()]
        for x in leaves[1:]:
            x[:, 19:] = value
        leaves = [x.requires_grad_() for x in leaves]
        out, lse = attention.intervals(*leaves, starts, stops, return_lse=True)
        seen = torch.where(lse == -torch.inf, 0, lse)
        grads = torch.autograd.grad((out.square().sum(), seen.sum()), leaves)
        found.append((out, lse, *grads))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("visible", [64, 70])
def test_scores_of_minus_infinity_see_nothing(visible, backend):
    """q·k overflows: whole and partly visible tiles agree that the row gives 0 and -inf."""
    q, k = torch.full((1, 2, 1, 32), 1e20), torch.full((1, 80, 1, 32), -1e20)
    starts, stops = torch.zeros(1, 2, 2, dtype=torch.int32), torch.zeros(1, 2, 2, dtype=torch.int32)
    stops[0, :, 0] = torch.tensor([visible, visible - 1])
    out, lse = attention.intervals(q, k, torch.ones(1, 80, 1, 32), starts, stops, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


BROKEN = {
    "too few starts": lambda a: (*a[:3], a[3][:, :2], a[4][:, :2], *a[5:]),
    "another batch of starts": lambda a: (*a[:3], a[3].repeat(3, 1, 1), a[4].repeat(3, 1, 1), *a[5:]),
    "another batch of k": lambda a: (a[0], a[1][:1], *a[2:]),
    "fewer rows of v": lambda a: (*a[:2], a[2][:, :3], *a[3:]),
    "3 heads over 2": lambda a: (a[0][:, :, :3], *a[1:]),
    "another head dimension": lambda a: (a[0][..., :16], *a[1:]),
    "stops past the keys": lambda a: (*a[:4], a[4] + 9, *a[5:]),
    "int64 stops": lambda a: (*a[:4], a[4].long(), *a[5:]),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_ops_refuse_what_they_would_misread(broken):
    """Whoever calls the registered ops: nothing is read out of bounds."""
    q, k, v = qkv(2, 5, 9, dtype=torch.float32)
    starts, stops = torch.zeros(1, 5, 2, dtype=torch.int32), torch.zeros(1, 5, 2, dtype=torch.int32)
    stops[..., 0] = 9
    good = (q, k, v, starts, stops, None, 0.1, 0.0)
    out, lse = torch.ops.dlcore.attention_intervals(*good)
    bad = BROKEN[broken](good)
    with pytest.raises((ValueError, TypeError), match=r"attention\.intervals"):
        torch.ops.dlcore.attention_intervals(*bad)
    with pytest.raises((ValueError, TypeError), match=r"attention\.intervals"):
        torch.ops.dlcore.attention_intervals_backward(out, lse, out, lse, *bad[:5], 0.1, 0.0)


def test_reference_gradient_is_autograd_of_dense_attention():
    """The reference's own backward against torch's autograd of the oracle."""
    mask = training_mask(11, 3)
    tensors = qkv(2, 22, 22)
    with dlcore.use_backend("reference"):
        got = results(lambda *x: attention.block_diffusion(*x, block_size=3, return_lse=True), tensors)
    wanted = results(lambda *x: dense(*x, mask), tensors)
    for x, y in zip(got, wanted, strict=True):
        close(x / 10, y / 10)


def test_reference_paths_agree():
    """The path for NaN gives the numbers of the plain one."""
    q, k, v = qkv(2, 9, 14)
    mask = torch.rand(2, 9, 14, generator=torch.Generator().manual_seed(0)) < 0.5
    one, two = (reference._attend(q, k, v, mask, 0.3, 2.0, finite) for finite in (True, False))
    for x, y in zip(one, two, strict=True):
        close(x, y)
