// torch.ops.seqkern.gru_forward and gru_backward on the CPU.
#include <torch/library.h>

#include "layer.h"

namespace seqkern {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& x, const Tensor& h0,
                                               at::TensorList params, const OptionalTensor& lengths,
                                               const OptionalTensor& batch_sizes, bool save) {
  ForwardResult r =
      layer_forward(CellKind::gru, x, h0, Tensor(), params, lengths, batch_sizes, save);
  return {r.y, r.h_n, r.reserve};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> gru_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const Tensor& x, const Tensor& h0,
    at::TensorList params, const OptionalTensor& lengths, const OptionalTensor& batch_sizes,
    const Tensor& y, const Tensor& reserve, bool need_dx, bool need_dparams) {
  BackwardResult r = layer_backward(CellKind::gru, dy, dh_n, std::nullopt, x, h0, Tensor(), params,
                                    lengths, batch_sizes, y, reserve, need_dx, need_dparams);
  return {r.dx, r.dh0, r.dparams};
}

}  // namespace

TORCH_LIBRARY_IMPL(seqkern, CPU, library) {
  library.impl("gru_forward", &gru_forward);
  library.impl("gru_backward", &gru_backward);
}

}  // namespace seqkern
