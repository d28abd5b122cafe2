// Scaled dot-product attention, forward and backward, for one head of one sequence at a time:
//
//   S = scale q k' + bias      P = softmax(S)            out = (P * D) v       lse = log sum exp S
//   dP = D * (dout v')         dS = P * (dP - delta)     delta = rowsum(dout * out)
//   dq = scale dS k            dk = scale dS' q          dv = (P * D)' dout
//
// D is dropout's mask over 1 - p, drawn by Philox from a weight's place, so that backward draws the
// same again.
//
// A block is at most kRows queries by kKeys keys, its scores a buffer in L2. Keys and values of a
// head are packed into panels (gemm.h) once for all its blocks of queries: k with keys as outputs
// for S, v with its columns as outputs for P v; backward packs v like k for dP, and k like v for
// dq. Forward keeps a row's running maximum and sum and rescales what it has (Milakov and
// Gimelshein, 2018); backward needs neither, having lse.
//
// Threads share the blocks of queries in forward, by their number of pairs; in backward the heads
// of keys: the sums dk and dv of one belong to one thread, which adds them up in a fixed order.
#pragma once

#include "gemm.h"
#include "philox.h"
#include "threads.h"

namespace seqkern {
namespace SEQKERN_ISA {

constexpr float kInfinity = __builtin_inff();

// ---- Dropout ------------------------------------------------------------------------------------

// A weight is kept if its number, of the counter (s >> 3, l, row, 0), is at least round(65536 p).
struct Dropout {
  static constexpr int kBatch = Philox::kBatch;  // keys that one call serves
  Philox philox;
  uint32_t threshold;
  float factor;  // 1 / (1 - p)

  explicit Dropout(const AttentionParams& p)
      : philox(p.seed),
        threshold(uint32_t(__builtin_rintf(p.dropout_p * 65536))),
        factor(1 / (1 - p.dropout_p)) {}
};

// ---- What both passes share ---------------------------------------------------------------------

template <class S>
struct AttentionPass {
  using A = Operand<S>;  // what products take
  static constexpr int L = kLanes<float>;
  static constexpr int W = kMaxNV * L;  // outputs of a panel
  static constexpr int64_t kRows = 96, kKeys = 256;
  static constexpr int kGrain = L > kDeep<A> ? L : kDeep<A>;  // keys are padded to a multiple of it
  static_assert(kKeys % W == 0 && W % kGrain == 0 && kRows % kDeep<A> == 0);

  static int64_t column_panels(int64_t columns) { return ceil_div(columns, W); }
  static int column_vectors(int64_t columns, int64_t c) {
    const int64_t left = ceil_div(columns - c * W, L);
    return int(left < kMaxNV ? left : kMaxNV);
  }
  // Elements of the panels whose outputs are columns, for `rows` rows; and where panel c begins.
  static int64_t columns_size(int64_t rows, int64_t columns) {
    return round_up(rows, kDeep<A>) * round_up(columns, L);
  }
  static int64_t columns_at(int64_t rows, int64_t c) { return round_up(rows, kDeep<A>) * c * W; }

  // Vectors of the panel that begins `left` keys before the (padded) end.
  static int row_vectors(int64_t left) { return left < W ? int(left / L) : kMaxNV; }
  // Panels whose outputs are the rows of x [S, K]: the panel of keys j * W … is at j * panel_size.
  // The last one has only the vectors that it needs.
  static void pack_rows(A* panels, const S* x, int64_t ld, int64_t rows, int64_t K) {
    for (int64_t j = 0; j * W < rows; j++) {
      const int nv = row_vectors(round_up(rows, kGrain) - j * W);
      int64_t base[kMaxNV], valid[kMaxNV];
      for (int v = 0; v < kMaxNV; v++) {
        base[v] = j * W + v * L;
        const int64_t left = rows - base[v];
        valid[v] = left < 0 ? 0 : left < L ? left : L;
      }
      pack_panel_of_rows(panels + j * panel_size<A>(K, kMaxNV), x, ld, K, nv, base, valid);
    }
  }

  // Panels whose outputs are columns, of `rows` rows given by pointers, with room for `room` rows.
  static void pack_columns(A* panels, const S* const* row, int64_t rows, int64_t columns,
                           int64_t room) {
    for (int64_t c = 0; c < column_panels(columns); c++)
      pack_panel_of_columns(panels + columns_at(room, c), row, rows, column_vectors(columns, c),
                            columns - c * W, c * W);
  }

  // Rows of scores, in the form that products take.
  struct Computed {
    const A** row;
    A* copy;  // null for float: the scores themselves
    int64_t ld;

