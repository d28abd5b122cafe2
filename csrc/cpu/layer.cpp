// The torch side of one recurrent layer on the CPU: allocates, calls the kernels.
#include "../layer_checks.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>

#include "dispatch.h"
#include "launch.h"

namespace seqkern {
namespace {

using at::Tensor;

// A tensor whose rows are contiguous: itself where it can be.
Tensor with_rows(const Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// One layer's call: the order of the rows, and the tensors kept alive.
class Call : public LayerCall {
 public:
  Call(CellKind cell_, const Tensor& x_, const Tensor& h0_, const Tensor& c0_,
       at::TensorList params, const OptionalTensor& lengths, const OptionalTensor& batch_sizes)
      : LayerCall(cell_, x_, h0_, c0_, params, lengths, batch_sizes, at::kCPU) {
    x = with_rows(x);
    h0 = h0.contiguous();
    if (cell == CellKind::lstm) c0 = c0.contiguous();
    order(lengths);
    for (int64_t d = 0; d < D; d++) {
      const auto data = [](const Tensor& w) { return w.defined() ? w.const_data_ptr() : nullptr; };
      const Direction& w = directions[size_t(d)];
      kernel_weights[d] = {data(w.w_ih), data(w.w_hh), data(w.b_ih), data(w.b_hh), data(w.w_hr)};
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
    Tensor tensor = new_empty(rows_shape(n), x.options());
    return ragged ? tensor.zero_() : tensor;
  }

  int64_t rows;  // that are valid
  mutable std::vector<int64_t> x_step, y_step, dy_step, dx_step;

 private:
  // The valid rows and their sorted order.
  void order(const OptionalTensor& lengths) {
    active = sizes;
    if (!packed) active.assign(size_t(T), B);
    row.resize(size_t(B));
    std::iota(row.begin(), row.end(), int64_t(0));
    if (lengths) {
      const Tensor len = lengths->contiguous();
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
  }

  std::vector<int64_t> active, first, row;
  Weights kernel_weights[2];
};

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
  call.check_backward(dy, dh_n, dc_n, y, reserve);
  const auto options = x.options();
  BackwardResult result;
  result.dx = need_dx ? call.new_rows(call.I) : at::empty({0}, options);
  result.dh0 = at::empty({call.D, call.B, call.P}, options);
  if (cell == CellKind::lstm) result.dc0 = at::empty({call.D, call.B, call.H}, options);
  if (need_dparams)
    for (const Tensor& param : params) result.dparams.push_back(at::empty(param.sizes(), options));
  if (call.B == 0 || call.H == 0) {
    result.dx.zero_();
    for (Tensor& dparam : result.dparams) dparam.zero_();
    return result;
  }

  const Tensor y_rows = with_rows(y);
  BackwardParams p{};
  call.fill(p);
  p.y = call.rows_of(y_rows, call.y_step);
  p.reserve = saved_of(cell) > 0 ? const_cast<void*>(reserve.const_data_ptr()) : nullptr;
  Tensor dy_rows, dh_rows, dc_rows;
  if (dy) {
    dy_rows = with_rows(*dy);
    p.dy = call.rows_of(dy_rows, call.dy_step);
  }
  if (dh_n) {
    dh_rows = dh_n->contiguous();
    p.dh_n = dh_rows.const_data_ptr();
  }
  if (dc_n && cell == CellKind::lstm) {
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

}  // namespace

TORCH_LIBRARY_IMPL(seqkern, CPU, library) {
  LayerOperators<layer_forward, layer_backward>::implement(library);
}

}  // namespace seqkern
