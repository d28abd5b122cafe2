// The recurrence step by step: one launch of the gates per step, and products with W_hh (torch's)
// between them. For any cell, size and dtype; the plain form of what recurrence.cuh does in one
// launch.
//
// Forward, step s, every direction d, valid row b and hidden unit u:
//   pre[b, :, u] = gx[d, row] + b_ih + gh[b] + b_hh;  h, c = cell(pre, h_prev, c_prev)   (cell.h)
// Backward, s falling:
//   dh = dh_past + dh_rec + dy;  dpre, dh_past, dc = cell's derivative
// A cell of two products begins with the first one, which makes `mid`, and ends with the second;
// backward the other way round.
//
// One thread owns one (d, b, u), or one element of a copy; no thread reads what another one writes.
// Layouts: kernels.h. Cells that normalise rows: normalised.cu.

#include <algorithm>
#include <type_traits>

#include "stepwise.cuh"

namespace seqkern::cuda {
namespace {

// The gate of W_hh whose product slot k takes; kernels.h has them in PyTorch's order, as cell.h.
template <class Cell>
__device__ constexpr int hidden_gate(int k) {
  return k - (Cell::kSlots - Cell::kGates);
}

// ---- forward ------------------------------------------------------------------------------------

// pre = the slots of W_ih x and both biases, and, of slots from `first` on, a product's `gates`.
template <class Cell, class S>
__device__ __forceinline__ void make_slots(const ForwardParams& p, const Element& e,
                                           const void* product, int first, int gates,
                                           Compute<S>* pre) {
  constexpr int G = Cell::kGates;
  for (int k = 0; k < Cell::kSlots; k++) pre[k] = 0;
  for (int k = 0; k < G; k++) {
    const int gate = stored_slot<Cell>(k);
    pre[k] = widen(in<S>(p.gx)[((e.d * p.rows.N + e.row) * G + gate) * p.H + e.u]) +
             bias_of<S>(p, p.b_ih, e, G, gate);
  }
  for (int k = Cell::kSlots - G; k < Cell::kSlots; k++)
    pre[k] += bias_of<S>(p, p.b_hh, e, G, hidden_gate<Cell>(k));
  for (int g = 0; g < gates; g++)
    pre[first + g] += widen(in<S>(product)[((e.d * p.rows.B + e.b) * gates + g) * p.H + e.u]);
}

// Overwrites y, reserve, h (or m), h_in and the states of the rows valid at this step; of others m,
// with zeros.
template <class Cell, class S>
__global__ void step_forward_kernel(const ForwardParams p, const ForwardStep step) {
  using C = Compute<S>;
  constexpr int kStates = Cell::kStates - 1;
  const Element e = element_of(p, thread_index(), p.H, step.s);
  if (e.d >= p.D) return;
  if (e.row < 0) {
    if (step.m != nullptr) out<S>(step.m)[e.i] = narrow<S>(C(0));
    return;
  }
  C pre[Cell::kSlots], own[Cell::kOwn + 1];
  make_slots<Cell, S>(p, e, step.products[0], Cell::kSlots - Cell::kGates, Cell::kGates, pre);
  for (int k = 0; k < Cell::kOwn; k++) own[k] = number<S>(p.own[e.way][0], k * p.H + e.u);
  C state[kStates + 1], before[kStates + 1], saved[Cell::kSaved + 1];
  for (int k = 0; k < kStates; k++) before[k] = state[k] = out<C>(step.state[k])[e.i];
  // Only an LSTM has a projection, and it does not ask for h_prev.
  const C h_prev = step.m == nullptr ? widen(out<S>(step.h)[e.i]) : C(0);
  const Kept<S> kept = kept_of<S>(p, e);
  const C h = Cell::forward(pre, h_prev, state, own, kept.within, saved);
  give<Cell, S>(p, step, e, kept, h, h_prev, state, before, saved, 0);
}

// Overwrites mid: [D, B, H], zero at rows not valid.
template <class Cell, class S>
__global__ void step_begin_kernel(const ForwardParams p, const ForwardStep step) {
  using C = Compute<S>;
  constexpr int kStates = Cell::kStates - 1;
  const Element e = element_of(p, thread_index(), p.H, step.s);
  if (e.d >= p.D) return;
  C mid[Cell::kMid] = {};
  if (e.row >= 0) {
    C pre[Cell::kSlots], state[kStates + 1], saved[Cell::kSaved];
    make_slots<Cell, S>(p, e, step.products[0], Cell::kFirstSlot, Cell::kFirst, pre);
    for (int k = 0; k < kStates; k++) state[k] = out<C>(step.state[k])[e.i];
    const C h_prev = widen(out<S>(step.h)[e.i]);
    Cell::begin(pre, h_prev, h_prev * scale_of<S>(p, e.i), state, kept_of<S>(p, e).within, saved,
                mid);
  }
  for (int k = 0; k < Cell::kMid; k++) out<S>(step.mid[k])[e.i] = narrow<S>(mid[k]);
}

// As step_forward_kernel. What `begin` gave is made once more.
template <class Cell, class S>
__global__ void step_end_kernel(const ForwardParams p, const ForwardStep step) {
  using C = Compute<S>;
  constexpr int kStates = Cell::kStates - 1, G = Cell::kGates;
  const Element e = element_of(p, thread_index(), p.H, step.s);
  if (e.d >= p.D || e.row < 0) return;
  C pre[Cell::kSlots], state[kStates + 1], before[kStates + 1], saved[Cell::kSaved];
  C mid[Cell::kMid], second[Cell::kSecond] = {};
  make_slots<Cell, S>(p, e, step.products[0], Cell::kFirstSlot, Cell::kFirst, pre);
  for (int k = 0; k < kStates; k++) before[k] = state[k] = out<C>(step.state[k])[e.i];
  const C h_prev = widen(out<S>(step.h)[e.i]);
  const Kept<S> kept = kept_of<S>(p, e);
  Cell::begin(pre, h_prev, h_prev * scale_of<S>(p, e.i), state, kept.within, saved, mid);
  if constexpr (Cell::kMid == 1) {
    second[0] = widen(in<S>(step.products[1])[e.i]);
  } else {  // an inner cell's two products and biases
    const auto add = [&](int slot, const void* product, const void* bias, int gate) {
      second[slot] += widen(in<S>(product)[((e.d * p.rows.B + e.b) * G + gate) * p.H + e.u]) +
                      number<S>(bias, gate * p.H + e.u);
    };
    for (int k = 0; k < G; k++) add(k, step.products[1], p.own[e.way][2], stored_slot<Cell>(k));
    for (int k = Cell::kSlots - G; k < Cell::kSlots; k++)
      add(k, step.products[2], p.own[e.way][3], hidden_gate<Cell>(k));
  }
  const C h = Cell::end(pre, second, h_prev, state, kept.within, saved);
  give<Cell, S>(p, step, e, kept, h, h_prev, state, before, saved, 0);
}

// Overwrites y, h and h_in of the rows valid at this step.
template <class S>
__global__ void step_store_kernel(const ForwardParams p, const ForwardStep step,
                                  const S* h_new) {  // [D, B, P]
  using C = Compute<S>;
  const Element e = element_of(p, thread_index(), p.P, step.s);
  if (e.d >= p.D || e.row < 0) return;
  const Regularised<C> bounded{C(0), C(p.regularisers.proj_clip)};
  const C h = bounded.clip(widen(h_new[e.i]));
  out<S>(step.h)[e.i] = out<S>(p.y)[at_h(p, e, e.row)] = narrow<S>(h);
  if (step.h_in != nullptr) out<S>(step.h_in)[e.i] = narrow<S>(h * scale_of<S>(p, e.i));
}

// ---- backward -----------------------------------------------------------------------------------

// Stores a plane of dpre to `to`, a product's part of a step, if it is its gate-th of `gates`.
template <class S>
__device__ __forceinline__ void give_gate(const BackwardParams& p, const Element& e, void* to,
                                          int gates, int gate, S value) {
  if (gate >= 0 && gate < gates)
    out<S>(to)[((e.d * p.rows.B + e.b) * gates + gate) * p.H + e.u] = value;
}

// Overwrites dpre, dh (without a projection) and dstate of the rows valid at this step, and dpre_h.
template <class Cell, class S>
__global__ void step_backward_kernel(const BackwardParams p, const BackwardStep step) {
  using C = Compute<S>;
  constexpr int G = Cell::kGates, kPlanes = Cell::kSlots + Cell::kOwn;
  const Element e = element_of(p, thread_index(), p.H, step.s);
  if (e.d >= p.D) return;
  if (e.row < 0) {
    for (int g = 0; g < G; g++) give_gate(p, e, step.dpre_h, G, g, narrow<S>(C(0)));
    return;
  }
  Saved<Cell, S> saved(p, e, 0);
  const C dh = saved.take_h(p, step, e);
  saved.take_states(p, step, e);
  C own[Cell::kOwn + 1], dpre[kPlanes], h = 0, h_prev = 0;
  for (int k = 0; k < Cell::kOwn; k++) own[k] = number<S>(p.own[e.way][0], k * p.H + e.u);
  // Only an LSTM has a projection, and it does not ask for h.
  if constexpr (Cell::kNeedsH) h = saved.h(p, e);
  if constexpr (Cell::kNeedsHPrev) h_prev = h_before<S>(p, e);
  const C past = Cell::backward(dh, saved.dstate, saved.value, h, h_prev, saved.prev, own,
                                saved.kept.within, dpre);
  saved.give_h(step, e, past);
  saved.give_states(step, e);
  S* const row = dpre_of<S>(p, e);
  for (int k = 0; k < kPlanes; k++) {
    const S value = narrow<S>(dpre[k]);
    row[stored_slot<Cell>(k) * p.H] = value;
    if (k < Cell::kSlots) give_gate(p, e, step.dpre_h, G, hidden_gate<Cell>(k), value);
  }
}

// The end of a cell of two products: overwrites its planes of dpre, dh, dstate and carry of the
// rows valid at this step, and dpre_mid.
template <class Cell, class S>
__global__ void step_end_backward_kernel(const BackwardParams p, const BackwardStep step) {
  using C = Compute<S>;
  constexpr int G = Cell::kGates, kSlots = Cell::kSlots;
  constexpr int kGates = Cell::kMid == 1 ? 1 : G;  // of a second product
  const Element e = element_of(p, thread_index(), p.H, step.s);
  if (e.d >= p.D) return;
  if (e.row < 0) {
    for (int i = 0; i < Cell::kMid; i++)
      for (int g = 0; g < kGates; g++)
        give_gate(p, e, step.dpre_mid[i], kGates, g, narrow<S>(C(0)));
    return;
  }
  Saved<Cell, S> saved(p, e, 0);
  const C dh = saved.take_h(p, step, e);
  saved.take_states(p, step, e);
  C dpre[Cell::kPlanes], carry[1] = {}, past;
  Cell::end_backward(dh, saved.dstate, saved.value, h_before<S>(p, e), saved.prev,
                     saved.kept.within, dpre, carry, past);
  saved.give_h(step, e, past);
  saved.give_states(step, e);
  if constexpr (Cell::kCarry > 0) out<C>(step.carry)[e.i] = carry[0];
  S* const row = dpre_of<S>(p, e);
  for (int k = Cell::kEndPlane; k < Cell::kPlanes; k++) {
    const S value = narrow<S>(dpre[k]);
    row[stored_slot<Cell>(k) * p.H] = value;
    if constexpr (Cell::kMid == 1) {
      give_gate(p, e, step.dpre_mid[0], 1, k - Cell::kFirst, value);
    } else if (k >= kSlots) {  // the inner cell's: W_ih's gates are the first slots
      if (k - kSlots < G)
        give_gate(p, e, step.dpre_mid[0], G, stored_slot<Cell>(k - kSlots), value);
      give_gate(p, e, step.dpre_mid[1], G, hidden_gate<Cell>(k - kSlots), value);
    }
  }
}

// Its beginning, after the second products: overwrites the other planes, mid_rows, dh and dstate of
// the rows valid at this step, and dpre_h.
template <class Cell, class S>
__global__ void step_begin_backward_kernel(const BackwardParams p, const BackwardStep step) {
  using C = Compute<S>;
  constexpr int kStates = Cell::kStates - 1;
  const Element e = element_of(p, thread_index(), p.H, step.s);
  if (e.d >= p.D) return;
  if (e.row < 0) {
    for (int g = 0; g < Cell::kFirst; g++)
      give_gate(p, e, step.dpre_h, Cell::kFirst, g, narrow<S>(C(0)));
    return;
  }
  const Saved<Cell, S> saved(p, e, 0);
  C dmid[Cell::kMid], mid[Cell::kMid], dpre[Cell::kPlanes], carry[1] = {}, dstate[kStates + 1];
  for (int k = 0; k < Cell::kMid; k++) dmid[k] = widen(in<S>(step.dmid[k])[e.i]);
  if constexpr (Cell::kCarry > 0) carry[0] = out<C>(step.carry)[e.i];
  for (int k = 0; k < kStates; k++) dstate[k] = out<C>(step.dstate[k])[e.i];
  C past = out<C>(step.dh)[e.i];
  const C h_prev = h_before<S>(p, e), scale = scale_of<S>(p, e.i);
  Cell::begin_backward(dmid, dstate, saved.value, h_prev, h_prev * scale, scale, saved.prev,
                       saved.kept.within, carry, dpre, past, mid);
  out<C>(step.dh)[e.i] = past;
  for (int k = 0; k < kStates; k++) out<C>(step.dstate[k])[e.i] = dstate[k];
  for (int k = 0; k < Cell::kMid; k++)
    out<S>(p.mid_rows[k])[(e.d * p.rows.N + e.row) * p.H + e.u] = narrow<S>(mid[k]);
  // Planes that the end made are the first product's, too.
  S* const row = dpre_of<S>(p, e);
  for (int k = 0; k < Cell::kSlots; k++) {
    S* const at = row + stored_slot<Cell>(k) * p.H;
    if (k < Cell::kEndPlane) *at = narrow<S>(dpre[k]);
    give_gate(p, e, step.dpre_h, Cell::kFirst, k - Cell::kFirstSlot, *at);
  }
}

// Overwrites dh_all, and dh and dh_rows of the rows valid at this step.
template <class S>
__global__ void step_gather_kernel(const BackwardParams p, const BackwardStep step, S* dh_all) {
  using C = Compute<S>;
  const Element e = element_of(p, thread_index(), p.P, step.s);
  if (e.d >= p.D) return;
  if (e.row < 0) {
    dh_all[e.i] = narrow<S>(C(0));
    return;
  }
  C dh = out<C>(step.dh)[e.i];
  if (step.dh_rec != nullptr) dh += widen(in<S>(step.dh_rec)[e.i]) * scale_of<S>(p, e.i);
  if (p.dy != nullptr) dh += widen(in<S>(p.dy)[at_h(p, e, e.row)]);
  const Regularised<C> bounded{C(0), C(p.regularisers.proj_clip)};
  dh = bounded.clip_gradient(widen(in<S>(p.y)[at_h(p, e, e.row)]), dh);
  out<C>(step.dh)[e.i] = C(0);
  dh_all[e.i] = narrow<S>(dh);
  out<S>(p.dh_rows)[(e.d * p.rows.N + e.row) * p.P + e.u] = narrow<S>(dh);
}

// ---- units that know only themselves ------------------------------------------------------------

// A thread has all steps of a unit, the next step's W_ih x on its way. Overwrites y, reserve and
// h_n.
template <class Cell, class S>
__global__ void unitwise_forward_kernel(const ForwardParams p) {
  using C = Compute<S>;
  Element e = element_of(p, thread_index(), p.H, 0);
  if (e.d >= p.D) return;
  const int64_t length = length_of(p.rows, e.b);
  const C bias = bias_of<S>(p, p.b_ih, e, 1, 0) + bias_of<S>(p, p.b_hh, e, 1, 0);
  const C own[1] = {number<S>(p.own[e.way][0], e.u)}, scale = scale_of<S>(p, e.i);
  const auto gx = [&] { return widen(in<S>(p.gx)[(e.d * p.rows.N + e.row) * p.H + e.u]); };
  S h = in<S>(p.h0)[e.i];
  C next = length > 0 ? gx() : C(0);
  for (int64_t s = 0; s < length; s++) {
    const int64_t row = e.row;
    const C pre = bias + next;
    const Kept<S> kept = kept_of<S>(p, e);
    place_at(e, p, length, s + 1);
    if (e.row >= 0) next = gx();
    const C h_prev = widen(h);
    const C made = Cell::forward(&pre, h_prev * scale, nullptr, own, kept.within, nullptr);
    h = narrow<S>(p.regularisers.on ? kept.h * h_prev + (1 - kept.h) * made : made);
    if (p.regularisers.on && p.reserve != nullptr)
      out<S>(p.reserve)[at_reserve(p, e, row) + e.u] = narrow<S>(made);
    out<S>(p.y)[at_h(p, e, row)] = h;
  }
  out<S>(p.h_n)[e.i] = h;
}

// Likewise. Overwrites dpre and dh0.
template <class Cell, class S>
__global__ void unitwise_backward_kernel(const BackwardParams p) {
  using C = Compute<S>;
  Element e = element_of(p, thread_index(), p.H, 0);
  if (e.d >= p.D) return;
  const int64_t length = length_of(p.rows, e.b);
  const C own[1] = {number<S>(p.own[e.way][0], e.u)}, scale = scale_of<S>(p, e.i);
  C dh = number<S>(p.dh_n, e.i);
  for (int64_t s = length - 1; s >= 0; s--) {
    place_at(e, p, length, s);
    const Saved<Cell, S> saved(p, e, 0);
    if (p.dy != nullptr) dh += widen(in<S>(p.dy)[at_h(p, e, e.row)]);
    const C kept = p.regularisers.on ? saved.kept.h * dh : C(0);
    if (p.regularisers.on) dh *= 1 - saved.kept.h;
    C dpre[2];
    const C past = Cell::backward(dh, nullptr, nullptr, saved.h(p, e), h_before<S>(p, e) * scale,
                                  nullptr, own, saved.kept.within, dpre);
    dh = past * scale + kept;
    S* const row = dpre_of<S>(p, e);
    row[0] = narrow<S>(dpre[0]), row[p.H] = narrow<S>(dpre[1]);
  }
  out<S>(p.dh0)[e.i] = narrow<S>(dh);
}

// ---- for the products over all rows -------------------------------------------------------------

// Thread (t, b, k) of [T, B, n]: the row of (t, b), and whether it is valid. A packed batch has no
// row for a (t, b) that is not: there row is -1.
struct Place {
  int64_t t, b, k, length, row;
  bool valid;
};
__device__ __forceinline__ Place place_of(const Rows& rows, int64_t i, int64_t n) {
  Place at;
  at.k = i % n;
  at.b = i / n % rows.B;
  at.t = i / n / rows.B;
  at.length = length_of(rows, at.b);
  at.valid = at.t < at.length;
  at.row = at.valid || rows.first == nullptr ? row_of(rows, at.t, at.b) : -1;
  return at;
}

// Overwrites h_prev [N, P].
template <class S>
__global__ void gather_previous_kernel(const BackwardParams p, const int64_t d, S* h_prev) {
  const int64_t i = thread_index(), P = p.P;
  if (i >= p.rows.T * p.rows.B * P) return;
  const Place at = place_of(p.rows, i, P);
  if (at.row < 0) return;
  const int way = d >= p.heads;
  S value = narrow<S>(Compute<S>(0));
  if (at.valid && at.t == time_of(way, int64_t(0), at.length)) {
    value = in<S>(p.h0)[(d * p.rows.B + at.b) * P + at.k];
  } else if (at.valid) {
    const int64_t row_prev = row_of(p.rows, way == 0 ? at.t - 1 : at.t + 1, at.b);
    value = in<S>(p.y)[row_prev * p.D * P + d * P + at.k];
  }
  if (p.regularisers.scale != nullptr)
    value = narrow<S>(widen(value) * scale_of<S>(p, (d * p.rows.B + at.b) * P + at.k));
  h_prev[at.row * P + at.k] = value;
}

// Overwrites m [N, H].
template <class S>
__global__ void gather_unprojected_kernel(const BackwardParams p, const int64_t d, S* m) {
  using Cell = LstmCell<Math<S>>;
  using C = Compute<S>;
  const int64_t i = thread_index(), H = p.H;
  if (i >= p.rows.T * p.rows.B * H) return;
  const Place at = place_of(p.rows, i, H);
  if (at.row < 0) return;
  C value = C(0);
  if (at.valid) {
    C saved[Cell::kSaved];
    Element e{};
    e.d = d;
    const S* const from = in<S>(p.reserve) + at_reserve(p, e, at.row) + at.k;
    for (int j = 0; j < Cell::kSaved; j++) saved[j] = widen(from[j * padded(H)]);
    value = Cell::unprojected(saved);
  }
  m[at.row * H + at.k] = narrow<S>(value);
}

// ---- numbers of the host ------------------------------------------------------------------------

constexpr int kNumbers = 448;  // 8 bytes each: a kernel's arguments have room for 4 KiB
struct Numbers {
  int64_t value[kNumbers];
};

__global__ void write_numbers_kernel(const Numbers numbers, const int count, int64_t* to) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = numbers.value[i];
}

// ---- launches -----------------------------------------------------------------------------------

// Calls body(Type<Cell>, Type<S>) for a cell of one product and the dtype, or of two, or without.
template <class Body>
void with_one_product(CellKind cell, Dtype dtype, Body body) {
  with_dtype(dtype, [&](auto s) {
    using M = Math<TypeOf<decltype(s)>>;
    switch (cell) {
      case CellKind::lstm:
        return body(Type<LstmCell<M>>(), s);
      case CellKind::gru:
        return body(Type<GruCell<M>>(), s);
      case CellKind::rnn_tanh:
        return body(Type<RnnTanhCell<M>>(), s);
      case CellKind::rnn_relu:
        return body(Type<RnnReluCell<M>>(), s);
      case CellKind::peephole_lstm:
        return body(Type<PeepholeLstmCell<M>>(), s);
      case CellKind::cifg_lstm:
        return body(Type<CifgLstmCell<M>>(), s);
      case CellKind::slstm:
        return body(Type<SlstmCell<M>>(), s);
      default:
        return;
    }
  });
}
template <class Body>
void with_two_products(CellKind cell, Dtype dtype, Body body) {
  with_dtype(dtype, [&](auto s) {
    using M = Math<TypeOf<decltype(s)>>;
    switch (cell) {
      case CellKind::gru_reset_before:
        return body(Type<GruResetBeforeCell<M>>(), s);
      case CellKind::mgu:
        return body(Type<MguCell<M>>(), s);
      case CellKind::nested_lstm:
        return body(Type<NestedLstmCell<M>>(), s);
      case CellKind::nested_gru:
        return body(Type<NestedGruCell<M>>(), s);
      default:
        return;
    }
  });
}
template <class Body>
void with_unitwise(CellKind cell, Dtype dtype, Body body) {
  with_dtype(dtype, [&](auto s) {
    using M = Math<TypeOf<decltype(s)>>;
    if (cell == CellKind::indrnn_tanh) return body(Type<IndRnnTanhCell<M>>(), s);
    return body(Type<IndRnnReluCell<M>>(), s);
  });
}

int64_t units_of(const LayerParams& p) { return p.D * p.rows.B * p.H; }

}  // namespace

