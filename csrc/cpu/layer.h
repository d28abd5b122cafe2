// The torch side of one recurrent layer, shared by rnn.cpp, gru.cpp and lstm.cpp: checks memory,
// allocates, calls the kernels. What is computed is checked in Python (seqkern/ops); here only what
// could read or write out of bounds.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../params.h"

namespace seqkern {

struct ForwardResult {
  at::Tensor y, h_n, c_n, reserve;  // c_n: LSTM only
};

struct BackwardResult {
  at::Tensor dx, dh0, dc0;  // dc0: LSTM only
  std::vector<at::Tensor> dparams;
};

// x [T, B, I], or [N, I] with batch_sizes; h0 [D, B, P]; c0 [D, B, H] (LSTM only); params: per
// direction w_ih, w_hh
// [, b_ih, b_hh][, w_hr]; lengths [B] int64; batch_sizes [T] int64.
ForwardResult layer_forward(CellKind cell, const at::Tensor& x, const at::Tensor& h0,
                            const at::Tensor& c0, at::TensorList params,
                            const std::optional<at::Tensor>& lengths,
                            const std::optional<at::Tensor>& batch_sizes, bool save);

BackwardResult layer_backward(CellKind cell, const std::optional<at::Tensor>& dy,
                              const std::optional<at::Tensor>& dh_n,
                              const std::optional<at::Tensor>& dc_n, const at::Tensor& x,
                              const at::Tensor& h0, const at::Tensor& c0, at::TensorList params,
                              const std::optional<at::Tensor>& lengths,
                              const std::optional<at::Tensor>& batch_sizes, const at::Tensor& y,
                              const at::Tensor& reserve, bool need_dx, bool need_dparams);

}  // namespace seqkern
