// The arguments of one recurrent layer's call, checked the same way on every backend. What is
// computed is checked in Python (seqkern/ops); here only what could read or write out of bounds.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/stack.h>

#include "dtype.h"
#include "operators.h"
#include "params.h"

namespace seqkern {

// One layer's sizes, and its arguments of the right shape, dtype and device.
//
// An sLSTM's heads have nothing to do with one another: they are so many directions with a part of
// H each. D, H, P and everything of a direction count these; `heads` is 1 elsewhere.
class LayerCall {
 public:
  struct Direction {
    at::Tensor w_ih, w_hh, b_ih, b_hh, w_hr;  // contiguous; undefined where there is none
    std::vector<at::Tensor> own;
  };

  const CellShape& shape;
  CellKind cell;
  bool packed, ragged, projected, regularised;
  int64_t T, B, I, H, P, D, G, heads;
  size_t each;                        // parameters per direction
  at::Tensor x;                       // as it came
  std::vector<at::Tensor> states;     // [D, B, .]
  std::vector<Direction> directions;  // [D]
  std::vector<int64_t> sizes;         // packed: [T] rows of each step
  double cell_clip, proj_clip;        // bounds that x's dtype has

  LayerCall(const LayerArguments& a, c10::DeviceType device)
      : shape(cell_shape(a.cell)),
        cell(a.cell),
        packed(a.batch_sizes.has_value()),
        ragged(a.lengths.has_value()),
        regularised(a.regularised()),
        G(shape.input_gates),
        heads(1),
        each(kCommonParams + size_t(shape.own)),
        x(a.x),
        states(a.states) {
    TORCH_CHECK(x.device().type() == device, "x: expected a ", c10::DeviceTypeName(device),
                " tensor, got ", x.device());
    TORCH_CHECK(x.dim() == (packed ? 2 : 3), "x: expected ", packed ? "[N, I]" : "[T, B, I]",
                ", got ", x.sizes());
    TORCH_CHECK(int(states.size()) == shape.states, "states: expected ", shape.states, " for ",
                shape.name, ", got ", states.size());
    const at::Tensor& h0 = states[0];
    TORCH_CHECK(h0.dim() == 3 && (h0.size(0) == 1 || h0.size(0) == 2),
                "h0: expected [1 or 2, B, P], got ", h0.sizes());
    I = x.size(-1);
    D = h0.size(0);
    P = h0.size(2);
    TORCH_CHECK(a.params.size() == size_t(D) * each, "params: expected ", each,
                " per direction for ", shape.name, ", got ", a.params.size(), " for ", D);
    projected = a.params[4].defined();
    TORCH_CHECK(!projected || cell == CellKind::lstm, "params: only an LSTM has a projection");
    H = projected ? a.params[4].size(-1) : P;
    TORCH_CHECK(!projected || H > 0, "w_hr: expected [P, H] with H > 0, got H = 0");
    if (packed) {
      TORCH_CHECK(!a.lengths, "lengths: not with batch_sizes");
      read(*a.batch_sizes);
    } else {
      T = x.size(0);
      B = x.size(1);
    }
    if (a.lengths)
      TORCH_CHECK(a.lengths->dim() == 1 && a.lengths->size(0) == B &&
                      a.lengths->scalar_type() == at::kLong && a.lengths->device() == x.device(),
                  "lengths: expected [B] = [", B, "] int64 on ", x.device(), ", got ",
                  a.lengths->sizes(), " ", a.lengths->scalar_type(), " on ", a.lengths->device());
    check("h0", h0, {D, B, P});
    for (size_t k = 1; k < states.size(); k++) check(state_name(k), states[k], {D, B, H});
    if (a.mask) {
      TORCH_CHECK(a.mask->scalar_type() == at::kByte && a.mask->device() == x.device() &&
                      a.mask->sizes() == rows_shape(D * H),
                  "mask: expected uint8 ", rows_shape(D * H), " on ", x.device(), ", got ",
                  a.mask->scalar_type(), " ", a.mask->sizes(), " on ", a.mask->device());
    }
    if (a.scale) check("scale", *a.scale, {D, B, P});
    if (cell == CellKind::slstm) {
      const at::Tensor& w_hh = a.params[1];
      TORCH_CHECK(w_hh.defined() && w_hh.dim() == 3 && w_hh.size(0) > 0 && H % w_hh.size(0) == 0 &&
                      D * w_hh.size(0) <= kMostDirections,
                  "w_hh: expected [heads, 4*H/heads, H/heads] with at most ", kMostDirections / D,
                  " heads, got ", w_hh.sizes());
      heads = w_hh.size(0);
    }
    cell_clip = as_stored(a.cell_clip), proj_clip = as_stored(a.proj_clip);
    for (int64_t d = 0; d < D; d++) {
      const auto param = [&](size_t i, const char* name, at::IntArrayRef expected) {
        const at::Tensor& tensor = a.params[size_t(d) * each + i];
        if (!tensor.defined()) return tensor;
        check(name, tensor, expected);
        return tensor.contiguous();
      };
      const auto needed = [&](const at::Tensor& tensor, const char* name) {
        TORCH_CHECK(tensor.defined(), name, ": expected a tensor, got none");
        return tensor;
      };
      const int64_t hidden = shape.hidden_gates;
      Direction w;
      w.w_ih = needed(param(0, "w_ih", {G * H, I}), "w_ih");
      std::vector<int64_t> w_hh_shape{hidden * H, P};
      if (hidden == 0) w_hh_shape = {H};
      if (cell == CellKind::slstm) w_hh_shape = {heads, hidden * H / heads, H / heads};
      w.w_hh = needed(param(1, "w_hh", w_hh_shape), "w_hh");
      w.b_ih = param(2, "b_ih", {G * H});
      w.b_hh = param(3, "b_hh", {(hidden > 0 ? hidden : 1) * H});
      TORCH_CHECK(!shape.rows || !w.b_hh.defined(), "b_hh: ", shape.name, " has one bias, b_ih");
      w.w_hr = param(4, "w_hr", {P, H});
      TORCH_CHECK(w.w_hr.defined() == projected, "w_hr: expected one in each direction or in none");
      for (size_t i = 0; i < size_t(shape.own); i++) {
        const int gates = shape.own_gates[i];
        const int64_t rows = (gates > 0 ? gates : i == 0 ? G : hidden) * H;
        w.own.push_back(gates > 0 ? param(kCommonParams + i, "own", {rows})
                                  : needed(param(kCommonParams + i, "own", {rows, H}), "own"));
        if (shape.rows && i % 2 == 0) needed(w.own.back(), "gain");
        if (shape.mid == 0 && !shape.rows) needed(w.own.back(), "own");
      }
      directions.push_back(w);
    }
    if (cell == CellKind::slstm) part_heads();
  }

