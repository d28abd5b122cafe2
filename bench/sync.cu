// What a recurrent step costs a GPU before it computes anything: barriers, exchanges, re-reading
// weights; and the rate of the matrix instructions. bench/sync.py compiles and runs it; each line
// that it prints is a JSON object, "us" being microseconds per step.
//
//   launch          an empty kernel after another: what the step-wise tier pays per launch
//   grid_sync       cooperative groups' barrier over `blocks`
//   flags           the same by one flag per block: release, then every thread acquires one
//   flag_exchange   16 bytes and a flag to another block, which waits for the one and reads the
//   other l2_load         one dependent load that misses L1 cluster_sync    the barrier of a
//   cluster of `blocks` push            every block of a cluster sends `bytes` to each of them and
//   waits for all of theirs clusters        how many clusters of `blocks` with `bytes` of shared
//   memory run at a time ("count") shared_read     `bytes` of shared memory, 16 at a time, by
//   `threads` mma 8 warps per multiprocessor, A in registers: "tflops" of the device

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "cuda/ptx.cuh"

using namespace seqkern::cuda;

namespace {

constexpr int kSteps = 2000;
constexpr int kRuns = 5;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "sync: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// ---- kernels: `steps` steps each ----------------------------------------------------------------

__global__ void empty_kernel() {}

__global__ void grid_sync_kernel(int steps) {
  auto grid = cooperative_groups::this_grid();
  for (int s = 0; s < steps; ++s) grid.sync();
}

// flags [gridDim * stride], zero; `base` grows from run to run.
__global__ void flags_kernel(uint32_t* flags, int stride, uint32_t base, int steps) {
  const int t = threadIdx.x;
  for (int s = 1; s <= steps; ++s) {
    __syncthreads();
    if (t == 0) release(flags + blockIdx.x * stride, base + s);
    if (t < int(gridDim.x)) {
      while (int32_t(acquire(flags + t * stride) - (base + s)) < 0) {
      }
    }
    __syncthreads();
  }
}

// Two blocks, one warp each. data [2] of uint4, flags [2 * 32], zero.
__global__ void flag_exchange_kernel(uint4* data, uint32_t* flags, uint32_t base, int steps) {
  const int me = blockIdx.x, other = 1 - me;
  if (threadIdx.x != 0) return;
  uint4 v = make_uint4(me, 0, 0, 0);
  for (int s = 1; s <= steps; ++s) {
    const bool sends = (s & 1) == me;
    if (sends) {
      v.x += 1;
      data[me] = v;
      release(flags + 32 * me, base + s);
    } else {
      while (int32_t(acquire(flags + 32 * other) - (base + s)) < 0) {
      }
      v = load_from_l2(data + other);
    }
  }
  data[me] = v;
}

// chain [n]: x holds the index of the next.
__global__ void l2_load_kernel(uint4* chain, int steps) {
  uint32_t at = 0;
  for (int s = 0; s < steps; ++s) at = load_from_l2(chain + at).x;
  chain[0].y = at;
}

__global__ void cluster_sync_kernel(int steps) {
  for (int s = 0; s < steps; ++s) cluster_sync();
}

// Shared: [2][blocks][bytes], then two transaction barriers. A slice is sent on as it came, so that
// every step waits for the last.
__global__ void push_kernel(int blocks, int bytes, int steps, uint4* out) {
  SEQKERN_SHARED_MEMORY(memory);
  const int half = blocks * bytes, rank = cluster_rank(), t = threadIdx.x;
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory + 2 * half);
  if (t == 0) {
    mbarrier_init(barriers, 1);
    mbarrier_init(barriers + 1, 1);
    mbarrier_init_done();
  }
  for (int i = t; i < 2 * half / 16; i += blockDim.x)
    reinterpret_cast<uint4*>(memory)[i] = make_uint4(i, 0, 0, 0);
  __syncthreads();
  cluster_sync();
  for (int s = 0; s < steps; ++s) {
    unsigned char* to = memory + (s & 1) * half + rank * bytes;
    const unsigned char* from = memory + (1 - (s & 1)) * half + ((rank + 1) % blocks) * bytes;
    uint64_t* barrier = barriers + (s & 1);
    if (t == 0) mbarrier_expect(barrier, half);
    for (int i = t; i < bytes / 16; i += blockDim.x) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[i];
      for (int r = 0; r < blocks; ++r) push(to + 16 * i, barrier, r, v);
    }
    mbarrier_wait(barrier, (s >> 1) & 1);
    __syncthreads();
  }
  cluster_sync();
  if (t == 0 && out) out[blockIdx.x] = reinterpret_cast<uint4*>(memory)[0];
}

