// One recurrent layer, both directions, over a whole batch of sequences: what every cell has in
// common.
//
//   forward     pre_t = W_ih x_t + b  +  W_hh h_{t-1};   h_t, c_t = cell(pre_t, h_{t-1}, c_{t-1})
//   backward    the same steps the other way round, then dW and dx as products over many rows
//
// Who owns what. A *task* is one direction of one slice of the batch: it needs nothing from the
// others, so the threads share out the tasks and never wait for one another. Only when there are
// fewer rows than threads do the *members* of a task share its hidden units, and meet at a barrier
// once per product. Slice s of n has the sorted rows s, s + n, s + 2n, ...: all slices are equally
// long, whatever the lengths.
//
// Units are worked on in *blocks* of kLanes. Of a row, a block's pre-activations lie together,
// [slots][kLanes], and so do its saved values, [saved][kLanes]; a panel of weights (gemm.h) makes
// one block's gates, or, for products of one or two gates, several blocks'.
//
// The skeleton knows a cell by its CellShape and by the functions that make its gates (gates.h). A
// cell of one product has them called as soon as a panel is done for a few rows, which are still in
// L1 then, and its slots begin with W_ih's part. Cells with a second product, and those that
// normalise rows, get W_hh's part apart, when all of it is there.
#pragma once

#include "../cell.h"
#include "gemm.h"
#include "step.h"
#include "threads.h"

namespace seqkern {
namespace SEQKERN_ISA {

constexpr int64_t kChunkRows =
    96;  // rows of W_ih x made at a time: they stay in cache until their steps come
constexpr int64_t kBlockK = 256;  // most rows per round of a weight gradient, gates per round of dx
constexpr int64_t kMinSliceRows =
    4;  // fewer rows don't keep the multipliers busy while weights stream by

constexpr int kMostSlots = 8, kMostMid = 2, kMostProducts = 2;

struct Plan {
  int64_t slices;   // of the batch
  int64_t members;  // threads per task
};

inline Plan make_plan(const LayerParams& p, int threads, int64_t step_bytes, int64_t max_members) {
  int64_t a = p.D, divisor = threads;  // the greatest common one: all threads get as many tasks
  while (a != 0) {
    const int64_t rest = divisor % a;
    divisor = a;
    a = rest;
  }
  Plan plan{threads / divisor, 1};
  const int64_t most = p.seq.B / kMinSliceRows > 0 ? p.seq.B / kMinSliceRows : 1;
  if (plan.slices > most) plan.slices = most;
  const int64_t tasks = p.D * plan.slices;
  if (tasks < threads && step_bytes >= 32768 && !p.weights[0].w_hr && !cell_shape(p.cell).rows) {
    plan.members = threads / tasks;
    if (plan.members > max_members) plan.members = max_members;
  }
  return plan;
}

// A slice's rows among all rows.
struct Slice {
  int64_t slices, slice;
  int64_t operator()(int64_t i) const { return i * slices + slice; }
};

// One matrix within a step: some gates of W_hh, or of an inner cell's weights.
struct Product {
  int gates;
  int blocks_per_panel;
  int rotation;  // the gate that comes first
  int slot;      // among those that the product has its part in
  int plane;     // of its first gate, among the gradients of pre-activations
  int mid;       // what it multiplies: -1 h, else which of the vectors in the middle
};

// The products after the first: of what a cell's first gates give.
inline int second_products(const CellShape& shape, Product (&products)[kMostProducts]) {
  if (shape.mid == 0) return 0;
  if (shape.mid == 1) {  // the rest of W_hh's gates
    products[0] = {shape.hidden_gates - shape.first_gates, 1, 0, 0, shape.first_gates, 0};
    return 1;
  }
  const int inner = shape.slots - shape.mid_slots;  // an inner cell's slots come last
  products[0] = {shape.input_gates, 1, shape.rotation, 0, inner, 0};
  const int apart = shape.mid_slots - shape.hidden_gates;
  products[1] = {shape.hidden_gates, 1, 0, apart, inner + apart, 1};
  return 2;
}

// Blocks of one, two or four gates fill a panel, if their slots lie side by side.
constexpr int blocks_per_panel(int gates, int slots) {
  return gates != slots ? 1 : gates == 1 ? kMaxNV : gates == 2 ? kMaxNV / 2 : 1;
}

// What forward and backward share: sizes, and where rows lie.
template <class S_>
struct Layer {
  using S = S_;          // stored
  using A = Operand<S>;  // multiplied
  using C = Compute<S>;  // computed
  using V = Vec<C>;
  using M = Math<C>;
  static constexpr int L = kLanes<C>;

  const LayerParams& p;
  const Sequence& seq;
  const CellShape& cell;
  const int G;                    // gates of W_ih
  const int saved_count, states;  // states beside h
  const int64_t T, B, I, H, P, D, blocks, Hp, Pp, reserve_row;
  const bool projected;
  const bool apart;  // W_hh's products lie apart from W_ih's
  int seconds;       // products after the first
  Product first{}, second[kMostProducts];

