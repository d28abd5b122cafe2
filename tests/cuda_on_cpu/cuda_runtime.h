// The names of the CUDA runtime that csrc/cuda uses, for a C++ compiler: see device.h.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "device.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// ---- types and built-in variables ---------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define SEQKERN_VECTORS(T, name)                             \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(16) name##4 { T x, y, z, w; };              \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SEQKERN_VECTORS(unsigned, uint)
SEQKERN_VECTORS(int, int)
SEQKERN_VECTORS(float, float)
#undef SEQKERN_VECTORS

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- device functions ---------------------------------------------------------------------------

inline void __syncthreads() { seqkern::cuda_on_cpu::sync_block(); }
inline void __nanosleep(unsigned) { seqkern::cuda_on_cpu::pause(); }

inline void cuda_on_cpu_check_mask(unsigned mask) {
  if (mask != 0xffffffffu) seqkern::cuda_on_cpu::fail("a warp operation with mask %08x", mask);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_cpu_check_mask(mask);
  seqkern::cuda_on_cpu::sync_warp();
}
// `width`: lanes in groups of as many, each to itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  cuda_on_cpu_check_mask(mask);
  const unsigned lane = threadIdx.x % 32;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = seqkern::cuda_on_cpu::shuffle(bits, (lane & ~(width - 1)) | (source & (width - 1)));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return __shfl_sync(mask, value, int(threadIdx.x % 32) ^ lanes, width);
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr auto min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(b) < C(a) ? C(b) : C(a);
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr auto max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(a) < C(b) ? C(b) : C(a);
}

// ---- the device ---------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorInvalidClusterSize = 912,
};
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();  // and forgets it
cudaError_t cudaPeekAtLastError();

using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrClusterLaunch = 120,
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

// ---- kernels ------------------------------------------------------------------------------------

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion;
  int maxDynamicSharedSizeBytes;
};
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
};
union cudaLaunchAttributeValue {
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// A launch's configuration, and where in the source it stands.
struct cuda_on_cpu_site {
  const cudaLaunchConfig_t* config;
  const char* file;
  int line;
  cuda_on_cpu_site(const cudaLaunchConfig_t* config, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE())
      : config(config), file(file), line(line) {}
};

// Checks as the driver does, then runs the kernel to its end. Throws std::runtime_error where a GPU
// would hang or go astray (device.h).
cudaError_t cuda_on_cpu_launch(const cuda_on_cpu_site& site, const void* kernel,
                               std::function<void()> call);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(cuda_on_cpu_site site, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<std::remove_cv_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  return cuda_on_cpu_launch(site, reinterpret_cast<const void*>(kernel),
                            [&] { std::apply(kernel, values); });
}

// The largest that the device grants, whatever the blocks' size.
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, const void* kernel,
                                                 const cudaLaunchConfig_t* config);
template <class... Parameters>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, void (*kernel)(Parameters...),
                                                 const cudaLaunchConfig_t* config) {
  return cudaOccupancyMaxPotentialClusterSize(blocks, reinterpret_cast<const void*>(kernel),
                                              config);
}
