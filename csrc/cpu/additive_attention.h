// Additive attention (Bahdanau et al., 2015), forward and backward, for one sequence at a time:
//
//   score_ls = sum over h of v_h tanh(q_lh + k_sh)     P = softmax(score)     context = P value
//   dP = dcontext value' + dweights                    dS = P * (dP - rowsum(P * dP))
//   dq_lh = v_h sum over s of dS_ls (1 - tanh^2)       dk_sh = v_h sum over l of the same
//   dv_h = sum over l, s of dS_ls tanh                 dvalue = P' dcontext
//
// The tanh of a sum from what is computed once a query and once a key: with m(x) = exp(2x) - 1,
//
//   n = m(q) exp(2k) + m(k) = exp(2(q + k)) - 1        tanh(q + k) = n / (n + 2)
//
// which costs a multiply-add, an addition and a division, and is as accurate as q + k itself, near
// zero too. It wants |q| and |k| up to kRange, lest the product overflow; where one is beyond, or
// NaN, the tanh is computed as such (`exact`), and always in double.
//
// Forward keeps 4 x 4 scores in registers over all of H. Backward works on one vector of h at a
// time, whose packed keys and dk stay in L1; so its threads share the sequences and the stretches
// of H, and only dv is summed over sequences, in their order. A valid key is told by its place
// among the valid ones; the others cost nothing.
#pragma once

#include "../additive_params.h"
#include "gemm.h"
#include "step.h"
#include "threads.h"

namespace seqkern {
namespace SEQKERN_ISA {

template <class S>
struct AdditivePass {
  using C = Compute<S>;
  using V = Vec<C>;
  static constexpr int L = kLanes<C>;
  static constexpr bool kDouble = __is_same(C, double);
  static constexpr float kRange = 20;  // exp(2 * 2 * kRange) is far from overflow
  static constexpr int kQueries = 4;   // of a tile
  static constexpr int kKeys = kVecRegisters == 32 ? 4 : 2;
  static constexpr int64_t kBlock = 64;       // queries of an item of work
  static constexpr int64_t kStretch = 8 * L;  // values of h, or of a value, of an item of work
  static constexpr int64_t kRound = 64;       // terms of one chain of additions

  explicit AdditivePass(const AdditiveParams& params) : p(params), Hp(round_up(p.H, L)) {}

  int64_t keys_of(int64_t b) const { return p.keys ? p.keys[b] : p.S; }
  int64_t key_of(int64_t b, int64_t j) const { return p.key ? p.key[b * p.S + j] : j; }
  const S* row_of(const BatchRows& t, int64_t b, int64_t r) const {
    return (const S*)t.data + b * t.of_batch + r * t.of_row;
  }

  // f(i) for every i below n, each on the thread that is free.
  template <class F>
  void share(int64_t n, const F& f) const {
    int64_t next = 0;
    const int threads = n < p.threads ? int(n) : p.threads;
    parallel(threads, [&](int thread, int) {
      for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < n;) f(thread, i);
    });
  }

  static SEQKERN_INLINE C sum(V v) {
    const V one[1] = {v};
    return sums_of_lanes<L>(one)[0];
  }

  // ---- exponentials and tanh --------------------------------------------------------------------

  // e = exp(2x), m = exp(2x) - 1, each to about an ulp, for |x| <= kRange. See exp_minus_abs.
  static SEQKERN_INLINE void exponentials(VecF x, VecF& e, VecF& m) {
    const VecF y = x + x;
    const VecF magic = VecF{} + 12582912.0f;
    const VecF shifted = y * 1.44269504088896341f + magic;
    const VecF n = shifted - magic;
    VecF r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    VecF p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r;  // exp(r) - 1
    const VecF scale = (VecF)(((VecI)shifted - (VecI)magic + 127) << 23);
    e = p * scale + scale;
    m = p * scale + (scale - 1.0f);
  }