    static Computed carve(Scratch& scratch, int64_t rows, int64_t columns) {
      Computed made{};
      made.row = scratch.take<const A*>(rows);
      made.ld = odd_lines<A>(columns);
      if (!__is_same(A, float)) made.copy = scratch.take<A>(rows * made.ld);
      return made;
    }
    // The first n columns of row r.
    SEQKERN_INLINE void set(int64_t r, const float* values, int64_t n) const {
      if constexpr (__is_same(A, float)) {
        row[r] = values;
      } else {
        convert(copy + r * ld, values, n);
        row[r] = copy + r * ld;
      }
    }
    auto all() const {
      if constexpr (kMatrix<A>)
        return SpacedRows<A>{copy, ld};
      else
        return PointerRows<A>{row, 0};
    }
    const A* data(const float* scores) const {
      if constexpr (__is_same(A, float))
        return scores;
      else
        return copy;
    }
    int64_t stride(int64_t ld_scores) const { return __is_same(A, float) ? ld_scores : ld; }
  };

  static SEQKERN_INLINE VecI lane_numbers() {
    VecI lane{};
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) lane[i] = i;
    return lane;
  }
  // The lanes' sum and maximum, in halves.
  template <int k, int... lane>
  static SEQKERN_INLINE VecF rotate(VecF v, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(v, v, (lane + k) % L...);
  }
  template <int k = L / 2>
  static SEQKERN_INLINE float sum(VecF v) {
    if constexpr (k == 0)
      return v[0];
    else
      return sum<k / 2>(v + rotate<k>(v, std::make_integer_sequence<int, L>()));
  }
  template <int k = L / 2>
  static SEQKERN_INLINE float maximum(VecF v) {
    if constexpr (k == 0) {
      return v[0];
    } else {
      const VecF other = rotate<k>(v, std::make_integer_sequence<int, L>());
      return maximum<k / 2>(v > other ? v : other);
    }
  }

  explicit AttentionPass(const AttentionParams& params) : p(params), dropout(params) {
    for (int64_t i = 0; i < p.pieces; i++)
      longest = p.piece[i].S > longest ? p.piece[i].S : longest;
    longest = round_up(longest, kGrain);
  }

  const S* rows_of(const HeadTensor& t, const AttentionPiece& piece, int64_t head,
                   int64_t row) const {
    return (const S*)t.data + piece.batch * t.of_batch + head * t.of_head + row * t.of_row;
  }
  S* rows_to(const HeadTensor& t, const AttentionPiece& piece, int64_t head, int64_t row) const {
    return (S*)t.data + piece.batch * t.of_batch + head * t.of_head + row * t.of_row;
  }
  float* float_of(const HeadTensor& t, int64_t batch, int64_t head, int64_t row) const {
    return (float*)t.data + batch * t.of_batch + head * t.of_head + row * t.of_row;
  }

  // The keys that query i of a piece may attend to: first <= j < last, within 0 … S.
  int64_t first_key(const AttentionPiece& piece, int64_t i) const {
    if (p.left < 0) return 0;
    const int64_t j = piece.l0 + i + piece.offset - p.left - piece.s0;
    return j < 0 ? 0 : j > piece.S ? piece.S : j;
  }
  int64_t last_key(const AttentionPiece& piece, int64_t i) const {
    if (p.right < 0) return piece.S;
    const int64_t j = piece.l0 + i + piece.offset + p.right + 1 - piece.s0;
    return j < 0 ? 0 : j > piece.S ? piece.S : j;
  }
  bool query_valid(const AttentionPiece& piece, int64_t i) const {
    return !p.query_valid ||
           p.query_valid[piece.batch * p.query_valid_of_batch + piece.query_row + i];
  }

  // The keys that any of the queries i0 … i1 may attend to, in whole panels.
  void key_range(const AttentionPiece& piece, int64_t i0, int64_t i1, int64_t& begin,
                 int64_t& end) const {
    begin = first_key(piece, i0) / W * W;
    end = last_key(piece, i1 - 1);
    if (end <= begin) {
      end = begin;
    } else {
      const int64_t padded = round_up(piece.S, kGrain);
      end = round_up(end, W) < padded ? round_up(end, W) : padded;
    }
  }

