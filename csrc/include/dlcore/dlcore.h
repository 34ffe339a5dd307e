/*
 * dlcore: the compute core of diffusion language models, for C, C++ and whatever calls C.
 *
 * Draw a token per row of logits, the same ones as Python's dlcore.categorical.sample:
 *
 *     float logits[2 * 1000];
 *     int64_t tokens[2];
 *     dlcore_key key = {7, 0};
 *     float temperature = 0.8f;
 *
 *     dlcore_categorical softmax = {0};
 *     softmax.logits.values = (dlcore_matrix){.data = logits, .rows = 2, .columns = 1000};
 *     softmax.temperature.data = &temperature;
 *     dlcore_sampling how = {0};
 *     how.keys.data = &key;
 *     if (dlcore_categorical_sample(&softmax, &how, tokens, NULL, NULL) != DLCORE_OK)
 *       fprintf(stderr, "%s\n", dlcore_last_error());
 *
 * Conventions
 *
 * Sizes are int64_t, strides count elements. Structs are meant to be zeroed first: 0 and NULL are the
 * defaults that each member names. A comment such as "(rows, columns)" gives an array's shape; results lie
 * row by row without gaps, and overlap no argument. Logs are natural. "May be NULL" is said where it holds;
 * arrays of no rows may always be.
 *
 * Every function returns DLCORE_OK or what went wrong, with nothing computed then; dlcore_last_error() says
 * more. Nothing is thrown. What a kernel would index with (token ids, cache lengths, key intervals) is
 * checked by value, so that accepted arguments are never read out of bounds. A row of logits with NaN, +inf
 * or nothing but -inf is no error: it gives token -1 and NaN. Functions may be called from several threads at
 * once.
 *
 * `threads` is how many to use, 0: as many as the machine has. They are those of the OpenMP runtime that the
 * process has loaded when the first function runs, else fresh ones for each call; small calls use one alone.
 * Results do not depend on it.
 *
 * CPU code is chosen when the first function runs: the best of avx512, avx2 and baseline that was built and
 * runs here, or what the variable DLCORE_CPU_CAPABILITY names.
 *
 * Building
 *
 *     cmake -S . -B build -DDLCORE_PYTHON=OFF && cmake --build build && cmake --install build --prefix P
 *
 * and, in an application's CMakeLists.txt with P in its CMAKE_PREFIX_PATH,
 *
 *     find_package(dlcore REQUIRED)
 *     target_link_libraries(app dlcore::dlcore)
 *
 * -DDLCORE_ISA_LEVELS="baseline;avx2" builds those levels alone, -DDLCORE_CUDA=OFF no dlcore::cuda.
 */
#ifndef DLCORE_DLCORE_H
#define DLCORE_DLCORE_H

#include <stdint.h>

#define DLCORE_VERSION_MAJOR 0
#define DLCORE_VERSION_MINOR 1
#define DLCORE_VERSION_PATCH 0

#if defined(__GNUC__)
#define DLCORE_API __attribute__((visibility("default")))
#else
#define DLCORE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* --- The library --- */

typedef enum dlcore_status {
  DLCORE_OK = 0,
  DLCORE_NULL_POINTER = 1,  /* an argument that is needed is NULL */
  DLCORE_INVALID_SHAPE = 2, /* sizes or strides that are negative, too large or do not fit each other */
  DLCORE_INVALID_VALUE = 3, /* a value out of range */
  DLCORE_INVALID_DTYPE = 4, /* a dtype that is unknown, not taken here, or not that of another argument */
  DLCORE_OUT_OF_MEMORY = 5,
  DLCORE_UNSUPPORTED = 6, /* a CPU capability that is not to be had, or what CUDA functions do not take */
  DLCORE_INTERNAL_ERROR = 7,
  DLCORE_CUDA_ERROR = 8 /* CUDA refused a launch */
} dlcore_status;

/* "0.1.0", as in Python's dlcore.__version__. */
DLCORE_API const char* dlcore_version(void);

/* What was wrong in the last call of this thread that failed, as "function: argument must be ..., got ...";
 * "" if none did. Valid until the next one fails. */
DLCORE_API const char* dlcore_last_error(void);

/* "avx512", "avx2" or "baseline": the code in use. */
DLCORE_API const char* dlcore_cpu_capability(void);

