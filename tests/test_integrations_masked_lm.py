"""transformers.unmask against a plain loop over full logits, on tiny random models."""

from __future__ import annotations

import pytest
import torch
from goodness import chi_square
from torch import Tensor, nn

import dlcore
from dlcore.process.unmask import select

pytest.importorskip("transformers", minversion="5.13")

import transformers

from dlcore.integrations.transformers import masked_lm, unmask

VOCAB, LENGTH, MASK, PAD = 23, 12, 22, 0
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": PAD,
}


def bert():
    """Its head has a bias."""
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def modernbert():
    """Its positions are relative."""
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    config = transformers.ModernBertConfig(
        **SIZES, **dict.fromkeys(names, 1), local_attention=8, decoder_bias=False
    )
    return transformers.ModernBertForMaskedLM(config)


MODELS = [bert, modernbert]


def build(maker) -> nn.Module:
    torch.manual_seed(0)
    model = maker().eval()
    bias = model.get_output_embeddings().bias
    if bias is not None:
        bias.data = torch.linspace(-1, 1, VOCAB)
    return model


def text(masked: tuple[int, ...] = (7, 4, 0)) -> Tensor:
    """(B, L) tokens, the b-th sequence with so many masks in places of its own."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, MASK, (len(masked), LENGTH), generator=g)
    for row, count in zip(ids, masked, strict=True):
        row[torch.randperm(LENGTH, generator=g)[:count]] = MASK
    return ids


class Calls:
    """How many rows each call of a module got."""

    def __init__(self, module: nn.Module) -> None:
        self.rows: list[int] = []
        module.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        self.rows.append(inputs[0].shape[:-1].numel() if inputs else 0)


RULES = [
    {"steps": 1},
    {"steps": 3},
    {"steps": 50},
    {"threshold": 0.6},
    {"factor": 0.9},
    {"entropy_bound": 0.8},
]


def plainly(
    model: nn.Module, ids: Tensor, mask: Tensor | None, rule: str, value: float
) -> tuple[Tensor, int]:
    """Greedy unmasking of full logits, and how many steps it took."""
    ids, steps = ids.clone(), 0
    while (ids == MASK).any():
        masked = ids == MASK
        logits = model(ids, attention_mask=mask).logits
        logits[..., MASK] = -torch.inf
        p = logits.softmax(-1)
        score = torch.special.entr(p).sum(-1) if rule == "entropy_bound" else p.amax(-1)
        if rule == "steps":
            per_sequence = [-(-int(row.sum()) // (value - steps)) for row in masked]
            accepted = select(score, masked, top_k=torch.tensor(per_sequence))
        else:
            accepted = select(score, masked, **{rule: value})
        ids = torch.where(accepted, logits.argmax(-1), ids)
        steps += 1
    return ids, steps


@pytest.mark.parametrize("maker", MODELS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", RULES)
def test_greedy_equals_a_loop_over_logits(maker, padded: bool, options: dict[str, float]) -> None:
    """Same tokens, only masked positions change, and the head runs where something is masked."""
    model, ids = build(maker), text()
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :3], mask[1, -2:] = 0, 0
        ids[mask == 0] = PAD
    ((rule, value),) = options.items()
    with torch.no_grad():
        wanted, steps = plainly(model, ids, mask, rule, value)
    before = ids.clone()
    encoder, transform, head = masked_lm._parts(model)
    encoded, transformed, headed = Calls(encoder), Calls(transform), Calls(head)
    got = unmask(model, ids, attention_mask=mask, mask_id=MASK, temperature=0.0, **options)
    assert torch.equal(got, wanted)
    assert torch.equal(ids, before)
    assert torch.equal(got[before != MASK], before[before != MASK])
    assert len(encoded.rows) == len(transformed.rows) == steps
    assert transformed.rows[0] == (before == MASK).sum()
    assert sorted(transformed.rows, reverse=True) == transformed.rows
    assert headed.rows == []
    assert 1 < steps < 8 or rule == "steps"


@pytest.mark.parametrize(("steps", "calls"), [(1, [10]), (4, [10, 7, 4, 2]), (10, [*range(10, 0, -1)])])
def test_steps_are_so_many_encoder_calls(steps: int, calls: list[int]) -> None:
    """10 positions in 4 steps: 3, 3, 2, 2; a sequence of fewer positions than steps takes one each."""
    model = build(bert)
    transformed = Calls(model.cls.predictions.transform)
    unmask(model, text((10,)), mask_id=MASK, steps=steps)
    assert transformed.rows == calls
    transformed.rows.clear()
    unmask(model, text((10, 2)), mask_id=MASK, steps=5)
    assert transformed.rows == [12, 9, 6, 4, 2]


def test_a_rule_per_sequence() -> None:
    """With a bar of 0 for one sequence and of 2 for the other, one step and as many as positions."""
    model, ids = build(bert), text((5, 5))
    transformed = Calls(model.cls.predictions.transform)
    unmask(model, ids, mask_id=MASK, threshold=torch.tensor([0.0, 2.0]))
    assert transformed.rows == [10, 4, 3, 2, 1]
    heat = torch.tensor([0.0, 1e6])
    draws = torch.stack([unmask(model, ids, mask_id=MASK, steps=2, temperature=heat) for _ in range(8)])
    assert (draws[:, 0] == draws[0, 0]).all()
    assert draws[:, 1].unique(dim=0).shape[0] > 4


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("maker", MODELS)
def test_draws_follow_the_model(maker, temperature: float) -> None:
    """χ² of both tokens of a pair: the first by the model, the second by the model given the first."""
    model, n = build(maker), 4000
    ids = text((0,))
    ids[0, [4, 9]] = MASK
    got = unmask(
        model, ids.expand(n, -1), mask_id=MASK, steps=2, temperature=temperature, key=dlcore.rng.key(5)
    )

    def law(rows: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(rows).logits / temperature
        logits[..., MASK] = -torch.inf
        return logits.softmax(-1)

    p = law(ids)[0]
    joint = torch.zeros(VOCAB, VOCAB)
    for position, other in ((4, 9), (9, 4)):
        committed = ids.repeat(VOCAB, 1)
        committed[:, position] = torch.arange(VOCAB)
        after = law(committed)[:, other]
        # The position whose draw is the likelier one is committed, at a tie the first.
        mine, theirs = p[position].unsqueeze(1), p[other].unsqueeze(0)
        wins = (theirs < mine) | ((theirs == mine) & (position == 4))
        first = p[position] * (p[other] * wins).sum(1)
        pair = first.unsqueeze(1) * after
        joint += pair if position == 4 else pair.T
    assert abs(joint.sum() - 1) < 1e-5
    assert chi_square(got[:, 4] * VOCAB + got[:, 9], joint.flatten()) > 1e-3
    assert not (got == MASK).any()


@pytest.mark.parametrize("steps", [1, 4])
def test_noise_is_independent_over_steps_and_positions(steps: int) -> None:
    """Under a model without preferences all positions are uniform, and no two of them equal each other."""
    model = build(bert)
    model.cls.predictions.decoder.weight = nn.Parameter(torch.zeros(VOCAB, 16))
    model.cls.predictions.decoder.bias.data.zero_()
    ids = torch.full((4000, 4), MASK)
    got = unmask(model, ids, mask_id=MASK, steps=steps, key=dlcore.rng.key(6))
    uniform = torch.ones(VOCAB * VOCAB).view(VOCAB, VOCAB)
    uniform[MASK], uniform[:, MASK] = 0, 0
    for first, second in ((0, 1), (1, 2), (0, 3)):
        assert chi_square(got[:, first] * VOCAB + got[:, second], uniform.flatten()) > 1e-3
    assert chi_square(got[:-1, 0] * VOCAB + got[1:, 0], uniform.flatten()) > 1e-3


def test_keys_and_seeds() -> None:
    model, ids = build(bert), text((9, 9))
    options = {"mask_id": MASK, "steps": 3, "temperature": 3.0}
    key = dlcore.rng.key(3)
    drawn = unmask(model, ids, key=key, **options)
    assert torch.equal(drawn, unmask(model, ids, key=key, **options))
    assert not torch.equal(drawn, unmask(model, ids, key=dlcore.rng.key(4), **options))
    seeded = []
    for seed in (8, 8, 9):
        torch.manual_seed(seed)
        seeded.append(unmask(model, ids, **options))
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    generated = [
        unmask(model, ids, generator=torch.Generator().manual_seed(seed), **options) for seed in (8, 8, 9)
    ]
    assert torch.equal(generated[0], generated[1])
    assert not torch.equal(generated[0], generated[2])


def test_a_key_per_sequence_makes_batches_irrelevant() -> None:
    model, ids = build(bert), text((9, 4, 6))
    keys = dlcore.rng.split(dlcore.rng.key(3), 3)
    options = {"mask_id": MASK, "steps": 3, "temperature": 3.0}
    whole = unmask(model, ids, key=keys, **options)
    assert torch.equal(whole, unmask(model, ids, key=dlcore.rng.key(3), **options))
    for b in range(3):
        assert torch.equal(unmask(model, ids[b : b + 1], key=keys[b : b + 1], **options), whole[b : b + 1])


def test_a_padded_batch_equals_its_sequences() -> None:
    """ModernBERT's positions are relative: padding on the left changes nothing."""
    model, ids = build(modernbert), text((5, 6))
    padded = torch.cat([torch.full((2, 3), PAD), ids], 1)
    padded[1, :3] = text((0,))[0, :3]
    mask = (padded != PAD).long()
    options = {"mask_id": MASK, "threshold": 0.6, "temperature": 0.0}
    got = unmask(model, padded, attention_mask=mask, **options)
    assert torch.equal(got[0, 3:], unmask(model, ids[:1], **options)[0])
    assert torch.equal(got[1], unmask(model, padded[1:], **options)[0])
    assert torch.equal(got[0, :3], padded[0, :3])


