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
//   lane    of the gates: up to kItems (row, unit) pairs, their c, h or dh, dc in registers over
//   all steps.
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
// without low * low, summed outside of the tensor core) is as good as float32.
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
                                             uint32_t a3, uint32_t b0, uint32_t b1, bool wanted) {
  if constexpr (kProduct == Product::f16) {
    mma_f16(acc, a0, a1, a2, a3, b0, b1, wanted);
  } else if constexpr (kProduct == Product::bf16) {
    mma_bf16(acc, a0, a1, a2, a3, b0, b1, wanted);
  } else if constexpr (kProduct == Product::tf32) {
    mma_tf32(acc, a0, a1, a2, a3, b0, b1, wanted);
  } else {
    // The tensor core truncates what it adds to c, always towards zero; so c is added outside of
    // it.
    const uint32_t whole[6] = {a0, a1, a2, a3, b0, b1};
    uint32_t high[6], low[6];
#pragma unroll
    for (int i = 0; i < 6; i++) {
      const float x = __uint_as_float(whole[i]), upper = to_tf32(x);
      high[i] = __float_as_uint(upper);
      low[i] = __float_as_uint(to_tf32(x - upper));
    }
    float main[4] = {}, rest[4] = {};
    mma_tf32(rest, low[0], low[1], low[2], low[3], high[4], high[5], wanted);
    mma_tf32(rest, high[0], high[1], high[2], high[3], low[4], low[5], wanted);
    mma_tf32(main, high[0], high[1], high[2], high[3], high[4], high[5], wanted);
#pragma unroll
    for (int i = 0; i < 4; i++)  // of an infinite number there is no lower part
      acc[i] += fabsf(main[i]) <= 3.402823466e38f ? main[i] + rest[i] : main[i];
  }
}

// Where this thread stands.
struct Place {
  int warp, lane, group, member;  // member: of the group's blocks

  __device__ explicit Place(const Cut& cut)
      : warp(warp_uniform(int(threadIdx.x) / 32)),
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
  const int buffer_bytes;
  uint32_t epoch;  // of the last exchange
  unsigned char *buffers, *stage;
  uint64_t* barriers;
  uint32_t* my_flag;
  const uint32_t* watched_flags = nullptr;  // of the blocks that this warp waits for
  int watched = 0;

  __device__ Vector(const Cut& cut, int i, const Place& place, unsigned char* shared,
                    const SharedLayout& at)
      : cut(cut),
        leg(cut.leg[i]),
        place(place),
        buffer_bytes(cut.batch * leg.chunks * kChunkBytes),
        epoch(0),
        buffers(kGrid ? leg.exchange + int64_t(place.group) * 2 * buffer_bytes
                      : shared + at.exchange[i]),
        stage(shared + at.stage + place.warp * at.stage_bytes),
        barriers(reinterpret_cast<uint64_t*>(shared + at.barriers) + 2 * i),
        my_flag(kGrid ? leg.flags + place.group * cut.blocks + place.member : nullptr) {
    if constexpr (!kGrid) {
      // What no unit writes must be zero: the last chunk may reach beyond the last tile.
      uint4* const pieces = reinterpret_cast<uint4*>(buffers);
      for (int64_t i = threadIdx.x; i < 2 * buffer_bytes / 16; i += kThreads)
        pieces[i] = uint4{0, 0, 0, 0};
      if (cut.blocks > 1) {
        if (threadIdx.x == 0) {
          mbarrier_init(&barriers[0], 1);
          mbarrier_init(&barriers[1], 1);
          mbarrier_init_done();
        }
        __syncwarp();
        cluster_sync();
      }
    }
    __syncthreads();
  }

  // These chunks are the warp's.
  __device__ void watch(int chunk0, int chunks) {
    if (!kGrid || chunks == 0) return;
    const int first = chunk0 * kChunkBytes / kTileBytes;
    int last = ((chunk0 + chunks) * kChunkBytes - 1) / kTileBytes;
    if (last >= leg.all_vector_tiles) last = leg.all_vector_tiles - 1;
    watched_flags = leg.flags + place.group * cut.blocks + first / leg.vector_tiles;
    watched = last / leg.vector_tiles - first / leg.vector_tiles + 1;
  }