  explicit Layer(const LayerParams& params)
      : p(params),
        seq(params.seq),
        cell(cell_shape(params.cell)),
        G(cell.input_gates),
        saved_count(saved_values(cell, params.regularisers.on)),
        states(cell.states - 1),
        T(seq.T),
        B(seq.B),
        I(p.I),
        H(p.H),
        P(p.P),
        D(p.D),
        blocks(ceil_div(H, L)),
        Hp(round_up(H, 16)),
        Pp(round_up(P, 16)),
        reserve_row(reserve_width(cell, params.regularisers.on, H)),
        projected(p.weights[0].w_hr != nullptr),
        apart(cell.mid > 0 || cell.rows),
        seconds(second_products(cell, second)) {
    const int slots = apart ? cell.first_gates : cell.outer_slots;
    const int plane = cell.rows      ? cell.input_gates
                      : cell.mid > 0 ? cell.outer_slots - cell.hidden_gates
                                     : cell.outer_slots - cell.first_gates;
    first = {cell.first_gates,
             blocks_per_panel(cell.first_gates, slots),
             0,
             apart ? 0 : plane,
             plane,
             -1};
    for (int i = 0; i < seconds; i++)
      second[i].blocks_per_panel = blocks_per_panel(second[i].gates, cell.mid_slots);
  }

  bool backwards(int64_t d) const { return d >= p.reverse; }

  // Rows of a slice that are alive at step t.
  int64_t alive(int64_t t, int64_t slice, int64_t slices) const {
    return seq.active[t] <= slice ? 0 : ceil_div(seq.active[t] - slice, slices);
  }

  template <class T_>
  T_* row_of(const RowTensor& tensor, int64_t t, int64_t j) const {
    return (T_*)tensor.data + tensor.step[t] + seq.row[j] * tensor.stride;
  }

  // Is step t of direction d its row's first?
  bool starts(int64_t d, int64_t t, int64_t j) const {
    return !backwards(d) ? t == 0 : t == T - 1 || j >= seq.active[t + 1];
  }

  // h before step t of direction d: from y, or from h0 where t is the row's first step.
  const S* h_prev(int64_t d, int64_t t, int64_t j) const {
    if (starts(d, t, j)) return (const S*)p.h0 + (d * B + seq.row[j]) * P;
    return row_of<const S>(p.y, backwards(d) ? t + 1 : t - 1, j) + d * P;
  }

  // The saved values of one row of one direction; those of block u are vectors, from u * L *
  // saved_count on.
  S* saved(int64_t d, int64_t t, int64_t j) const {
    return (S*)p.reserve + ((seq.first[t] + j) * D + d) * reserve_row;
  }
  // A normalised row's statistics.
  C* statistics(int64_t d, int64_t t, int64_t j) const {
    return (C*)(saved(d, t, j) + saved_count * Hp);
  }

  // Where h is multiplied by regularisers.scale before it enters a product; null: nowhere.
  const S* scale_of(int64_t d, int64_t j) const {
    if (!p.regularisers.scale) return nullptr;
    return (const S*)p.regularisers.scale + (d * B + seq.row[j]) * P;
  }
  void scale_row(S* out, const S* h, const S* scale) const {
    for (int64_t k = 0; k < P; k += L)
      store_first(out + k, load_first(h + k, P - k) * load_first(scale + k, P - k), P - k);
  }

  // What regularisers do to one block of one row.
  struct Kept {
    V h, c;  // how much of the states before is kept
    Regularised<V> within;
  };
  SEQKERN_INLINE Kept kept(int64_t d, int64_t t, int64_t j, int64_t u) const {
    const Regularisers& r = p.regularisers;
    Kept kept{V{} + C(r.keep_h), V{} + C(r.keep_c), {V{} + C(1), V{} + C(r.cell_clip)}};
    if (r.mask.data) {
      const uint8_t* bits = row_of<const uint8_t>(r.mask, t, j) + d * H + u * L;
      const int64_t n = H - u * L < L ? H - u * L : L;
      C h[L] = {}, c[L] = {}, factor[L] = {};
      for (int64_t i = 0; i < n; i++) {
        h[i] = C(bits[i] & 1);
        c[i] = C(bits[i] >> 1 & 1);
        factor[i] = bits[i] & 4 ? C(0) : C(r.candidate_scale);
      }
      kept.h = load(h), kept.c = load(c), kept.within.factor = load(factor);
    }
    return kept;
  }

  // Vectors of panel i where n outputs make panels of kMaxNV blocks.
  static int nv_of(int64_t n, int64_t i) {
    const int64_t left = ceil_div(n, L) - i * kMaxNV;
    return int(left < kMaxNV ? left : kMaxNV);
  }

  // Steps of sorted row j, if row j - 1 has `len` of them (to begin with, T).
  int64_t length(int64_t j, int64_t len) const {
    while (len > 0 && seq.active[len - 1] <= j) len--;
    return len;
  }

  // The weight that the i-th second product multiplies by, [gates*H, H].
  const S* second_weight(int64_t d, int i) const {
    const Weights& w = p.weights[d];
    if (cell.mid == 1) return (const S*)w.w_hh + cell.first_gates * H * P;
    return (const S*)w.own[i];
  }

  // Numbers of a unit's own that the gates read.
  int own_count() const {
    if (cell.mid == 2) return 0;  // an inner cell's are matrices and biases
    if (cell.hidden_gates == 0) return 1;
    if (cell.rows) return 2 * G + (states > 0 ? 2 : 1);  // the other biases are in `bias`
    return cell.own > 0 ? cell.own_gates[0] : 0;
  }

  // Adds [gates*H] numbers to the slots of some blocks; gate g + rotation to slot g.
  void add_to_slots(C* out, int slots, int slot, int rotation, int gates, const S* numbers,
                    int64_t block_begin, int64_t block_end) const {
    if (!numbers) return;
    for (int64_t u = block_begin; u < block_end; u++)
      for (int g = 0; g < gates; g++) {
        C* at = out + (u * slots + slot + g) * L;
        const S* from = numbers + (g + rotation) % gates * H + u * L;
        store(at, load(at) + load_first(from, H - u * L));
      }
  }

