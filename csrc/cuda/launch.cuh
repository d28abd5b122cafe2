// The launch of a persistent kernel, and the choice of its instance.
#pragma once

#include <cuda_runtime.h>

#include "error.cuh"
#include "recurrence.cuh"

namespace seqkern::cuda {

template <class Params>
using PersistentKernel = void (*)(const Params, const Cut, const SharedLayout);

inline Cut cut_of(const Persistent& persistent, const Shape& shape, int64_t H, int element_bytes) {
  const Plan& plan = persistent.plan;
  Cut cut{};
  cut.blocks = plan.blocks, cut.groups = plan.groups;
  cut.batch = plan.batch, cut.slices = plan.slices;
  while (2 << cut.log2_pairs < plan.batch) cut.log2_pairs++;
  cut.Hp = divide_up(H, kTile) * kTile;
  int64_t exchanged = 0;
  for (int i = 0; i < shape.legs; i++) {
    LegCut& leg = cut.leg[i];
    const int source = source_of(shape.legs, i);
    leg.tiles = plan.tiles[i], leg.splits = plan.splits[i];
    leg.all_tiles = shape.leg[i].tiles, leg.chunks = shape.leg[i].chunks;
    leg.Hp = int64_t(leg.all_tiles) * kTile;
    leg.Kp = int64_t(leg.chunks) * (kChunkBytes / element_bytes);
    for (int d = 0; d < 2; d++) leg.matrix[d] = persistent.matrix[d][i];
    leg.vector_tiles = plan.tiles[source], leg.all_vector_tiles = shape.leg[source].tiles;
    if (plan.tier != Tier::grid) continue;
    leg.exchange = static_cast<unsigned char*>(persistent.exchange) + exchanged;
    leg.flags = persistent.flags + i * plan.groups * plan.blocks;
    exchanged += int64_t(plan.groups) * 2 * plan.batch * leg.chunks * kChunkBytes;
  }
  return cut;
}

// Blocks of a cluster wait for each other, and so do those of a group in Tier::grid: either all of
// them run at once or none does, whatever else holds multiprocessors. The former is a cluster's
// nature, the latter the cooperative attribute's promise.
template <class Params>
void launch_persistent(PersistentKernel<Params> kernel, const char* name, const Params& params,
                       const Persistent& persistent, Pass pass, void* stream) {
  const Plan& plan = persistent.plan;
  const int element_bytes = params.dtype == Dtype::f32 ? 4 : 2;
  const Shape shape = shape_of(params.cell, element_bytes, pass, params.H, params.P,
                               persistent.matrix[0][1] != nullptr);
  const SharedLayout layout = shared_layout(shape, plan);
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(layout.bytes)),
      name);
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.blocks * plan.groups));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(layout.bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = plan.tier == Tier::block ? 0 : 1;
  if (plan.tier == Tier::cluster) {
    if (plan.blocks > 8)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(plan.blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else if (plan.tier == Tier::grid) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  const Cut cut = cut_of(persistent, shape, params.H, element_bytes);
  check(cudaLaunchKernelEx(&config, kernel, params, cut, layout), name);
}

// One cell's kernel for a dtype, a way to exchange and, for an LSTM, a projection.
template <template <class> class Cell, class S, Product kProduct>
void launch_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  using C = Cell<Math<S>>;
  const bool grid = persistent.plan.tier == Tier::grid;
  PersistentKernel<ForwardParams> kernel = grid ? forward_kernel<C, S, kProduct, true, false>
                                                : forward_kernel<C, S, kProduct, false, false>;
  if constexpr (C::kHasC)
    if (persistent.matrix[0][1] != nullptr)
      kernel = grid ? forward_kernel<C, S, kProduct, true, true>
                    : forward_kernel<C, S, kProduct, false, true>;
  launch_persistent(kernel, "forward_kernel", params, persistent, Pass::forward, stream);
}

template <template <class> class Cell, class S, Product kProduct>
void launch_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  using C = Cell<Math<S>>;
  const bool grid = persistent.plan.tier == Tier::grid;
  PersistentKernel<BackwardParams> kernel = grid ? backward_kernel<C, S, kProduct, true, false>
                                                 : backward_kernel<C, S, kProduct, false, false>;
  if constexpr (C::kHasC)
    if (persistent.matrix[0][1] != nullptr)
      kernel = grid ? backward_kernel<C, S, kProduct, true, true>
                    : backward_kernel<C, S, kProduct, false, true>;
  launch_persistent(kernel, "backward_kernel", params, persistent, Pass::backward, stream);
}

template <template <class> class Cell>
void forward_of(const ForwardParams& params, const Persistent& persistent, void* stream) {
  if (params.dtype == Dtype::f16)
    launch_forward<Cell, f16, Product::f16>(params, persistent, stream);
  else if (params.dtype == Dtype::bf16)
    launch_forward<Cell, bf16, Product::bf16>(params, persistent, stream);
  else if (persistent.tf32)
    launch_forward<Cell, float, Product::tf32>(params, persistent, stream);
  else
    launch_forward<Cell, float, Product::tf32_3>(params, persistent, stream);
}

template <template <class> class Cell>
void backward_of(const BackwardParams& params, const Persistent& persistent, void* stream) {
  if (params.dtype == Dtype::f16)
    launch_backward<Cell, f16, Product::f16>(params, persistent, stream);
  else if (params.dtype == Dtype::bf16)
    launch_backward<Cell, bf16, Product::bf16>(params, persistent, stream);
  else if (persistent.tf32)
    launch_backward<Cell, float, Product::tf32>(params, persistent, stream);
  else
    launch_backward<Cell, float, Product::tf32_3>(params, persistent, stream);
}

}  // namespace seqkern::cuda