  // Of the epoch last exchanged, column 0, from a chunk on.
  __device__ const unsigned char* at(int chunk) const {
    return buffers + ((epoch - 1) % 2 * buffer_bytes + chunk * (kColumn * kChunkBytes));
  }

  // In an epoch's buffer: byte k of row n's part of tile t.
  __device__ int offset(int t, int n, int k) const {
    const int byte = t * kTileBytes + k;
    const int line = (n / kColumn * leg.chunks + byte / kChunkBytes) * kColumn + n % kColumn;
    return line * kChunkBytes + byte % kChunkBytes;
  }

  static constexpr int kPieces = 2 * kTileBytes / 16;  // of a granule
  static constexpr int kSpan = kPieces <= 4 ? 4 : kPieces <= 8 ? 8 : kPieces <= 16 ? 16 : 32;
  static_assert(kPieces <= 32);

  // Where in a buffer a granule, rows n and its neighbour of tile t, goes, as far as this lane
  // writes it; the same in all epochs.
  __device__ int route(int t, int n) const {
    if (kGrid || cut.blocks == 1) return offset(t, n, place.lane % kTile * int(sizeof(S)));
    const int piece = place.lane % kSpan, row0 = n - place.lane / kTile;
    return offset(t, row0 + piece / (kPieces / 2), piece % (kPieces / 2) * 16);
  }

  // Sends one granule for the next epoch: each lane gives its unit's numbers. The whole warp.
  __device__ void send(int route, int t, const float (&value)[kNumbers]) const {
    unsigned char* const to = buffers + (epoch % 2 * buffer_bytes + route);
    S number[kNumbers];
#pragma unroll
    for (int g = 0; g < kNumbers; g++)
      number[g] = narrow<S>(kProduct == Product::tf32 ? to_tf32(value[g]) : value[g]);
    if (kGrid || cut.blocks == 1) {  // 16 lanes' numbers are whole sectors of L2
      const int first = t * kTileBytes % kChunkBytes;
#pragma unroll
      for (int g = 0; g < kNumbers; g++) {
        const int byte = first + g * kTile * int(sizeof(S));
        const int beyond = byte / kChunkBytes * (kColumn * kChunkBytes) + byte % kChunkBytes;
        *reinterpret_cast<S*>(to + (kNumbers == 1 ? 0 : beyond - first)) = number[g];
      }
      return;
    }
    S* const mine = reinterpret_cast<S*>(stage + place.lane / kTile * kTileBytes);
#pragma unroll
    for (int g = 0; g < kNumbers; g++) mine[g * kTile + place.lane % kTile] = number[g];
    __syncwarp();
    const int piece = place.lane % kSpan;  // a lane's is the same for every block
    if (piece < kPieces) {
      const uint4 v = reinterpret_cast<const uint4*>(stage)[piece];
      for (int rank = place.lane / kSpan; rank < cut.blocks; rank += 32 / kSpan)
        push(to, &barriers[epoch % 2], rank, v);
    }
    __syncwarp();
  }

  // After every granule has been sent.
  __device__ void publish() {
    epoch++;
    if (!kGrid && cut.blocks > 1) {
      if (threadIdx.x == 0)
        mbarrier_expect(&barriers[(epoch - 1) % 2],
                        uint32_t(cut.batch * leg.all_vector_tiles * kTileBytes));
      return;
    }
    __syncthreads();
    // Not the first warp: it has most to do.
    if (kGrid && threadIdx.x == kThreads - 32) release(my_flag, epoch);
  }

