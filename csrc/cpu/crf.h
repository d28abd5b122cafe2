// A linear-chain conditional random field: log-likelihood, its gradient, the best sequences.
//
//   forward    a_t[j] = log sum_i exp(a_{t-1}[i] + trans[i][j]) + s_t[j]
//              log Z = log sum_i exp(a_last[i] + end[i])
//
//   backward   q_last = softmax(a_last + end)
//              p(i | j) = exp(a_{t-1}[i] + trans[i][j]) / sum over i
//              q_{t-1}[i] = sum_j p(i | j) q_t[j]
//              dtrans[i][j] = sum_t p(i | j) q_t[j]          demissions_t = q_t
//
//   best       v_t[j] = max_i (v_{t-1}[i] + trans[i][j] + s_t[j])
//              traced back by finding the i of each maximum again
//
// Each step's a is kept less its maximum, which goes into a double: so no digit is lost to the
// length of a sequence. With x = exp(a_{t-1}) <= 1, the columns' maxima m[j] = max_i trans[i][j]
// and E[i][j] = exp(trans[i][j] - m[j]) <= 1, the sum is a product of matrices: sum_i x[i] E[i][j]
// = S[j], a_t[j] = log S[j] + s_t[j] + m[j], and p(i | j) = x[i] E[i][j] / S[j]. What underflows in
// x, E or their product is less than the smallest normal number, so it counts for nothing while
// S[j] is at least `kLeast`; a column below that is computed over again, with the maximum of its
// own terms subtracted (`exact_column`). So the range is that of the logarithms, and -inf forbids.
//
// Layout: matrices are padded to Kp columns, a multiple of kCrfPad, with -inf in the scores'
// padding. A group of up to kRows rows of the batch, of about as many steps (the batch is sorted),
// goes through the steps together, so that a row of E that was loaded serves them all. Threads take
// groups by a counter; in backward shares of groups, each with gradients of its own, which are
// added up in order: no result depends on the number of threads.
#pragma once

#include "../crf_params.h"
#include "gemm.h"
#include "threads.h"

namespace seqkern {
namespace SEQKERN_ISA {

// exp of what is at most 0, and log of what is normal and positive, at most 2 ulp off; NaN stays
// NaN.
template <class C>
struct CrfMath;

template <>
struct CrfMath<float> {
  // Zero below the normal numbers, which cost a hundred times as much on some machines.
  static SEQKERN_INLINE VecF exp(VecF x) {
    const VecF e = exp_minus_abs(x < -87.0f ? VecF{} : x);
    return x < -87.0f ? VecF{} : e;
  }
  static float exp(float x) { return exp(VecF{} + x)[0]; }
  // Cephes' logf (S. Moshier, 1989).
  static SEQKERN_INLINE VecF log(VecF x) {
    const VecI exponent =
        ((VecI)x - 0x3f3504f3) >> 23;  // so that the rest is in sqrt(1/2) … sqrt(2)
    const VecF f = (VecF)((VecI)x - (exponent << 23)) - 1.0f;
    const VecF e = __builtin_convertvector(exponent, VecF), z = f * f;
    VecF p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    VecF y = p * f * z + e * -2.12194440e-4f;
    y = y - 0.5f * z;
    const VecF result = f + y + e * 0.693359375f;
    return x == x ? result : x;
  }
};

template <>
struct CrfMath<double> {
  typedef int64_t VecL __attribute__((vector_size(kVecBytes)));
  static constexpr double kMagic =
      6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;

  // Cody & Waite's reduction, Taylor's series.
  static SEQKERN_INLINE VecD exp(VecD x) {
    const VecD a = x < -708.0 ? VecD{} : x, shifted = a * 1.44269504088896340736 + kMagic;
    const VecD n = shifted - kMagic;
    const VecL exponent = (VecL)shifted - (VecL)(VecD{} + kMagic);
    const VecD r = (a - n * kLn2High) - n * kLn2Low;
    VecD p = r * (1.0 / 6227020800) + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * (r * r) + r + 1.0;
    return x < -708.0 ? VecD{} : p * (VecD)((exponent + 1023) << 52);
  }
  static double exp(double x) { return exp(VecD{} + x)[0]; }
  // fdlibm's log (Sun Microsystems, 1993).
  static SEQKERN_INLINE VecD log(VecD x) {
    const VecL exponent = ((VecL)x - 0x3fe6a09e667f3bcd) >> 52;  // the rest: sqrt(1/2) … sqrt(2)
    const VecD f = (VecD)((VecL)x - (exponent << 52)) - 1.0;
    const VecD k = (VecD)(exponent + (VecL)(VecD{} + kMagic)) - kMagic;
    const VecD s = f / (f + 2.0), z = s * s, half = 0.5 * f * f;
    VecD p = z * 1.479819860511658591e-01 + 1.531383769920937332e-01;
    p = p * z + 1.818357216161805012e-01;
    p = p * z + 2.222219843214978396e-01;
    p = p * z + 2.857142874366239149e-01;
    p = p * z + 3.999999999940941908e-01;
    p = p * z + 6.666666666666735130e-01;
    const VecD result = k * kLn2High - ((half - (s * (half + p * z) + k * kLn2Low)) - f);
    return x == x ? result : x;
  }
};

// ---- What all passes share ----------------------------------------------------------------------

template <class C>
struct CrfPass {
  using V = Vec<C>;
  using M = CrfMath<C>;
  static constexpr int L = kLanes<C>;
  static constexpr int kRows = 4;
  static constexpr int kNV = kVecRegisters == 32 ? 2 : 1;  // vectors of columns at a time
  static constexpr int64_t kRound = 64;                    // terms of a sum in one chain
  static constexpr C kNone = -C(__builtin_inf());
  static constexpr C kTiny = C(sizeof(C) == 4 ? __FLT_MIN__ : __DBL_MIN__);
  static constexpr C kEpsilon = C(sizeof(C) == 4 ? __FLT_EPSILON__ : __DBL_EPSILON__);
  static_assert(kCrfPad % L == 0);

