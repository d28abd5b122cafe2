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
// never moves. A projection makes it two such *legs* per step (cut.h).
//
// Who owns what
//   group   one direction and one slice of the batch (a *job*; when there are more jobs than groups
//           they take turns). Groups never wait for one another.
//   block   some tiles of 16 units, all their gates, all rows of the slice
//   warp    of a matrix: one tile and one part ("split") of the sum over k, in registers as A
//           operands of mma.m16n8, the chunks that registers cannot hold in shared memory in the
//           same layout
//   lane    of the gates: kItems (row, unit) pairs, their c, h or dh, dc in registers over all
//   steps.
//           The pairs of a warp are *granules*: one tile's 16 units (lane % 16) for 2 rows.
//
// The order of k within a chunk is free, as long as matrix and vector agree: lane q of four takes
// the 16 bytes at 16 q of a row as its part of two matrix instructions' operands. So a fragment is
// one 16-byte load, from wherever the vector lies.
//
// The exchange is double buffered. With a vector's epochs counted from 1, a block writes epoch e +
// 2 over epoch e only after it has seen the whole of epoch e + 1, each piece of which was sent by a
// warp of a block that had finished with epoch e (sums are handed over by __syncthreads).
//   block     stores to shared memory, __syncthreads
//   cluster   16-byte pushes into every block's shared memory, counted by a transaction barrier
//   grid      stores to L2; each block then raises its flag to the epoch, and each warp waits for
//   the
//             flags of the blocks whose units its chunks are
// Sums are in a fixed order: the same inputs give the same bits.
#pragma once

#include "cut.h"
#include "kernels.h"
#include "math.cuh"
#include "ptx.cuh"

namespace seqkern::cuda {

// How numbers stored as S are multiplied. 3 x TF32 (Ootomo & Yokota 2022: high and low parts,
// without low * low) is as good as float32.
enum class Product { f16, bf16, tf32, tf32_3 };

// What a kernel is handed of a leg beside its params.
struct LegCut {
  int tiles, splits;      // of a block, as in Plan
  int all_tiles;          // of units that the matrix gives
  int chunks;             // of k
  int64_t Hp, Kp;         // the matrix: [m, Hp, Kp]
  const void* matrix[2];  // [D]
  // The vector: what its owners, the blocks with tiles of the other leg (or of the only one), give.
  int vector_tiles, all_vector_tiles;
  unsigned char* exchange;  // [groups][2][columns][chunks][8][64], Tier::grid only
  uint32_t* flags;          // [groups][blocks], Tier::grid only
};

struct Cut {
  int blocks, groups, batch, slices;  // as in Plan
  int log2_pairs;                     // of batch / 2
  int64_t Hp;                         // H rounded up to 16: the reserve's
  LegCut leg[2];
};

template <Product kProduct>
__device__ __forceinline__ void multiply_add(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (kProduct == Product::f16) {
    mma_f16(acc, a0, a1, a2, a3, b0, b1);
  } else if constexpr (kProduct == Product::bf16) {
    mma_bf16(acc, a0, a1, a2, a3, b0, b1);
  } else if constexpr (kProduct == Product::tf32) {
    mma_tf32(acc, a0, a1, a2, a3, b0, b1);
  } else {
    const uint32_t whole[6] = {a0, a1, a2, a3, b0, b1};
    uint32_t high[6], low[6];
#pragma unroll
    for (int i = 0; i < 6; i++) {
      const float x = __uint_as_float(whole[i]), upper = to_tf32(x);
      high[i] = __float_as_uint(upper);
      low[i] = __float_as_uint(to_tf32(x - upper));
    }
    mma_tf32(acc, low[0], low[1], low[2], low[3], high[4], high[5]);
    mma_tf32(acc, high[0], high[1], high[2], high[3], low[4], low[5]);
    mma_tf32(acc, high[0], high[1], high[2], high[3], high[4], high[5]);
  }
}

// Where this thread stands.
struct Place {
  int warp, lane, group, member;  // member: of the group's blocks

