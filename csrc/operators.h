// The recurrent layers' operators, once for every backend: their schemas, and how they are
// registered for a backend that has the two functions below.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "params.h"

namespace seqkern {

using OptionalTensor = std::optional<at::Tensor>;

constexpr size_t kCommonParams = 5;  // w_ih, w_hh, b_ih, b_hh, w_hr: after these come a cell's own

// One layer's call. params: per direction kCommonParams and the cell's own, undefined where there
// is none.
struct LayerArguments {
  CellKind cell;
  at::Tensor x;                    // [T, B, I], or [N, I] with batch_sizes
  std::vector<at::Tensor> states;  // [D, B, P], then [D, B, H] each
  std::vector<at::Tensor> params;
  OptionalTensor lengths;      // [B] int64
  OptionalTensor batch_sizes;  // [T] int64
  // Regularisers, as params.h has them.
  OptionalTensor mask;   // [T, B, D*H] or [N, D*H] uint8
  OptionalTensor scale;  // [D, B, P]
  double keep_h = 0, keep_c = 0, candidate_scale = 1;
  double cell_clip = std::numeric_limits<double>::infinity();
  double proj_clip = std::numeric_limits<double>::infinity();
  double eps = 0;

  bool regularised() const {
    constexpr double kNone = std::numeric_limits<double>::infinity();
    return mask || keep_h != 0 || keep_c != 0 || cell_clip != kNone || proj_clip != kNone;
  }
};

struct ForwardResult {
  at::Tensor y;
  std::vector<at::Tensor> states;  // the final ones
  at::Tensor reserve;
};

struct BackwardArguments {
  OptionalTensor dy;
  std::vector<OptionalTensor> dstates;  // of the final states
  at::Tensor y, reserve;
  bool need_dx, need_dparams;
};

struct BackwardResult {
  at::Tensor dx;
  std::vector<at::Tensor> dstates;  // of the initial states
  std::vector<at::Tensor> dparams;  // none, or as params
};

using LayerForward = ForwardResult(const LayerArguments& layer, bool save);
using LayerBackward = BackwardResult(const LayerArguments& layer, const BackwardArguments& back);

// One recurrent layer each. x [T, B, I], or [N, I] with batch_sizes; h0 [D, B, P]; c0 [D, B, H];
// params: per direction w_ih, w_hh[, b_ih, b_hh][, w_hr]; lengths [B] int64; batch_sizes [T] int64;
// reserve: what backward needs, opaque. What they compute: seqkern/reference.
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
  // Any cell by its name in cells.h, with all of LayerArguments; dparams as params, empty where
  // there is none.
#define SEQKERN_ARGUMENTS                                                               \
  "Tensor x, Tensor[] states, Tensor?[] params, Tensor? lengths, Tensor? batch_sizes, " \
  "Tensor? mask, Tensor? scale, float keep_h, float keep_c, float candidate_scale, "    \
  "float cell_clip, float proj_clip, float eps"
  library.def("recurrent_forward(str cell, " SEQKERN_ARGUMENTS
              ", bool save) -> (Tensor y, Tensor[] finals, Tensor reserve)");
  library.def("recurrent_backward(str cell, Tensor? dy, Tensor?[] dfinals, " SEQKERN_ARGUMENTS
              ", Tensor y, Tensor reserve, bool need_dx, bool need_dparams)"
              " -> (Tensor dx, Tensor[] dstates, Tensor[] dparams)");
#undef SEQKERN_ARGUMENTS
  // uint8 [*, D*H] for t and b int64 [*]: seqkern/reference/masks.py.
  library.def(
      "recurrent_mask(Tensor seed, float[] probabilities, Tensor t, Tensor b, int layer, int D, "
      "int H) -> Tensor");
}

inline CellKind cell_named(const std::string& name) {
  for (int i = 0; i < kCells; i++)
    if (name == kCellShapes[i].name) return CellKind(i);
  std::string known;
  for (const CellShape& shape : kCellShapes)
    known += std::string(known.empty() ? "" : ", ") + shape.name;
  TORCH_CHECK_VALUE(false, "cell: expected one of ", known, ", got ", name);
}

// The operators of a backend whose layers are `forward` and `backward`.
template <LayerForward* forward, LayerBackward* backward>
struct LayerOperators {
  using Tensor = at::Tensor;
  using Tensors = std::vector<Tensor>;
  using List = at::TensorList;
  using Optional = OptionalTensor;
  using OptionalList = c10::List<std::optional<Tensor>>;

  static CellKind rnn_cell(bool relu) { return relu ? CellKind::rnn_relu : CellKind::rnn_tanh; }

  // torch.nn's cells: without regularisers, and parameters only where there are some.
  static LayerArguments plain(CellKind cell, const Tensor& x, Tensors states, List params,
                              const Optional& lengths, const Optional& batch_sizes) {
    LayerArguments layer{cell, x, std::move(states), {}, lengths, batch_sizes, {}, {}};
    const Tensor& h0 = layer.states[0];
    TORCH_CHECK(h0.dim() == 3 && (h0.size(0) == 1 || h0.size(0) == 2),
                "h0: expected [1 or 2, B, P], got ", h0.sizes());
    const size_t D = size_t(h0.size(0)), each = params.size() / D;
    TORCH_CHECK(each * D == params.size() && each >= 2 && each <= kCommonParams,
                "params: expected 2 to 5 per direction, got ", params.size(), " for ", D);
    for (size_t d = 0; d < D; d++) {
      const List of = params.slice(d * each, each);
      layer.params.insert(layer.params.end(), {of[0], of[1]});
      layer.params.push_back(each >= 4 ? of[2] : Tensor());
      layer.params.push_back(each >= 4 ? of[3] : Tensor());
      layer.params.push_back(each % 2 == 1 ? of[each - 1] : Tensor());
    }
    return layer;
  }

