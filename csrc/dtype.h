// A tensor's dtype, as the kernels name it.
#pragma once

#include <ATen/core/Tensor.h>

#include "params.h"

namespace seqkern {

inline Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kDouble:
      return Dtype::f64;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK_TYPE(false, "x: expected float32, float64, bfloat16 or float16, got ",
                       x.scalar_type());
  }
}

}  // namespace seqkern