  __device__ explicit Place(const Cut& cut)
      : warp(int(threadIdx.x) / 32),
        lane(int(threadIdx.x) % 32),
        group(int(blockIdx.x) / cut.blocks),
        member(int(blockIdx.x) % cut.blocks) {}
};

// ---- the exchange of one leg's vector -----------------------------------------------------------

//   kNumbers  that a unit gives
//   kGrid     through L2, else through shared memory
template <class S, Product kProduct, int kNumbers, bool kGrid>
struct Vector {
  static constexpr int kTileBytes = kTile * int(sizeof(S)) * kNumbers;

  const Cut& cut;
  const LegCut& leg;
  const Place& place;
  uint32_t epoch;  // of the last exchange
  unsigned char *buffers, *stage;
  uint64_t* barriers;

  __device__ Vector(const Cut& cut, int i, const Place& place, unsigned char* shared,
                    const SharedLayout& at)
      : cut(cut),
        leg(cut.leg[i]),
        place(place),
        epoch(0),
        buffers(kGrid ? leg.exchange + place.group * 2 * buffer_bytes() : shared + at.exchange[i]),
        stage(shared + at.stage + place.warp * at.stage_bytes),
        barriers(reinterpret_cast<uint64_t*>(shared + at.barriers) + 2 * i) {
    if constexpr (!kGrid) {
      // What no unit writes must be zero: the last chunk may reach beyond the last tile.
      uint4* const pieces = reinterpret_cast<uint4*>(buffers);
      for (int64_t i = threadIdx.x; i < 2 * buffer_bytes() / 16; i += kThreads)
        pieces[i] = uint4{0, 0, 0, 0};
      if (cut.blocks > 1) {
        if (threadIdx.x == 0) {
          mbarrier_init(&barriers[0], 1);
          mbarrier_init(&barriers[1], 1);
          mbarrier_init_done();
        }
        cluster_sync();
      }
    }
    __syncthreads();
  }

  __device__ int64_t buffer_bytes() const { return int64_t(cut.batch) * leg.chunks * kChunkBytes; }
  // Of the epoch last exchanged, from a column and a chunk on.
  __device__ const unsigned char* at(int column, int chunk) const {
    return buffers + (epoch - 1) % 2 * buffer_bytes() +
           (int64_t(column) * leg.chunks + chunk) * (kColumn * kChunkBytes);
  }

  // Sends one granule for the next epoch, rows n and its neighbour of tile t: each lane gives its
  // unit's numbers. The whole warp.
  __device__ void send(int t, int n, const float (&value)[kNumbers]) const {
    S* const mine = reinterpret_cast<S*>(stage + place.lane / kTile * kTileBytes);
#pragma unroll
    for (int g = 0; g < kNumbers; g++)
      mine[g * kTile + place.lane % kTile] =
          narrow<S>(kProduct == Product::tf32 ? to_tf32(value[g]) : value[g]);
    __syncwarp();
    constexpr int kPieces = 2 * kTileBytes / 16;
    const int copies = kGrid ? 1 : cut.blocks;
    const int row0 = n - place.lane / kTile;  // the granule's first row
    unsigned char* const to = buffers + epoch % 2 * buffer_bytes();
    for (int i = place.lane; i < kPieces * copies; i += 32) {
      const int piece = i % kPieces;
      const int row = row0 + piece / (kPieces / 2);
      const int k = t * kTileBytes + piece % (kPieces / 2) * 16;  // bytes
      const int64_t line =
          (int64_t(row / kColumn) * leg.chunks + k / kChunkBytes) * kColumn + row % kColumn;
      unsigned char* const target = to + line * kChunkBytes + k % kChunkBytes;
      const uint4 v = reinterpret_cast<const uint4*>(stage)[piece];
      if (kGrid || cut.blocks == 1)
        *reinterpret_cast<uint4*>(target) = v;
      else
        push(target, &barriers[epoch % 2], i / kPieces, v);
    }
    __syncwarp();
  }

  // After every granule has been sent.
  __device__ void publish() {
    epoch++;
    if (!kGrid && cut.blocks > 1) return;
    __syncthreads();
    if (kGrid && threadIdx.x == 0)
      release(&leg.flags[place.group * cut.blocks + place.member], epoch);
  }