  // Those numbers, [blocks][own_count][L].
  void make_own(C* own, const Weights& w) const {
    const int count = own_count();
    if (count == 0) return;
    for (int64_t i = 0; i < Hp * count; i++) own[i] = 0;
    const auto add = [&](int slot, int gates, const void* numbers) {
      add_to_slots(own, count, slot, 0, gates, (const S*)numbers, 0, blocks);
    };
    if (cell.hidden_gates == 0) return add(0, 1, w.w_hh);
    if (!cell.rows) return add(0, count, w.own[0]);
    add(0, G, w.own[0]);
    add(G, G, w.own[2]);
    if (states > 0) {
      add(2 * G, 1, w.own[4]);
      add(2 * G + 1, 1, w.own[5]);
    } else if (w.own[3]) {
      add(2 * G, 1, (const S*)w.own[3] + 2 * H);
    }
  }
};

template <class S>
struct Forward : Layer<S> {
  using Base = Layer<S>;
  using Base::apart, Base::B, Base::blocks, Base::cell, Base::D, Base::first, Base::G, Base::H,
      Base::Hp, Base::I, Base::L, Base::P, Base::Pp, Base::projected, Base::saved_count,
      Base::second, Base::seconds, Base::seq, Base::states, Base::T;
  using typename Base::A;
  using typename Base::C;
  using typename Base::M;
  using typename Base::V;

  const ForwardParams& q;
  const int outer;                    // slots of a row of pre-activations
  const int64_t ld;                   // elements of such a row
  const int64_t ld_first, ld_second;  // of a row of a product that lies apart
  const int group;                    // blocks that members may not part: the most that a panel has
  const Product input;                // W_ih x

  struct Task {
    C* pre;    // [chunk rows][Hp * outer]
    C* part;   // [slice rows][ld_first], if apart
    C* part2;  // [slice rows][ld_second], with second products
    C* held;   // [slice rows][Hp * saved]: a cell's values between its two products (or passes)
    A* mid[kMostMid];           // [slice rows][Hp]
    C* state[kMostStates - 1];  // [slice rows][Hp]
    A* m;                       // [slice rows][Hp]: h before its projection
    C* h;                       // [slice rows][Pp]: h after it
    Barrier* barrier;
  };
  struct Thread {
    Rows<S> x;  // [chunk rows] of I
    Rows<S> h;  // [slice rows] of P
    Rows<A> m;  // [slice rows] of H, if projected or with second products
    S* scaled;  // [slice rows][P], if h is scaled
  };
  struct Memory {
    A* w_ih[kMostDirections];  // packed
    A* w_hh[kMostDirections];
    A* w_second[kMostProducts][kMostDirections];
    A* w_hr[kMostDirections];
    C* bias[kMostDirections];   // [blocks][outer][L]
    C* bias2[kMostDirections];  // [blocks][mid_slots][L], of an inner cell
    C* own[kMostDirections];    // [blocks][own][L]: the cell's own parameters of a unit each
    Scratch tasks;              // carved up once the plan is known
  };

  // Some blocks of some rows of one step, whose products are done.
  struct Span {
    const Memory& memory;
    const Task& task;
    int64_t d, t;
    int64_t r0, r1;  // rows of the slice
    Slice sorted;
    int64_t u0, u1;  // blocks
    const C* pre;    // of row 0
  };
  using Gates = void (Forward::*)(const Span&) const;
  Gates gates, end_gates;  // the latter after the second products

  explicit Forward(const ForwardParams& params)
      : Base(params),
        q(params),
        outer(cell.outer_slots),
        ld(Hp * outer),
        ld_first(Hp * (cell.first_gates > 0 ? cell.first_gates : 1)),
        ld_second(Hp * (cell.mid_slots > 0 ? cell.mid_slots : 1)),
        group(most_blocks_per_panel()),
        input{G, blocks_per_panel(G, outer), cell.rotation, 0, 0, -1} {
    choose_gates();
  }

  void choose_gates();  // gates.h

  int most_blocks_per_panel() const {
    int most = blocks_per_panel(G, cell.outer_slots);
    if (first.blocks_per_panel > most) most = first.blocks_per_panel;
    for (int i = 0; i < seconds; i++)
      if (second[i].blocks_per_panel > most) most = second[i].blocks_per_panel;
    return most;
  }

  int64_t groups() const { return ceil_div(blocks, group); }
  int64_t panels(const Product& w) const { return ceil_div(blocks, w.blocks_per_panel); }
  int64_t size_of(const Product& w, int64_t K) const {
    return panel_size<A>(K, w.gates * w.blocks_per_panel);
  }
  int64_t slice_rows(const Plan& plan) const { return ceil_div(B, plan.slices); }
  int64_t chunk_rows(const Plan& plan) const {
    return slice_rows(plan) > kChunkRows ? slice_rows(plan) : kChunkRows;
  }

  Plan plan(int threads) const {
    return make_plan(q, threads, cell.hidden_gates * H * P * int64_t(sizeof(A)), groups());
  }

