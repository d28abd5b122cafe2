// The backward pass of a recurrent layer (recurrence.h). First the weights are packed and it is
// noted where every row lies; then, for one chunk of time steps after another, two stages, each one
// parallel region:
//   1  the recurrence the other way round: dh_t, dc_t -> dpre_t;
//      dh_{t-1} = W_hh' dpre_t + what goes past W_hh.
//      Tasks and members as in forward. Writes dpre [rows of the chunk, kSlots*H].
//   2  dx = dpre W_ih, by rows; dW_ih += dpre' x, dW_hh += dpre' h_prev, db += sum dpre, by rows of
//      dW: every sum is made in the order of the rows, so the number of threads changes no bit.
// A chunk's dpre is read while it is still in cache, and all of it together is never in memory.
#pragma once

#include "recurrence.h"

namespace seqkern {
namespace SEQKERN_ISA {

template <class S, template <class> class CellOf>
struct Backward : Layer<S, CellOf> {
  using Base = Layer<S, CellOf>;
  using Base::B, Base::blocks, Base::D, Base::G, Base::H, Base::Hp, Base::I, Base::kBlocksPerPanel,
      Base::kSaved, Base::kSlots, Base::L, Base::P, Base::Pp, Base::projected, Base::seq, Base::T;
  using typename Base::A;
  using typename Base::C;
  using typename Base::Cell;
  using typename Base::V;

  static constexpr int kPanel = kMaxNV * L;  // outputs of a full panel
  static constexpr int kTile = kColumnTile<A>;
  static constexpr int64_t kBlockSum = 64;
  static constexpr int64_t kChunkBytes = 8 << 20;  // of dpre, about; but never so few rows that
  static constexpr int64_t kLeastRows = 512;       // adding to dW costs more than the products
  static constexpr int64_t kStretch =
      2048 / int64_t(sizeof(A));  // a multiple of every kDeep: what belongs together stays so

  const BackwardParams& q;
  const int64_t width;  // gradients in a row of dpre, one direction: kSlots * H
  const int64_t ld;     // elements from one row to the next
  const int64_t rows;
  const int64_t round;  // rows per round of a weight gradient: short sums are rounded less, long
                        // rounds are faster
  const int64_t chunks;

  struct Task {
    C* dh;  // [slice rows][Pp]: gradient that reaches h from later steps
    C* dc;  // [slice rows][Hp]
    C* dm;  // [slice rows][Hp]: gradient of h before its projection
    Barrier* barrier;
  };
  struct Thread {
    Rows<A> dpre;     // [slice rows] of G * H
    Rows<A> dh;       // [slice rows] of P, if projected
    Rows<A> dx_dpre;  // [kChunkRows] of kBlockK
    C* dx;            // [kChunkRows][round_up(I, kPanel)]
    A* a;             // [round_up(M part, kTile)][kBlockK]: packed dpre
    A* b;             // [kBlockK][kPanel]: packed rows of x or h
    C* out;           // [kTile][kPanel]
  };
  struct Memory {
    A *w_ih[2], *w_hh[2], *w_hr[2];     // packed, [outputs I, P, H][k: dpre, dpre, dh]
    A* dpre[2];                         // [chunk's rows][ld]
    A* dh[2];                           // [chunk's rows][P], if projected: whole gradient of y
    A* m[2];                            // [chunk's rows][H], if projected: h before its projection
    const S** x_row;                    // [rows]
    S** dx_row;                         // [rows]
    const S** h_row[2];                 // [rows]: h_prev of direction d
    const A** m_row[2];                 // [chunk's rows], if projected
    C *dw_ih[2], *dw_hh[2], *dw_hr[2];  // sums, where S is narrower
    C* db[2];                           // [width]: sums of dpre's columns
    C* dx;                              // [rows][I]: the first direction's, where S is narrower
    Scratch rest;
  };
  // The steps of one stage, and the rows that one direction meets in them. The bounds of the chunks
  // lie evenly about the middle of the sequence, so the rows of two chunks, one of either
  // direction, are the same or have none in common.
  struct Chunk {
    int64_t index, step_begin, step_end;
    int64_t row[2], rows[2];  // of direction d: the first, and how many
    bool first, last;
  };

