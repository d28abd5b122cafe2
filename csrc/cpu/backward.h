// The backward pass of a recurrent layer (recurrence.h). First the weights are packed and it is
// noted where every row lies; then, for one chunk of time steps after another, two stages, each one
// parallel region:
//   1  the recurrence the other way round: dh_t, dc_t -> dpre_t;
//      dh_{t-1} = W_hh' dpre_t + what goes past W_hh.
//      Tasks and members as in forward. Writes dpre [rows of the chunk, planes of H]: the gradients
//      of the pre-activations, then what is summed over all rows for a cell's own parameters.
//   2  dx = dpre W_ih, by rows; dW_ih += dpre' x, dW_hh += dpre' h_prev, db += sum dpre, by rows of
//      dW: every sum is made in the order of the rows, so the number of threads changes no bit.
// A chunk's dpre is read while it is still in cache, and all of it together is never in memory.
#pragma once

#include "recurrence.h"

namespace seqkern {
namespace SEQKERN_ISA {

template <class S>
struct Backward : Layer<S> {
  using Base = Layer<S>;
  using Base::apart, Base::B, Base::blocks, Base::cell, Base::D, Base::first, Base::G, Base::H,
      Base::Hp, Base::I, Base::L, Base::P, Base::Pp, Base::projected, Base::saved_count,
      Base::second, Base::seconds, Base::seq, Base::states, Base::T;
  using typename Base::A;
  using typename Base::C;
  using typename Base::Kept;
  using typename Base::M;
  using typename Base::V;

  static constexpr int kPanel = kMaxNV * L;  // outputs of a full panel
  static constexpr int kTile = kColumnTile<A>;
  static constexpr int64_t kBlockSum = 64;
  static constexpr int64_t kChunkBytes = 8 << 20;  // of dpre, about; but never so few rows that
  static constexpr int64_t kLeastRows = 512;       // adding to dW costs more than the products
  static constexpr int64_t kStretch =
      2048 / int64_t(sizeof(A));  // a multiple of every kDeep: what belongs together stays so

  const BackwardParams& q;
  const int64_t width;  // numbers in a row of dpre, one direction: planes of H
  const int64_t ld;     // elements from one row to the next
  const int64_t rows;
  const int64_t round;  // rows per round of a weight gradient: short sums are rounded less, long
                        // rounds are faster
  const int64_t chunks;

  struct Task {
    C* dh;                       // [slice rows][Pp]: gradient that reaches h from later steps
    C* dpart;                    // [slice rows][Pp]: of h_in, if h is scaled
    C* dstate[kMostStates - 1];  // [slice rows][Hp]
    C* dm;                       // [slice rows][Hp]: gradient of h before its projection
    C* dmid[kMostMid];           // [slice rows][Hp]
    C* carry;                    // [slice rows][Hp], with second products
    Barrier* barrier;
  };
  struct Thread {
    Rows<A> dpre;     // [slice rows] of as many gates as a product has
    Rows<A> dh;       // [slice rows] of P, if projected
    Rows<A> dx_dpre;  // [kChunkRows] of kBlockK
    C* dx;            // [kChunkRows][round_up(I, kPanel)]
    A* a;             // [round_up(M part, kTile)][kBlockK]: packed dpre
    A* b;             // [kBlockK][kPanel]: packed rows of x or h
    C* out;           // [kTile][kPanel]
    C* held;          // [G + 1][Hp], if rows are normalised
  };
  struct Memory {
    // Packed, [outputs I, P, H, H][k: dpre, dpre, dh, dpre].
    A *w_ih[kMostDirections], *w_hh[kMostDirections], *w_hr[kMostDirections];
    A* w_second[kMostProducts][kMostDirections];
    C* own[kMostDirections];            // as forward's
    A* dpre[kMostDirections];           // [chunk's rows][ld]
    A* dh[kMostDirections];             // [chunk's rows][P], if projected: whole gradient of y
    A* m[kMostDirections];              // [chunk's rows][H], if projected: h before its projection
    A* mid[kMostMid][kMostDirections];  // [chunk's rows][H]
    const S** x_row;                    // [rows]
    S** dx_row;                         // [rows]
    const S** h_row[kMostDirections];   // [rows]: h_prev of direction d
    S* h_in[kMostDirections];           // [chunk's rows][P], if h is scaled
    const S** h_in_row[kMostDirections];  // [chunk's rows], and so the next two
    const A** m_row[kMostDirections];
    const A** mid_row[kMostMid][kMostDirections];
    C *dw_ih[kMostDirections], *dw_hh[kMostDirections], *dw_hr[kMostDirections];  // sums, where S
    C* dw_second[kMostProducts][kMostDirections];                                 // is narrower
    C* db[kMostDirections];     // [width]: sums of dpre's columns
    C* dgain[kMostDirections];  // [gains][Hp]: of dpre times normalised values
    C* dx;                      // [rows][I]: of the directions so far, where S is narrower
    Scratch rest;
  };
  // The steps of one stage, and the rows that either way through time meets in them. The bounds of
  // the chunks lie evenly about the middle of the sequence, so the rows of two chunks, one of
  // either way, are the same or have none in common.
  struct Chunk {
    int64_t index, step_begin, step_end;
    int64_t row[2], rows[2];  // onwards, backwards: the first, and how many
    bool first, last;
  };

