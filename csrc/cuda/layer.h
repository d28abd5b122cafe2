// One recurrent layer on a CUDA device, to torch.
#pragma once

#include <torch/library.h>

namespace seqkern::cuda {

// Registers the operators of operators.h; in a build without CUDA, none.
void implement_layers(torch::Library& library);

// For tests and benchmarks, in all threads: the tier that layers take from now on ("step", "block",
// "cluster", "grid") or fail; "" frees the choice. Throws std::invalid_argument for another name.
void force_tier(const char* name);

}  // namespace seqkern::cuda