  explicit Backward(const BackwardParams& params)
      : Base(params),
        q(params),
        width(kSlots * H),
        ld(odd_lines<A>(width)),
        rows(seq.rows),
        round(rows <= 1024 ? 64 : kBlockK),
        chunks(count_chunks()) {}

  int64_t count_chunks() const {
    int64_t most_rows = kChunkBytes / (D * ld * int64_t(sizeof(A)));
    if (most_rows < kLeastRows) most_rows = kLeastRows;
    return T > 0 ? ceil_div(T, ceil_div(most_rows, B)) : 1;
  }
  int64_t bound(int64_t k) const {
    return 2 * k <= chunks ? T * k / chunks : T - T * (chunks - k) / chunks;
  }
  int64_t rows_before(int64_t t) const { return t < T ? seq.first[t] : rows; }

  Chunk chunk(int64_t index) const {
    Chunk c{index, bound(index), bound(index + 1), {}, {}, index == 0, index == chunks - 1};
    for (int64_t d = 0; d < D; d++) {
      const int64_t begin = rows_before(d == 0 ? T - c.step_end : c.step_begin);
      const int64_t end = rows_before(d == 0 ? T - c.step_begin : c.step_end);
      c.row[d] = begin, c.rows[d] = end - begin;
    }
    return c;
  }

  int64_t slice_rows(const Plan& plan) const { return ceil_div(B, plan.slices); }
  int64_t unit_panels() const { return ceil_div(H, kPanel); }
  Plan plan(int threads) const {
    return make_plan(q, threads, G * H * P * int64_t(sizeof(A)), unit_panels());
  }

  Memory carve_shared(char* base) const {
    Memory memory{};
    Scratch scratch{base};
    for (int64_t d = 0; d < D; d++) {
      memory.w_hh[d] = scratch.take<A>(ceil_div(P, kPanel) * panel_size<A>(G * H, kMaxNV));
      if (q.dx.data)
        memory.w_ih[d] = scratch.take<A>(ceil_div(I, kPanel) * panel_size<A>(G * H, kMaxNV));
      if (projected)
        memory.w_hr[d] = scratch.take<A>(ceil_div(H, kPanel) * panel_size<A>(P, kMaxNV));
      memory.h_row[d] = scratch.take<const S*>(rows);
      if (q.need_dweights && !__is_same(S, C)) {
        memory.dw_ih[d] = scratch.take<C>(G * H * I);
        memory.dw_hh[d] = scratch.take<C>(G * H * P);
        if (projected) memory.dw_hr[d] = scratch.take<C>(P * H);
      }
    }
    memory.x_row = scratch.take<const S*>(rows);
    memory.dx_row = scratch.take<S*>(rows);
    int64_t chunk_rows = 0;
    for (int64_t k = 0; k < chunks; k++)
      if (chunk(k).rows[0] > chunk_rows) chunk_rows = chunk(k).rows[0];
    for (int64_t d = 0; d < D; d++) {
      memory.dpre[d] = scratch.take<A>(chunk_rows * ld);
      if (q.need_dweights) memory.db[d] = scratch.take<C>(round_up(width, L));
      if (projected) {
        memory.dh[d] = scratch.take<A>(chunk_rows * P);
        memory.m[d] = scratch.take<A>(chunk_rows * H);
        memory.m_row[d] = scratch.take<const A*>(chunk_rows);
        if (base)
          for (int64_t i = 0; i < chunk_rows; i++) memory.m_row[d][i] = memory.m[d] + i * H;
      }
    }
    if (q.dx.data && D == 2 && !__is_same(S, C)) memory.dx = scratch.take<C>(rows * I);
    memory.rest = scratch;
    return memory;
  }

  Task carve_task(Scratch& scratch, const Plan& plan) const {
    Task task{};
    task.dh = scratch.take<C>(slice_rows(plan) * Pp);
    if (Cell::kHasC) task.dc = scratch.take<C>(slice_rows(plan) * Hp);
    if (projected) task.dm = scratch.take<C>(slice_rows(plan) * Hp);
    task.barrier = scratch.take<Barrier>(1);
    return task;
  }

