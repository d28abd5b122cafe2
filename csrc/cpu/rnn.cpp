// torch.ops.seqkern.rnn_forward and rnn_backward on the CPU.
#include <torch/library.h>

#include "layer.h"

namespace seqkern {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

CellKind cell_of(bool relu) { return relu ? CellKind::rnn_relu : CellKind::rnn_tanh; }

std::tuple<Tensor, Tensor, Tensor> rnn_forward(const Tensor& x, const Tensor& h0,
                                               at::TensorList params, const OptionalTensor& lengths,
                                               const OptionalTensor& batch_sizes, bool relu,
                                               bool save) {
  ForwardResult r =
      layer_forward(cell_of(relu), x, h0, Tensor(), params, lengths, batch_sizes, save);
  return {r.y, r.h_n, r.reserve};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> rnn_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const Tensor& x, const Tensor& h0,
    at::TensorList params, const OptionalTensor& lengths, const OptionalTensor& batch_sizes,
    const Tensor& y, const Tensor& reserve, bool relu, bool need_dx, bool need_dparams) {
  BackwardResult r = layer_backward(cell_of(relu), dy, dh_n, std::nullopt, x, h0, Tensor(), params,
                                    lengths, batch_sizes, y, reserve, need_dx, need_dparams);
  return {r.dx, r.dh0, r.dparams};
}

}  // namespace

TORCH_LIBRARY_IMPL(seqkern, CPU, library) {
  library.impl("rnn_forward", &rnn_forward);
  library.impl("rnn_backward", &rnn_backward);
}

}  // namespace seqkern
