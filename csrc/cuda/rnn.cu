// The persistent kernels of an RNN, tanh and ReLU.
#include "launch.cuh"

namespace seqkern::cuda {

void rnn_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  forward_of<RnnCell>(params, persistent, stream);
}

void rnn_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  backward_of<RnnCell>(params, persistent, stream);
}

}  // namespace seqkern::cuda