  Thread carve_thread(Scratch& scratch, const Plan& plan) const {
    Thread thread{};
    thread.dpre = Rows<A>::carve(scratch, slice_rows(plan), G * H);
    thread.dh = Rows<A>::carve(scratch, projected ? slice_rows(plan) : 0, P);
    thread.dx_dpre = Rows<A>::carve(scratch, q.dx.data ? kChunkRows : 0, kBlockK);
    thread.dx = scratch.take<C>(q.dx.data ? kChunkRows * round_up(I, kPanel) : 0);
    if (q.need_dweights) {
      thread.a =
          scratch.take<A>(ceil_div(G * H > P ? G * H : P, kTile) * packed_tile_size<A>(kBlockK));
      thread.b = scratch.take<A>(kBlockK * kPanel);
      thread.out = scratch.take<C>(kTile * kPanel);
    }
    return thread;
  }

  size_t scratch_bytes() const {
    Scratch scratch = carve_shared(nullptr).rest;
    const Plan planned = plan(q.threads);
    for (int64_t i = 0; i < D * planned.slices; i++) carve_task(scratch, planned);
    for (int i = 0; i < q.threads; i++) carve_thread(scratch, planned);
    return scratch.used;
  }

  // w [K, n] -> panels of n; row k of the panel is row (k + first) % K of w.
  void pack_columns(A* packed, const S* w, int64_t K, int64_t n, int64_t first, int thread,
                    int threads) const {
    const int64_t count = ceil_div(n, kPanel);
    const S* row[kBlockK];
    for (int64_t i = part_begin(count, thread, threads); i < part_begin(count, thread + 1, threads);
         i++) {
      const int nv = Base::nv_of(n, i);
      A* panel = packed + i * panel_size<A>(K, kMaxNV);
      for (int64_t k0 = 0; k0 < K; k0 += kBlockK) {
        const int64_t k1 = k0 + kBlockK < K ? k0 + kBlockK : K;
        for (int64_t k = k0; k < k1; k++) row[k - k0] = w + (k + first) % K * n + i * kPanel;
        pack_panel_of_columns(panel + k0 * nv * L, row, k1 - k0, nv, n - i * kPanel);
      }
    }
  }

  void run() const {
    const Memory memory = carve_shared((char*)q.scratch);
    parallel(q.threads, [&](int thread, int threads) {
      for (int64_t d = 0; d < D; d++) {
        const Weights& w = q.weights[d];
        pack_columns(memory.w_hh[d], (const S*)w.w_hh, G * H, P, 0, thread, threads);
        if (q.dx.data)
          pack_columns(memory.w_ih[d], (const S*)w.w_ih, G * H, I, kSlots > G ? (G - 1) * H : 0,
                       thread, threads);
        if (projected) pack_columns(memory.w_hr[d], (const S*)w.w_hr, P, H, 0, thread, threads);
      }
      for (int64_t t = part_begin(T, thread, threads); t < part_begin(T, thread + 1, threads); t++)
        for (int64_t j = 0; j < seq.active[t]; j++) {
          const int64_t n = seq.first[t] + j;
          memory.x_row[n] = this->template row_of<const S>(q.x, t, j);
          if (q.dx.data) memory.dx_row[n] = this->template row_of<S>(q.dx, t, j);
          for (int64_t d = 0; d < D; d++) memory.h_row[d][n] = this->h_prev(d, t, j);
        }
    });

    const Plan planned = plan(q.threads);
    const int64_t tasks = D * planned.slices;
    const int wanted =
        tasks * planned.members > q.threads ? q.threads : int(tasks * planned.members);
    Scratch scratch = memory.rest;
    for (int64_t i = 0; i < tasks; i++) carve_task(scratch, planned).barrier->reset();
    for (int64_t k = 0; k < chunks; k++) {
      const Chunk now = chunk(k);
      parallel(wanted, [&](int thread, int threads) {
        if (threads < wanted) {  // OpenMP gave fewer: members could wait for nobody
          if (thread == 0) run_tasks(memory, now, Plan{planned.slices, 1}, 0, 1);
        } else {
          run_tasks(memory, now, planned, thread, threads);
        }
      });
      if (!q.dx.data && !q.need_dweights) continue;
      parallel(q.threads, [&](int thread, int threads) {
        const Thread mine = thread_memory(memory, planned, thread);
        for (int64_t d = 0; d < D; d++) {
          if (q.dx.data) make_dx(memory, mine, now, d, thread, threads);
          if (q.need_dweights) make_dweights(memory, mine, now, d, thread, threads);
        }
      });
    }
  }