void step_begin(const ForwardParams& params, const ForwardStep& step, void* stream) {
  with_two_products(params.cell, params.dtype, [&](auto cell, auto s) {
    launch("step_begin_kernel", stream, units_of(params),
           step_begin_kernel<TypeOf<decltype(cell)>, TypeOf<decltype(s)>>, params, step);
  });
}

void step_forward(const ForwardParams& params, const ForwardStep& step, void* stream) {
  const CellShape& shape = cell_shape(params.cell);
  if (shape.rows) return normalised_forward(params, step, stream);
  if (shape.mid > 0)
    return with_two_products(params.cell, params.dtype, [&](auto cell, auto s) {
      launch("step_end_kernel", stream, units_of(params),
             step_end_kernel<TypeOf<decltype(cell)>, TypeOf<decltype(s)>>, params, step);
    });
  with_one_product(params.cell, params.dtype, [&](auto cell, auto s) {
    launch("step_forward_kernel", stream, units_of(params),
           step_forward_kernel<TypeOf<decltype(cell)>, TypeOf<decltype(s)>>, params, step);
  });
}

void step_store(const ForwardParams& params, const ForwardStep& step, const void* h_new,
                void* stream) {
  with_dtype(params.dtype, [&](auto type) {
    using S = TypeOf<decltype(type)>;
    launch("step_store_kernel", stream, params.D * params.rows.B * params.P, step_store_kernel<S>,
           params, step, static_cast<const S*>(h_new));
  });
}

