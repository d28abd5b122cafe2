// Stands in for the CUDA half in a build without nvcc.

#include "build_facts.h"
#include "cuda/device.h"

namespace seqkern::cuda {

std::string status() { return "no CUDA kernels in this build: " SEQKERN_CUDA_WHY_NOT; }

}  // namespace seqkern::cuda