/* Uses it from now on; not while other functions run. DLCORE_UNSUPPORTED if it was not built or cannot run
 * here. */
DLCORE_API dlcore_status dlcore_choose_cpu_capability(const char* name);

/* --- Arguments --- */

/* A dtype is one of these in an int32_t. FLOAT64 is for noise alone. */
enum { DLCORE_FLOAT32 = 0, DLCORE_BFLOAT16 = 1, DLCORE_FLOAT16 = 2, DLCORE_FLOAT64 = 3 };

/* (rows, columns) of a dtype, each row without gaps. Tensors of more dimensions count as their rows. */
typedef struct dlcore_matrix {
  const void* data;
  int32_t dtype;
  int64_t rows, columns; /* columns: at least 1 */
  int64_t row_stride;    /* from a row to the next, at least columns; 0: columns */
} dlcore_matrix;

/* A number per row: that of row r is data[r * stride]. Stride 0: data[0] is for all rows. data NULL: the
 * default. */
typedef struct dlcore_floats {
  const float* data;
  int64_t stride;
} dlcore_floats;

typedef struct dlcore_doubles {
  const double* data;
  int64_t stride;
} dlcore_doubles;

typedef struct dlcore_ints {
  const int64_t* data;
  int64_t stride;
} dlcore_ints;

/* What noise is a function of, beside row and column. */
typedef struct dlcore_key {
  int64_t seed, offset;
} dlcore_key;

/* Stride 0: one key, from which row r draws what dlcore_rng_fold_in(key, r) would draw. Stride 1: a key per
 * row. */
typedef struct dlcore_keys {
  const dlcore_key* data;
  int64_t stride;
} dlcore_keys;

/* --- rng: noise as a function of keys (Philox4x32-10, stream v1) --- */

/* out (count): keys with data hashed into their offsets; strides of both as above, data is needed. */
DLCORE_API dlcore_status dlcore_rng_fold_in(dlcore_keys keys, dlcore_ints data, int64_t count,
                                            dlcore_key* out);

/* out (num_keys, count) of dtype DLCORE_FLOAT32 or DLCORE_FLOAT64. uniform: [0, 1). */
DLCORE_API dlcore_status dlcore_rng_uniform(const dlcore_key* keys, int64_t num_keys, int64_t count,
                                            int32_t dtype, void* out, int32_t threads);
DLCORE_API dlcore_status dlcore_rng_normal(const dlcore_key* keys, int64_t num_keys, int64_t count,
                                           int32_t dtype, void* out, int32_t threads);
DLCORE_API dlcore_status dlcore_rng_gumbel(const dlcore_key* keys, int64_t num_keys, int64_t count,
                                           int32_t dtype, void* out, int32_t threads);

/* --- categorical: one read of rows of logits --- */

/* Logits, or a language model's head whose logits values · weightᵀ + bias are never stored whole. */
typedef struct dlcore_logits {
  dlcore_matrix values; /* (rows, V) logits; with a weight, hidden states (rows, D) */
  dlcore_matrix weight; /* (V, D), or data NULL */
  const void* bias;     /* (V), or NULL; it and weight are of the dtype of values */
} dlcore_logits;

/* softmax((softcap(logits) + shift at index) / temperature), with token `exclude` at probability 0. */
typedef struct dlcore_categorical {
  dlcore_logits logits;
  const int64_t* index;      /* (rows) token ids, or NULL */
  dlcore_floats shift;       /* added to the one logit at `index`; NULL: 0 */
  dlcore_floats temperature; /* positive; in the functions that draw, 0 is the argmax; NULL: 1 */
  float softcap;             /* softcap·tanh(logit / softcap); 0: none */
  const int64_t* exclude;    /* one token id, or NULL */
  int32_t threads;
} dlcore_categorical;

/* Where the gradient of a dlcore_logits goes, without gaps, in the dtype of its values. */
typedef struct dlcore_logits_grad {
  void* values; /* (rows, V), or with a weight (rows, D) */
  void* weight; /* (V, D), and */
  void* bias;   /* (V): NULL where there is none, or where it is not wanted */
} dlcore_logits_grad;

/* The rows of `numbers`. RUNNER_UP_LOGPROB is of the second largest entry, MARGIN the difference of the two
 * largest probabilities, INDEX_LOGPROB NaN without an index, TOKEN_LOGPROB of a draw, before truncation. */
