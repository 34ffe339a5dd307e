"""Distillation: SDTT, its divergences, and IDLM's losses against enumeration and dense formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
from oracles import JOINT, V, check_compiled, mask_kernel, uniform_kernel
from torch import Tensor

import dlcore
from dlcore import LinearLogits
from dlcore.process import _rows as rows
from dlcore.process import distill, masked, uniform

MASK = V
KINDS = ("forward", "reverse", "total_variation")


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    p, q = student.double().softmax(-1), teacher.double().softmax(-1)
    if kind == "total_variation":
        return (p - q).abs().sum(-1) / 2
    return (
        torch.special.xlogy(q, q / p).sum(-1) if kind == "forward" else torch.special.xlogy(p, p / q).sum(-1)
    )


# --- divergences -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exclude", [None, 0, 4, 6])
def test_divergence(kind: str, exclude: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "GRADIENT_CHUNK", 14)
    heads = [rand(3, 5, 4, seed=i) for i in range(2)]
    weights, biases = [rand(7, 4, seed=2 + i) for i in range(2)], [rand(7, seed=4 + i) for i in range(2)]
    linear = [LinearLogits(h, w, b) for h, w, b in zip(heads, weights, biases, strict=True)]
    leaves = [heads[0], weights[0], biases[0]]
    for leaf in leaves:
        leaf.requires_grad_()
    kept = [i for i in range(7) if i != exclude]
    wanted = by_hand(
        kind, *((h @ w.T + b)[..., kept] for h, w, b in zip(heads, weights, biases, strict=True))
    )
    got = distill.divergence(linear[0], linear[1], kind=kind, exclude=exclude)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-6)
    cotangent = rand(3, 5, seed=6)
    for mine, theirs in zip(
        torch.autograd.grad((got * cotangent).sum(), leaves),
        torch.autograd.grad((wanted * cotangent).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    dense = [h.materialize() for h in linear]
    torch.testing.assert_close(distill.divergence(*dense, kind=kind, exclude=exclude), got)
    teacher = dense[1].detach().requires_grad_()
    loss = distill.divergence(dense[0], teacher, kind=kind, exclude=exclude).sum()
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)
    same = distill.divergence(dense[0], dense[0].detach(), kind=kind)
    assert float(same.detach().abs().max()) < 1e-6


def test_total_variation_keeps_a_chunk_of_softmaxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What backward keeps is the inputs: nothing else as large as the logits."""
    monkeypatch.setattr(rows, "GRADIENT_CHUNK", 1000)
    student, teacher = rand(40, 100, seed=1).requires_grad_(), rand(40, 100, seed=2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = distill.divergence(student, teacher, kind="total_variation")
    fresh = [x for x in kept if x.untyped_storage().data_ptr() != student.untyped_storage().data_ptr()]
    assert sum(x.numel() for x in fresh if x.dtype.is_floating_point) < student.numel()
    double = student.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(loss.sum(), student)
    (wanted,) = torch.autograd.grad(by_hand("total_variation", double, teacher).sum(), double)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)
    assert distill.divergence(student[:0], teacher[:0], kind="total_variation").shape == (0,)


# --- self-distillation through time ------------------------------------------------------------------------


def network(table: Tensor, calls: list[float] | None = None) -> distill.Network:
    """Logits that depend on the whole sequence and on the level; (B, L, V + 1), the mask's column large."""

    def forward(z: Tensor, alpha: float | Tensor) -> Tensor:
        if calls is not None:
            calls.append(float(alpha))
        context = table[z].mean(-2, keepdim=True) * (1 + alpha)
        return torch.cat([table[z] + context, torch.full((*z.shape, 1), 5.0)], -1)

    return forward


def test_one_step_is_the_teacher_on_masked_rows() -> None:
    """m = 1: the divergence from the teacher's one forward pass wherever z is masked."""
    teacher, student = (network(rand(V + 1, V, seed=i)) for i in (1, 2))
    z = torch.tensor([[MASK, 0, MASK, 2], [1, MASK, MASK, MASK]])
    for kind in KINDS:
        targets = distill.rollout(teacher, z, [0.2, 0.5], MASK, key=dlcore.rng.key(1))
        loss = distill.self_distillation_loss(student(z, 0.2), targets, kind=kind, exclude=MASK)
        wanted = by_hand(kind, cast(Tensor, student(z, 0.2))[..., :V], cast(Tensor, teacher(z, 0.2))[..., :V])
        torch.testing.assert_close(loss.double(), torch.where(z == MASK, wanted, 0), rtol=1e-5, atol=1e-6)