  // Scores of row i over the n keys from j0 on, in place: scaled, biased, -inf where the query may
  // not attend. Returns the largest.
  SEQKERN_INLINE float finish_scores(const AttentionPiece& piece, int64_t head, int64_t i,
                                     int64_t j0, int64_t n, float* score) const {
    int64_t first = query_valid(piece, i) ? first_key(piece, i) - j0 : n;
    int64_t last = last_key(piece, i) - j0;
    first = first < 0 ? 0 : first > n ? n : first;
    last = last < 0 ? 0 : last > n ? n : last;  // at most the piece's keys: masks end there
    VecF largest = VecF{} - kInfinity;
    if (p.bias || p.allowed || p.key_valid) {
      largest = masked_scores(piece, head, i, j0, first, last, n, score);
    } else {
      const VecI lane = lane_numbers();
      const float scale = p.scale;
      const auto edge = [&](int64_t c) {
        const VecI outside =
            (lane + int32_t(c) < int32_t(first)) | (lane + int32_t(c) >= int32_t(last));
        const VecF x = outside ? VecF{} - kInfinity : load(score + c) * scale;
        largest = x > largest ? x : largest;
        store(score + c, x);
      };
      const int64_t inner = round_up(first, L), outer = last / L * L;
      int64_t c = 0;
      for (; c < inner && c < n; c += L) edge(c);
      for (; c < outer; c += L) {
        const VecF x = load(score + c) * scale;
        largest = x > largest ? x : largest;
        store(score + c, x);
      }
      for (; c < n; c += L) edge(c);
    }
    const float found = maximum(largest);
    if (found > -kInfinity) return found;
    for (int64_t c = 0; c < n; c++)  // NaN compares as no larger
      if (score[c] != score[c]) return score[c];
    return found;
  }

  // The same with a mask or holes; returns the largest of each lane.
  VecF masked_scores(const AttentionPiece& piece, int64_t head, int64_t i, int64_t j0,
                     int64_t first, int64_t last, int64_t n, float* score) const {
    const VecI lane = lane_numbers();
    const uint8_t* valid =
        p.key_valid ? p.key_valid + piece.batch * p.key_valid_of_batch + piece.key_row + j0
                    : nullptr;
    const int64_t step = p.mask_of_key;
    const int64_t place = piece.batch * p.mask_of_batch + head * p.mask_of_head +
                          (piece.query_row + i) * p.mask_of_query + (piece.key_row + j0) * step;
    const float* bias = p.bias ? p.bias + place : nullptr;
    const uint8_t* allowed = p.allowed ? p.allowed + place : nullptr;
    const float scale = p.scale;
    VecF largest = VecF{} - kInfinity;
    for (int64_t c = 0; c < n; c += L) {
      VecI blocked = (lane + int32_t(c) < int32_t(first)) | (lane + int32_t(c) >= int32_t(last));
      const int64_t count = last - c < L ? last - c : L;
      VecF x = load(score + c) * scale;
      if (bias) {
        VecF added{};
        if (step == 1) {
          added = load_first(bias + c, count);
        } else {
          for (int64_t e = 0; e < count; e++) added[e] = bias[(c + e) * step];
        }
        x += added;
      } else if (allowed) {
        for (int64_t e = 0; e < count; e++)
          if (!allowed[(c + e) * step]) blocked[e] = -1;
      }
      if (valid)
        for (int64_t e = 0; e < count; e++)
          if (!valid[c + e]) blocked[e] = -1;
      x = blocked ? VecF{} - kInfinity : x;
      largest = x > largest ? x : largest;
      store(score + c, x);
    }
    return largest;
  }

  // exp(x) for x at most 0 (or rounded to a little more): 0 from -87 on, where it leaves the normal
  // numbers; NaN stays NaN. See exp_minus_abs.
  static SEQKERN_INLINE VecF exp_of(VecF x) {
    const VecF magic = VecF{} + 12582912.0f;
    const VecF shifted = x * 1.44269504088896341f + magic;
    const VecF n = shifted - magic;
    VecF r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    VecF e = r * 1.9875691500e-4f + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * (r * r) + r + 1.0f;
    const VecF scale = (VecF)(((VecI)shifted - (VecI)magic + 127) << 23);
    return x < -87.0f ? VecF{} : e * scale;
  }

  // values[c] times D for the n keys from j0 on, row i, in place.
  SEQKERN_INLINE void drop(const AttentionPiece& piece, int64_t head, int64_t i, int64_t j0,
                           int64_t n, float* values) const {
    const int64_t s = piece.s0 + j0;
    const int64_t row = piece.sequence * p.N + head;
    uint16_t number[Dropout::kBatch + L];
    int64_t c = 0;
    while (c < n) {
      const int64_t group = (s + c) / 8;
      dropout.philox.draw(group, piece.l0 + i, row, 0, number);
      const int64_t shift = s - group * 8;  // key c has number[c + shift]
      const int64_t end = Dropout::kBatch - shift < n ? Dropout::kBatch - shift : n;
      for (; c < end; c++)
        values[c] = number[c + shift] >= dropout.threshold ? values[c] * dropout.factor : 0;
    }
  }

