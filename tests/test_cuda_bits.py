"""Bitstream diffusion on the CUDA kernels: against float64 and the CPU's, in every form, layout and width."""

from __future__ import annotations

import math

import cuda_on_host
import pytest
import torch
from conftest import DEVICE, run_python
from test_bits import DTYPES, FORMS, double, inputs, levels_of, strided
from torch import Tensor
from triton_calls import assert_same, call

import dlcore
from dlcore import bits, rng

pytestmark = [pytest.mark.usefixtures("cuda_kernels", "guarded")]

KEY = rng.key(5)
#: Rows of one bit, many in a block, a row in several warps, several spans of which the last is ragged.
SHAPES = [(3, 1), (70, 2, 16), (2, 257), (3, 4803)]


def cuda(op: str, *args: object, **options: object) -> tuple[Tensor, ...]:
    """What the CUDA kernels make of it, on the CPU."""
    moved = [v.to(DEVICE) if isinstance(v, Tensor) else v for v in (*args, *options.values())]
    with dlcore.use_backend("cuda"):
        result = getattr(bits, op)(*moved[: len(args)], **dict(zip(options, moved[len(args) :], strict=True)))
    return tuple(r.cpu() for r in (result if isinstance(result, tuple) else (result,)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coding", ["01", "pm1"])
def test_posterior_and_step_match_float64(dtype, shape, coding):
    x, residual, _ = inputs(shape, dtype)
    sigma = levels_of(shape, "row")
    (probs,) = cuda("posterior", x, sigma, residual, coding=coding)
    exact = bits.posterior(*double(x, sigma, residual), coding=coding)
    assert probs.dtype == torch.float32
    near = exact > 1e-4
    torch.testing.assert_close(probs.double()[near], exact[near], rtol=2e-6, atol=0)
    # A logit of 86 in float32 is known to 4e-6, and so is its exponential.
    torch.testing.assert_close(probs.double(), exact, rtol=8e-6, atol=1e-36)
    (filtered,) = cuda("matched_filter", x, sigma, coding=coding)
    meant = bits.matched_filter(*double(x, sigma), coding=coding)
    torch.testing.assert_close(filtered.double(), meant, rtol=4e-7, atol=1e-7)
    moved, same = cuda("step", x, residual, sigma, 0.5 * sigma, coding=coding)
    assert torch.equal(same, probs)
    meant, _ = bits.step(*double(x, residual, sigma), 0.5 * sigma.double(), coding=coding)
    torch.testing.assert_close(moved.double(), meant, rtol=1e-6, atol=1e-6)
    (alone,) = cuda("posterior", x, sigma, coding=coding)
    torch.testing.assert_close(
        alone.double(), bits.posterior(*double(x, sigma), coding=coding), rtol=8e-6, atol=0
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5,), (3, 2, 33), (7, 2, 20), (2051,), (2, 2050)])
@pytest.mark.parametrize("own", [False, True], ids=["shared key", "key per row"])
def test_noise_is_that_of_the_cpu(form, shape, own):
    """To rounding, with levels of every form."""
    x, residual, clean = inputs(shape)
    sigma = levels_of(shape, form)
    key = rng.split(KEY, shape[:-1]) if own else KEY
    gamma = 0.1 if form == "number" else torch.where(torch.as_tensor(sigma) > 0.6, 0.3, 0.0)
    options = {"gamma_next": gamma, "key": key}
    got = cuda("step", x, residual, sigma, 0.5 * sigma, **options)
    assert_same(got, bits.step(x, residual, sigma, 0.5 * sigma, **options), 2e-6, 1e-6)
    (got,) = cuda("corrupt", x, sigma, key=key)
    torch.testing.assert_close(got, bits.corrupt(x, sigma, key=key), rtol=1e-6, atol=1e-6)
    assert (got - x).std() > 0.2 or got.numel() < 9
    for kind in ("squared", "bce"):
        (got,) = cuda("loss", residual, x, clean, sigma, kind=kind)
        torch.testing.assert_close(got, bits.loss(residual, x, clean, sigma, kind=kind), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("squared", [True, False], ids=["squared", "bce"])
@pytest.mark.parametrize("low", [0.0, -1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_its_gradients_match_float64(squared, low, shape, dtype):
    x, residual, clean = inputs(shape, dtype)
    clean = clean if low == 0 else 2 * clean - 1
    # A clip that binds for some bits, which then hand no gradient to x.
    args = (residual, x, clean, torch.tensor(6.0), low, 1.0, 3.0, squared)
    expected = call("bits.loss", "reference", *args, wide=True)
    assert_same(call("bits.loss", "cuda", *args), expected, 2e-6, 1e-9)
    grad = torch.linspace(1, 2, math.prod(shape[:-1]))
    backward = (grad.view(shape[:-1]), *args, True)
    found = call("bits.loss_backward", "cuda", *backward)
    assert all(g.dtype == dtype for g in found)
    # Relative to each entry: saturated bits have small gradients that must be right too.
    expected = call("bits.loss_backward", "reference", *backward, wide=True)
    assert_same(found, expected, 2e-5 + torch.finfo(dtype).eps, 1e-34)
    assert shape == (3, 1) or 0 < int((found[1] == 0).sum()) < found[1].numel()
    alone, none = call("bits.loss_backward", "cuda", *backward[:-1], False)
    assert torch.equal(alone, found[0])
    assert none.shape == (0,)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
@pytest.mark.parametrize("columns", [24, 23, 1022])
def test_loads_of_every_width(dtypes, offset, columns):
    """Rows with gaps between them, at addresses that allow one element at once, two or four."""

    def placed(t: Tensor, dtype: torch.dtype) -> Tensor:
        room = torch.full((3, 2, 1032), math.nan, dtype=dtype)
        room[..., offset : offset + columns] = t
        return room[..., offset : offset + columns]

    x, residual, clean = inputs((3, 2, columns))
    a, b, c = placed(x, dtypes[0]), placed(residual, dtypes[1]), placed(clean, dtypes[0])
    options = {"gamma_next": 0.2, "key": KEY}
    for sigma in (0.5, levels_of((3, 2, columns), "element")):
        expected = bits.step(a, b, sigma, 0.4, **options)
        assert_same(cuda("step", a, b, sigma, 0.4, **options), expected, 2e-6, 1e-6)
        (got,) = cuda("loss", b, a, c, sigma)
        torch.testing.assert_close(got, bits.loss(b, a, c, sigma), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", ["padded", "transposed", "last"])
def test_strides(layout, caplog):
    x, residual, clean = inputs((3, 2, 33))
    a, b, c = (strided(t)[layout] for t in (x, residual, clean))
    options = {"gamma_next": 0.2, "key": KEY}
    with caplog.at_level("INFO", logger="dlcore"):
        got = cuda("step", a, b, 0.5, 0.4, **options)
    assert ("copied" in caplog.text) == (layout == "last")
    assert_same(got, cuda("step", x, residual, 0.5, 0.4, **options), 1e-6, 1e-6)
    assert_same(cuda("loss", b, a, c, 0.5), cuda("loss", residual, x, clean, 0.5), 1e-6, 0)
    row = torch.randn(1, 33).expand(4, 33)
    assert torch.equal(*cuda("posterior", row, 0.5), *cuda("posterior", row.contiguous(), 0.5))


def test_nothing_to_do():
    x, residual, clean = inputs((3, 2, 33))
    for empty in cuda("step", x[:0], residual[:0], 0.5, 0.4, gamma_next=0.2, key=KEY):
        assert empty.shape == (0, 2, 33)
    assert cuda("loss", residual[:0], x[:0], clean[:0], 0.5)[0].shape == (0, 2)
    assert cuda("encode", torch.zeros(0, dtype=torch.int64), 5)[0].shape == (0, 5)


def test_ends_of_sigma():
    """σ → 0: the bit that x is nearer to, 1/2 between; σ → ∞: a fair bit; σ' = 0: the posterior mean."""
    x = torch.tensor([[-3.0, 0.4999, 0.5, 0.5001, 9.0]])
    for sigma in (0.0, 1e-20, 1e-6):
        assert cuda("matched_filter", x, sigma)[0].tolist() == [[-30, -30, 0, 30, 30]]
        (probs,) = cuda("posterior", x, sigma, clip=math.inf)
        torch.testing.assert_close(probs, torch.tensor([[0, 0, 0.5, 1, 1]]), rtol=0, atol=1e-36)
    assert cuda("posterior", x, 1e30)[0].eq(0.5).all()
    moved, probs = cuda("step", x, None, 0.2, 0.0)
    assert torch.equal(moved, probs)
    huge = torch.tensor([[300.0, -300.0]])
    (probs,) = cuda("posterior", huge, 0.001, huge)
    torch.testing.assert_close(probs, torch.tensor([[1.0, 0.0]]), rtol=0, atol=1e-36)
    (loss,) = cuda("loss", huge, huge, torch.tensor([[0.0, 1.0]]), 0.001, kind="bce")
    assert loss.item() == pytest.approx(330)


def test_where_sigma_stays_x_stays_to_the_bit():
    x, residual, _ = inputs((2, 50))
    sigma = torch.full((2, 50), 0.3)
    prompt = torch.arange(50).expand(1, 50) < 10
    after, gamma = torch.where(prompt, sigma, 0.1), torch.where(prompt, 0.0, 0.2)
    moved, _ = cuda("step", x, residual, sigma, after, gamma_next=gamma, key=KEY)
    assert torch.equal(moved[:, :10], x[:, :10])
    assert (moved[:, 10:] != x[:, 10:]).all()


def test_nan_stays_where_it_is():
    x, residual, clean = inputs((2, 40))
    x[0, 3], residual[1, 17] = torch.nan, torch.nan
    wanted = x.isnan() | residual.isnan()
    for sigmas in ((0.5, 0.4), (0.5, 0.5)):
        for result in cuda("step", x, residual, *sigmas, gamma_next=0.1, key=KEY):
            assert torch.equal(result.isnan(), wanted)
    x[0, 3] = 0
    for kind in ("squared", "bce"):
        assert cuda("loss", residual, x, clean, 0.5, kind=kind)[0].isnan().tolist() == [False, True]


@pytest.mark.parametrize("width", [1, 2, 15, 16, 33, 62])
@pytest.mark.parametrize("order", ["msb", "lsb"])
@pytest.mark.parametrize("gray", [False, True])
def test_codes(width, order, gray):
    """As on the CPU, with codes that wrap around and bits that are NaN; more tokens than a block takes."""
    tokens = torch.randint(0, 2**width, (3, 175), generator=torch.Generator().manual_seed(width))
    tokens[0, :2] = torch.tensor([0, 2**width - 1])
    options = {"order": order, "gray": gray, "coding": "pm1"}
    (encoded,) = cuda("encode", tokens, width, **options)
    assert torch.equal(encoded, bits.encode(tokens, width, **options))
    assert torch.equal(*cuda("decode", encoded, **options), tokens)
    noise = 0.5 * torch.randn(encoded.shape, generator=torch.Generator().manual_seed(1))
    noisy = (encoded + noise).bfloat16()
    noisy[1, 7, width // 2] = math.nan
    vocab = 2 ** (width - 1) + 1 if width > 1 else None
    (decoded,) = cuda("decode", noisy, vocab_size=vocab, **options)
    assert torch.equal(decoded, bits.decode(noisy, vocab_size=vocab, **options))
    assert decoded[1, 7] == -1
    # The same, each row apart from the next.
    apart = torch.cat([noisy, torch.full_like(noisy, math.nan)], -1)[..., :width]
    assert torch.equal(*cuda("decode", apart, vocab_size=vocab, **options), decoded)


def test_more_bits_than_a_token_has():
    with pytest.raises(ValueError, match=r"bits.decode: width must lie in \[1, 64\], got 65"):
        call("bits.decode", "cuda", torch.zeros(2, 65), True, False, 0.0, 0)


def test_the_backend_can_be_asked_for():
    with dlcore.use_backend("cuda"), pytest.raises(NotImplementedError, match=r"cuda: takes .*float64"):
        bits.posterior(torch.zeros(2, 3, dtype=torch.float64), 0.5)
    cuda("posterior", torch.zeros(2, 3), 0.5)
    assert dlcore.last_backend("bits.posterior") == "cuda"


#: A bound one too large, a warp's sum read before it is there, codes read before they are.
FAULTS = [
    (
        "csrc/cuda/runs.h",
        "if (i < count) p[i] = narrow_to<T>(x[i]);",
        "if (i <= count) p[i] = narrow_to<T>(x[i]);",
    ),
    ("csrc/cuda/runs.h", "shared[warp] = x;\n  __syncthreads();", "shared[warp] = x;"),
    (
        "csrc/cuda/bit_codes.cu",
        "to_gray(token) : token;\n    }\n    __syncthreads();",
        "to_gray(token) : token;\n    }",
    ),
]


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="the faulty kernels run on the host alone")
def test_faults_show():
    """What these tests say of kernels with an off-by-one in a bound and without two of their barriers."""
    module = cuda_on_host.build(edits=FAULTS)
    code = f"import pytest; pytest.main(['-q', '-rfE', '--tb=line', '-m', 'not slow', {__file__!r}])"
    said = run_python(code, DLCORE_CUDA_ON_HOST=str(module))
    assert "a kernel wrote past a buffer" in said
    assert "ERROR tests/test_cuda_bits.py::test_noise_is_that_of_the_cpu" in said
    assert "FAILED tests/test_cuda_bits.py::test_loss_and_its_gradients_match_float64" in said
    assert "FAILED tests/test_cuda_bits.py::test_codes" in said
