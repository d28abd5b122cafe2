// One recurrent layer, both directions, over a whole batch of sequences: what every cell has in
// common.
//
//   forward     pre_t = W_ih x_t + b  +  W_hh h_{t-1};   h_t, c_t = cell(pre_t, h_{t-1}, c_{t-1})
//   backward    the same steps the other way round, then dW and dx as products over many rows
//
// Who owns what. A *task* is one direction of one slice of the batch: it needs nothing from the
// others, so the threads share out the tasks and never wait for one another. Only when there are
// fewer rows than threads do the *members* of a task share its hidden units, and meet at a barrier
// once per step. Slice s of n has the sorted rows s, s + n, s + 2n, ...: all slices are equally
// long, whatever the lengths.
//
// Units are worked on in *blocks* of kLanes. Of a row, a block's pre-activations lie together,
// [kSlots][kLanes], and so do its saved values, [kSaved][kLanes]; a panel of weights (gemm.h) makes
// one block's gates, or, for cells with one gate, several blocks.
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

struct Plan {
  int64_t slices;   // of the batch
  int64_t members;  // threads per task
};

inline Plan make_plan(const LayerParams& p, int threads, int64_t step_bytes, int64_t max_members) {
  int64_t divisor = p.D == 2 && threads % 2 == 0 ? 2 : 1;
  Plan plan{threads / divisor, 1};
  const int64_t most = p.seq.B / kMinSliceRows > 0 ? p.seq.B / kMinSliceRows : 1;
  if (plan.slices > most) plan.slices = most;
  const int64_t tasks = p.D * plan.slices;
  if (tasks < threads && step_bytes >= 32768 && p.P == p.H) {
    plan.members = threads / tasks;
    if (plan.members > max_members) plan.members = max_members;
  }
  return plan;
}

// What forward and backward share: sizes, and where rows lie.
template <class S_, template <class> class CellOf>
struct Layer {
  using S = S_;          // stored
  using A = Operand<S>;  // multiplied
  using C = Compute<S>;  // computed
  using V = Vec<C>;
  using Cell = CellOf<Math<C>>;
  static constexpr int L = kLanes<C>;
  static constexpr int G = Cell::kGates, kSlots = Cell::kSlots, kSaved = Cell::kSaved;
  static constexpr int kBlocksPerPanel = G == 1 ? kMaxNV : 1;

  const LayerParams& p;
  const Sequence& seq;
  const int64_t T, B, I, H, P, D, blocks, Hp, Pp;
  const bool projected;

  explicit Layer(const LayerParams& params)
      : p(params),
        seq(params.seq),
        T(seq.T),
        B(seq.B),
        I(p.I),
        H(p.H),
        P(p.P),
        D(p.D),
        blocks(ceil_div(H, L)),
        Hp(round_up(H, 16)),
        Pp(round_up(P, 16)),
        projected(p.weights[0].w_hr != nullptr) {}

  // Rows of a slice that are alive at step t.
  int64_t alive(int64_t t, int64_t slice, int64_t slices) const {
    return seq.active[t] <= slice ? 0 : ceil_div(seq.active[t] - slice, slices);
  }

  template <class T_>
  T_* row_of(const RowTensor& tensor, int64_t t, int64_t j) const {
    return (T_*)tensor.data + tensor.step[t] + seq.row[j] * tensor.stride;
  }

  // h before step t of direction d: from y, or from h0 where t is the row's first step.
  const S* h_prev(int64_t d, int64_t t, int64_t j) const {
    const bool starts = d == 0 ? t == 0 : t == T - 1 || j >= seq.active[t + 1];
    if (starts) return (const S*)p.h0 + (d * B + seq.row[j]) * P;
    return row_of<const S>(p.y, d == 0 ? t - 1 : t + 1, j) + d * P;
  }

  // The saved values of block u: kSaved vectors.
  S* saved(int64_t d, int64_t t, int64_t j, int64_t u) const {
    return (S*)p.reserve + ((seq.first[t] + j) * D + d) * kSaved * Hp + u * kSaved * L;
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
};

template <class S, template <class> class CellOf>
struct Forward : Layer<S, CellOf> {
  using Base = Layer<S, CellOf>;
  using Base::B, Base::blocks, Base::D, Base::G, Base::H, Base::Hp, Base::I, Base::kBlocksPerPanel,
      Base::kSaved, Base::kSlots, Base::L, Base::P, Base::Pp, Base::projected, Base::seq, Base::T;
  using typename Base::A;
  using typename Base::C;
  using typename Base::Cell;
  using typename Base::V;

