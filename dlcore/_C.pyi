"""The compiled kernels. Tensors are addresses, or views (address, dtype, shape, stride)."""

View = tuple[int, int, tuple[int, ...], tuple[int, ...]]
Row = tuple[int, int] | None
Key = tuple[int, bool] | None
Softmax = tuple[Row, Row, Row, float | None, int | None]
Mixture = tuple[int, int, Row, int, int | None, Row, Key]

SUMMARY_BYTES: int
KL_SUMMARY_BYTES: int
SELECTION_BYTES: int
CUT_BYTES: int
BINS_BYTES: int
LEVELS: int

def capability() -> str: ...
def choose_capability(name: str) -> bool: ...
def parallel_runtime() -> str: ...
def read(data: int, count: int, threads: int) -> float: ...

# attention
#: q, k, v, out, lse, (page table, pages) or None, scale, softcap.
Attention = tuple[View, View, View, View, int, tuple[int, int] | None, float, float]
#: starts, stops, shared.
Bounds = tuple[int, int, bool]

def attention(parameters: Attention, bounds: Bounds, threads: int) -> None: ...
def attention_decode(
    parameters: Attention,
    new_k: View,
    new_v: View,
    lengths: int,
    num_commit: int,
    causal: tuple[int, bool] | None,
    window: int,
    window_by_row: bool,
    threads: int,
) -> None: ...
def attention_backward(
    parameters: Attention,
    bounds: Bounds,
    grad_out: View,
    grad_lse: int,
    grads: tuple[View, View, View],
    threads: int,
) -> None: ...

# bits
#: address, distance between parameters, strides of rows and of columns.
BitParameters = tuple[int, int, int, int]
#: low, high, clip.
BitCoding = tuple[float, float, float]
#: (residual, x, bits), slope, coding, squared.
BitLoss = tuple[tuple[View, View, View], BitParameters, BitCoding, bool]

def bit_spans(columns: int) -> int: ...
def bit_logits(
    x: View,
    residual: View | None,
    slope: BitParameters,
    coding: BitCoding,
    sigmoid: bool,
    out: int,
    threads: int,
) -> None: ...
def bit_step(
    x: View,
    residual: View | None,
    coefficients: BitParameters,
    coding: BitCoding,
    key: Key,
    next: int,
    probs: int,
    threads: int,
) -> None: ...
def bit_perturb(x: View, spread: BitParameters, key: Key, out: int, threads: int) -> None: ...
def bit_loss(loss: BitLoss, sums: int, threads: int) -> None: ...
def bit_loss_backward(
    loss: BitLoss, grad: int, residual_grad: View, x_grad: View | None, threads: int
) -> None: ...
def bit_encode(
    tokens: int,
    count: int,
    width: int,
    msb: bool,
    gray: bool,
    values: tuple[float, float],
    out: int,
    threads: int,
) -> None: ...
def bit_decode(
    x: View, msb: bool, gray: bool, threshold: float, vocab: int, tokens: int, threads: int
) -> None: ...

# rng
def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]: ...
def gumbel_of_bits(high: list[int], low: list[int]) -> list[float]: ...
def fill_noise(
    noise: int, keys: int, key_count: int, count: int, wide: bool, out: int, threads: int
) -> None: ...
def fill_normal(keys: int, key_count: int, count: int, wide: bool, out: int, threads: int) -> None: ...
def fold_in(keys: int, key_stride: int, data: int, data_stride: int, count: int, out: int) -> None: ...