  // Until the warp's chunks are there; to be called by the whole block, which together waits for
  // all.
  __device__ void wait() const {
    if constexpr (kGrid) {
      for (int i = place.lane; i < watched; i += 32)
        while (int32_t(acquire(&watched_flags[i]) - epoch) < 0) {
        }
      __syncwarp();
    } else if (cut.blocks > 1) {
      mbarrier_wait(&barriers[(epoch - 1) % 2], (epoch - 1) / 2 % 2);
      __syncwarp();
    }
  }
};

// ---- one leg's matrix ---------------------------------------------------------------------------

//   kM       rows of tiles of the matrix per tile of units
template <class S, Product kProduct, int kLegs, int kLeg, int kM>
struct Matrix {
  static constexpr int kRegisterChunks =
      register_chunks(kLegs, kLeg, kM, kProduct == Product::tf32_3);
  static constexpr int kLoads = kRegisterChunks;
  static constexpr int kAccumulators = kM == 1 ? 2 : 1;  // enough independent products in flight

  const Cut& cut;
  const LegCut& leg;
  const Place& place;
  const int tile;            // this warp's, -1: none
  const int chunk0, chunks;  // this warp's
  unsigned char* in_shared;
  float* sums;
  float* my_sums;  // where the lane leaves its part, of column 0
  // [j]: the operand of the j-th matrix instruction of a chunk, in the order of its four registers,
  // or the compiler moves each of them before every use.
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
    my_sums = sum_at(place.warp % leg.splits, place.warp / leg.splits, 0) +
              place.lane % 4 * 2 * kRowFloats + place.lane / 4 * kUnitFloats;
  }

  // The tile that is this block's i-th, or -1.
  __device__ int tile_of(int i) const {
    const int which = place.member * leg.tiles + i;
    return i < leg.tiles && which < leg.all_tiles ? which : -1;
  }

  __device__ int columns() const { return cut.batch / kColumn; }

  __device__ uint4 fragment(int64_t d, int chunk, int m, int j) const {
    const int64_t row = m * leg.Hp + tile * kTile + place.lane / 4;
    const S* const at = static_cast<const S*>(leg.matrix[d]) + row * leg.Kp;
    const S* const at8 = at + 8 * leg.Kp;
    const int first = ((chunk0 + chunk) * 4 + place.lane % 4) * 4 + 2 * j;
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(at) + first;
    const uint32_t* const words8 = reinterpret_cast<const uint32_t*>(at8) + first;
    uint4 v{words[0], words8[0], words[1], words8[1]};
    if constexpr (kProduct == Product::tf32)
      v = uint4{rounded(v.x), rounded(v.y), rounded(v.z), rounded(v.w)};
    return v;
  }
  __device__ static uint32_t rounded(uint32_t bits) {
    return __float_as_uint(to_tf32(__uint_as_float(bits)));
  }

  __device__ uint4* shared_fragment(int chunk, int m, int j) const {
    const int at = ((chunk - kRegisterChunks) * kM + m) * 2 + j;
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
        for (int j = 0; j < 2; j++)
          w[c][m][j] = c < chunks ? fragment(d, c, m, j) : uint4{0, 0, 0, 0};
    for (int c = kRegisterChunks; c < chunks; c++)
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int j = 0; j < 2; j++) *shared_fragment(c, m, j) = fragment(d, c, m, j);
  }

  template <bool kGrid>
  __device__ static uint4 read(const unsigned char* at) {
    if constexpr (kGrid)
      return load_from_l2(at);
    else
      return *reinterpret_cast<const uint4*>(at);
  }

  // One chunk's, all rows of tiles. Neighbours are of different sums.
  __device__ static void products(float (&acc)[kM][kAccumulators][4], const uint4 (&a)[kM][2],
                                  uint4 b, bool wanted) {
#pragma unroll
    for (int m = 0; m < kM; m++)
      multiply_add<kProduct>(acc[m][0], a[m][0].x, a[m][0].y, a[m][0].z, a[m][0].w, b.x, b.y,
                             wanted);
#pragma unroll
    for (int m = 0; m < kM; m++)
      multiply_add<kProduct>(acc[m][kAccumulators - 1], a[m][1].x, a[m][1].y, a[m][1].z, a[m][1].w,
                             b.z, b.w, wanted);
  }

  // sums = this matrix times the vector, when it is there. The whole block, which afterwards sees
  // all sums.
  template <int kNumbers, bool kGrid>
  __device__ void multiply(const Vector<S, kProduct, kNumbers, kGrid>& vector) const {
    const unsigned char* b = vector.at(chunk0) + place.lane * 16;
    uint4 v[kLoads == 0 ? 1 : kLoads] = {};
    vector.wait();
    if (tile >= 0) {
      const int column_bytes = leg.chunks * (kColumn * kChunkBytes);
      read_column<kGrid>(v, b);
      for (int column = 0;; column++) {
        float acc[kM][kAccumulators][4] = {};
#pragma unroll
        for (int c = 0; c < kRegisterChunks; c++) products(acc, w[c], v[c], c < chunks);
#pragma unroll 2
        for (int c = kRegisterChunks; c < chunks; c++) {
          const uint4 one = read<kGrid>(b + c * (kColumn * kChunkBytes));
          uint4 a[kM][2];
#pragma unroll
          for (int m = 0; m < kM; m++)
#pragma unroll
            for (int j = 0; j < 2; j++) a[m][j] = *shared_fragment(c, m, j);
          products(acc, a, one, true);
        }
        const bool more = column + 1 < columns();
        b += column_bytes;
        if (more) read_column<kGrid>(v, b);
        leave(acc, column);
        if (!more) break;
      }
    }
    __syncthreads();
  }

  // A column's chunks, of those whose matrix is in registers.
  template <bool kGrid>
  __device__ void read_column(uint4 (&v)[kLoads == 0 ? 1 : kLoads], const unsigned char* b) const {
#pragma unroll
    for (int c = 0; c < kLoads; c++)
      if (c < chunks) v[c] = read<kGrid>(b + c * (kColumn * kChunkBytes));
  }

  __device__ void leave(const float (&acc)[kM][kAccumulators][4], int column) const {
    float* const at = my_sums + column * leg.splits * (kColumn * kRowFloats);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float sum[4] = {};
#pragma unroll
      for (int m = 0; m < kM; m++) {
        sum[m] = acc[m][0][i];
        if constexpr (kAccumulators == 2) sum[m] += acc[m][1][i];
      }
      float* const to = at + i % 2 * kRowFloats + i / 2 * 8 * kUnitFloats;
      if constexpr (kM == 1)
        *to = sum[0];
      else
        *reinterpret_cast<float4*>(to) = float4{sum[0], sum[1], sum[2], sum[3]};
    }
  }

  static constexpr int kUnitFloats = kM == 1 ? 1 : 4;  // from one unit's sums to the next
  static constexpr int kRowFloats = kM == 1 ? kSumStride : 4 * kSumStride4;
  static_assert(kM <= 4 && sum_bytes(kM) == kColumn * kRowFloats * 4);

  __device__ float* sum_at(int split, int i, int column) const {
    return sums + ((i * columns() + column) * leg.splits + split) * (kColumn * kRowFloats);
  }

  // Of row n of the slice and a unit of the block's i-th tile: the splits' sums, added up.
  __device__ void sums_of(float (&total)[kM], int i, int n, int unit) const {
    const float* const at =
        sum_at(0, i, n / kColumn) + n % kColumn * kRowFloats + unit * kUnitFloats;
#pragma unroll
    for (int m = 0; m < kM; m++) total[m] = 0;
    // The usual numbers of splits are unrolled, without predicates: what a predicated load may
    // leave as it was takes up a register all through the step.
    if (leg.splits == 8) {
      add_splits<8>(total, at);
    } else if (leg.splits == 4) {
      add_splits<4>(total, at);
    } else {
#pragma unroll 1
      for (int split = 0; split < leg.splits; split++)
        add_splits<1>(total, at + split * (kColumn * kRowFloats));
    }
  }

  template <int kSplits>
  __device__ static void add_splits(float (&total)[kM], const float* at) {
    float part[kSplits][4];
#pragma unroll
    for (int split = 0; split < kSplits; split++, at += kColumn * kRowFloats) {
      if constexpr (kM == 1) {
        part[split][0] = *at;
      } else {
        const float4 four = *reinterpret_cast<const float4*>(at);
        part[split][0] = four.x, part[split][1] = four.y;
        part[split][2] = four.z, part[split][3] = four.w;
      }
    }
#pragma unroll
    for (int split = 0; split < kSplits; split++)
#pragma unroll
      for (int m = 0; m < kM; m++) total[m] += part[split][m];
  }
};

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

