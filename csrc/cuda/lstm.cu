// The persistent kernels of an LSTM.
#include "launch.cuh"

namespace seqkern::cuda {

bool lstm_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  return launch_cell<Pass::forward, LstmCell>(params, persistent, stream);
}

bool lstm_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  return launch_cell<Pass::backward, LstmCell>(params, persistent, stream);
}

}  // namespace seqkern::cuda