# categorical
def scan(
    logits: View,
    first_token: int,
    start: bool,
    softmax: Softmax,
    target: Row,
    key: Key,
    skip: int,
    cuts: int,
    state: int,
    threads: int,
) -> None: ...
def finish_stats(state: int, rows: int, argmax: int, numbers: int) -> None: ...
def finish_sample(state: int, drawn: int, rows: int, tokens: int, numbers: int) -> None: ...
def finish_summary(state: int, rows: int, tokens: int, numbers: int) -> None: ...
def plan_mixture(mixture: Mixture, rows: int, skip: int) -> None: ...
def finish_mixture(mixture: Mixture, rows: int, state: int, skip: int, tokens: int) -> None: ...
def start_selections(state: int, rows: int, top_k: Row, top_p: Row, within: int, selections: int) -> None: ...
def histogram(
    logits: View,
    first_token: int,
    vocab: int,
    softmax: Softmax,
    state: int,
    selections: int,
    level: int,
    bins: int,
    threads: int,
) -> None: ...
def narrow(bins: int, rows: int, level: int, selections: int) -> None: ...
def finish_selections(
    state: int, rows: int, min_p: Row, temperature: Row, selections: int, cuts: int
) -> None: ...
def finish_logsumexp(state: int, rows: int, nothing: float, logsumexp: int) -> None: ...
def follow_largest(state: int, rows: int, start: bool, references: int, factor: int) -> bool: ...
def matmul(
    a: View, b: View, bias: int, out: View, add: bool, softcap: float | None, threads: int
) -> None: ...
def softmax_tile(
    logits: View, first_token: int, softmax: Softmax, logsumexp: int, out: View, threads: int
) -> None: ...
def finish_log_probs(state: int, target: Row, with_index: bool, rows: int, numbers: int) -> None: ...
def log_probs_backward(
    logits: View,
    first_token: int,
    softmax: Softmax,
    target: Row,
    grad: int,
    numbers: int,
    out: View,
    threads: int,
) -> None: ...
def clear_kl(state: int, rows: int) -> None: ...
def kl(p: View, q: View, temperature: Row, state: int, threads: int) -> None: ...
def finish_kl(state: int, rows: int, numbers: int) -> None: ...
def kl_backward(
    p: View, q: View, temperature: Row, grad: int, numbers: int, p_out: View, q_out: View, threads: int
) -> None: ...

# similarity
def row_cosine(
    fresh: View,
    cached: View,
    cached_rows: int,
    positions: int,
    pages: tuple[int, int] | None,
    out: int,
    threads: int,
) -> None: ...

# guidance
def guided_step(
    cond: View,
    uncond: View,
    z: int,
    coefficients: tuple[int, int],
    exclude: int | None,
    key: tuple[int, bool],
    tokens: int,
    threads: int,
) -> None: ...

# sphere
def sphere_map(
    map: int,
    inputs: list[View],
    t: Row,
    grad: View | None,
    grad_angle: int,
    outputs: list[View | None],
    number: int,
    threads: int,
) -> None: ...
def sphere_sample(mean: View, kappa: Row, key: Key, reject: bool, out: View, threads: int) -> None: ...

# sphere_dynamics
def sphere_correct(x: View, score: View, step_size: Row, key: Key, out: View, threads: int) -> None: ...

# sphere_velocity
#: (rows of parameters, their stride), how many terms; or None: SLERP's weight.
Radial = tuple[tuple[int, int], int] | None

def sphere_weights(logits: View, reference: int, radial: Radial, cosines: int, threads: int) -> None: ...
def sphere_velocity_backward(
    logits: View,
    logsumexp: int,
    mean: int,
    radial: Radial,
    cosines: int,
    pulls: int,
    out: View,
    threads: int,
) -> None: ...
def largest(logits: View, first_token: int, count: int, values: int, ids: int, threads: int) -> None: ...

# uniform
def start_nelbo(state: int, rows: int, saved: int) -> None: ...
def nelbo(
    logits: View,
    first_token: int,
    vocab: int,
    softmax: Softmax,
    alpha: Row,
    target: Row,
    saved: int,
    threads: int,
) -> None: ...
def finish_nelbo(
    saved: int, rows: int, vocab: int, z: int, x: int, alpha: Row, dalpha: Row, loss: int
) -> None: ...
def nelbo_backward(
    logits: View,
    first_token: int,
    vocab: int,
    softmax: Softmax,
    z: int,
    x: int,
    alpha: Row,
    dalpha: Row,
    grad: int,
    saved: int,
    out: View,
    threads: int,
) -> None: ...