  // Some blocks of some rows of one step.
  struct Span {
    const Memory& memory;
    const Chunk& chunk;
    const Task& task;
    const Thread& mine;
    int64_t d, t, n;  // n rows of the slice
    Slice sorted;
    int64_t u0, u1;  // blocks
  };
  using Gates = void (Backward::*)(const Span&) const;
  Gates gates, begin_gates;  // the latter after the second products

  explicit Backward(const BackwardParams& params)
      : Base(params),
        q(params),
        width((cell.slots + cell.sums) * H),
        ld(odd_lines<A>(width)),
        rows(seq.rows),
        round(rows <= 1024 ? 64 : kBlockK),
        chunks(count_chunks()) {
    choose_gates();
  }

  void choose_gates();  // gate_gradients.h

  int64_t count_chunks() const {
    int64_t most_rows = kChunkBytes / (D * ld * int64_t(sizeof(A)));
    if (most_rows < kLeastRows) most_rows = kLeastRows;
    if (T == 0) return 1;
    const int64_t count = ceil_div(T, ceil_div(most_rows, B));
    return count + int64_t(T % 2 == 1 && count % 2 == 0);  // else no chunk has the middle step
  }
  int64_t bound(int64_t k) const {
    return 2 * k <= chunks ? T * k / chunks : T - T * (chunks - k) / chunks;
  }
  int64_t rows_before(int64_t t) const { return t < T ? seq.first[t] : rows; }

  Chunk chunk(int64_t index) const {
    Chunk c{index, bound(index), bound(index + 1), {}, {}, index == 0, index == chunks - 1};
    for (int way = 0; way < 2; way++) {
      const int64_t begin = rows_before(way == 0 ? T - c.step_end : c.step_begin);
      const int64_t end = rows_before(way == 0 ? T - c.step_begin : c.step_end);
      c.row[way] = begin, c.rows[way] = end - begin;
    }
    return c;
  }

  int64_t slice_rows(const Plan& plan) const { return ceil_div(B, plan.slices); }
  int64_t unit_panels() const { return ceil_div(H, kPanel); }
  Plan plan(int threads) const {
    return make_plan(q, threads, cell.hidden_gates * H * P * int64_t(sizeof(A)), unit_panels());
  }

  // Gates that a product's rows of dpre have at most.
  int most_gates() const {
    int most = first.gates;
    for (int i = 0; i < seconds; i++)
      if (second[i].gates > most) most = second[i].gates;
    return most;
  }

