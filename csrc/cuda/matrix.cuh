// A matrix that stays in place, spread over the warps of a group of blocks, times the vector that
// they exchange (recurrence.cuh).
//
// The order of k within a chunk is free, as long as matrix and vector agree: lane q of four takes
// the 16 bytes at 16 q of a row as its part of two matrix instructions' operands. So a fragment is
// one 16-byte load, from wherever the vector lies.
#pragma once

#include "exchange.cuh"

namespace seqkern::cuda {

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

  __device__ uint4 fragment(int64_t way, int64_t head, int chunk, int m, int j) const {
    const int64_t row = (head * kM + m) * leg.Hp + tile * kTile + place.lane / 4;
    const S* const at = static_cast<const S*>(leg.matrix[way]) + row * leg.Kp;
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

  // Takes a direction's.
  __device__ void load(int64_t way, int64_t head) {
    if (tile < 0) return;
#pragma unroll
    for (int c = 0; c < kRegisterChunks; c++)
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          w[c][m][j] = c < chunks ? fragment(way, head, c, m, j) : uint4{0, 0, 0, 0};
    for (int c = kRegisterChunks; c < chunks; c++)
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int j = 0; j < 2; j++) *shared_fragment(c, m, j) = fragment(way, head, c, m, j);
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

}  // namespace seqkern::cuda