  static SEQKERN_INLINE VecF quotient(VecF n, VecF d) {
#if defined(__AVX512F__)
    // An estimate of 14 bits and one step of Newton's: within 1.5 ulp, in a third of a division's
    // time.
    const VecF r = (VecF)_mm512_maskz_rcp14_ps(__mmask16(-1), (__m512)d);
    return n * (r + r * (1.0f - d * r));
#else
    return n / d;
#endif
  }

  // What a query and a key are packed to: m(q); exp(2k) and m(k). If exact, and in double, they
  // stay as they are, and the third is anything.
  template <bool exact>
  static SEQKERN_INLINE V tanh_of(V q, V e, V m) {
    if constexpr (exact || kDouble) {
      return Math<C>::tanh(q + e);
    } else {
      const V n = q * e + m;
      return quotient(n, n + 2.0f);
    }
  }
  // A vector of a query; says whether all lanes are as tanh_of wants them.
  template <bool exact>
  static SEQKERN_INLINE bool pack_query(V q, C* packed) {
    if constexpr (exact || kDouble) {
      store(packed, q);
      return true;
    } else {
      V e, m;
      exponentials(q, e, m);
      store(packed, m);
      return within_range(q);
    }
  }
  // A vector of a key, in the place of two.
  template <bool exact>
  static SEQKERN_INLINE bool pack_key(V k, C* packed) {
    if constexpr (exact || kDouble) {
      store(packed, k);
      return true;
    } else {
      V e, m;
      exponentials(k, e, m);
      store(packed, e);
      store(packed + L, m);
      return within_range(k);
    }
  }
  static SEQKERN_INLINE bool within_range(VecF x) {
    const VecF a = (VecF)((VecU)x & 0x7fffffffu);
    const VecI in = a <= kRange;
    int32_t all = -1;
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) all &= in[i];
    return all != 0;
  }

  // f(first value, how many are left) for each vector of a row of n values.
  template <class F>
  static SEQKERN_INLINE void vectors(int64_t n, const F& f) {
    for (int64_t i = 0; i < n; i += L) f(i, n - i);
  }

  // Queries l0 … l0+n of a sequence: packed[n][Hp].
  template <bool exact>
  bool pack_queries(int64_t b, int64_t l0, int64_t n, C* packed) const {
    bool within = true;
    for (int64_t i = 0; i < n; i++) {
      const S* row = row_of(p.q, b, l0 + i);
      vectors(p.H, [&](int64_t h, int64_t left) {
        within &= pack_query<exact>(load_first(row + h, left), packed + i * Hp + h);
      });
    }
    return within;
  }
  // The valid keys of a sequence: packed[keys][Hp / L][2][L].
  template <bool exact>
  bool pack_keys(int64_t b, C* packed) const {
    bool within = true;
    for (int64_t j = 0; j < keys_of(b); j++) {
      const S* row = row_of(p.k, b, key_of(b, j));
      vectors(p.H, [&](int64_t h, int64_t left) {
        within &= pack_key<exact>(load_first(row + h, left), packed + j * 2 * Hp + 2 * h);
      });
    }
    return within;
  }
  // v padded with zeros to Hp.
  void pack_v(C* packed) const {
    vectors(p.H, [&](int64_t h, int64_t left) {
      store(packed + h, load_first((const S*)p.v + h, left));
    });
  }

  // ---- scores -----------------------------------------------------------------------------------