// Step s of a row of `length` steps is at this time.
__device__ __forceinline__ int time_of(int64_t d, int s, int length) {
  return d == 0 ? s : length - 1 - s;
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

template <class Cell, class S, Product kProduct, bool kGrid, bool kProjected, int kItems>
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
  hidden.watch(w_hh.chunk0, w_hh.chunks);
  if constexpr (kProjected) unprojected.watch(w_hr.chunk0, w_hr.chunks);
  float* const bias = reinterpret_cast<float*>(shared + at.bias);  // [units][kSlots]
  const int units = cut.leg[0].tiles * kTile;
  const int64_t B = p.rows.B, N = p.rows.N;
  const int H = int(p.H), P = int(p.P), D = int(p.D), Hp = int(cut.Hp);

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
        const int slot = i % kSlots;
        const int64_t u = place.member * units + i / kSlots;
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
    int h_route[kItems] = {}, m_route[kProjected ? kItems : 1] = {};
    const auto h_length = [&](int i) { return kProjected ? h_length_[i] : length[i]; };
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      Item item;
      const bool gated = gate_item(i, item);
      if constexpr (kProjected)
        if (gated) m_route[i] = unprojected.route(item.tile, item.n);
      if (gated && item.there) {
        length[i] = int(length_of(p.rows, item.b));
        if constexpr (Cell::kHasC)
          c[i] = widen(static_cast<const S*>(p.c0)[(d * B + item.b) * H + item.u]);
      }
      if (!h_item(i, item)) continue;
      if (item.there) {
        if constexpr (kProjected) h_length_[i] = int(length_of(p.rows, item.b));
        h[i] = widen(static_cast<const S*>(p.h0)[(d * B + item.b) * P + item.u]);
      }
      h_route[i] = hidden.route(item.tile, item.n);
      if (job.steps > 0) hidden.send(h_route[i], item.tile, {h[i]});
    }
    if (job.steps > 0) hidden.publish();

    S x[kItems][G], given[kItems] = {}, saved_[kItems][kSaved + 1];
    int row[kItems] = {};  // of the step before
    const S* const gx = static_cast<const S*>(p.gx) + d * N * G * H;
    S* const y = static_cast<S*>(p.y) + d * P;
    S* const reserve =
        p.reserve == nullptr ? nullptr : static_cast<S*>(p.reserve) + d * kSaved * Hp;
    const auto load = [&](int s, int i) {
      Item item;
      gate_item(i, item);
      row[i] = row_at(p.rows, time_of(d, s, length[i]), item.b);
      const S* const from = gx + int64_t(row[i]) * (G * H) + item.u;
#pragma unroll
      for (int g = 0; g < G; g++) x[i][g] = from[g * H];
    };
    const auto store = [&](int s, int i, int at) {
      Item item;
      if constexpr (kProjected) {
        if (s < h_length(i)) {
          h_item(i, item);
          const int h_at = row_at(p.rows, time_of(d, s, h_length(i)), item.b);
          y[int64_t(h_at) * (D * P) + item.u] = narrow<S>(h[i]);
        }
      }
      if (s >= length[i]) return;
      gate_item(i, item);
      if constexpr (!kProjected) y[int64_t(at) * (D * H) + item.u] = given[i];
      if (reserve != nullptr) {
        S* const to = reserve + int64_t(at) * (D * kSaved * Hp) + item.u;
#pragma unroll
        for (int k = 0; k < kSaved; k++) to[k * Hp] = saved_[i][k];
      }
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
#pragma unroll
      for (int i = 0; i < kItems; i++) {
        Item item;
        if (!gate_item(i, item)) continue;
        float value = h[i];
        if (s < length[i]) {
          const int unit = item.which * kTile + place.lane % kTile;
          float pre[kSlots], saved[kSaved + 1], w_hh_h[G];
          if constexpr (kSlots == 4) {
            const float4 four = reinterpret_cast<const float4*>(bias)[unit];
            pre[0] = four.x, pre[1] = four.y, pre[2] = four.z, pre[3] = four.w;
          } else {
#pragma unroll
            for (int slot = 0; slot < kSlots; slot++) pre[slot] = bias[unit * kSlots + slot];
          }
          sums_of(w_hh, item, w_hh_h);
#pragma unroll
          for (int slot = 0; slot < kSlots; slot++) {
            if (slot < G) pre[slot] += widen(x[i][stored_slot<Cell>(slot)]);
            if (slot >= kSlots - G) pre[slot] += w_hh_h[slot - (kSlots - G)];
          }
          value = gates<Cell>(p.cell, pre, h[i], c[i], saved);
          if constexpr (!kProjected) h[i] = value;
#pragma unroll
          for (int k = 0; k < kSaved; k++) saved_[i][k] = narrow<S>(saved[k]);
          given[i] = narrow<S>(value);
        }
        if constexpr (kProjected)
          unprojected.send(m_route[i], item.tile, {s < length[i] ? value : 0.0f});
        else if (goes_on)
          hidden.send(h_route[i], item.tile, {value});
      }
      if constexpr (kProjected) {
        unprojected.publish();
        w_hr.multiply(unprojected);
#pragma unroll
        for (int i = 0; i < kItems; i++) {
          Item item;
          if (!h_item(i, item)) continue;
          if (s < h_length(i)) h[i] = sum_of(w_hr, item);
          if (goes_on) hidden.send(h_route[i], item.tile, {h[i]});
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

template <class Cell, class S, Product kProduct, bool kGrid, bool kProjected, int kItems>
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
  dpre_h.watch(w_hh.chunk0, w_hh.chunks);
  if constexpr (kProjected) dh_all.watch(w_hr.chunk0, w_hr.chunks);
  const int64_t B = p.rows.B, N = p.rows.N;
  const int H = int(p.H), P = int(p.P), D = int(p.D), Hp = int(cut.Hp);

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
    int dpre_route[kItems] = {}, dh_route[kProjected ? kItems : 1] = {};
    const auto h_length = [&](int i) { return kProjected ? h_length_[i] : length[i]; };
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      Item item;
      const bool has_h = h_item(i, item);
      if constexpr (kProjected)
        if (has_h) dh_route[i] = dh_all.route(item.tile, item.n);
      if (has_h && item.there) {
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
      dpre_route[i] = dpre_h.route(item.tile, item.n);
      if (job.steps > 0) dpre_h.send(dpre_route[i], item.tile, {});
    }
    if (job.steps > 0) dpre_h.publish();

    S dy[kItems], saved_[kItems][kSaved + 1], now[kItems], before[kItems];
    S all_[kProjected ? kItems : 1] = {}, dpre_[kItems][kSlots];
    int row[kItems] = {};  // of the step before this one in time, which is s + 1
    const S* const dy_rows = p.dy == nullptr ? nullptr : static_cast<const S*>(p.dy) + d * P;
    const S* const y = static_cast<const S*>(p.y) + d * P;
    [[maybe_unused]] const S* const reserve =
        kSaved == 0 ? nullptr : static_cast<const S*>(p.reserve) + d * kSaved * Hp;
    S* const dpre_rows = static_cast<S*>(p.dpre) + d * N * kSlots * H;
    const auto load = [&](int s, int i) {
      Item item;
      if constexpr (kProjected) {
        if (s < h_length(i) && p.dy != nullptr) {
          h_item(i, item);
          const int64_t from = row_at(p.rows, time_of(d, s, h_length(i)), item.b);
          dy[i] = dy_rows[from * (D * P) + item.u];
        }
      }
      if (s >= length[i]) return;
      gate_item(i, item);
      row[i] = row_at(p.rows, time_of(d, s, length[i]), item.b);
      const int64_t from = row[i];
      if (!kProjected && p.dy != nullptr) dy[i] = dy_rows[from * (D * H) + item.u];
      if constexpr (kNeedsH) now[i] = y[from * (D * H) + item.u];
      const S* const saved_from = reserve + from * (D * kSaved * Hp) + item.u;
#pragma unroll
      for (int k = 0; k < kSaved; k++) saved_[i][k] = saved_from[k * Hp];
      if (s > 0) {
        const int64_t previous = row_at(p.rows, time_of(d, s - 1, length[i]), item.b);
        if constexpr (kNeedsHPrev) before[i] = y[previous * (D * H) + item.u];
        if constexpr (Cell::kHasC)
          before[i] = reserve[previous * (D * kSaved * Hp) + (kSaved - 1) * Hp + item.u];
      } else if (kNeedsHPrev || Cell::kHasC) {
        const void* const state = Cell::kHasC ? p.c0 : p.h0;
        before[i] = static_cast<const S*>(state)[(d * B + item.b) * H + item.u];
      }
    };
    const auto store = [&](int s, int i, int at) {
      Item item;
      if constexpr (kProjected) {
        if (s < h_length(i)) {
          h_item(i, item);
          const int64_t h_at = row_at(p.rows, time_of(d, s, h_length(i)), item.b);
          static_cast<S*>(p.dh_rows)[(d * N + h_at) * P + item.u] = all_[i];
        }
      }
      if (s >= length[i]) return;
      gate_item(i, item);
      S* const to = dpre_rows + int64_t(at) * (kSlots * H) + item.u;
#pragma unroll
      for (int slot = 0; slot < kSlots; slot++) to[stored_slot<Cell>(slot) * H] = dpre_[i][slot];
    };

    for (int s = job.steps - 1;; s--) {
      // As in forward.
      int last_row[kItems];
#pragma unroll
      for (int i = 0; i < kItems; i++) {
        last_row[i] = row[i];
        if (s >= 0) load(s, i);
      }
      if (s + 1 < job.steps)
#pragma unroll
        for (int i = 0; i < kItems; i++) store(s + 1, i, last_row[i]);
      if (s < 0) break;
      w_hh.multiply(dpre_h);
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
          dh_all.send(dh_route[i], item.tile, {all});
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
            all = sum_of(w_hr, item);
          } else {
            all = dh[i] + sum_of(w_hh, item);
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
#pragma unroll
          for (int slot = 0; slot < kSlots; slot++) {
            dpre_[i][slot] = narrow<S>(dpre[slot]);
            if (slot >= kSlots - G) from_h[slot - (kSlots - G)] = dpre[slot];
          }
        }
        dpre_h.send(dpre_route[i], item.tile, from_h);
      }
      dpre_h.publish();
    }

    if (job.steps > 0) w_hh.multiply(dpre_h);
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      Item item;
      if (h_item(i, item) && item.there) {
        if (job.steps > 0) dh[i] += sum_of(w_hh, item);
        static_cast<S*>(p.dh0)[(d * B + item.b) * P + item.u] = narrow<S>(dh[i]);
      }
      if constexpr (Cell::kHasC)
        if (gate_item(i, item) && item.there)
          static_cast<S*>(p.dc0)[(d * B + item.b) * H + item.u] = narrow<S>(dc[i]);
    }
  }
}

}  // namespace seqkern::cuda
