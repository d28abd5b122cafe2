#include "layer.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>

#include "dispatch.h"
#include "launch.h"

namespace seqkern {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

int64_t gates_of(CellKind cell) {
  return cell == CellKind::lstm ? 4 : cell == CellKind::gru ? 3 : 1;
}
int64_t saved_of(CellKind cell) {
  return cell == CellKind::lstm ? 5 : cell == CellKind::gru ? 4 : 0;
}

void check(const char* name, const Tensor& tensor, const Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.device().is_cpu(), name, ": expected a CPU tensor, got ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, ": expected ", x.scalar_type(),
              " as x, got ", tensor.scalar_type());
  TORCH_CHECK(tensor.sizes() == shape, name, ": expected shape ", shape, ", got ", tensor.sizes());
}

// A tensor whose rows are contiguous: itself where it can be.
Tensor with_rows(const Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// One layer's call, its arguments checked: sizes, the order of the rows, and the tensors kept
// alive.
class Call {
 public:
  Call(CellKind cell, const Tensor& x_, const Tensor& h0_, const Tensor& c0_, at::TensorList params,
       const OptionalTensor& lengths, const OptionalTensor& batch_sizes)
      : cell(cell), packed(batch_sizes.has_value()), ragged(lengths.has_value()) {
    TORCH_CHECK(x_.device().is_cpu(), "x: expected a CPU tensor, got ", x_.device());
    TORCH_CHECK(x_.dim() == (packed ? 2 : 3), "x: expected ", packed ? "[N, I]" : "[T, B, I]",
                ", got ", x_.sizes());
    TORCH_CHECK(h0_.dim() == 3 && (h0_.size(0) == 1 || h0_.size(0) == 2),
                "h0: expected [1 or 2, B, P], got ", h0_.sizes());
    x = with_rows(x_);
    I = x.size(-1);
    D = h0_.size(0);
    P = h0_.size(2);
    G = gates_of(cell);
    const int64_t each = int64_t(params.size()) / D;
    TORCH_CHECK(each * D == int64_t(params.size()) && each >= 2 && each <= 5,
                "params: expected 2 to 5 per direction, got ", params.size(), " for ", D);
    has_bias = each >= 4;
    projected = each % 2 == 1;
    TORCH_CHECK(!projected || cell == CellKind::lstm, "params: only an LSTM has a projection");
    H = projected ? params[each - 1].size(-1) : P;
    order(lengths, batch_sizes);
    check("h0", h0_, x, {D, B, P});
    h0 = h0_.contiguous();
    if (cell == CellKind::lstm) {
      check("c0", c0_, x, {D, B, H});
      c0 = c0_.contiguous();
    }
    for (int64_t d = 0; d < D; d++) {
      const auto param = [&](int64_t i, const char* name, at::IntArrayRef shape) {
        check(name, params[d * each + i], x, shape);
        weights.push_back(params[d * each + i].contiguous());
        return weights.back().const_data_ptr();
      };
      Weights& w = kernel_weights[d];
      w = {};
      w.w_ih = param(0, "w_ih", {G * H, I});
      w.w_hh = param(1, "w_hh", {G * H, P});
      if (has_bias) {
        w.b_ih = param(2, "b_ih", {G * H});
        w.b_hh = param(3, "b_hh", {G * H});
      }
      if (projected) w.w_hr = param(each - 1, "w_hr", {P, H});
    }
  }

  void fill(LayerParams& p) const {
    p.cell = cell;
    p.dtype = dtype_of(x);
    p.I = I, p.H = H, p.P = P, p.D = D;
    // A few thousand multiplications are done before a second thread has woken up.
    const double work = double(rows + 1) * double(D * G * H) * double(I + P);
    p.threads = at::in_parallel_region() || work < 65536 ? 1 : at::get_num_threads();
    p.seq = {T, B, rows, active.data(), first.data(), row.data()};
    p.weights[0] = kernel_weights[0];
    p.weights[1] = kernel_weights[1];
    p.x = rows_of(x, x_step);
    p.h0 = h0.const_data_ptr();
    p.c0 = cell == CellKind::lstm ? c0.const_data_ptr() : nullptr;
  }

  // Where a [T, B, n] or [N, n] tensor's rows lie; step is filled and must outlive the result.
  RowTensor rows_of(const Tensor& tensor, std::vector<int64_t>& step) const {
    step.resize(size_t(T));
    for (int64_t t = 0; t < T; t++)
      step[size_t(t)] = tensor.stride(0) * (packed ? first[size_t(t)] : t);
    return {const_cast<void*>(tensor.const_data_ptr()), step.data(), tensor.stride(packed ? 0 : 1)};
  }

  // A result with a row per row of x. Rows past a length must be zero, and no kernel writes them.
  Tensor new_rows(int64_t n) const {
    if (packed) return new_empty({rows, n}, x.options());
    Tensor tensor = new_empty({T, B, n}, x.options());
    return ragged ? tensor.zero_() : tensor;
  }

  std::vector<int64_t> reserve_shape() const {
    return {packed ? rows : T * B, D * saved_of(cell) * ((H + 15) / 16 * 16)};
  }

  CellKind cell;
  bool packed, ragged, has_bias, projected;
  int64_t T, B, I, H, P, D, G, rows;
  Tensor x, h0, c0;
  mutable std::vector<int64_t> x_step, y_step, dy_step, dx_step;

 private:
  // T, B, rows and the sorted order of the rows.
  void order(const OptionalTensor& lengths, const OptionalTensor& batch_sizes) {
    if (packed) {
      TORCH_CHECK(!lengths, "lengths: not with batch_sizes");
      const Tensor sizes = batch_sizes->contiguous();
      TORCH_CHECK(sizes.dim() == 1 && sizes.scalar_type() == at::kLong && sizes.device().is_cpu() &&
                      sizes.numel() > 0,
                  "batch_sizes: expected a non-empty 1-D int64 CPU tensor, got ",
                  sizes.scalar_type(), " ", sizes.sizes());
      T = sizes.size(0);
      const int64_t* size = sizes.const_data_ptr<int64_t>();
      active.assign(size, size + T);
      B = active[0];
      for (int64_t t = 0; t < T; t++)
        TORCH_CHECK(size[t] >= 0 && (t == 0 || size[t] <= size[t - 1]),
                    "batch_sizes: expected sizes that do not grow, got ", size[t], " at step ", t);
    } else {
      T = x.size(0);
      B = x.size(1);
      active.assign(size_t(T), B);
    }
    row.resize(size_t(B));
    std::iota(row.begin(), row.end(), int64_t(0));
    if (lengths) {
      const Tensor len = lengths->contiguous();
      TORCH_CHECK(len.dim() == 1 && len.size(0) == B && len.scalar_type() == at::kLong &&
                      len.device().is_cpu(),
                  "lengths: expected [B] = [", B, "] int64 on the CPU, got ", len.sizes(), " ",
                  len.scalar_type());
      const int64_t* n = len.const_data_ptr<int64_t>();
      std::fill(active.begin(), active.end(), 0);
      for (int64_t b = 0; b < B; b++) {
        TORCH_CHECK_VALUE(n[b] >= 0 && n[b] <= T, "lengths: expected 0 to T = ", T, ", got ", n[b],
                          " at ", b);
        if (n[b] > 0) active[size_t(n[b] - 1)]++;
      }
      for (int64_t t = T - 2; t >= 0; t--) active[size_t(t)] += active[size_t(t + 1)];
      std::stable_sort(row.begin(), row.end(), [n](int64_t a, int64_t b) { return n[a] > n[b]; });
    }
    first.resize(size_t(T));
    rows = 0;
    for (int64_t t = 0; t < T; t++) {
      first[size_t(t)] = rows;
      rows += active[size_t(t)];
    }
    TORCH_CHECK(!packed || rows == x.size(0), "batch_sizes: their sum is ", rows, ", but x has ",
                x.size(0), " rows");
  }

  std::vector<int64_t> active, first, row;
  std::vector<Tensor> weights;
  Weights kernel_weights[2];
};

}  // namespace