  // Until these chunks are there; to be called by the whole block, which together waits for all.
  __device__ void wait(int chunk0, int chunks) const {
    if constexpr (kGrid) {
      if (chunks == 0) return;
      const int first = chunk0 * kChunkBytes / kTileBytes;
      int last = ((chunk0 + chunks) * kChunkBytes - 1) / kTileBytes;
      if (last >= leg.all_vector_tiles) last = leg.all_vector_tiles - 1;
      const uint32_t* const flags = leg.flags + place.group * cut.blocks;
      for (int i = first / leg.vector_tiles + place.lane; i <= last / leg.vector_tiles; i += 32)
        while (int32_t(acquire(&flags[i]) - epoch) < 0) {
        }
      __syncwarp();
    } else if (cut.blocks > 1) {
      uint64_t* const barrier = &barriers[(epoch - 1) % 2];
      if (threadIdx.x == 0)
        mbarrier_expect(barrier, uint32_t(cut.batch * leg.all_vector_tiles * kTileBytes));
      mbarrier_wait(barrier, (epoch - 1) / 2 % 2);
    }
  }
};

// ---- one leg's matrix ---------------------------------------------------------------------------

//   kM       rows of tiles of the matrix per tile of units
template <class S, Product kProduct, int kLegs, int kLeg, int kM>
struct Matrix {
  static constexpr int kRegisterChunks = register_chunks(kLegs, kLeg, kM);
  static constexpr int kLoads = kRegisterChunks < 6 ? kRegisterChunks : 4;  // at a time
  static_assert(kLoads == 0 || kRegisterChunks % kLoads == 0);
  static constexpr int kAccumulators = kM == 1 ? 2 : 1;  // enough independent products in flight

  const Cut& cut;
  const LegCut& leg;
  const Place& place;
  const int tile;            // this warp's, -1: none
  const int chunk0, chunks;  // this warp's
  unsigned char* in_shared;
  float* sums;
  uint4 w[kRegisterChunks == 0 ? 1 : kRegisterChunks][kM][2];

  __device__ Matrix(const Cut& cut, const Place& place, unsigned char* shared,
                    const SharedLayout& at)
      : cut(cut),
        leg(cut.leg[kLeg]),
        place(place),
        tile(tile_of(place.warp / leg.splits)),
        chunk0(first_chunk(leg.chunks, place.warp % leg.splits, leg.splits)),
        chunks(tile < 0
                   ? 0
                   : first_chunk(leg.chunks, place.warp % leg.splits + 1, leg.splits) - chunk0),
        sums(reinterpret_cast<float*>(shared + at.sums)) {
    const int64_t beyond = divide_up(leg.chunks, leg.splits) - kRegisterChunks;
    in_shared = shared + at.weights[kLeg] + (beyond > 0 ? place.warp * beyond * kM * 1024 : 0);
  }

  // The tile that is this block's i-th, or -1.
  __device__ int tile_of(int i) const {
    const int which = place.member * leg.tiles + i;
    return i < leg.tiles && which < leg.all_tiles ? which : -1;
  }

  __device__ int columns() const { return cut.batch / kColumn; }

  __device__ uint4 fragment(int64_t d, int chunk, int m, int half) const {
    const int64_t row = m * leg.Hp + tile * kTile + half * 8 + place.lane / 4;
    const S* const at = static_cast<const S*>(leg.matrix[d]) + row * leg.Kp;
    uint4 v = reinterpret_cast<const uint4*>(at)[(chunk0 + chunk) * 4 + place.lane % 4];
    if constexpr (kProduct == Product::tf32)
      v = uint4{rounded(v.x), rounded(v.y), rounded(v.z), rounded(v.w)};
    return v;
  }
  __device__ static uint32_t rounded(uint32_t bits) {
    return __float_as_uint(to_tf32(__uint_as_float(bits)));
  }

  __device__ uint4* shared_fragment(int chunk, int m, int half) const {
    const int at = ((chunk - kRegisterChunks) * kM + m) * 2 + half;
    return reinterpret_cast<uint4*>(in_shared) + at * 32 + place.lane;
  }