  int64_t T, B, K, Kp, nv;
  C least;                // sums from here on are right without what underflows
  int64_t group, groups;  // rows of a group: by B alone, so that results are

  C *trans, *transT, *E, *ET, *column_max, *start, *end;
  int64_t* next;  // the next group to be taken

  explicit CrfPass(const CrfParams& p)
      : T(p.T),
        B(p.B),
        K(p.K),
        Kp(round_up(K, kCrfPad)),
        nv(ceil_div(K, L)),
        least(C(2 * K) * (kTiny / kEpsilon)) {
    const int64_t few = ceil_div(B, 8);
    group = few < kRows ? few : kRows;
    groups = ceil_div(B, group);
  }

  // The rows of one group, and how many of them have a step i: a prefix.
  struct Group {
    const CrfParams& p;
    int rows;
    const int64_t* row;  // [rows]

    int64_t steps(int r) const { return p.count[row[r]]; }
    int64_t t(int r, int64_t i) const { return p.step ? p.step[row[r] * p.T + i] : i; }
    const C* emissions(int r, int64_t i) const {
      return (const C*)p.emissions + t(r, i) * p.emissions_of_step + row[r] * p.emissions_of_row;
    }
    int64_t tag(int r, int64_t t) const {
      return p.tags[t * p.tags_of_step + row[r] * p.tags_of_row];
    }
  };

  Group group_of(const CrfParams& p, int64_t g) const {
    const int64_t begin = g * group, left = B - begin;
    return {p, int(left < group ? left : group), p.order + begin};
  }

  // Matrices that all rows share. With exponentials, or without (Viterbi).
  void take_shared(Scratch& scratch, bool exponentials) {
    trans = scratch.take<C>(K * Kp);
    transT = scratch.take<C>(K * Kp);
    E = exponentials ? scratch.take<C>(K * Kp) : nullptr;
    ET = exponentials ? scratch.take<C>(K * Kp) : nullptr;
    column_max = scratch.take<C>(Kp);
    start = scratch.take<C>(Kp);
    end = scratch.take<C>(Kp);
    next = scratch.take<int64_t>(1);
  }

  void fill_shared(const CrfParams& p) {
    *next = 0;
    const C *from = (const C*)p.transitions, *from_start = (const C*)p.start;
    const C* from_end = (const C*)p.end;
    for (int64_t j = 0; j < Kp; j++) {
      start[j] = j < K ? from_start[j] : kNone;
      end[j] = j < K ? from_end[j] : kNone;
      column_max[j] = kNone;
    }
    for (int64_t i = 0; i < K; i++)
      for (int64_t j = 0; j < Kp; j++) {
        trans[i * Kp + j] = j < K ? from[i * K + j] : kNone;
        transT[i * Kp + j] = j < K ? from[j * K + i] : kNone;
        if (trans[i * Kp + j] > column_max[j]) column_max[j] = trans[i * Kp + j];
      }
    if (!E) return;
    for (int64_t i = 0; i < K; i++)
      for (int64_t v = 0; v < Kp; v += L) {
        const V highest = load(column_max + v), shift = highest == kNone ? V{} : highest;
        store(E + i * Kp + v, M::exp(load(trans + i * Kp + v) - shift));
      }
    for (int64_t i = 0; i < K; i++) {
      for (int64_t j = K; j < Kp; j++) E[i * Kp + j] = 1;  // the padding's sums are never small
      for (int64_t j = 0; j < Kp; j++) ET[i * Kp + j] = j < K ? E[j * Kp + i] : 0;
    }
  }

  // ---- vectors ----

