// From the states' gradients to those of the pre-activations: what backward.h calls for some blocks
// of a step's rows; the counterpart of gates.h.
#pragma once

#include "backward.h"
#include "gates.h"

namespace seqkern {
namespace SEQKERN_ISA {

// What is known of one block of one row before its cell is differentiated.
template <class S, class Cell, bool kRegularised>
struct Block {
  using Pass = Backward<S>;
  using V = typename Pass::V;
  static constexpr int kStates = Cell::kStates - 1, L = Pass::L;

  const Pass& pass;
  int64_t d, t, j, u, valid;
  V saved[Cell::kSaved > 0 ? Cell::kSaved : 1], prev[kStates > 0 ? kStates : 1];
  V dstate[kStates > 0 ? kStates : 1];
  V kept_h{}, kept_state[kStates > 0 ? kStates : 1];  // gradients of what regularisers kept
  typename Pass::Kept kept;

  // first_saved: of the cell's own values among the reserve's.
  SEQKERN_INLINE Block(const Pass& pass, int64_t d, int64_t t, int64_t j, int64_t u,
                       int64_t first_saved)
      : pass(pass), d(d), t(t), j(j), u(u), valid(pass.H - u * L) {
    const S* from = at(t) + first_saved * L;
    for (int k = 0; k < Cell::kSaved; k++) saved[k] = load(from + k * L);
    if (kStates == 0) return;
    const bool starts = pass.starts(d, t, j);
    for (int k = 0; k < kStates; k++)
      prev[k] =
          starts
              ? load_first(
                    (const S*)pass.q.state0[k] + (d * pass.B + pass.seq.row[j]) * pass.H + u * L,
                    valid)
              : load(at(pass.backwards(d) ? t + 1 : t - 1) + (pass.saved_count - kStates + k) * L);
  }

  SEQKERN_INLINE const S* at(int64_t t) const {
    return pass.saved(d, t, j) + u * pass.saved_count * L;
  }

  // The h that the cell made.
  SEQKERN_INLINE V h() const {
    if (kRegularised) return load(at(t) + Cell::kSaved * L);
    return load_first(pass.template row_of<const S>(pass.q.y, t, j) + d * pass.P + u * L, valid);
  }

  // Takes the carried states' gradients and dh; leaves those of the states that the cell made.
  template <class C>
  SEQKERN_INLINE void take(V& dh, C* const* carried, int64_t offset) {
    for (int k = 0; k < kStates; k++) dstate[k] = load(carried[k] + offset);
    if constexpr (kRegularised) {
      kept = pass.kept(d, t, j, u);
      if (!pass.projected) {
        kept_h = kept.h * dh;
        dh = (1 - kept.h) * dh;
      }
      for (int k = 0; k < kStates; k++) {
        kept_state[k] = kept.c * dstate[k];
        dstate[k] = (1 - kept.c) * dstate[k];
      }
    }
  }

  template <class C>
  SEQKERN_INLINE void give(C* const* carried, int64_t offset) {
    for (int k = 0; k < kStates; k++)
      store(carried[k] + offset, kRegularised ? dstate[k] + kept_state[k] : dstate[k]);
  }