def test_rollout_is_the_teachers_trajectory() -> None:
    """Each masked row once, with the logits of the step that unmasked it."""
    calls: list[float] = []
    table, key = rand(V + 1, V, seed=3), dlcore.rng.key(2)
    z = masked.corrupt(torch.randint(V, (8, 20)), 0.3, MASK, key=dlcore.rng.key(3))
    levels = [0.3, 0.45, 0.7, 0.8]
    targets = list(distill.rollout(network(table, calls), z, levels, MASK, key=key))
    assert calls == levels[:-1]
    assert (
        torch.cat([t.rows for t in targets]).sort().values.equal((z == MASK).flatten().nonzero().squeeze(-1))
    )
    state = z
    for i, target in enumerate(targets):
        logits = cast(Tensor, network(table)(state, levels[i]))
        after = masked.step(logits, state, levels[i], levels[i + 1], MASK, key=dlcore.rng.fold_in(key, i))
        done = (state == MASK) & ((after != MASK) | (i == 2))
        assert target.rows.equal(done.flatten().nonzero().squeeze(-1))
        assert cast(Tensor, target.logits).equal(logits[done])
        assert len(target.rows) > 0
        state = after
    # Steps are taken when they are asked for.
    calls.clear()
    steps = distill.rollout(network(table, calls), z, levels, MASK, key=key)
    assert calls == []
    next(steps)
    assert calls == [0.3]


def test_loss_of_linear_heads_and_gradients() -> None:
    """LinearLogits end to end, as dense logits and their autograd have it."""
    z = torch.where(torch.arange(12).view(2, 6) % 3 == 0, 1, MASK)
    weight, hidden = rand(V + 1, 8, seed=4), rand(V + 1, 8, seed=5)
    student_hidden, student_weight = (
        rand(2, 6, 8, seed=6).requires_grad_(),
        rand(V + 1, 8, seed=7).requires_grad_(),
    )

    def teacher(z: Tensor, alpha: float | Tensor) -> LinearLogits:
        return LinearLogits(hidden[z] + hidden[z].mean(1, keepdim=True), weight)

    targets = list(distill.rollout(teacher, z, [0.4, 0.6, 0.9], MASK, key=dlcore.rng.key(4)))
    assert all(isinstance(t.logits, LinearLogits) for t in targets)
    student = LinearLogits(student_hidden, student_weight)
    for kind in KINDS:
        loss = distill.self_distillation_loss(student, targets, kind=kind, exclude=MASK)
        dense = [distill.Target(t.rows, cast(LinearLogits, t.logits).materialize()) for t in targets]
        plain = distill.self_distillation_loss(
            student_hidden @ student_weight.T, dense, kind=kind, exclude=MASK
        )
        torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-5)
        for pair in zip(
            *(torch.autograd.grad(x.sum(), (student_hidden, student_weight)) for x in (loss, plain)),
            strict=True,
        ):
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="self_distillation_loss: targets must hold at least one Target"):
        distill.self_distillation_loss(student, [])


def test_step_size() -> None:
    assert [distill.step_size(s) for s in (0, 10_000, 90_000, 10**9)] == [1 / 512, 1 / 256, 1.0, 1.0]
    assert distill.step_size(25, first=0.01, interval=10, factor=3) == pytest.approx(0.09)


# --- inverse distillation ----------------------------------------------------------------------------------

ALPHA, DALPHA = 0.4, -1.3
#: A law without zeros: the masked loss is infinite where a student says what its teacher never does.
TRUTH = (JOINT + 0.01) / (JOINT + 0.01).sum()


def perturbed(seed: int) -> Tensor:
    law = JOINT * (0.5 * rand(V, V, seed=seed, dtype=torch.float64)).exp() + 0.01
    return law / law.sum()