  // n rows, and where each of them lies.
  template <class T_>
  static void take_rows(Scratch& scratch, T_*& data, const T_**& row, int64_t n, int64_t length) {
    data = scratch.take<T_>(n * length);
    row = scratch.take<const T_*>(n);
    for (int64_t i = 0; scratch.base && i < n; i++) row[i] = data + i * length;
  }

  Memory carve_shared(char* base) const {
    Memory memory{};
    Scratch scratch{base};
    const auto packed = [&](int64_t outputs, int64_t K) {
      return scratch.take<A>(ceil_div(outputs, kPanel) * panel_size<A>(K, kMaxNV));
    };
    const bool sums = q.need_dweights && !__is_same(S, C);
    int64_t chunk_rows = 0;
    for (int64_t k = 0; k < chunks; k++)
      if (chunk(k).rows[0] > chunk_rows) chunk_rows = chunk(k).rows[0];
    for (int64_t d = 0; d < D; d++) {
      if (first.gates > 0) memory.w_hh[d] = packed(P, first.gates * H);
      if (q.dx.data) memory.w_ih[d] = packed(I, G * H);
      if (projected) memory.w_hr[d] = packed(H, P);
      for (int i = 0; i < seconds; i++) memory.w_second[i][d] = packed(H, second[i].gates * H);
      if (this->own_count() > 0) memory.own[d] = scratch.take<C>(Hp * this->own_count());
      memory.h_row[d] = scratch.take<const S*>(rows);
      if (sums) {
        memory.dw_ih[d] = scratch.take<C>(G * H * I);
        if (first.gates > 0) memory.dw_hh[d] = scratch.take<C>(first.gates * H * P);
        if (projected) memory.dw_hr[d] = scratch.take<C>(P * H);
        for (int i = 0; i < seconds; i++)
          memory.dw_second[i][d] = scratch.take<C>(second[i].gates * H * H);
      }
      memory.dpre[d] = scratch.take<A>(chunk_rows * ld);
      if (q.need_dweights) {
        memory.db[d] = scratch.take<C>(width + L);
        memory.dgain[d] = scratch.take<C>(gains() * Hp);
      }
      if (projected) {
        memory.dh[d] = scratch.take<A>(chunk_rows * P);
        take_rows(scratch, memory.m[d], memory.m_row[d], chunk_rows, H);
      }
      for (int i = 0; i < cell.mid; i++)
        take_rows(scratch, memory.mid[i][d], memory.mid_row[i][d], chunk_rows, H);
      if (q.regularisers.scale && first.gates > 0)
        take_rows(scratch, memory.h_in[d], memory.h_in_row[d], chunk_rows, P);
    }
    memory.x_row = scratch.take<const S*>(rows);
    memory.dx_row = scratch.take<S*>(rows);
    if (q.dx.data && D > 1 && !__is_same(S, C)) memory.dx = scratch.take<C>(rows * I);
    memory.rest = scratch;
    return memory;
  }

  Task carve_task(Scratch& scratch, const Plan& plan) const {
    Task task{};
    const int64_t n = slice_rows(plan);
    task.dh = scratch.take<C>(n * Pp);
    if (q.regularisers.scale) task.dpart = scratch.take<C>(n * Pp);
    for (int k = 0; k < states; k++) task.dstate[k] = scratch.take<C>(n * Hp);
    if (projected) task.dm = scratch.take<C>(n * Hp);
    for (int i = 0; i < cell.mid; i++) task.dmid[i] = scratch.take<C>(n * Hp);
    if (cell.mid > 0) task.carry = scratch.take<C>(n * Hp);
    task.barrier = scratch.take<Barrier>(1);
    return task;
  }

