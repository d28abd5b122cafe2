// The persistent kernels of a GRU.
#include "launch.cuh"

namespace seqkern::cuda {

bool gru_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  return launch_cell<Pass::forward, GruCell>(params, persistent, stream);
}

bool gru_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  return launch_cell<Pass::backward, GruCell>(params, persistent, stream);
}

}  // namespace seqkern::cuda
