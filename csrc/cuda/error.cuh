// CUDA's errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace seqkern::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // it is told here, and must not be told again by the next call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace seqkern::cuda
