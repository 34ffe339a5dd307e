// What a guided draw takes, for the host and for devices.
#pragma once

#include "../common/guidance.h"
#include "capi.h"

namespace dlcore::capi {

GuidedStepArguments guided_step_of(const dlcore_guided_step& step, int64_t* tokens, Memory memory);

}  // namespace dlcore::capi
