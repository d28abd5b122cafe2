// Random numbers that are functions of a seed and a position (seqkern/reference/_philox.py), and
// the masks that recurrent layers draw by them.
#pragma once

#include "gemm.h"
#include "threads.h"

namespace seqkern {
namespace SEQKERN_ISA {

typedef uint64_t VecU64 __attribute__((vector_size(kVecBytes)));

// Philox4x32-10 (Salmon et al., 2011), kLanes counters at once: counter (unit >> 3, c1, c2, c3)
// gives the 16-bit numbers of unit & 7 = 0 … 7, a word's low half first.
struct Philox {
  static constexpr int L = kLanes<float>;
  static constexpr int kBatch = 8 * L;  // units that one call serves
  uint32_t key0, key1;

  explicit Philox(int64_t seed)
      : key0(uint32_t(uint64_t(seed))), key1(uint32_t(uint64_t(seed) >> 32)) {}

  static SEQKERN_INLINE void multiply(VecU x, uint32_t m, VecU& high, VecU& low) {
    const VecU64 lows = VecU64{} + 0xffffffffu;
    const VecU64 even = ((VecU64)x & lows) * m, odd = ((VecU64)x >> 32) * m;
    low = (VecU)((even & lows) | odd << 32);
    high = (VecU)(even >> 32 | (odd & ~lows));
  }

  // number[8 * i + j] for the units 8 * (group + i) + j, i < L.
  void draw(int64_t group, int64_t w1, int64_t w2, int64_t w3, uint16_t* number) const {
    VecU c0 = VecU{} + uint32_t(group);
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) c0[i] += uint32_t(i);
    VecU c1 = VecU{} + uint32_t(w1), c2 = VecU{} + uint32_t(w2), c3 = VecU{} + uint32_t(w3);
    uint32_t k0 = key0, k1 = key1;
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      VecU high0, low0, high1, low1;
      multiply(c0, 0xD2511F53u, high0, low0);
      multiply(c2, 0xCD9E8D57u, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
    }
    constexpr auto lanes = std::make_integer_sequence<int, L>();
    const VecU a = interleave<false>(c0, c2, lanes), a_ = interleave<true>(c0, c2, lanes);
    const VecU b = interleave<false>(c1, c3, lanes), b_ = interleave<true>(c1, c3, lanes);
    const VecU words[4] = {interleave<false>(a, b, lanes), interleave<true>(a, b, lanes),
                           interleave<false>(a_, b_, lanes), interleave<true>(a_, b_, lanes)};
    memcpy(number, words, sizeof words);
  }
};

// mask[row][d][unit]: bit k where number(unit, t, b, stream of d and k) is below threshold[k].
inline void recurrent_mask(const MaskParams& p) {
  const Philox philox(p.seed);
  parallel(p.threads, [&](int thread, int threads) {
    uint16_t number[Philox::kBatch];
    for (int64_t i = part_begin(p.rows * p.D, thread, threads);
         i < part_begin(p.rows * p.D, thread + 1, threads); i++) {
      uint8_t* row = p.mask + i * p.H;
      memset(row, 0, size_t(p.H));
      for (int bit = 0; bit < 3; bit++) {
        if (p.threshold[bit] == 0) continue;
        const int64_t stream = p.first_stream + i % p.D * p.stream_step + bit;
        for (int64_t u = 0; u < p.H; u += Philox::kBatch) {
          philox.draw(u / 8, p.t[i / p.D], p.b[i / p.D], stream, number);
          const int64_t n = p.H - u < Philox::kBatch ? p.H - u : Philox::kBatch;
          for (int64_t k = 0; k < n; k++)
            row[u + k] |= uint8_t(uint8_t(number[k] < p.threshold[bit]) << bit);
        }
      }
    }
  });
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
