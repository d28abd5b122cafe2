// Every instruction that CUDA C++ has no name for, one small function each; nothing else in
// csrc/cuda holds inline PTX. tests/cuda_on_cpu/ptx.h has the same functions in C++, so that the
// kernels run on a CPU too.
//
// Memory: "shared" pointers are generic pointers into this block's shared memory.
#pragma once

#ifdef SEQKERN_CUDA_ON_CPU
#include "cuda_on_cpu/ptx.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

// The block's dynamic shared memory, 128-byte aligned.
#define SEQKERN_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

namespace seqkern::cuda {

// ---- matrix products ----------------------------------------------------------------------------
//
// c += a b for a [16, k] and b [k, 8], if `wanted`, on which the warp agrees (a predicate: around a
// branch the compiler moves c). The lane's l / 4 is its row r, l % 4 its column q.
//   c[0..1]  (r, 2q..2q+1)   c[2..3]  (r + 8, 2q..2q+1)
// 16 bit, k = 16, two values a register, the lower k in the lower half:
//   a[0]  (r, 2q..)   a[1]  (r + 8, 2q..)   a[2]  (r, 2q+8..)   a[3]  (r + 8, 2q+8..)
//   b[0]  (2q.., r)   b[1]  (2q+8.., r)
// TF32, k = 8, one value a register (of which the hardware reads the upper 19 bits):
//   a[0]  (r, q)   a[1]  (r + 8, q)   a[2]  (r, q + 4)   a[3]  (r + 8, q + 4)
//   b[0]  (q, r)   b[1]  (q + 4, r)

#define SEQKERN_MMA(name, shape_and_types)                                                   \
  __device__ __forceinline__ void name(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, \
                                       uint32_t a3, uint32_t b0, uint32_t b1,                \
                                       bool wanted = true) {                                 \
    asm volatile(                                                                            \
        "{\n"                                                                                \
        ".reg .pred p;\n"                                                                    \
        "setp.ne.s32 p, %10, 0;\n"                                                           \
        "@p mma.sync.aligned." shape_and_types                                               \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"                 \
        "}"                                                                                  \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                     \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(int(wanted)));           \
  }
SEQKERN_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
SEQKERN_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
SEQKERN_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef SEQKERN_MMA

// The TF32 number nearest to x, in float32's format.
__device__ __forceinline__ float to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// ---- numbers ------------------------------------------------------------------------------------

// Rounded to the nearest, ties to even. The instruction that packs two: the one for a single number
// is the special function unit's.
__device__ __forceinline__ uint16_t f16_bits(float x) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(bits) : "f"(x), "f"(0.0f));
  return uint16_t(bits);
}
__device__ __forceinline__ float from_f16_bits(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ __forceinline__ uint16_t bf16_bits(float x) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(bits) : "f"(x), "f"(0.0f));
  return uint16_t(bits);
}
__device__ __forceinline__ float from_bf16_bits(uint16_t bits) {
  return __uint_as_float(uint32_t(bits) << 16);
}

// e^x and x / y to a few ulp, by the special function unit. Subnormal numbers count as 0.
__device__ __forceinline__ float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
__device__ __forceinline__ float fast_divide(float x, float y) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(y));
  return x * reciprocal;
}

// x, which is the same in all lanes of the warp, in a way that the compiler knows it.
__device__ __forceinline__ int warp_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// ---- between blocks, through global memory ------------------------------------------------------

// Publishes what this thread wrote, and what others wrote before a __syncthreads it took part in.
__device__ __forceinline__ void release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)),
               "r"(value)
               : "memory");
}

// Sees what was published with the value read.
__device__ __forceinline__ uint32_t acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(flag))
               : "memory");
  return value;
}

// 16 aligned bytes that another block wrote: from L2, not from this multiprocessor's L1.
__device__ __forceinline__ uint4 load_from_l2(const void* global) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(global))
               : "memory");
  return v;
}

// ---- between the blocks of a cluster (sm_90 on) -------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return uint32_t(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
#else
  return 0;
#endif
}

// Every thread of every block of the cluster.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}

// A transaction barrier in shared memory: a phase ends when `arrivals` threads have arrived and all
// the bytes expected are there. Made by one thread, then mbarrier_init_done and a cluster_sync.
__device__ __forceinline__ void mbarrier_init(uint64_t* shared, int arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(shared)),
               "r"(arrivals)
               : "memory");
#endif
}
__device__ __forceinline__ void mbarrier_init_done() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives, and expects that many bytes in this phase.
__device__ __forceinline__ void mbarrier_expect(uint64_t* shared, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(shared)),
      "r"(bytes)
      : "memory");
#endif
}

// Waits until the phase of this parity has ended (phases count from 0), and sees its bytes.
__device__ __forceinline__ void mbarrier_wait(uint64_t* shared, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(shared)), "r"(parity)
        : "memory");
#endif
}

// Writes v to where block `rank` of the cluster has `shared`, 16-byte aligned, and counts its 16
// bytes on that block's `barrier`. Asynchronous.
__device__ __forceinline__ void push(void* shared, uint64_t* barrier, int rank, uint4 v) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote, remote_barrier;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote)
               : "r"(shared_address(shared)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote_barrier)
               : "r"(shared_address(barrier)), "r"(rank));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, "
      "[%1];" ::"r"(remote),
      "r"(remote_barrier), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
#endif
}

}  // namespace seqkern::cuda
#endif