  Thread thread_memory(const Memory& memory, const Plan& plan, int thread) const {
    Scratch scratch = memory.rest;
    for (int64_t i = 0; i < D * plan.slices; i++) carve_task(scratch, plan);
    for (int i = 0; i < thread; i++) carve_thread(scratch, plan);
    return carve_thread(scratch, plan);
  }

  void run_tasks(const Memory& memory, const Chunk& chunk, const Plan& plan, int thread,
                 int threads) const {
    const Thread mine = thread_memory(memory, plan, thread);
    for (int64_t i = thread / plan.members; i < D * plan.slices; i += threads / plan.members) {
      Scratch again = memory.rest;
      Task task{};
      for (int64_t k = 0; k <= i; k++) task = carve_task(again, plan);
      run_task(memory, chunk, plan, task, mine, i / plan.slices, i % plan.slices,
               thread % plan.members);
    }
  }

  // Where row j of step t lies among the chunk's rows.
  int64_t in_chunk(const Chunk& chunk, int64_t d, int64_t t, int64_t j) const {
    return seq.first[t] + j - chunk.row[d];
  }

  void run_task(const Memory& memory, const Chunk& chunk, const Plan& plan, const Task& task,
                const Thread& mine, int64_t d, int64_t slice, int64_t member) const {
    const int64_t slices = plan.slices;
    const int64_t panel_begin = part_begin(unit_panels(), member, plan.members);
    const int64_t panel_end = part_begin(unit_panels(), member + 1, plan.members);
    const int64_t block_begin = panel_begin * kMaxNV;
    const int64_t block_end = panel_end * kMaxNV < blocks ? panel_end * kMaxNV : blocks;
    const auto sorted = [&](int64_t i) { return i * slices + slice; };
    const int64_t n_rows = slice < B ? ceil_div(B - slice, slices) : 0;

    for (int64_t i = 0; chunk.first && i < n_rows; i++) {
      const int64_t row = d * B + seq.row[sorted(i)];
      // A task of one member owns all of h; members own their blocks of it (P == H then).
      for (int64_t u = projected ? 0 : block_begin; u < (projected ? ceil_div(P, L) : block_end);
           u++)
        store(task.dh + i * Pp + u * L,
              q.dh_n ? load_first((const S*)q.dh_n + row * P + u * L, P - u * L) : V{});
      if constexpr (Cell::kHasC)
        for (int64_t u = block_begin; u < block_end; u++)
          store(task.dc + i * Hp + u * L,
                q.dc_n ? load_first((const S*)q.dc_n + row * H + u * L, H - u * L) : V{});
    }

    for (int64_t step = chunk.step_begin; step < chunk.step_end; step++) {
      const int64_t t = d == 0 ? T - 1 - step : step;
      const int64_t n = this->alive(t, slice, slices);
      if (n == 0) continue;
      if (projected) unproject(memory, chunk, task, mine, d, t, n, sorted);
      for (int64_t i = 0; i < n; i++) {
        const int64_t j = sorted(i);
        const S* dy =
            q.dy.data && !projected ? this->template row_of<const S>(q.dy, t, j) + d * P : nullptr;
        for (int64_t u = block_begin; u < block_end; u++)
          gates(memory, chunk, task, d, t, i, j, u, dy);
      }
      if (plan.members > 1) task.barrier->wait(int(plan.members));
      for (int64_t i = 0; i < n; i++)
        mine.dpre.set(i, memory.dpre[d] + in_chunk(chunk, d, t, sorted(i)) * ld + (kSlots - G) * H,
                      G * H);
      // dh += W_hh' dpre. A member's blocks of units are also its blocks of h.
      const int64_t h_begin = projected ? 0 : panel_begin;
      const int64_t h_end = projected ? ceil_div(P, kPanel) : panel_end;
      multiply(memory.w_hh[d], G * H, P, h_begin, h_end, step % 2, mine.dpre, n, task.dh, Pp, true);
    }

    for (int64_t i = 0; chunk.last && i < n_rows; i++) {
      const int64_t row = d * B + seq.row[sorted(i)];
      for (int64_t u = projected ? 0 : block_begin; u < (projected ? ceil_div(P, L) : block_end);
           u++)
        store_first((S*)q.dh0 + row * P + u * L, load(task.dh + i * Pp + u * L), P - u * L);
      if constexpr (Cell::kHasC)
        for (int64_t u = block_begin; u < block_end; u++)
          store_first((S*)q.dc0 + row * H + u * L, load(task.dc + i * Hp + u * L), H - u * L);
    }
  }

