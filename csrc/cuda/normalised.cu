// The cells whose rows are normalised (normalised.cuh): a step of W_hh h's part and the gates, and
// all rows of W_ih x's part at once.
//
// A block owns one row (d, b), or (d, n): a thread some units, the same ones in every pass, so that
// what it keeps in `held` between passes is its own. Sums over a row are made in a fixed order.

#include "normalised.cuh"
#include "stepwise.cuh"

namespace seqkern::cuda {
namespace {

constexpr int kRowWarps = kStepThreads / 32;

// Sums over the block, to all threads. `shared`: of kN * kRowWarps.
template <int kN, class C>
__device__ __forceinline__ void sum_over_block(C (&value)[kN], C* shared) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  for (int n = 0; n < kN; n++)
    for (int distance = 16; distance > 0; distance /= 2)
      value[n] += __shfl_xor_sync(0xffffffffu, value[n], distance);
  __syncthreads();  // what was summed before has been read
  if (lane == 0)
    for (int n = 0; n < kN; n++) shared[n * kRowWarps + warp] = value[n];
  __syncthreads();
  for (int n = 0; n < kN; n++) {
    value[n] = 0;
    for (int i = 0; i < kRowWarps; i++) value[n] += shared[n * kRowWarps + i];
  }
}

// Values of the reserve before the gates' own.
template <class Kind>
constexpr int kValues = 2 * Kind::kGates;
template <class Kind>
constexpr bool kIsGru = Kind::kStates == 1;

// Of n numbers, which the block's threads share.
template <class C>
struct RowMoments {
  C mean, rstd;
};
template <class S, class C>
__device__ __forceinline__ RowMoments<C> row_moments(const S* row, int64_t n, double eps,
                                                     C* shared) {
  C mean[1] = {}, squares[1] = {};
  for (int64_t k = threadIdx.x; k < n; k += kStepThreads) mean[0] += widen(row[k]);
  sum_over_block(mean, shared);
  mean[0] /= C(n);
  for (int64_t k = threadIdx.x; k < n; k += kStepThreads) {
    const C off = widen(row[k]) - mean[0];
    squares[0] += off * off;
  }
  sum_over_block(squares, shared);
  return {mean[0], 1 / sqrt(squares[0] / C(n) + C(eps))};
}

// The row of this block, its units to be filled in.
__device__ __forceinline__ Element row_of_block(const LayerParams& p, int64_t s) {
  return element_of(p, int64_t(blockIdx.x) * p.H, p.H, s);
}
__device__ __forceinline__ void take_unit(Element& e, int64_t u) { e.i += u - e.u, e.u = u; }

// Value `plane` of an element in held, [D, B, values, H].
template <class S>
__device__ __forceinline__ Compute<S>* held_at(void* held, const LayerParams& p, const Element& e,
                                               int values) {
  return out<Compute<S>>(held) + ((e.d * p.rows.B + e.b) * values) * p.H + e.u;
}

template <class S>
__device__ __forceinline__ Compute<S>* statistics_of(const LayerParams& p, void* reserve,
                                                     const Element& e) {
  S* const row = out<S>(reserve) + at_reserve(p, e, e.row);
  return reinterpret_cast<Compute<S>*>(row + p.saved * padded(p.H));
}

// ---- forward ------------------------------------------------------------------------------------

// A block's row (d, n) of all; false: not a valid one.
__device__ __forceinline__ bool row_of_all(const LayerParams& p, Element& e) {
  const int64_t n = blockIdx.x;
  e = Element{};
  e.d = n / p.rows.N, e.row = n % p.rows.N, e.way = e.d >= p.heads;
  if (p.rows.first != nullptr || p.rows.lengths == nullptr) return true;
  return e.row / p.rows.B < length_of(p.rows, e.row % p.rows.B);
}

// gx = gain_i norm(gx) + its bias + b_ih, and what backward wants of it to the reserve, at valid
// rows.
template <class Kind, class S>
__global__ void normalise_input_kernel(const ForwardParams p, void* gx) {
  using C = Compute<S>;
  constexpr int G = Kind::kGates;
  SEQKERN_SHARED_MEMORY(shared);
  C* const sums = reinterpret_cast<C*>(shared);
  Element e;
  if (!row_of_all(p, e)) return;
  const int64_t H = p.H, Hp = padded(H);
  const void* const* const own = p.own[e.way];
  S* const row = out<S>(gx) + (e.d * p.rows.N + e.row) * G * H;
  S* const reserve = p.reserve == nullptr ? nullptr : out<S>(p.reserve) + at_reserve(p, e, e.row);

  const auto [mean, rstd] = row_moments(row, G * H, p.eps, sums);
  for (int64_t u = threadIdx.x; u < H; u += kStepThreads) {
    e.u = u;
    for (int k = 0; k < G; k++) {
      const int64_t at = k * H + u;
      const C x = (widen(row[at]) - mean) * rstd;
      if (reserve != nullptr) reserve[k * Hp + u] = narrow<S>(x);
      row[at] = narrow<S>(x * number<S>(own[0], at) + number<S>(own[1], at) +
                          bias_of<S>(p, p.b_ih, e, G, k));
    }
  }
  if (reserve != nullptr && threadIdx.x == 0) statistics_of<S>(p, p.reserve, e)[0] = rstd;
}

// Overwrites y, reserve but for x's part, h, h_in and the states of the rows valid at this step,
// and held.
template <class Kind, class S>
__global__ void normalised_forward_kernel(const ForwardParams p, const ForwardStep step) {
  using C = Compute<S>;
  using Cell = typename Kind::Gates;
  constexpr int G = Kind::kGates, kHeld = 6;
  SEQKERN_SHARED_MEMORY(shared);
  C* const sums = reinterpret_cast<C*>(shared);
  Element e = row_of_block(p, step.s);
  if (e.row < 0) return;
  const int64_t H = p.H, Hp = padded(H);
  const void* const* const own = p.own[e.way];
  const S* const gx = in<S>(p.gx) + (e.d * p.rows.N + e.row) * G * H;
  const S* const gh = in<S>(step.products[0]) + (e.d * p.rows.B + e.b) * G * H;
  S* const reserve = p.reserve == nullptr ? nullptr : out<S>(p.reserve) + at_reserve(p, e, e.row);

  const auto [mean, rstd] = row_moments(gh, G * H, p.eps, sums);

  C sum_c[1] = {};
  for (int64_t u = threadIdx.x; u < H; u += kStepThreads) {
    take_unit(e, u);
    C x[G], h[G];
    for (int k = 0; k < G; k++) {
      const int64_t at = k * H + u;
      x[k] = widen(gx[at]);
      h[k] = (widen(gh[at]) - mean) * rstd;
      if (reserve != nullptr) reserve[(G + k) * Hp + u] = narrow<S>(h[k]);
      h[k] = h[k] * number<S>(own[2], at) + number<S>(own[3], at);
    }
    const Kept<S> kept = kept_of<S>(p, e);
    if constexpr (kIsGru<Kind>) {
      const C pre[4] = {x[2], x[0] + h[0], x[1] + h[1], h[2]};
      const C h_prev = widen(out<S>(step.h)[e.i]);
      C saved[Cell::kSaved];
      const C made = Cell::forward(pre, h_prev, nullptr, nullptr, kept.within, saved);
      give<Cell, S>(p, step, e, kept, made, h_prev, nullptr, nullptr, saved, kValues<Kind>);
    } else {
      C pre[4], state[1] = {out<C>(step.state[0])[e.i]}, saved[Cell::kSaved];
      for (int k = 0; k < 4; k++) pre[k] = x[k] + h[k];
      Cell::make_c(pre, state, kept.within, saved);
      C* const held = held_at<S>(step.held, p, e, kHeld);
      for (int k = 0; k < Cell::kSaved; k++) held[k * H] = saved[k];
      sum_c[0] += saved[5];
    }
  }
  if (reserve != nullptr && threadIdx.x == 0) statistics_of<S>(p, p.reserve, e)[1] = rstd;
  if constexpr (!kIsGru<Kind>) {
    sum_over_block(sum_c, sums);
    const C mean_c = sum_c[0] / C(H);
    C squares_c[1] = {};
    for (int64_t u = threadIdx.x; u < H; u += kStepThreads) {
      take_unit(e, u);
      const C off = held_at<S>(step.held, p, e, kHeld)[5 * H] - mean_c;
      squares_c[0] += off * off;
    }
    sum_over_block(squares_c, sums);
    const C rstd_c = 1 / sqrt(squares_c[0] / C(H) + C(p.eps));
    if (reserve != nullptr && threadIdx.x == 0) statistics_of<S>(p, p.reserve, e)[2] = rstd_c;
    for (int64_t u = threadIdx.x; u < H; u += kStepThreads) {
      take_unit(e, u);
      C saved[Cell::kSaved];
      const C* const held = held_at<S>(step.held, p, e, kHeld);
      for (int k = 0; k < Cell::kSaved; k++) saved[k] = held[k * H];
      saved[4] = (saved[5] - mean_c) * rstd_c;
      const C c = saved[4] * number<S>(own[4], u) + number<S>(own[5], u);
      const C state[1] = {saved[5]}, before[1] = {out<C>(step.state[0])[e.i]};
      give<Cell, S>(p, step, e, kept_of<S>(p, e), Cell::make_h(saved[3], c),
                    widen(out<S>(step.h)[e.i]), state, before, saved, kValues<Kind>);
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------

// Overwrites dh, dstate and dpre (but for x's planes) of the rows valid at this step, held, and
// dpre_h.
template <class Kind, class S>
__global__ void normalised_backward_kernel(const BackwardParams p, const BackwardStep step) {
  using C = Compute<S>;
  using Cell = typename Kind::Gates;
  constexpr int G = Kind::kGates, kHeld = G + 1;
  SEQKERN_SHARED_MEMORY(shared);
  C* const sums = reinterpret_cast<C*>(shared);
  Element e = row_of_block(p, step.s);
  const int64_t H = p.H, Hp = padded(H);
  S* const dpre_h = out<S>(step.dpre_h) + (e.d * p.rows.B + e.b) * G * H;
  if (e.row < 0) {
    for (int64_t k = threadIdx.x; k < G * H; k += kStepThreads) dpre_h[k] = narrow<S>(C(0));
    return;
  }
  const void* const* const own = p.own[e.way];
  const S* const reserve = in<S>(p.reserve) + at_reserve(p, e, e.row);
  const C* const statistics = reinterpret_cast<const C*>(reserve + p.saved * Hp);

  // The gradients of what gain and bias make, [G] in held; a GRU's n of W_hh h in the last of held.
  if constexpr (kIsGru<Kind>) {
    for (int64_t u = threadIdx.x; u < H; u += kStepThreads) {
      take_unit(e, u);
      Saved<Cell, S> saved(p, e, kValues<Kind>);
      const C dh = saved.take_h(p, step, e);
      C dpre[4];
      const C past = Cell::backward(dh, nullptr, saved.value, C(0), h_before<S>(p, e), nullptr,
                                    nullptr, saved.kept.within, dpre);
      saved.give_h(step, e, past);
      C* const held = held_at<S>(step.held, p, e, kHeld);
      held[0] = dpre[1], held[H] = dpre[2], held[2 * H] = dpre[0], held[3 * H] = dpre[3];
      dpre_of<S>(p, e)[5 * G * H] = narrow<S>(dpre[3]);
    }
  } else {
    C row[2] = {};
    for (int64_t u = threadIdx.x; u < H; u += kStepThreads) {
      take_unit(e, u);
      Saved<Cell, S> saved(p, e, kValues<Kind>);
      const C dh = saved.take_h(p, step, e), gain = number<S>(own[4], u);
      const C normalised = saved.value[4];
      C dpre[4];
      const C d = Cell::h_backward(dh, saved.value, normalised * gain + number<S>(own[5], u), dpre);
      saved.give_h(step, e, C(0));
      C* const held = held_at<S>(step.held, p, e, kHeld);
      held[3 * H] = dpre[3], held[4 * H] = d * gain;
      S* const to = dpre_of<S>(p, e);
      to[5 * G * H] = narrow<S>(d * normalised), to[(5 * G + 1) * H] = narrow<S>(d);
      row[0] += d * gain, row[1] += d * gain * normalised;
    }
    sum_over_block(row, sums);
    for (int64_t u = threadIdx.x; u < H; u += kStepThreads) {
      take_unit(e, u);
      Saved<Cell, S> saved(p, e, kValues<Kind>);
      saved.take_states(p, step, e);
      C* const held = held_at<S>(step.held, p, e, kHeld);
      C dpre[4];
      const C dc = saved.dstate[0] +
                   through_norm(held[4 * H], saved.value[4], row[0], row[1], C(H), statistics[2]);
      Cell::c_backward(dc, saved.dstate, saved.value, saved.prev, saved.kept.within, dpre);
      saved.give_states(step, e);
      for (int k = 0; k < 3; k++) held[k * H] = dpre[k];
    }
  }

  // To those of the product.
  C row[2] = {};
  for (int64_t u = threadIdx.x; u < H; u += kStepThreads) {
    take_unit(e, u);
    const C* const held = held_at<S>(step.held, p, e, kHeld);
    S* const to = dpre_of<S>(p, e);
    for (int k = 0; k < G; k++) {
      const C d = held[(kIsGru<Kind> && k == 2 ? 3 : k) * H];
      const C h = widen(reserve[(G + k) * Hp + u]), of_h = d * number<S>(own[2], k * H + u);
      to[(3 * G + k) * H] = narrow<S>(d * h);
      to[(4 * G + k) * H] = narrow<S>(held[k * H]);
      row[0] += of_h, row[1] += of_h * h;
    }
  }
  sum_over_block(row, sums);
  for (int64_t u = threadIdx.x; u < H; u += kStepThreads) {
    take_unit(e, u);
    const C* const held = held_at<S>(step.held, p, e, kHeld);
    S* const to = dpre_of<S>(p, e);
    for (int k = 0; k < G; k++) {
      const C d = held[(kIsGru<Kind> && k == 2 ? 3 : k) * H] * number<S>(own[2], k * H + u);
      const C h = widen(reserve[(G + k) * Hp + u]);
      to[(G + k) * H] = dpre_h[k * H + u] =
          narrow<S>(through_norm(d, h, row[0], row[1], C(G) * C(H), statistics[1]));
    }
  }
}

// dpre's planes of x and its gain, at valid rows, of those of the pre-activations.
template <class Kind, class S>
__global__ void normalise_input_backward_kernel(const BackwardParams p) {
  using C = Compute<S>;
  constexpr int G = Kind::kGates;
  SEQKERN_SHARED_MEMORY(shared);
  C* const sums = reinterpret_cast<C*>(shared);
  Element e;
  if (!row_of_all(p, e)) return;
  const int64_t H = p.H, Hp = padded(H);
  const void* const gain = p.own[e.way][0];
  const S* const reserve = in<S>(p.reserve) + at_reserve(p, e, e.row);
  S* const dpre = dpre_of<S>(p, e);
  C row[2] = {};
  const auto each = [&](auto use) {
    for (int64_t u = threadIdx.x; u < H; u += kStepThreads)
      for (int k = 0; k < G; k++) {
        const C d = widen(dpre[(4 * G + k) * H + u]), x = widen(reserve[k * Hp + u]);
        use(k, u, d, x, d * number<S>(gain, k * H + u));
      }
  };
  each([&](int k, int64_t u, C d, C x, C of_x) {
    dpre[(2 * G + k) * H + u] = narrow<S>(d * x);
    row[0] += of_x, row[1] += of_x * x;
  });
  sum_over_block(row, sums);
  const C rstd = reinterpret_cast<const C*>(reserve + p.saved * Hp)[0];
  each([&](int k, int64_t u, C, C x, C of_x) {
    dpre[k * H + u] = narrow<S>(through_norm(of_x, x, row[0], row[1], C(G) * C(H), rstd));
  });
}

template <class Body>
void with_kind(CellKind cell, Dtype dtype, Body body) {
  with_dtype(dtype, [&](auto s) {
    using M = Math<TypeOf<decltype(s)>>;
    if (cell == CellKind::layer_norm_lstm) return body(Type<NormalisedLstmCell<M>>(), s);
    return body(Type<NormalisedGruCell<M>>(), s);
  });
}

constexpr size_t kSharedBytes = 2 * kRowWarps * sizeof(double);

}  // namespace

void normalise_input(const ForwardParams& params, void* gx, void* stream) {
  with_kind(params.cell, params.dtype, [&](auto kind, auto s) {
    launch_blocks("normalise_input_kernel", stream, params.D * params.rows.N, kSharedBytes,
                  normalise_input_kernel<TypeOf<decltype(kind)>, TypeOf<decltype(s)>>, params, gx);
  });
}

void normalise_input_backward(const BackwardParams& params, void* stream) {
  with_kind(params.cell, params.dtype, [&](auto kind, auto s) {
    launch_blocks("normalise_input_backward_kernel", stream, params.D * params.rows.N, kSharedBytes,
                  normalise_input_backward_kernel<TypeOf<decltype(kind)>, TypeOf<decltype(s)>>,
                  params);
  });
}

void normalised_forward(const ForwardParams& params, const ForwardStep& step, void* stream) {
  with_kind(params.cell, params.dtype, [&](auto kind, auto s) {
    launch_blocks("normalised_forward_kernel", stream, params.D * params.rows.B, kSharedBytes,
                  normalised_forward_kernel<TypeOf<decltype(kind)>, TypeOf<decltype(s)>>, params,
                  step);
  });
}

void normalised_backward(const BackwardParams& params, const BackwardStep& step, void* stream) {
  with_kind(params.cell, params.dtype, [&](auto kind, auto s) {
    launch_blocks("normalised_backward_kernel", stream, params.D * params.rows.B, kSharedBytes,
                  normalised_backward_kernel<TypeOf<decltype(kind)>, TypeOf<decltype(s)>>, params,
                  step);
  });
}

}  // namespace seqkern::cuda