void step_backward(const BackwardParams& params, const BackwardStep& step, void* stream) {
  const CellShape& shape = cell_shape(params.cell);
  if (shape.rows) return normalised_backward(params, step, stream);
  if (shape.mid > 0)
    return with_two_products(params.cell, params.dtype, [&](auto cell, auto s) {
      launch("step_end_backward_kernel", stream, units_of(params),
             step_end_backward_kernel<TypeOf<decltype(cell)>, TypeOf<decltype(s)>>, params, step);
    });
  with_one_product(params.cell, params.dtype, [&](auto cell, auto s) {
    launch("step_backward_kernel", stream, units_of(params),
           step_backward_kernel<TypeOf<decltype(cell)>, TypeOf<decltype(s)>>, params, step);
  });
}

void step_begin_backward(const BackwardParams& params, const BackwardStep& step, void* stream) {
  with_two_products(params.cell, params.dtype, [&](auto cell, auto s) {
    launch("step_begin_backward_kernel", stream, units_of(params),
           step_begin_backward_kernel<TypeOf<decltype(cell)>, TypeOf<decltype(s)>>, params, step);
  });
}

void step_gather(const BackwardParams& params, const BackwardStep& step, void* dh_all,
                 void* stream) {
  with_dtype(params.dtype, [&](auto type) {
    using S = TypeOf<decltype(type)>;
    launch("step_gather_kernel", stream, params.D * params.rows.B * params.P, step_gather_kernel<S>,
           params, step, static_cast<S*>(dh_all));
  });
}