  Thread carve_thread(Scratch& scratch, const Plan& plan) const {
    Thread thread{};
    thread.dpre = Rows<A>::carve(scratch, slice_rows(plan), most_gates() * H);
    thread.dh = Rows<A>::carve(scratch, projected ? slice_rows(plan) : 0, P);
    thread.dx_dpre = Rows<A>::carve(scratch, q.dx.data ? kChunkRows : 0, kBlockK);
    thread.dx = scratch.take<C>(q.dx.data ? kChunkRows * round_up(I, kPanel) : 0);
    if (q.need_dweights) {
      const int gates = G > most_gates() ? G : most_gates();
      thread.a = scratch.take<A>(ceil_div(gates * H > P ? gates * H : P, kTile) *
                                 packed_tile_size<A>(kBlockK));
      thread.b = scratch.take<A>(kBlockK * kPanel);
      thread.out = scratch.take<C>(kTile * kPanel);
    }
    if (cell.rows) thread.held = scratch.take<C>((G + 1) * Hp);
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
        if (first.gates > 0)
          pack_columns(memory.w_hh[d], (const S*)w.w_hh, first.gates * H, P, 0, thread, threads);
        if (q.dx.data)
          pack_columns(memory.w_ih[d], (const S*)w.w_ih, G * H, I, cell.rotation * H, thread,
                       threads);
        if (projected) pack_columns(memory.w_hr[d], (const S*)w.w_hr, P, H, 0, thread, threads);
        for (int i = 0; i < seconds; i++)
          pack_columns(memory.w_second[i][d], this->second_weight(d, i), second[i].gates * H, H,
                       second[i].rotation * H, thread, threads);
        if (thread == d % threads) this->make_own(memory.own[d], w);
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
    return seq.first[t] + j - chunk.row[this->backwards(d)];
  }