  const ForwardParams& q;
  const int64_t panels, ld;  // ld: elements of a row of pre-activations

  struct Task {
    C* pre;  // [chunk rows][Hp * kSlots]
    C* c;    // [slice rows][Hp]
    A* m;    // [slice rows][Hp]: h before its projection
    C* h;    // [slice rows][Pp]: h after it
    Barrier* barrier;
  };
  struct Thread {
    Rows<S> x;  // [chunk rows] of I
    Rows<S> h;  // [slice rows] of P
    Rows<A> m;  // [slice rows] of H, if projected
  };
  struct Memory {
    A *w_ih[2], *w_hh[2], *w_hr[2];  // packed
    C* bias[2];                      // [blocks][kSlots][L]
    Scratch tasks;                   // carved up once the plan is known
  };

  explicit Forward(const ForwardParams& params)
      : Base(params), q(params), panels(ceil_div(blocks, kBlocksPerPanel)), ld(Hp * kSlots) {}

  int64_t slice_rows(const Plan& plan) const { return ceil_div(B, plan.slices); }
  int64_t chunk_rows(const Plan& plan) const {
    return slice_rows(plan) > kChunkRows ? slice_rows(plan) : kChunkRows;
  }

  Plan plan(int threads) const {
    return make_plan(q, threads, G * H * P * int64_t(sizeof(A)), panels);
  }

  Memory carve_shared(char* base) const {
    Memory memory;
    Scratch scratch{base};
    for (int64_t d = 0; d < D; d++) {
      memory.w_ih[d] = scratch.take<A>(panels * panel_size<A>(I, G * kBlocksPerPanel));
      memory.w_hh[d] = scratch.take<A>(panels * panel_size<A>(P, G * kBlocksPerPanel));
      memory.w_hr[d] =
          scratch.take<A>(projected ? ceil_div(P, L * kMaxNV) * panel_size<A>(H, kMaxNV) : 0);
      memory.bias[d] = scratch.take<C>(Hp * kSlots);
    }
    memory.tasks = scratch;
    return memory;
  }

  Task carve_task(Scratch& scratch, const Plan& plan) const {
    Task task;
    task.pre = scratch.take<C>(chunk_rows(plan) * ld);
    task.c = scratch.take<C>(Cell::kHasC ? slice_rows(plan) * Hp : 0);
    task.m = scratch.take<A>(projected ? slice_rows(plan) * Hp : 0);
    task.h = scratch.take<C>(projected ? slice_rows(plan) * Pp : 0);
    task.barrier = scratch.take<Barrier>(1);
    return task;
  }

  Thread carve_thread(Scratch& scratch, const Plan& plan) const {
    Thread thread;
    thread.x = Rows<S>::carve(scratch, chunk_rows(plan), I);
    thread.h = Rows<S>::carve(scratch, slice_rows(plan), P);
    thread.m = Rows<A>::carve(scratch, projected ? slice_rows(plan) : 0, H);
    return thread;
  }