  Memory carve_shared(char* base) const {
    Memory memory{};
    Scratch scratch{base};
    for (int64_t d = 0; d < D; d++) {
      memory.w_ih[d] = scratch.take<A>(panels(input) * size_of(input, I));
      if (first.gates > 0) memory.w_hh[d] = scratch.take<A>(panels(first) * size_of(first, P));
      for (int i = 0; i < seconds; i++)
        memory.w_second[i][d] = scratch.take<A>(panels(second[i]) * size_of(second[i], H));
      if (projected)
        memory.w_hr[d] = scratch.take<A>(ceil_div(P, L * kMaxNV) * panel_size<A>(H, kMaxNV));
      memory.bias[d] = scratch.take<C>(Hp * outer);
      if (cell.mid == 2) memory.bias2[d] = scratch.take<C>(ld_second);
      if (this->own_count() > 0) memory.own[d] = scratch.take<C>(Hp * this->own_count());
    }
    memory.tasks = scratch;
    return memory;
  }

  Task carve_task(Scratch& scratch, const Plan& plan) const {
    Task task{};
    const int64_t n = slice_rows(plan);
    task.pre = scratch.take<C>(chunk_rows(plan) * ld);
    if (apart) task.part = scratch.take<C>(n * ld_first);
    if (cell.mid > 0) task.part2 = scratch.take<C>(n * ld_second);
    if (cell.mid > 0) task.held = scratch.take<C>(n * Hp * cell.saved);
    if (cell.rows && states > 0) task.held = scratch.take<C>(n * Hp * LayerNormLstmCell<M>::kSaved);
    for (int i = 0; i < cell.mid; i++) task.mid[i] = scratch.take<A>(n * Hp);
    for (int i = 0; i < states; i++) task.state[i] = scratch.take<C>(n * Hp);
    task.m = scratch.take<A>(projected ? n * Hp : 0);
    task.h = scratch.take<C>(projected ? n * Pp : 0);
    task.barrier = scratch.take<Barrier>(1);
    return task;
  }

  Thread carve_thread(Scratch& scratch, const Plan& plan) const {
    Thread thread{};
    thread.x = Rows<S>::carve(scratch, chunk_rows(plan), I);
    thread.h = Rows<S>::carve(scratch, slice_rows(plan), P);
    thread.m = Rows<A>::carve(scratch, projected || cell.mid > 0 ? slice_rows(plan) : 0, H);
    if (q.regularisers.scale) thread.scaled = scratch.take<S>(slice_rows(plan) * P);
    return thread;
  }

  size_t scratch_bytes() const {
    if (is_step()) {
      Scratch scratch{nullptr};
      Memory memory{};
      for (int64_t d = 0; d < D; d++) carve_step(scratch, memory, d);
      return scratch.used;
    }
    const Memory memory = carve_shared(nullptr);
    size_t most = 0;
    const int counts[2] = {1, q.threads};
    for (int threads : counts) {
      Scratch scratch = memory.tasks;
      const Plan pl = plan(threads);
      for (int64_t i = 0; i < D * pl.slices; i++) carve_task(scratch, pl);
      for (int i = 0; i < threads; i++) carve_thread(scratch, pl);
      if (scratch.used > most) most = scratch.used;
    }
    return most;
  }

  // Gates of a matrix [gates*H, K] -> panels.
  void pack_gates(A* packed, const S* w, int64_t K, const Product& product, int thread,
                  int threads) const {
    const int64_t n = panels(product);
    for (int64_t i = part_begin(n, thread, threads); i < part_begin(n, thread + 1, threads); i++) {
      int64_t base[kMaxNV], valid[kMaxNV];
      const int nv = panel_nv(product, i);
      for (int v = 0; v < nv; v++) {
        const int64_t unit = (i * product.blocks_per_panel + v / product.gates) * L;
        base[v] = (v + product.rotation) % product.gates * H + unit;
        valid[v] = H - unit;
      }
      pack_panel_of_rows(packed + i * size_of(product, K), w, K, K, nv, base, valid);
    }
  }

  // Vectors of panel i.
  int panel_nv(const Product& product, int64_t i) const {
    const int64_t left = blocks - i * product.blocks_per_panel;
    return product.gates * int(left < product.blocks_per_panel ? left : product.blocks_per_panel);
  }

  // All that is added to the products of some blocks, in the order of the slots.
  void make_bias(C* bias, const Weights& w, int64_t block_begin, int64_t block_end) const {
    for (int64_t i = block_begin * outer * L; i < block_end * outer * L; i++) bias[i] = 0;
    const auto add = [&](int slot, int rotation, int gates, const void* numbers) {
      this->add_to_slots(bias, outer, slot, rotation, gates, (const S*)numbers, block_begin,
                         block_end);
    };
    const int hidden = cell.hidden_gates > 0 ? cell.hidden_gates : 1;
    add(0, cell.rotation, G, w.b_ih);
    add(outer - hidden, 0, hidden, w.b_hh);
    if (cell.rows) {  // the normalised products' biases; a GRU's b_hn stays with its product
      add(0, 0, G, w.own[1]);
      add(0, 0, q.cell == CellKind::layer_norm_gru ? 2 : G, w.own[3]);
    }
  }

  // The bias of an inner cell.
  void make_bias2(C* bias2, const Weights& w) const {
    for (int64_t i = 0; i < ld_second; i++) bias2[i] = 0;
    for (int i = 0; i < 2; i++)
      this->add_to_slots(bias2, cell.mid_slots, second[i].slot, second[i].rotation, second[i].gates,
                         (const S*)w.own[2 + i], 0, blocks);
  }

  // ---- a single step ----------------------------------------------------------------------------

  // Whether this call is one step of a few rows: then nothing is packed. What a second product
  // multiplies must then be stored as its weights lie in memory.
  bool is_step() const {
    return T == 1 && B <= kStepBatch && !projected && !q.regularisers.scale &&
           (cell.mid == 0 || std::is_same_v<A, S>);
  }