  SEQKERN_INLINE auto within() const {
    if constexpr (kRegularised)
      return kept.within;
    else
      return Unregularised{};
  }
};

// ---- one product --------------------------------------------------------------------------------

// From dh and dc to dpre; dh becomes what goes past W_hh, dc that of c_prev.
template <class S>
template <class Cell, bool kRegularised>
void Backward<S>::make_gradients(const Span& s) const {
  constexpr int kPlanes = Cell::kSlots + Cell::kOwn;
  for (int64_t i = 0; i < s.n; i++) {
    const int64_t j = s.sorted(i), row = in_chunk(s.chunk, s.d, s.t, j);
    const S* dy =
        q.dy.data && !projected ? this->template row_of<const S>(q.dy, s.t, j) + s.d * P : nullptr;
    const S* scale = this->scale_of(s.d, j);
    for (int64_t u = s.u0; u < s.u1; u++) {
      Block<S, Cell, kRegularised> block(*this, s.d, s.t, j, u, 0);
      C* dh_memory = projected ? s.task.dm + i * Hp + u * L : s.task.dh + i * Pp + u * L;
      V dh = load(dh_memory);
      if (dy) dh += load_first(dy + u * L, block.valid);
      block.take(dh, s.task.dstate, i * Hp + u * L);
      V own[Cell::kOwn > 0 ? Cell::kOwn : 1], dpre[kPlanes], h{}, h_prev{};
      for (int k = 0; k < Cell::kOwn; k++)
        own[k] = load(s.memory.own[s.d] + (u * Cell::kOwn + k) * L);
      if constexpr (Cell::kNeedsH) h = block.h();
      if constexpr (Cell::kNeedsHPrev)
        h_prev = load_first(s.memory.h_row[s.d][seq.first[s.t] + j] + u * L, block.valid);
      if constexpr (Cell::kSlots == 4 && Cell::kSaved == 5 && Cell::kOwn == 0)  // an LSTM
        if (projected)
          store_first(s.memory.m[s.d] + row * H + u * L, Cell::unprojected(block.saved),
                      block.valid);
      constexpr bool kScales = Cell::kNeedsH && Cell::kNeedsHPrev;  // h enters its product here
      V factor{};
      if constexpr (kScales) {
        factor = scale ? load_first(scale + u * L, block.valid) : V{} + C(1);
        h_prev *= factor;
      }
      V past = Cell::backward(dh, block.dstate, block.saved, h, h_prev, block.prev, own,
                              block.within(), dpre);
      if constexpr (kScales) past *= factor;
      block.give(s.task.dstate, i * Hp + u * L);
      if (!projected) store(dh_memory, past + block.kept_h);
      A* out = s.memory.dpre[s.d] + row * ld + u * L;
      for (int k = 0; k < kPlanes; k++) store_first(out + k * H, dpre[k], block.valid);
    }
  }
}

// ---- two products -------------------------------------------------------------------------------

template <class S>
template <class Cell, bool kRegularised>
void Backward<S>::end_gradients(const Span& s) const {
  for (int64_t i = 0; i < s.n; i++) {
    const int64_t j = s.sorted(i), row = in_chunk(s.chunk, s.d, s.t, j);
    const S* dy = q.dy.data ? this->template row_of<const S>(q.dy, s.t, j) + s.d * P : nullptr;
    for (int64_t u = s.u0; u < s.u1; u++) {
      Block<S, Cell, kRegularised> block(*this, s.d, s.t, j, u, 0);
      C* dh_memory = s.task.dh + i * Pp + u * L;
      V dh = load(dh_memory);
      if (dy) dh += load_first(dy + u * L, block.valid);
      block.take(dh, s.task.dstate, i * Hp + u * L);
      const V h_prev = load_first(s.memory.h_row[s.d][seq.first[s.t] + j] + u * L, block.valid);
      V dpre[kMostSlots], carry[1] = {}, past;
      Cell::end_backward(dh, block.dstate, block.saved, h_prev, block.prev, block.within(), dpre,
                         carry, past);
      block.give(s.task.dstate, i * Hp + u * L);
      store(dh_memory, past + block.kept_h);
      if constexpr (Cell::kCarry > 0) store(s.task.carry + i * Hp + u * L, carry[0]);
      A* out = s.memory.dpre[s.d] + row * ld + u * L;
      for (int k = Cell::kEndPlane; k < Cell::kPlanes; k++)
        store_first(out + k * H, dpre[k], block.valid);
    }
  }
}

template <class S>
template <class Cell, bool kRegularised>
void Backward<S>::begin_gradients(const Span& s) const {
  for (int64_t i = 0; i < s.n; i++) {
    const int64_t j = s.sorted(i), row = in_chunk(s.chunk, s.d, s.t, j);
    const S* scale = this->scale_of(s.d, j);
    for (int64_t u = s.u0; u < s.u1; u++) {
      Block<S, Cell, kRegularised> block(*this, s.d, s.t, j, u, 0);
      if constexpr (kRegularised) block.kept = this->kept(s.d, s.t, j, u);
      constexpr int kStates = Cell::kStates - 1;
      for (int k = 0; k < kStates; k++) block.dstate[k] = load(s.task.dstate[k] + i * Hp + u * L);
      const V h_prev = load_first(s.memory.h_row[s.d][seq.first[s.t] + j] + u * L, block.valid);
      const V factor = scale ? load_first(scale + u * L, block.valid) : V{} + C(1);
      V dmid[Cell::kMid], dpre[kMostSlots], carry[1] = {}, mid[Cell::kMid];
      for (int k = 0; k < Cell::kMid; k++) dmid[k] = load(s.task.dmid[k] + i * Hp + u * L);
      if constexpr (Cell::kCarry > 0) carry[0] = load(s.task.carry + i * Hp + u * L);
      C* dh_memory = s.task.dh + i * Pp + u * L;
      V past = load(dh_memory);
      Cell::begin_backward(dmid, block.dstate, block.saved, h_prev, h_prev * factor, factor,
                           block.prev, block.within(), carry, dpre, past, mid);
      for (int k = 0; k < kStates; k++) store(s.task.dstate[k] + i * Hp + u * L, block.dstate[k]);
      store(dh_memory, past);
      A* out = s.memory.dpre[s.d] + row * ld + u * L;
      for (int k = 0; k < Cell::kEndPlane; k++) store_first(out + k * H, dpre[k], block.valid);
      for (int k = 0; k < Cell::kMid; k++)
        store_first(s.memory.mid[k][s.d] + row * H + u * L, mid[k], block.valid);
    }
  }
}

// ---- normalised rows ----------------------------------------------------------------------------

// The sum of n lanes in a vector's order.
template <class C>
SEQKERN_INLINE C sum_of_lanes(Vec<C> v) {
  C sum = 0;
  for (int i = 0; i < kLanes<C>; i++) sum += v[i];
  return sum;
}

// From the gradients of what gain and bias make of a row's normalised products, which are also
// summed over all rows, to those of the products themselves: planes
//   [G] W_ih x   [G] W_hh h   [G] as given
template <class S, class Held>
SEQKERN_INLINE void differentiate_products(const Backward<S>& pass,
                                           const typename Backward<S>::Span& s, int64_t j,
                                           typename Backward<S>::A* out, const Held& gradient) {
  using V = typename Backward<S>::V;
  using C = typename Backward<S>::C;
  constexpr int L = Backward<S>::L;
  const int G = pass.G, own_each = pass.own_count();
  const int64_t H = pass.H;
  const S* reserve = pass.saved(s.d, s.t, j);
  const C* statistics = pass.statistics(s.d, s.t, j);
  for (int side = 0; side < 2; side++) {
    const auto gain = [&](int64_t u, int k) {
      return load(s.memory.own[s.d] + (u * own_each + side * G + k) * L);
    };
    const auto normalised = [&](int64_t u, int k) {
      return load(reserve + (u * pass.saved_count + side * G + k) * L);
    };
    V sum{}, sum_normalised{};
    for (int64_t u = 0; u < pass.blocks; u++)
      for (int k = 0; k < G; k++) {
        const V d = gradient(side, u, k), x = normalised(u, k);
        sum += d * gain(u, k);
        sum_normalised += d * gain(u, k) * x;
      }
    const C count = C(G) * C(H), rstd = statistics[side];
    const C mean = sum_of_lanes<C>(sum) / count, slope = sum_of_lanes<C>(sum_normalised) / count;
    for (int64_t u = 0; u < pass.blocks; u++)
      for (int k = 0; k < G; k++) {
        const V x = normalised(u, k);
        store_first(out + (side * G + k) * H + u * L,
                    (gradient(side, u, k) * gain(u, k) - mean - x * slope) * rstd, H - u * L);
      }
  }
  for (int64_t u = 0; u < pass.blocks; u++)
    for (int k = 0; k < G; k++)
      store_first(out + (2 * G + k) * H + u * L, gradient(0, u, k), H - u * L);
}

template <class S>
template <bool kRegularised>
void Backward<S>::normalised_lstm(const Span& s) const {
  using Cell = LayerNormLstmCell<M>;
  constexpr int kOwn = 10;
  for (int64_t i = 0; i < s.n; i++) {
    const int64_t j = s.sorted(i);
    const S* dy = q.dy.data ? this->template row_of<const S>(q.dy, s.t, j) + s.d * P : nullptr;
    A* out = s.memory.dpre[s.d] + in_chunk(s.chunk, s.d, s.t, j) * ld;
    const C rstd = this->statistics(s.d, s.t, j)[2];
    C* held = s.mine.held;
    V sum{}, sum_normalised{};
    for (int64_t u = 0; u < blocks; u++) {  // to the gradient of the normalised c
      Block<S, Cell, kRegularised> block(*this, s.d, s.t, j, u, 8);
      C* dh_memory = s.task.dh + i * Pp + u * L;
      V dh = load(dh_memory), dpre[4];
      if (dy) dh += load_first(dy + u * L, block.valid);
      block.take(dh, s.task.dstate, i * Hp + u * L);
      const C* own = s.memory.own[s.d] + u * kOwn * L;
      const V gain = load(own + 8 * L), normalised = block.saved[4];
      const V d = Cell::h_backward(dh, block.saved, normalised * gain + load(own + 9 * L), dpre);
      store(dh_memory, block.kept_h);
      store(held + 3 * Hp + u * L, dpre[3]);
      store(held + 4 * Hp + u * L, d * gain);
      store_first(out + 12 * H + u * L, d, block.valid);
      sum += d * gain;
      sum_normalised += d * gain * normalised;
    }
    const C mean_d = sum_of_lanes<C>(sum) / C(H), slope = sum_of_lanes<C>(sum_normalised) / C(H);
    for (int64_t u = 0; u < blocks; u++) {
      Block<S, Cell, kRegularised> block(*this, s.d, s.t, j, u, 8);
      V none{}, dpre[4];
      block.take(none, s.task.dstate, i * Hp + u * L);
      const V normalised = block.saved[4];
      const V dc =
          block.dstate[0] + (load(held + 4 * Hp + u * L) - mean_d - normalised * slope) * rstd;
      Cell::c_backward(dc, block.dstate, block.saved, block.prev, block.within(), dpre);
      block.give(s.task.dstate, i * Hp + u * L);
      for (int k = 0; k < 3; k++) store(held + k * Hp + u * L, dpre[k]);
    }
    differentiate_products(*this, s, j, out,
                           [&](int, int64_t u, int k) { return load(held + k * Hp + u * L); });
  }
}

template <class S>
template <bool kRegularised>
void Backward<S>::normalised_gru(const Span& s) const {
  using Cell = GruCell<M>;
  for (int64_t i = 0; i < s.n; i++) {
    const int64_t j = s.sorted(i);
    const S* dy = q.dy.data ? this->template row_of<const S>(q.dy, s.t, j) + s.d * P : nullptr;
    A* out = s.memory.dpre[s.d] + in_chunk(s.chunk, s.d, s.t, j) * ld;
    C* held = s.mine.held;
    for (int64_t u = 0; u < blocks; u++) {
      Block<S, Cell, kRegularised> block(*this, s.d, s.t, j, u, 6);
      C* dh_memory = s.task.dh + i * Pp + u * L;
      V dh = load(dh_memory), dpre[4];
      if (dy) dh += load_first(dy + u * L, block.valid);
      block.take(dh, s.task.dstate, i * Hp + u * L);
      const V h_prev = load_first(s.memory.h_row[s.d][seq.first[s.t] + j] + u * L, block.valid);
      const V past = Cell::backward(dh, nullptr, block.saved, V{}, h_prev, nullptr, nullptr,
                                    block.within(), dpre);
      store(dh_memory, past + block.kept_h);
      store(held + u * L, dpre[1]);
      store(held + Hp + u * L, dpre[2]);
      store(held + 2 * Hp + u * L, dpre[0]);
      store(held + 3 * Hp + u * L, dpre[3]);  // W_hh's n
      store_first(out + 9 * H + u * L, dpre[3], block.valid);
    }
    differentiate_products(*this, s, j, out, [&](int side, int64_t u, int k) {
      return load(held + (side == 1 && k == 2 ? 3 : k) * Hp + u * L);
    });
  }
}

// ---- which --------------------------------------------------------------------------------------

template <class S>
void Backward<S>::choose_gates() {
  begin_gates = nullptr;
  const bool on = q.regularisers.on;
#define SEQKERN_ONE_PRODUCT(Cell)                                  \
  gates = on ? &Backward::template make_gradients<Cell<M>, true>   \
             : &Backward::template make_gradients<Cell<M>, false>; \
  return;
#define SEQKERN_TWO_PRODUCTS(Cell)                                        \
  gates = on ? &Backward::template end_gradients<Cell<M>, true>           \
             : &Backward::template end_gradients<Cell<M>, false>;         \
  begin_gates = on ? &Backward::template begin_gradients<Cell<M>, true>   \
                   : &Backward::template begin_gradients<Cell<M>, false>; \
  return;
#define SEQKERN_NORMALISED(member)                                                   \
  gates = on ? &Backward::template member<true> : &Backward::template member<false>; \
  return;
  SEQKERN_FOR_THE_CELL(q.cell)
#undef SEQKERN_NORMALISED
#undef SEQKERN_TWO_PRODUCTS
#undef SEQKERN_ONE_PRODUCT
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
