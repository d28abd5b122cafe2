// Which cell's persistent kernels: they are in lstm.cu, gru.cu, rnn.cu, and, where they regularise,
// in regularised.cu, variants.cu, two_products.cu and layer_norm.cu.
#include "kernels.h"

namespace seqkern::cuda {

bool persistent_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  if (cell_shape(params.cell).mid > 0) return two_products_forward(params, persistent, stream);
  if (cell_shape(params.cell).rows) return layer_norm_forward(params, persistent, stream);
  if (!is_torchs(params.cell)) return variant_forward(params, persistent, stream);
  if (regularises(params)) return regularised_forward(params, persistent, stream);
  if (params.cell == CellKind::lstm) return lstm_forward(params, persistent, stream);
  if (params.cell == CellKind::gru) return gru_forward(params, persistent, stream);
  return rnn_forward(params, persistent, stream);
}

bool persistent_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  if (cell_shape(params.cell).mid > 0) return two_products_backward(params, persistent, stream);
  if (cell_shape(params.cell).rows) return layer_norm_backward(params, persistent, stream);
  if (!is_torchs(params.cell)) return variant_backward(params, persistent, stream);
  if (regularises(params)) return regularised_backward(params, persistent, stream);
  if (params.cell == CellKind::lstm) return lstm_backward(params, persistent, stream);
  if (params.cell == CellKind::gru) return gru_backward(params, persistent, stream);
  return rnn_backward(params, persistent, stream);
}

}  // namespace seqkern::cuda