  // Of a direction: its task, and in memory what the gates read.
  Task carve_step(Scratch& scratch, Memory& memory, int64_t d) const {
    const Task task = carve_task(scratch, Plan{1, 1});
    memory.bias[d] = scratch.take<C>(Hp * outer);
    if (cell.mid == 2) memory.bias2[d] = scratch.take<C>(ld_second);
    if (this->own_count() > 0) memory.own[d] = scratch.take<C>(Hp * this->own_count());
    return task;
  }

  void run_step() const {
    Scratch scratch{(char*)q.scratch};
    Task tasks[kMostDirections];
    Memory memory{};
    for (int64_t d = 0; d < D; d++) {
      tasks[d] = carve_step(scratch, memory, d);
      this->make_own(memory.own[d], q.weights[d]);
      if (cell.mid == 2) make_bias2(memory.bias2[d], q.weights[d]);
    }
    // All directions' rows that are alive, or blocks, shared out between the threads.
    const int64_t n = seq.active[0];
    const auto each = [&](int64_t count, const auto& run) {
      const int64_t all = D * count;
      parallel(all < q.threads ? int(all) : q.threads, [&](int thread, int threads) {
        const int64_t end = part_begin(all, thread + 1, threads);
        for (int64_t i = part_begin(all, thread, threads); i < end;) {
          const int64_t first = i % count, left = count - first;
          const int64_t last = first + (end - i < left ? end - i : left);
          run(i / count, first, last);
          i += last - first;
        }
      });
    };
    each(blocks, [&](int64_t d, int64_t begin, int64_t end) {
      make_bias(memory.bias[d], q.weights[d], begin, end);
      load_states(tasks[d], d, B, Slice{1, 0}, begin, end);
      for (int64_t u = begin; u < end; u++) step_block(memory, tasks[d], d, u);
    });
    const auto span = [&](int64_t d, int64_t r0, int64_t r1) {
      return Span{memory, tasks[d], d, 0, r0, r1, Slice{1, 0}, 0, blocks, tasks[d].pre};
    };
    if (apart) each(n, [&](int64_t d, int64_t r0, int64_t r1) { (this->*gates)(span(d, r0, r1)); });
    if constexpr (std::is_same_v<A, S>)
      if (cell.mid > 0) {
        each(blocks, [&](int64_t d, int64_t begin, int64_t end) {
          for (int64_t u = begin; u < end; u++) step_seconds(memory, tasks[d], d, u);
        });
        each(n, [&](int64_t d, int64_t r0, int64_t r1) { (this->*end_gates)(span(d, r0, r1)); });
      }
    for (int64_t d = 0; d < D; d++) finish(tasks[d], d, B, Slice{1, 0}, 0, 0, blocks);
  }

  // Block u of the only step's rows: the first products, and the gates, if they need no more.
  void step_block(const Memory& memory, const Task& task, int64_t d, int64_t u) const {
    const Weights& w = q.weights[d];
    if (apart) {
      const int64_t n = seq.active[0];
      for (int64_t r = 0; r < n; r++) {
        C* pre = task.pre + r * ld + u * outer * L;
        for (int i = 0; i < outer * L; i++)
          pre[i] = cell.rows ? C(0) : memory.bias[d][u * outer * L + i];
        C* part = task.part + r * ld_first + u * first.gates * L;
        for (int i = 0; i < first.gates * L; i++) part[i] = 0;
      }
      step_product(input, (const S*)w.w_ih, I, u, task.pre, ld, outer,
                   [&](int64_t r) { return this->template row_of<const S>(q.x, 0, r); });
      step_product(first, (const S*)w.w_hh, P, u, task.part, ld_first, first.gates,
                   [&](int64_t r) { return this->h_prev(d, 0, r); });
    } else if (outer == 4 && first.gates == 4) {
      step_gates<4, 4>(memory, task, d, u);
    } else if (outer == 4) {
      step_gates<4, 3>(memory, task, d, u);
    } else if (outer == 3) {
      step_gates<3, 3>(memory, task, d, u);
    } else {
      step_gates<1, 1>(memory, task, d, u);
    }
  }

  // Block u of the second products.
  void step_seconds(const Memory& memory, const Task& task, int64_t d, int64_t u) const {
    const int size = cell.mid_slots * L;
    for (int64_t r = 0; r < seq.active[0]; r++)
      for (int i = 0; i < size; i++)
        task.part2[r * ld_second + u * size + i] =
            cell.mid == 2 ? memory.bias2[d][u * size + i] : C(0);
    for (int i = 0; i < seconds; i++)
      step_product(second[i], this->second_weight(d, i), H, u, task.part2, ld_second,
                   cell.mid_slots, [&](int64_t r) { return task.mid[second[i].mid] + r * Hp; });
  }