  size_t scratch_bytes() const {
    if (is_step()) {
      Scratch scratch{nullptr};
      for (int64_t d = 0; d < D; d++) {
        carve_task(scratch, Plan{1, 1});
        scratch.take<C>(Hp * kSlots);
      }
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

  // Vectors of panel i.
  int panel_nv(int64_t i) const {
    const int64_t left = blocks - i * kBlocksPerPanel;
    return G * int(left < kBlocksPerPanel ? left : kBlocksPerPanel);
  }

  // W [G*H, K] -> panels; `first` is the gate that comes first (a GRU's W_ih: n, r, z).
  void pack_gates(A* packed, const S* w, int64_t K, int first, int thread, int threads) const {
    for (int64_t i = part_begin(panels, thread, threads);
         i < part_begin(panels, thread + 1, threads); i++) {
      int64_t base[kMaxNV], valid[kMaxNV];
      const int nv = panel_nv(i);
      for (int v = 0; v < nv; v++) {
        const int64_t unit = (i * kBlocksPerPanel + v / G) * L;
        base[v] = (v + first) % G * H + unit;
        valid[v] = H - unit;
      }
      pack_panel_of_rows(packed + i * panel_size<A>(K, G * kBlocksPerPanel), w, K, K, nv, base,
                         valid);
    }
  }

  // Both biases of some blocks, in the order of the slots: b_ih in the first G, b_hh in the last G.
  void make_bias(C* bias, const Weights& w, int64_t block_begin, int64_t block_end) const {
    for (int64_t i = block_begin * kSlots * L; i < block_end * kSlots * L; i++) bias[i] = 0;
    if (!w.b_ih) return;
    const int first = kSlots > G ? G - 1 : 0;
    for (int64_t unit = block_begin * L; unit < block_end * L && unit < H; unit++) {
      C* out = bias + unit / L * kSlots * L + unit % L;
      for (int g = 0; g < G; g++) {
        C value[1];
        convert(value, (const S*)w.b_ih + (g + first) % G * H + unit, 1);
        out[g * L] += value[0];
        convert(value, (const S*)w.b_hh + g * H + unit, 1);
        out[(kSlots - G + g) * L] += value[0];
      }
    }
  }

  // Whether this call is one step of a few rows: then nothing is packed.
  bool is_step() const { return T == 1 && B <= kStepBatch && !projected; }

  void run_step() const {
    Scratch scratch{(char*)q.scratch};
    Task tasks[2];
    C* bias[2];
    for (int64_t d = 0; d < D; d++) {
      tasks[d] = carve_task(scratch, Plan{1, 1});
      bias[d] = scratch.take<C>(Hp * kSlots);
    }
    parallel(q.threads, [&](int thread, int threads) {
      const int64_t begin = part_begin(blocks, thread, threads),
                    end = part_begin(blocks, thread + 1, threads);
      for (int64_t d = 0; d < D; d++) {
        make_bias(bias[d], q.weights[d], begin, end);
        load_c(tasks[d], d, B, [](int64_t i) { return i; }, begin, end);
        for (int64_t u = begin; u < end; u++) step_block(tasks[d], bias[d] + u * kSlots * L, d, u);
      }
    });
    for (int64_t d = 0; d < D; d++)
      finish(tasks[d], d, B, [](int64_t i) { return i; }, 0, 0, blocks);
  }

  // Block u of the only step's rows.
  void step_block(const Task& task, const C* bias, int64_t d, int64_t u) const {
    const Weights& w = q.weights[d];
    alignas(64) C pre[kStepRows][kSlots * L];
    for (int64_t r0 = 0; r0 < seq.active[0]; r0 += kStepRows) {
      const int rows = int(seq.active[0] - r0 < kStepRows ? seq.active[0] - r0 : kStepRows);
      Dots<S> x, h;
      x.K = I, h.K = P;
      for (int r = 0; r < rows; r++) {
        x.a[r] = this->template row_of<const S>(q.x, 0, r0 + r);
        h.a[r] = this->h_prev(d, 0, r0 + r);
        memcpy(pre[r], bias, sizeof pre[r]);
      }
      const int64_t units = H - u * L < L ? H - u * L : L;
      // With one gate only, several units' weights are taken at once instead.
      constexpr int kUnits = G == 1 ? kStepWeights : 1;
      int64_t lane = 0;
      for (; lane + kUnits <= units; lane += kUnits)
        step_units<kUnits>(w, u * L + lane, rows, x, h, &pre[0][lane]);
      for (; lane < units; lane++) step_units<1>(w, u * L + lane, rows, x, h, &pre[0][lane]);
      for (int r = 0; r < rows; r++) gates(task, d, 0, r0 + r, r0 + r, u, h.a[r], pre[r]);
    }
  }

  // pre += W_ih x + W_hh h for all gates of units unit .. unit + kUnits.
  template <int kUnits>
  void step_units(const Weights& w, int64_t unit, int rows, Dots<S>& x, Dots<S>& h, C* pre) const {
    constexpr int kFirst = kSlots > G ? G - 1 : 0;
    for (int i = 0; i < G * kUnits; i++) {
      x.w[i] = (const S*)w.w_ih + ((i + kFirst) % G * H + unit + i / G) * I;
      h.w[i] = (const S*)w.w_hh + (i % G * H + unit + i / G) * P;
    }
    step_rows<kSlots * kUnits, G * kUnits>(rows, pre, kUnits == 1 ? L : 1, kSlots * L, x, h);
  }

  void run() const {
    if (is_step()) return run_step();
    Memory memory = carve_shared((char*)q.scratch);
    parallel(q.threads, [&](int thread, int threads) {
      for (int64_t d = 0; d < D; d++) {
        const Weights& w = q.weights[d];
        pack_gates(memory.w_ih[d], (const S*)w.w_ih, I, kSlots > G ? G - 1 : 0, thread, threads);
        pack_gates(memory.w_hh[d], (const S*)w.w_hh, P, 0, thread, threads);
        if (projected) pack_projection(memory.w_hr[d], (const S*)w.w_hr, thread, threads);
        if (thread == d % threads) make_bias(memory.bias[d], w, 0, blocks);
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
    const int64_t panel_begin = part_begin(panels, member, plan.members);
    const int64_t panel_end = part_begin(panels, member + 1, plan.members);
    const int64_t block_begin = panel_begin * kBlocksPerPanel;
    const int64_t block_end =
        panel_end * kBlocksPerPanel < blocks ? panel_end * kBlocksPerPanel : blocks;
    const auto sorted = [&](int64_t i) {
      return i * slices + slice;
    };  // the slice's row i among all rows
    const int64_t n_rows = slice < B ? ceil_div(B - slice, slices) : 0;

    load_c(task, d, n_rows, sorted, block_begin, block_end);

    const int64_t room = chunk_rows(plan);
    for (int64_t done = 0; done < T;) {
      // A chunk: as many whole steps as fit. Step k of the sequence is t = k, or T - 1 - k in the
      // reverse direction.
      int64_t rows = 0, end = done;
      for (; end < T; end++) {
        const int64_t t = d == 0 ? end : T - 1 - end;
        const int64_t n = this->alive(t, slice, slices);
        if (rows + n > room) break;
        for (int64_t i = 0; i < n; i++, rows++)
          mine.x.set(rows, this->template row_of<const S>(q.x, t, sorted(i)), I);
      }
      project_input(memory, task, mine, d, rows, panel_begin, panel_end);
      C* pre = task.pre;
      for (; done < end; done++) {
        const int64_t t = d == 0 ? done : T - 1 - done;
        const int64_t n = this->alive(t, slice, slices);
        if (n == 0) continue;
        for (int64_t i = 0; i < n; i++) mine.h.set(i, this->h_prev(d, t, sorted(i)), P);
        for (int64_t k = panel_begin; k < panel_end; k++) {
          // Back and forth: the panels used last in one step are still in cache at the start of the
          // next.
          const int64_t turn = done % 2 ? -1 : 1;
          const int64_t panel = done % 2 ? panel_end - 1 - (k - panel_begin) : k;
          const int nv = panel_nv(panel);
          const int64_t size = panel_size<A>(P, G * kBlocksPerPanel);
          const A* w = memory.w_hh[d] + panel * size;
          C* out = pre + panel * kBlocksPerPanel * kSlots * L + (kSlots - G) * L;
          multiply_panel(n, nv, out, ld, out, ld, mine.h.from(0), w,
                         k + 1 < panel_end ? w + turn * size : w, P, [&](int64_t r0, int64_t r1) {
                           for (int64_t r = r0; r < r1; r++)
                             for (int64_t u = panel * kBlocksPerPanel;
                                  u < panel * kBlocksPerPanel + nv / G; u++)
                               gates(task, d, t, r, sorted(r), u, mine.h.row[r],
                                     pre + r * ld + u * kSlots * L);
                         });
        }
        if (projected) project_output(memory, task, mine, d, t, n, sorted);
        if (plan.members > 1) task.barrier->wait(int(plan.members));
        pre += n * ld;
      }
    }
    finish(task, d, n_rows, sorted, member, block_begin, block_end);
  }

  template <class Sorted>
  void load_c(const Task& task, int64_t d, int64_t n_rows, const Sorted& sorted,
              int64_t block_begin, int64_t block_end) const {
    if constexpr (Cell::kHasC)
      for (int64_t i = 0; i < n_rows; i++)
        for (int64_t u = block_begin; u < block_end; u++)
          store(task.c + i * Hp + u * L,
                load_first((const S*)q.c0 + (d * B + seq.row[sorted(i)]) * H + u * L, H - u * L));
  }

  // pre = bias + W_ih x for a chunk's rows.
  void project_input(const Memory& memory, const Task& task, const Thread& mine, int64_t d,
                     int64_t rows, int64_t panel_begin, int64_t panel_end) const {
    for (int64_t panel = panel_begin; panel < panel_end; panel++) {
      const int64_t offset = panel * kBlocksPerPanel * kSlots * L;
      const int64_t size = panel_size<A>(I, G * kBlocksPerPanel);
      const A* w = memory.w_ih[d] + panel * size;
      const C* bias = memory.bias[d] + offset;
      C* out = task.pre + offset;
      multiply_panel(rows, panel_nv(panel), out, ld, bias, 0, mine.x.from(0), w,
                     panel + 1 < panel_end ? w + size : w, I);
      if constexpr (kSlots > G)  // the slots that x has no part in
        for (int64_t r = 0; r < rows; r++)
          for (int slot = G; slot < kSlots; slot++)
            store(out + r * ld + slot * L, load(bias + slot * L));
    }
  }

  // From the pre-activations of block u of one row to h and c.
  template <class HRow>
  SEQKERN_INLINE void gates(const Task& task, int64_t d, int64_t t, int64_t i, int64_t j, int64_t u,
                            const HRow* h_row, const C* pre) const {
    V slots[kSlots], saved[kSaved > 0 ? kSaved : 1];
    for (int s = 0; s < kSlots; s++) slots[s] = load(pre + s * L);
    const int64_t valid = H - u * L;
    V c{}, h_prev{};
    if constexpr (Cell::kHasC) c = load(task.c + i * Hp + u * L);
    if constexpr (kSlots > G) h_prev = load_first(h_row + u * L, valid);
    const V h = Cell::forward(slots, h_prev, c, saved);
    if constexpr (Cell::kHasC) store(task.c + i * Hp + u * L, c);
    if (kSaved > 0 && q.reserve) {
      S* out = this->saved(d, t, j, u);
      for (int s = 0; s < kSaved; s++) store(out + s * L, saved[s]);
    }
    if (projected)
      store(task.m + i * Hp + u * L, h);
    else
      store_first(this->template row_of<S>(q.y, t, j) + d * P + u * L, h, valid);
  }

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
  template <class Sorted>
  void project_output(const Memory& memory, const Task& task, const Thread& mine, int64_t d,
                      int64_t t, int64_t n, const Sorted& sorted) const {
    for (int64_t i = 0; i < n; i++) mine.m.set(i, task.m + i * Hp, H);
    const int64_t panels_p = ceil_div(P, L * kMaxNV), size = panel_size<A>(H, kMaxNV);
    for (int64_t panel = 0; panel < panels_p; panel++) {
      const A* w = memory.w_hr[d] + panel * size;
      multiply_panel(n, Base::nv_of(P, panel), task.h + panel * kMaxNV * L, Pp, (const C*)nullptr,
                     0, mine.m.from(0), w, panel + 1 < panels_p ? w + size : w, H);
    }
    for (int64_t i = 0; i < n; i++)
      convert(this->template row_of<S>(q.y, t, sorted(i)) + d * P, task.h + i * Pp, P);
  }

  // h_n and c_n: the state after each row's last step.
  template <class Sorted>
  void finish(const Task& task, int64_t d, int64_t n_rows, const Sorted& sorted, int64_t member,
              int64_t block_begin, int64_t block_end) const {
    int64_t len = T;
    for (int64_t i = 0; i < n_rows; i++) {
      const int64_t j = sorted(i), row = d * B + seq.row[j];
      len = this->length(j, len);
      if (member == 0) {
        const S* h = len == 0
                         ? (const S*)q.h0 + row * P
                         : this->template row_of<const S>(q.y, d == 0 ? len - 1 : 0, j) + d * P;
        memcpy((S*)q.h_n + row * P, h, size_t(P) * sizeof(S));
      }
      if constexpr (Cell::kHasC)
        for (int64_t u = block_begin; u < block_end; u++)
          store_first((S*)q.c_n + row * H + u * L, load(task.c + i * Hp + u * L), H - u * L);
    }
  }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