def noisy_posterior(joint: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """p(o_1, o_2) and q(x_l | o) of each l, (S, S, 2, V), of a law of two tokens."""
    whole = torch.einsum("ab,ai,bj->abij", joint, kernel, kernel)
    mass = whole.sum((0, 1))
    first, second = whole.sum(1).permute(1, 2, 0), whole.sum(0).permute(1, 2, 0)
    return mass, torch.stack([first, second], 2) / mass[..., None, None]


def leave_one_out(joint: Tensor, kernel: Tensor) -> Tensor:
    first = torch.einsum("ab,bj->ja", joint, kernel).unsqueeze(0).expand(V, V, V)
    second = torch.einsum("ab,ai->ib", joint, kernel).unsqueeze(1).expand(V, V, V)
    loo = torch.stack([first, second], 2)
    return loo / loo.sum(-1, keepdim=True)


def with_mask(p: Tensor) -> Tensor:
    return torch.cat([p.log(), torch.full_like(p[..., :1], 3.0)], -1)


def grid(size: int) -> Tensor:
    return torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"), -1)


def points(vocab: int) -> Tensor:
    """Logits of the point masses, (vocab, vocab)."""
    return torch.eye(vocab, dtype=torch.float64).log()


@pytest.mark.parametrize("process", ["masked", "uniform"])
def test_inverse_loss_is_a_divergence_of_laws(process: str) -> None:
    """E over the student's samples and their noise is what f̂'s optimality makes of it: >= 0, and 0 at p*."""
    kernel = mask_kernel(ALPHA) if process == "masked" else uniform_kernel(ALPHA)
    z = grid(kernel.shape[1])
    nothing = torch.zeros(())

    def optimum(joint: Tensor) -> Tensor:
        if process == "masked":
            return with_mask(noisy_posterior(joint, kernel)[1])
        return leave_one_out(joint, kernel).log()

    def expected(student: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
        """The loss of hard tokens x ~ student, z ~ q(z|x), by enumeration."""
        total = nothing.double()
        for x in grid(V).view(-1, 2):
            clean = points(V)[x]
            arguments = (teacher, fake, z)
            if process == "masked":
                clean = torch.cat([clean, torch.full((2, 1), -torch.inf, dtype=torch.float64)], -1)
                loss = distill.masked_inverse_loss(clean.expand_as(teacher), *arguments, ALPHA, DALPHA, MASK)
            else:
                loss = distill.uniform_inverse_loss(clean.expand_as(teacher), *arguments, ALPHA, DALPHA)
            mass = student[x[0], x[1]] * kernel[x[0]].unsqueeze(1) * kernel[x[1]]
            total = total + (mass.unsqueeze(-1) * loss).sum()
        return total

    teacher = optimum(TRUTH)
    for seed in range(3):
        student = perturbed(seed)
        best = optimum(student)
        at_best = float(expected(student, teacher, best))
        assert at_best > 1e-3
        # The fake's minimum makes the difference largest.
        assert float(expected(student, teacher, optimum(perturbed(seed + 10)))) < at_best
    assert float(expected(TRUTH, teacher, teacher)) == pytest.approx(0, abs=1e-12)


def test_masked_inverse_loss_is_the_kl_of_posteriors() -> None:
    """Soft x̂ = f̂, the student's own posterior: -α'/(1-α)·KL(f̂‖f*) at masked rows."""
    z, kernel = grid(V + 1), mask_kernel(ALPHA)
    fake, teacher = (noisy_posterior(j, kernel)[1] for j in (perturbed(1), TRUTH))
    loss = distill.masked_inverse_loss(
        with_mask(fake), with_mask(teacher), with_mask(fake), z, ALPHA, DALPHA, MASK
    )
    wanted = -DALPHA / (1 - ALPHA) * (fake * (fake / teacher).log()).sum(-1)
    torch.testing.assert_close(loss, torch.where(z == MASK, wanted, 0))


@pytest.mark.parametrize("process", ["masked", "uniform"])
def test_gradient_vanishes_at_the_teacher(process: str) -> None:
    """p_θ = p* and f̂ optimal: then f̂ = f*, and the student does not move; elsewhere it does."""
    kernel = mask_kernel(ALPHA) if process == "masked" else uniform_kernel(ALPHA)
    z = grid(kernel.shape[1])

    def optimum(joint: Tensor) -> Tensor:
        if process == "masked":
            return with_mask(noisy_posterior(joint, kernel)[1])
        return leave_one_out(joint, kernel).log()

    teacher = optimum(perturbed(20))
    for student, moves in ((perturbed(20), False), (perturbed(21), True)):
        logits = optimum(student).requires_grad_()
        fake = optimum(student)
        if process == "masked":
            loss = distill.masked_inverse_loss(logits, teacher, fake, z, ALPHA, DALPHA, MASK)
        else:
            loss = distill.uniform_inverse_loss(logits, teacher, fake, z, ALPHA, DALPHA)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert (float(gradient.abs().max()) > 1e-3) == moves
        assert moves or float(gradient.abs().max()) < 1e-12
        assert moves or float(loss.detach().abs().max()) < 1e-12


def test_fake_follows_the_student() -> None:
    """The fake's losses: 0 and flat at x̂, and the NELBO of a token where x̂ is a point."""
    x = torch.tensor([2, 0, 1, 1])
    z = torch.tensor([MASK, MASK, MASK, 1])
    fake = with_mask(rand(4, V, seed=8, dtype=torch.float64).softmax(-1)).requires_grad_()
    sure = with_mask(torch.eye(V, dtype=torch.float64)[x])
    loss = distill.masked_fake_loss(fake, sure, z, ALPHA, DALPHA, MASK)
    torch.testing.assert_close(loss, masked.nelbo(fake, z, x, ALPHA, DALPHA, MASK))
    z = torch.tensor([0, 0, 1, 2])
    fake = rand(4, V, seed=9, dtype=torch.float64).requires_grad_()
    for alpha in (1e-4, ALPHA, 1 - 1e-9):
        loss = distill.uniform_fake_loss(fake, points(V)[x], z, alpha, DALPHA)
        torch.testing.assert_close(loss, uniform.nelbo(fake, z, x, alpha, DALPHA), rtol=1e-6, atol=1e-9)
    student = rand(4, V, seed=10, dtype=torch.float64).requires_grad_()
    for loss_of in (
        lambda f: distill.masked_fake_loss(f, student, torch.full((4,), 1), ALPHA, DALPHA, 1),
        lambda f: distill.uniform_fake_loss(f, student, z, ALPHA, DALPHA),
    ):
        assert bool((loss_of(fake) > 0).all())
        same = student.detach().clone().requires_grad_()
        loss = loss_of(same).sum()
        assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
        assert float(torch.autograd.grad(loss, same)[0].abs().max()) < 1e-12
        assert torch.autograd.grad(loss_of(fake).sum(), student, allow_unused=True) == (None,)


def dense_generator_kl(student: Tensor, model: Tensor, z: Tensor, alpha: float) -> Tensor:
    """The Rao-Blackwellised NELBO of Duo with a soft token, term by term as it is written."""
    v = student.shape[-1]
    x, f = (v * alpha * logits.softmax(-1) + 1 - alpha for logits in (student, model))
    x_z, f_z = x.gather(-1, z.unsqueeze(-1)), f.gather(-1, z.unsqueeze(-1))
    inner = v / x_z - v / f_z - (x / x_z * (f_z * x / (f * x_z)).log()).sum(-1, keepdim=True)
    return (DALPHA / (v * alpha) * inner).squeeze(-1)


def test_uniform_losses_are_the_dense_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "GRADIENT_CHUNK", 40)
    student, teacher, fake = (
        rand(3, 5, 11, seed=20 + i, dtype=torch.float64).requires_grad_() for i in range(3)
    )
    z = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(23))
    got = distill.uniform_inverse_loss(student, teacher, fake, z, ALPHA, DALPHA)
    wanted = dense_generator_kl(student, teacher, z, ALPHA) - dense_generator_kl(student, fake, z, ALPHA)
    torch.testing.assert_close(got, wanted)
    leaves = (student, teacher, fake)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves)
    )
    single = distill.uniform_inverse_loss(*(x.detach().float() for x in leaves), z, ALPHA, DALPHA)
    torch.testing.assert_close(single.double(), wanted.detach(), rtol=1e-4, atol=1e-4)