  template <int k, int... lane>
  static SEQKERN_INLINE V rotate(V v, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(v, v, (lane + k) % L...);
  }
  // The lanes' maximum (of what is no NaN, if any) and sum, in halves.
  template <int k = L / 2>
  static SEQKERN_INLINE C maximum(V v) {
    if constexpr (k == 0) {
      return v[0];
    } else {
      const V other = rotate<k>(v, std::make_integer_sequence<int, L>());
      return maximum<k / 2>(v > other ? v : other);
    }
  }
  template <int k = L / 2>
  static SEQKERN_INLINE C sum(V v) {
    if constexpr (k == 0)
      return v[0];
    else
      return sum<k / 2>(v + rotate<k>(v, std::make_integer_sequence<int, L>()));
  }

  // ---- out[r] = x[r] A for R rows: A [n, Kp], x and out rows Kp apart ----

  template <int R, int NV>
  SEQKERN_INLINE void multiply_tile(C* out, const C* x, const C* A, int64_t n) const {
    for (int64_t begin = 0; begin < n; begin += kRound) {
      const int64_t stop = begin + kRound < n ? begin + kRound : n;
      V acc[R][NV] = {};
      for (int64_t k = begin; k < stop; k++) {
        V a[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) a[v] = load(A + k * Kp + v * L);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const V b = V{} + x[r * Kp + k];
#pragma GCC unroll 2
          for (int v = 0; v < NV; v++) acc[r][v] += b * a[v];
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) {
          C* to = out + r * Kp + v * L;
          store(to, begin == 0 ? acc[r][v] : load(to) + acc[r][v]);
        }
    }
  }

  template <int R>
  void multiply_rows(C* out, const C* x, const C* A) const {
    int64_t v = 0;
    for (; v + kNV <= nv; v += kNV) multiply_tile<R, kNV>(out + v * L, x, A + v * L, K);
    if (v < nv) multiply_tile<R, 1>(out + v * L, x, A + v * L, K);
  }

  void multiply(int rows, C* out, const C* x, const C* A) const {
    static_assert(kRows == 4);
    if (rows == 1) return multiply_rows<1>(out, x, A);
    if (rows == 2) return multiply_rows<2>(out, x, A);
    if (rows == 3) return multiply_rows<3>(out, x, A);
    return multiply_rows<4>(out, x, A);
  }

  // The terms of column j, a[i] + trans[i][j], as exponentials less their maximum: the maximum, and
  // in `term` (if any) the exponentials; `total` is their sum.
  C exact_column(const C* a, int64_t j, C* term, C& total) const {
    const C* column = transT + j * Kp;
    C highest = kNone;
    for (int64_t i = 0; i < K; i++) {
      const C x = a[i] + column[i];
      if (x > highest || x != x) highest = x;
      if (x != x) break;
    }
    total = 0;
    if (highest == kNone) highest = 0;
    for (int64_t i = 0; i < K; i++) {
      const C e = M::exp(a[i] + column[i] - highest);
      if (term) term[i] = e;
      total += e;
    }
    return highest;
  }

  // All groups, each once, by whichever thread is free.
  template <class F>
  void for_each(int threads, int64_t n, const F& f) {
    parallel(threads, [&](int thread, int) {
      for (;;) {
        const int64_t i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (i >= n) return;
        f(thread, i);
      }
    });
  }
};

// ---- forward ------------------------------------------------------------------------------------

template <class C>
struct CrfForward : CrfPass<C> {
  using Base = CrfPass<C>;
  using Base::K, Base::Kp, Base::L, Base::nv, Base::kNone, Base::kRows;
  using typename Base::Group;
  using typename Base::M;
  using typename Base::V;

  const CrfForwardParams& p;
  struct Thread {
    C *x, *s, *a;  // [kRows, Kp] each
  };

  explicit CrfForward(const CrfForwardParams& params) : Base(params), p(params) {}

  static Thread take(Scratch& scratch, int64_t Kp) {
    return {scratch.take<C>(kRows * Kp), scratch.take<C>(kRows * Kp), scratch.take<C>(kRows * Kp)};
  }

  size_t scratch_bytes() {
    Scratch scratch{nullptr};
    this->take_shared(scratch, true);
    for (int i = 0; i < p.threads; i++) take(scratch, Kp);
    return scratch.used;
  }

  void run() {
    Scratch scratch{(char*)p.scratch};
    this->take_shared(scratch, true);
    this->fill_shared(p);
    const size_t shared = scratch.used;
    Scratch one{nullptr};
    take(one, Kp);
    this->for_each(p.threads, this->groups, [&](int thread, int64_t g) {
      Scratch own{(char*)p.scratch, shared + size_t(thread) * one.used};
      run_group(this->group_of(p, g), take(own, Kp));
    });
  }

  // Keeps a less its maximum, which it returns, and x = exp(a).
  SEQKERN_INLINE C normalise(C* a, C* x, V highest, C* keep) const {
    C m = this->maximum(highest);
    if (!(m > kNone)) m = 0;  // nothing is possible, or all is NaN
    for (int64_t v = 0; v < nv; v++) {
      const V y = load(a + v * L) - m;
      store(a + v * L, y);
      if (keep) store(keep + v * L, y);
      store(x + v * L, M::exp(y));
    }
    return m;
  }