  const AttentionParams& p;
  const Dropout dropout;
  int64_t longest = 0;  // keys of the longest piece, padded
};

// ---- Forward ------------------------------------------------------------------------------------

template <class S>
struct AttentionForward : AttentionPass<S> {
  using Base = AttentionPass<S>;
  using Base::L;
  using Base::p;
  using Base::W;
  using typename Base::A;
  using typename Base::Computed;

  const AttentionForwardParams& f;
  int64_t rows, keys;  // of a block

  explicit AttentionForward(const AttentionForwardParams& params) : Base(params), f(params) {
    // Weights are written when a row is complete: its scores stay in one block.
    keys = f.weights.data || this->longest < Base::kKeys ? this->longest : Base::kKeys;
    rows = Base::kRows;
    while (rows > 8 && rows * keys > Base::kRows * Base::kKeys) rows /= 2;
  }

  struct Memory {
    A* k_panels;
    A* v_panels;
    Rows<S, true> q;
    Computed computed;
    float *score, *out, *largest, *total;
    const S** pointer;
    S* zeros;
    int64_t ld_score, ld_out;

    Memory(Scratch& scratch, const AttentionForward& pass) {
      const auto& p = pass.p;
      k_panels = scratch.take<A>(ceil_div(pass.longest, W) * panel_size<A>(p.E, kMaxNV));
      v_panels =
          scratch.take<A>(ceil_div(pass.longest, pass.keys) * Base::columns_size(pass.keys, p.Ev));
      q = Rows<S, true>::carve(scratch, pass.rows, p.E);
      computed = Computed::carve(scratch, pass.rows, pass.keys);
      ld_score = odd_lines<float>(pass.keys);
      score = scratch.take<float>(pass.rows * ld_score);
      ld_out = odd_lines<float>(round_up(p.Ev, L));
      out = scratch.take<float>(pass.rows * ld_out);
      largest = scratch.take<float>(pass.rows);
      total = scratch.take<float>(pass.rows);
      pointer = scratch.take<const S*>(pass.longest);
      zeros = scratch.take<S>(p.E > p.Ev ? p.E : p.Ev);
    }
  };

  size_t thread_bytes() const {
    Scratch counted{nullptr};
    Memory memory(counted, *this);
    return counted.used;
  }
  size_t scratch_bytes() const { return thread_bytes() * size_t(p.threads); }

  // Pairs of the queries i0 … i1 of a piece, and a little more for each.
  int64_t cost(const AttentionPiece& piece, int64_t i0, int64_t i1) const {
    int64_t begin, end;
    this->key_range(piece, i0, i1, begin, end);
    return (i1 - i0) * (end - begin + W);
  }

  void run() const {
    int64_t total = 0;
    for (int64_t i = 0; i < p.pieces; i++)
      for (int64_t i0 = 0; i0 < p.piece[i].L; i0 += rows)
        total += cost(p.piece[i], i0, last_row(p.piece[i], i0)) * p.N;
    const size_t bytes = thread_bytes();
    parallel(p.threads, [&](int thread, int threads) {
      Scratch scratch{(char*)p.scratch + size_t(thread) * bytes};
      Memory m(scratch, *this);
      memset(m.zeros, 0, size_t(p.E > p.Ev ? p.E : p.Ev) * sizeof(S));
      const int64_t begin = part_begin(total, thread, threads);
      const int64_t end = part_begin(total, thread + 1, threads);
      int64_t done = 0;
      for (int64_t i = 0; i < p.pieces; i++) {
        if (f.average)
          average_piece(m, p.piece[i], begin, end, done);
        else
          piece(m, p.piece[i], begin, end, done);
      }
    });
  }

  int64_t last_row(const AttentionPiece& piece, int64_t i0) const {
    return i0 + rows < piece.L ? i0 + rows : piece.L;
  }

  // This thread's blocks, those that end in begin < done <= end.
  void piece(Memory& m, const AttentionPiece& piece, int64_t begin, int64_t end,
             int64_t& done) const {
    int64_t packed = -1;
    for (int64_t head = 0; head < p.N; head++)
      for (int64_t i0 = 0; i0 < piece.L; i0 += rows) {
        const int64_t i1 = last_row(piece, i0);
        done += cost(piece, i0, i1);
        if (done <= begin || done > end) continue;
        const int64_t kv = head / (p.N / p.Nk);
        if (packed != kv) pack(m, piece, kv);
        packed = kv;
        block(m, piece, head, i0, i1);
      }
  }

