// The torch side of one recurrent layer on the CPU: allocates, calls the kernels.
#include "../layer_checks.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
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
  explicit Call(const LayerArguments& a) : LayerCall(a, at::kCPU), arguments(a) {
    x = with_rows(x);
    for (Tensor& state : states) state = state.contiguous();
    if (a.mask) mask = with_rows(*a.mask);
    if (a.scale) scale = with_heads(*a.scale).contiguous();
    order(a.lengths);
  }

  void fill(LayerParams& p) const {
    p.cell = cell;
    p.dtype = dtype_of(x);
    p.I = I, p.H = H, p.P = P, p.D = D;
    p.reverse = D / heads == 2 ? heads : D;
    // A few thousand multiplications are done before a second thread has woken up.
    const double work = double(rows + 1) * double(D * G * H) * double(I + P);
    p.threads = at::in_parallel_region() || work < 65536 ? 1 : at::get_num_threads();
    p.seq = {T, B, rows, active.data(), first.data(), row.data()};
    for (int64_t d = 0; d < D; d++) {
      const auto data = [](const Tensor& w) { return w.defined() ? w.const_data_ptr() : nullptr; };
      const Direction& w = directions[size_t(d)];
      p.weights[d] = {data(w.w_ih), data(w.w_hh), data(w.b_ih), data(w.b_hh), data(w.w_hr), {}};
      for (size_t i = 0; i < w.own.size(); i++) p.weights[d].own[i] = data(w.own[i]);
    }
    p.x = rows_of(x, x_step);
    p.h0 = states[0].const_data_ptr();
    for (size_t k = 1; k < states.size(); k++) p.state0[k - 1] = states[k].const_data_ptr();
    p.regularisers.on = regularised;
    if (mask.defined()) p.regularisers.mask = rows_of(mask, mask_step);
    if (scale.defined()) p.regularisers.scale = scale.const_data_ptr();
    p.regularisers.keep_h = arguments.keep_h, p.regularisers.keep_c = arguments.keep_c;
    p.regularisers.candidate_scale = arguments.candidate_scale;
    p.regularisers.cell_clip = cell_clip;
    p.regularisers.proj_clip = proj_clip;
    p.eps = arguments.eps;
  }

  Tensor new_state(size_t k) const { return at::empty({D, B, k == 0 ? P : H}, x.options()); }

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
  mutable std::vector<int64_t> x_step, y_step, dy_step, dx_step, mask_step;

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

  const LayerArguments& arguments;
  Tensor mask, scale;
  std::vector<int64_t> active, first, row;
};

ForwardResult layer_forward(const LayerArguments& a, bool save) {
  const Call call(a);
  const auto options = call.x.options();
  ForwardResult result;
  result.y = call.new_rows(call.D * call.P);
  for (size_t k = 0; k < call.states.size(); k++) result.states.push_back(call.new_state(k));
  const bool reserves = save && call.reserves();
  result.reserve = reserves ? new_empty(call.reserve_shape(), options) : at::empty({0}, options);
  if (call.B > 0 && call.H > 0) {
    ForwardParams p{};
    call.fill(p);
    p.y = call.rows_of(result.y, call.y_step);
    p.h_n = result.states[0].mutable_data_ptr();
    for (size_t k = 1; k < result.states.size(); k++)
      p.state_n[k - 1] = result.states[k].mutable_data_ptr();
    p.reserve = reserves ? result.reserve.mutable_data_ptr() : nullptr;
    const KernelTable& kernel = kernels();
    launch(p, kernel.forward_scratch, kernel.forward);
  }
  for (Tensor& state : result.states) state = call.without_heads(state);
  return result;
}