def test_fake_and_student_alternate_to_the_teachers_law() -> None:
    """One token: the student's law, trained by the alternation alone, becomes the teacher's."""
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    student = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    fake = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    z = torch.tensor(MASK)

    def full(logits: Tensor) -> Tensor:
        return torch.cat([logits, logits.new_zeros(1)])

    for _ in range(300):
        for _ in range(3):
            (g,) = torch.autograd.grad(
                distill.masked_fake_loss(full(fake), full(student), z, 0.5, -1.0, MASK), fake
            )
            fake = (fake - 0.5 * g).detach().requires_grad_()
        loss = distill.masked_inverse_loss(full(student), full(p.log()), full(fake), z, 0.5, -1.0, MASK)
        (g,) = torch.autograd.grad(loss, student)
        student = (student - 0.1 * g).detach().requires_grad_()
    torch.testing.assert_close(student.softmax(-1).detach(), p, rtol=1e-3, atol=1e-3)


def test_gaussian_relaxation() -> None:
    vocab, n = 4, 60_000
    sure = torch.full((vocab,), -40.0)
    sure[1] = 40
    z, soft = distill.gaussian_relaxation(sure.expand(n, vocab), -0.5, 0.7, key=dlcore.rng.key(5))
    from dlcore.process import duo

    alpha = float(duo.transform(-0.5, vocab)[0])
    wanted = alpha + (1 - alpha) / vocab
    assert abs(float((z == 1).double().mean()) - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / n)
    assert z.equal(soft.argmax(-1))
    student = rand(2, 3, vocab, seed=30, dtype=torch.float64).requires_grad_()
    key = dlcore.rng.key(6)
    assert torch.autograd.gradcheck(
        lambda s: distill.gaussian_relaxation(s, 0.3, torch.tensor([[0.5], [2.0]]), key=key)[1], (student,)
    )