enum {
  DLCORE_LOGSUMEXP = 0,
  DLCORE_ARGMAX_LOGPROB = 1,
  DLCORE_MARGIN = 2,
  DLCORE_ENTROPY = 3,
  DLCORE_INDEX_LOGPROB = 4,
  DLCORE_RUNNER_UP_LOGPROB = 5,
  DLCORE_NUM_STATS = 6,
  DLCORE_TOKEN_LOGPROB = 6,
  DLCORE_NUM_SAMPLE_STATS = 7
};

/* argmax (rows); numbers (DLCORE_NUM_STATS, rows). */
DLCORE_API dlcore_status dlcore_categorical_stats(const dlcore_categorical* softmax, int64_t* argmax,
                                                  float* numbers);

/* Logits may be those of V tokens of a larger vocabulary, from `first` on. All ids are the whole
 * vocabulary's then, and may be elsewhere. */
typedef struct dlcore_part {
  int64_t first;         /* a multiple of 256, or all V tokens lie in one group of as many */
  const int64_t* target; /* (rows) a second token id; where it is negative the row is not read; or NULL */
  const uint8_t* skip;   /* (rows): not 0: the row is not read; or NULL */
  dlcore_keys keys;      /* data NULL: no draw */
} dlcore_part;

/* The rows of its numbers, of logits scaled by 1 / temperature: the largest, the largest other, the sum of
 * exp(logit - largest) and of exp(logit - largest)·(logit - largest), the score of the draw's group of 256
 * (logsumexp + Gumbel) and the draw's logit, those at index and at target (NaN where they are elsewhere). */
enum {
  DLCORE_SUMMARY_TOP = 0,
  DLCORE_SUMMARY_SECOND = 1,
  DLCORE_SUMMARY_SUM = 2,
  DLCORE_SUMMARY_WEIGHTED = 3,
  DLCORE_SUMMARY_SCORE = 4,
  DLCORE_SUMMARY_TOKEN_LOGIT = 5,
  DLCORE_SUMMARY_INDEX_LOGIT = 6,
  DLCORE_SUMMARY_TARGET_LOGIT = 7,
  DLCORE_NUM_SUMMARY = 8
};

/* What a part of a vocabulary says of each row, which merges with what others say: tokens (2, rows), argmax
 * and draw, and numbers (DLCORE_NUM_SUMMARY, rows). A row that is not read, or has nothing but -inf, has
 * sums of 0, largest logits and a score of -inf and tokens -1; one with NaN or +inf has a sum of NaN and
 * tokens -1, and its other numbers mean nothing. At temperature 0 the draw is the argmax, and its score the
 * largest logit; the other numbers are those of temperature 1. */
DLCORE_API dlcore_status dlcore_categorical_summary(const dlcore_categorical* softmax,
                                                    const dlcore_part* part, int64_t* tokens,
                                                    double* numbers);

/* Keep the top_k largest entries, of these the fewest that reach probability top_p, of these the ones with at
 * least min_p times the largest probability. */
typedef struct dlcore_sampling {
  dlcore_keys keys;    /* needed */
  dlcore_ints top_k;   /* at least 1; NULL: all */
  dlcore_floats top_p; /* in [0, 1]; NULL: 1 */
  dlcore_floats min_p; /* in [0, 1]; NULL: 0 */
} dlcore_sampling;

/* One exact draw per row: tokens (rows). argmax (rows) and numbers (DLCORE_NUM_SAMPLE_STATS, rows), of the
 * row before truncation, may be NULL. At temperature 0 the statistics are those of temperature 1. */
DLCORE_API dlcore_status dlcore_categorical_sample(const dlcore_categorical* softmax,
                                                   const dlcore_sampling* how, int64_t* tokens,
                                                   int64_t* argmax, float* numbers);

/* With p = softmax[z], z = index, and d0 .. p1 a row's coefficients, den = d0 + d1·p: keep z with probability
 * (k0 + k1·p)/den, take a draw with (p0 + p1·p)/den, else the prior. Rows whose outcome does not depend on
 * their logits are not read. The reverse step of masked diffusion is {1, 0, k, 0, 1 - k, 0}, k = (1 - α_s)/(1
 * - α_t), where z is the mask token (which is `exclude`), else {1, 0, 1, 0, 0, 0}. */
