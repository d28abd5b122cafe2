// csrc/cuda/ptx.cuh's functions on the emulated device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "device.h"

#define SEQKERN_SHARED_MEMORY(name) \
  unsigned char* const name = ::seqkern::cuda_on_cpu::shared_memory()

namespace seqkern::cuda {

// ---- matrix products ----------------------------------------------------------------------------

#define SEQKERN_MMA(name, type)                                                                    \
  inline void name(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, \
                   uint32_t b1, bool wanted = true) {                                              \
    if (wanted) cuda_on_cpu::mma(cuda_on_cpu::Matrix::type, c, {a0, a1, a2, a3}, {b0, b1});        \
  }
SEQKERN_MMA(mma_f16, f16)
SEQKERN_MMA(mma_bf16, bf16)
SEQKERN_MMA(mma_tf32, tf32)
#undef SEQKERN_MMA

// Ties away from zero.
inline float to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000) == 0x7f800000) return x != x ? __uint_as_float(0x7fffffff) : x;
  return __uint_as_float((bits + 0x1000) & ~0x1fffu);
}

// ---- numbers ------------------------------------------------------------------------------------

inline uint16_t f16_bits(float x) {
  if (x != x) return 0x7fff;
  const _Float16 rounded = _Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline float from_f16_bits(uint16_t bits) {
  // The exponent's bias by a product, which is exact and makes subnormal numbers normal.
  const uint32_t magnitude = bits & 0x7fff;
  uint32_t wide = __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f);
  if (magnitude >= 0x7c00) wide |= 0x7f800000;
  return __uint_as_float(wide | uint32_t(bits & 0x8000) << 16);
}
inline uint16_t bf16_bits(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = __float_as_uint(x);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16_bits(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

inline float fast_exp(float x) { return __expf(x); }
inline float fast_divide(float x, float y) { return __fdividef(x, y); }

inline int warp_uniform(int x) { return x; }

// ---- between blocks, through global memory ------------------------------------------------------

inline void release(uint32_t* flag, uint32_t value) { cuda_on_cpu::release(flag, value); }
inline uint32_t acquire(const uint32_t* flag) { return cuda_on_cpu::acquire(flag); }
inline uint4 load_from_l2(const void* global) {
  if (uintptr_t(global) % 16 != 0) cuda_on_cpu::fail("load_from_l2: %p is not aligned", global);
  uint4 v;
  std::memcpy(&v, global, 16);
  return v;
}

// ---- between the blocks of a cluster ------------------------------------------------------------

inline uint32_t shared_address(const void* shared) {
  return uint32_t(cuda_on_cpu::shared_offset(shared));
}
inline int cluster_rank() { return cuda_on_cpu::cluster_rank(); }
inline void cluster_sync() { cuda_on_cpu::sync_cluster(); }
inline void mbarrier_init(uint64_t* shared, int arrivals) {
  cuda_on_cpu::mbarrier_init(shared, arrivals);
}
inline void mbarrier_init_done() {}
inline void mbarrier_expect(uint64_t* shared, uint32_t bytes) {
  cuda_on_cpu::mbarrier_expect(shared, bytes);
}
inline void mbarrier_wait(uint64_t* shared, uint32_t parity) {
  cuda_on_cpu::mbarrier_wait(shared, parity);
}
inline void push(void* shared, uint64_t* barrier, int rank, uint4 v) {
  cuda_on_cpu::push(shared, barrier, rank, &v);
}

}  // namespace seqkern::cuda