  // score[nq][nk] (rows ld apart) of packed queries and keys.
  template <bool exact, int nq, int nk>
  SEQKERN_INLINE void score_tile(const C* q, const C* k, const C* v, C* score, int64_t ld) const {
    V sums[nq][nk] = {};
    for (int64_t h = 0; h < Hp; h += L) {
      const V v_h = load(v + h);
      V q_h[nq];
#pragma GCC unroll 4
      for (int i = 0; i < nq; i++) q_h[i] = load(q + i * Hp + h);
#pragma GCC unroll 4
      for (int j = 0; j < nk; j++) {
        const C* key = k + j * 2 * Hp + 2 * h;
        const V e = load(key);
        const V m = exact ? V{} : load(key + L);
#pragma GCC unroll 4
        for (int i = 0; i < nq; i++) sums[i][j] += v_h * tanh_of<exact>(q_h[i], e, m);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < nq; i++) store_first(score + i * ld, sums_of_lanes<L>(sums[i]), nk);
  }

  template <bool exact, int nq>
  void score_rows(const C* q, const C* k, const C* v, int64_t keys, C* score, int64_t ld) const {
    int64_t j = 0;
    for (; j + kKeys <= keys; j += kKeys)
      score_tile<exact, nq, kKeys>(q, k + j * 2 * Hp, v, score + j, ld);
    for (; j < keys; j++) score_tile<exact, nq, 1>(q, k + j * 2 * Hp, v, score + j, ld);
  }

  template <bool exact>
  void scores(const C* q, const C* k, const C* v, int64_t queries, int64_t keys, C* score,
              int64_t ld) const {
    int64_t i = 0;
    for (; i + kQueries <= queries; i += kQueries)
      score_rows<exact, kQueries>(q + i * Hp, k, v, keys, score + i * ld, ld);
    for (; i < queries; i++) score_rows<exact, 1>(q + i * Hp, k, v, keys, score + i * ld, ld);
  }

  // score[n] becomes its softmax.
  static void softmax(C* score, int64_t n) {
    C largest = -__builtin_inff();
    for (int64_t j = 0; j < n; j++) largest = score[j] <= largest ? largest : score[j];  // or NaN
    if constexpr (kDouble) {
      double total = 0;
      for (int64_t j = 0; j < n; j++) total += score[j] = std::exp(score[j] - largest);
      for (int64_t j = 0; j < n; j++) score[j] /= total;
    } else {
      V totals{};
      vectors(n, [&](int64_t j, int64_t left) {
        V e = exp_minus_abs(load_first(score + j, left) - largest);
        if (left < L) {
          C buffer[L] = {};
          store_first(buffer, e, left);
          e = load(buffer);
        }
        totals += e;
        store_first(score + j, e, left);
      });
      const C total = sum(totals);
      vectors(n, [&](int64_t j, int64_t left) {
        store_first(score + j, load_first(score + j, left) / total, left);
      });
    }
  }

  // ---- the products with the values -------------------------------------------------------------

  // Rows of `out` (columns d0 … d0+columns) = sum over the terms t < n of
  // factor[t * of_term + row * of_row] times row t of x, whose pointers are term[n].
  template <int rows, int nv, class Out>
  SEQKERN_INLINE void combine_tile(const C* factor, int64_t of_term, int64_t of_row,
                                   const S* const* term, int64_t n, int64_t d, int64_t left,
                                   const Out& out) const {
    V sums[rows][nv] = {};
    for (int64_t t = 0; t < n; t++) {
      V x[nv];
#pragma GCC unroll 4
      for (int i = 0; i < nv; i++)
        x[i] = nv == 1 ? load_first(term[t] + d, left) : load(term[t] + d + i * L);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        const V f = V{} + factor[t * of_term + r * of_row];
#pragma GCC unroll 4
        for (int i = 0; i < nv; i++) sums[r][i] += f * x[i];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int i = 0; i < nv; i++) store_first(out(r) + d + i * L, sums[r][i], left - i * L);
  }

  // The same for any number of rows and columns; out(row) is where a row goes.
  template <class Out>
  void combine(const C* factor, int64_t of_term, int64_t of_row, const S* const* term, int64_t n,
               int64_t rows, int64_t d0, int64_t d1, const Out& out) const {
    constexpr int nv = kVecRegisters == 32 ? 4 : 2;
    const auto columns = [&](auto tile_rows, int64_t r) {
      constexpr int tile = decltype(tile_rows)::value;
      const C* f = factor + r * of_row;
      const auto out_r = [&](int i) { return out(r + i); };
      int64_t d = d0;
      for (; d + nv * L <= d1; d += nv * L)
        combine_tile<tile, nv>(f, of_term, of_row, term, n, d, d1 - d, out_r);
      for (; d < d1; d += L) combine_tile<tile, 1>(f, of_term, of_row, term, n, d, d1 - d, out_r);
    };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) columns(Number<4>{}, r);
    for (; r < rows; r++) columns(Number<1>{}, r);
  }
  template <int n>
  struct Number {
    static constexpr int value = n;
  };