typedef struct dlcore_mixture {
  dlcore_keys keys;            /* needed */
  dlcore_doubles coefficients; /* needed: those of row r, d0 d1 k0 k1 p0 p1, from data[r * stride] on; stride
                                  6 or more, or 0: the same six for all rows */
  const int64_t* prior;        /* one token id; NULL: uniform over the tokens that are not excluded */
} dlcore_mixture;

/* tokens (rows); softmax->index is z, and needed. */
DLCORE_API dlcore_status dlcore_categorical_sample_mixture(const dlcore_categorical* softmax,
                                                           const dlcore_mixture* how, int64_t* tokens);

/* numbers (3, rows): log softmax[target], log softmax[index] (0 without one) and the logsumexp. The negative
 * of the first is the cross-entropy. target (rows); where it is negative the row is not read and all are 0.
 */
DLCORE_API dlcore_status dlcore_categorical_log_probs(const dlcore_categorical* softmax,
                                                      const int64_t* target, double* numbers);

/* From grad (3, rows), the gradient by `numbers`, and those. There is no temperature here. */
DLCORE_API dlcore_status dlcore_categorical_log_probs_backward(const dlcore_categorical* softmax,
                                                               const int64_t* target, const double* grad,
                                                               const double* numbers,
                                                               const dlcore_logits_grad* logits_grad);

/* numbers (3, rows): KL(softmax(p / temperature) || softmax(q / temperature)), and the two logsumexps, -inf
 * and a KL of NaN where a row has nothing but -inf. p and q have the same rows, V and dtype of their values.
 */
DLCORE_API dlcore_status dlcore_categorical_kl(const dlcore_logits* p, const dlcore_logits* q,
                                               dlcore_floats temperature, double* numbers, int32_t threads);

/* From grad (3, rows), the gradient by `numbers`, and those; the logsumexps' are not taken. */
DLCORE_API dlcore_status dlcore_categorical_kl_backward(const dlcore_logits* p, const dlcore_logits* q,
                                                        dlcore_floats temperature, const double* grad,
                                                        const double* numbers,
                                                        const dlcore_logits_grad* p_grad,
                                                        const dlcore_logits_grad* q_grad, int32_t threads);

/* mean (rows, E): the sum over tokens k of softmax_k · table[k], the soft embedding, without anything of size
 * rows · V. table (V, E) is of any dtype. logsumexp (rows), which the gradient wants, may be NULL;
 * where a row has nothing but -inf it is that, and the mean NaN. */
DLCORE_API dlcore_status dlcore_categorical_expectation(const dlcore_categorical* softmax,
                                                        const dlcore_matrix* table, float* mean,
                                                        double* logsumexp);

/* The same, and from the same sweep the draw of dlcore_categorical_sample, without truncation. */
DLCORE_API dlcore_status dlcore_categorical_sample_expectation(const dlcore_categorical* softmax,
                                                               const dlcore_matrix* table, dlcore_keys keys,
                                                               float* mean, double* logsumexp,
                                                               int64_t* tokens, int64_t* argmax,
                                                               float* numbers);

/* From grad (rows, E), the gradient by the mean, the mean and the logsumexp, of either function. table_grad
 * (V, E), of the table's dtype, may be NULL: it is not wanted. */
DLCORE_API dlcore_status dlcore_categorical_expectation_backward(
    const dlcore_categorical* softmax, const dlcore_matrix* table, const float* grad, const float* mean,
    const double* logsumexp, const dlcore_logits_grad* logits_grad, void* table_grad);

/* --- uniform: uniform-state diffusion --- */

/* loss (rows): the continuous-time NELBO's integrand at level alpha in (0, 1), with dalpha = dα/dt <= 0, in
 * nats per token. softmax->index is z, x (rows) the clean tokens. Logits are of the leave-one-out posterior;
 * those of a denoiser want a shift of -log1p(V·α/(1-α)). Temperature, softcap and exclude are not taken.
 * saved (5, rows), which the gradient wants, may be NULL. */
DLCORE_API dlcore_status dlcore_uniform_nelbo(const dlcore_categorical* softmax, const int64_t* x,
                                              dlcore_doubles alpha, dlcore_doubles dalpha, float* loss,
                                              double* saved);

