// Paddle's stream on a GPU.
//
// Paddle's headers declare it only where PADDLE_WITH_CUDA is defined, and then they include those of
// cuBLAS, cuDNN, cuSOLVER and NCCL, which a machine that runs Paddle need not have. Nothing else that the
// op uses of them depends on that macro, so the op is compiled without it, the same for every build of
// Paddle, and the functions behind the stream are bound by their names in Paddle's library.
#pragma once

#include "paddle/phi/common/place.h"

namespace fastgen::paddle {

// The stream that work of this thread on `place`, a GPU, is put on now. Throws StatusError if this build of
// Paddle does not tell.
void* CurrentStream(const phi::Place& place);

}  // namespace fastgen::paddle
