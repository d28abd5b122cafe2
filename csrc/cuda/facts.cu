// What the planner asks of a device.
#include <mutex>

#include "cut.h"
#include "device.h"
#include "error.cuh"

namespace seqkern::cuda {
namespace {

// Never launched: the driver is asked how large a cluster of such blocks may be.
__global__ void __launch_bounds__(kThreads, 1) cluster_kernel() {}

int attribute(cudaDeviceAttr which, int device, const char* name) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), name);
  return value;
}
#define SEQKERN_ATTRIBUTE(name, device) attribute(cudaDevAttr##name, device, "cudaDevAttr" #name)

// Eight blocks are granted everywhere; more depend on how the device's multiprocessors lie.
int max_cluster(int device, int shared_bytes) {
  if (!SEQKERN_ATTRIBUTE(ClusterLaunch, device)) return 1;
  check(cudaFuncSetAttribute(cluster_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "cluster_kernel");
  check(cudaFuncSetAttribute(cluster_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             shared_bytes),
        "cluster_kernel");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(16);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  int blocks = 0;
  check(cudaOccupancyMaxPotentialClusterSize(&blocks, cluster_kernel, &config), "cluster_kernel");
  return blocks < 1 ? 1 : blocks;
}

Facts ask(int device) {
  Facts facts{};
  facts.capability = 10 * SEQKERN_ATTRIBUTE(ComputeCapabilityMajor, device) +
                     SEQKERN_ATTRIBUTE(ComputeCapabilityMinor, device);
  facts.sms = SEQKERN_ATTRIBUTE(MultiProcessorCount, device);
  facts.shared_bytes = SEQKERN_ATTRIBUTE(MaxSharedMemoryPerBlockOptin, device);
  facts.max_cluster = max_cluster(device, facts.shared_bytes);
  return facts;
}

}  // namespace

void use_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

Facts device_facts(int device) {
#ifdef SEQKERN_CUDA_ON_CPU
  return ask(device);  // the tests change them
#else
  constexpr int kMost = 64;
  if (device >= kMost) return ask(device);
  static Facts known[kMost];
  static std::once_flag once[kMost];
  std::call_once(once[device], [device] { known[device] = ask(device); });
  return known[device];
#endif
}

}  // namespace seqkern::cuda