/* From grad (rows), the gradient by the loss, and what was saved. */
DLCORE_API dlcore_status dlcore_uniform_nelbo_backward(const dlcore_categorical* softmax, const int64_t* x,
                                                       dlcore_doubles alpha, dlcore_doubles dalpha,
                                                       const float* grad, const double* saved,
                                                       const dlcore_logits_grad* logits_grad);

/* --- guidance: draws from two blended streams of logits --- */

typedef struct dlcore_guided_step {
  dlcore_matrix cond, uncond;  /* (rows, V) both, each of its own dtype */
  const int64_t* z;            /* (rows), needed: the observed tokens */
  dlcore_doubles coefficients; /* needed: those of row r, gamma temperature shift alpha_s bonus keep, from
                                  data[r * stride] on; stride 6 or more, or 0: the same six for all rows */
  const int64_t* exclude;      /* one token id of probability 0 that does not count in V, or NULL */
  dlcore_keys keys;            /* needed */
  int32_t threads;
} dlcore_guided_step;

/* tokens (rows): the reverse step of a uniform process under classifier-free guidance, a draw from
 * m_c(y)^γ·m_u(y)^(1-γ)·exp(bonus·1[y = z]) over its sum, with m(y) = α_s·p(y) + (1-α_s)/V and p = softmax of
 * (logits + shift·1[y = z]) / temperature. The bonus is log1p(V·a/(1-a)), a = α_t/α_s; logits of a denoiser
 * want a shift of -log1p(V·α_t/(1-α_t)). Rows whose keep is not 0 keep z and are not read; -1 where either
 * stream is broken or no token is possible. */
DLCORE_API dlcore_status dlcore_guidance_cfg_uniform_step(const dlcore_guided_step* step, int64_t* tokens);

/* --- bits: bitstream diffusion, x = bit + sigma·noise --- */

enum { DLCORE_MSB_FIRST = 0, DLCORE_LSB_FIRST = 1 };
enum { DLCORE_CODING_01 = 0, DLCORE_CODING_PM1 = 1 }; /* bits are {0, 1} or {-1, 1} */
enum { DLCORE_SQUARED_ERROR = 0, DLCORE_CROSS_ENTROPY = 1 };

typedef struct dlcore_bit_code {
  int64_t width; /* bits per token, 1 to 62 */
  int32_t order; /* DLCORE_MSB_FIRST, or DLCORE_LSB_FIRST */
  int32_t gray;  /* 1: the Gray code of the token; 0: its binary digits */
  int32_t coding;
} dlcore_bit_code;

/* tokens (count), in [0, 2^width), to bits (count, width). */
DLCORE_API dlcore_status dlcore_bits_encode(const dlcore_bit_code* code, const int64_t* tokens, int64_t count,
                                            float* bits, int32_t threads);

/* bits (count, width), which may be noisy or probabilities (DLCORE_CODING_01), to tokens (count). Codes from
 * vocab_size on wrap around at it; 0: none do. A token with a NaN bit is -1. */
DLCORE_API dlcore_status dlcore_bits_decode(const dlcore_bit_code* code, const dlcore_matrix* bits,
                                            int64_t vocab_size, int64_t* tokens, int32_t threads);

/* Noisy bits, what a network says of them, and their level. A prompt is held by rows of its own with
 * sigma_next = sigma: rows may be sequences, tokens or bits. */
typedef struct dlcore_bits {
  dlcore_matrix x;        /* (rows, columns) */
  dlcore_matrix residual; /* its like: logits of a network; data NULL: 0 */
  dlcore_doubles sigma;   /* needed: at least 0 */
  int32_t coding;         /* DLCORE_CODING_01 or DLCORE_CODING_PM1 */
  float clip;             /* of the matched filter's logit; 0: 30, INFINITY: none */
  int32_t threads;
} dlcore_bits;

/* out (rows, columns): the logit of a set bit given its own x, (x - 1/2)/sigma² or 2x/sigma²; takes no
 * residual. */
DLCORE_API dlcore_status dlcore_bits_matched_filter(const dlcore_bits* state, float* out);

/* out (rows, columns): sigmoid(residual + matched filter), the probability that a bit is set. */
DLCORE_API dlcore_status dlcore_bits_posterior(const dlcore_bits* state, float* out);

