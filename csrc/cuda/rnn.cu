// The persistent kernels of an RNN, tanh and ReLU.
#include "launch.cuh"

namespace seqkern::cuda {

bool rnn_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  return forward_of<RnnCell>(params, persistent, stream);
}

bool rnn_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  return backward_of<RnnCell>(params, persistent, stream);
}

}  // namespace seqkern::cuda