ForwardResult layer_forward(CellKind cell, const Tensor& x, const Tensor& h0, const Tensor& c0,
                            at::TensorList params, const OptionalTensor& lengths,
                            const OptionalTensor& batch_sizes, bool save) {
  const Call call(cell, x, h0, c0, params, lengths, batch_sizes);
  ForwardResult result;
  result.y = call.new_rows(call.D * call.P);
  result.h_n = at::empty({call.D, call.B, call.P}, x.options());
  if (cell == CellKind::lstm) result.c_n = at::empty({call.D, call.B, call.H}, x.options());
  const bool reserves = save && saved_of(cell) > 0;
  result.reserve =
      reserves ? new_empty(call.reserve_shape(), x.options()) : at::empty({0}, x.options());
  if (call.B == 0 || call.H == 0) return result;

  ForwardParams p{};
  call.fill(p);
  p.y = call.rows_of(result.y, call.y_step);
  p.h_n = result.h_n.mutable_data_ptr();
  p.c_n = cell == CellKind::lstm ? result.c_n.mutable_data_ptr() : nullptr;
  p.reserve = reserves ? result.reserve.mutable_data_ptr() : nullptr;
  const KernelTable& kernel = kernels();
  launch(p, kernel.forward_scratch, kernel.forward);
  return result;
}