__global__ void shared_read_kernel(int bytes, int steps, uint4* out) {
  SEQKERN_SHARED_MEMORY(memory);
  uint4* words = reinterpret_cast<uint4*>(memory);
  const int n = bytes / 16;
  for (int i = threadIdx.x; i < n; i += blockDim.x) words[i] = make_uint4(i, 1, 2, 3);
  uint4 sum = make_uint4(0, 0, 0, 0);
  for (int s = 0; s < steps; ++s) {
    __syncthreads();
    if (threadIdx.x == 0) words[s % n].w = s;  // so that every step reads again
    __syncthreads();
#pragma unroll 8
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const uint4 v = words[i];
      sum.x ^= v.x, sum.y ^= v.y, sum.z ^= v.z, sum.w ^= v.w;
    }
  }
  if (sum.x == 0x12345678) out[0] = sum;
}

constexpr int kFragments = 16;  // of A, in registers: 16 x 16 x 16 of 16 bits a warp, 64 registers

template <bool tf32>
__global__ void mma_kernel(int steps, float* out) {
  uint32_t a[kFragments][4];
  float c[4][4] = {};
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[f][i] = threadIdx.x * 64 + f * 4 + i;
  uint32_t b0 = threadIdx.x, b1 = threadIdx.x + 1;
  for (int s = 0; s < steps; ++s) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      if (tf32)
        mma_tf32(c[f % 4], a[f][0], a[f][1], a[f][2], a[f][3], b0, b1);
      else
        mma_bf16(c[f % 4], a[f][0], a[f][1], a[f][2], a[f][3], b0, b1);
    }
    b0 += 1;
  }
  float sum = 0;
  for (int f = 0; f < 4; ++f)
    for (int i = 0; i < 4; ++i) sum += c[f][i];
  if (sum == 1.2345f) out[0] = sum;
}

// ---- launching and timing -----------------------------------------------------------------------

struct Launch {
  int blocks, threads;
  size_t shared = 0;
  int cluster = 1;
  bool cooperative = false;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(how.blocks);
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (how.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (how.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = how.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// Microseconds of the fastest of kRuns calls of run(k), after one that does not count.
template <class Run>
double fastest(Run run) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  double best = 1e30;
  for (int k = 0; k <= kRuns; ++k) {
    check(cudaEventRecord(begin), "cudaEventRecord");
    check(run(k), "launch");
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "kernel");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (k > 0) best = std::min(best, 1e3 * ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return best;
}

template <class Kernel>
void allow(Kernel kernel, size_t shared, int cluster = 1) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
        "shared memory");
  if (cluster > 8)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster size");
}

int attribute(cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, 0), "cudaDeviceGetAttribute");
  return value;
}