  void run_task(const Memory& memory, const Chunk& chunk, const Plan& plan, const Task& task,
                const Thread& mine, int64_t d, int64_t slice, int64_t member) const {
    const int64_t slices = plan.slices;
    const int64_t panel_begin = part_begin(unit_panels(), member, plan.members);
    const int64_t panel_end = part_begin(unit_panels(), member + 1, plan.members);
    const int64_t block_begin = panel_begin * kMaxNV;
    const int64_t block_end = panel_end * kMaxNV < blocks ? panel_end * kMaxNV : blocks;
    const Slice sorted{slices, slice};
    const int64_t n_rows = slice < B ? ceil_div(B - slice, slices) : 0;
    const bool backwards = this->backwards(d);
    // A task of one member owns all of h; members own their blocks of it (P == H then).
    const int64_t h_block_begin = projected ? 0 : block_begin;
    const int64_t h_block_end = projected ? ceil_div(P, L) : block_end;

    for (int64_t i = 0; chunk.first && i < n_rows; i++) {
      const int64_t row = d * B + seq.row[sorted(i)];
      for (int64_t u = h_block_begin; u < h_block_end; u++)
        store(task.dh + i * Pp + u * L,
              q.dh_n ? load_first((const S*)q.dh_n + row * P + u * L, P - u * L) : V{});
      for (int k = 0; k < states; k++)
        for (int64_t u = block_begin; u < block_end; u++)
          store(task.dstate[k] + i * Hp + u * L,
                q.dstate_n[k] ? load_first((const S*)q.dstate_n[k] + row * H + u * L, H - u * L)
                              : V{});
    }

    const auto meet = [&] {
      if (plan.members > 1) task.barrier->wait(int(plan.members));
    };
    for (int64_t step = chunk.step_begin; step < chunk.step_end; step++) {
      const int64_t t = backwards ? step : T - 1 - step;
      const int64_t n = this->alive(t, slice, slices);
      if (n == 0) continue;
      const Span span{memory, chunk, task, mine, d, t, n, sorted, block_begin, block_end};
      const auto take_dpre = [&](const Product& product) {
        for (int64_t i = 0; i < n; i++)
          mine.dpre.set(i,
                        memory.dpre[d] + in_chunk(chunk, d, t, sorted(i)) * ld + product.plane * H,
                        product.gates * H);
      };
      if (projected) unproject(memory, chunk, task, mine, d, t, n, sorted);
      (this->*gates)(span);
      // A member's blocks of units are also its blocks of h, and of what is in the middle.
      if (cell.mid > 0) {
        meet();
        for (int i = 0; i < seconds; i++) {
          take_dpre(second[i]);
          multiply(memory.w_second[i][d], second[i].gates * H, H, panel_begin, panel_end, step % 2,
                   mine.dpre, n, task.dmid[i], Hp, false);
        }
        (this->*begin_gates)(span);
      }
      meet();
      if (first.gates == 0) continue;
      if (q.regularisers.scale)
        for (int64_t i = 0; i < n; i++) {
          const int64_t j = sorted(i), at = in_chunk(chunk, d, t, j) * P;
          const S *h = memory.h_row[d][seq.first[t] + j], *scale = this->scale_of(d, j);
          for (int64_t k = h_block_begin * L; k < h_block_end * L; k += L)
            store_first(memory.h_in[d] + at + k,
                        load_first(h + k, P - k) * load_first(scale + k, P - k), P - k);
        }
      // dh += W_hh' dpre
      take_dpre(first);
      const int64_t h_begin = projected ? 0 : panel_begin;
      const int64_t h_end = projected ? ceil_div(P, kPanel) : panel_end;
      multiply(memory.w_hh[d], first.gates * H, P, h_begin, h_end, step % 2, mine.dpre, n,
               q.regularisers.scale ? task.dpart : task.dh, Pp, !q.regularisers.scale);
      if (!q.regularisers.scale) continue;
      for (int64_t i = 0; i < n; i++) {
        const S* scale = this->scale_of(d, sorted(i));
        for (int64_t u = h_block_begin; u < h_block_end; u++) {
          C* dh = task.dh + i * Pp + u * L;
          store(dh, load(dh) +
                        load(task.dpart + i * Pp + u * L) * load_first(scale + u * L, P - u * L));
        }
      }
    }

    for (int64_t i = 0; chunk.last && i < n_rows; i++) {
      const int64_t row = d * B + seq.row[sorted(i)];
      for (int64_t u = h_block_begin; u < h_block_end; u++)
        store_first((S*)q.dh0 + row * P + u * L, load(task.dh + i * Pp + u * L), P - u * L);
      for (int k = 0; k < states; k++)
        for (int64_t u = block_begin; u < block_end; u++)
          store_first((S*)q.dstate0[k] + row * H + u * L, load(task.dstate[k] + i * Hp + u * L),
                      H - u * L);
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
  void unproject(const Memory& memory, const Chunk& chunk, const Task& task, const Thread& mine,
                 int64_t d, int64_t t, int64_t n, const Slice& sorted) const {
    const Regularised<V> bounded{V{}, V{} + C(q.regularisers.proj_clip)};
    for (int64_t i = 0; i < n; i++) {
      const int64_t j = sorted(i);
      A* dh = memory.dh[d] + in_chunk(chunk, d, t, j) * P;
      for (int64_t u = 0; u < ceil_div(P, L); u++) {
        V sum = load(task.dh + i * Pp + u * L);
        if (q.dy.data)
          sum += load_first(this->template row_of<const S>(q.dy, t, j) + d * P + u * L, P - u * L);
        if (q.regularisers.on)
          sum = bounded.clip_gradient(
              load_first(this->template row_of<const S>(q.y, t, j) + d * P + u * L, P - u * L),
              sum);
        store_first(dh + u * L, sum, P - u * L);
        store(task.dh + i * Pp + u * L, V{});
      }
      mine.dh.set(i, dh, P);
    }
    multiply(memory.w_hr[d], P, H, 0, unit_panels(), false, mine.dh, n, task.dm, Hp, false);
  }

  // ---- from states' gradients to pre-activations' (gate_gradients.h) ----------------------------

  template <class Cell, bool kRegularised>
  void make_gradients(const Span& span) const;
  template <class Cell, bool kRegularised>
  void end_gradients(const Span& span) const;
  template <class Cell, bool kRegularised>
  void begin_gradients(const Span& span) const;
  template <bool kRegularised>
  void normalised_lstm(const Span& span) const;
  template <bool kRegularised>
  void normalised_gru(const Span& span) const;

  // dpre W_ih of direction d for this thread's rows of a chunk. Directions that come to a row later
  // find the sum of the others there and add to it.
  void make_dx(const Memory& memory, const Thread& mine, const Chunk& chunk, int64_t d, int thread,
               int threads) const {
    const int64_t ld_dx = round_up(I, kPanel);
    const int64_t others = chunks - 1 - chunk.index;  // the other way's chunk of these rows
    const bool backwards = this->backwards(d);
    const bool one_way = q.reverse == 0 || q.reverse >= D;
    const bool sooner = backwards ? chunk.index < others : chunk.index <= others;
    const bool first = d == (backwards ? q.reverse : 0) && (one_way || sooner);
    const bool last = d == (backwards || one_way ? D : q.reverse) - 1 && (one_way || !sooner);
    const int64_t chunk_row = chunk.row[backwards], chunk_rows = chunk.rows[backwards];
    const auto partial = [&](int64_t row) -> C* {
      if constexpr (__is_same(S, C))
        return memory.dx_row[row];
      else
        return memory.dx + row * I;
    };
    const int64_t end = part_begin(chunk_rows, thread + 1, threads);
    for (int64_t r = part_begin(chunk_rows, thread, threads); r < end; r += kChunkRows) {
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
        const int64_t row = chunk_row + r + i;
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
    const int64_t chunk_row = chunk.row[this->backwards(d)];
    const int64_t chunk_rows = chunk.rows[this->backwards(d)];
    const S* const* x = memory.x_row + chunk_row;
    const S* const* h = memory.h_row[d] + chunk_row;
    const auto add_outer = [&](const A* a, int64_t ld_a, int64_t M, const auto* b, int64_t N,
                               C* sum, S* out) {
      outer(mine, chunk, chunk_rows, a, ld_a, M, b, N, sum, out, thread, threads);
    };
    // Of a matrix whose last gate lies in the first of its planes, if it is rotated.
    const auto add_gates = [&](int plane, int gates, int rotation, const auto* b, int64_t N, C* sum,
                               S* out) {
      const int64_t last = (gates - 1) * H;
      if (rotation == 0) return add_outer(dpre + plane * H, ld, gates * H, b, N, sum, out);
      add_outer(dpre + (plane + 1) * H, ld, last, b, N, sum, out);
      add_outer(dpre + plane * H, ld, H, b, N, sum ? sum + last * N : sum, out + last * N);
    };
    add_gates(0, G, cell.rotation, x, I, memory.dw_ih[d], (S*)dw.w_ih);
    if (first.gates > 0)
      add_gates(first.plane, first.gates, 0, q.regularisers.scale ? memory.h_in_row[d] : h, P,
                memory.dw_hh[d], (S*)dw.w_hh);
    for (int i = 0; i < seconds; i++)
      add_gates(second[i].plane, second[i].gates, second[i].rotation,
                memory.mid_row[second[i].mid][d], H, memory.dw_second[i][d],
                cell.mid == 1 ? (S*)dw.w_hh + first.gates * H * P : (S*)dw.own[i]);
    if (projected) add_outer(memory.dh[d], P, P, memory.m_row[d], H, memory.dw_hr[d], (S*)dw.w_hr);
    if (cell.rows) make_gains(memory, chunk, d, thread, threads);
    if (cell.rows || cell.own > 0 || first.gates == 0 || dw.b_ih || dw.b_hh)
      make_db(memory.db[d], chunk, chunk_rows, dpre, dw, thread, threads);
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

  // Gains of normalised rows: of W_ih x, of W_hh h, and of c.
  int gains() const { return cell.rows ? 2 * G + (states > 0 ? 1 : 0) : 0; }

  // Sums of gradients times what was normalised, over all chunks in dgain; this thread makes some
  // blocks of them.
  void make_gains(const Memory& memory, const Chunk& chunk, int64_t d, int thread,
                  int threads) const {
    const int64_t begin = chunk.row[this->backwards(d)], n = chunk.rows[this->backwards(d)];
    const WeightGradients& dw = q.dweights[d];
    for (int gain = 0; gain < gains(); gain++) {
      const bool of_c = gain == 2 * G, of_hidden = gain >= G && !of_c;
      const int gate = of_c ? 0 : gain % G;
      const bool apart = of_hidden && states == 0 && gate == 2;  // a GRU's W_hn h
      const int plane = cell.slots + (of_c || apart ? G : gate);
      const int value = of_c ? 2 * G + 4 : gain;
      S* out = (S*)dw.own[of_c ? 4 : of_hidden ? 2 : 0] + gate * H;
      for (int64_t u = part_begin(blocks, thread, threads);
           u < part_begin(blocks, thread + 1, threads); u++) {
        C* total = memory.dgain[d] + gain * Hp + u * L;
        V sum = chunk.first ? V{} : load(total);
        for (int64_t row = 0; row < n; row += kBlockSum) {
          const int64_t end = row + kBlockSum < n ? row + kBlockSum : n;
          V partial{};
          for (int64_t r = row; r < end; r++) {
            const S* saved = (const S*)q.reserve + ((begin + r) * D + d) * this->reserve_row;
            partial += load_first(memory.dpre[d] + r * ld + plane * H + u * L, H - u * L) *
                       load(saved + (u * saved_count + value) * L);
          }
          sum += partial;
        }
        store(total, sum);
        if (chunk.last) store_first(out + u * L, sum, H - u * L);
      }
    }
  }

  // db_ih and db_hh: sums of dpre's columns, over all chunks in db.
  void make_db(C* db, const Chunk& chunk, int64_t chunk_rows, const A* dpre,
               const WeightGradients& dw, int thread, int threads) const {
    const int64_t begin = cell.rows ? cell.slots * H : 0;  // those before are of products
    const int64_t vectors = ceil_div(width - begin, L);
    const int64_t c0 = begin + part_begin(vectors, thread, threads) * L;
    int64_t c1 = begin + part_begin(vectors, thread + 1, threads) * L;
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
    for (int64_t c = c0; chunk.last && c < c1; c++) give_sum(dw, int(c / H), c % H, db[c]);
  }

  // The sum of a plane's column, to every parameter whose gradient it is.
  void give_sum(const WeightGradients& dw, int plane, int64_t unit, C sum) const {
    const auto give = [&](void* gradient, int64_t gate) {
      if (gradient) convert((S*)gradient + gate * H + unit, &sum, 1);
    };
    const auto give_slots = [&](void* gradient, int slot, int gates, int rotation) {
      if (plane >= slot && plane < slot + gates) give(gradient, (plane - slot + rotation) % gates);
    };
    const int own = plane - cell.slots;
    if (cell.rows) {  // what biases share, then a GRU's b_hn or the bias of c
      const bool lstm = states > 0;
      give_slots(dw.b_ih, cell.slots, G, 0);
      give_slots(dw.own[1], cell.slots, G, 0);
      if (lstm || own < 2) give_slots(dw.own[3], cell.slots, G, 0);
      if (own == G) give(lstm ? dw.own[5] : dw.own[3], lstm ? 0 : 2);
      return;
    }
    const int hidden = cell.hidden_gates > 0 ? cell.hidden_gates : 1;
    give_slots(dw.b_ih, 0, G, cell.rotation);
    give_slots(dw.b_hh, cell.outer_slots - hidden, hidden, 0);
    if (cell.mid == 2)
      for (int i = 0; i < 2; i++)
        give_slots(dw.own[2 + i], second[i].plane, second[i].gates, second[i].rotation);
    else if (own >= 0)
      give(cell.hidden_gates == 0 ? dw.w_hh : dw.own[0], own);
  }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