  // Block u of out [rows][blocks][slots][L] += a product's gates, of w [gates*H, K] and row(r).
  template <class Row>
  void step_product(const Product& product, const S* w, int64_t K, int64_t u, C* out,
                    int64_t ld_out, int slots, const Row& row) const {
    out += (u * slots + product.slot) * L;
    if (product.gates == 4)
      step_product_of<4>(product, w, K, u, out, ld_out, row);
    else if (product.gates == 3)
      step_product_of<3>(product, w, K, u, out, ld_out, row);
    else if (product.gates == 2)
      step_product_of<2>(product, w, K, u, out, ld_out, row);
    else
      step_product_of<1>(product, w, K, u, out, ld_out, row);
  }
  template <int kGates, class Row>
  void step_product_of(const Product& product, const S* w, int64_t K, int64_t u, C* out,
                       int64_t ld_out, const Row& row) const {
    for (int64_t r0 = 0; r0 < seq.active[0]; r0 += kStepRows) {
      const int rows = int(seq.active[0] - r0 < kStepRows ? seq.active[0] - r0 : kStepRows);
      Dots<S> a{}, nothing{};
      a.K = K;
      for (int r = 0; r < rows; r++) a.a[r] = row(r0 + r);
      for (int64_t unit = u * L; unit < H && unit < (u + 1) * L; unit++) {
        for (int g = 0; g < kGates; g++)
          a.w[g] = w + ((g + product.rotation) % kGates * H + unit) * K;
        step_rows<kGates, kGates>(rows, out + r0 * ld_out + unit % L, L, ld_out, a, nothing);
      }
    }
  }

  // Block u of a cell of one product: W_ih x, W_hh h and the gates.
  template <int kSlots, int kGates>
  void step_gates(const Memory& memory, const Task& task, int64_t d, int64_t u) const {
    const Weights& w = q.weights[d];
    alignas(64) C pre[kStepRows][kSlots * L];
    for (int64_t r0 = 0; r0 < seq.active[0]; r0 += kStepRows) {
      const int rows = int(seq.active[0] - r0 < kStepRows ? seq.active[0] - r0 : kStepRows);
      Dots<S> x, h;
      x.K = I, h.K = first.gates > 0 ? P : 0;
      for (int r = 0; r < rows; r++) {
        x.a[r] = this->template row_of<const S>(q.x, 0, r0 + r);
        h.a[r] = this->h_prev(d, 0, r0 + r);
        memcpy(pre[r], memory.bias[d] + u * kSlots * L, sizeof pre[r]);
      }
      const int64_t units = H - u * L < L ? H - u * L : L;
      // With one gate only, several units' weights are taken at once instead.
      constexpr int kUnits = kGates == 1 ? kStepWeights : 1;
      int64_t lane = 0;
      for (; lane + kUnits <= units; lane += kUnits)
        step_units<kSlots, kGates, kUnits>(w, u * L + lane, rows, x, h, &pre[0][lane]);
      for (; lane < units; lane++)
        step_units<kSlots, kGates, 1>(w, u * L + lane, rows, x, h, &pre[0][lane]);
      for (int r = 0; r < rows; r++)
        (this->*gates)({memory, task, d, 0, r0 + r, r0 + r + 1, Slice{1, 0}, u, u + 1,
                        pre[r] - (r0 + r) * ld - u * kSlots * L});
    }
  }

  // pre += W_ih x + W_hh h for all gates of units unit .. unit + kUnits.
  template <int kSlots, int kGates, int kUnits>
  void step_units(const Weights& w, int64_t unit, int rows, Dots<S>& x, Dots<S>& h, C* pre) const {
    constexpr int kFirst = kSlots > kGates ? kGates - 1 : 0;
    for (int i = 0; i < kGates * kUnits; i++) {
      x.w[i] = (const S*)w.w_ih + ((i + kFirst) % kGates * H + unit + i / kGates) * I;
      h.w[i] = (const S*)w.w_hh + (i % kGates * H + unit + i / kGates) * P;
    }
    step_rows<kSlots * kUnits, kGates * kUnits>(rows, pre, kUnits == 1 ? L : 1, kSlots * L, x, h);
  }

  // ---- a sequence -------------------------------------------------------------------------------

  void run() const {
    if (is_step()) return run_step();
    Memory memory = carve_shared((char*)q.scratch);
    parallel(q.threads, [&](int thread, int threads) {
      for (int64_t d = 0; d < D; d++) {
        const Weights& w = q.weights[d];
        pack_gates(memory.w_ih[d], (const S*)w.w_ih, I, input, thread, threads);
        if (first.gates > 0)
          pack_gates(memory.w_hh[d], (const S*)w.w_hh, P, first, thread, threads);
        for (int i = 0; i < seconds; i++)
          pack_gates(memory.w_second[i][d], this->second_weight(d, i), H, second[i], thread,
                     threads);
        if (projected) pack_projection(memory.w_hr[d], (const S*)w.w_hr, thread, threads);
        if (thread == d % threads) {
          make_bias(memory.bias[d], w, 0, blocks);
          if (cell.mid == 2) make_bias2(memory.bias2[d], w);
          this->make_own(memory.own[d], w);
        }
      }
    });
    const Plan planned = plan(q.threads);
    const int wanted = int(D * planned.slices * planned.members) > q.threads
                           ? q.threads
                           : int(D * planned.slices * planned.members);
    Scratch scratch = memory.tasks;
    for (int64_t i = 0; planned.members > 1 && i < D * planned.slices; i++)
      carve_task(scratch, planned).barrier->reset();
    parallel(wanted, [&](int thread, int threads) {
      if (threads < wanted) {  // OpenMP gave fewer: members could wait for nobody
        if (thread == 0) run_tasks(memory, plan(1), 0, 1);
      } else {
        run_tasks(memory, planned, thread, threads);
      }
    });
  }

  void run_tasks(const Memory& memory, const Plan& plan, int thread, int threads) const {
    Scratch scratch = memory.tasks;
    const int64_t tasks = D * plan.slices;
    // Re-carve what scratch_bytes carved: all tasks, then all threads.
    const Scratch task_base = scratch;
    for (int64_t i = 0; i < tasks; i++) carve_task(scratch, plan);
    Thread mine{};
    for (int i = 0; i <= thread; i++) mine = carve_thread(scratch, plan);
    for (int64_t i = thread / plan.members; i < tasks; i += threads / plan.members) {
      Scratch again = task_base;
      Task task{};
      for (int64_t k = 0; k <= i; k++) task = carve_task(again, plan);
      run_task(memory, plan, task, mine, i / plan.slices, i % plan.slices, thread % plan.members);
    }
  }

