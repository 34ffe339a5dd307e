// Draws from two blended streams of logits on CUDA devices.
#include "../cuda/guidance.h"
#include "cuda.h"
#include "guidance.h"

using namespace dlcore;
using namespace dlcore::capi;

dlcore_status dlcore_cuda_guidance_workspace(const dlcore_matrix* cond, int64_t* bytes) {
  return queued(__func__, [&] {
    needed("bytes", bytes);
    const View v = view("cond", cond);
    *bytes = cuda::guided_step_bytes(v.rows, v.columns);
  });
}

dlcore_status dlcore_cuda_guidance_cfg_uniform_step(const dlcore_guided_step* step, int64_t* tokens,
                                                    void* workspace, void* stream) {
  return queued(__func__, [&] {
    const GuidedStepArguments a = guided_step_of(pointed("step", step), tokens, Memory::kDevice);
    needed("workspace", static_cast<char*>(workspace), a.cond.rows);
    const int64_t bytes = cuda::guided_step_bytes(a.cond.rows, a.cond.columns);
    cuda::guided_step(a, Workspace(workspace).take<char>(bytes), stream_of(stream));
  });
}
