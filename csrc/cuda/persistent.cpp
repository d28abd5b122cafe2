// Which cell's persistent kernels: they are in lstm.cu, gru.cu and rnn.cu.
#include "kernels.h"

namespace seqkern::cuda {

void persistent_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  if (params.cell == CellKind::lstm)
    lstm_forward(params, persistent, stream);
  else if (params.cell == CellKind::gru)
    gru_forward(params, persistent, stream);
  else
    rnn_forward(params, persistent, stream);
}

void persistent_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  if (params.cell == CellKind::lstm)
    lstm_backward(params, persistent, stream);
  else if (params.cell == CellKind::gru)
    gru_backward(params, persistent, stream);
  else
    rnn_backward(params, persistent, stream);
}

}  // namespace seqkern::cuda