BackwardResult layer_backward(const LayerArguments& a, const BackwardArguments& back) {
  const Call call(a);
  call.check_backward(back);
  const auto options = call.x.options();
  BackwardResult result;
  result.dx = back.need_dx ? call.new_rows(call.I) : at::empty({0}, options);
  for (size_t k = 0; k < call.states.size(); k++) result.dstates.push_back(call.new_state(k));
  if (back.need_dparams)
    for (const Tensor& param : a.params)
      result.dparams.push_back(param.defined() ? at::empty(param.sizes(), options) : Tensor());
  if (call.B == 0 || call.H == 0) {
    result.dx.zero_();
    for (Tensor& dparam : result.dparams)
      if (dparam.defined()) dparam.zero_();
    for (Tensor& dstate : result.dstates) dstate = call.without_heads(dstate);
    return result;
  }

  const Tensor y_rows = with_rows(back.y);
  BackwardParams p{};
  call.fill(p);
  p.y = call.rows_of(y_rows, call.y_step);
  p.reserve = call.reserves() ? const_cast<void*>(back.reserve.const_data_ptr()) : nullptr;
  Tensor dy_rows;
  if (back.dy) {
    dy_rows = with_rows(*back.dy);
    p.dy = call.rows_of(dy_rows, call.dy_step);
  }
  std::vector<Tensor> dfinals;
  for (size_t k = 0; k < call.states.size(); k++) {
    const OptionalTensor& given = back.dstates[k];
    dfinals.push_back(given ? call.with_heads(*given).contiguous() : Tensor());
    const void* data = given ? dfinals[k].const_data_ptr() : nullptr;
    void* to = result.dstates[k].mutable_data_ptr();
    if (k == 0)
      p.dh_n = data, p.dh0 = to;
    else
      p.dstate_n[k - 1] = data, p.dstate0[k - 1] = to;
  }
  if (back.need_dx) p.dx = call.rows_of(result.dx, call.dx_step);
  p.need_dweights = back.need_dparams;
  std::vector<std::vector<Tensor>> of_heads;  // [D][each]
  for (size_t d = 0; back.need_dparams && d < size_t(call.D); d++) {
    std::vector<Tensor> mine;
    if (call.heads > 1) {
      const LayerCall::Direction& w = call.directions[d];
      for (const Tensor& weight : {w.w_ih, w.w_hh, w.b_ih, w.b_hh, w.w_hr})
        mine.push_back(weight.defined() ? at::empty(weight.sizes(), options) : Tensor());
    } else {
      const auto begin = result.dparams.begin() + std::ptrdiff_t(d * call.each);
      mine.assign(begin, begin + std::ptrdiff_t(call.each));
    }
    const auto data = [&](size_t i) {
      return mine[i].defined() ? mine[i].mutable_data_ptr() : nullptr;
    };
    p.dweights[d] = {data(0), data(1), data(2), data(3), data(4), {}};
    for (size_t i = 0; i < size_t(call.shape.own); i++)
      p.dweights[d].own[i] = data(kCommonParams + i);
    of_heads.push_back(mine);
  }
  const KernelTable& kernel = kernels();
  launch(p, kernel.backward_scratch, kernel.backward);
  if (call.heads > 1) call.join_heads(result.dparams, of_heads);
  for (Tensor& dstate : result.dstates) dstate = call.without_heads(dstate);
  return result;
}

Tensor recurrent_mask(const Tensor& seed, at::ArrayRef<double> probabilities, const Tensor& t,
                      const Tensor& b, int64_t layer, int64_t D, int64_t H) {
  TORCH_CHECK(seed.scalar_type() == at::kLong && seed.numel() == 1,
              "seed: expected [1] int64, got ", seed.sizes(), " ", seed.scalar_type());
  TORCH_CHECK(probabilities.size() == 3, "probabilities: expected 3, got ", probabilities.size());
  TORCH_CHECK(
      t.scalar_type() == at::kLong && b.scalar_type() == at::kLong && t.sizes() == b.sizes(),
      "t and b: expected int64 of one shape, got ", t.scalar_type(), " ", t.sizes(), " and ",
      b.scalar_type(), " ", b.sizes());
  TORCH_CHECK(D >= 0 && H >= 0, "D, H: expected sizes, got ", D, ", ", H);
  const Tensor steps = t.contiguous(), rows = b.contiguous();
  std::vector<int64_t> shape = t.sizes().vec();
  shape.push_back(D * H);
  const Tensor mask = new_empty(shape, seed.options().dtype(at::kByte));
  if (mask.numel() == 0) return mask;
  MaskParams p{};
  p.rows = t.numel(), p.D = D, p.H = H;
  p.threads = at::in_parallel_region() || mask.numel() < 65536 ? 1 : at::get_num_threads();
  p.seed = *seed.const_data_ptr<int64_t>();
  p.t = steps.const_data_ptr<int64_t>(), p.b = rows.const_data_ptr<int64_t>();
  for (size_t i = 0; i < 3; i++)
    p.threshold[i] = uint32_t(std::nearbyint(probabilities[i] * 65536));
  constexpr int kPurposes = 8;  // of one stream; a layer has two
  p.first_stream = layer * 2 * kPurposes, p.stream_step = kPurposes;
  p.mask = mask.mutable_data_ptr<uint8_t>();
  kernels().recurrent_mask(p);
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(seqkern, CPU, library) {
  using Operators = LayerOperators<layer_forward, layer_backward>;
  Operators::implement(library);
  Operators::implement_recurrent(library);
  library.impl("recurrent_mask", &recurrent_mask);
}

}  // namespace seqkern