typedef struct dlcore_bits_update {
  dlcore_doubles sigma_next;  /* needed: at least 0 */
  dlcore_doubles gamma_next;  /* churn, at least 0; NULL: none, and no keys */
  dlcore_doubles noise_scale; /* at least 0; NULL: 1.003 */
  dlcore_keys keys;
} dlcore_bits_update;

/* next and probs (rows, columns): m + (sigma_next/sigma)·(x - m), m the posterior mean, and the posterior.
 * With gamma_next the result is churned to sigma_next·(1 + gamma_next). Sigma must be positive. */
DLCORE_API dlcore_status dlcore_bits_step(const dlcore_bits* state, const dlcore_bits_update* update,
                                          float* next, float* probs);

/* out (rows, columns) = x + spread·noise: bits to noisy bits with spread = sigma, churn with spread =
 * noise_scale·sigma·sqrt(gamma·(2 + gamma)). */
DLCORE_API dlcore_status dlcore_bits_perturb(const dlcore_matrix* x, dlcore_doubles spread, dlcore_keys keys,
                                             float* out, int32_t threads);

/* loss (rows): the mean over a row of (posterior mean - bit)², or of the cross-entropy in nats, by `kind`.
 * bits (rows, columns) are the clean ones; the residual is needed. */
DLCORE_API dlcore_status dlcore_bits_loss(const dlcore_bits* state, const dlcore_matrix* bits, int32_t kind,
                                          float* loss);

/* From grad (rows), the gradient by the loss: residual_grad and x_grad (rows, columns), of the residual's and
 * of x's dtype; x_grad may be NULL: it is not wanted. */
DLCORE_API dlcore_status dlcore_bits_loss_backward(const dlcore_bits* state, const dlcore_matrix* bits,
                                                   int32_t kind, const float* grad, void* residual_grad,
                                                   void* x_grad);

/* --- sphere: unit vectors, a row each. Arguments of one call have one shape and dtype, which is the result's
 * --- */

/* x / |x|; 0 stays 0. */
DLCORE_API dlcore_status dlcore_sphere_normalize(const dlcore_matrix* x, void* out, int32_t threads);
/* u less its part along x. */
DLCORE_API dlcore_status dlcore_sphere_project(const dlcore_matrix* x, const dlcore_matrix* u, void* out,
                                               int32_t threads);
/* radians (rows) in [0, π]. */
DLCORE_API dlcore_status dlcore_sphere_angle(const dlcore_matrix* x, const dlcore_matrix* y, float* radians,
                                             int32_t threads);
/* The point at share t of the great circle's way from x to y; t is needed, finite. Two columns or more. */
DLCORE_API dlcore_status dlcore_sphere_slerp(const dlcore_matrix* x, const dlcore_matrix* y, dlcore_floats t,
                                             void* out, int32_t threads);
/* The tangent at x that points to y, as long as their angle. Two columns or more. */
DLCORE_API dlcore_status dlcore_sphere_log_map(const dlcore_matrix* x, const dlcore_matrix* y, void* out,
                                               int32_t threads);
/* Where the great circle from x along the tangent v leads. */
DLCORE_API dlcore_status dlcore_sphere_exp_map(const dlcore_matrix* x, const dlcore_matrix* v, void* out,
                                               int32_t threads);
/* x turned by the rotation that takes source to target. Two columns or more. */
DLCORE_API dlcore_status dlcore_sphere_rotate(const dlcore_matrix* x, const dlcore_matrix* source,
                                              const dlcore_matrix* target, void* out, int32_t threads);

enum { DLCORE_RETRACT_EXP = 0, DLCORE_RETRACT_NORMALIZE = 1 };

/* The state after delta (needed) along a velocity: by the exponential map, or normalize(x + delta·velocity).
 */
DLCORE_API dlcore_status dlcore_sphere_step(const dlcore_matrix* x, const dlcore_matrix* velocity,
                                            dlcore_floats delta, int32_t retraction, void* out,
                                            int32_t threads);
/* A step of Langevin dynamics towards the law with this score; step_size is needed, at least 0, c/(d - 1).
 * Two columns or more. */
DLCORE_API dlcore_status dlcore_sphere_correct(const dlcore_matrix* x, const dlcore_matrix* score,
                                               dlcore_doubles step_size, dlcore_keys keys, void* out,
                                               int32_t threads);

enum { DLCORE_VON_MISES_FISHER = 0, DLCORE_SPHERICAL_CAUCHY = 1 };

