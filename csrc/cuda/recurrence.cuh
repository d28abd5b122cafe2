// The recurrence of one layer in one launch: every step, each direction, the whole batch.
//
//   forward    pre_s = W_ih x_s + b  +  W_hh h_{s-1};   h_s, c_s = cell(pre_s, h_{s-1}, c_{s-1})
//   backward   dh_s = dy_s + W_hh^T dpre_{s+1} + ...;   dpre_s = cell'(dh_s, ...)
//   projected  what the cell gives is m_s, and h_s = W_hr m_s;   backward dm_s = W_hr^T dh_s
//
// W_ih x for all steps, dx and dW are products over all rows and happen outside.
//
// Both passes are one loop: every step each *group* of blocks multiplies its matrix (forward W_hh,
// backward its transpose) by a vector per batch row that its blocks made together in the step
// before (forward h, backward dpre), applies the gates, and exchanges the new vector. The matrix
// never moves. A projection makes it two such *legs* per step (cut.h). Where rows are normalised,
// the blocks exchange a row's sums within the step, too (normalised.cuh).
//
// Who owns what (the exchange: exchange.cuh; the product: matrix.cuh)
//   group   one direction and one slice of the batch (a *job*; when there are more jobs than groups
//           they take turns). Groups never wait for one another.
//   block   some tiles of 16 units, all their gates, all rows of the slice
//   warp    of a matrix: one tile and one part ("split") of the sum over k, in registers as A
//           operands of mma.m16n8, the chunks that registers cannot hold in shared memory in the
//           same layout
//   lane    of the gates: up to kItems (row, unit) pairs, their states or those's gradients in
//           registers over all steps. The pairs of a warp are *granules*: 16 units of a tile for 2
//           rows.
//
// Sums are in a fixed order: the same inputs give the same bits.
#pragma once

#include "matrix.cuh"
#include "normalised.cuh"