  // The same with all heads of a block in one thread, which adds up their weights.
  void average_piece(Memory& m, const AttentionPiece& piece, int64_t begin, int64_t end,
                     int64_t& done) const {
    int64_t first = -1, last = -1;
    for (int64_t i0 = 0; i0 < piece.L; i0 += rows) {
      done += cost(piece, i0, last_row(piece, i0)) * p.N;
      if (done <= begin || done > end) continue;
      if (first < 0) first = i0;
      last = i0;
    }
    if (first < 0) return;
    for (int64_t head = 0; head < p.N; head++) {
      if (head % (p.N / p.Nk) == 0) pack(m, piece, head / (p.N / p.Nk));
      for (int64_t i0 = first; i0 <= last; i0 += rows)
        block(m, piece, head, i0, last_row(piece, i0));
    }
  }

  void pack(Memory& m, const AttentionPiece& piece, int64_t kv) const {
    const S* k = this->rows_of(p.k, piece, kv, piece.key_row);
    Base::pack_rows(m.k_panels, k, p.k.of_row, piece.S, p.E);
    const int64_t count = round_up(piece.S, Base::kGrain);
    for (int64_t j = 0; j < count; j++)
      m.pointer[j] = j < piece.S ? this->rows_of(p.v, piece, kv, piece.key_row + j) : m.zeros;
    Base::pack_columns(m.v_panels, m.pointer, count, p.Ev, this->longest);
  }

  void block(Memory& m, const AttentionPiece& piece, int64_t head, int64_t i0, int64_t i1) const {
    const int64_t n = i1 - i0;
    for (int64_t r = 0; r < n; r++) {
      const bool valid = this->query_valid(piece, i0 + r);
      m.q.set(r, valid ? this->rows_of(p.q, piece, head, piece.query_row + i0 + r) : m.zeros, p.E);
      m.largest[r] = -kInfinity;
      m.total[r] = 0;
    }
    memset(m.out, 0, size_t(n * m.ld_out) * sizeof(float));
    int64_t begin, end;
    this->key_range(piece, i0, i1, begin, end);
    const int64_t panel = panel_size<A>(p.E, kMaxNV);
    for (int64_t j0 = begin; j0 < end; j0 += keys) {
      const int64_t c1 = end - j0 < keys ? end - j0 : keys;
      for (int64_t c = 0; c < c1; c += W) {
        const A* here = m.k_panels + (j0 + c) / W * panel;
        const int nv = Base::row_vectors(c1 - c);
        multiply_panel(n, nv, m.score + c, m.ld_score, (const float*)nullptr, 0, m.q.from(0), here,
                       c + W < c1 ? here + panel : here, p.E);
      }
      for (int64_t r = 0; r < n; r++) {
        float* score = m.score + r * m.ld_score;
        softmax(m, piece, head, i0 + r, j0, c1, score, r);
        m.computed.set(r, score, c1);
      }
      for (int64_t c = 0; c < Base::column_panels(p.Ev); c++) {
        const int nv = Base::column_vectors(p.Ev, c);
        const A* here = m.v_panels + Base::columns_at(this->longest, c) + j0 * nv * L;
        multiply_panel(n, nv, m.out + c * W, m.ld_out, (const float*)m.out + c * W, m.ld_out,
                       m.computed.all(), here, here, c1);
      }
    }
    for (int64_t r = 0; r < n; r++) finish(m, piece, head, i0 + r, r, begin, end);
  }

  // Turns scores into exp(score - largest) * D, and rescales what the row has so far.
  SEQKERN_INLINE void softmax(Memory& m, const AttentionPiece& piece, int64_t head, int64_t i,
                              int64_t j0, int64_t n, float* score, int64_t r) const {
    const float here = this->finish_scores(piece, head, i, j0, n, score);
    const float before = m.largest[r];
    const float largest = here > before || here != here ? here : before;
    if (largest == -kInfinity) {
      memset(score, 0, size_t(n) * sizeof(float));
      return;
    }
    VecF total{};
    for (int64_t c = 0; c < n; c += L) {
      const VecF e = Base::exp_of(load(score + c) - largest);
      total += e;
      store(score + c, e);
    }
    if (before != largest) {
      const float factor = before == -kInfinity ? 0 : Base::exp_of(VecF{} + (before - largest))[0];
      m.total[r] *= factor;
      float* out = m.out + r * m.ld_out;
      for (int64_t c = 0; c < p.Ev; c += L) store(out + c, load(out + c) * factor);
      m.largest[r] = largest;
    }
    m.total[r] += Base::sum(total);
    if (p.dropout_p > 0) this->drop(piece, head, i, j0, n, score);
  }