def test_losses_compile() -> None:
    def losses(s: Tensor, t: Tensor, f: Tensor, z: Tensor, alpha: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        return (
            *(distill.divergence(s, t, kind=kind, exclude=2) for kind in KINDS),
            distill.masked_inverse_loss(s, t, f, z, alpha, -1.0, 5),
            distill.masked_fake_loss(f, s, z, alpha, -1.0, 5),
            distill.uniform_inverse_loss(s, t, f, z, alpha, -1.0),
            distill.uniform_fake_loss(f, s, z, alpha, -1.0),
            *distill.gaussian_relaxation(s, alpha, 0.5, key=key),
        )

    logits = [rand(2, 4, 6, seed=40 + i) for i in range(3)]
    z = torch.arange(8).view(2, 4) % 6
    check_compiled(
        losses, [(*logits, z, torch.tensor(a), dlcore.rng.key(i)) for i, a in enumerate((0.2, 0.5, 0.9))]
    )


P, Z = torch.zeros(2, 4), torch.tensor([0, 1])
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: distill.divergence(P, P[:1]),
        ValueError,
        r"teacher must have the shape of student \(2, 4\), got \(1, 4\)",
    ),
    (
        lambda: distill.divergence(P, P.double()),
        TypeError,
        "teacher must have the dtype of student torch.float32",
    ),
    (lambda: distill.divergence(P, P, kind="mse"), ValueError, "kind must be one of 'forward', 'reverse'"),
    (lambda: distill.divergence(P, P, exclude=4), ValueError, r"exclude must lie in \[0, 4\), got 4"),
    (lambda: distill.divergence(P[:, :1], P[:, :1], exclude=0), ValueError, "exclude leaves no token"),
    (
        lambda: distill.rollout(lambda z, a: P, Z, [0.5], 3),
        ValueError,
        "alphas must be at least 2 levels, got 1",
    ),
    (lambda: distill.rollout(lambda z, a: P, Z.int(), [0, 1], 3), TypeError, "rollout: z must be an int64"),
    (lambda: list(distill.rollout(lambda z, a: P, Z, [0.5, 0.2], 3)), ValueError, "alpha_s must be at least"),
    (
        lambda: distill.masked_inverse_loss(P, P, P, Z, 1.0, -1.0, 3),
        ValueError,
        r"alpha must lie in \[0, 1\), got 1",
    ),
    (lambda: distill.masked_inverse_loss(P, P, P, Z, 0.5, 1.0, 3), ValueError, "dalpha must lie in"),
    (
        lambda: distill.masked_fake_loss(P, P, Z, 0.5, -1.0, 4),
        ValueError,
        r"mask_id must lie in \[0, 4\), got 4",
    ),
    (lambda: distill.masked_fake_loss(P, P, Z[:1], 0.5, -1.0, 3), ValueError, r"z must have shape \(2,\)"),
    (lambda: distill.uniform_inverse_loss(P, P, P, Z, 0.0, -1.0), ValueError, r"alpha must lie in \(0, 1\)"),
    (lambda: distill.uniform_fake_loss(P, P, Z + 3, 0.5, -1.0), ValueError, r"z must lie in \[0, 4\), got 4"),
    (lambda: distill.gaussian_relaxation(P, 0.0, 0.0), ValueError, r"tau must lie in \(0, inf\)"),
    (lambda: distill.step_size(0, interval=0), ValueError, "interval 1, got 0 and 0"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
