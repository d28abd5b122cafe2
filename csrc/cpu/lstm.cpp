// torch.ops.seqkern.lstm_forward and lstm_backward on the CPU.
#include <torch/library.h>

#include "layer.h"

namespace seqkern {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_forward(const Tensor& x, const Tensor& h0,
                                                        const Tensor& c0, at::TensorList params,
                                                        const OptionalTensor& lengths,
                                                        const OptionalTensor& batch_sizes,
                                                        bool save) {
  ForwardResult r = layer_forward(CellKind::lstm, x, h0, c0, params, lengths, batch_sizes, save);
  return {r.y, r.h_n, r.c_n, r.reserve};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
    const Tensor& x, const Tensor& h0, const Tensor& c0, at::TensorList params,
    const OptionalTensor& lengths, const OptionalTensor& batch_sizes, const Tensor& y,
    const Tensor& reserve, bool need_dx, bool need_dparams) {
  BackwardResult r = layer_backward(CellKind::lstm, dy, dh_n, dc_n, x, h0, c0, params, lengths,
                                    batch_sizes, y, reserve, need_dx, need_dparams);
  return {r.dx, r.dh0, r.dc0, r.dparams};
}

}  // namespace

TORCH_LIBRARY_IMPL(seqkern, CPU, library) {
  library.impl("lstm_forward", &lstm_forward);
  library.impl("lstm_backward", &lstm_backward);
}

}  // namespace seqkern