  void run_group(const Group& group, const Thread& own) const {
    double offset[kRows];
    int rows = group.rows;
    C* keep[kRows];
    for (int r = 0; r < rows; r++) {
      keep[r] = p.alphas ? (C*)p.alphas + group.row[r] * p.T * Kp : nullptr;
      C* a = own.a + r * Kp;
      const C* s = group.emissions(r, 0);
      V highest = V{} + kNone;
      for (int64_t v = 0; v < nv; v++) {
        const V y = load(this->start + v * L) + load_first(s + v * L, K - v * L);
        store(a + v * L, y);
        highest = y > highest ? y : highest;
      }
      offset[r] = double(normalise(a, own.x + r * Kp, highest, keep[r]));
    }
    for (int64_t i = 1; i < group.steps(0); i++) {
      while (group.steps(rows - 1) <= i) rows--;
      this->multiply(rows, own.s, own.x, this->E);
      for (int r = 0; r < rows; r++) {
        if (keep[r]) keep[r] += Kp;
        offset[r] +=
            step(group.emissions(r, i), own.a + r * Kp, own.x + r * Kp, own.s + r * Kp, keep[r]);
      }
    }
    for (int r = 0; r < group.rows; r++) finish(group, r, own.a + r * Kp, offset[r]);
  }

  // One step of one row; s: the sums x E.
  SEQKERN_INLINE double step(const C* emissions, C* a, C* x, C* s, C* keep) const {
    V lowest = V{} + C(1), highest = V{} + kNone;
    for (int64_t v = 0; v < nv; v++) {
      const V sum = load(s + v * L);
      lowest = sum < lowest ? sum : lowest;
    }
    const bool exact = __builtin_expect(-this->maximum(-lowest) < this->least, 0);
    if (exact) exact_logarithms(a, s);
    for (int64_t v = 0; v < nv; v++) {
      V y = load(s + v * L);
      if (!exact) y = M::log(y);
      y = y + load_first(emissions + v * L, K - v * L);
      if (!exact) y = y + load(this->column_max + v * L);
      store(a + v * L, y);
      highest = y > highest ? y : highest;
    }
    return double(normalise(a, x, highest, keep));
  }

  // s[j] becomes log sum_i exp(a[i] + trans[i][j]), -inf in the padding.
  __attribute__((noinline)) void exact_logarithms(const C* a, C* s) const {
    for (int64_t j = 0; j < K; j++) {
      if (s[j] < this->least) {
        C total;
        const C m = this->exact_column(a, j, nullptr, total);
        s[j] = total == 0 ? kNone : m + logarithm(total);
      } else {
        s[j] = logarithm(s[j]) + this->column_max[j];
      }
    }
    for (int64_t j = K; j < nv * L; j++) s[j] = kNone;
  }

  static C logarithm(C x) { return M::log(V{} + x)[0]; }

  void finish(const Group& group, int r, C* a, double offset) const {
    V highest = V{} + kNone, total{};
    for (int64_t v = 0; v < nv; v++) {
      const V y = load(a + v * L) + load(this->end + v * L);
      store(a + v * L, y);
      highest = y > highest ? y : highest;
    }
    C m = this->maximum(highest);
    if (!(m > kNone)) m = 0;
    for (int64_t v = 0; v < nv; v++) total += M::exp(load(a + v * L) - m);
    double log_z = offset + double(m) + __builtin_log(double(this->sum(total)));
    if (p.tags) log_z = score(group, r) - (log_z == -__builtin_inf() ? 0 : log_z);
    ((C*)p.value)[group.row[r]] = C(log_z);
  }

  // Of the tags. Step t follows tags[t - 1], whether that step counts or not.
  double score(const Group& group, int r) const {
    const int64_t steps = group.steps(r);
    int64_t before = group.tag(r, 0);
    double total = double(this->start[before]) + double(group.emissions(r, 0)[before]);
    for (int64_t i = 1; i < steps; i++) {
      const int64_t t = group.t(r, i), tag = group.tag(r, t);
      if (p.step) before = group.tag(r, t - 1);
      total += double(this->trans[before * Kp + tag]) + double(group.emissions(r, i)[tag]);
      before = tag;
    }
    return total + double(this->end[group.tag(r, steps - 1)]);
  }
};

// ---- backward -----------------------------------------------------------------------------------

template <class C>
struct CrfBackward : CrfPass<C> {
  using Base = CrfPass<C>;
  using Base::K, Base::Kp, Base::L, Base::nv, Base::kNone, Base::kRows, Base::kNV;
  using typename Base::Group;
  using typename Base::M;
  using typename Base::V;

  static constexpr int kChunk = 32;              // steps whose x and v are multiplied at once
  static constexpr C kMost = C(1ull << 62) * 4;  // of v, so that its products stay finite

  const CrfBackwardParams& p;
  int64_t shares;          // of the groups, each with gradients of its own
  double* gradients;       // [shares, K * K + 2 K]: of transitions, start and end
  int64_t gradients_size;  // of one share