  // Takes direction d's.
  __device__ void load(int64_t d) {
    if (tile < 0) return;
#pragma unroll
    for (int c = 0; c < kRegisterChunks; c++)
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          w[c][m][half] = c < chunks ? fragment(d, c, m, half) : uint4{0, 0, 0, 0};
    for (int c = kRegisterChunks; c < chunks; c++)
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) *shared_fragment(c, m, half) = fragment(d, c, m, half);
  }

  template <bool kGrid>
  __device__ static uint4 read(const unsigned char* at) {
    if constexpr (kGrid)
      return load_from_l2(at);
    else
      return *reinterpret_cast<const uint4*>(at);
  }

  __device__ static void product(float (&acc)[kAccumulators][4], uint4 a, uint4 a8, uint4 b) {
    multiply_add<kProduct>(acc[0], a.x, a8.x, a.y, a8.y, b.x, b.y);
    multiply_add<kProduct>(acc[kAccumulators - 1], a.z, a8.z, a.w, a8.w, b.z, b.w);
  }

  // sums = this matrix times the vector, when it is there. The whole block, which afterwards sees
  // all sums.
  template <int kNumbers, bool kGrid>
  __device__ void multiply(const Vector<S, kProduct, kNumbers, kGrid>& vector) const {
    vector.wait(chunk0, chunks);
    if (tile >= 0)
      for (int column = 0; column < columns(); column++)
        multiply_column<kGrid>(vector.at(column, chunk0) + place.lane * 16, column);
    __syncthreads();
  }

  template <bool kGrid>
  __device__ void multiply_column(const unsigned char* b, int column) const {
    const int last = chunks - 1;
    float acc[kM][kAccumulators][4] = {};
#pragma unroll
    for (int c0 = 0; c0 < kRegisterChunks; c0 += kLoads) {
      if (c0 > last) break;
      uint4 v[kLoads == 0 ? 1 : kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; i++)
        v[i] = read<kGrid>(b + (c0 + i < last ? c0 + i : last) * (kColumn * kChunkBytes));
#pragma unroll
      for (int i = 0; i < kLoads; i++) {
        if (c0 + i > last) break;
#pragma unroll
        for (int m = 0; m < kM; m++) product(acc[m], w[c0 + i][m][0], w[c0 + i][m][1], v[i]);
      }
    }
#pragma unroll 2
    for (int c = kRegisterChunks; c < chunks; c++) {
      const uint4 v = read<kGrid>(b + c * (kColumn * kChunkBytes));
#pragma unroll
      for (int m = 0; m < kM; m++)
        product(acc[m], *shared_fragment(c, m, 0), *shared_fragment(c, m, 1), v);
    }
#pragma unroll
    for (int m = 0; m < kM; m++) {
      float* const at = sum_at(place.warp % leg.splits, place.warp / leg.splits, m, column);
      const int r = place.lane / 4, q = place.lane % 4;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float sum = acc[m][0][i];
        if constexpr (kAccumulators == 2) sum += acc[m][1][i];
        at[(2 * q + i % 2) * kSumStride + r + i / 2 * 8] = sum;
      }
    }
  }

  __device__ float* sum_at(int split, int i, int m, int column) const {
    return sums +
           (((split * leg.tiles + i) * kM + m) * columns() + column) * (kColumn * kSumStride);
  }
};

// ---- a lane's (row, unit) pairs -----------------------------------------------------------------

// One of them, of the units that a leg's matrix gives.
struct Item {
  int which, tile, n;  // tile: which-th of the block; n: row of the slice
  int64_t b, u;        // batch row, unit
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
  item.b = first_row + item.n;
  item.u = int64_t(item.tile) * kTile + place.lane % kTile;
  item.there = item.b < B && item.u < units;
  return item.tile >= 0;
}