namespace seqkern::cuda {

// ---- a lane's (row, unit) pairs -----------------------------------------------------------------

// One of them, of the units that a leg's matrix gives.
struct Item {
  int which, tile, n;  // tile: which-th of the block; n: row of the slice
  int b, u;            // batch row, unit
  bool there;          // are there such a row and such a unit?
};

// Item i of this lane. False: none, for the whole warp.
template <class AnyMatrix>
__device__ __forceinline__ bool item_of(const AnyMatrix& matrix, int64_t first_row, int64_t B,
                                        int64_t units, int i, Item& item) {
  const Place& place = matrix.place;
  const int granule = place.warp + i * kWarps;
  item.which = granule >> matrix.cut.log2_pairs;
  item.tile = matrix.tile_of(item.which);
  item.n = (granule - (item.which << matrix.cut.log2_pairs)) * 2 + place.lane / kTile;
  item.b = int(first_row) + item.n;
  item.u = item.tile * kTile + place.lane % kTile;
  item.there = item.b < B && item.u < units;
  return item.tile >= 0;
}

// The item's sums, added up.
template <int kM, class AnyMatrix>
__device__ __forceinline__ void sums_of(const AnyMatrix& matrix, const Item& item,
                                        float (&total)[kM]) {
  matrix.sums_of(total, item.which, item.n, matrix.place.lane % kTile);
}
template <class AnyMatrix>
__device__ __forceinline__ float sum_of(const AnyMatrix& matrix, const Item& item) {
  float total[1];
  sums_of(matrix, item, total);
  return total[0];
}

// ---- jobs ---------------------------------------------------------------------------------------

struct Job {
  int64_t d, first_row;  // direction; first batch row of the slice
  int steps;             // of the longest row
};

__device__ __forceinline__ Job job_of(const Cut& cut, const Rows& rows, int index) {
  Job job{index / cut.slices, int64_t(index % cut.slices) * cut.batch, 0};
  for (int n = 0; n < cut.batch && job.first_row + n < rows.B; n++) {
    const int length = int(length_of(rows, job.first_row + n));
    if (length > job.steps) job.steps = length;
  }
  return job;
}

// The row of (t, b); plan.cpp sees to it that there are less than 2^31.
__device__ __forceinline__ int row_at(const Rows& rows, int t, int b) {
  return (rows.first != nullptr ? int(rows.first[t]) : t * int(rows.B)) + b;
}

// ---- gates --------------------------------------------------------------------------------------

// An RNN's two activations share a kernel.
template <class Math>
struct RnnCell : RnnTanhCell<Math> {
  using Relu = RnnReluCell<Math>;
};

// A cell whose kernel regularises (params.h).
template <class Cell>
struct Regular : Cell {};
template <class Cell>
constexpr bool kIsRegular = false;
template <class Cell>
constexpr bool kIsRegular<Regular<Cell>> = true;

// Only an sLSTM has heads: kernels.h's LayerParams.
template <class Cell>
constexpr bool kHasHeads = Cell::kStates == 4;

template <int n>
constexpr int kAtLeastOne = n > 0 ? n : 1;

// Values per unit that are kept for backward; without params.h's Regularisers::on the cell's alone.
template <class Cell>
constexpr int kKeptValues =
    Cell::kSaved + (kIsRegular<Cell> ? Cell::kStates - 1 + int(Cell::kNeedsH) : 0);

// Which way direction d goes through time, and where its part of what all of that way have begins.
template <class Cell>
__device__ __forceinline__ int64_t way_of(const LayerParams& p, int64_t d) {
  return kHasHeads<Cell> ? int64_t(d >= p.heads) : d;
}
template <class Cell>
__device__ __forceinline__ int64_t head_of(const LayerParams& p, int64_t d) {
  return kHasHeads<Cell> ? (d >= p.heads ? d - p.heads : d) : 0;
}

// Of one pair and step; `bits`: the mask's.
template <class Cell>
struct KeptOf {
  float h = 0, c = 0;  // how much of the states before is kept
  Regularised<float> within;
  __device__ __forceinline__ KeptOf(const Regularisers& r, int bits)
      : within{1.0f, float(r.cell_clip)} {
    if (r.mask == nullptr) {
      h = float(r.keep_h), c = float(r.keep_c);
    } else {
      h = float(bits & 1), c = float(bits >> 1 & 1);
      within.factor = bits & 4 ? 0.0f : float(r.candidate_scale);
    }
  }
};

template <class Cell, class Within>
__device__ __forceinline__ float gates(CellKind kind, const float* pre, float h_prev, float* state,
                                       const float* own, const Within& within, float* saved) {
  if constexpr (Cell::kSaved == 0)
    if (kind == CellKind::rnn_relu)
      return Cell::Relu::forward(pre, h_prev, state, own, within, saved);
  return Cell::forward(pre, h_prev, state, own, within, saved);
}

template <class Cell, class Within>
__device__ __forceinline__ float gate_gradients(CellKind kind, float dh, float* dstate,
                                                const float* saved, float h, float h_prev,
                                                const float* prev, const float* own,
                                                const Within& within, float* dpre) {
  if constexpr (Cell::kSaved == 0)
    if (kind == CellKind::rnn_relu)
      return Cell::Relu::backward(dh, dstate, saved, h, h_prev, prev, own, within, dpre);
  return Cell::backward(dh, dstate, saved, h, h_prev, prev, own, within, dpre);
}

// A unit's own parameters, in registers over all steps.
template <class Cell, class S>
__device__ __forceinline__ void load_own(const LayerParams& p, int64_t d, int u,
                                         float (&own)[kAtLeastOne<Cell::kOwn>]) {
#pragma unroll
  for (int k = 0; k < Cell::kOwn; k++)
    own[k] = widen(static_cast<const S*>(p.own[d][0])[k * p.H + u]);
}

// The block's units' biases, to shared memory: [units][kSlots], an inner cell's likewise after
// them.
template <class Cell, class S>
__device__ __forceinline__ void load_biases(const LayerParams& p, int64_t way, int64_t head,
                                            int64_t first, int units, float* numbers) {
  constexpr int G = Cell::kGates, kSlots = Cell::kSlots;
  const int64_t H = p.H;
  const S* b_ih = static_cast<const S*>(p.b_ih[way]);
  const S* b_hh = static_cast<const S*>(p.b_hh[way]);
  if (kHasHeads<Cell> && b_ih != nullptr) b_ih += head * G * H;
  if (kHasHeads<Cell> && b_hh != nullptr) b_hh += head * G * H;
  for (int i = threadIdx.x; i < kSlots * units; i += kThreads) {
    const int slot = i % kSlots;
    const int64_t u = first + i / kSlots;
    const auto sum_of = [&](const S* of_x, const S* of_h) {
      float sum = 0;
      if (u < H && of_x != nullptr && slot < G) sum += widen(of_x[stored_slot<Cell>(slot) * H + u]);
      if (u < H && of_h != nullptr && slot >= kSlots - G)
        sum += widen(of_h[(slot - (kSlots - G)) * H + u]);
      return sum;
    };
    numbers[i] = sum_of(b_ih, b_hh);
    if constexpr (ProductsOf<Cell>::kMid == 2)
      numbers[kSlots * units + i] =
          sum_of(static_cast<const S*>(p.own[way][2]), static_cast<const S*>(p.own[way][3]));
  }
}

// Likewise what normalised rows have: [units][kRowNumbers].
template <class Cell, class S>
__device__ __forceinline__ void load_row_numbers(const LayerParams& p, int64_t way, int64_t first,
                                                 int units, float* numbers) {
  constexpr int G = Cell::kGates, kNumbers = kRowNumbers<Cell>;
  for (int i = threadIdx.x; i < kNumbers * units; i += kThreads) {
    const int k = i % kNumbers;  // of [gain_h, bias_h] each gate's, then of [gain_c, bias_c]
    const int64_t u = first + i / kNumbers;
    const bool of_h = k < 2 * G;
    const void* const from = p.own[way][of_h ? 2 + k / G : 4 + k - 2 * G];
    numbers[i] = u < p.H && from != nullptr
                     ? widen(static_cast<const S*>(from)[(of_h ? k % G : 0) * p.H + u])
                     : 0.0f;
  }
}

// By how much h is multiplied before it enters the product.
template <class S>
__device__ __forceinline__ float entering(const LayerParams& p, int64_t i) {
  const S* const scale = static_cast<const S*>(p.regularisers.scale);
  return scale == nullptr ? 1.0f : widen(scale[i]);
}

// Stands for what a layer of one leg has no need of.
struct Nothing {
  template <class... Any>
  __device__ explicit Nothing(const Any&...) {}
};
template <bool kWanted, class T>
using If = std::conditional_t<kWanted, T, Nothing>;

// ---- forward ------------------------------------------------------------------------------------

template <class Cell, class S, Product kProduct, bool kGrid, bool kProjected, int kItems>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ Cut cut,
                   const __grid_constant__ SharedLayout at) {
  constexpr int G = Cell::kGates, kSlots = Cell::kSlots, kSaved = Cell::kSaved;
  constexpr int kStates = Cell::kStates - 1, kKept = kKeptValues<Cell>;
  using Of = ProductsOf<Cell>;
  constexpr int kMid = Of::kMid;
  constexpr bool kTwoLegs = kProjected || kMid > 0;
  constexpr int kLegs = kTwoLegs ? 2 : 1;
  constexpr bool kRegular = kIsRegular<Cell>, kRows = kNormalises<Cell>;
  static_assert(!kProjected || !kRegular);
  static_assert((kMid == 0 && !kRows) || kRegular);
  SEQKERN_SHARED_MEMORY(shared);
  const Place place(cut);
  Vector<S, kProduct, 1, kGrid> hidden(cut, 0, place, shared, at);
  Matrix<S, kProduct, kLegs, 0, Of::kFirst> w_hh(cut, place, shared, at);
  // What lies between the legs: h before its projection, or mid.
  If<kTwoLegs, Vector<S, kProduct, kAtLeastOne<kMid>, kGrid>> middle(cut, 1, place, shared, at);
  If<kTwoLegs, Matrix<S, kProduct, kLegs, 1, Of::kSecond>> w_second(cut, place, shared, at);
  If<kRows, RowSums<kGrid>> row_sums(cut, place, shared, at);
  hidden.watch(w_hh.chunk0, w_hh.chunks);
  if constexpr (kTwoLegs) middle.watch(w_second.chunk0, w_second.chunks);
  // [units][kSlots] biases; of rows [units][kRowNumbers]
  float* const numbers = reinterpret_cast<float*>(shared + at.numbers);
  const int units = cut.leg[0].tiles * kTile;
  const int64_t B = p.rows.B, N = p.rows.N;
  const int H = int(p.H), P = int(p.P), D = int(p.D), Hp = int(cut.Hp);
  const int kept_values = kRegular ? p.saved : kKept;
  const int reserve_row = kRows ? int(p.reserve_row) : kept_values * Hp;

  int64_t loaded = -1;
  for (int index = place.group; index < int(D) * cut.slices; index += cut.groups) {
    const Job job = job_of(cut, p.rows, index);
    const int64_t d = job.d, way = way_of<Cell>(p, d), head = head_of<Cell>(p, d);
    if (d != loaded) {
      w_hh.load(way, head);
      if constexpr (kTwoLegs) w_second.load(way, head);
      const int64_t first = int64_t(place.member) * units;
      __syncthreads();
      if constexpr (kRows)
        load_row_numbers<Cell, S>(p, way, first, units, numbers);
      else
        load_biases<Cell, S>(p, way, head, first, units, numbers);
      __syncthreads();
    }
    loaded = d;

    // The lane's pairs: those of the gates, with c, and those of h, which are the same ones but for
    // a projection.
    const auto gate_item = [&](int i, Item& item) {
      return item_of(w_hh, job.first_row, B, H, i, item);
    };
    const auto h_item = [&](int i, Item& item) {
      if constexpr (kProjected)
        return item_of(w_second, job.first_row, B, P, i, item);
      else
        return gate_item(i, item);
    };
    float h[kItems] = {}, state[kItems][kAtLeastOne<kStates>] = {};
    float own[kItems][kAtLeastOne<Cell::kOwn>], scale[kRegular ? kItems : 1];
    int length[kItems] = {},
        h_length_[kProjected ? kItems : 1] = {};  // 0 also where nothing is there
    int h_route[kItems] = {}, m_route[kTwoLegs ? kItems : 1] = {};
    const auto h_length = [&](int i) { return kProjected ? h_length_[i] : length[i]; };
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      Item item;
      const bool gated = gate_item(i, item);
      if constexpr (kTwoLegs)
        if (gated) m_route[i] = middle.route(item.tile, item.n);
      if (gated && item.there) {
        length[i] = int(length_of(p.rows, item.b));
#pragma unroll
        for (int k = 0; k < kStates; k++)
          state[i][k] = widen(static_cast<const S*>(p.state0[k])[(d * B + item.b) * H + item.u]);
        load_own<Cell, S>(p, d, item.u, own[i]);
        if constexpr (kRegular) scale[i] = entering<S>(p, (d * B + item.b) * H + item.u);
      }
      if (!h_item(i, item)) continue;
      if (item.there) {
        if constexpr (kProjected) h_length_[i] = int(length_of(p.rows, item.b));
        h[i] = widen(static_cast<const S*>(p.h0)[(d * B + item.b) * P + item.u]);
      }
      h_route[i] = hidden.route(item.tile, item.n);
      float first = h[i];
      if constexpr (kRegular)
        if (item.there) first *= scale[i];
      if (job.steps > 0) hidden.send(h_route[i], item.tile, {first});
    }
    if (job.steps > 0) hidden.publish();

    S x[kItems][G], given[kItems] = {}, saved_[kItems][kKept + 1];
    int bits[kRegular ? kItems : 1] = {};
    // From a cell's beginning to its end.
    float begun[kMid > 0 ? kItems : 1][kSaved + 1], begun_pre[kMid > 0 ? kItems : 1][kSlots];
    int row[kItems] = {};  // of the step before
    const S* const gx = static_cast<const S*>(p.gx) + d * N * G * H;
    S* const y = static_cast<S*>(p.y) + d * P;
    S* const reserve =
        p.reserve == nullptr ? nullptr : static_cast<S*>(p.reserve) + d * reserve_row;
    const auto load = [&](int s, int i) {
      Item item;
      gate_item(i, item);
      row[i] = row_at(p.rows, time_of(way, s, length[i]), item.b);
      if constexpr (kRegular)
        if (p.regularisers.mask != nullptr)
          bits[i] = p.regularisers.mask[(int64_t(row[i]) * D + d) * H + item.u];
      const S* const from = gx + int64_t(row[i]) * (G * H) + item.u;
#pragma unroll
      for (int g = 0; g < G; g++) x[i][g] = from[g * H];
    };
    const auto store = [&](int s, int i, int at) {
      Item item;
      if constexpr (kProjected) {
        if (s < h_length(i)) {
          h_item(i, item);
          const int h_at = row_at(p.rows, time_of(way, s, h_length(i)), item.b);
          y[int64_t(h_at) * (D * P) + item.u] = narrow<S>(h[i]);
        }
      }
      if (s >= length[i]) return;
      gate_item(i, item);
      if constexpr (!kProjected) y[int64_t(at) * (D * H) + item.u] = given[i];
      if (!kRows && reserve != nullptr) {
        S* const to = reserve + int64_t(at) * (D * reserve_row) + item.u;
#pragma unroll
        for (int k = 0; k < kKept; k++)
          if (k < kSaved || p.regularisers.on) to[k * Hp] = saved_[i][k];
      }
    };

    // What regularisers make of the states that a step has made. Returns h as it enters the next
    // product.
    [[maybe_unused]] const auto blend = [&](int i, const KeptOf<Cell>& kept, float made_h,
                                            const float* made) {
      h[i] = kept.h * h[i] + (1 - kept.h) * made_h;
#pragma unroll
      for (int k = 0; k < kStates; k++) state[i][k] = kept.c * state[i][k] + (1 - kept.c) * made[k];
      given[i] = narrow<S>(h[i]);
      return h[i] * scale[i];
    };
    // All that is kept of such a step, once its states are blended.
    [[maybe_unused]] const auto keep = [&](int i, float made_h, const float* saved) {
      if constexpr (Cell::kNeedsH) saved_[i][kSaved] = narrow<S>(made_h);
#pragma unroll
      for (int k = 0; k < kStates; k++) saved_[i][kKept - kStates + k] = narrow<S>(state[i][k]);
#pragma unroll
      for (int k = 0; k < kSaved; k++) saved_[i][k] = narrow<S>(saved[k]);
    };

    for (int s = 0;; s++) {
      // While the others' part of the vector is on its way: a step's numbers from memory are asked
      // for, those of the step before are written to it.
      int last_row[kItems];
#pragma unroll
      for (int i = 0; i < kItems; i++) {
        last_row[i] = row[i];
        if (s < length[i]) load(s, i);
      }
      if (s > 0)
#pragma unroll
        for (int i = 0; i < kItems; i++) store(s - 1, i, last_row[i]);
      if (s >= job.steps) break;
      w_hh.multiply(hidden);
      // The last step's h goes nowhere: no block may be written to when it has gone.
      const bool goes_on = s + 1 < job.steps;
      if constexpr (kRows) {
        using Gates = typename Cell::Gates;
        float normalised[kItems][G], made_h[kItems];
        float made[kItems][kAtLeastOne<kStates>];  // c
        [[maybe_unused]] float o[kItems];
        const auto own_numbers = [&](const Item& item) {
          return numbers + (item.which * kTile + place.lane % kTile) * kRowNumbers<Cell>;
        };
        // To the reserve, where x's part is already: values [first, ...), and a row's reciprocal
        // deviation, which its first unit keeps. At once and not with y, since registers are
        // scarce.
        const auto keep_row = [&](int i, const Item& item, int first, const auto& values) {
          if (s >= length[i] || reserve == nullptr) return;
          S* const to = reserve + int64_t(row[i]) * (D * reserve_row) + first * Hp + item.u;
          int k = 0;
          for (const float value : values) to[k++ * Hp] = narrow<S>(value);
        };
        const auto keep_rstd = [&](int i, const Item& item, int which, float rstd) {
          if (s >= length[i] || reserve == nullptr || item.u != 0) return;
          S* const to = reserve + int64_t(row[i]) * (D * reserve_row) + kept_values * Hp;
          reinterpret_cast<float*>(to)[which] = rstd;
        };
#pragma unroll
        for (int i = 0; i < kItems; i++) {
          Item item;
          if (!gate_item(i, item)) continue;
          sums_of(w_hh, item, normalised[i]);
          Moments m = moments_of(normalised[i], item.u < H);
          m.over_units();
          row_sums.send(item.tile, item.n, m.mean, m.squares);
        }
        row_sums.exchange();
#pragma unroll
        for (int i = 0; i < kItems; i++) {
          Item item;
          if (!gate_item(i, item)) continue;
          const Moments m = row_sums.template moments<G>(item.n, H);
          const float rstd = m.rstd(float(p.eps));
          float pre_x[G], pre_h[G];
#pragma unroll
          for (int g = 0; g < G; g++) {
            normalised[i][g] = (normalised[i][g] - m.mean) * rstd;
            pre_x[g] = widen(x[i][g]);
            pre_h[g] = normalised[i][g] * own_numbers(item)[g] + own_numbers(item)[G + g];
          }
          const KeptOf<Cell> kept(p.regularisers, bits[i]);
          if constexpr (kStates == 0) {
            const float pre[4] = {pre_x[2], pre_x[0] + pre_h[0], pre_x[1] + pre_h[1], pre_h[2]};
            float saved[kSaved];
            made_h[i] = Gates::forward(pre, h[i], nullptr, nullptr, kept.within, saved);
            keep_row(i, item, 2 * G, saved);
          } else {
            float pre[G];
#pragma unroll
            for (int g = 0; g < G; g++) pre[g] = pre_x[g] + pre_h[g];
            made[i][0] = state[i][0];
            float saved[kSaved];
            Gates::make_c(pre, made[i], kept.within, saved);
            o[i] = saved[3];
            const float c[1] = {made[i][0]};
            Moments of_c = moments_of(c, item.u < H);
            of_c.over_units();
            row_sums.send(item.tile, item.n, of_c.mean, of_c.squares);
            keep_row(i, item, 2 * G, saved);  // but for the normalised c
          }
          keep_row(i, item, G, normalised[i]);
          keep_rstd(i, item, 1, rstd);
        }
        if constexpr (kStates > 0) {
          row_sums.exchange();
#pragma unroll
          for (int i = 0; i < kItems; i++) {
            Item item;
            if (!gate_item(i, item)) continue;
            const Moments m = row_sums.template moments<1>(item.n, H);
            const float rstd = m.rstd(float(p.eps));
            const float* const of_c = own_numbers(item) + 2 * G;
            const float of_row[1] = {(made[i][0] - m.mean) * rstd};
            made_h[i] = Gates::make_h(o[i], of_row[0] * of_c[0] + of_c[1]);
            keep_row(i, item, 2 * G + 4, of_row);
            keep_rstd(i, item, 2, rstd);
          }
        }
#pragma unroll
        for (int i = 0; i < kItems; i++) {
          Item item;
          if (!gate_item(i, item)) continue;
          float value = h[i];
          if (s < length[i]) {
            value = blend(i, KeptOf<Cell>(p.regularisers, bits[i]), made_h[i], made[i]);
            if (kStates > 0 && p.regularisers.on)
              keep_row(i, item, kept_values - kStates, state[i]);
          } else if (item.there) {
            value *= scale[i];
          }
          if (goes_on) hidden.send(h_route[i], item.tile, {value});
        }
      } else {
#pragma unroll
        for (int i = 0; i < kItems; i++) {
          Item item;
          if (!gate_item(i, item)) continue;
          float value = h[i];
          [[maybe_unused]] float mid[kAtLeastOne<kMid>] = {};
          if (s < length[i]) {
            const int unit = item.which * kTile + place.lane % kTile;
            float pre[kSlots], saved[kSaved + 1], w_hh_h[Of::kFirst];
            if constexpr (kSlots == 4) {
              const float4 four = reinterpret_cast<const float4*>(numbers)[unit];
              pre[0] = four.x, pre[1] = four.y, pre[2] = four.z, pre[3] = four.w;
            } else {
#pragma unroll
              for (int slot = 0; slot < kSlots; slot++) pre[slot] = numbers[unit * kSlots + slot];
            }
            sums_of(w_hh, item, w_hh_h);
#pragma unroll
            for (int slot = 0; slot < kSlots; slot++) {
              if (slot < G) pre[slot] += widen(x[i][stored_slot<Cell>(slot)]);
              if (slot >= Of::kFirstSlot && slot < Of::kFirstSlot + Of::kFirst)
                pre[slot] += w_hh_h[slot - Of::kFirstSlot];
            }
            if constexpr (kMid > 0) {
              const KeptOf<Cell> kept(p.regularisers, bits[i]);
              Cell::begin(pre, h[i], h[i] * scale[i], state[i], kept.within, begun[i], mid);
#pragma unroll
              for (int slot = 0; slot < kSlots; slot++) begun_pre[i][slot] = pre[slot];
            } else if constexpr (kRegular) {
              const KeptOf<Cell> kept(p.regularisers, bits[i]);
              float made[kAtLeastOne<kStates>];
#pragma unroll
              for (int k = 0; k < kStates; k++) made[k] = state[i][k];
              const float made_h = gates<Cell>(p.cell, pre, h[i], made, own[i], kept.within, saved);
              value = blend(i, kept, made_h, made);
              keep(i, made_h, saved);
            } else {
              value = gates<Cell>(p.cell, pre, h[i], state[i], own[i], Unregularised{}, saved);
              if constexpr (!kProjected) h[i] = value;
#pragma unroll
              for (int k = 0; k < kSaved; k++) saved_[i][k] = narrow<S>(saved[k]);
              given[i] = narrow<S>(value);
            }
          } else if constexpr (kRegular) {
            if (item.there) value *= scale[i];
          }
          if constexpr (kProjected)
            middle.send(m_route[i], item.tile, {s < length[i] ? value : 0.0f});
          else if constexpr (kMid > 0)
            middle.send(m_route[i], item.tile, mid);
          else if (goes_on)
            hidden.send(h_route[i], item.tile, {value});
        }
        if constexpr (kMid > 0) {
          middle.publish();
          w_second.multiply(middle);
#pragma unroll
          for (int i = 0; i < kItems; i++) {
            Item item;
            if (!gate_item(i, item)) continue;
            float value = h[i];
            if (s < length[i]) {
              const KeptOf<Cell> kept(p.regularisers, bits[i]);
              float second[Of::kSecond], made[kAtLeastOne<kStates>];
              sums_of(w_second, item, second);
              const int unit = item.which * kTile + place.lane % kTile;
              if constexpr (kMid == 2)
#pragma unroll
                for (int slot = 0; slot < kSlots; slot++)
                  second[slot] += numbers[kSlots * units + unit * kSlots + slot];
#pragma unroll
              for (int k = 0; k < kStates; k++) made[k] = state[i][k];
              const float made_h =
                  Cell::end(begun_pre[i], second, h[i], made, kept.within, begun[i]);
              value = blend(i, kept, made_h, made);
              keep(i, made_h, begun[i]);
            } else if (item.there) {
              value *= scale[i];
            }
            if (goes_on) hidden.send(h_route[i], item.tile, {value});
          }
        }
        if constexpr (kProjected) {
          middle.publish();
          w_second.multiply(middle);
#pragma unroll
          for (int i = 0; i < kItems; i++) {
            Item item;
            if (!h_item(i, item)) continue;
            if (s < h_length(i)) h[i] = sum_of(w_second, item);
            if (goes_on) hidden.send(h_route[i], item.tile, {h[i]});
          }
        }
      }
      if (goes_on) hidden.publish();
    }

#pragma unroll
    for (int i = 0; i < kItems; i++) {
      Item item;
      if (h_item(i, item) && item.there)
        static_cast<S*>(p.h_n)[(d * B + item.b) * P + item.u] = narrow<S>(h[i]);
      if constexpr (kStates > 0)
        if (gate_item(i, item) && item.there)
#pragma unroll
          for (int k = 0; k < kStates; k++)
            static_cast<S*>(p.state_n[k])[(d * B + item.b) * H + item.u] = narrow<S>(state[i][k]);
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------

template <class Cell, class S, Product kProduct, bool kGrid, bool kProjected, int kItems>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Cut cut,
                    const __grid_constant__ SharedLayout at) {
  constexpr int G = Cell::kGates, kSlots = Cell::kSlots, kSaved = Cell::kSaved;
  constexpr int kStates = Cell::kStates - 1, kKept = kKeptValues<Cell>;
  using Of = ProductsOf<Cell>;
  constexpr int kPlanes = Of::kPlanes, kMid = Of::kMid;
  constexpr bool kTwoLegs = kProjected || kMid > 0;
  constexpr int kLegs = kTwoLegs ? 2 : 1;
  constexpr bool kRegular = kIsRegular<Cell>, kRows = kNormalises<Cell>;
  constexpr bool kNeedsH = Cell::kNeedsH, kNeedsHPrev = Cell::kNeedsHPrev;
  SEQKERN_SHARED_MEMORY(shared);
  const Place place(cut);
  Vector<S, kProduct, Of::kFirst, kGrid> dpre_h(cut, 0, place, shared, at);
  Matrix<S, kProduct, kLegs, 0, 1> w_hh(cut, place, shared, at);  // transposed, as is the other
  // All that reaches h, or the gradients of what the second product gave.
  If<kTwoLegs, Vector<S, kProduct, Of::kNumbers, kGrid>> middle(cut, 1, place, shared, at);
  If<kTwoLegs, Matrix<S, kProduct, kLegs, 1, kAtLeastOne<kMid>>> w_second(cut, place, shared, at);
  If<kRows, RowSums<kGrid>> row_sums(cut, place, shared, at);
  [[maybe_unused]] float* const numbers = reinterpret_cast<float*>(shared + at.numbers);
  dpre_h.watch(w_hh.chunk0, w_hh.chunks);
  if constexpr (kTwoLegs) middle.watch(w_second.chunk0, w_second.chunks);
  const int64_t B = p.rows.B, N = p.rows.N;
  const int H = int(p.H), P = int(p.P), D = int(p.D), Hp = int(cut.Hp);
  const int kept_values = kRegular ? p.saved : kKept;
  const int reserve_row = kRows ? int(p.reserve_row) : kept_values * Hp;

  int64_t loaded = -1;
  for (int index = place.group; index < int(D) * cut.slices; index += cut.groups) {
    const Job job = job_of(cut, p.rows, index);
    const int64_t d = job.d, way = way_of<Cell>(p, d), head = head_of<Cell>(p, d);
    if (d != loaded) {
      w_hh.load(way, head);
      if constexpr (kTwoLegs) w_second.load(way, head);
      if constexpr (kRows) {
        const int units = cut.leg[0].tiles * kTile;
        __syncthreads();
        load_row_numbers<Cell, S>(p, way, int64_t(place.member) * units, units, numbers);
        __syncthreads();
      }
    }
    loaded = d;

    const auto h_item = [&](int i, Item& item) {
      return item_of(w_hh, job.first_row, B, P, i, item);
    };
    const auto gate_item = [&](int i, Item& item) {
      if constexpr (kProjected)
        return item_of(w_second, job.first_row, B, H, i, item);
      else
        return h_item(i, item);
    };
    // What reaches h and the other states of the step before past W_hh.
    float dh[kItems] = {}, dstate[kItems][kAtLeastOne<kStates>] = {};
    float own[kItems][kAtLeastOne<Cell::kOwn>], scale[kRegular ? kItems : 1];
    int length[kItems] = {}, h_length_[kProjected ? kItems : 1] = {};
    int dpre_route[kItems] = {}, middle_route[kTwoLegs ? kItems : 1] = {};
    const auto h_length = [&](int i) { return kProjected ? h_length_[i] : length[i]; };
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      Item item;
      const bool has_h = h_item(i, item);
      if constexpr (kTwoLegs)
        if (has_h) middle_route[i] = middle.route(item.tile, item.n);
      if (has_h && item.there) {
        if constexpr (kProjected) h_length_[i] = int(length_of(p.rows, item.b));
        if (p.dh_n != nullptr)
          dh[i] = widen(static_cast<const S*>(p.dh_n)[(d * B + item.b) * P + item.u]);
      }
      if (!gate_item(i, item)) continue;
      if (item.there) {
        length[i] = int(length_of(p.rows, item.b));
#pragma unroll
        for (int k = 0; k < kStates; k++)
          if (p.dstate_n[k] != nullptr)
            dstate[i][k] =
                widen(static_cast<const S*>(p.dstate_n[k])[(d * B + item.b) * H + item.u]);
        load_own<Cell, S>(p, d, item.u, own[i]);
        if constexpr (kRegular) scale[i] = entering<S>(p, (d * B + item.b) * H + item.u);
      }
      dpre_route[i] = dpre_h.route(item.tile, item.n);
      if (job.steps > 0) dpre_h.send(dpre_route[i], item.tile, {});
    }
    if (job.steps > 0) dpre_h.publish();

    // before: h, or the other states; no cell asks for both.
    static_assert(!kNeedsHPrev || kStates == 0);
    S dy[kItems], saved_[kItems][kSaved + 1], now[kItems], before[kItems][kAtLeastOne<kStates>];
    S all_[kProjected ? kItems : 1] = {}, dpre_[kItems][kPlanes];
    S mid_[kMid > 0 ? kItems : 1][kAtLeastOne<kMid>];
    float carry[kMid > 0 ? kItems : 1][1] = {};  // from a cell's end to its beginning
    int bits[kRegular ? kItems : 1] = {};
    [[maybe_unused]] float rstd[kRows ? kItems : 1][2];
    [[maybe_unused]] S normalised_[kRows ? kItems : 1][G];  // W_hh h
    int row[kItems] = {};  // of the step before this one in time, which is s + 1
    const S* const dy_rows = p.dy == nullptr ? nullptr : static_cast<const S*>(p.dy) + d * P;
    const S* const y = static_cast<const S*>(p.y) + d * P;
    [[maybe_unused]] const S* const reserve =
        kKept == 0 ? nullptr : static_cast<const S*>(p.reserve) + d * reserve_row;
    S* const dpre_rows = static_cast<S*>(p.dpre) + d * N * kPlanes * H;
    const auto load = [&](int s, int i) {
      Item item;
      if constexpr (kProjected) {
        if (s < h_length(i) && p.dy != nullptr) {
          h_item(i, item);
          const int64_t from = row_at(p.rows, time_of(way, s, h_length(i)), item.b);
          dy[i] = dy_rows[from * (D * P) + item.u];
        }
      }
      if (s >= length[i]) return;
      gate_item(i, item);
      row[i] = row_at(p.rows, time_of(way, s, length[i]), item.b);
      const int64_t from = row[i];
      if constexpr (kRegular)
        if (p.regularisers.mask != nullptr)
          bits[i] = p.regularisers.mask[(from * D + d) * H + item.u];
      if (!kProjected && p.dy != nullptr) dy[i] = dy_rows[from * (D * H) + item.u];
      const S* saved_from = reserve + from * (D * reserve_row) + item.u;
      if constexpr (kRows) {
        const float* const statistics =
            reinterpret_cast<const float*>(saved_from - item.u + kept_values * Hp);
        rstd[i][0] = statistics[1];
        if (kStates > 0) rstd[i][1] = statistics[2];
#pragma unroll
        for (int g = 0; g < G; g++) normalised_[i][g] = saved_from[(G + g) * Hp];
        saved_from += 2 * G * Hp;
      }
      if constexpr (kNeedsH)
        now[i] =
            kRegular && p.regularisers.on ? saved_from[kSaved * Hp] : y[from * (D * H) + item.u];
#pragma unroll
      for (int k = 0; k < kSaved; k++) saved_[i][k] = saved_from[k * Hp];
      if (s > 0) {
        const int64_t previous = row_at(p.rows, time_of(way, s - 1, length[i]), item.b);
        if constexpr (kNeedsHPrev) before[i][0] = y[previous * (D * H) + item.u];
#pragma unroll
        for (int k = 0; k < kStates; k++)
          before[i][k] =
              reserve[previous * (D * reserve_row) + (kept_values - kStates + k) * Hp + item.u];
      } else if constexpr (kNeedsHPrev) {
        before[i][0] = static_cast<const S*>(p.h0)[(d * B + item.b) * H + item.u];
      } else {
#pragma unroll
        for (int k = 0; k < kStates; k++)
          before[i][k] = static_cast<const S*>(p.state0[k])[(d * B + item.b) * H + item.u];
      }
    };
    const auto load_saved = [&](int i, float* saved, float* prev) {
#pragma unroll
      for (int k = 0; k < kSaved; k++) saved[k] = widen(saved_[i][k]);
#pragma unroll
      for (int k = 0; k < kStates; k++) prev[k] = widen(before[i][k]);
    };
    const auto store = [&](int s, int i, int at) {
      Item item;
      if constexpr (kProjected) {
        if (s < h_length(i)) {
          h_item(i, item);
          const int64_t h_at = row_at(p.rows, time_of(way, s, h_length(i)), item.b);
          static_cast<S*>(p.dh_rows)[(d * N + h_at) * P + item.u] = all_[i];
        }
      }
      if (s >= length[i]) return;
      gate_item(i, item);
      S* const to = dpre_rows + int64_t(at) * (kPlanes * H) + item.u;
#pragma unroll
      for (int slot = 0; slot < kPlanes; slot++) to[stored_slot<Cell>(slot) * H] = dpre_[i][slot];
#pragma unroll
      for (int k = 0; k < kMid; k++)
        static_cast<S*>(p.mid_rows[k])[(d * N + at) * H + item.u] = mid_[i][k];
    };

    for (int s = job.steps - 1;; s--) {
      // As in forward.
      int last_row[kItems];
#pragma unroll
      for (int i = 0; i < kItems; i++) {
        last_row[i] = row[i];
        if (s >= 0) load(s, i);
      }
      if (!kRows && s + 1 < job.steps)
#pragma unroll
        for (int i = 0; i < kItems; i++) store(s + 1, i, last_row[i]);
      if (s < 0) break;
      w_hh.multiply(dpre_h);
      if constexpr (kRows) {
        // dpre is written while the others' sums are on their way.
        using Gates = typename Cell::Gates;
        float saved[kItems][kSaved], prev[kItems][kAtLeastOne<kStates>];
        float d_gate[kItems][G] = {};  // of W_hh h's part, once gain and bias have been applied
        [[maybe_unused]] float d_c[kItems] = {};
        const auto own_numbers = [&](const Item& item) {
          return numbers + (item.which * kTile + place.lane % kTile) * kRowNumbers<Cell>;
        };
        const auto normalised = [&](int i, int g) { return widen(normalised_[i][g]); };
        const auto write = [&](int i, const Item& item, int plane, float value) {
          dpre_rows[int64_t(row[i]) * (kPlanes * H) + plane * H + item.u] = narrow<S>(value);
        };
#pragma unroll
        for (int i = 0; i < kItems; i++) {
          Item item;
          if (!gate_item(i, item)) continue;
          const float from_product = sum_of(w_hh, item);
          [[maybe_unused]] float a = 0, b = 0;
          if (s < length[i]) {
            float all = dh[i] + from_product * scale[i];
            if (p.dy != nullptr) all += widen(dy[i]);
            const KeptOf<Cell> kept(p.regularisers, bits[i]);
            load_saved(i, saved[i], prev[i]);
            const float d_made = (1 - kept.h) * all;
            dh[i] = kept.h * all;
            float dpre[4];
            if constexpr (kStates == 0) {
              dh[i] += Gates::backward(d_made, nullptr, saved[i], 0.0f, widen(before[i][0]),
                                       nullptr, nullptr, kept.within, dpre);
              d_gate[i][0] = dpre[1], d_gate[i][1] = dpre[2], d_gate[i][2] = dpre[3];
              write(i, item, 4 * G, dpre[1]);
              write(i, item, 4 * G + 1, dpre[2]);
              write(i, item, 4 * G + 2, dpre[0]);
              write(i, item, 5 * G, dpre[3]);
            } else {
              const float* const of_c = own_numbers(item) + 2 * G;
              const float of_row = saved[i][4];
              const float d = Gates::h_backward(d_made, saved[i], of_row * of_c[0] + of_c[1], dpre);
              d_gate[i][3] = dpre[3];
              d_c[i] = d * of_c[0];
              a = d_c[i], b = d_c[i] * of_row;
              write(i, item, 5 * G, d * of_row);
              write(i, item, 5 * G + 1, d);
            }
          }
          if constexpr (kStates > 0) {
            sum_over_units(a, b);
            row_sums.send(item.tile, item.n, a, b);
          }
        }
        if constexpr (kStates > 0) row_sums.exchange();
#pragma unroll
        for (int i = 0; i < kItems; i++) {
          Item item;
          if (!gate_item(i, item)) continue;
          if constexpr (kStates > 0) {
            float sum, slope;
            row_sums.sums(item.n, sum, slope);
            if (s < length[i]) {
              const KeptOf<Cell> kept(p.regularisers, bits[i]);
              float made[1] = {(1 - kept.c) * dstate[i][0]};
              const float dc =
                  made[0] + through_norm(d_c[i], saved[i][4], sum, slope, float(H), rstd[i][1]);
              Gates::c_backward(dc, made, saved[i], prev[i], kept.within, d_gate[i]);
              dstate[i][0] = made[0] + kept.c * dstate[i][0];
#pragma unroll
              for (int g = 0; g < G; g++) write(i, item, 4 * G + g, d_gate[i][g]);
            }
          }
          float a = 0, b = 0;
          if (s < length[i])
#pragma unroll
            for (int g = 0; g < G; g++) {
              write(i, item, 3 * G + g, d_gate[i][g] * normalised(i, g));
              d_gate[i][g] *= own_numbers(item)[g];
              a += d_gate[i][g], b += d_gate[i][g] * normalised(i, g);
            }
          sum_over_units(a, b);
          row_sums.send(item.tile, item.n, a, b);
        }
        row_sums.exchange();
#pragma unroll
        for (int i = 0; i < kItems; i++) {
          Item item;
          if (!gate_item(i, item)) continue;
          float sum, slope, from_h[G] = {};
          row_sums.sums(item.n, sum, slope);
          if (s < length[i])
#pragma unroll
            for (int g = 0; g < G; g++) {
              from_h[g] = through_norm(d_gate[i][g], normalised(i, g), sum, slope, float(G * H),
                                       rstd[i][0]);
              write(i, item, G + g, from_h[g]);
            }
          dpre_h.send(dpre_route[i], item.tile, from_h);
        }
      } else {
        if constexpr (kProjected) {
#pragma unroll
          for (int i = 0; i < kItems; i++) {
            Item item;
            if (!h_item(i, item)) continue;
            float all = 0;
            if (s < h_length(i)) {
              all = dh[i] + sum_of(w_hh, item);
              if (p.dy != nullptr) all += widen(dy[i]);
              dh[i] = 0;
              all_[i] = narrow<S>(all);
            }
            middle.send(middle_route[i], item.tile, {all});
          }
          middle.publish();
          w_second.multiply(middle);
        }
        if constexpr (kMid > 0) {
#pragma unroll
          for (int i = 0; i < kItems; i++) {
            Item item;
            if (!gate_item(i, item)) continue;
            float from_mid[Of::kNumbers] = {};
            if (s < length[i]) {
              float all = dh[i] + sum_of(w_hh, item) * scale[i];
              if (p.dy != nullptr) all += widen(dy[i]);
              const KeptOf<Cell> kept(p.regularisers, bits[i]);
              float saved[kSaved], dpre[kPlanes], prev[kAtLeastOne<kStates>];
              float made[kAtLeastOne<kStates>];
              load_saved(i, saved, prev);
#pragma unroll
              for (int k = 0; k < kStates; k++) made[k] = (1 - kept.c) * dstate[i][k];
              const float h_prev = kNeedsHPrev ? widen(before[i][0]) : 0.0f;
              Cell::end_backward((1 - kept.h) * all, made, saved, h_prev, prev, kept.within, dpre,
                                 carry[i], dh[i]);
              dh[i] += kept.h * all;
#pragma unroll
              for (int k = 0; k < kStates; k++) dstate[i][k] = made[k] + kept.c * dstate[i][k];
#pragma unroll
              for (int k = Cell::kEndPlane; k < kPlanes; k++) {
                dpre_[i][k] = narrow<S>(dpre[k]);
                if (k >= Of::kMidPlane && k < Of::kMidPlane + Of::kNumbers)
                  from_mid[k - Of::kMidPlane] = dpre[k];
              }
            }
            middle.send(middle_route[i], item.tile, from_mid);
          }
          middle.publish();
          w_second.multiply(middle);
        }
#pragma unroll
        for (int i = 0; i < kItems; i++) {
          Item item;
          if (!gate_item(i, item)) continue;
          float from_h[Of::kFirst] = {};
          if constexpr (kMid > 0) {
            if (s < length[i]) {
              const KeptOf<Cell> kept(p.regularisers, bits[i]);
              float saved[kSaved], dpre[kPlanes], prev[kAtLeastOne<kStates>], dmid[kMid], mid[kMid];
              load_saved(i, saved, prev);
              sums_of(w_second, item, dmid);
              const float h_prev = kNeedsHPrev ? widen(before[i][0]) : 0.0f;
              Cell::begin_backward(dmid, dstate[i], saved, h_prev, h_prev * scale[i], scale[i],
                                   prev, kept.within, carry[i], dpre, dh[i], mid);
#pragma unroll
              for (int k = 0; k < kMid; k++) mid_[i][k] = narrow<S>(mid[k]);
#pragma unroll
              for (int k = 0; k < kSlots; k++) {
                if (k < Cell::kEndPlane) dpre_[i][k] = narrow<S>(dpre[k]);
                if (k >= Of::kFirstSlot && k < Of::kFirstSlot + Of::kFirst)
                  from_h[k - Of::kFirstSlot] = widen(dpre_[i][k]);
              }
            }
          } else if (s < length[i]) {
            float all;
            if constexpr (kProjected) {
              all = sum_of(w_second, item);
            } else {
              if constexpr (kRegular)
                all = dh[i] + sum_of(w_hh, item) * scale[i];
              else
                all = dh[i] + sum_of(w_hh, item);
              if (p.dy != nullptr) all += widen(dy[i]);
            }
            float saved[kSaved + 1], dpre[kPlanes], prev[kAtLeastOne<kStates>];
            load_saved(i, saved, prev);
            const float h_now = kNeedsH ? widen(now[i]) : 0.0f;
            const float h_prev = kNeedsHPrev ? widen(before[i][0]) : 0.0f;
            float past;
            if constexpr (kRegular) {
              const KeptOf<Cell> kept(p.regularisers, bits[i]);
              float made[kAtLeastOne<kStates>];
#pragma unroll
              for (int k = 0; k < kStates; k++) made[k] = (1 - kept.c) * dstate[i][k];
              past = gate_gradients<Cell>(p.cell, (1 - kept.h) * all, made, saved, h_now, h_prev,
                                          prev, own[i], kept.within, dpre);
              past += kept.h * all;
#pragma unroll
              for (int k = 0; k < kStates; k++) dstate[i][k] = made[k] + kept.c * dstate[i][k];
            } else {
              past = gate_gradients<Cell>(p.cell, all, dstate[i], saved, h_now, h_prev, prev,
                                          own[i], Unregularised{}, dpre);
            }
            if constexpr (!kProjected) dh[i] = past;
#pragma unroll
            for (int slot = 0; slot < kPlanes; slot++) {
              dpre_[i][slot] = narrow<S>(dpre[slot]);
              if (slot >= kSlots - G && slot < kSlots) from_h[slot - (kSlots - G)] = dpre[slot];
            }
          }
          dpre_h.send(dpre_route[i], item.tile, from_h);
        }
      }
      dpre_h.publish();
    }

    if (job.steps > 0) w_hh.multiply(dpre_h);
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      Item item;
      if (h_item(i, item) && item.there) {
        if (job.steps > 0) {
          if constexpr (kRegular)
            dh[i] += sum_of(w_hh, item) * scale[i];
          else
            dh[i] += sum_of(w_hh, item);
        }
        static_cast<S*>(p.dh0)[(d * B + item.b) * P + item.u] = narrow<S>(dh[i]);
      }
      if constexpr (kStates > 0)
        if (gate_item(i, item) && item.there)
#pragma unroll
          for (int k = 0; k < kStates; k++)
            static_cast<S*>(p.dstate0[k])[(d * B + item.b) * H + item.u] = narrow<S>(dstate[i][k]);
    }
  }
}

}  // namespace seqkern::cuda
