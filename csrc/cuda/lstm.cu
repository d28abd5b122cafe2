// The persistent kernels of an LSTM.
#include "launch.cuh"

namespace seqkern::cuda {

void lstm_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  forward_of<LstmCell>(params, persistent, stream);
}

void lstm_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  backward_of<LstmCell>(params, persistent, stream);
}

}  // namespace seqkern::cuda