  void finish(Memory& m, const AttentionPiece& piece, int64_t head, int64_t i, int64_t r,
              int64_t begin, int64_t end) const {
    const int64_t row = piece.query_row + i;
    const float factor = m.total[r] == 0 ? 0 : 1 / m.total[r];
    float* out = m.out + r * m.ld_out;
    for (int64_t c = 0; c < p.Ev; c += L) store(out + c, load(out + c) * factor);
    convert(this->rows_to(f.out, piece, head, row), out, p.Ev);
    if (f.lse.data)
      *this->float_of(f.lse, piece.batch, head, row) =
          m.total[r] == 0 ? -kInfinity : m.largest[r] + __builtin_logf(m.total[r]);
    if (!f.weights.data) return;
    float* w =
        this->float_of(f.weights, piece.sequence, f.average ? 0 : head, piece.l0 + i) + piece.s0;
    const float* score = m.score + r * m.ld_score;
    const float share = f.average ? factor / float(p.N) : factor;
    const int64_t last = end < piece.S ? end : piece.S;
    for (int64_t c = begin; c < last; c++) w[c] += score[c - begin] * share;
  }
};

// ---- Backward -----------------------------------------------------------------------------------

template <class S>
struct AttentionBackward : AttentionPass<S> {
  using Base = AttentionPass<S>;
  using Base::L;
  using Base::p;
  using Base::W;
  using typename Base::A;
  using typename Base::Computed;
  static constexpr int64_t rows = Base::kRows;

  const AttentionBackwardParams& b;
  int64_t keys;  // of a block

  explicit AttentionBackward(const AttentionBackwardParams& params) : Base(params), b(params) {
    keys = this->longest < Base::kKeys ? this->longest : Base::kKeys;
  }

  struct Memory {
    A *k_rows, *v_rows, *k_columns;  // panels over all keys
    A *q_columns, *dout_columns;     // panels over the queries of a block
    A* tile;                         // columns of P or dS as rows
    Rows<S, true> q, dout;
    Computed p, ds;
    float *score, *dp, *dq, *delta, *lse, *dk, *dv;
    const S **pointer, **dout_pointer;
    S* zeros;
    int64_t ld_score, ld_q, ld_k, ld_v;

    Memory(Scratch& scratch, const AttentionBackward& pass) {
      const auto& p_ = pass.p;
      k_rows = scratch.take<A>(ceil_div(pass.longest, W) * panel_size<A>(p_.E, kMaxNV));
      v_rows = scratch.take<A>(ceil_div(pass.longest, W) * panel_size<A>(p_.Ev, kMaxNV));
      k_columns = scratch.take<A>(Base::columns_size(pass.longest, p_.E));
      q_columns = scratch.take<A>(Base::columns_size(rows, p_.E));
      dout_columns = scratch.take<A>(Base::columns_size(rows, p_.Ev));
      tile = scratch.take<A>(packed_tile_size<A>(rows));
      q = Rows<S, true>::carve(scratch, rows, p_.E);
      dout = Rows<S, true>::carve(scratch, rows, p_.Ev);
      p = Computed::carve(scratch, rows, pass.keys);
      ds = Computed::carve(scratch, rows, pass.keys);
      ld_score = odd_lines<float>(pass.keys);
      score = scratch.take<float>(rows * ld_score);
      dp = scratch.take<float>(rows * ld_score);
      ld_q = odd_lines<float>(round_up(p_.E, L));
      dq = scratch.take<float>(rows * ld_q);
      delta = scratch.take<float>(rows);
      lse = scratch.take<float>(rows);
      ld_k = odd_lines<float>(round_up(p_.E, L));
      ld_v = odd_lines<float>(round_up(p_.Ev, L));
      dk = scratch.take<float>(pass.longest * ld_k);
      dv = scratch.take<float>(pass.longest * ld_v);
      pointer = scratch.take<const S*>(pass.longest > rows ? pass.longest : rows);
      dout_pointer = scratch.take<const S*>(rows);
      zeros = scratch.take<S>(p_.E > p_.Ev ? p_.E : p_.Ev);
    }
  };

  size_t thread_bytes() const {
    Scratch counted{nullptr};
    Memory memory(counted, *this);
    return counted.used;
  }
  size_t scratch_bytes() const { return thread_bytes() * size_t(p.threads); }

  int64_t cost(const AttentionPiece& piece) const {
    int64_t total = 0;
    for (int64_t i0 = 0; i0 < piece.L; i0 += rows) {
      const int64_t i1 = i0 + rows < piece.L ? i0 + rows : piece.L;
      int64_t begin, end;
      this->key_range(piece, i0, i1, begin, end);
      total += (i1 - i0) * (end - begin + W);
    }
    return total * (p.N / p.Nk);
  }