  struct Thread {
    C *x, *s, *v, *q, *r;  // [kRows, Kp] each
    C *xs, *vs;            // [kRows, kChunk, Kp] each
    C* term;               // [Kp]
  };

  explicit CrfBackward(const CrfBackwardParams& params)
      : Base(params), p(params), gradients_size(K * (K + 2)) {
    const int64_t room = (int64_t(1) << 22) / gradients_size;  // 32 MiB of them
    shares = room < 1 ? 1 : room < 32 ? room : 32;
    if (shares > this->groups) shares = this->groups;
  }

  static Thread take(Scratch& scratch, int64_t Kp) {
    const auto rows = [&](int64_t n) { return scratch.take<C>(n * kRows * Kp); };
    return {rows(1), rows(1),      rows(1),      rows(1),
            rows(1), rows(kChunk), rows(kChunk), scratch.take<C>(Kp)};
  }

  void take_all(Scratch& scratch) {
    this->take_shared(scratch, true);
    gradients = scratch.take<double>(shares * gradients_size);
  }

  size_t scratch_bytes() {
    Scratch scratch{nullptr};
    take_all(scratch);
    for (int i = 0; i < p.threads; i++) take(scratch, Kp);
    return scratch.used;
  }

  void run() {
    Scratch scratch{(char*)p.scratch};
    take_all(scratch);
    this->fill_shared(p);
    memset(gradients, 0, size_t(shares * gradients_size) * sizeof(double));
    const size_t shared = scratch.used;
    Scratch one{nullptr};
    take(one, Kp);
    this->for_each(p.threads, shares, [&](int thread, int64_t share) {
      Scratch own{(char*)p.scratch, shared + size_t(thread) * one.used};
      const Thread mine = take(own, Kp);
      const int64_t stop = part_begin(this->groups, share + 1, shares);
      for (int64_t g = part_begin(this->groups, share, shares); g < stop; g++)
        run_group(this->group_of(p, g), mine, gradients + share * gradients_size);
    });
    if (!p.dtransitions) return;
    for (int64_t share = 1; share < shares; share++)
      for (int64_t i = 0; i < gradients_size; i++)
        gradients[i] += gradients[share * gradients_size + i];
    const auto put = [](void* to, const double* from, int64_t n) {
      for (int64_t i = 0; i < n; i++) ((C*)to)[i] = C(from[i]);
    };
    put(p.dtransitions, gradients, K * K);
    put(p.dstart, gradients + K * K, K);
    put(p.dend, gradients + K * K + K, K);
  }

  const C* alphas(const Group& group, int r, int64_t i) const {
    return (const C*)p.alphas + (group.row[r] * p.T + i) * Kp;
  }
  C* demissions(const Group& group, int r, int64_t t) const {
    return (C*)p.demissions + t * p.demissions_of_step + group.row[r] * p.demissions_of_row;
  }
  // The gradient of log Z.
  double weight(const Group& group, int r) const {
    const double dvalue = double(((const C*)p.dvalue)[group.row[r]]);
    return p.tags ? -dvalue : dvalue;
  }

  void run_group(const Group& group, const Thread& own, double* gradient) const {
    int rows = 0, filled[kRows] = {};
    double w[kRows];
    for (int r = 0; r < group.rows; r++) {
      w[r] = weight(group, r);
      for (int64_t t = p.step ? 0 : group.steps(r); t < p.T; t++)
        memset(demissions(group, r, t), 0, size_t(K) * sizeof(C));
    }
    for (int64_t i = group.steps(0) - 1; i > 0; i--) {
      for (; rows < group.rows && group.steps(rows) > i; rows++)
        begin(group, rows, w[rows], own, gradient);
      for (int r = 0; r < rows; r++) {
        put(group, r, i, w[r], own.q + r * Kp);
        const C* a = alphas(group, r, i - 1);
        for (int64_t v = 0; v < nv; v++) store(own.x + r * Kp + v * L, M::exp(load(a + v * L)));
      }
      this->multiply(rows, own.s, own.x, this->E);
      bool exact[kRows];
      for (int r = 0; r < rows; r++)
        exact[r] = divide(own.v + r * Kp, own.q + r * Kp, own.s + r * Kp);
      this->multiply(rows, own.r, own.v, this->ET);
      for (int r = 0; r < rows; r++) {
        C *x = own.x + r * Kp, *q = own.q + r * Kp, *reached = own.r + r * Kp;
        for (int64_t v = 0; v < nv; v++)
          store(reached + v * L, load(reached + v * L) * load(x + v * L));
        if (__builtin_expect(exact[r], 0))
          exact_columns(alphas(group, r, i - 1), q, own.s + r * Kp, reached, own.term, w[r],
                        gradient);
        if (i % kChunk == 0) keep_mass(reached);
        memcpy(q, reached, size_t(Kp) * sizeof(C));
        if (!p.dtransitions) continue;
        C *xs = own.xs + r * kChunk * Kp, *vs = own.vs + r * kChunk * Kp;
        memcpy(xs + filled[r] * Kp, x, size_t(Kp) * sizeof(C));
        memcpy(vs + filled[r] * Kp, own.v + r * Kp, size_t(Kp) * sizeof(C));
        if (++filled[r] == kChunk || i == 1) {
          add_products(xs, vs, filled[r], w[r], gradient);
          filled[r] = 0;
        }
      }
    }
    for (; rows < group.rows; rows++) begin(group, rows, w[rows], own, gradient);
    for (int r = 0; r < rows; r++) {
      const C* q = own.q + r * Kp;
      put(group, r, 0, w[r], q);
      for (int64_t j = 0; j < K; j++) gradient[K * K + j] += w[r] * double(q[j]);
      if (p.tags) count(group, r, -w[r], gradient);
    }
  }

