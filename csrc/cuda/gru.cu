// The persistent kernels of a GRU.
#include "launch.cuh"

namespace seqkern::cuda {

bool gru_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  return forward_of<GruCell>(params, persistent, stream);
}

bool gru_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  return backward_of<GruCell>(params, persistent, stream);
}

}  // namespace seqkern::cuda