  void run() const {
    int64_t total = 0;
    for (int64_t i = 0; i < p.pieces; i++) total += cost(p.piece[i]) * p.Nk;
    const size_t bytes = thread_bytes();
    parallel(p.threads, [&](int thread, int threads) {
      Scratch scratch{(char*)p.scratch + size_t(thread) * bytes};
      Memory m(scratch, *this);
      memset(m.zeros, 0, size_t(p.E > p.Ev ? p.E : p.Ev) * sizeof(S));
      const int64_t begin = part_begin(total, thread, threads);
      const int64_t end = part_begin(total, thread + 1, threads);
      int64_t done = 0;
      for (int64_t i = 0; i < p.pieces; i++) {
        const int64_t each = cost(p.piece[i]);
        for (int64_t kv = 0; kv < p.Nk; kv++) {
          const int64_t middle = done + each / 2;  // a head of keys goes to where its middle is
          done += each;
          if (middle >= begin && middle < end) head_of_keys(m, p.piece[i], kv);
        }
      }
    });
  }

  void head_of_keys(Memory& m, const AttentionPiece& piece, int64_t kv) const {
    const S* k = this->rows_of(p.k, piece, kv, piece.key_row);
    const S* v = this->rows_of(p.v, piece, kv, piece.key_row);
    Base::pack_rows(m.k_rows, k, p.k.of_row, piece.S, p.E);
    Base::pack_rows(m.v_rows, v, p.v.of_row, piece.S, p.Ev);
    const int64_t padded = round_up(piece.S, Base::kGrain);
    for (int64_t j = 0; j < padded; j++) m.pointer[j] = j < piece.S ? k + j * p.k.of_row : m.zeros;
    Base::pack_columns(m.k_columns, m.pointer, padded, p.E, this->longest);
    memset(m.dk, 0, size_t(padded * m.ld_k) * sizeof(float));
    memset(m.dv, 0, size_t(padded * m.ld_v) * sizeof(float));
    const int64_t group = p.N / p.Nk;
    for (int64_t head = kv * group; head < (kv + 1) * group; head++)
      for (int64_t i0 = 0; i0 < piece.L; i0 += rows)
        block(m, piece, head, i0, i0 + rows < piece.L ? i0 + rows : piece.L);
    for (int64_t j = 0; j < piece.S; j++) {
      if (b.dk.data) {
        float* dk = m.dk + j * m.ld_k;
        for (int64_t c = 0; c < p.E; c += L) store(dk + c, load(dk + c) * p.scale);
        convert(this->rows_to(b.dk, piece, kv, piece.key_row + j), dk, p.E);
      }
      if (b.dv.data)
        convert(this->rows_to(b.dv, piece, kv, piece.key_row + j), m.dv + j * m.ld_v, p.Ev);
    }
  }

  void block(Memory& m, const AttentionPiece& piece, int64_t head, int64_t i0, int64_t i1) const {
    const int64_t n = i1 - i0;
    int64_t begin, end;
    this->key_range(piece, i0, i1, begin, end);
    for (int64_t r = 0; r < n; r++) load_row(m, piece, head, i0 + r, r);
    memset(m.dq, 0, size_t(n * m.ld_q) * sizeof(float));
    this->pack_columns(m.q_columns, m.pointer, n, p.E, rows);
    this->pack_columns(m.dout_columns, m.dout_pointer, n, p.Ev, rows);
    const int64_t k_panel = panel_size<A>(p.E, kMaxNV), v_panel = panel_size<A>(p.Ev, kMaxNV);
    for (int64_t j0 = begin; j0 < end; j0 += keys) {
      const int64_t c1 = end - j0 < keys ? end - j0 : keys;
      for (int64_t c = 0; c < c1; c += W) {
        const A* k = m.k_rows + (j0 + c) / W * k_panel;
        const int nv = Base::row_vectors(c1 - c);
        multiply_panel(n, nv, m.score + c, m.ld_score, (const float*)nullptr, 0, m.q.from(0), k,
                       c + W < c1 ? k + k_panel : k, p.E);
        const A* v = m.v_rows + (j0 + c) / W * v_panel;
        multiply_panel(n, nv, m.dp + c, m.ld_score, (const float*)nullptr, 0, m.dout.from(0), v,
                       c + W < c1 ? v + v_panel : v, p.Ev);
      }
      const bool whole = end - begin <= keys;
      for (int64_t r = 0; r < n; r++) differentiate(m, piece, head, i0 + r, j0, c1, r, whole);
      if (b.dq.data) {
        for (int64_t c = 0; c < Base::column_panels(p.E); c++) {
          const int nv = Base::column_vectors(p.E, c);
          const A* here = m.k_columns + Base::columns_at(this->longest, c) + j0 * nv * L;
          multiply_panel(n, nv, m.dq + c * W, m.ld_q, (const float*)m.dq + c * W, m.ld_q,
                         m.ds.all(), here, here, c1);
        }
      }
      if (b.dv.data)
        add_columns(m, m.p.data(m.score), m.p.stride(m.ld_score), n, c1, m.dv + j0 * m.ld_v, m.ld_v,
                    m.dout_columns, p.Ev);
      if (b.dk.data)
        add_columns(m, m.ds.data(m.dp), m.ds.stride(m.ld_score), n, c1, m.dk + j0 * m.ld_k, m.ld_k,
                    m.q_columns, p.E);
    }
    if (!b.dq.data) return;
    for (int64_t r = 0; r < n; r++) {
      float* dq = m.dq + r * m.ld_q;
      for (int64_t c = 0; c < p.E; c += L) store(dq + c, load(dq + c) * p.scale);
      convert(this->rows_to(b.dq, piece, head, piece.query_row + i0 + r), dq, p.E);
    }
  }