  // out[i][n] (+)= sum_k row[i][k] w(k, n), panels begin..end of w, or the other way round: what
  // was used last is still in cache. In stretches of k, so that a panel's stretch stays in L2 for
  // all the rows.
  void multiply(const A* packed, int64_t K, int64_t N, int64_t begin, int64_t end, bool backwards,
                const Rows<A>& row, int64_t n, C* out, int64_t ld_out, bool accumulate) const {
    const int64_t size = panel_size<A>(K, kMaxNV);
    const auto at = [&](int64_t panel, int64_t k) {  // the last panel may be narrower
      return packed + panel * size + k * Base::nv_of(N, panel) * L;
    };
    for (int64_t k0 = 0; k0 < K; k0 += kStretch) {
      const int64_t stretch = K - k0 < kStretch ? K - k0 : kStretch;
      for (int64_t i = begin; i < end; i++) {
        const int64_t panel = backwards ? end - 1 - (i - begin) : i;
        const int64_t next = i + 1 == end ? panel : backwards ? panel - 1 : panel + 1;
        C* o = out + panel * kPanel;
        multiply_panel(n, Base::nv_of(N, panel), o, ld_out, accumulate || k0 > 0 ? o : nullptr,
                       ld_out, row.from(k0), at(panel, k0), at(next, k0), stretch);
      }
    }
  }

  // dh (all of it) -> memory.dh, task.dm = W_hr' dh; task.dh becomes 0: what is left goes through
  // W_hh alone.
  template <class Sorted>
  void unproject(const Memory& memory, const Chunk& chunk, const Task& task, const Thread& mine,
                 int64_t d, int64_t t, int64_t n, const Sorted& sorted) const {
    for (int64_t i = 0; i < n; i++) {
      const int64_t j = sorted(i);
      A* dh = memory.dh[d] + in_chunk(chunk, d, t, j) * P;
      for (int64_t u = 0; u < ceil_div(P, L); u++) {
        V sum = load(task.dh + i * Pp + u * L);
        if (q.dy.data)
          sum += load_first(this->template row_of<const S>(q.dy, t, j) + d * P + u * L, P - u * L);
        store_first(dh + u * L, sum, P - u * L);
        store(task.dh + i * Pp + u * L, V{});
      }
      mine.dh.set(i, dh, P);
    }
    multiply(memory.w_hr[d], P, H, 0, unit_panels(), false, mine.dh, n, task.dm, Hp, false);
  }

  // From dh and dc to dpre of block u of one row; dh becomes what goes past W_hh, dc that of
  // c_prev.
  SEQKERN_INLINE void gates(const Memory& memory, const Chunk& chunk, const Task& task, int64_t d,
                            int64_t t, int64_t i, int64_t j, int64_t u, const S* dy) const {
    const int64_t valid = H - u * L;
    C* dh_memory = projected ? task.dm + i * Hp + u * L : task.dh + i * Pp + u * L;
    V dh = load(dh_memory), dc{}, c_prev{}, h_prev{}, h{};
    if (dy) dh += load_first(dy + u * L, valid);
    V saved[kSaved > 0 ? kSaved : 1], dpre[kSlots];
    for (int s = 0; s < kSaved; s++) saved[s] = load(this->saved(d, t, j, u) + s * L);
    if constexpr (Cell::kHasC) {
      dc = load(task.dc + i * Hp + u * L);
      const bool starts = d == 0 ? t == 0 : t == T - 1 || j >= seq.active[t + 1];
      c_prev = starts ? load_first((const S*)q.c0 + (d * B + seq.row[j]) * H + u * L, valid)
                      : load(this->saved(d, d == 0 ? t - 1 : t + 1, j, u) + (kSaved - 1) * L);
      if (projected)
        store_first(memory.m[d] + in_chunk(chunk, d, t, j) * H + u * L, Cell::unprojected(saved),
                    valid);
    } else if constexpr (kSlots > G) {
      h_prev = load_first(memory.h_row[d][seq.first[t] + j] + u * L, valid);
    } else {
      h = load_first(this->template row_of<const S>(q.y, t, j) + d * P + u * L, valid);
    }
    const V past = Cell::backward(dh, dc, saved, h, h_prev, c_prev, dpre);
    if constexpr (Cell::kHasC) store(task.dc + i * Hp + u * L, dc);
    if (!projected) store(dh_memory, past);
    A* out = memory.dpre[d] + in_chunk(chunk, d, t, j) * ld + u * L;
    for (int s = 0; s < kSlots; s++) store_first(out + s * H, dpre[s], valid);
  }

