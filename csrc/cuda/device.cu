// The device query: can the kernels in this module run here, and on what?
//
// The CUDA runtime is linked statically, so this file loads on a machine with neither driver nor
// toolkit; there cudaDriverGetVersion answers 0 and nothing else is asked.

#include "cuda/device.h"

#include <cuda_runtime.h>

namespace seqkern::cuda {
namespace {

// Never launched: cudaFuncGetAttributes on it tells whether this module holds code that the device
// can run.
__global__ void probe_kernel() {}

std::string version_text(int version) {  // 13000 -> "13.0"
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// An error is a sentence in the answer, not a sticky state that the next launch would report.
std::string error_text(const char* call, cudaError_t error) {
  (void)cudaGetLastError();
  return std::string(call) + ": " + cudaGetErrorString(error);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) (void)cudaGetLastError();
  return value;
}

std::string code_text(int device, int previous) {
  std::string text;
  if (cudaError_t error = cudaSetDevice(device); error != cudaSuccess) {
    text = error_text("cudaSetDevice", error);
  } else {
    cudaFuncAttributes attributes{};
    error = cudaFuncGetAttributes(&attributes, probe_kernel);
    text =
        error == cudaSuccess
            ? "runs this build's sm_" + std::to_string(attributes.binaryVersion) + " code"
            : "no code for it in this build (" + error_text("cudaFuncGetAttributes", error) + ")";
  }
  if (cudaSetDevice(previous) != cudaSuccess) (void)cudaGetLastError();
  return text;
}

std::string device_text(int device, int previous) {
  cudaDeviceProp properties{};
  if (cudaError_t error = cudaGetDeviceProperties(&properties, device); error != cudaSuccess) {
    return error_text("cudaGetDeviceProperties", error);
  }
  std::string text = properties.name;
  text += ", sm_" + std::to_string(properties.major) + std::to_string(properties.minor);
  text += ", " + std::to_string(properties.multiProcessorCount) + " SMs";
  text += ", " + std::to_string(properties.totalGlobalMem >> 20) + " MiB";
  text += attribute(cudaDevAttrCooperativeLaunch, device) ? ", cooperative launch"
                                                          : ", no cooperative launch";
  text += attribute(cudaDevAttrClusterLaunch, device) ? ", clusters" : ", no clusters";
  return text + ", " + code_text(device, previous);
}

}  // namespace

std::string status() {
  int driver = 0;
  int runtime = 0;
  if (cudaError_t error = cudaDriverGetVersion(&driver); error != cudaSuccess) {
    return error_text("cudaDriverGetVersion", error);
  }
  if (driver == 0) return "no CUDA driver";
  if (cudaError_t error = cudaRuntimeGetVersion(&runtime); error != cudaSuccess) {
    return error_text("cudaRuntimeGetVersion", error);
  }
  std::string text =
      "driver for CUDA " + version_text(driver) + ", runtime " + version_text(runtime);

  int count = 0;
  if (cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    return text + ", " + error_text("cudaGetDeviceCount", error);
  }
  text += ", " + std::to_string(count) + (count == 1 ? " device" : " devices");
  int previous = 0;
  if (cudaGetDevice(&previous) != cudaSuccess) (void)cudaGetLastError();
  for (int device = 0; device < count; ++device) {
    text += "\ncuda:" + std::to_string(device) + " " + device_text(device, previous);
  }
  return text;
}

}  // namespace seqkern::cuda