  // q of a row's last step.
  void begin(const Group& group, int r, double w, const Thread& own, double* gradient) const {
    const C* a = alphas(group, r, group.steps(r) - 1);
    C* q = own.q + r * Kp;
    V highest = V{} + kNone;
    for (int64_t v = 0; v < nv; v++) {
      const V y = load(a + v * L) + load(this->end + v * L);
      store(q + v * L, y);
      highest = y > highest ? y : highest;
    }
    C m = this->maximum(highest);
    if (!(m > kNone)) m = 0;
    for (int64_t v = 0; v < nv; v++) store(q + v * L, M::exp(load(q + v * L) - m));
    keep_mass(q);
    for (int64_t j = 0; j < K; j++) gradient[K * K + K + j] += w * double(q[j]);
  }

  // Probabilities stay a whole: roundings would add up over the steps.
  void keep_mass(C* q) const {
    V total{};
    for (int64_t v = 0; v < nv; v++) total += load(q + v * L);
    const C sum = this->sum(total), factor = sum == 0 ? 0 : 1 / sum;  // 0: nothing is possible
    for (int64_t v = 0; v < nv; v++) store(q + v * L, load(q + v * L) * factor);
  }

  // demissions at the i-th step of a row.
  SEQKERN_INLINE void put(const Group& group, int r, int64_t i, double w, const C* q) const {
    const int64_t t = group.t(r, i);
    C* to = demissions(group, r, t);
    for (int64_t v = 0; v < nv; v++) store_first(to + v * L, load(q + v * L) * C(w), K - v * L);
    if (p.tags) {
      const int64_t tag = group.tag(r, t);
      to[tag] = C(w) * (q[tag] - 1);
    }
  }

  // v = q / s where that is sound and 0 elsewhere: is there an elsewhere?
  SEQKERN_INLINE bool divide(C* v, const C* q, const C* s) const {
    V bad{};
    const V zero{}, one = V{} + C(1), least = V{} + this->least, most = V{} + kMost;
    for (int64_t i = 0; i < nv; i++) {
      const V mass = load(q + i * L), sum = load(s + i * L);
      const V share = mass == 0 ? zero : mass / sum;
      const V wrong = mass == 0 ? zero : sum < least ? one : share > most ? one : zero;
      store(v + i * L, wrong == 1 ? zero : share);
      bad = wrong > bad ? wrong : bad;
    }
    return this->maximum(bad) > 0;
  }

  // What `divide` left out: reached[i] += p(i | j) q[j], and the same into the gradient.
  __attribute__((noinline)) void exact_columns(const C* a, const C* q, const C* s, C* reached,
                                               C* term, double w, double* gradient) const {
    for (int64_t j = 0; j < K; j++) {
      if (q[j] == 0 || !(s[j] < this->least || q[j] / s[j] > kMost)) continue;
      C total;
      this->exact_column(a, j, term, total);
      for (int64_t i = 0; i < K; i++) {
        const C moved = term[i] / total * q[j];
        reached[i] += moved;
        gradient[i * K + j] += w * double(moved);
      }
    }
  }

  // gradient[i][j] += w E[i][j] sum over n of xs[n][i] vs[n][j]
  void add_products(const C* xs, const C* vs, int n, double w, double* gradient) const {
    int64_t i = 0;
    for (; i + 4 <= K; i += 4) add_rows<4>(xs + i, vs, n, w, gradient + i * K, this->E + i * Kp);
    for (; i < K; i++) add_rows<1>(xs + i, vs, n, w, gradient + i * K, this->E + i * Kp);
  }

  template <int R>
  void add_rows(const C* xs, const C* vs, int n, double w, double* gradient, const C* e) const {
    int64_t v = 0;
    for (; v + kNV <= nv; v += kNV)
      add_tile<R, kNV>(xs, vs + v * L, n, w, gradient + v * L, e + v * L, K - v * L);
    if (v < nv) add_tile<R, 1>(xs, vs + v * L, n, w, gradient + v * L, e + v * L, K - v * L);
  }

