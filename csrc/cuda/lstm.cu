// The persistent kernels of an LSTM.
#include "launch.cuh"

namespace seqkern::cuda {

bool lstm_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  return forward_of<LstmCell>(params, persistent, stream);
}

bool lstm_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  return backward_of<LstmCell>(params, persistent, stream);
}

}  // namespace seqkern::cuda
