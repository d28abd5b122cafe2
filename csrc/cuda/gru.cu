// The persistent kernels of a GRU.
#include "launch.cuh"

namespace seqkern::cuda {

void gru_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  forward_of<GruCell>(params, persistent, stream);
}

void gru_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  backward_of<GruCell>(params, persistent, stream);
}

}  // namespace seqkern::cuda