BackwardResult layer_backward(CellKind cell, const OptionalTensor& dy, const OptionalTensor& dh_n,
                              const OptionalTensor& dc_n, const Tensor& x, const Tensor& h0,
                              const Tensor& c0, at::TensorList params,
                              const OptionalTensor& lengths, const OptionalTensor& batch_sizes,
                              const Tensor& y, const Tensor& reserve, bool need_dx,
                              bool need_dparams) {
  const Call call(cell, x, h0, c0, params, lengths, batch_sizes);
  const auto options = x.options();
  BackwardResult result;
  result.dx = need_dx ? call.new_rows(call.I) : at::empty({0}, options);
  result.dh0 = at::empty({call.D, call.B, call.P}, options);
  if (cell == CellKind::lstm) result.dc0 = at::empty({call.D, call.B, call.H}, options);
  if (need_dparams)
    for (const Tensor& param : params) result.dparams.push_back(at::empty(param.sizes(), options));
  if (call.B == 0 || call.H == 0) {
    for (Tensor& dparam : result.dparams) dparam.zero_();
    return result;
  }

  const Tensor y_rows = with_rows(y);
  const std::vector<int64_t> y_shape = call.packed
                                           ? std::vector<int64_t>{call.rows, call.D * call.P}
                                           : std::vector<int64_t>{call.T, call.B, call.D * call.P};
  check("y", y_rows, x, y_shape);
  if (saved_of(cell) > 0) {
    check("reserve", reserve, x, call.reserve_shape());
    TORCH_CHECK(reserve.is_contiguous(), "reserve: expected it as forward returned it");
  }

  BackwardParams p{};
  call.fill(p);
  p.y = call.rows_of(y_rows, call.y_step);
  p.reserve = saved_of(cell) > 0 ? const_cast<void*>(reserve.const_data_ptr()) : nullptr;
  Tensor dy_rows, dh_rows, dc_rows;
  if (dy) {
    check("dy", *dy, x, y_shape);
    dy_rows = with_rows(*dy);
    p.dy = call.rows_of(dy_rows, call.dy_step);
  }
  if (dh_n) {
    check("dh_n", *dh_n, x, {call.D, call.B, call.P});
    dh_rows = dh_n->contiguous();
    p.dh_n = dh_rows.const_data_ptr();
  }
  if (dc_n && cell == CellKind::lstm) {
    check("dc_n", *dc_n, x, {call.D, call.B, call.H});
    dc_rows = dc_n->contiguous();
    p.dc_n = dc_rows.const_data_ptr();
  }
  if (need_dx) p.dx = call.rows_of(result.dx, call.dx_step);
  p.dh0 = result.dh0.mutable_data_ptr();
  p.dc0 = cell == CellKind::lstm ? result.dc0.mutable_data_ptr() : nullptr;
  p.need_dweights = need_dparams;
  if (need_dparams) {
    const size_t each = params.size() / size_t(call.D);
    for (size_t d = 0; d < size_t(call.D); d++) {
      const auto data = [&](size_t i) { return result.dparams[d * each + i].mutable_data_ptr(); };
      p.dweights[d] = {data(0), data(1), call.has_bias ? data(2) : nullptr,
                       call.has_bias ? data(3) : nullptr,
                       call.projected ? data(each - 1) : nullptr};
    }
  }
  const KernelTable& kernel = kernels();
  launch(p, kernel.backward_scratch, kernel.backward);
  return result;
}

}  // namespace seqkern