  // dpre W_ih of direction d for this thread's rows of a chunk. The second direction to come to a
  // row finds the first one's there and adds it.
  void make_dx(const Memory& memory, const Thread& mine, const Chunk& chunk, int64_t d, int thread,
               int threads) const {
    const int64_t ld_dx = round_up(I, kPanel);
    const int64_t others = chunks - 1 - chunk.index;  // the other direction's chunk of these rows
    const bool first = D == 1 || (d == 0 ? chunk.index <= others : chunk.index < others);
    const bool last = D == 1 || !first;
    const auto partial = [&](int64_t row) -> C* {
      if constexpr (__is_same(S, C))
        return memory.dx_row[row];
      else
        return memory.dx + row * I;
    };
    const int64_t end = part_begin(chunk.rows[d], thread + 1, threads);
    for (int64_t r = part_begin(chunk.rows[d], thread, threads); r < end; r += kChunkRows) {
      const int64_t n = end - r < kChunkRows ? end - r : kChunkRows;
      for (int64_t k0 = 0; k0 < G * H; k0 += kBlockK) {
        const int64_t K = G * H - k0 < kBlockK ? G * H - k0 : kBlockK;
        for (int64_t i = 0; i < n; i++) mine.dx_dpre.set(i, memory.dpre[d] + (r + i) * ld + k0, K);
        for (int64_t panel = 0; panel < ceil_div(I, kPanel); panel++) {
          const int nv = Base::nv_of(I, panel);
          const A* w = memory.w_ih[d] + panel * panel_size<A>(G * H, kMaxNV) + k0 * nv * L;
          C* out = mine.dx + panel * kPanel;
          multiply_panel(n, nv, out, ld_dx, k0 == 0 ? nullptr : out, ld_dx, mine.dx_dpre.from(0), w,
                         w, K);
        }
      }
      for (int64_t i = 0; i < n; i++) {
        const int64_t row = chunk.row[d] + r + i;
        C* sum = mine.dx + i * ld_dx;
        if (!first)
          for (int64_t c = 0; c < I; c += L)
            store(sum + c, load(sum + c) + load_first(partial(row) + c, I - c));
        if (last)
          convert(memory.dx_row[row], sum, I);
        else
          convert(partial(row), sum, I);
      }
    }
  }

  void make_dweights(const Memory& memory, const Thread& mine, const Chunk& chunk, int64_t d,
                     int thread, int threads) const {
    const WeightGradients& dw = q.dweights[d];
    const A* dpre = memory.dpre[d];
    const S* const* x = memory.x_row + chunk.row[d];
    const S* const* h = memory.h_row[d] + chunk.row[d];
    const auto add_outer = [&](const A* a, int64_t ld_a, int64_t M, const auto* b, int64_t N,
                               C* sum, S* out) {
      outer(mine, chunk, chunk.rows[d], a, ld_a, M, b, N, sum, out, thread, threads);
    };
    if constexpr (kSlots > G) {  // slots n r z n': W_ih's gates r z n are not in a row
      add_outer(dpre + H, ld, 2 * H, x, I, memory.dw_ih[d], (S*)dw.w_ih);
      add_outer(dpre, ld, H, x, I, memory.dw_ih[d] + (memory.dw_ih[d] ? 2 * H * I : 0),
                (S*)dw.w_ih + 2 * H * I);
    } else {
      add_outer(dpre, ld, G * H, x, I, memory.dw_ih[d], (S*)dw.w_ih);
    }
    add_outer(dpre + (kSlots - G) * H, ld, G * H, h, P, memory.dw_hh[d], (S*)dw.w_hh);
    if (projected) add_outer(memory.dh[d], P, P, memory.m_row[d], H, memory.dw_hr[d], (S*)dw.w_hr);
    if (dw.b_ih) make_db(memory.db[d], chunk, chunk.rows[d], dpre, dw, thread, threads);
  }