  static Tensors defined(const Tensors& tensors) {
    Tensors found;
    for (const Tensor& tensor : tensors)
      if (tensor.defined()) found.push_back(tensor);
    return found;
  }

  static std::tuple<Tensor, Tensor, Tensor> rnn_forward(const Tensor& x, const Tensor& h0,
                                                        List params, const Optional& lengths,
                                                        const Optional& batch_sizes, bool relu,
                                                        bool save) {
    ForwardResult r = forward(plain(rnn_cell(relu), x, {h0}, params, lengths, batch_sizes), save);
    return {r.y, r.states[0], r.reserve};
  }

  static std::tuple<Tensor, Tensor, Tensors> rnn_backward(
      const Optional& dy, const Optional& dh_n, const Tensor& x, const Tensor& h0, List params,
      const Optional& lengths, const Optional& batch_sizes, const Tensor& y, const Tensor& reserve,
      bool relu, bool need_dx, bool need_dparams) {
    BackwardResult r = backward(plain(rnn_cell(relu), x, {h0}, params, lengths, batch_sizes),
                                {dy, {dh_n}, y, reserve, need_dx, need_dparams});
    return {r.dx, r.dstates[0], defined(r.dparams)};
  }

  static std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& x, const Tensor& h0,
                                                        List params, const Optional& lengths,
                                                        const Optional& batch_sizes, bool save) {
    ForwardResult r = forward(plain(CellKind::gru, x, {h0}, params, lengths, batch_sizes), save);
    return {r.y, r.states[0], r.reserve};
  }

  static std::tuple<Tensor, Tensor, Tensors> gru_backward(const Optional& dy, const Optional& dh_n,
                                                          const Tensor& x, const Tensor& h0,
                                                          List params, const Optional& lengths,
                                                          const Optional& batch_sizes,
                                                          const Tensor& y, const Tensor& reserve,
                                                          bool need_dx, bool need_dparams) {
    BackwardResult r = backward(plain(CellKind::gru, x, {h0}, params, lengths, batch_sizes),
                                {dy, {dh_n}, y, reserve, need_dx, need_dparams});
    return {r.dx, r.dstates[0], defined(r.dparams)};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_forward(const Tensor& x, const Tensor& h0,
                                                                 const Tensor& c0, List params,
                                                                 const Optional& lengths,
                                                                 const Optional& batch_sizes,
                                                                 bool save) {
    ForwardResult r =
        forward(plain(CellKind::lstm, x, {h0, c0}, params, lengths, batch_sizes), save);
    return {r.y, r.states[0], r.states[1], r.reserve};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensors> lstm_backward(
      const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Tensor& x,
      const Tensor& h0, const Tensor& c0, List params, const Optional& lengths,
      const Optional& batch_sizes, const Tensor& y, const Tensor& reserve, bool need_dx,
      bool need_dparams) {
    BackwardResult r = backward(plain(CellKind::lstm, x, {h0, c0}, params, lengths, batch_sizes),
                                {dy, {dh_n, dc_n}, y, reserve, need_dx, need_dparams});
    return {r.dx, r.dstates[0], r.dstates[1], defined(r.dparams)};
  }

  static Tensors unwrapped(const OptionalList& list) {
    Tensors tensors;
    for (size_t i = 0; i < list.size(); i++)
      tensors.push_back(std::optional<Tensor>(list[i]).value_or(Tensor()));
    return tensors;
  }

  static std::tuple<Tensor, Tensors, Tensor> recurrent_forward(
      const std::string& cell, const Tensor& x, List states, const OptionalList& params,
      const Optional& lengths, const Optional& batch_sizes, const Optional& mask,
      const Optional& scale, double keep_h, double keep_c, double candidate_scale, double cell_clip,
      double proj_clip, double eps, bool save) {
    ForwardResult r =
        forward({cell_named(cell), x, states.vec(), unwrapped(params), lengths, batch_sizes, mask,
                 scale, keep_h, keep_c, candidate_scale, cell_clip, proj_clip, eps},
                save);
    return {r.y, r.states, r.reserve};
  }

  static std::tuple<Tensor, Tensors, Tensors> recurrent_backward(
      const std::string& cell, const Optional& dy, const OptionalList& dfinals, const Tensor& x,
      List states, const OptionalList& params, const Optional& lengths, const Optional& batch_sizes,
      const Optional& mask, const Optional& scale, double keep_h, double keep_c,
      double candidate_scale, double cell_clip, double proj_clip, double eps, const Tensor& y,
      const Tensor& reserve, bool need_dx, bool need_dparams) {
    BackwardArguments back{dy, {}, y, reserve, need_dx, need_dparams};
    for (size_t i = 0; i < dfinals.size(); i++) back.dstates.push_back(dfinals[i]);
    BackwardResult r =
        backward({cell_named(cell), x, states.vec(), unwrapped(params), lengths, batch_sizes, mask,
                  scale, keep_h, keep_c, candidate_scale, cell_clip, proj_clip, eps},
                 back);
    for (Tensor& dparam : r.dparams)
      if (!dparam.defined()) dparam = at::empty({0}, x.options());
    return {r.dx, r.dstates, r.dparams};
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
  static void implement_recurrent(torch::Library& library) {
    library.impl("recurrent_forward", &recurrent_forward);
    library.impl("recurrent_backward", &recurrent_backward);
  }
};

}  // namespace seqkern