  static const char* state_name(size_t k) {
    constexpr const char* kNames[kMostStates] = {"h0", "c0", "n0 or d0", "m0"};
    return kNames[k];
  }

  static const char* gradient_name(size_t k) {
    constexpr const char* kNames[kMostStates] = {"dh_n", "dc_n", "dn_n or dd_n", "dm_n"};
    return kNames[k];
  }

  // A tensor per direction [D, B, H] as it is outside <-> with heads as directions.
  at::Tensor with_heads(const at::Tensor& tensor) const {
    if (heads == 1) return tensor;
    return tensor.reshape({D / heads, B, heads, H}).permute({0, 2, 1, 3}).reshape({D, B, H});
  }
  at::Tensor without_heads(const at::Tensor& tensor) const {
    if (heads == 1) return tensor;
    return tensor.reshape({D / heads, heads, B, H})
        .permute({0, 2, 1, 3})
        .reshape({D / heads, B, heads * H});
  }

  // Gradients made head by head, [D] of a direction's parameters each -> as the parameters are;
  // those in dparams that are undefined are not wanted.
  void join_heads(std::vector<at::Tensor>& dparams,
                  const std::vector<std::vector<at::Tensor>>& of_heads) const {
    for (size_t i = 0; i < dparams.size(); i++) {
      if (!dparams[i].defined()) continue;
      const size_t d = i / each, k = i % each;
      std::vector<at::Tensor> parts;
      for (int64_t n = 0; n < heads; n++)
        parts.push_back(of_heads[d * size_t(heads) + size_t(n)][k]);
      const at::Tensor stacked = at::stack(parts);  // [heads, G*H, ..]
      dparams[i] =
          k == 1 ? stacked
                 : stacked.view({heads, G, H, -1}).transpose(0, 1).reshape(dparams[i].sizes());
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
  void check_backward(const BackwardArguments& back) const {
    const std::vector<int64_t> y_shape = rows_shape(D * P);
    check("y", back.y, y_shape);
    if (back.dy) check("dy", *back.dy, y_shape);
    TORCH_CHECK(back.dstates.size() == states.size(), "gradients of states: expected ",
                states.size(), ", got ", back.dstates.size());
    for (size_t k = 0; k < states.size(); k++)
      if (back.dstates[k])
        check(gradient_name(k), *back.dstates[k], {D / heads, B, (k == 0 ? P : H) * heads});
    if (reserve_width(shape, regularised, H) > 0) {
      check("reserve", back.reserve, reserve_shape());
      TORCH_CHECK(back.reserve.is_contiguous(), "reserve: expected it as forward returned it");
    }
  }

  // Rows of x: those of a padded batch count, too.
  int64_t rows_of_x() const { return packed ? x.size(0) : T * B; }

  // A tensor with a row per row of x.
  std::vector<int64_t> rows_shape(int64_t n) const {
    return packed ? std::vector<int64_t>{x.size(0), n} : std::vector<int64_t>{T, B, n};
  }

  bool reserves() const { return reserve_width(shape, regularised, 1) > 0; }
  std::vector<int64_t> reserve_shape() const {
    return {rows_of_x(), D * reserve_width(shape, regularised, H)};
  }

 private:
  // A bound as the values that it bounds are stored: backward finds them by it.
  double as_stored(double bound) const {
    switch (x.scalar_type()) {
      case at::kHalf:
        return double(static_cast<float>(at::Half(static_cast<float>(bound))));
      case at::kBFloat16:
        return double(static_cast<float>(at::BFloat16(static_cast<float>(bound))));
      case at::kFloat:
        return double(static_cast<float>(bound));
      default:
        return bound;
    }
  }

  // From here on a head is a direction.
  void part_heads() {
    const int64_t N = heads;
    D *= N, H /= N, P /= N;
    for (at::Tensor& state : states) state = with_heads(state);
    std::vector<Direction> parted;
    for (const Direction& w : directions)
      for (int64_t n = 0; n < N; n++) {
        const auto part = [&](const at::Tensor& tensor, int64_t columns) {
          return tensor.defined() ? tensor.view({G, N, H, columns})
                                        .select(1, n)
                                        .reshape({G * H, columns})
                                        .contiguous()
                                  : tensor;
        };
        Direction of;
        of.w_ih = part(w.w_ih, I);
        of.w_hh = w.w_hh.select(0, n).contiguous();
        of.b_ih = w.b_ih.defined() ? part(w.b_ih, 1).view({G * H}) : w.b_ih;
        of.b_hh = w.b_hh.defined() ? part(w.b_hh, 1).view({G * H}) : w.b_hh;
        parted.push_back(of);
      }
    directions = parted;
  }

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