  template <int R, int NV>
  SEQKERN_INLINE void add_tile(const C* xs, const C* vs, int n, double w, double* gradient,
                               const C* e, int64_t columns) const {
    V acc[R][NV] = {};
    for (int k = 0; k < n; k++) {
      V a[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) a[v] = load(vs + k * Kp + v * L);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const V b = V{} + xs[k * Kp + r];
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) acc[r][v] += b * a[v];
      }
    }
    C sums[R][NV * L];
    const int64_t width = columns < NV * L ? columns : NV * L;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) store(sums[r] + v * L, acc[r][v] * load(e + r * Kp + v * L));
      for (int64_t j = 0; j < width; j++) gradient[r * K + j] += w * double(sums[r][j]);
    }
  }

  // The score's share of the parameters' gradients.
  void count(const Group& group, int r, double dvalue, double* gradient) const {
    const int64_t steps = group.steps(r);
    gradient[K * K + group.tag(r, 0)] += dvalue;
    gradient[K * K + K + group.tag(r, steps - 1)] += dvalue;
    for (int64_t i = 1; i < steps; i++) {
      const int64_t t = group.t(r, i);
      gradient[group.tag(r, t - 1) * K + group.tag(r, t)] += dvalue;
    }
  }
};

// ---- the best sequences -------------------------------------------------------------------------
//
// Sums are in pytorch-crf's order, (v + trans) + s, and of equal sums the first tag wins, so the
// best sequence is its, bit for bit. The trace back goes by place (seqkern/reference/crf.py): over
// a step that does not count it takes the best tag before.

template <class C>
struct CrfDecode : CrfPass<C> {
  using Base = CrfPass<C>;
  using Base::K, Base::Kp, Base::L, Base::nv, Base::kNone, Base::kRows, Base::kNV;
  using typename Base::Group;
  using typename Base::V;

  const CrfDecodeParams& p;

  explicit CrfDecode(const CrfDecodeParams& params) : Base(params), p(params) {}

  struct Thread {  // of one best sequence: v [kRows, T, Kp]; of several: the following
    C* v;
    C *score, *ahead;  // [K, n] each
    int32_t* pointer;  // [T, K, n]: tag * n + rank of the place before
  };

  Thread take(Scratch& scratch) const {
    if (p.n == 1) return {scratch.take<C>(kRows * p.T * Kp), nullptr, nullptr, nullptr};
    const int64_t places = K * p.n;
    return {nullptr, scratch.take<C>(places), scratch.take<C>(places),
            scratch.take<int32_t>(p.T * places)};
  }

  size_t scratch_bytes() {
    Scratch scratch{nullptr};
    this->take_shared(scratch, false);
    for (int i = 0; i < p.threads; i++) take(scratch);
    return scratch.used;
  }

  void run() {
    Scratch scratch{(char*)p.scratch};
    this->take_shared(scratch, false);
    this->fill_shared(p);
    const size_t shared = scratch.used;
    Scratch one{nullptr};
    take(one);
    this->for_each(p.threads, this->groups, [&](int thread, int64_t g) {
      Scratch own{(char*)p.scratch, shared + size_t(thread) * one.used};
      const Thread mine = take(own);
      const Group group = this->group_of(p, g);
      if (p.n == 1) {
        best_of(group, mine.v);
      } else {
        for (int r = 0; r < group.rows; r++) several_of(group, r, mine);
      }
    });
  }

  C* scores_at(int64_t rank, int64_t row) const { return (C*)p.scores + rank * p.B + row; }
  int64_t* best_at(int64_t rank, int64_t row) const { return p.best + (rank * p.B + row) * p.T; }

  // ---- one ----

  void best_of(const Group& group, C* history) const {
    int rows = group.rows;
    C* v[kRows];
    for (int r = 0; r < rows; r++) {
      v[r] = history + r * p.T * Kp;
      const C* s = group.emissions(r, 0);
      for (int64_t u = 0; u < nv; u++)
        store(v[r] + u * L, load(this->start + u * L) + load_first(s + u * L, K - u * L));
    }
    for (int64_t i = 1; i < group.steps(0); i++) {
      while (group.steps(rows - 1) <= i) rows--;
      static_assert(kRows == 4);
      if (rows == 1) step<1>(group, i, v);
      if (rows == 2) step<2>(group, i, v);
      if (rows == 3) step<3>(group, i, v);
      if (rows == 4) step<4>(group, i, v);
      for (int r = 0; r < rows; r++) v[r] += Kp;
    }
    for (int r = 0; r < group.rows; r++) trace_back(group, r, history + r * p.T * Kp);
  }

  template <int R>
  void step(const Group& group, int64_t i, C* const* v) const {
    const C* s[R];
    for (int r = 0; r < R; r++) s[r] = group.emissions(r, i);
    int64_t u = 0;
    for (; u + kNV <= nv; u += kNV) step_tile<R, kNV>(s, v, u * L);
    if (u < nv) step_tile<R, 1>(s, v, u * L);
  }

