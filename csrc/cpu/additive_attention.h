// Additive attention (Bahdanau et al., 2015), forward and backward, for one sequence at a time:
//
//   score_ls = sum over h of v_h tanh(q_lh + k_sh)     P = softmax(score)     context = P value
//   dP = dcontext value' + dweights                    dS = P * (dP - rowsum(P * dP))
//   dq_lh = v_h sum over s of dS_ls (1 - tanh^2)       dk_sh = v_h sum over l of the same
//   dv_h = sum over l, s of dS_ls tanh                 dvalue = P' dcontext
//
// The tanh of a sum comes from what is computed once a query and once a key: with m(x) = exp(x) -
// 1, and z the sign of k,
//
//   n = m(-2zq) exp(-2|k|) + m(-2|k|) = exp(-2z(q + k)) - 1        tanh(q + k) = -z n / (n + 2)
//
// which costs a multiply-add, an addition and a division, and is as accurate as q + k itself, near
// zero too: m(2q) exp(2k) + m(2k), without z, loses digits where k is large and q nearly -k. It
// wants |q| and |k| up to kRange; where one is beyond, or NaN, and always in double, the tanh is
// computed as such (`exact`).
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
  static constexpr float kRange = 42;  // exp(2 * kRange) is no overflow, its inverse is normal
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

  // e = exp(x), m = exp(x) - 1, each to about an ulp, for |x| <= 2 kRange. See exp_minus_abs.
  static SEQKERN_INLINE void exponentials(VecF x, VecF& e, VecF& m) {
    const VecF magic = VecF{} + 12582912.0f;
    const VecF shifted = x * 1.44269504088896341f + magic;
    const VecF n = shifted - magic;
    VecF r = x - n * 0.693359375f;
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

  // A vector of a query as it is packed: m(-2q), m(2q); if exact q, and nothing. And of a key:
  // exp(-2|k|) with k's sign, m(-2|k|); if exact k, and nothing.
  static constexpr uint32_t kSign = 0x80000000u;
  template <bool exact>
  struct Query {
    V above{}, below{};  // for keys above 0 and below
    explicit SEQKERN_INLINE Query(const C* packed) : above(load(packed)) {
      if constexpr (!exact) below = load(packed + L);
    }
  };
  template <bool exact>
  struct Key {
    V e{}, m{};
    VecI below{};  // is k below 0?
    VecU flip{};   // the sign bit of -z
    explicit SEQKERN_INLINE Key(const C* packed) : e(load(packed)) {
      if constexpr (!exact) {
        m = load(packed + L);
        below = (VecI)e < 0;
        flip = ((VecU)e & kSign) ^ kSign;
        e = (V)((VecU)e & ~kSign);
      }
    }
    // tanh(q + k), or -z times that.
    SEQKERN_INLINE V tanh(const Query<exact>& q) const {
      if constexpr (exact) {
        return Math<C>::tanh(q.above + e);
      } else {
        const V n = (below ? q.below : q.above) * e + m;
        return quotient(n, n + 2.0f);
      }
    }
    // -z x: what is to be multiplied with such a tanh, or was summed of them.
    SEQKERN_INLINE V turned(V x) const {
      if constexpr (exact)
        return x;
      else
        return (V)((VecU)x ^ flip);
    }
  };

  // Each packs one vector, in the place of two, and adds to `beyond` the lanes that only the exact
  // tanh serves.
  template <bool exact>
  static SEQKERN_INLINE void pack_query(V q, C* packed, VecI& beyond) {
    if constexpr (exact) {
      store(packed, q);
    } else {
      V e, above, below;
      exponentials(-2 * q, e, above);
      exponentials(2 * q, e, below);
      store(packed, above);
      store(packed + L, below);
      beyond |= out_of_range(q);
    }
  }
  template <bool exact>
  static SEQKERN_INLINE void pack_key(V k, C* packed, VecI& beyond) {
    if constexpr (exact) {
      store(packed, k);
    } else {
      V e, m;
      exponentials(-2 * (V)((VecU)k & ~kSign), e, m);
      store(packed, (V)((VecU)e | ((VecU)k & kSign)));
      store(packed + L, m);
      beyond |= out_of_range(k);
    }
  }
  static SEQKERN_INLINE VecI out_of_range(VecF x) {
    const VecF a = (VecF)((VecU)x & 0x7fffffffu);
    return a <= kRange ? VecI{} : VecI{} - 1;  // NaN is out
  }
  static bool none(VecI beyond) {
    int32_t any = 0;
    for (int i = 0; i < kLanes<float>; i++) any |= beyond[i];
    return any == 0;
  }

  // f(first value, how many are left) for each vector of a row of n values.
  template <class F>
  static SEQKERN_INLINE void vectors(int64_t n, const F& f) {
    for (int64_t i = 0; i < n; i += L) f(i, n - i);
  }

  // Queries l0 … l0+n of a sequence: packed[n][Hp / L][2][L]. Are all within range?
  template <bool exact>
  bool pack_queries(int64_t b, int64_t l0, int64_t n, C* packed) const {
    VecI beyond{};
    for (int64_t i = 0; i < n; i++) {
      const S* row = row_of(p.q, b, l0 + i);
      vectors(p.H, [&](int64_t h, int64_t left) {
        pack_query<exact>(load_first(row + h, left), packed + i * 2 * Hp + 2 * h, beyond);
      });
    }
    return none(beyond);
  }
  // The valid keys of a sequence: packed[keys][Hp / L][2][L]. Are all within range?
  template <bool exact>
  bool pack_keys(int64_t b, C* packed) const {
    VecI beyond{};
    for (int64_t j = 0; j < keys_of(b); j++) {
      const S* row = row_of(p.k, b, key_of(b, j));
      vectors(p.H, [&](int64_t h, int64_t left) {
        pack_key<exact>(load_first(row + h, left), packed + j * 2 * Hp + 2 * h, beyond);
      });
    }
    return none(beyond);
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
#pragma GCC unroll 4
      for (int j = 0; j < nk; j++) {
        const Key<exact> key(k + j * 2 * Hp + 2 * h);
        const V v_j = key.turned(v_h);
#pragma GCC unroll 4
        for (int i = 0; i < nq; i++)
          sums[i][j] += v_j * key.tanh(Query<exact>(q + i * 2 * Hp + 2 * h));
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
      score_rows<exact, kQueries>(q + i * 2 * Hp, k, v, keys, score + i * ld, ld);
    for (; i < queries; i++) score_rows<exact, 1>(q + i * 2 * Hp, k, v, keys, score + i * ld, ld);
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

  // ds[n] = w (dw - sum of w dw); dw may be ds.
  static void softmax_backward(const C* w, const C* dw, int64_t n, C* ds) {
    V shares{};
    vectors(n, [&](int64_t j, int64_t left) {
      shares += load_first(w + j, left) * load_first(dw + j, left);
    });
    const C share = sum(shares);
    vectors(n, [&](int64_t j, int64_t left) {
      store_first(ds + j, load_first(w + j, left) * (load_first(dw + j, left) - share), left);
    });
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
        const C f = factor[t * of_term + r * of_row];
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
  // Weights of valid keys to their places, zeros elsewhere; and back.
  void scatter_weights(const C* compact, int64_t b, int64_t l) const {
    C* weights = (C*)p.weights + (b * p.L + l) * p.S;
    if (keys_of(b) < p.S) memset(weights, 0, size_t(p.S) * sizeof(C));
    for (int64_t j = 0; j < keys_of(b); j++) weights[key_of(b, j)] = compact[j];
  }
  void gather_weights(const void* weights, int64_t b, int64_t l, C* compact) const {
    const C* row = (const C*)weights + (b * p.L + l) * p.S;
    for (int64_t j = 0; j < keys_of(b); j++) compact[j] = row[key_of(b, j)];
  }

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
      made.q = scratch.take<C>(kBlock * 2 * Hp);
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
    bool within = false;
    if constexpr (!Pass::kDouble) {
      within = keys_within(own, b) && this->template pack_queries<false>(b, l0, queries, own.q);
      if (within) this->template scores<false>(own.q, own.k, own.v, queries, keys, score, p.S);
    }
    if (!within) {
      this->template pack_keys<true>(b, own.k);
      this->template pack_queries<true>(b, l0, queries, own.q);
      this->template scores<true>(own.q, own.k, own.v, queries, keys, score, p.S);
      own.packed = -1;
    }
    this->key_pointers(p.value, b, own.value);
    for (int64_t i = 0; i < queries; i++) {
      this->softmax(score + i * p.S, keys);
      this->scatter_weights(score + i * p.S, b, l0 + i);
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
      made.q = scratch.take<C>(p.L * 2 * L);
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
    if (!g.ds) scratch.take<C>(p.B * p.L * p.S);
    scratch.take<C>(p.B * Hp);
    return scratch.used;
  }

  void run() const {
    Scratch scratch{(char*)p.scratch};
    Local* locals = scratch.take<Local>(p.threads);
    for (int t = 0; t < p.threads; t++) locals[t] = Local::carve(scratch, p);
    C* ds = g.ds ? (C*)g.ds : scratch.take<C>(p.B * p.L * p.S);  // of valid keys
    C* dv = scratch.take<C>(p.B * Hp);                           // each sequence's share
    if (any_scores()) {
      const int64_t blocks = g.ds ? 0 : ceil_div(p.L, kBlock);
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
      this->gather_weights(p.weights, b, l0 + i, own.w + i * p.S);
      if (g.dweights)
        this->gather_weights(g.dweights, b, l0 + i, own.dw + i * p.S);
      else
        memset(own.dw + i * p.S, 0, size_t(keys) * sizeof(C));
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
      this->softmax_backward(w, dw, keys, out);
    }
  }

  // dq, dk and this sequence's share of dv, for the values h … h + L.
  void vector_of_h(const Local& own, int64_t b, int64_t h, const C* ds, C* dv) const {
    const int64_t keys = this->keys_of(b), left = p.H - h;
    memset(own.dk, 0, size_t(keys * L) * sizeof(C));
    const V v = load_first((const S*)p.v + h, left);
    V dv_h{};
    bool within = false;
    if constexpr (!Pass::kDouble) {
      within = pack<false>(own, b, h);
      if (within) dv_h = all_queries<false>(own, b, h, keys, v, ds);
    }
    if (!within) {
      pack<true>(own, b, h);
      dv_h = all_queries<true>(own, b, h, keys, v, ds);
    }
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
    VecI beyond{};
    for (int64_t i = 0; i < p.L; i++)
      this->template pack_query<exact>(load_first(this->row_of(p.q, b, i) + h, left),
                                       own.q + i * 2 * L, beyond);
    for (int64_t j = 0; j < this->keys_of(b); j++)
      this->template pack_key<exact>(load_first(this->row_of(p.k, b, this->key_of(b, j)) + h, left),
                                     own.k + j * 2 * L, beyond);
    return this->none(beyond);
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
    using Query = typename Pass::template Query<exact>;
    using Key = typename Pass::template Key<exact>;
    const C* ds_0 = ds + (b * p.L + l0) * p.S;
    V dq[n] = {}, dv_all{};
    for (int64_t j0 = 0; j0 < keys; j0 += kRound) {
      const int64_t end = j0 + kRound < keys ? j0 + kRound : keys;
      V sums[n] = {}, dv{};
      for (int64_t j = j0; j < end; j++) {
        const Key key(own.k + j * 2 * L);
        V dk = load(own.dk + j * L), dv_j{};
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
          const C d = ds_0[i * p.S + j];
          const V t = key.tanh(Query(own.q + (l0 + i) * 2 * L));
          const V slope = 1 - t * t;
          dv_j += d * t;
          sums[i] += d * slope;
          dk += d * slope;
        }
        dv += key.turned(dv_j);
        store(own.dk + j * L, dk);
      }
      dv_all += dv;
#pragma GCC unroll 4
      for (int i = 0; i < n; i++) dq[i] += sums[i];
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

// ---- one query at a time ------------------------------------------------------------------------

template <class S>
struct AdditiveStep : AdditivePass<S> {
  using Pass = AdditivePass<S>;
  using Pass::L;
  using Pass::p, Pass::Hp, Pass::kKeys;
  using typename Pass::C;
  using typename Pass::V;

  struct Local {  // one thread's
    C *q, *k, *v, *dq, *w, *dw;
    const S** value;

    static Local carve(Scratch& scratch, const AdditiveParams& p, int64_t Hp) {
      Local made{};
      made.q = scratch.take<C>(2 * Hp);
      made.k = scratch.take<C>(p.S * 2 * Hp);
      made.v = scratch.take<C>(Hp);
      made.dq = scratch.take<C>(Hp);
      made.w = scratch.take<C>(p.S);
      made.dw = scratch.take<C>(p.S);
      made.value = scratch.take<const S*>(p.S);
      return made;
    }
  };

  explicit AdditiveStep(const AdditiveStepParams& params) : Pass(params), s(params) {}

  size_t scratch_bytes() const {
    Scratch scratch{nullptr};
    scratch.take<Local>(p.threads);
    for (int t = 0; t < p.threads; t++) Local::carve(scratch, p, Hp);
    return scratch.used;
  }

  C* packed_of(int64_t b) const { return (C*)s.packed + b * p.S * 2 * Hp; }

  // Packs the keys of every sequence, without which no step can run.
  void pack() const {
    this->share(p.B, [&](int, int64_t b) {
      s.within[b] = 0;
      if constexpr (!Pass::kDouble) s.within[b] = this->template pack_keys<false>(b, packed_of(b));
      if (!s.within[b]) this->template pack_keys<true>(b, packed_of(b));
    });
  }

  void run() const {
    Scratch scratch{(char*)p.scratch};
    Local* locals = scratch.take<Local>(p.threads);
    for (int t = 0; t < p.threads; t++) {
      locals[t] = Local::carve(scratch, p, Hp);
      this->pack_v(locals[t].v);
    }
    this->share(p.B, [&](int thread, int64_t b) {
      const Local& own = locals[thread];
      if constexpr (!Pass::kDouble)
        if (s.within[b] && this->template pack_queries<false>(b, s.t, 1, own.q))
          return step<false>(own, b, packed_of(b));
      C* k = packed_of(b);
      if (s.within[b]) this->template pack_keys<true>(b, k = own.k);  // the query alone is beyond
      this->template pack_queries<true>(b, s.t, 1, own.q);
      step<true>(own, b, k);
    });
  }

  template <bool exact>
  void step(const Local& own, int64_t b, const C* k) const {
    if (s.context.data)
      forward<exact>(own, b, k);
    else
      backward<exact>(own, b, k);
  }

  template <bool exact>
  void forward(const Local& own, int64_t b, const C* k) const {
    const int64_t keys = this->keys_of(b);
    this->template score_rows<exact, 1>(own.q, k, own.v, keys, own.w, p.S);
    this->softmax(own.w, keys);
    this->scatter_weights(own.w, b, s.t);
    this->key_pointers(p.value, b, own.value);
    this->combine(own.w, 1, p.S, own.value, keys, 1, 0, p.D,
                  [&](int64_t) { return row(s.context, b); });
  }

  template <bool exact>
  void backward(const Local& own, int64_t b, const C* k) const {
    const int64_t keys = this->keys_of(b);
    C* ds = (C*)s.ds + (b * p.L + s.t) * p.S;
    this->gather_weights(p.weights, b, s.t, own.w);
    if (s.dweights)
      this->gather_weights(s.dweights, b, s.t, own.dw);
    else
      memset(own.dw, 0, size_t(keys) * sizeof(C));
    this->key_pointers(p.value, b, own.value);
    const S* dcontext = row(s.dcontext, b);
    this->template dot_rows<1>(&dcontext, own.value, keys, own.dw, p.S);
    this->softmax_backward(own.w, own.dw, keys, ds);
    memset(own.dq, 0, size_t(Hp) * sizeof(C));
    int64_t j = 0;
    for (; j + kKeys <= keys; j += kKeys) add_dq<exact, kKeys>(own, k + j * 2 * Hp, ds + j);
    for (; j < keys; j++) add_dq<exact, 1>(own, k + j * 2 * Hp, ds + j);
    S* dq = row(s.dq, b);
    this->vectors(p.H, [&](int64_t h, int64_t left) {
      store_first(dq + h, load(own.dq + h) * load(own.v + h), left);
    });
  }

  // own.dq += sum over n keys of ds (1 - tanh^2)
  template <bool exact, int n>
  SEQKERN_INLINE void add_dq(const Local& own, const C* k, const C* ds) const {
    for (int64_t h = 0; h < Hp; h += L) {
      const typename Pass::template Query<exact> q(own.q + 2 * h);
      V sums{};
#pragma GCC unroll 4
      for (int j = 0; j < n; j++) {
        const typename Pass::template Key<exact> key(k + j * 2 * Hp + 2 * h);
        const V t = key.tanh(q);
        sums += ds[j] * (1 - t * t);
      }
      store(own.dq + h, load(own.dq + h) + sums);
    }
  }

  S* row(const BatchRows& rows, int64_t b) const { return (S*)this->row_of(rows, b, s.t); }

  const AdditiveStepParams& s;
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