  // product[nx][ny] (rows ld apart) += x y' over all of D; x and y are given by pointers.
  template <int nx, int ny>
  SEQKERN_INLINE void dot_tile(const S* const* x, const S* const* y, C* product, int64_t ld) const {
    V sums[nx][ny] = {};
    vectors(p.D, [&](int64_t d, int64_t left) {
      V y_d[ny];
#pragma GCC unroll 4
      for (int j = 0; j < ny; j++) y_d[j] = load_first(y[j] + d, left);
#pragma GCC unroll 4
      for (int i = 0; i < nx; i++) {
        const V x_d = load_first(x[i] + d, left);
#pragma GCC unroll 4
        for (int j = 0; j < ny; j++) sums[i][j] += x_d * y_d[j];
      }
    });
#pragma GCC unroll 4
    for (int i = 0; i < nx; i++) {
      C* row = product + i * ld;
      store_first(row, load_first(row, ny) + sums_of_lanes<L>(sums[i]), ny);
    }
  }
  template <int nx>
  void dot_rows(const S* const* x, const S* const* y, int64_t n, C* product, int64_t ld) const {
    int64_t j = 0;
    for (; j + kKeys <= n; j += kKeys) dot_tile<nx, kKeys>(x, y + j, product + j, ld);
    for (; j < n; j++) dot_tile<nx, 1>(x, y + j, product + j, ld);
  }

  void key_pointers(const BatchRows& rows, int64_t b, const S** pointer) const {
    for (int64_t j = 0; j < keys_of(b); j++) pointer[j] = row_of(rows, b, key_of(b, j));
  }
  C* weights_of(int64_t b, int64_t l) const { return (C*)p.weights + (b * p.L + l) * p.S; }

  const AdditiveParams& p;
  const int64_t Hp;
};

// ---- forward ------------------------------------------------------------------------------------

template <class S>
struct AdditiveForward : AdditivePass<S> {
  using Pass = AdditivePass<S>;
  using Pass::p, Pass::Hp, Pass::kBlock;
  using typename Pass::C;

  struct Local {  // one thread's
    C *q, *k, *v, *score;
    const S** value;
    int64_t packed;  // the sequence whose keys are packed (not exact), or -1
    bool within;     // are they all within range?

    static Local carve(Scratch& scratch, const AdditiveParams& p, int64_t Hp) {
      Local made{};
      made.q = scratch.take<C>(kBlock * Hp);
      made.k = scratch.take<C>(p.S * 2 * Hp);
      made.v = scratch.take<C>(Hp);
      made.score = scratch.take<C>(kBlock * p.S);
      made.value = scratch.take<const S*>(p.S);
      made.packed = -1;
      return made;
    }
  };

  explicit AdditiveForward(const AdditiveForwardParams& params) : Pass(params), f(params) {}

  size_t scratch_bytes() const {
    Scratch scratch{nullptr};
    for (int t = 0; t < p.threads; t++) Local::carve(scratch, p, Hp);
    scratch.template take<Local>(p.threads);
    return scratch.used;
  }

  void run() const {
    Scratch scratch{(char*)p.scratch};
    Local* locals = scratch.take<Local>(p.threads);
    for (int t = 0; t < p.threads; t++) {
      locals[t] = Local::carve(scratch, p, Hp);
      this->pack_v(locals[t].v);
    }
    const int64_t blocks = ceil_div(p.L, kBlock);
    this->share(p.B * blocks, [&](int thread, int64_t i) {
      block(locals[thread], i / blocks, i % blocks * kBlock);
    });
  }