  void run_task(const Memory& memory, const Plan& plan, const Task& task, const Thread& mine,
                int64_t d, int64_t slice, int64_t member) const {
    const int64_t slices = plan.slices;
    const int64_t block_begin = part_begin(groups(), member, plan.members) * group;
    int64_t block_end = part_begin(groups(), member + 1, plan.members) * group;
    if (block_end > blocks) block_end = blocks;
    const Slice sorted{slices, slice};
    const int64_t n_rows = slice < B ? ceil_div(B - slice, slices) : 0;

    load_states(task, d, n_rows, sorted, block_begin, block_end);

    const bool backwards = this->backwards(d);
    const int64_t room = chunk_rows(plan);
    for (int64_t done = 0; done < T;) {
      // A chunk: as many whole steps as fit. Step k of the sequence is t = k, or T - 1 - k in the
      // reverse direction.
      int64_t rows = 0, end = done;
      for (; end < T; end++) {
        const int64_t t = backwards ? T - 1 - end : end;
        const int64_t n = this->alive(t, slice, slices);
        if (rows + n > room) break;
        for (int64_t i = 0; i < n; i++, rows++)
          mine.x.set(rows, this->template row_of<const S>(q.x, t, sorted(i)), I);
      }
      project_input(memory, task, mine, d, rows, block_begin, block_end);
      C* pre = task.pre;
      for (; done < end; done++) {
        const int64_t t = backwards ? T - 1 - done : done;
        const int64_t n = this->alive(t, slice, slices);
        if (n == 0) continue;
        const Span step{memory, task, d, t, 0, n, sorted, block_begin, block_end, pre};
        const auto meet = [&] {
          if (plan.members > 1) task.barrier->wait(int(plan.members));
        };
        if (first.gates > 0)
          for (int64_t i = 0; i < n; i++) {
            const S* h = this->h_prev(d, t, sorted(i));
            if (const S* scale = this->scale_of(d, sorted(i))) {
              this->scale_row(mine.scaled + i * P, h, scale);
              h = mine.scaled + i * P;
            }
            mine.h.set(i, h, P);
          }
        if (!apart) {
          multiply(first, memory.w_hh[d], P, mine.h, n, pre, ld, outer, pre, ld, step, done % 2,
                   gates);
        } else {
          multiply(first, memory.w_hh[d], P, mine.h, n, task.part, ld_first, cell.first_gates,
                   nullptr, 0, step, done % 2, nullptr);
          (this->*gates)(step);
          if (cell.mid > 0) {
            meet();
            second_products(memory, task, mine, step, done % 2);
            (this->*end_gates)(step);
          }
        }
        if (projected) project_output(memory, task, mine, d, t, n, sorted);
        meet();
        pre += n * ld;
      }
    }
    finish(task, d, n_rows, sorted, member, block_begin, block_end);
  }

  // out[row][block][slot] = init + w row, for the blocks of a span; then, tile by tile, the gates.
  // A cell without W_hh has its gates made all the same.
  template <class Rows>
  void multiply(const Product& w, const A* packed, int64_t K, const Rows& rows, int64_t n, C* out,
                int64_t ld_out, int slots, const C* init, int64_t ld_init, const Span& span,
                bool turned, Gates then) const {
    if (w.gates == 0) return (this->*then)(span);
    const int64_t begin = span.u0 / w.blocks_per_panel, end = ceil_div(span.u1, w.blocks_per_panel),
                  size = size_of(w, K);
    for (int64_t k = begin; k < end; k++) {
      // Back and forth: the panels used last in one step are still in cache at the start of the
      // next.
      const int64_t turn = turned ? -1 : 1, panel = turned ? end - 1 - (k - begin) : k;
      const int nv = panel_nv(w, panel);
      const A* from = packed + panel * size;
      const int64_t offset = (panel * w.blocks_per_panel * slots + w.slot) * L;
      multiply_panel(n, nv, out + offset, ld_out, init ? init + offset : init, ld_init,
                     rows.from(0), from, k + 1 < end ? from + turn * size : from, K,
                     [&](int64_t r0, int64_t r1) {
                       if (!then) return;
                       const int64_t u = panel * w.blocks_per_panel;
                       (this->*then)({span.memory, span.task, span.d, span.t, r0, r1, span.sorted,
                                      u, u + nv / w.gates, span.pre});
                     });
    }
  }

  // part2 = an inner cell's bias + what the second products give.
  void second_products(const Memory& memory, const Task& task, const Thread& mine, const Span& span,
                       bool turned) const {
    const int64_t n = span.r1 - span.r0, d = span.d;
    const int slots = cell.mid_slots;
    for (int i = 0; i < seconds; i++) {
      const C* init = i == 0 ? memory.bias2[d] : task.part2;
      for (int64_t r = 0; r < n; r++) mine.m.set(r, task.mid[second[i].mid] + r * Hp, H);
      if (i == 1)  // the slots that the first has no part in
        for (int64_t r = 0; r < n; r++)
          for (int64_t u = span.u0; u < span.u1; u++)
            for (int slot = second[0].gates; slot < slots; slot++) {
              const int64_t at = (u * slots + slot) * L;
              store(task.part2 + r * ld_second + at, load(memory.bias2[d] + at));
            }
      multiply(second[i], memory.w_second[i][d], H, mine.m, n, task.part2, ld_second, slots, init,
               i == 0 ? 0 : ld_second, span, turned, nullptr);
    }
  }