  // dW[M, N] (+)= sum over a chunk's rows r of a[r * ld_a + m] b[r][n]; this thread makes its part
  // of the M. sum: [M, N] if S is narrower than C.
  template <class Row>
  void outer(const Thread& mine, const Chunk& chunk, int64_t chunk_rows, const A* a, int64_t ld_a,
             int64_t M, const Row* const* b, int64_t N, C* sum, S* dw, int thread,
             int threads) const {
    const int64_t tiles = ceil_div(M, kTile);
    const int64_t m0 = part_begin(tiles, thread, threads) * kTile;
    int64_t m1 = part_begin(tiles, thread + 1, threads) * kTile;
    if (m1 > M) m1 = M;
    if (m0 >= m1) return;
    C* out;
    if constexpr (__is_same(S, C))
      out = dw;
    else
      out = sum;
    if (chunk.first && chunk_rows == 0) memset(out + m0 * N, 0, size_t((m1 - m0) * N) * sizeof(C));
    const auto tile_at = [&](int64_t m) {
      return mine.a + (m - m0) / kTile * packed_tile_size<A>(kBlockK);
    };
    for (int64_t k0 = 0; k0 < chunk_rows; k0 += round) {
      const int64_t K = chunk_rows - k0 < round ? chunk_rows - k0 : round;
      const bool fresh = chunk.first && k0 == 0;
      for (int64_t m = m0; m < m1; m += kTile)
        pack_tile_of_columns(int(m1 - m < kTile ? m1 - m : kTile), tile_at(m), a + k0 * ld_a + m,
                             ld_a, K);
      for (int64_t panel = 0; panel < ceil_div(N, kPanel); panel++) {
        const int nv = Base::nv_of(N, panel);
        const int64_t columns = N - panel * kPanel;
        pack_panel_of_columns(mine.b, b + k0, K, nv, columns, panel * kPanel);
        for (int64_t m = m0; m < m1; m += kTile) {
          const int64_t r = m1 - m < kTile ? m1 - m : kTile;
          C* o = out + m * N + panel * kPanel;
          const auto columns_of_a = packed_tile<A>(tile_at(m), K);
          if (columns >= nv * L) {
            multiply_panel(r, nv, o, N, fresh ? nullptr : o, N, columns_of_a, mine.b, mine.b, K);
          } else {  // the last vector sticks out
            multiply_panel(r, nv, mine.out, kPanel, (const C*)nullptr, 0, columns_of_a, mine.b,
                           mine.b, K);
            for (int64_t i = 0; i < r; i++)
              for (int64_t n = 0; n < columns; n++) {
                const C value = mine.out[i * kPanel + n];
                o[i * N + n] = fresh ? value : o[i * N + n] + value;
              }
          }
        }
      }
    }
    if constexpr (!__is_same(S, C))
      if (chunk.last) convert(dw + m0 * N, sum + m0 * N, (m1 - m0) * N);
  }

  // db_ih and db_hh: sums of dpre's columns, over all chunks in db.
  void make_db(C* db, const Chunk& chunk, int64_t chunk_rows, const A* dpre,
               const WeightGradients& dw, int thread, int threads) const {
    const int64_t vectors = ceil_div(width, L);
    const int64_t c0 = part_begin(vectors, thread, threads) * L;
    int64_t c1 = part_begin(vectors, thread + 1, threads) * L;
    if (c1 > width) c1 = width;
    if (c0 >= c1) return;
    for (int64_t c = c0; c < c1; c += L) {
      V sum = chunk.first ? V{} : load(db + c);
      for (int64_t row = 0; row < chunk_rows; row += kBlockSum) {  // in rounds: less rounding
        const int64_t end = row + kBlockSum < chunk_rows ? row + kBlockSum : chunk_rows;
        V partial{};
        for (int64_t r = row; r < end; r++) partial += load_first(dpre + r * ld + c, width - c);
        sum += partial;
      }
      store(db + c, sum);
    }
    for (int64_t c = c0; chunk.last && c < c1; c++) {  // slot c / H: W_ih's first, W_hh's last
      const int64_t slot = c / H, unit = c % H;
      const int64_t first = kSlots > G ? G - 1 : 0;
      if (slot < G) convert((S*)dw.b_ih + (slot + first) % G * H + unit, db + c, 1);
      if (slot >= kSlots - G) convert((S*)dw.b_hh + (slot - (kSlots - G)) * H + unit, db + c, 1);
    }
  }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