/* One draw per row about a mean direction of any length; 0: the uniform law. kappa is needed, in [0,
 * FLT_MAX]; of the Cauchy law it is that of the vMF law whose proposal it is. Two columns or more. */
DLCORE_API dlcore_status dlcore_sphere_sample(const dlcore_matrix* mean, dlcore_doubles kappa, int32_t law,
                                              dlcore_keys keys, void* out, int32_t threads);

/* Gradients of the maps: of each input, from `grad`, the gradient by the map's result and its like. Any may
 * be NULL: it is not wanted. That of t is a number per row. (dlcore_sphere_correct's is there on
 * CUDA alone: the CPU has no kernel of it.) */
DLCORE_API dlcore_status dlcore_sphere_normalize_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                          void* x_grad, int32_t threads);
DLCORE_API dlcore_status dlcore_sphere_project_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                        const dlcore_matrix* u, void* x_grad, void* u_grad,
                                                        int32_t threads);
DLCORE_API dlcore_status dlcore_sphere_angle_backward(const float* grad, const dlcore_matrix* x,
                                                      const dlcore_matrix* y, void* x_grad, void* y_grad,
                                                      int32_t threads);
DLCORE_API dlcore_status dlcore_sphere_slerp_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                      const dlcore_matrix* y, dlcore_floats t, void* x_grad,
                                                      void* y_grad, float* t_grad, int32_t threads);
DLCORE_API dlcore_status dlcore_sphere_log_map_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                        const dlcore_matrix* y, void* x_grad, void* y_grad,
                                                        int32_t threads);
DLCORE_API dlcore_status dlcore_sphere_exp_map_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                        const dlcore_matrix* v, void* x_grad, void* v_grad,
                                                        int32_t threads);
DLCORE_API dlcore_status dlcore_sphere_rotate_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                       const dlcore_matrix* source,
                                                       const dlcore_matrix* target, void* x_grad,
                                                       void* source_grad, void* target_grad, int32_t threads);

/* velocity (rows, d): P_x m of the mean m = Σ_k softmax_k · g(<x, E_k>) · E_k, without anything of size rows
 * · V; P_x takes away what lies along x. x (rows, d) and table (V, d), whose rows are the E_k, are unit
 * vectors of any dtype, two columns or more. Without kappa g = ω / sin ω is SLERP's, and this over the noise
 * fraction its path's velocity; with kappa, in [0, 1e8], g is that of the von Mises-Fisher path, per unit of
 * kappa. (The Cauchy path's is the part of dlcore_categorical_expectation's mean across x.) along (rows), <x,
 * m>, and logsumexp (rows), both of which the gradient wants, may be NULL. */
DLCORE_API dlcore_status dlcore_sphere_velocity(const dlcore_logits* logits, const dlcore_matrix* x,
                                                const dlcore_matrix* table, dlcore_doubles kappa,
                                                float* velocity, float* along, double* logsumexp,
                                                int32_t threads);

/* From grad (rows, d), the gradient by the velocity, and the results: x_grad and table_grad, of x's and the
 * table's shape and dtype, may be NULL: they are not wanted. */
DLCORE_API dlcore_status dlcore_sphere_velocity_backward(const dlcore_logits* logits, const dlcore_matrix* x,
                                                         const dlcore_matrix* table, dlcore_doubles kappa,
                                                         const float* grad, const float* velocity,
                                                         const float* along, const double* logsumexp,
                                                         const dlcore_logits_grad* logits_grad, void* x_grad,
                                                         void* table_grad, int32_t threads);

/* ids (rows, count) of a row's largest logits, in descending order, the lowest id first among equals; -1 all
 * over in a row with NaN, +inf or nothing but -inf. count: in [1, V]. */
DLCORE_API dlcore_status dlcore_sphere_largest(const dlcore_logits* logits, int64_t count, int64_t* ids,
                                               int32_t threads);

/* --- attention: every query row sees at most two intervals of keys --- */

/* (batch, rows, heads, columns); columns lie without gaps. Strides all 0: without gaps at all. */
typedef struct dlcore_heads {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
} dlcore_heads;

