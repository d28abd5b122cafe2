// From pre-activations to states, forward: what recurrence.h calls for some blocks of some rows of
// a step. Three kinds of cells (cell.h): of one product, of two, and those that normalise whole
// rows.
#pragma once

#include "recurrence.h"

namespace seqkern {
namespace SEQKERN_ISA {

// kept of `before` and the rest of `now`; what is not wanted at all may be infinite.
template <class V>
SEQKERN_INLINE V blend(V kept, V before, V now) {
  return kept == 0 ? now : kept == 1 ? before : kept * before + (1 - kept) * now;
}

// One block's new states: regularisers blend them with those before; they are stored, h as output
// and the others for the next step, and what backward wants back goes to the reserve: the cell's
// own values from the first_saved-th on, then what regularisers add (saved_values).
template <class S>
template <class Cell, bool kRegularised>
SEQKERN_INLINE void Forward<S>::give(const Span& s, int64_t r, int64_t u, V h, V h_prev,
                                     const V* state, const V* state_prev, const V* saved,
                                     int64_t first_saved) const {
  constexpr int kStates = Cell::kStates - 1;
  const int64_t j = s.sorted(r), valid = H - u * L;
  V carried[kStates > 0 ? kStates : 1];
  for (int k = 0; k < kStates; k++) carried[k] = state[k];
  [[maybe_unused]] const V made = h;
  if constexpr (kRegularised) {
    const auto kept = this->kept(s.d, s.t, j, u);
    if (!projected) h = blend(kept.h, h_prev, h);
    for (int k = 0; k < kStates; k++) carried[k] = blend(kept.c, state_prev[k], carried[k]);
  }
  for (int k = 0; k < kStates; k++) store(s.task.state[k] + r * Hp + u * L, carried[k]);
  if (q.reserve && saved_count > 0) {
    S* out = this->saved(s.d, s.t, j) + u * saved_count * L + first_saved * L;
    for (int k = 0; k < Cell::kSaved; k++) store(out + k * L, saved[k]);
    if constexpr (kRegularised) {
      out += Cell::kSaved * L;
      if (cell.saves_h) store(out, made), out += L;
      for (int k = 0; k < kStates; k++) store(out + k * L, carried[k]);
    }
  }
  if (projected)
    store(s.task.m + r * Hp + u * L, h);
  else
    store_first(this->template row_of<S>(q.y, s.t, j) + s.d * P + u * L, h, valid);
}

// ---- one product --------------------------------------------------------------------------------

template <class S>
template <class Cell, bool kRegularised>
void Forward<S>::make_gates(const Span& s) const {
  constexpr int kSlots = Cell::kSlots, kSaved = Cell::kSaved, kStates = Cell::kStates - 1;
  for (int64_t r = s.r0; r < s.r1; r++) {
    const int64_t j = s.sorted(r);
    const S* h_row = kRegularised || Cell::kNeedsHPrev ? this->h_prev(s.d, s.t, j) : nullptr;
    for (int64_t u = s.u0; u < s.u1; u++) {
      const C* pre = s.pre + r * ld + u * kSlots * L;
      V slots[kSlots], saved[kSaved > 0 ? kSaved : 1] = {}, own[Cell::kOwn > 0 ? Cell::kOwn : 1];
      V state[kStates > 0 ? kStates : 1], before[kStates > 0 ? kStates : 1], h_prev{};
      for (int k = 0; k < kSlots; k++) slots[k] = load(pre + k * L);
      for (int k = 0; k < Cell::kOwn; k++)
        own[k] = load(s.memory.own[s.d] + (u * Cell::kOwn + k) * L);
      for (int k = 0; k < kStates; k++)
        before[k] = state[k] = load(s.task.state[k] + r * Hp + u * L);
      if (kRegularised || Cell::kNeedsHPrev)
        if (!projected) h_prev = load_first(h_row + u * L, H - u * L);
      V h_in = h_prev;
      if constexpr (Cell::kNeedsH && Cell::kNeedsHPrev)  // h enters its product here
        if (const S* scale = this->scale_of(s.d, j)) h_in *= load_first(scale + u * L, H - u * L);
      V h;
      if constexpr (kRegularised)
        h = Cell::forward(slots, h_in, state, own, this->kept(s.d, s.t, j, u).within, saved);
      else
        h = Cell::forward(slots, h_in, state, own, Unregularised{}, saved);
      give<Cell, kRegularised>(s, r, u, h, h_prev, state, before, saved, 0);
    }
  }
}

// ---- two products -------------------------------------------------------------------------------

template <class S>
template <class Cell, bool kRegularised>
void Forward<S>::begin_cell(const Span& s) const {
  constexpr int kStates = Cell::kStates - 1;
  for (int64_t r = s.r0; r < s.r1; r++) {
    const int64_t j = s.sorted(r);
    const S* h_row = this->h_prev(s.d, s.t, j);
    const S* scale = this->scale_of(s.d, j);
    for (int64_t u = s.u0; u < s.u1; u++) {
      const int64_t valid = H - u * L;
      V slots[Cell::kSlots], saved[Cell::kSaved] = {}, state[kStates > 0 ? kStates : 1];
      V mid[Cell::kMid];
      for (int k = 0; k < Cell::kSlots; k++) {
        slots[k] = load(s.pre + r * ld + (u * Cell::kSlots + k) * L);
        if (k >= Cell::kFirstSlot && k < Cell::kFirstSlot + Cell::kFirst)
          slots[k] +=
              load(s.task.part + r * ld_first + (u * Cell::kFirst + k - Cell::kFirstSlot) * L);
      }
      for (int k = 0; k < kStates; k++) state[k] = load(s.task.state[k] + r * Hp + u * L);
      const V h_prev = load_first(h_row + u * L, valid);
      V h_in = h_prev;
      if (scale) h_in *= load_first(scale + u * L, valid);
      if constexpr (kRegularised)
        Cell::begin(slots, h_prev, h_in, state, this->kept(s.d, s.t, j, u).within, saved, mid);
      else
        Cell::begin(slots, h_prev, h_in, state, Unregularised{}, saved, mid);
      for (int k = 0; k < Cell::kSaved; k++)
        store(s.task.held + (r * Hp + u * L) * Cell::kSaved + k * L, saved[k]);
      for (int k = 0; k < Cell::kMid; k++)
        store_first(s.task.mid[k] + r * Hp + u * L, mid[k], valid);
    }
  }
}

template <class S>
template <class Cell, bool kRegularised>
void Forward<S>::end_cell(const Span& s) const {
  constexpr int kStates = Cell::kStates - 1;
  for (int64_t r = s.r0; r < s.r1; r++) {
    const int64_t j = s.sorted(r);
    const S* h_row = this->h_prev(s.d, s.t, j);
    for (int64_t u = s.u0; u < s.u1; u++) {
      V slots[Cell::kSlots], part[Cell::kSecond], saved[Cell::kSaved];
      V state[kStates > 0 ? kStates : 1], before[kStates > 0 ? kStates : 1];
      for (int k = 0; k < Cell::kSlots; k++)
        slots[k] = load(s.pre + r * ld + (u * Cell::kSlots + k) * L);
      for (int k = 0; k < Cell::kSecond; k++)
        part[k] = load(s.task.part2 + r * ld_second + (u * Cell::kSecond + k) * L);
      for (int k = 0; k < Cell::kSaved; k++)
        saved[k] = load(s.task.held + (r * Hp + u * L) * Cell::kSaved + k * L);
      for (int k = 0; k < kStates; k++)
        before[k] = state[k] = load(s.task.state[k] + r * Hp + u * L);
      const V h_prev = load_first(h_row + u * L, H - u * L);
      V h;
      if constexpr (kRegularised)
        h = Cell::end(slots, part, h_prev, state, this->kept(s.d, s.t, j, u).within, saved);
      else
        h = Cell::end(slots, part, h_prev, state, Unregularised{}, saved);
      give<Cell, kRegularised>(s, r, u, h, h_prev, state, before, saved, 0);
    }
  }
}

// ---- normalised rows ----------------------------------------------------------------------------

// Mean and 1 / sqrt(variance + eps) of n values of each of `planes`; plane k of block u is
// at(u, k). What lies past n in the last block counts for nothing.
template <class C>
struct Moments {
  C mean, rstd;
};
template <class C, class At>
SEQKERN_INLINE Moments<C> moments(int64_t n, int planes, double eps, const At& at) {
  using V = Vec<C>;
  constexpr int L = kLanes<C>;
  const auto only_valid = [&](V v, int64_t u) {
    for (int64_t i = n - u * L; i < L; i++) v[i] = 0;
    return v;
  };
  const int64_t whole = n / L, blocks = ceil_div(n, L);
  const C count = C(n) * C(planes);
  V sum{};
  for (int64_t u = 0; u < whole; u++)
    for (int k = 0; k < planes; k++) sum += at(u, k);
  for (int64_t u = whole; u < blocks; u++)
    for (int k = 0; k < planes; k++) sum += only_valid(at(u, k), u);
  C mean = 0;
  for (int i = 0; i < L; i++) mean += sum[i];
  mean /= count;
  V squares{};
  for (int64_t u = 0; u < whole; u++)
    for (int k = 0; k < planes; k++) {
      const V off = at(u, k) - mean;
      squares += off * off;
    }
  for (int64_t u = whole; u < blocks; u++)
    for (int k = 0; k < planes; k++) {
      const V off = only_valid(at(u, k) - mean, u);
      squares += off * off;
    }
  C variance = 0;
  for (int i = 0; i < L; i++) variance += squares[i];
  return {mean, C(1 / __builtin_sqrt(double(variance / count) + eps))};
}

// Both products of row r become what is left of them: pre = gain (W_ih x - mean) rstd, and so for
// W_hh h in part (its bias is with pre's, but for a GRU's n). The normalised values, without gain,
// go to the reserve, [G] of W_ih's and then [G] of W_hh's.
template <class S>
void Forward<S>::normalise_products(const Span& s, int64_t r) const {
  const int64_t j = s.sorted(r);
  const int own_each = this->own_count();
  C* rows[2] = {const_cast<C*>(s.pre) + r * ld, s.task.part + r * ld_first};
  S* reserve = q.reserve ? this->saved(s.d, s.t, j) : nullptr;
  for (int side = 0; side < 2; side++) {
    C* row = rows[side];
    const Moments<C> m =
        moments<C>(H, G, q.eps, [&](int64_t u, int k) { return load(row + (u * G + k) * L); });
    if (reserve) {
      C* statistics = this->statistics(s.d, s.t, j);
      statistics[side] = m.rstd;
    }
    for (int64_t u = 0; u < blocks; u++)
      for (int k = 0; k < G; k++) {
        V value = (load(row + (u * G + k) * L) - m.mean) * m.rstd;
        if (reserve) store(reserve + (u * saved_count + side * G + k) * L, value);
        value *= load(s.memory.own[s.d] + (u * own_each + side * G + k) * L);
        if (side == 0) value += load(s.memory.bias[s.d] + (u * G + k) * L);
        store(row + (u * G + k) * L, value);
      }
  }
}

template <class S>
template <bool kRegularised>
void Forward<S>::normalised_lstm(const Span& s) const {
  using Cell = LayerNormLstmCell<M>;
  constexpr int kOwn = 10;  // gains of W_ih x and W_hh h, gain and bias of c
  for (int64_t r = s.r0; r < s.r1; r++) {
    const int64_t j = s.sorted(r);
    normalise_products(s, r);
    C* held = s.task.held + r * Hp * Cell::kSaved;
    for (int64_t u = 0; u < blocks; u++) {
      V slots[4], saved[Cell::kSaved], state[1];
      for (int k = 0; k < 4; k++)
        slots[k] = load(s.pre + r * ld + (u * 4 + k) * L) +
                   load(s.task.part + r * ld_first + (u * 4 + k) * L);
      state[0] = load(s.task.state[0] + r * Hp + u * L);
      if constexpr (kRegularised)
        Cell::make_c(slots, state, this->kept(s.d, s.t, j, u).within, saved);
      else
        Cell::make_c(slots, state, Unregularised{}, saved);
      for (int k = 0; k < Cell::kSaved; k++) store(held + (u * Cell::kSaved + k) * L, saved[k]);
    }
    const Moments<C> m = moments<C>(
        H, 1, q.eps, [&](int64_t u, int) { return load(held + (u * Cell::kSaved + 5) * L); });
    if (q.reserve) {
      C* statistics = this->statistics(s.d, s.t, j);
      statistics[2] = m.rstd;
    }
    const S* h_row = kRegularised ? this->h_prev(s.d, s.t, j) : nullptr;
    for (int64_t u = 0; u < blocks; u++) {
      V saved[Cell::kSaved], state[1], before[1], h_prev{};
      for (int k = 0; k < Cell::kSaved; k++) saved[k] = load(held + (u * Cell::kSaved + k) * L);
      saved[4] = (saved[5] - m.mean) * m.rstd;
      const C* own = s.memory.own[s.d] + u * kOwn * L;
      const V c = saved[4] * load(own + 8 * L) + load(own + 9 * L);
      state[0] = saved[5];
      before[0] = load(s.task.state[0] + r * Hp + u * L);
      if (kRegularised) h_prev = load_first(h_row + u * L, H - u * L);
      give<Cell, kRegularised>(s, r, u, Cell::make_h(saved[3], c), h_prev, state, before, saved, 8);
    }
  }
}

template <class S>
template <bool kRegularised>
void Forward<S>::normalised_gru(const Span& s) const {
  using Cell = GruCell<M>;
  constexpr int kOwn = 7;  // gains of W_ih x and W_hh h, b_hn
  for (int64_t r = s.r0; r < s.r1; r++) {
    const int64_t j = s.sorted(r);
    normalise_products(s, r);
    const S* h_row = this->h_prev(s.d, s.t, j);
    for (int64_t u = 0; u < blocks; u++) {
      const C* x = s.pre + r * ld + u * 3 * L;
      const C* h = s.task.part + r * ld_first + u * 3 * L;
      V slots[4], saved[Cell::kSaved];
      slots[0] = load(x + 2 * L);
      slots[1] = load(x) + load(h);
      slots[2] = load(x + L) + load(h + L);
      slots[3] = load(h + 2 * L) + load(s.memory.own[s.d] + (u * kOwn + 6) * L);
      const V h_prev = load_first(h_row + u * L, H - u * L);
      V made;
      if constexpr (kRegularised)
        made = Cell::forward(slots, h_prev, nullptr, nullptr, this->kept(s.d, s.t, j, u).within,
                             saved);
      else
        made = Cell::forward(slots, h_prev, nullptr, nullptr, Unregularised{}, saved);
      give<Cell, kRegularised>(s, r, u, made, h_prev, nullptr, nullptr, saved, 6);
    }
  }
}

// ---- which --------------------------------------------------------------------------------------

// What to do for the cell known at run time: SEQKERN_ONE_PRODUCT(Cell), SEQKERN_TWO_PRODUCTS(Cell)
// or SEQKERN_NORMALISED(the member function).
#define SEQKERN_FOR_THE_CELL(kind)             \
  switch (kind) {                              \
    case CellKind::rnn_tanh:                   \
      SEQKERN_ONE_PRODUCT(RnnTanhCell)         \
    case CellKind::rnn_relu:                   \
      SEQKERN_ONE_PRODUCT(RnnReluCell)         \
    case CellKind::gru:                        \
      SEQKERN_ONE_PRODUCT(GruCell)             \
    case CellKind::lstm:                       \
      SEQKERN_ONE_PRODUCT(LstmCell)            \
    case CellKind::peephole_lstm:              \
      SEQKERN_ONE_PRODUCT(PeepholeLstmCell)    \
    case CellKind::cifg_lstm:                  \
      SEQKERN_ONE_PRODUCT(CifgLstmCell)        \
    case CellKind::indrnn_tanh:                \
      SEQKERN_ONE_PRODUCT(IndRnnTanhCell)      \
    case CellKind::indrnn_relu:                \
      SEQKERN_ONE_PRODUCT(IndRnnReluCell)      \
    case CellKind::slstm:                      \
      SEQKERN_ONE_PRODUCT(SlstmCell)           \
    case CellKind::gru_reset_before:           \
      SEQKERN_TWO_PRODUCTS(GruResetBeforeCell) \
    case CellKind::mgu:                        \
      SEQKERN_TWO_PRODUCTS(MguCell)            \
    case CellKind::nested_lstm:                \
      SEQKERN_TWO_PRODUCTS(NestedLstmCell)     \
    case CellKind::nested_gru:                 \
      SEQKERN_TWO_PRODUCTS(NestedGruCell)      \
    case CellKind::layer_norm_lstm:            \
      SEQKERN_NORMALISED(normalised_lstm)      \
    case CellKind::layer_norm_gru:             \
      SEQKERN_NORMALISED(normalised_gru)       \
  }                                            \
  __builtin_unreachable();

template <class S>
void Forward<S>::choose_gates() {
  end_gates = nullptr;
  const bool on = q.regularisers.on;
#define SEQKERN_ONE_PRODUCT(Cell)                             \
  gates = on ? &Forward::template make_gates<Cell<M>, true>   \
             : &Forward::template make_gates<Cell<M>, false>; \
  return;
#define SEQKERN_TWO_PRODUCTS(Cell)                              \
  gates = on ? &Forward::template begin_cell<Cell<M>, true>     \
             : &Forward::template begin_cell<Cell<M>, false>;   \
  end_gates = on ? &Forward::template end_cell<Cell<M>, true>   \
                 : &Forward::template end_cell<Cell<M>, false>; \
  return;
#define SEQKERN_NORMALISED(member)                                                 \
  gates = on ? &Forward::template member<true> : &Forward::template member<false>; \
  return;
  SEQKERN_FOR_THE_CELL(q.cell)
#undef SEQKERN_NORMALISED
#undef SEQKERN_TWO_PRODUCTS
#undef SEQKERN_ONE_PRODUCT
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
