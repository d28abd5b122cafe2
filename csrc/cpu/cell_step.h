// One step of an LSTM or a GRU whose products W_ih x + b_ih and W_hh h + b_hh are made: its gates
// (cell.h), forward and backward. The threads share the rows of the batch.
#pragma once

#include "../additive_params.h"
#include "../cell.h"
#include "threads.h"

namespace seqkern {
namespace SEQKERN_ISA {

template <class C, template <class> class CellOf>
struct Gates {
  using Cell = CellOf<Math<C>>;
  using V = Vec<C>;
  static constexpr int L = kLanes<C>;
  static constexpr int kGates = Cell::kGates, kSlots = Cell::kSlots, kSaved = Cell::kSaved;
  const GatesParams& p;

  // Which gate, in PyTorch's order, a slot of cell.h has: a GRU's are n r z n'.
  static constexpr int gate_of(int slot) {
    constexpr int gru[] = {2, 0, 1, 2};
    return kSlots == kGates ? slot : gru[slot];
  }
  static constexpr bool of_input(int slot) { return slot < kGates; }
  static constexpr bool of_hidden(int slot) { return slot >= kSlots - kGates; }

  C* row(const BatchRows& rows, int64_t b) const { return (C*)rows.data + b * rows.of_batch; }

  // f(b, h, left) for each vector of each row.
  template <class F>
  void each(const F& f) const {
    parallel(p.threads, [&](int thread, int threads) {
      for (int64_t b = part_begin(p.B, thread, threads); b < part_begin(p.B, thread + 1, threads);
           b++)
        for (int64_t h = 0; h < p.H; h += L) f(b, h, p.H - h);
    });
  }

  void forward() const {
    each([&](int64_t b, int64_t h, int64_t left) {
      const C *x = row(p.of_input, b), *y = row(p.of_hidden, b);
      V pre[kSlots], saved[kSaved];
#pragma GCC unroll 4
      for (int i = 0; i < kSlots; i++) {
        const int64_t at = gate_of(i) * p.H + h;
        pre[i] = V{};
        if (of_input(i)) pre[i] += load_first(x + at, left);
        if (of_hidden(i)) pre[i] += load_first(y + at, left);
      }
      const int64_t at = b * p.H + h;
      V c = kHasC<Cell> ? load_first((const C*)p.c_prev + at, left) : V{};
      const V h_prev = load_first((const C*)p.h_prev + at, left);
      store_first((C*)p.h + at, Cell::forward(pre, h_prev, &c, nullptr, Unregularised{}, saved),
                  left);
      if (kHasC<Cell>) store_first((C*)p.c + at, c, left);
      if (p.saved)
#pragma GCC unroll 5
        for (int i = 0; i < kSaved; i++)
          store_first((C*)p.saved + (b * kSaved + i) * p.H + h, saved[i], left);
    });
  }

  void backward() const {
    each([&](int64_t b, int64_t h, int64_t left) {
      const int64_t at = b * p.H + h;
      V saved[kSaved], dpre[kSlots];
#pragma GCC unroll 5
      for (int i = 0; i < kSaved; i++)
        saved[i] = load_first((const C*)p.saved + (b * kSaved + i) * p.H + h, left);
      V dc = kHasC<Cell> ? load_first((const C*)p.dc + at, left) : V{};
      const V c_prev = kHasC<Cell> ? load_first((const C*)p.c_prev + at, left) : V{};
      const V dh_prev = Cell::backward(
          load_first((const C*)p.dh + at, left), &dc, saved, load_first((const C*)p.h + at, left),
          load_first((const C*)p.h_prev + at, left), &c_prev, nullptr, Unregularised{}, dpre);
      store_first((C*)p.dh_prev + at, dh_prev, left);
      if (kHasC<Cell>) store_first((C*)p.dc + at, dc, left);
#pragma GCC unroll 4
      for (int i = 0; i < kSlots; i++) {
        const int64_t gate = gate_of(i) * p.H + h;
        if (of_input(i)) store_first(row(p.of_input, b) + gate, dpre[i], left);
        if (of_hidden(i)) store_first(row(p.of_hidden, b) + gate, dpre[i], left);
      }
    });
  }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