  // kBlock queries of a sequence, from l0 on.
  void block(Local& own, int64_t b, int64_t l0) const {
    const int64_t queries = p.L - l0 < kBlock ? p.L - l0 : kBlock;
    const int64_t keys = this->keys_of(b);
    C* score = own.score;
    if (keys_within(own, b) && this->template pack_queries<false>(b, l0, queries, own.q)) {
      this->template scores<false>(own.q, own.k, own.v, queries, keys, score, p.S);
    } else {
      this->template pack_keys<true>(b, own.k);
      this->template pack_queries<true>(b, l0, queries, own.q);
      this->template scores<true>(own.q, own.k, own.v, queries, keys, score, p.S);
      own.packed = -1;
    }
    this->key_pointers(p.value, b, own.value);
    for (int64_t i = 0; i < queries; i++) {
      C* row = score + i * p.S;
      C* weights = this->weights_of(b, l0 + i);
      this->softmax(row, keys);
      if (keys < p.S) memset(weights, 0, size_t(p.S) * sizeof(C));
      for (int64_t j = 0; j < keys; j++) weights[this->key_of(b, j)] = row[j];
    }
    this->combine(score, 1, p.S, own.value, keys, queries, 0, p.D,
                  [&](int64_t i) { return (S*)f.context + (b * p.L + l0 + i) * p.D; });
  }

  // Packs the keys of a sequence, if they are not packed; are they all within range?
  bool keys_within(Local& own, int64_t b) const {
    if (own.packed != b) own.within = this->template pack_keys<false>(b, own.k);
    own.packed = b;
    return own.within;
  }

  const AdditiveForwardParams& f;
};

// ---- backward -----------------------------------------------------------------------------------

template <class S>
struct AdditiveBackward : AdditivePass<S> {
  using Pass = AdditivePass<S>;
  using Pass::L;
  using Pass::p, Pass::Hp, Pass::kBlock, Pass::kQueries, Pass::kRound, Pass::kStretch;
  using typename Pass::C;
  using typename Pass::V;

  struct Local {    // one thread's
    C *q, *k, *dk;  // a vector of h: of all queries, of all keys packed; of all keys
    C *w, *dw;      // [kBlock, S] of valid keys
    const S **value, **dcontext;

    static Local carve(Scratch& scratch, const AdditiveParams& p) {
      Local made{};
      made.q = scratch.take<C>(p.L * L);
      made.k = scratch.take<C>(p.S * 2 * L);
      made.dk = scratch.take<C>(p.S * L);
      made.w = scratch.take<C>(kBlock * p.S);
      made.dw = scratch.take<C>(kBlock * p.S);
      made.value = scratch.take<const S*>(p.S);
      made.dcontext = scratch.take<const S*>(p.L);
      return made;
    }
  };

  explicit AdditiveBackward(const AdditiveBackwardParams& params) : Pass(params), g(params) {}

  bool any_scores() const { return g.dq || g.dk || g.dv; }

  size_t scratch_bytes() const {
    Scratch scratch{nullptr};
    scratch.take<Local>(p.threads);
    for (int t = 0; t < p.threads; t++) Local::carve(scratch, p);
    scratch.take<C>(p.B * p.L * p.S);
    scratch.take<C>(p.B * Hp);
    return scratch.used;
  }

