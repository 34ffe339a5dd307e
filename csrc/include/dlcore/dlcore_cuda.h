/*
 * dlcore on CUDA devices: dlcore::cuda is the library of all functions, these included. dlcore.h includes
 * this where DLCORE_CUDA is defined, as dlcore::cuda has it.
 *
 * Structs are the host's, and so are the ids that `exclude` and `prior` point to; all else that they point
 * to, and every result, is the current device's, on whose `stream`, a cudaStream_t, the work is queued.
 * Nothing waits for it, so that it can be captured into a graph. Values are not checked, and nothing is read
 * out of bounds whatever they are: an id out of range has log-probability NaN. Dense logits alone are taken,
 * else DLCORE_UNSUPPORTED. `threads` does not count. The workspace is device memory, aligned to 256 bytes,
 * which the next call on the same stream may use again.
 *
 * dlcore_cuda_X is dlcore_X on a stream, unless said. Attention, expectations and the vocabulary drifts,
 * which multiply matrices, are not here.
 */
#ifndef DLCORE_DLCORE_CUDA_H
#define DLCORE_DLCORE_CUDA_H

#include "dlcore.h"

#ifdef __cplusplus
extern "C" {
#endif

DLCORE_API dlcore_status dlcore_cuda_rng_fold_in(dlcore_keys keys, dlcore_ints data, int64_t count,
                                                 dlcore_key* out, void* stream);
DLCORE_API dlcore_status dlcore_cuda_rng_uniform(const dlcore_key* keys, int64_t num_keys, int64_t count,
                                                 int32_t dtype, void* out, void* stream);
DLCORE_API dlcore_status dlcore_cuda_rng_normal(const dlcore_key* keys, int64_t num_keys, int64_t count,
                                                int32_t dtype, void* out, void* stream);
DLCORE_API dlcore_status dlcore_cuda_rng_gumbel(const dlcore_key* keys, int64_t num_keys, int64_t count,
                                                int32_t dtype, void* out, void* stream);

/* How many bytes of workspace the functions of these logits take; `how` is what is to be sampled with, NULL
 * for draws without truncation and for the other functions. */
DLCORE_API dlcore_status dlcore_cuda_categorical_workspace(const dlcore_categorical* softmax,
                                                           const dlcore_sampling* how, int64_t* bytes);

DLCORE_API dlcore_status dlcore_cuda_categorical_stats(const dlcore_categorical* softmax, int64_t* argmax,
                                                       float* numbers, void* workspace, void* stream);

DLCORE_API dlcore_status dlcore_cuda_categorical_summary(const dlcore_categorical* softmax,
                                                         const dlcore_part* part, int64_t* tokens,
                                                         double* numbers, void* workspace, void* stream);

/* As dlcore_categorical_sample, with tokens (2, rows), the draws and the argmaxes, and numbers needed. */
DLCORE_API dlcore_status dlcore_cuda_categorical_sample(const dlcore_categorical* softmax,
                                                        const dlcore_sampling* how, int64_t* tokens,
                                                        float* numbers, void* workspace, void* stream);

DLCORE_API dlcore_status dlcore_cuda_categorical_sample_mixture(const dlcore_categorical* softmax,
                                                                const dlcore_mixture* how, int64_t* tokens,
                                                                void* workspace, void* stream);
DLCORE_API dlcore_status dlcore_cuda_categorical_log_probs(const dlcore_categorical* softmax,
                                                           const int64_t* target, double* numbers,
                                                           void* workspace, void* stream);
DLCORE_API dlcore_status dlcore_cuda_categorical_log_probs_backward(const dlcore_categorical* softmax,
                                                                    const int64_t* target, const double* grad,
                                                                    const double* numbers,
                                                                    const dlcore_logits_grad* logits_grad,
                                                                    void* stream);
DLCORE_API dlcore_status dlcore_cuda_uniform_nelbo(const dlcore_categorical* softmax, const int64_t* x,
                                                   dlcore_doubles alpha, dlcore_doubles dalpha, float* loss,
                                                   double* saved, void* workspace, void* stream);
DLCORE_API dlcore_status dlcore_cuda_uniform_nelbo_backward(
    const dlcore_categorical* softmax, const int64_t* x, dlcore_doubles alpha, dlcore_doubles dalpha,
    const float* grad, const double* saved, const dlcore_logits_grad* logits_grad, void* stream);

/* How many bytes of workspace dlcore_cuda_categorical_kl takes for logits like p. */
DLCORE_API dlcore_status dlcore_cuda_categorical_kl_workspace(const dlcore_logits* p, int64_t* bytes);
DLCORE_API dlcore_status dlcore_cuda_categorical_kl(const dlcore_logits* p, const dlcore_logits* q,
                                                    dlcore_floats temperature, double* numbers,
                                                    void* workspace, void* stream);
DLCORE_API dlcore_status dlcore_cuda_categorical_kl_backward(const dlcore_logits* p, const dlcore_logits* q,
                                                             dlcore_floats temperature, const double* grad,
                                                             const double* numbers,
                                                             const dlcore_logits_grad* p_grad,
                                                             const dlcore_logits_grad* q_grad, void* stream);

/* How many bytes of workspace dlcore_cuda_guidance_cfg_uniform_step takes for streams like cond. */
DLCORE_API dlcore_status dlcore_cuda_guidance_workspace(const dlcore_matrix* cond, int64_t* bytes);
DLCORE_API dlcore_status dlcore_cuda_guidance_cfg_uniform_step(const dlcore_guided_step* step,
                                                               int64_t* tokens, void* workspace,
                                                               void* stream);

/* How many bytes of workspace the functions of such bits take. */
DLCORE_API dlcore_status dlcore_cuda_bits_workspace(const dlcore_matrix* x, int64_t* bytes);
DLCORE_API dlcore_status dlcore_cuda_bits_encode(const dlcore_bit_code* code, const int64_t* tokens,
                                                 int64_t count, float* bits, void* stream);
DLCORE_API dlcore_status dlcore_cuda_bits_decode(const dlcore_bit_code* code, const dlcore_matrix* bits,
                                                 int64_t vocab_size, int64_t* tokens, void* stream);
DLCORE_API dlcore_status dlcore_cuda_bits_matched_filter(const dlcore_bits* state, float* out,
                                                         void* workspace, void* stream);
DLCORE_API dlcore_status dlcore_cuda_bits_posterior(const dlcore_bits* state, float* out, void* workspace,
                                                    void* stream);
DLCORE_API dlcore_status dlcore_cuda_bits_step(const dlcore_bits* state, const dlcore_bits_update* update,
                                               float* next, float* probs, void* workspace, void* stream);
DLCORE_API dlcore_status dlcore_cuda_bits_perturb(const dlcore_matrix* x, dlcore_doubles spread,
                                                  dlcore_keys keys, float* out, void* workspace,
                                                  void* stream);
DLCORE_API dlcore_status dlcore_cuda_bits_loss(const dlcore_bits* state, const dlcore_matrix* bits,
                                               int32_t kind, float* loss, void* workspace, void* stream);
DLCORE_API dlcore_status dlcore_cuda_bits_loss_backward(const dlcore_bits* state, const dlcore_matrix* bits,
                                                        int32_t kind, const float* grad, void* residual_grad,
                                                        void* x_grad, void* workspace, void* stream);

DLCORE_API dlcore_status dlcore_cuda_sphere_normalize(const dlcore_matrix* x, void* out, void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_project(const dlcore_matrix* x, const dlcore_matrix* u, void* out,
                                                    void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_angle(const dlcore_matrix* x, const dlcore_matrix* y,
                                                  float* radians, void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_slerp(const dlcore_matrix* x, const dlcore_matrix* y,
                                                  dlcore_floats t, void* out, void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_log_map(const dlcore_matrix* x, const dlcore_matrix* y, void* out,
                                                    void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_exp_map(const dlcore_matrix* x, const dlcore_matrix* v, void* out,
                                                    void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_rotate(const dlcore_matrix* x, const dlcore_matrix* source,
                                                   const dlcore_matrix* target, void* out, void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_step(const dlcore_matrix* x, const dlcore_matrix* velocity,
                                                 dlcore_floats delta, int32_t retraction, void* out,
                                                 void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_correct(const dlcore_matrix* x, const dlcore_matrix* score,
                                                    dlcore_doubles step_size, dlcore_keys keys, void* out,
                                                    void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_sample(const dlcore_matrix* mean, dlcore_doubles kappa,
                                                   int32_t law, dlcore_keys keys, void* out, void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_normalize_backward(const dlcore_matrix* grad,
                                                               const dlcore_matrix* x, void* x_grad,
                                                               void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_project_backward(const dlcore_matrix* grad,
                                                             const dlcore_matrix* x, const dlcore_matrix* u,
                                                             void* x_grad, void* u_grad, void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_angle_backward(const float* grad, const dlcore_matrix* x,
                                                           const dlcore_matrix* y, void* x_grad, void* y_grad,
                                                           void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_slerp_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                           const dlcore_matrix* y, dlcore_floats t,
                                                           void* x_grad, void* y_grad, float* t_grad,
                                                           void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_log_map_backward(const dlcore_matrix* grad,
                                                             const dlcore_matrix* x, const dlcore_matrix* y,
                                                             void* x_grad, void* y_grad, void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_exp_map_backward(const dlcore_matrix* grad,
                                                             const dlcore_matrix* x, const dlcore_matrix* v,
                                                             void* x_grad, void* v_grad, void* stream);
DLCORE_API dlcore_status dlcore_cuda_sphere_rotate_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                            const dlcore_matrix* source,
                                                            const dlcore_matrix* target, void* x_grad,
                                                            void* source_grad, void* target_grad,
                                                            void* stream);

/* The gradients of dlcore_cuda_sphere_correct, with its noise drawn anew: of the inputs, and step_grad
 * (rows). Rows of 4096 columns at most, else DLCORE_UNSUPPORTED. */
DLCORE_API dlcore_status dlcore_cuda_sphere_correct_backward(
    const dlcore_matrix* grad, const dlcore_matrix* x, const dlcore_matrix* score, dlcore_doubles step_size,
    dlcore_keys keys, void* x_grad, void* score_grad, double* step_grad, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* DLCORE_DLCORE_CUDA_H */