  // Row r of a block: q, dout, lse and delta; zeros for a query that attends to nothing.
  void load_row(Memory& m, const AttentionPiece& piece, int64_t head, int64_t i, int64_t r) const {
    const int64_t row = piece.query_row + i;
    const float lse = *this->float_of(b.lse, piece.batch, head, row);
    const bool empty = lse == -kInfinity || !this->query_valid(piece, i);
    const S* q = empty ? m.zeros : this->rows_of(p.q, piece, head, row);
    const S* dout = empty ? m.zeros : this->rows_of(b.dout, piece, head, row);
    const S* out = this->rows_of(b.out, piece, head, row);
    m.q.set(r, q, p.E);
    m.dout.set(r, dout, p.Ev);
    m.pointer[r] = q;
    m.dout_pointer[r] = dout;
    m.lse[r] = empty ? kInfinity : lse;
    VecF delta{};
    for (int64_t c = 0; c < p.Ev; c += L)
      delta += load_first(dout + c, p.Ev - c) * load_first(out + c, p.Ev - c);
    m.delta[r] = empty ? 0 : Base::sum(delta);
  }

  // Scores and dP of a row become P * D and dS. whole: these n are all of the row's keys; then P
  // and delta are taken from what is here, so that a query with one key gets exactly no gradient.
  SEQKERN_INLINE void differentiate(Memory& m, const AttentionPiece& piece, int64_t head, int64_t i,
                                    int64_t j0, int64_t n, int64_t r, bool whole) const {
    float* score = m.score + r * m.ld_score;
    float* dp = m.dp + r * m.ld_score;
    const float lse = m.lse[r];
    if (lse == kInfinity) {
      memset(score, 0, size_t(n) * sizeof(float));
      memset(dp, 0, size_t(n) * sizeof(float));
    } else {
      this->finish_scores(piece, head, i, j0, n, score);
      if (p.dropout_p > 0) this->drop(piece, head, i, j0, n, dp);
      VecF total{}, product{};
      for (int64_t c = 0; c < n; c += L) {
        const VecF probability = Base::exp_of(load(score + c) - lse);
        total += probability;
        product += probability * load(dp + c);
        store(score + c, probability);
      }
      const float factor = whole ? 1 / Base::sum(total) : 1;  // 1 but for the rounding of lse
      const float delta = whole ? Base::sum(product) * factor : m.delta[r];
      for (int64_t c = 0; c < n; c += L) {
        const VecF probability = load(score + c) * factor;
        store(score + c, probability);
        store(dp + c, probability * (load(dp + c) - delta));
      }
      if (p.dropout_p > 0) this->drop(piece, head, i, j0, n, score);
    }
    m.p.set(r, score, n);
    m.ds.set(r, dp, n);
  }

  // sums[c] += sum over the n rows r of values[r][c] * panel row r, for c < c1.
  void add_columns(Memory& m, const A* values, int64_t ld, int64_t n, int64_t c1, float* sums,
                   int64_t ld_sums, const A* panels, int64_t columns) const {
    constexpr int64_t most = __is_same(A, float) ? max_rows(kMaxNV) : kColumnTile<A>;
    for (int64_t c = 0; c < c1; c += most) {
      const int count = int(c1 - c < most ? c1 - c : most);
      if constexpr (!__is_same(A, float)) pack_tile_of_columns(count, m.tile, values + c, ld, n);
      for (int64_t i = 0; i < Base::column_panels(columns); i++) {
        const A* panel = panels + Base::columns_at(rows, i);
        float* to = sums + c * ld_sums + i * W;
        const auto multiply = [&](auto a) {
          multiply_panel(count, Base::column_vectors(columns, i), to, ld_sums, (const float*)to,
                         ld_sums, a, panel, panel, n);
        };
        if constexpr (__is_same(A, float))
          multiply(ColumnRows<A>{values + c, ld});
        else
          multiply(packed_tile(m.tile, n));
      }
    }
  }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