  void run() const {
    Scratch scratch{(char*)p.scratch};
    Local* locals = scratch.take<Local>(p.threads);
    for (int t = 0; t < p.threads; t++) locals[t] = Local::carve(scratch, p);
    C* ds = scratch.take<C>(p.B * p.L * p.S);  // of valid keys
    C* dv = scratch.take<C>(p.B * Hp);         // each sequence's share
    if (any_scores()) {
      const int64_t blocks = ceil_div(p.L, kBlock);
      this->share(p.B * blocks, [&](int thread, int64_t i) {
        softmax_block(locals[thread], i / blocks, i % blocks * kBlock, ds);
      });
      const int64_t stretches = ceil_div(Hp, kStretch);
      this->share(p.B * stretches, [&](int thread, int64_t i) {
        const int64_t h0 = i % stretches * kStretch;
        for (int64_t h = h0; h < Hp && h < h0 + kStretch; h += L)
          vector_of_h(locals[thread], i / stretches, h, ds, dv);
      });
      if (g.dv) sum_dv(dv);
    }
    if (g.dvalue) {
      const int64_t stretches = ceil_div(p.D, kStretch);
      this->share(p.B * stretches, [&](int thread, int64_t i) {
        const int64_t d0 = i % stretches * kStretch;
        values(locals[thread], i / stretches, d0, d0 + kStretch < p.D ? d0 + kStretch : p.D);
      });
    }
  }

  // dS of kBlock queries of a sequence, from l0 on.
  void softmax_block(const Local& own, int64_t b, int64_t l0, C* ds) const {
    const int64_t queries = p.L - l0 < kBlock ? p.L - l0 : kBlock;
    const int64_t keys = this->keys_of(b);
    for (int64_t i = 0; i < queries; i++) {
      const C* weights = this->weights_of(b, l0 + i);
      const C* dweights = g.dweights ? (const C*)g.dweights + (b * p.L + l0 + i) * p.S : nullptr;
      for (int64_t j = 0; j < keys; j++) {
        const int64_t s = this->key_of(b, j);
        own.w[i * p.S + j] = weights[s];
        own.dw[i * p.S + j] = dweights ? dweights[s] : 0;
      }
    }
    if (g.dcontext.data) {
      this->key_pointers(p.value, b, own.value);
      for (int64_t i = 0; i < queries; i++) own.dcontext[i] = this->row_of(g.dcontext, b, l0 + i);
      int64_t i = 0;
      for (; i + kQueries <= queries; i += kQueries)
        this->template dot_rows<kQueries>(own.dcontext + i, own.value, keys, own.dw + i * p.S, p.S);
      for (; i < queries; i++)
        this->template dot_rows<1>(own.dcontext + i, own.value, keys, own.dw + i * p.S, p.S);
    }
    for (int64_t i = 0; i < queries; i++) {
      const C *w = own.w + i * p.S, *dw = own.dw + i * p.S;
      C* out = ds + (b * p.L + l0 + i) * p.S;
      V shares{};
      this->vectors(keys, [&](int64_t j, int64_t left) {
        shares += load_first(w + j, left) * load_first(dw + j, left);
      });
      const C share = this->sum(shares);
      this->vectors(keys, [&](int64_t j, int64_t left) {
        store_first(out + j, load_first(w + j, left) * (load_first(dw + j, left) - share), left);
      });
    }
  }

  // dq, dk and this sequence's share of dv, for the values h … h + L.
  void vector_of_h(const Local& own, int64_t b, int64_t h, const C* ds, C* dv) const {
    const int64_t keys = this->keys_of(b), left = p.H - h;
    const bool within = pack<false>(own, b, h);
    if (!within) pack<true>(own, b, h);
    memset(own.dk, 0, size_t(keys * L) * sizeof(C));
    const V v = load_first((const S*)p.v + h, left);
    const V dv_h = within ? all_queries<false>(own, b, h, keys, v, ds)
                          : all_queries<true>(own, b, h, keys, v, ds);
    store(dv + b * Hp + h, dv_h);
    if (g.dk)
      for (int64_t j = 0; j < keys; j++)
        store_first((S*)g.dk + (b * p.S + this->key_of(b, j)) * p.H + h, load(own.dk + j * L) * v,
                    left);
  }

