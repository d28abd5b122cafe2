// Stands in for the CUDA half in a build without nvcc.

#include <stdexcept>

#include "build_facts.h"
#include "cuda/device.h"
#include "cuda/layer.h"

namespace seqkern::cuda {

std::string status() { return "no CUDA kernels in this build: " SEQKERN_CUDA_WHY_NOT; }

Facts device_facts(int) { throw std::runtime_error(status()); }

void implement_layers(torch::Library&) {}

void force_tier(const char*) { throw std::runtime_error(status()); }

}  // namespace seqkern::cuda