@pytest.mark.parametrize("shape", [(2, LENGTH), (0, LENGTH), (2, 0)])
def test_nothing_masked(shape: tuple[int, int]) -> None:
    """A copy, without a call of the model."""
    model, ids = build(bert), torch.ones(shape, dtype=torch.int64)
    encoded = Calls(model.bert)
    got = unmask(model, ids, mask_id=MASK, steps=2)
    assert torch.equal(got, ids)
    assert got.data_ptr() != ids.data_ptr() or not ids.numel()
    assert encoded.rows == []


def test_the_model_is_left_as_it_is() -> None:
    """Gradients are off within, the mode is the caller's, and so is the attention."""
    model = build(bert).train()
    seen = []
    model.bert.register_forward_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
    model.set_attn_implementation("dlcore")
    assert not unmask(model, text(), mask_id=MASK, steps=1).requires_grad
    assert seen == [(True, False)]
    assert model.training
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_and_autocast() -> None:
    model, ids = build(bert), text()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not (unmask(model, ids, mask_id=MASK, steps=2) == MASK).any()
    assert not (unmask(model.bfloat16(), ids, mask_id=MASK, threshold=0.5) == MASK).any()


def test_logits_never_exist() -> None:
    """No tensor of a step is of the vocabulary's size, but for the weights."""
    config = transformers.BertConfig(**{**SIZES, "vocab_size": 50_021})
    model, largest = transformers.BertForMaskedLM(config).eval(), 0
    weights = {p.data_ptr() for p in model.parameters()}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, Tensor) and x.data_ptr() not in weights:
                    largest = max(largest, x.numel())
            return out

    with Watch():
        unmask(model, torch.full((2, LENGTH), MASK), mask_id=MASK, steps=2)
    assert largest < 50_021


