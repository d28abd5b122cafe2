// The emulated device, proved on kernels of a few lines: right ones give the right values in every
// order, and of each wrong one some seed tells.
//
//   selftest          every check, by name
//   selftest speed    switches per second

#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "ptx.h"

namespace {

using namespace seqkern::cuda;
namespace device = seqkern::cuda_on_cpu;

constexpr int kSeeds = 20;

struct Shape {
  unsigned grid, block, shared_bytes = 0, cluster = 1;
  bool cooperative = false;
};

template <class... Parameters, class... Arguments>
cudaError_t try_launch(void (*kernel)(Parameters...), const Shape& shape, Arguments... arguments) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {shape.cluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = shape.cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = {shape.grid};
  config.blockDim = {shape.block};
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, Arguments... arguments) {
  if (const cudaError_t error = try_launch(kernel, shape, arguments...))
    throw std::logic_error(cudaGetErrorString(error));
}

void expect(bool holds, const char* what) {
  if (!holds) throw std::logic_error(what);
}

// That some seed's run ends with an error of this text.
template <class Run>
void expect_error(const char* text, const Run& run) {
  std::string seen = "none";
  for (int seed = 0; seed < kSeeds; seed++) {
    device::configure(uint64_t(seed), {});
    try {
      run();
    } catch (const std::runtime_error& error) {
      seen = error.what();
      if (seen.find(text) != std::string::npos) return;
    }
  }
  throw std::logic_error("expected the error \"" + std::string(text) + "\", last got: " + seen);
}

template <class Run>
void for_seeds(const Run& run) {
  for (int seed = 0; seed < kSeeds; seed++) {
    device::configure(uint64_t(seed), {});
    run();
  }
}

uint32_t noise(uint32_t i) { return (i * 2654435761u + 12345) ^ (i * 40503u) << 7; }
float small(uint32_t i) { return float(int(noise(i) >> 16 & 2047) - 1024) / 512; }

// ---- __syncthreads ------------------------------------------------------------------------------

// sums[block] = sum of in[block]; in [grid, block]
template <bool synchronised>
__global__ void sum_kernel(const int* in, int* sums) {
  SEQKERN_SHARED_MEMORY(memory);
  int* parts = reinterpret_cast<int*>(memory);
  parts[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (synchronised)
      __syncthreads();
    else
      __syncwarp();
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = parts[0];
}

template <bool synchronised>
bool sums_are_right() {
  std::vector<int> in(6 * 256), sums(6), right(6);
  for (size_t i = 0; i < in.size(); i++) right[i / 256] += in[i] = int(i * i % 1000);
  launch(sum_kernel<synchronised>, {6, 256, 1024}, in.data(), sums.data());
  return sums == right;
}

void sum() {
  for_seeds([] { expect(sums_are_right<true>(), "wrong sums"); });
}

void sum_without_barriers() {
  int wrong = 0;
  for_seeds([&] { wrong += !sums_are_right<false>(); });
  expect(wrong > kSeeds / 2, "a missing __syncthreads went unseen");
}

// ---- the barriers of parts ----------------------------------------------------------------------

enum class Fault { none, branch, early_end, lane_ends, mixed };

__global__ void barriers_kernel(Fault fault) {
  const unsigned i = threadIdx.x;
  if (fault == Fault::branch && i < 40) __syncwarp();
  if (fault == Fault::early_end && i >= 64) return;
  if (fault == Fault::lane_ends && i >= 64) {
    if (i < 70) __syncwarp();
    return;
  }
  if (fault == Fault::mixed && i < 32) {
    float c[4] = {};
    if (i < 16)
      mma_f16(c, 0, 0, 0, 0, 0, 0);
    else
      mma_bf16(c, 0, 0, 0, 0, 0, 0);
  }
  __syncthreads();
}

void barriers() {
  for_seeds([] { launch(barriers_kernel, {3, 96}, Fault::none); });
  for (const char* text : {"deadlock", "block 0: threads 0-31,40-95 wait in __syncthreads",
                           "block 0: threads 32-39 wait in __syncwarp"})
    expect_error(text, [] { launch(barriers_kernel, {1, 96}, Fault::branch); });
  expect_error("ends while", [] { launch(barriers_kernel, {1, 96}, Fault::early_end); });
  expect_error("wait in __syncthreads", [] { launch(barriers_kernel, {1, 96}, Fault::early_end); });
  expect_error("of its block have ended",
               [] { launch(barriers_kernel, {1, 96}, Fault::early_end); });
  expect_error("ends while lanes", [] { launch(barriers_kernel, {1, 96}, Fault::lane_ends); });
  expect_error("of its warp have ended",
               [] { launch(barriers_kernel, {1, 96}, Fault::lane_ends); });
  expect_error("of its warp are in mma_", [] { launch(barriers_kernel, {1, 96}, Fault::mixed); });
}

// ---- warps --------------------------------------------------------------------------------------

// out[i]: in [32 n] summed over each four lanes, plus what lane 5 has
__global__ void shuffle_kernel(const float* in, float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  float x = in[i];
  for (int lanes = 1; lanes < 4; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  out[i] = x + __shfl_sync(0xffffffffu, in[i], 5);
}

void shuffles() {
  std::vector<float> in(128), out(128);
  for (unsigned i = 0; i < 128; i++) in[i] = small(i);
  for_seeds([&] {
    launch(shuffle_kernel, {2, 64}, in.data(), out.data());
    for (unsigned i = 0; i < 128; i++) {
      const float* four = &in[i / 4 * 4];
      expect(out[i] == four[0] + four[1] + four[2] + four[3] + in[i / 32 * 32 + 5],
             "a wrong shuffle");
    }
  });
}

// Lane l passes a value to lane 31 - l through shared memory.
template <bool synchronised>
__global__ void reverse_kernel(int* out) {
  SEQKERN_SHARED_MEMORY(memory);
  int* values = reinterpret_cast<int*>(memory);
  values[threadIdx.x] = int(threadIdx.x) + 1;
  if (synchronised) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 31];
}

template <bool synchronised>
bool reverses() {
  std::vector<int> out(64);
  launch(reverse_kernel<synchronised>, {1, 64, 256}, out.data());
  for (int i = 0; i < 64; i++)
    if (out[size_t(i)] != (i ^ 31) + 1) return false;
  return true;
}

void warp_barriers() {
  int wrong = 0;
  for_seeds([&] {
    expect(reverses<true>(), "wrong values");
    wrong += !reverses<false>();
  });
  expect(wrong == kSeeds, "a missing __syncwarp went unseen");
}

// ---- mma ----------------------------------------------------------------------------------------

enum class Type { f16, bf16, tf32 };

uint32_t bits_of(Type type, float x) {
  return type == Type::f16 ? f16_bits(x) : type == Type::bf16 ? bf16_bits(x) : __float_as_uint(x);
}

// c [16, 8] += a [16, K] b [K, 8], by the layout in ptx.cuh
__global__ void mma_kernel(Type type, const float* a, const float* b, float* c) {
  const unsigned r = threadIdx.x / 4, q = threadIdx.x % 4;
  uint32_t ra[4], rb[2];
  for (unsigned i = 0; i < 4; i++) {
    const unsigned row = r + i % 2 * 8;
    if (type == Type::tf32) {
      ra[i] = bits_of(type, a[row * 8 + q + i / 2 * 4]);
      if (i < 2) rb[i] = bits_of(type, b[(q + i * 4) * 8 + r]);
    } else {
      const unsigned k = 2 * q + i / 2 * 8;
      ra[i] = bits_of(type, a[row * 16 + k]) | bits_of(type, a[row * 16 + k + 1]) << 16;
      if (i < 2) {
        const unsigned row_b = 2 * q + i * 8;
        rb[i] = bits_of(type, b[row_b * 8 + r]) | bits_of(type, b[(row_b + 1) * 8 + r]) << 16;
      }
    }
  }
  float sums[4];
  for (unsigned i = 0; i < 4; i++) sums[i] = c[(r + i / 2 * 8) * 8 + 2 * q + i % 2];
  if (type == Type::f16)
    mma_f16(sums, ra[0], ra[1], ra[2], ra[3], rb[0], rb[1]);
  else if (type == Type::bf16)
    mma_bf16(sums, ra[0], ra[1], ra[2], ra[3], rb[0], rb[1]);
  else
    mma_tf32(sums, ra[0], ra[1], ra[2], ra[3], rb[0], rb[1]);
  for (unsigned i = 0; i < 4; i++) c[(r + i / 2 * 8) * 8 + 2 * q + i % 2] = sums[i];
}

float rounded(Type type, float x) {
  if (type == Type::f16) return from_f16_bits(f16_bits(x));
  if (type == Type::bf16) return from_bf16_bits(bf16_bits(x));
  return __uint_as_float(__float_as_uint(x) & ~0x1fffu);
}

void products() {
  for (const Type type : {Type::f16, Type::bf16, Type::tf32}) {
    const unsigned K = type == Type::tf32 ? 8 : 16;
    std::vector<float> a(16 * K), b(K * 8), c(16 * 8);
    for (unsigned i = 0; i < a.size(); i++) a[i] = small(i) * 1.0009765f;
    for (unsigned i = 0; i < b.size(); i++) b[i] = small(i + 1000) * 0.9990234f;
    for (unsigned i = 0; i < c.size(); i++) c[i] = small(i + 2000);
    std::vector<double> right(16 * 8), error(16 * 8);  // the sum, and how much may be cut off
    for (unsigned m = 0; m < 16; m++)
      for (unsigned n = 0; n < 8; n++) {
        double sum = c[m * 8 + n], largest = std::abs(sum);
        for (unsigned k = 0; k < K; k++) {
          const double term = double(rounded(type, a[m * K + k])) * rounded(type, b[k * 8 + n]);
          sum += term;
          largest = std::max(largest, std::abs(term));
        }
        right[m * 8 + n] = sum;
        error[m * 8 + n] = (K + 1) * 0x1p-25 * largest + 0x1p-23 * std::abs(sum);
      }
    launch(mma_kernel, {1, 32}, type, a.data(), b.data(), c.data());
    for (size_t i = 0; i < c.size(); i++)
      expect(std::abs(c[i] - right[i]) <= error[i], "a wrong product");

    // Towards zero, as on the device: 1 + 3/4 of an ulp, and the same below zero.
    for (const float sign : {1.f, -1.f}) {
      std::fill(a.begin(), a.end(), 0.f), std::fill(b.begin(), b.end(), 0.f);
      std::fill(c.begin(), c.end(), sign);
      a[0] = 0x1.8p-12f, b[0] = sign * 0x1p-12f;
      launch(mma_kernel, {1, 32}, type, a.data(), b.data(), c.data());
      expect(c[0] == sign, "a sum that is not truncated");
    }
  }
}

// Nearest values by search, not by bits.
void roundings() {
  expect(to_tf32(1 + 0x1p-11f) == 1 + 0x1p-10f, "to_tf32: a tie goes away from zero");
  expect(to_tf32(-1 - 0x1p-11f) == -1 - 0x1p-10f, "to_tf32: a tie goes away from zero");
  expect(to_tf32(1 + 0x1.ffep-12f) == 1, "to_tf32: down");
  expect(std::isinf(to_tf32(INFINITY)) && std::isnan(to_tf32(NAN)), "to_tf32: not finite");
  expect(bf16_bits(1 + 0x1p-8f) == 0x3f80 && bf16_bits(1 + 0x3p-8f) == 0x3f82, "bf16: ties");
  expect(std::isnan(from_bf16_bits(bf16_bits(__uint_as_float(0x7f800001)))), "bf16: NaN");
  expect(std::isinf(from_bf16_bits(bf16_bits(3.4e38f))), "bf16: overflow");
  for (uint32_t bits = 0; bits < 0x10000; bits++) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float magnitude = exponent == 0 ? std::ldexp(float(fraction), -24)
                            : exponent == 31
                                ? (fraction != 0 ? NAN : INFINITY)
                                : std::ldexp(float(fraction + 1024), int(exponent) - 25);
    const float x = bits >> 15 ? -magnitude : magnitude, y = from_f16_bits(uint16_t(bits));
    expect(std::isnan(x) ? std::isnan(y) : x == y && std::signbit(x) == std::signbit(y),
           "from_f16_bits");
    expect(std::isnan(x) ? std::isnan(from_f16_bits(f16_bits(x))) : f16_bits(x) == bits,
           "f16_bits of a float16");
    if (exponent < 30 && bits >> 15 == 0) {
      const float next = from_f16_bits(uint16_t(bits + 1)), middle = (x + next) / 2;
      expect(f16_bits(middle) == bits + (bits & 1), "f16_bits: a tie");
      expect(f16_bits(std::nextafter(middle, 0.f)) == bits, "f16_bits: down");
      expect(f16_bits(std::nextafter(middle, next)) == bits + 1, "f16_bits: up");
    }
  }
  expect(f16_bits(65519) == 0x7bff && f16_bits(65520) == 0x7c00, "f16_bits: overflow");
}

// ---- a cluster's ring ---------------------------------------------------------------------------

enum class Ring {
  right,
  no_push,  // block 1's last push of a step is missing
  no_cluster_sync,
  one_buffer,  // instead of two
  expects_less,
  no_last_wait,  // ends with pushes on their way
  no_barrier,    // pushes to where no barrier is
};

// Every thread t < 32 of block r passes 16 bytes per step on to block r + 1, which adds r + 1.
// out [grid, 32]
__global__ void ring_kernel(Ring what, int steps, uint32_t* out) {
  SEQKERN_SHARED_MEMORY(memory);
  auto* buffers = reinterpret_cast<uint4*>(memory);  // [2, 32]
  auto* barriers = reinterpret_cast<uint64_t*>(memory + 2 * 32 * 16);
  const int rank = cluster_rank(), ranks = 4, t = int(threadIdx.x);
  if (t == 0) {
    for (int i = 0; i < 2; i++) mbarrier_init(&barriers[i], 1);
    mbarrier_init_done();
  }
  if (what != Ring::no_cluster_sync) cluster_sync();
  __syncthreads();
  uint32_t value = uint32_t(rank * 100 + t);
  const uint32_t bytes = what == Ring::expects_less ? 31 * 16 : 32 * 16;
  for (int s = 0; s < steps; s++) {
    const int buffer = what == Ring::one_buffer ? 0 : s % 2;
    const int barrier = s % 2;
    if (t == 0) mbarrier_expect(&barriers[barrier], bytes);
    if (t < 32 && !(what == Ring::no_push && rank == 1 && t == 31))
      push(&buffers[buffer * 32 + t], &barriers[what == Ring::no_barrier ? 2 : barrier],
           (rank + 1) % ranks, {value, value, value, value + 1});
    if (what == Ring::no_last_wait && s == steps - 1) break;
    mbarrier_wait(&barriers[barrier], uint32_t(s / 2 % 2));
    if (t < 32) {
      const uint4 got = buffers[buffer * 32 + t];
      value = got.x == got.y && got.w == got.x + 1 ? got.x + uint32_t(rank) + 1 : 0;
    }
    // Whose push of step s + 1 has come here, has read what was pushed to it at step s; but block
    // r + 1 may still read what r is about to write at step s + 2: hence once round the ring.
    cluster_sync();
  }
  if (t < 32) out[blockIdx.x * 32 + threadIdx.x] = value;
}

bool ring_is_right(Ring what) {
  constexpr int kSteps = 12, kGrid = 8;
  constexpr Shape kShape{kGrid, 64, 2 * 32 * 16 + 24, 4};
  std::vector<uint32_t> out(kGrid * 32);
  launch(ring_kernel, kShape, what, kSteps, out.data());
  for (uint32_t block = 0; block < kGrid; block++)
    for (uint32_t t = 0; t < 32; t++) {
      const uint32_t from = block % 4;  // 12 steps: three times round
      if (out[block * 32 + t] != from * 100 + t + 3 * (1 + 2 + 3 + 4)) return false;
    }
  return true;
}

void ring() {
  for_seeds([] { expect(ring_is_right(Ring::right), "wrong values"); });
}
void ring_without_a_push() {
  expect_error("deadlock", [] { ring_is_right(Ring::no_push); });
  expect_error("wait in mbarrier_wait(at 1024, parity 0): phase 0, 0 arrivals and 16 bytes to come",
               [] { ring_is_right(Ring::no_push); });
}
void ring_without_cluster_sync() {
  expect_error("has no mbarrier at 1024 (yet)", [] { ring_is_right(Ring::no_cluster_sync); });
}
void ring_with_more_bytes_than_expected() {
  expect_error("16 bytes more came in phase", [] { ring_is_right(Ring::expects_less); });
}
void ring_that_ends_early() {
  expect_error("the block ends", [] { ring_is_right(Ring::no_last_wait); });
  expect_error("a push from block", [] { ring_is_right(Ring::no_last_wait); });
}
void ring_without_a_barrier() {
  expect_error("push: block", [] { ring_is_right(Ring::no_barrier); });
}

// Two producers' pushes to one buffer, nobody waits in between: seen as a wrong value.
template <bool waits>
__global__ void overwrite_kernel(uint32_t* out) {
  SEQKERN_SHARED_MEMORY(memory);
  auto* barrier = reinterpret_cast<uint64_t*>(memory + 16);
  if (threadIdx.x == 0) mbarrier_init(barrier, 1);
  mbarrier_init_done();
  cluster_sync();
  if (threadIdx.x == 0) {
    for (uint32_t s = 0; s < 4; s++) {
      mbarrier_expect(barrier, 16);
      push(memory, barrier, 1 - cluster_rank(), {s, s, s, s});
      mbarrier_wait(barrier, s % 2);
      if (out[blockIdx.x] == s) out[blockIdx.x] += *reinterpret_cast<uint32_t*>(memory) == s;
      if (waits) cluster_sync();
    }
  }
  if (!waits) cluster_sync();
}

void overwritten_buffer() {
  int wrong = 0;
  for_seeds([&] {
    std::vector<uint32_t> out(2);
    launch(overwrite_kernel<false>, {2, 1, 24, 2}, out.data());
    wrong += out[0] != 4 || out[1] != 4;
    out = {0, 0};
    launch(overwrite_kernel<true>, {2, 1, 24, 2}, out.data());
    expect(out[0] == 4 && out[1] == 4, "wrong values");
  });
  expect(wrong > 0, "a buffer overwritten too early went unseen");
}

// A waiter that comes two phases late.
__global__ void late_kernel() {
  SEQKERN_SHARED_MEMORY(memory);
  auto* barrier = reinterpret_cast<uint64_t*>(memory);
  if (threadIdx.x == 0) mbarrier_init(barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; i++) mbarrier_expect(barrier, 0);
  if (threadIdx.x == 32) mbarrier_wait(barrier, 0);
}
void late_waiter() {
  expect_error("mbarrier_wait(at 0, parity 0): phase 2", [] { launch(late_kernel, {1, 33, 8}); });
}

// ---- flags across the grid ----------------------------------------------------------------------

enum class Flags { right, no_barrier, no_release, skips_a_block };

// Each block adds up, in every step, what all blocks wrote in the step before. values [2, grid],
// flags [grid]
__global__ void flags_kernel(Flags what, int steps, uint32_t* values, uint32_t* flags,
                             uint32_t* out) {
  const unsigned grid = gridDim.x, me = blockIdx.x;
  uint32_t mine = me;
  for (int s = 0; s < steps; s++) {
    if (threadIdx.x == 17) values[unsigned(s % 2) * grid + me] = mine;
    if (what != Flags::no_barrier) __syncthreads();
    if (threadIdx.x == 0 && !(what == Flags::no_release && me == 2 && s == 3))
      release(&flags[me], uint32_t(s) + 1);
    if (threadIdx.x < grid && !(what == Flags::skips_a_block && threadIdx.x == 1))
      while (acquire(&flags[threadIdx.x]) < uint32_t(s) + 1) {
      }
    __syncthreads();
    mine = me;
    for (unsigned i = 0; i < grid; i++) mine += values[unsigned(s % 2) * grid + i];
  }
  if (threadIdx.x == 0) out[me] = mine;
}

bool flags_are_right(Flags what, bool cooperative = true) {
  constexpr unsigned kGrid = 24;
  constexpr int kSteps = 6;
  std::vector<uint32_t> values(2 * kGrid), flags(kGrid), out(kGrid), right(kGrid), next(kGrid);
  for (uint32_t i = 0; i < kGrid; i++) right[i] = i;
  for (int s = 0; s < kSteps; s++) {
    for (uint32_t i = 0; i < kGrid; i++) {
      next[i] = i;
      for (const uint32_t each : right) next[i] += each;
    }
    right = next;
  }
  launch(flags_kernel, {kGrid, 64, 0, 1, cooperative}, what, kSteps, values.data(), flags.data(),
         out.data());
  expect(flags == std::vector<uint32_t>(kGrid, kSteps), "a flag was lost");
  return out == right;
}

void flags() {
  for_seeds([] { expect(flags_are_right(Flags::right), "wrong values"); });
}
void broken_flags() {
  int no_barrier = 0, skips_a_block = 0;  // seeds that tell
  for_seeds([&] {
    no_barrier += !flags_are_right(Flags::no_barrier);
    skips_a_block += !flags_are_right(Flags::skips_a_block);
  });
  expect(no_barrier > 0, "a missing __syncthreads before a release went unseen");
  expect(skips_a_block > 0, "a flag that is not waited for went unseen");
  expect_error("deadlock", [] { flags_are_right(Flags::no_release); });
  expect_error("threads 2 wait in acquire", [] { flags_are_right(Flags::no_release); });
  expect_error("blocks not started", [] { flags_are_right(Flags::right, false); });
}

// ---- the device ---------------------------------------------------------------------------------

__global__ void nothing_kernel() {}
__global__ void throw_kernel() { throw std::runtime_error("from a kernel"); }
__global__ void poison_kernel(float* out) {
  SEQKERN_SHARED_MEMORY(memory);
  *out = reinterpret_cast<float*>(memory)[1];
}

void limits() {
  device::configure(0, {80, 108, 108, 163 << 10, 1});
  const auto error_of = [](Shape shape) { return try_launch(nothing_kernel, shape); };
  expect(error_of({108, 32, 0, 1, true}) == cudaSuccess, "fits");
  expect(error_of({109, 32, 0, 1, true}) == cudaErrorCooperativeLaunchTooLarge, "too many blocks");
  expect(error_of({109, 32}) == cudaSuccess, "not cooperative");
  expect(error_of({2, 32, 0, 2}) == cudaErrorInvalidClusterSize, "no clusters");
  expect(error_of({2, 32, 49 << 10}) == cudaErrorInvalidValue, "shared memory not asked for");
  const auto shared = cudaFuncAttributeMaxDynamicSharedMemorySize;
  expect(cudaFuncSetAttribute(nothing_kernel, shared, 164 << 10) == cudaErrorInvalidValue, "163");
  expect(cudaFuncSetAttribute(nothing_kernel, shared, 163 << 10) == cudaSuccess, "163");
  expect(error_of({2, 32, 163 << 10}) == cudaSuccess, "163");
  device::configure(0, {});
  expect(error_of({16, 32, 0, 16}) == cudaErrorInvalidClusterSize, "a non-portable cluster");
  expect(cudaGetLastError() == cudaErrorInvalidClusterSize && cudaGetLastError() == cudaSuccess,
         "cudaGetLastError");
  (void)cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  expect(error_of({16, 32, 0, 16}) == cudaSuccess, "a cluster of 16");
  expect(error_of({132, 32, 0, 4, true}) == cudaSuccess, "33 clusters of 4");
  expect(error_of({136, 32, 0, 8, true}) == cudaErrorCooperativeLaunchTooLarge, "17 of 8");
  float value = 0;
  launch(poison_kernel, {1, 1, 8}, &value);
  expect(std::isnan(value), "shared memory is not NaN to begin with");
  expect_error("from a kernel", [] { launch(throw_kernel, {2, 64}); });
  for_seeds([] { expect(sums_are_right<true>(), "wrong sums after an error"); });
}

// 64 blocks of 256 threads.
void many_threads() {
  std::vector<int> in(64 * 256, 1), sums(64);
  launch(sum_kernel<true>, {64, 256, 1024, 1, true}, in.data(), sums.data());
  expect(sums == std::vector<int>(64, 256), "wrong sums");
}

// The same seed gives the same run.
void seeds() {
  const auto switches = [](uint64_t seed) {
    device::configure(seed, {});
    flags_are_right(Flags::right);
    ring_is_right(Ring::right);
    return device::counters().switches;
  };
  expect(switches(1) == switches(1), "a seed's run is not the same again");
  expect(switches(1) != switches(2), "two seeds' runs are the same");
}

// ---- main ---------------------------------------------------------------------------------------

__global__ void mma_loop_kernel(int n, float* out) {
  float c[4] = {};
  for (int i = 0; i < n; i++) {
    for (int k = 0; k < 16; k++) mma_bf16(c, 1, 2, 3, 4, 5, 6);
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = c[0];
}
__global__ void barrier_loop_kernel(int n) {
  for (int i = 0; i < n; i++) __syncthreads();
}

template <class Run>
void time_of(const char* what, const Run& run) {
  device::configure(0, {});
  const auto start = std::chrono::steady_clock::now();
  run();
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  std::printf("%-32s %6.3f s, %5.1f million switches per second\n", what, taken.count(),
              double(device::counters().switches) / taken.count() / 1e6);
}

void speed() {
  std::vector<float> out(64);
  time_of("mma, 8 blocks", [&] { launch(mma_loop_kernel, {8, 256, 0, 8}, 20, out.data()); });
  time_of("mma, 64 blocks",
          [&] { launch(mma_loop_kernel, {64, 256, 0, 1, true}, 10, out.data()); });
  time_of("__syncthreads, 1 block", [] { launch(barrier_loop_kernel, {1, 256}, 4000); });
  time_of("__syncthreads, 64 blocks",
          [] { launch(barrier_loop_kernel, {64, 256, 0, 1, true}, 100); });
  time_of("1000 launches of 4 blocks", [] {
    for (int i = 0; i < 1000; i++) launch(nothing_kernel, {4, 256});
  });
}

constexpr struct {
  const char* name;
  void (*run)();
} kChecks[] = {
#define CHECK(name) {#name, name}
    CHECK(sum),
    CHECK(sum_without_barriers),
    CHECK(barriers),
    CHECK(shuffles),
    CHECK(warp_barriers),
    CHECK(products),
    CHECK(roundings),
    CHECK(ring),
    CHECK(ring_without_a_push),
    CHECK(ring_without_cluster_sync),
    CHECK(ring_with_more_bytes_than_expected),
    CHECK(ring_that_ends_early),
    CHECK(ring_without_a_barrier),
    CHECK(overwritten_buffer),
    CHECK(late_waiter),
    CHECK(flags),
    CHECK(broken_flags),
    CHECK(limits),
    CHECK(many_threads),
    CHECK(seeds),
#undef CHECK
};

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "speed") == 0) return speed(), 0;
  int failed = 0;
  for (const auto& check : kChecks) {
    if (argc > 1 && std::strcmp(argv[1], check.name) != 0) continue;
    device::configure(0, {});
    try {
      check.run();
      std::printf("ok %s\n", check.name);
    } catch (const std::exception& error) {
      std::printf("FAILED %s: %s\n", check.name, error.what());
      failed++;
    }
  }
  return failed != 0;
}