/* Scores are scale·q·k, through softcap·tanh(score / softcap). */
typedef struct dlcore_attention {
  int32_t dtype; /* of q, k, v and out */
  int64_t batch, rows, heads;
  int64_t keys, kv_heads; /* heads is a multiple of kv_heads */
  int64_t head_dim;       /* 1 to 512 */
  int64_t value_dim;      /* 1 to 512; 0: head_dim */
  dlcore_heads q;         /* (batch, rows, heads, head_dim) */
  dlcore_heads k;         /* (batch, keys, kv_heads, head_dim) */
  dlcore_heads v;         /* (batch, keys, kv_heads, value_dim) */
  float scale;            /* 0: head_dim^-1/2 */
  float softcap;          /* 0: none */
  int32_t threads;
} dlcore_attention;

/* out (batch, rows, heads, value_dim) and lse (batch, heads, rows), the logsumexp of a row's scores. Row r
 * sees the keys [starts[r][i], stops[r][i]), i = 0, 1, which do not overlap and lie in [0, keys]; an interval
 * that does not stop after its start is empty. starts and stops (batch, rows, 2), or with shared_bounds
 * (rows, 2). A row that sees nothing gives 0 and -inf. */
DLCORE_API dlcore_status dlcore_attention_intervals(const dlcore_attention* attention, const int32_t* starts,
                                                    const int32_t* stops, int32_t shared_bounds, void* out,
                                                    float* lse);

/* From grad, like out, and grad_lse, like lse, the gradients by both: those of q, k and v, of their shape and
 * dtype, without gaps. */
DLCORE_API dlcore_status dlcore_attention_intervals_backward(const dlcore_attention* attention,
                                                             const int32_t* starts, const int32_t* stops,
                                                             int32_t shared_bounds, const void* out,
                                                             const float* lse, const void* grad,
                                                             const float* grad_lse, void* q_grad,
                                                             void* k_grad, void* v_grad);

/* A cache, and how the new rows see it. Sequence b's rows are keys[b], or the pages page_table[b] lists. */
typedef struct dlcore_cache {
  void* keys;                /* (batch, max_len, kv_heads, head_dim), or (num_pages, page_size, ...) */
  void* values;              /* (batch, max_len, kv_heads, value_dim), or the like */
  const int32_t* lengths;    /* (batch): the rows that are committed */
  int64_t max_len;           /* rows that a sequence may have, with pages at most pages·page_size */
  const int32_t* page_table; /* (batch, pages), or NULL: no pages. No two sequences may share one */
  int64_t pages, page_size, num_pages;
  int64_t num_commit; /* the first rows are clean ones of a block being committed: they see one another */
  const uint8_t*
      causal; /* not 0: rows see nothing after themselves; (batch), or with shared_causal (1); NULL: 0 */
  int32_t shared_causal;
  int64_t window;        /* 0: none, else see dlcore.attention.decode */
  int32_t window_by_row; /* 1: the window is about each row, not its block */
} dlcore_cache;

/* One denoising step against a cache: k and v, of as many rows as q, are written at its lengths, then
 * attended. `keys` of the attention is not used. */
DLCORE_API dlcore_status dlcore_attention_decode(const dlcore_attention* attention, const dlcore_cache* cache,
                                                 void* out, float* lse);

/* --- similarity: how much rows of a cache differ from fresh ones --- */

typedef struct dlcore_similarity {
  int32_t dtype; /* of fresh and cached */
  int64_t batch, rows, heads, columns;
  dlcore_heads fresh;        /* (batch, rows, heads, columns) */
  dlcore_heads cached;       /* (batch, cached_rows, heads, columns), or (num_pages, page_size, ...) */
  int64_t cached_rows;       /* with pages not used: pages·page_size */
  const int64_t* positions;  /* (batch, rows): the cached row of each fresh one; NULL: row r of row r */
  const int32_t* page_table; /* (batch, pages), or NULL: no pages */
  int64_t pages, page_size, num_pages;
  int32_t threads;
} dlcore_similarity;

/* out (batch, rows): the cosine between fresh and cached row, all heads together; 1 between two zero rows, 0
 * if one is, NaN for positions outside of the cache. */
DLCORE_API dlcore_status dlcore_similarity_cosine(const dlcore_similarity* rows, float* out);

#ifdef __cplusplus
}
#endif

#if defined(DLCORE_CUDA)
#include "dlcore_cuda.h"
#endif

#endif /* DLCORE_DLCORE_H */