I = text()  # noqa: E741
BAD = [
    ({"model": "bert"}, TypeError, "model must be a BertForMaskedLM or ModernBertForMaskedLM, got str"),
    ({"model": nn.Linear(2, 2)}, TypeError, "model must be a .*, got Linear"),
    ({"input_ids": I.int()}, TypeError, r"input_ids must be an int64 Tensor, got int32 \(3, 12\)"),
    ({"input_ids": [1]}, TypeError, r"input_ids must be an int64 Tensor, got list \[1\]"),
    ({"input_ids": I[0]}, ValueError, r"input_ids must be \(B, L\), got \(12,\)"),
    ({"input_ids": I + 1}, ValueError, r"input_ids must lie in \[0, 23\), got 23"),
    ({"input_ids": I.to("meta")}, ValueError, "input_ids must be on cpu, got meta"),
    ({"attention_mask": [1]}, TypeError, "attention_mask must be a Tensor"),
    ({"attention_mask": I[:2]}, ValueError, r"attention_mask must have shape \(3, 12\), got \(2, 12\)"),
    ({"attention_mask": I.to("meta")}, ValueError, "attention_mask must be on cpu, got meta"),
    ({"mask_id": VOCAB}, ValueError, r"mask_id must lie in \[0, 23\), got 23"),
    ({"mask_id": -1}, ValueError, r"mask_id must lie in \[0, 23\), got -1"),
    ({"mask_id": None}, TypeError, "mask_id must be an int, got NoneType None"),
    ({"steps": None}, ValueError, "give exactly one of steps, threshold, factor, entropy_bound, got none"),
    ({"threshold": 0.5}, ValueError, "give exactly one of .*, got steps, threshold"),
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"steps": 2.0}, TypeError, "steps must be an int, got float 2.0"),
    ({"steps": True}, TypeError, "steps must be an int, got bool True"),
    ({"steps": None, "factor": -1.0}, ValueError, r"factor must lie in \[0, inf\], got -1"),
    ({"steps": None, "entropy_bound": -1.0}, ValueError, r"entropy_bound must lie in \[0, inf\], got -1"),
    ({"steps": None, "threshold": torch.nan}, ValueError, "threshold must lie in"),
    ({"steps": None, "threshold": "a"}, TypeError, "threshold must be a number or a Tensor"),
    (
        {"steps": None, "threshold": torch.ones(2)},
        ValueError,
        r"threshold must broadcast to \(3,\), got \(2,\)",
    ),
    ({"temperature": -1.0}, ValueError, r"temperature must lie in \[0, inf\], got -1"),
    ({"temperature": None}, TypeError, "temperature must be a number or a Tensor, got None"),
    ({"temperature": torch.ones(3, 12)}, ValueError, r"temperature must broadcast to \(3,\), got \(3, 12\)"),
    ({"key": 3}, TypeError, "key must be an int64 Tensor"),
    ({"key": dlcore.rng.key(1).expand(2, 2)}, ValueError, r"key must have shape \(2,\) or \(3, 2\)"),
    (
        {"key": dlcore.rng.key(1), "generator": torch.Generator()},
        ValueError,
        "give key or generator, not both",
    ),
]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("wrong", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(wrong, error: type[Exception], message: str, masked: bool) -> None:
    """Refused also where there is nothing to do."""
    ids = I if masked else I.clamp(max=MASK - 1)
    arguments = {"model": build(bert), "input_ids": ids, "mask_id": MASK, "steps": 2, **wrong}
    with pytest.raises(error, match=f"transformers.unmask: {message}"):
        unmask(**arguments)


def test_a_head_that_is_no_linear() -> None:
    class Adapted(nn.Linear):
        pass

    model = build(bert)
    model.set_output_embeddings(Adapted(16, VOCAB))
    with pytest.raises(TypeError, match=r"transformers.unmask: model's head must be a Linear, got Adapted"):
        unmask(model, I, mask_id=MASK, steps=1)


def test_hidden_states_that_are_not_finite() -> None:
    model = build(bert)
    model.cls.predictions.transform.LayerNorm.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"transformers.unmask: the model's hidden states are not finite"):
        unmask(model, I, mask_id=MASK, steps=1)
