// What every operator's torch side needs: memory, and the call of a kernel with its scratch.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../params.h"

namespace seqkern {

// Large fresh memory is mapped page by page as it is first written, and 4 KiB pages make that a
// cost beside the kernels': ask for large ones. A hint: nothing depends on it.
inline void prefer_large_pages(const at::Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t kLarge = uintptr_t(2) << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kLarge - 1) / kLarge * kLarge;
  const uintptr_t last = (begin + tensor.nbytes()) / kLarge * kLarge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline at::Tensor new_empty(at::IntArrayRef shape, const at::TensorOptions& options) {
  at::Tensor tensor = at::empty(shape, options);
  prefer_large_pages(tensor);
  return tensor;
}

// Runs a kernel with the scratch memory it asks for.
template <class Params>
void launch(Params& p, size_t (*bytes)(const Params&), void (*run)(const Params&)) {
  constexpr size_t kAlign = 64;
  p.scratch = nullptr;
  const at::Tensor scratch = new_empty({int64_t(bytes(p) + kAlign)}, at::kByte);
  const auto address = reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr());
  p.scratch = reinterpret_cast<void*>((address + kAlign - 1) / kAlign * kAlign);
  run(p);
}

}  // namespace seqkern