// How many such clusters run at a time on an idle device; 0 where the size is refused.
template <class Kernel>
int active_clusters(Kernel kernel, int cluster, int threads, size_t shared) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute dimension{};
  dimension.id = cudaLaunchAttributeClusterDimension;
  dimension.val.clusterDim.x = cluster;
  dimension.val.clusterDim.y = dimension.val.clusterDim.z = 1;
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.attrs = &dimension;
  config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "sync: no CUDA device\n");
    return 3;
  }
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  const int sms = properties.multiProcessorCount;
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  std::printf(
      "{\"name\": \"device\", \"model\": \"%s\", \"capability\": %d, \"sms\": %d, "
      "\"shared_bytes\": %d, \"l2_bytes\": %d, \"clock_mhz\": %d}\n",
      properties.name, 10 * properties.major + properties.minor, sms, most, properties.l2CacheSize,
      attribute(cudaDevAttrClockRate) / 1000);

  void* memory = nullptr;
  check(cudaMalloc(&memory, 64 << 20), "cudaMalloc");
  check(cudaMemset(memory, 0, 64 << 20), "cudaMemset");
  auto* flags = static_cast<uint32_t*>(memory);
  auto* words = reinterpret_cast<uint4*>(flags + (1 << 20));

  const auto report = [](const char* name, int blocks, int bytes, int threads, double us) {
    std::printf(
        "{\"name\": \"%s\", \"blocks\": %d, \"bytes\": %d, \"threads\": %d, \"us\": %.4f}\n", name,
        blocks, bytes, threads, us);
    std::fflush(stdout);
  };

  double us = fastest([&](int) {
    cudaError_t error = cudaSuccess;
    for (int s = 0; s < kSteps; ++s) error = launch({sms, 256}, empty_kernel);
    return error;
  });
  report("launch", sms, 0, 256, us / kSteps);

  for (const int blocks : {8, 16, 32, 64, sms}) {
    Launch how{blocks, 256};
    how.cooperative = true;
    us = fastest([&](int) { return launch(how, grid_sync_kernel, kSteps); });
    report("grid_sync", blocks, 0, 256, us / kSteps);
    for (const int stride : {1, 8, 32}) {
      check(cudaMemset(flags, 0, 4 << 20), "cudaMemset");
      us = fastest(
          [&](int k) { return launch(how, flags_kernel, flags, stride, k * kSteps, kSteps); });
      report("flags", blocks, 4 * stride, 256, us / kSteps);
    }
  }

  check(cudaMemset(flags, 0, 4 << 20), "cudaMemset");
  Launch pair{2, 32};
  pair.cooperative = true;
  us = fastest(
      [&](int k) { return launch(pair, flag_exchange_kernel, words, flags, k * kSteps, kSteps); });
  report("flag_exchange", 2, 16, 32, us / kSteps);

  {
    const int n = 4096, stride = 1021;  // 16 bytes each: no line twice in a row
    uint4* chain = new uint4[n];
    for (int i = 0; i < n; ++i) chain[i] = make_uint4((i + stride) % n, 0, 0, 0);
    check(cudaMemcpy(words, chain, n * sizeof(uint4), cudaMemcpyHostToDevice), "cudaMemcpy");
    delete[] chain;
    us = fastest([&](int) { return launch({1, 1}, l2_load_kernel, words, kSteps); });
    report("l2_load", 1, 16, 1, us / kSteps);
  }

  if (properties.major >= 9) {
    for (const int blocks : {2, 4, 8, 16}) {
      allow(cluster_sync_kernel, 0, blocks);
      if (!active_clusters(cluster_sync_kernel, blocks, 256, 0)) continue;
      Launch how{blocks, 256};
      how.cluster = blocks;
      us = fastest([&](int) { return launch(how, cluster_sync_kernel, kSteps); });
      report("cluster_sync", blocks, 0, 256, us / kSteps);
      for (const int bytes : {512, 1024, 2048, 4096, 8192}) {
        how.shared = 2 * blocks * bytes + 16;
        if (how.shared > size_t(most)) continue;
        allow(push_kernel, how.shared, blocks);
        us = fastest([&](int) {
          return launch(how, push_kernel, blocks, bytes, kSteps, static_cast<uint4*>(nullptr));
        });
        report("push", blocks, bytes, 256, us / kSteps);
      }
      for (const int shared : {48 << 10, 128 << 10, most}) {
        allow(push_kernel, shared, blocks);
        std::printf(
            "{\"name\": \"clusters\", \"blocks\": %d, \"bytes\": %d, \"threads\": 256, "
            "\"count\": %d}\n",
            blocks, shared, active_clusters(push_kernel, blocks, 256, shared));
      }
    }
  }

  for (const int bytes : {64 << 10, 128 << 10, 192 << 10}) {
    if (bytes > most) continue;
    allow(shared_read_kernel, bytes);
    for (const int threads : {256, 512}) {
      Launch how{sms, threads};
      how.shared = bytes;
      us = fastest([&](int) { return launch(how, shared_read_kernel, bytes, kSteps, words); });
      report("shared_read", sms, bytes, threads, us / kSteps);
    }
  }

  for (const bool tf32 : {false, true}) {
    const auto kernel = tf32 ? mma_kernel<true> : mma_kernel<false>;
    const double flops = 2.0 * 16 * 8 * (tf32 ? 8 : 16) * kFragments * 8 * sms;  // per step
    us = fastest(
        [&](int) { return launch({sms, 256}, kernel, kSteps, reinterpret_cast<float*>(words)); });
    std::printf(
        "{\"name\": \"mma\", \"dtype\": \"%s\", \"blocks\": %d, \"threads\": 256, "
        "\"tflops\": %.1f}\n",
        tf32 ? "tf32" : "bf16", sms, flops * kSteps / us / 1e6);
  }
  check(cudaFree(memory), "cudaFree");
  return 0;
}