  void load_states(const Task& task, int64_t d, int64_t n_rows, const Slice& sorted,
                   int64_t block_begin, int64_t block_end) const {
    for (int s = 0; s < states; s++)
      for (int64_t i = 0; i < n_rows; i++)
        for (int64_t u = block_begin; u < block_end; u++)
          store(task.state[s] + i * Hp + u * L,
                load_first((const S*)q.state0[s] + (d * B + seq.row[sorted(i)]) * H + u * L,
                           H - u * L));
  }

  // pre = bias + W_ih x for a chunk's rows; rows that are normalised get their bias afterwards.
  void project_input(const Memory& memory, const Task& task, const Thread& mine, int64_t d,
                     int64_t rows, int64_t block_begin, int64_t block_end) const {
    const int64_t begin = block_begin / input.blocks_per_panel,
                  end = ceil_div(block_end, input.blocks_per_panel), size = size_of(input, I);
    for (int64_t panel = begin; panel < end; panel++) {
      const int64_t offset = panel * input.blocks_per_panel * outer * L;
      const A* w = memory.w_ih[d] + panel * size;
      const C* bias = cell.rows ? nullptr : memory.bias[d] + offset;
      C* out = task.pre + offset;
      multiply_panel(rows, panel_nv(input, panel), out, ld, bias, 0, mine.x.from(0), w,
                     panel + 1 < end ? w + size : w, I);
      if (outer > G)  // the slots that x has no part in
        for (int64_t r = 0; r < rows; r++)
          for (int slot = G; slot < outer; slot++)
            store(out + r * ld + slot * L, load(bias + slot * L));
    }
  }

  // ---- from pre-activations to states (gates.h) -------------------------------------------------

  template <class Cell, bool kRegularised>
  void make_gates(const Span& span) const;
  template <class Cell, bool kRegularised>
  void begin_cell(const Span& span) const;
  template <class Cell, bool kRegularised>
  void end_cell(const Span& span) const;
  template <bool kRegularised>
  void normalised_lstm(const Span& span) const;
  template <bool kRegularised>
  void normalised_gru(const Span& span) const;
  template <class Cell, bool kRegularised>
  void give(const Span& span, int64_t r, int64_t u, V h, V h_prev, const V* state,
            const V* state_prev, const V* saved, int64_t first_saved) const;
  void normalise_products(const Span& span, int64_t r) const;

  // ---- the output -------------------------------------------------------------------------------

  // W_hr [P, H] -> panels of up to kMaxNV blocks of P
  void pack_projection(A* packed, const S* w, int thread, int threads) const {
    const int64_t n = ceil_div(P, L * kMaxNV);
    for (int64_t i = part_begin(n, thread, threads); i < part_begin(n, thread + 1, threads); i++) {
      int64_t base[kMaxNV], valid[kMaxNV];
      const int nv = Base::nv_of(P, i);
      for (int v = 0; v < nv; v++) base[v] = (i * kMaxNV + v) * L, valid[v] = P - base[v];
      pack_panel_of_rows(packed + i * panel_size<A>(H, kMaxNV), w, H, H, nv, base, valid);
    }
  }

  // y_t = W_hr m
  void project_output(const Memory& memory, const Task& task, const Thread& mine, int64_t d,
                      int64_t t, int64_t n, const Slice& sorted) const {
    for (int64_t i = 0; i < n; i++) mine.m.set(i, task.m + i * Hp, H);
    const int64_t panels_p = ceil_div(P, L * kMaxNV), size = panel_size<A>(H, kMaxNV);
    for (int64_t panel = 0; panel < panels_p; panel++) {
      const A* w = memory.w_hr[d] + panel * size;
      multiply_panel(n, Base::nv_of(P, panel), task.h + panel * kMaxNV * L, Pp, (const C*)nullptr,
                     0, mine.m.from(0), w, panel + 1 < panels_p ? w + size : w, H);
    }
    if (q.regularisers.on) {
      const Regularised<V> bounded{V{}, V{} + C(q.regularisers.proj_clip)};
      for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < P; k += L)
          store(task.h + i * Pp + k, bounded.clip(load(task.h + i * Pp + k)));
    }
    for (int64_t i = 0; i < n; i++)
      convert(this->template row_of<S>(q.y, t, sorted(i)) + d * P, task.h + i * Pp, P);
  }

  // The states after each row's last step.
  void finish(const Task& task, int64_t d, int64_t n_rows, const Slice& sorted, int64_t member,
              int64_t block_begin, int64_t block_end) const {
    int64_t len = T;
    for (int64_t i = 0; i < n_rows; i++) {
      const int64_t j = sorted(i), row = d * B + seq.row[j];
      len = this->length(j, len);
      if (member == 0) {
        const S* h =
            len == 0
                ? (const S*)q.h0 + row * P
                : this->template row_of<const S>(q.y, this->backwards(d) ? 0 : len - 1, j) + d * P;
        memcpy((S*)q.h_n + row * P, h, size_t(P) * sizeof(S));
      }
      for (int s = 0; s < states; s++)
        for (int64_t u = block_begin; u < block_end; u++)
          store_first((S*)q.state_n[s] + row * H + u * L, load(task.state[s] + i * Hp + u * L),
                      H - u * L);
    }
  }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
