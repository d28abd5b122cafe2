// The persistent kernels of an RNN, tanh and ReLU.
#include "launch.cuh"

namespace seqkern::cuda {

bool rnn_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  return launch_cell<Pass::forward, RnnCell>(params, persistent, stream);
}

bool rnn_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  return launch_cell<Pass::backward, RnnCell>(params, persistent, stream);
}

}  // namespace seqkern::cuda
