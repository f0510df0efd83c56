// What backend.cpp asks of ggml-cuda beyond its public header; defined in ops/device-cuda.cu.
#pragma once

#include "ggml-backend.h"

namespace bupo::cuda {

// The stream (cudaStream_t) of ggml's CUDA backend.
void * stream_of(ggml_backend_t backend);

} // namespace bupo::cuda
