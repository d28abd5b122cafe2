// The arguments of one recurrent layer's call, checked the same way on every backend. What is
// computed is checked in Python (seqkern/ops); here only what could read or write out of bounds.
#pragma once

#include <ATen/core/Tensor.h>

#include "dtype.h"
#include "operators.h"
#include "params.h"

namespace seqkern {

inline int64_t gates_of(CellKind cell) {
  return cell == CellKind::lstm ? 4 : cell == CellKind::gru ? 3 : 1;
}
inline int64_t saved_of(CellKind cell) {
  return cell == CellKind::lstm ? 5 : cell == CellKind::gru ? 4 : 0;
}

// One layer's sizes, and its arguments of the right shape, dtype and device.
class LayerCall {
 public:
  struct Direction {
    at::Tensor w_ih, w_hh, b_ih, b_hh, w_hr;  // contiguous; undefined where there is none
  };

  CellKind cell;
  bool packed, ragged, has_bias, projected;
  int64_t T, B, I, H, P, D, G;
  int64_t each;                       // parameters per direction
  at::Tensor x, h0, c0;               // as they came
  std::vector<Direction> directions;  // [D]
  std::vector<int64_t> sizes;         // packed: [T] rows of each step

  LayerCall(CellKind cell_, const at::Tensor& x_, const at::Tensor& h0_, const at::Tensor& c0_,
            at::TensorList params, const OptionalTensor& lengths, const OptionalTensor& batch_sizes,
            c10::DeviceType device)
      : cell(cell_),
        packed(batch_sizes.has_value()),
        ragged(lengths.has_value()),
        x(x_),
        h0(h0_),
        c0(c0_) {
    TORCH_CHECK(x.device().type() == device, "x: expected a ", c10::DeviceTypeName(device),
                " tensor, got ", x.device());
    TORCH_CHECK(x.dim() == (packed ? 2 : 3), "x: expected ", packed ? "[N, I]" : "[T, B, I]",
                ", got ", x.sizes());
    TORCH_CHECK(h0.dim() == 3 && (h0.size(0) == 1 || h0.size(0) == 2),
                "h0: expected [1 or 2, B, P], got ", h0.sizes());
    I = x.size(-1);
    D = h0.size(0);
    P = h0.size(2);
    G = gates_of(cell);
    each = int64_t(params.size()) / D;
    TORCH_CHECK(each * D == int64_t(params.size()) && each >= 2 && each <= 5,
                "params: expected 2 to 5 per direction, got ", params.size(), " for ", D);
    has_bias = each >= 4;
    projected = each % 2 == 1;
    TORCH_CHECK(!projected || cell == CellKind::lstm, "params: only an LSTM has a projection");
    H = projected ? params[size_t(each - 1)].size(-1) : P;
    TORCH_CHECK(!projected || H > 0, "w_hr: expected [P, H] with H > 0, got H = 0");
    if (packed) {
      TORCH_CHECK(!lengths, "lengths: not with batch_sizes");
      read(*batch_sizes);
    } else {
      T = x.size(0);
      B = x.size(1);
    }
    if (lengths)
      TORCH_CHECK(lengths->dim() == 1 && lengths->size(0) == B &&
                      lengths->scalar_type() == at::kLong && lengths->device() == x.device(),
                  "lengths: expected [B] = [", B, "] int64 on ", x.device(), ", got ",
                  lengths->sizes(), " ", lengths->scalar_type(), " on ", lengths->device());
    check("h0", h0, {D, B, P});
    if (cell == CellKind::lstm) check("c0", c0, {D, B, H});
    for (int64_t d = 0; d < D; d++) {
      const auto param = [&](int64_t i, const char* name, at::IntArrayRef shape) {
        const at::Tensor& tensor = params[size_t(d * each + i)];
        check(name, tensor, shape);
        return tensor.contiguous();
      };
      Direction w;
      w.w_ih = param(0, "w_ih", {G * H, I});
      w.w_hh = param(1, "w_hh", {G * H, P});
      if (has_bias) {
        w.b_ih = param(2, "b_ih", {G * H});
        w.b_hh = param(3, "b_hh", {G * H});
      }
      if (projected) w.w_hr = param(each - 1, "w_hr", {P, H});
      directions.push_back(w);
    }
  }

  void check(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) const {
    TORCH_CHECK(tensor.device() == x.device(), name, ": expected a tensor on ", x.device(),
                " as x, got ", tensor.device());
    TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, ": expected ", x.scalar_type(),
                " as x, got ", tensor.scalar_type());
    TORCH_CHECK(tensor.sizes() == shape, name, ": expected shape ", shape, ", got ",
                tensor.sizes());
  }

  // What backward is given besides. y and the gradients may have any strides.
  void check_backward(const OptionalTensor& dy, const OptionalTensor& dh_n,
                      const OptionalTensor& dc_n, const at::Tensor& y,
                      const at::Tensor& reserve) const {
    const std::vector<int64_t> y_shape = rows_shape(D * P);
    check("y", y, y_shape);
    if (dy) check("dy", *dy, y_shape);
    if (dh_n) check("dh_n", *dh_n, {D, B, P});
    if (dc_n && cell == CellKind::lstm) check("dc_n", *dc_n, {D, B, H});
    if (saved_of(cell) > 0) {
      check("reserve", reserve, reserve_shape());
      TORCH_CHECK(reserve.is_contiguous(), "reserve: expected it as forward returned it");
    }
  }

  // Rows of x: those of a padded batch count, too.
  int64_t rows_of_x() const { return packed ? x.size(0) : T * B; }

  // A tensor with a row per row of x.
  std::vector<int64_t> rows_shape(int64_t n) const {
    return packed ? std::vector<int64_t>{x.size(0), n} : std::vector<int64_t>{T, B, n};
  }

  std::vector<int64_t> reserve_shape() const {
    return {rows_of_x(), D * saved_of(cell) * ((H + 15) / 16 * 16)};
  }

 private:
  // T, B and the sizes of a packed batch.
  void read(const at::Tensor& batch_sizes) {
    const at::Tensor tensor = batch_sizes.contiguous();
    TORCH_CHECK(tensor.dim() == 1 && tensor.scalar_type() == at::kLong &&
                    tensor.device().is_cpu() && tensor.numel() > 0,
                "batch_sizes: expected a non-empty 1-D int64 CPU tensor, got ",
                tensor.scalar_type(), " ", tensor.sizes());
    T = tensor.size(0);
    const int64_t* size = tensor.const_data_ptr<int64_t>();
    sizes.assign(size, size + T);
    B = sizes[0];
    int64_t rows = 0;
    for (int64_t t = 0; t < T; rows += size[t++])
      TORCH_CHECK(size[t] >= 0 && (t == 0 || size[t] <= size[t - 1]),
                  "batch_sizes: expected sizes that do not grow, got ", size[t], " at step ", t);
    TORCH_CHECK(rows == x.size(0), "batch_sizes: their sum is ", rows, ", but x has ", x.size(0),
                " rows");
  }
};

}  // namespace seqkern
