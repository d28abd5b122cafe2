// The recurrent layers' operators, once for every backend: their schemas, and how the six of them
// are registered for a backend that has the two functions below.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "params.h"

namespace seqkern {

struct ForwardResult {
  at::Tensor y, h_n, c_n, reserve;  // c_n: LSTM only
};

struct BackwardResult {
  at::Tensor dx, dh0, dc0;  // dc0: LSTM only
  std::vector<at::Tensor> dparams;
};

using OptionalTensor = std::optional<at::Tensor>;

// x [T, B, I], or [N, I] with batch_sizes; h0 [D, B, P]; c0 [D, B, H] (LSTM only); params: per
// direction w_ih, w_hh[, b_ih, b_hh][, w_hr]; lengths [B] int64; batch_sizes [T] int64.
using LayerForward = ForwardResult(CellKind cell, const at::Tensor& x, const at::Tensor& h0,
                                   const at::Tensor& c0, at::TensorList params,
                                   const OptionalTensor& lengths, const OptionalTensor& batch_sizes,
                                   bool save);

using LayerBackward = BackwardResult(CellKind cell, const OptionalTensor& dy,
                                     const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                     const at::Tensor& x, const at::Tensor& h0,
                                     const at::Tensor& c0, at::TensorList params,
                                     const OptionalTensor& lengths,
                                     const OptionalTensor& batch_sizes, const at::Tensor& y,
                                     const at::Tensor& reserve, bool need_dx, bool need_dparams);

// One recurrent layer each. Letters as above; reserve: what backward needs, opaque. What they
// compute: seqkern/reference.
inline void define_layers(torch::Library& library) {
  library.def(
      "rnn_forward(Tensor x, Tensor h0, Tensor[] params, Tensor? lengths, Tensor? batch_sizes, "
      "bool relu, bool save)"
      " -> (Tensor y, Tensor h_n, Tensor reserve)");
  library.def(
      "rnn_backward(Tensor? dy, Tensor? dh_n, Tensor x, Tensor h0, Tensor[] params, Tensor? "
      "lengths,"
      " Tensor? batch_sizes, Tensor y, Tensor reserve, bool relu, bool need_dx, bool need_dparams)"
      " -> (Tensor dx, Tensor dh0, Tensor[] dparams)");
  library.def(
      "gru_forward(Tensor x, Tensor h0, Tensor[] params, Tensor? lengths, Tensor? batch_sizes, "
      "bool save)"
      " -> (Tensor y, Tensor h_n, Tensor reserve)");
  library.def(
      "gru_backward(Tensor? dy, Tensor? dh_n, Tensor x, Tensor h0, Tensor[] params, Tensor? "
      "lengths,"
      " Tensor? batch_sizes, Tensor y, Tensor reserve, bool need_dx, bool need_dparams)"
      " -> (Tensor dx, Tensor dh0, Tensor[] dparams)");
  library.def(
      "lstm_forward(Tensor x, Tensor h0, Tensor c0, Tensor[] params, Tensor? lengths, Tensor? "
      "batch_sizes, bool save)"
      " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor reserve)");
  library.def(
      "lstm_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor h0, Tensor c0, "
      "Tensor[] params,"
      " Tensor? lengths, Tensor? batch_sizes, Tensor y, Tensor reserve, bool need_dx, bool "
      "need_dparams)"
      " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dparams)");
}

// The operators of a backend whose layers are `forward` and `backward`.
template <LayerForward* forward, LayerBackward* backward>
struct LayerOperators {
  using Tensor = at::Tensor;
  using Tensors = std::vector<Tensor>;
  using List = at::TensorList;
  using Optional = OptionalTensor;

  static CellKind rnn_cell(bool relu) { return relu ? CellKind::rnn_relu : CellKind::rnn_tanh; }

  static std::tuple<Tensor, Tensor, Tensor> rnn_forward(const Tensor& x, const Tensor& h0,
                                                        List params, const Optional& lengths,
                                                        const Optional& batch_sizes, bool relu,
                                                        bool save) {
    ForwardResult r = forward(rnn_cell(relu), x, h0, {}, params, lengths, batch_sizes, save);
    return {r.y, r.h_n, r.reserve};
  }

  static std::tuple<Tensor, Tensor, Tensors> rnn_backward(
      const Optional& dy, const Optional& dh_n, const Tensor& x, const Tensor& h0, List params,
      const Optional& lengths, const Optional& batch_sizes, const Tensor& y, const Tensor& reserve,
      bool relu, bool need_dx, bool need_dparams) {
    BackwardResult r = backward(rnn_cell(relu), dy, dh_n, {}, x, h0, {}, params, lengths,
                                batch_sizes, y, reserve, need_dx, need_dparams);
    return {r.dx, r.dh0, r.dparams};
  }

  static std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& x, const Tensor& h0,
                                                        List params, const Optional& lengths,
                                                        const Optional& batch_sizes, bool save) {
    ForwardResult r = forward(CellKind::gru, x, h0, {}, params, lengths, batch_sizes, save);
    return {r.y, r.h_n, r.reserve};
  }

  static std::tuple<Tensor, Tensor, Tensors> gru_backward(const Optional& dy, const Optional& dh_n,
                                                          const Tensor& x, const Tensor& h0,
                                                          List params, const Optional& lengths,
                                                          const Optional& batch_sizes,
                                                          const Tensor& y, const Tensor& reserve,
                                                          bool need_dx, bool need_dparams) {
    BackwardResult r = backward(CellKind::gru, dy, dh_n, {}, x, h0, {}, params, lengths,
                                batch_sizes, y, reserve, need_dx, need_dparams);
    return {r.dx, r.dh0, r.dparams};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_forward(const Tensor& x, const Tensor& h0,
                                                                 const Tensor& c0, List params,
                                                                 const Optional& lengths,
                                                                 const Optional& batch_sizes,
                                                                 bool save) {
    ForwardResult r = forward(CellKind::lstm, x, h0, c0, params, lengths, batch_sizes, save);
    return {r.y, r.h_n, r.c_n, r.reserve};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensors> lstm_backward(
      const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Tensor& x,
      const Tensor& h0, const Tensor& c0, List params, const Optional& lengths,
      const Optional& batch_sizes, const Tensor& y, const Tensor& reserve, bool need_dx,
      bool need_dparams) {
    BackwardResult r = backward(CellKind::lstm, dy, dh_n, dc_n, x, h0, c0, params, lengths,
                                batch_sizes, y, reserve, need_dx, need_dparams);
    return {r.dx, r.dh0, r.dc0, r.dparams};
  }

  // In TORCH_LIBRARY_IMPL, which names the dispatch key.
  static void implement(torch::Library& library) {
    library.impl("rnn_forward", &rnn_forward);
    library.impl("rnn_backward", &rnn_backward);
    library.impl("gru_forward", &gru_forward);
    library.impl("gru_backward", &gru_backward);
    library.impl("lstm_forward", &lstm_forward);
    library.impl("lstm_backward", &lstm_backward);
  }
};

}  // namespace seqkern