void unitwise_forward(const ForwardParams& params, void* stream) {
  with_unitwise(params.cell, params.dtype, [&](auto cell, auto s) {
    launch("unitwise_forward_kernel", stream, units_of(params),
           unitwise_forward_kernel<TypeOf<decltype(cell)>, TypeOf<decltype(s)>>, params);
  });
}

void unitwise_backward(const BackwardParams& params, void* stream) {
  with_unitwise(params.cell, params.dtype, [&](auto cell, auto s) {
    launch("unitwise_backward_kernel", stream, units_of(params),
           unitwise_backward_kernel<TypeOf<decltype(cell)>, TypeOf<decltype(s)>>, params);
  });
}

void gather_previous(const BackwardParams& params, int64_t d, void* h_prev, void* stream) {
  with_dtype(params.dtype, [&](auto type) {
    using S = TypeOf<decltype(type)>;
    launch("gather_previous_kernel", stream, params.rows.T * params.rows.B * params.P,
           gather_previous_kernel<S>, params, d, static_cast<S*>(h_prev));
  });
}

void gather_unprojected(const BackwardParams& params, int64_t d, void* m, void* stream) {
  with_dtype(params.dtype, [&](auto type) {
    using S = TypeOf<decltype(type)>;
    launch("gather_unprojected_kernel", stream, params.rows.T * params.rows.B * params.H,
           gather_unprojected_kernel<S>, params, d, static_cast<S*>(m));
  });
}

void write_numbers(const int64_t* numbers, int64_t count, int64_t* to, void* stream) {
  for (int64_t done = 0; done < count; done += kNumbers) {
    const int n = int(std::min<int64_t>(kNumbers, count - done));
    Numbers part{};
    std::copy(numbers + done, numbers + done + n, part.value);
    launch("write_numbers_kernel", stream, kStepThreads, write_numbers_kernel, part, n, to + done);
  }
}

}  // namespace seqkern::cuda