// Row m of the item's sums, added up.
template <class AnyMatrix>
__device__ __forceinline__ float sum_of(const AnyMatrix& matrix, const Item& item, int m) {
  float total = 0;
  for (int split = 0; split < matrix.leg.splits; split++)
    total +=
        matrix.sum_at(split, item.which, m,
                      item.n / kColumn)[item.n % kColumn * kSumStride + matrix.place.lane % kTile];
  return total;
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

// Step s of a row of `length` steps is at this time.
__device__ __forceinline__ int64_t time_of(int64_t d, int64_t s, int64_t length) {
  return d == 0 ? s : length - 1 - s;
}

// ---- gates --------------------------------------------------------------------------------------

// An RNN's two activations share a kernel.
template <class Math>
struct RnnCell : RnnTanhCell<Math> {
  using Relu = RnnReluCell<Math>;
};

template <class Cell>
__device__ __forceinline__ float gates(CellKind kind, const float* pre, float h_prev, float& c,
                                       float* saved) {
  if constexpr (Cell::kSaved == 0)
    if (kind == CellKind::rnn_relu) return Cell::Relu::forward(pre, h_prev, c, saved);
  return Cell::forward(pre, h_prev, c, saved);
}

template <class Cell>
__device__ __forceinline__ float gate_gradients(CellKind kind, float dh, float& dc,
                                                const float* saved, float h, float h_prev,
                                                float c_prev, float* dpre) {
  if constexpr (Cell::kSaved == 0)
    if (kind == CellKind::rnn_relu)
      return Cell::Relu::backward(dh, dc, saved, h, h_prev, c_prev, dpre);
  return Cell::backward(dh, dc, saved, h, h_prev, c_prev, dpre);
}

// Stands for what a layer without a projection has no need of.
struct Nothing {
  template <class... Any>
  __device__ explicit Nothing(const Any&...) {}
};
template <bool kProjected, class T>
using IfProjected = std::conditional_t<kProjected, T, Nothing>;

// ---- forward ------------------------------------------------------------------------------------

template <class Cell, class S, Product kProduct, bool kGrid, bool kProjected>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ Cut cut,
                   const __grid_constant__ SharedLayout at) {
  constexpr int G = Cell::kGates, kSlots = Cell::kSlots, kSaved = Cell::kSaved;
  constexpr int kLegs = kProjected ? 2 : 1;
  SEQKERN_SHARED_MEMORY(shared);
  const Place place(cut);
  Vector<S, kProduct, 1, kGrid> hidden(cut, 0, place, shared, at);
  Matrix<S, kProduct, kLegs, 0, G> w_hh(cut, place, shared, at);
  IfProjected<kProjected, Vector<S, kProduct, 1, kGrid>> unprojected(cut, 1, place, shared, at);
  IfProjected<kProjected, Matrix<S, kProduct, kLegs, 1, 1>> w_hr(cut, place, shared, at);
  float* const bias = reinterpret_cast<float*>(shared + at.bias);  // [kSlots][units]
  const int units = cut.leg[0].tiles * kTile;
  const int64_t H = p.H, P = p.P, D = p.D, B = p.rows.B, N = p.rows.N;

  int64_t loaded = -1;
  for (int index = place.group; index < int(D) * cut.slices; index += cut.groups) {
    const Job job = job_of(cut, p.rows, index);
    const int64_t d = job.d;
    if (d != loaded) {
      loaded = d;
      w_hh.load(d);
      if constexpr (kProjected) w_hr.load(d);
      const S* const b_ih = static_cast<const S*>(p.b_ih[d]);
      const S* const b_hh = static_cast<const S*>(p.b_hh[d]);
      __syncthreads();
      for (int i = threadIdx.x; i < kSlots * units; i += kThreads) {
        const int slot = i / units;
        const int64_t u = place.member * units + i % units;
        float sum = 0;
        if (u < H && b_ih != nullptr && slot < G)
          sum += widen(b_ih[stored_slot<Cell>(slot) * H + u]);
        if (u < H && b_hh != nullptr && slot >= kSlots - G)
          sum += widen(b_hh[(slot - (kSlots - G)) * H + u]);
        bias[i] = sum;
      }
      __syncthreads();
    }

    // The lane's pairs: those of the gates, with c, and those of h, which are the same ones but for
    // a projection.
    const auto gate_item = [&](int i, Item& item) {
      return item_of(w_hh, job.first_row, B, H, i, item);
    };
    const auto h_item = [&](int i, Item& item) {
      if constexpr (kProjected)
        return item_of(w_hr, job.first_row, B, P, i, item);
      else
        return gate_item(i, item);
    };
    float h[kItems] = {}, c[kItems] = {};
    int length[kItems] = {},
        h_length_[kProjected ? kItems : 1] = {};  // 0 also where nothing is there
    const auto h_length = [&](int i) { return kProjected ? h_length_[i] : length[i]; };
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      Item item;
      if (gate_item(i, item) && item.there) {
        length[i] = int(length_of(p.rows, item.b));
        if constexpr (Cell::kHasC)
          c[i] = widen(static_cast<const S*>(p.c0)[(d * B + item.b) * H + item.u]);
      }
      if (!h_item(i, item)) continue;
      if (item.there) {
        if constexpr (kProjected) h_length_[i] = int(length_of(p.rows, item.b));
        h[i] = widen(static_cast<const S*>(p.h0)[(d * B + item.b) * P + item.u]);
      }
      if (job.steps > 0) hidden.send(item.tile, item.n, {h[i]});
    }
    if (job.steps > 0) hidden.publish();

    for (int s = 0; s < job.steps; s++) {
      S x[kItems][G];
#pragma unroll
      for (int i = 0; i < kItems; i++) {
        if (s >= length[i]) continue;
        Item item;
        gate_item(i, item);
        const int64_t row = row_of(p.rows, time_of(d, s, length[i]), item.b);
        const S* const from = static_cast<const S*>(p.gx) + (d * N + row) * G * H + item.u;
#pragma unroll
        for (int g = 0; g < G; g++) x[i][g] = from[g * H];
      }
      w_hh.multiply(hidden);
      // The last step's h goes nowhere: no block may be written to when it has gone.
      const bool goes_on = s + 1 < job.steps;
#pragma unroll
      for (int i = 0; i < kItems; i++) {
        Item item;
        if (!gate_item(i, item)) continue;
        float value = h[i];
        if (s < length[i]) {
          const int unit = item.which * kTile + place.lane % kTile;
          float pre[kSlots], saved[kSaved + 1];
#pragma unroll
          for (int slot = 0; slot < kSlots; slot++) {
            pre[slot] = bias[slot * units + unit];
            if (slot < G) pre[slot] += widen(x[i][stored_slot<Cell>(slot)]);
            if (slot >= kSlots - G) pre[slot] += sum_of(w_hh, item, slot - (kSlots - G));
          }
          value = gates<Cell>(p.cell, pre, h[i], c[i], saved);
          const int64_t row = row_of(p.rows, time_of(d, s, length[i]), item.b);
          if constexpr (!kProjected) {
            h[i] = value;
            static_cast<S*>(p.y)[(row * D + d) * H + item.u] = narrow<S>(value);
          }
          if (p.reserve != nullptr) {
            S* const to = static_cast<S*>(p.reserve) + (row * D + d) * kSaved * cut.Hp + item.u;
#pragma unroll
            for (int k = 0; k < kSaved; k++) to[k * cut.Hp] = narrow<S>(saved[k]);
          }
        }
        if constexpr (kProjected)
          unprojected.send(item.tile, item.n, {s < length[i] ? value : 0.0f});
        else if (goes_on)
          hidden.send(item.tile, item.n, {value});
      }
      if constexpr (kProjected) {
        unprojected.publish();
        w_hr.multiply(unprojected);
#pragma unroll
        for (int i = 0; i < kItems; i++) {
          Item item;
          if (!h_item(i, item)) continue;
          if (s < h_length(i)) {
            h[i] = sum_of(w_hr, item, 0);
            const int64_t row = row_of(p.rows, time_of(d, s, h_length(i)), item.b);
            static_cast<S*>(p.y)[(row * D + d) * P + item.u] = narrow<S>(h[i]);
          }
          if (goes_on) hidden.send(item.tile, item.n, {h[i]});
        }
      }
      if (goes_on) hidden.publish();
    }

#pragma unroll
    for (int i = 0; i < kItems; i++) {
      Item item;
      if (h_item(i, item) && item.there)
        static_cast<S*>(p.h_n)[(d * B + item.b) * P + item.u] = narrow<S>(h[i]);
      if constexpr (Cell::kHasC)
        if (gate_item(i, item) && item.there)
          static_cast<S*>(p.c_n)[(d * B + item.b) * H + item.u] = narrow<S>(c[i]);
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------

template <class Cell, class S, Product kProduct, bool kGrid, bool kProjected>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Cut cut,
                    const __grid_constant__ SharedLayout at) {
  constexpr int G = Cell::kGates, kSlots = Cell::kSlots, kSaved = Cell::kSaved;
  constexpr int kLegs = kProjected ? 2 : 1;
  constexpr bool kNeedsH = kSaved == 0, kNeedsHPrev = kSaved > 0 && !Cell::kHasC;
  SEQKERN_SHARED_MEMORY(shared);
  const Place place(cut);
  Vector<S, kProduct, G, kGrid> dpre_h(cut, 0, place, shared, at);
  Matrix<S, kProduct, kLegs, 0, 1> w_hh(cut, place, shared, at);  // transposed
  IfProjected<kProjected, Vector<S, kProduct, 1, kGrid>> dh_all(cut, 1, place, shared, at);
  IfProjected<kProjected, Matrix<S, kProduct, kLegs, 1, 1>> w_hr(cut, place, shared,
                                                                 at);  // transposed
  const int64_t H = p.H, P = p.P, D = p.D, B = p.rows.B, N = p.rows.N;
  const S *const y = static_cast<const S*>(p.y), *const reserve = static_cast<const S*>(p.reserve);

  int64_t loaded = -1;
  for (int index = place.group; index < int(D) * cut.slices; index += cut.groups) {
    const Job job = job_of(cut, p.rows, index);
    const int64_t d = job.d;
    if (d != loaded) {
      w_hh.load(d);
      if constexpr (kProjected) w_hr.load(d);
    }
    loaded = d;

    const auto h_item = [&](int i, Item& item) {
      return item_of(w_hh, job.first_row, B, P, i, item);
    };
    const auto gate_item = [&](int i, Item& item) {
      if constexpr (kProjected)
        return item_of(w_hr, job.first_row, B, H, i, item);
      else
        return h_item(i, item);
    };
    float dh[kItems] = {}, dc[kItems] = {};  // what reaches h and c of the step before past W_hh
    int length[kItems] = {}, h_length_[kProjected ? kItems : 1] = {};
    const auto h_length = [&](int i) { return kProjected ? h_length_[i] : length[i]; };
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      Item item;
      if (h_item(i, item) && item.there) {
        if constexpr (kProjected) h_length_[i] = int(length_of(p.rows, item.b));
        if (p.dh_n != nullptr)
          dh[i] = widen(static_cast<const S*>(p.dh_n)[(d * B + item.b) * P + item.u]);
      }
      if (!gate_item(i, item)) continue;
      if (item.there) {
        length[i] = int(length_of(p.rows, item.b));
        if (Cell::kHasC && p.dc_n != nullptr)
          dc[i] = widen(static_cast<const S*>(p.dc_n)[(d * B + item.b) * H + item.u]);
      }
      if (job.steps > 0) dpre_h.send(item.tile, item.n, {});
    }
    if (job.steps > 0) dpre_h.publish();

    for (int s = job.steps - 1; s >= 0; s--) {
      S dy[kItems], saved_[kItems][kSaved + 1], now[kItems], before[kItems];
#pragma unroll
      for (int i = 0; i < kItems; i++) {
        Item item;
        if constexpr (kProjected) {
          if (s < h_length(i) && p.dy != nullptr) {
            h_item(i, item);
            const int64_t row = row_of(p.rows, time_of(d, s, h_length(i)), item.b) * D + d;
            dy[i] = static_cast<const S*>(p.dy)[row * P + item.u];
          }
        }
        if (s >= length[i]) continue;
        gate_item(i, item);
        const int64_t row = row_of(p.rows, time_of(d, s, length[i]), item.b) * D + d;
        if (!kProjected && p.dy != nullptr) dy[i] = static_cast<const S*>(p.dy)[row * P + item.u];
        if constexpr (kNeedsH) now[i] = y[row * H + item.u];
#pragma unroll
        for (int k = 0; k < kSaved; k++)
          saved_[i][k] = reserve[(row * kSaved + k) * cut.Hp + item.u];
        if (s > 0) {
          const int64_t previous = row_of(p.rows, time_of(d, s - 1, length[i]), item.b) * D + d;
          if constexpr (kNeedsHPrev) before[i] = y[previous * H + item.u];
          if constexpr (Cell::kHasC)
            before[i] = reserve[(previous * kSaved + kSaved - 1) * cut.Hp + item.u];
        } else if (kNeedsHPrev || Cell::kHasC) {
          const void* const state = Cell::kHasC ? p.c0 : p.h0;
          before[i] = static_cast<const S*>(state)[(d * B + item.b) * H + item.u];
        }
      }
      w_hh.multiply(dpre_h);
      if constexpr (kProjected) {
#pragma unroll
        for (int i = 0; i < kItems; i++) {
          Item item;
          if (!h_item(i, item)) continue;
          float all = 0;
          if (s < h_length(i)) {
            all = dh[i] + sum_of(w_hh, item, 0);
            if (p.dy != nullptr) all += widen(dy[i]);
            dh[i] = 0;
            const int64_t row = row_of(p.rows, time_of(d, s, h_length(i)), item.b);
            static_cast<S*>(p.dh_rows)[(d * N + row) * P + item.u] = narrow<S>(all);
          }
          dh_all.send(item.tile, item.n, {all});
        }
        dh_all.publish();
        w_hr.multiply(dh_all);
      }
#pragma unroll
      for (int i = 0; i < kItems; i++) {
        Item item;
        if (!gate_item(i, item)) continue;
        float from_h[G] = {};
        if (s < length[i]) {
          float all;
          if constexpr (kProjected) {
            all = sum_of(w_hr, item, 0);
          } else {
            all = dh[i] + sum_of(w_hh, item, 0);
            if (p.dy != nullptr) all += widen(dy[i]);
          }
          float saved[kSaved + 1], dpre[kSlots];
#pragma unroll
          for (int k = 0; k < kSaved; k++) saved[k] = widen(saved_[i][k]);
          const float previous = kNeedsHPrev || Cell::kHasC ? widen(before[i]) : 0.0f;
          const float past = gate_gradients<Cell>(
              p.cell, all, dc[i], saved, kNeedsH ? widen(now[i]) : 0.0f,
              kNeedsHPrev ? previous : 0.0f, Cell::kHasC ? previous : 0.0f, dpre);
          if constexpr (!kProjected) dh[i] = past;
          const int64_t row = row_of(p.rows, time_of(d, s, length[i]), item.b);
          S* const to = static_cast<S*>(p.dpre) + (d * N + row) * kSlots * H + item.u;
#pragma unroll
          for (int slot = 0; slot < kSlots; slot++) {
            to[stored_slot<Cell>(slot) * H] = narrow<S>(dpre[slot]);
            if (slot >= kSlots - G) from_h[slot - (kSlots - G)] = dpre[slot];
          }
        }
        dpre_h.send(item.tile, item.n, from_h);
      }
      dpre_h.publish();
    }

    if (job.steps > 0) w_hh.multiply(dpre_h);
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      Item item;
      if (h_item(i, item) && item.there) {
        if (job.steps > 0) dh[i] += sum_of(w_hh, item, 0);
        static_cast<S*>(p.dh0)[(d * B + item.b) * P + item.u] = narrow<S>(dh[i]);
      }
      if constexpr (Cell::kHasC)
        if (gate_item(i, item) && item.there)
          static_cast<S*>(p.dc0)[(d * B + item.b) * H + item.u] = narrow<S>(dc[i]);
    }
  }
}

}  // namespace seqkern::cuda