  // All queries and valid keys of a sequence, the values h … h + L; says whether all are within
  // range.
  template <bool exact>
  bool pack(const Local& own, int64_t b, int64_t h) const {
    const int64_t left = p.H - h;
    bool within = true;
    for (int64_t i = 0; i < p.L; i++)
      within &= this->template pack_query<exact>(load_first(this->row_of(p.q, b, i) + h, left),
                                                 own.q + i * L);
    for (int64_t j = 0; j < this->keys_of(b); j++)
      within &= this->template pack_key<exact>(
          load_first(this->row_of(p.k, b, this->key_of(b, j)) + h, left), own.k + j * 2 * L);
    return within;
  }

  template <bool exact>
  V all_queries(const Local& own, int64_t b, int64_t h, int64_t keys, V v, const C* ds) const {
    V dv_h{};
    int64_t i = 0;
    for (; i + kQueries <= p.L; i += kQueries)
      dv_h += few_queries<exact, kQueries>(own, b, i, h, keys, v, ds);
    for (; i < p.L; i++) dv_h += few_queries<exact, 1>(own, b, i, h, keys, v, ds);
    return dv_h;
  }

  // Adds to own.dk, overwrites dq of n queries, returns their share of dv.
  template <bool exact, int n>
  SEQKERN_INLINE V few_queries(const Local& own, int64_t b, int64_t l0, int64_t h, int64_t keys,
                               V v, const C* ds) const {
    const C* ds_0 = ds + (b * p.L + l0) * p.S;
    V q[n], dq[n] = {}, dv_all{};
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) q[i] = load(own.q + (l0 + i) * L);
    for (int64_t j0 = 0; j0 < keys; j0 += kRound) {
      const int64_t end = j0 + kRound < keys ? j0 + kRound : keys;
      V sums[n] = {}, dv[n] = {};
      for (int64_t j = j0; j < end; j++) {
        const V e = load(own.k + j * 2 * L);
        const V m = exact ? V{} : load(own.k + j * 2 * L + L);
        V dk = load(own.dk + j * L);
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
          const V d = V{} + ds_0[i * p.S + j];
          const V t = this->template tanh_of<exact>(q[i], e, m);
          const V slope = 1 - t * t;
          dv[i] += d * t;
          sums[i] += d * slope;
          dk += d * slope;
        }
        store(own.dk + j * L, dk);
      }
#pragma GCC unroll 4
      for (int i = 0; i < n; i++) dq[i] += sums[i], dv_all += dv[i];
    }
    if (g.dq)
#pragma GCC unroll 4
      for (int i = 0; i < n; i++)
        store_first((S*)g.dq + (b * p.L + l0 + i) * p.H + h, dq[i] * v, p.H - h);
    return dv_all;
  }

  void sum_dv(const C* dv) const {
    this->vectors(p.H, [&](int64_t h, int64_t left) {
      V total{};
      for (int64_t b0 = 0; b0 < p.B; b0 += kRound) {
        V some{};
        for (int64_t b = b0; b < p.B && b < b0 + kRound; b++) some += load(dv + b * Hp + h);
        total += some;
      }
      store_first((S*)g.dv + h, total, left);
    });
  }

  // dvalue of a sequence's valid keys, columns d0 … d1.
  void values(const Local& own, int64_t b, int64_t d0, int64_t d1) const {
    const int64_t keys = this->keys_of(b);
    const auto out = [&](int64_t j) { return (S*)g.dvalue + (b * p.S + this->key_of(b, j)) * p.D; };
    const C* w = (const C*)p.weights + b * p.L * p.S;
    for (int64_t l = 0; l < p.L; l++) own.dcontext[l] = this->row_of(g.dcontext, b, l);
    if (!p.key) return this->combine(w, p.S, 1, own.dcontext, p.L, keys, d0, d1, out);
    for (int64_t j = 0; j < keys;) {  // keys next to each other at once
      int64_t n = 1;
      while (j + n < keys && this->key_of(b, j + n) == this->key_of(b, j) + n) n++;
      const int64_t first = j;
      this->combine(w + this->key_of(b, j), p.S, 1, own.dcontext, p.L, n, d0, d1,
                    [&](int64_t i) { return out(first + i); });
      j += n;
    }
  }

  const AdditiveBackwardParams& g;
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