  template <int R, int NV>
  SEQKERN_INLINE void step_tile(const C* const* s, C* const* v, int64_t column) const {
    V best[R][NV], emitted[R][NV];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int u = 0; u < NV; u++) {
        const int64_t j = column + u * L;
        emitted[r][u] = load_first(s[r] + j, K - j);
        best[r][u] = V{} + kNone;
      }
    const C* row = this->trans + column;
    for (int64_t k = 0; k < K; k++, row += Kp) {
      V t[NV];
#pragma GCC unroll 2
      for (int u = 0; u < NV; u++) t[u] = load(row + u * L);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int u = 0; u < NV; u++) {
          const V x = (t[u] + v[r][k]) + emitted[r][u];
          best[r][u] = x > best[r][u] ? x : best[r][u];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int u = 0; u < NV; u++) store(v[r] + Kp + column + u * L, best[r][u]);
  }

  void trace_back(const Group& group, int r, const C* history) const {
    const int64_t row = group.row[r], steps = group.steps(r);
    int64_t* best = best_at(0, row);
    for (int64_t t = steps; t < p.T; t++) best[t] = -1;
    const C* v = history + (steps - 1) * Kp;
    int64_t tag = 0;
    for (int64_t k = 1; k < K; k++)
      if (v[k] + this->end[k] > v[tag] + this->end[tag]) tag = k;
    *scores_at(0, row) = v[tag] + this->end[tag];
    best[steps - 1] = tag;
    int64_t i = steps - 1;  // the last step that counts up to t
    if (p.step)
      while (group.t(r, i) > steps - 1) i--;
    for (int64_t t = steps - 1; t > 0; t--) {
      const C* column = this->transT + tag * Kp;
      if (group.t(r, i) == t) {
        const C emitted = group.emissions(r, i)[tag], sum = history[i * Kp + tag];
        const C* before = history + --i * Kp;
        for (tag = 0; tag < K - 1 && (column[tag] + before[tag]) + emitted != sum; tag++) {
        }
      } else {
        const C* before = history + i * Kp;
        tag = 0;
        for (int64_t k = 1; k < K; k++)
          if (column[k] + before[k] > column[tag] + before[tag]) tag = k;
      }
      best[t - 1] = tag;
    }
  }

  // ---- several ----

  // Takes x into the n best so far, descending; equal ones in the order they came in.
  SEQKERN_INLINE void insert(C* list, int32_t* pointer, C x, int32_t from) const {
    int64_t k = p.n - 1;
    for (; k > 0 && x > list[k - 1]; k--) {
      list[k] = list[k - 1];
      pointer[k] = pointer[k - 1];
    }
    list[k] = x;
    pointer[k] = from;
  }

  void several_of(const Group& group, int r, const Thread& own) const {
    const int64_t n = p.n, places = K * n, row = group.row[r], steps = group.steps(r);
    C *score = own.score, *ahead = own.ahead;
    for (int64_t k = 0; k < places; k++) score[k] = kNone;
    for (int64_t j = 0; j < K; j++) score[j * n] = this->start[j] + group.emissions(r, 0)[j];
    int64_t i = 1;
    for (int64_t t = 1; t <= group.t(r, steps - 1); t++) {
      const C* emitted = i < steps && group.t(r, i) == t ? group.emissions(r, i) : nullptr;
      int32_t* pointer = own.pointer + t * places;
      for (int64_t j = 0; j < K; j++) {
        C* list = ahead + j * n;
        for (int64_t k = 0; k < n; k++) list[k] = kNone, pointer[j * n + k] = 0;
        for (int64_t k = 0; k < K; k++)
          for (int64_t rank = 0; rank < n; rank++) {
            const C x =
                (score[k * n + rank] + this->trans[k * Kp + j]) + (emitted ? emitted[j] : C(0));
            if (!(x > list[n - 1])) break;
            insert(list, pointer + j * n, x, int32_t(k * n + rank));
          }
      }
      if (!emitted) continue;
      C* other = score;
      score = ahead;
      ahead = other;
      i++;
    }
    int32_t* place = own.pointer;  // step 0 has no pointers: its room is free
    for (int64_t k = 0; k < n; k++) ahead[k] = kNone, place[k] = 0;
    for (int64_t j = 0; j < K; j++)
      for (int64_t rank = 0; rank < n; rank++) {
        const C x = score[j * n + rank] + this->end[j];
        if (!(x > ahead[n - 1])) break;
        insert(ahead, place, x, int32_t(j * n + rank));
      }
    for (int64_t rank = 0; rank < n; rank++) {
      int64_t* best = best_at(rank, row);
      *scores_at(rank, row) = ahead[rank];
      for (int64_t t = steps; t < p.T; t++) best[t] = -1;
      int32_t at = place[rank];
      for (int64_t t = steps - 1; t >= 0; t--) {
        best[t] = at / n;
        if (t > 0) at = own.pointer[t * places + at];
      }
    }
  }
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
