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
  if (plan.tier == Tier::grid && shape.row_sums > 0) {
    cut.row_sums = static_cast<unsigned char*>(persistent.exchange) + exchanged;
    cut.row_flags = persistent.flags + 2 * plan.groups * plan.blocks;
  }
  return cut;
}

// Blocks of a cluster wait for each other, and so do those of a group in Tier::grid: either all of
// them run at once or none does, whatever else holds multiprocessors. The former is a cluster's
// nature, the latter the cooperative attribute's promise. False: they never would.
template <class Params>
bool launch_persistent(PersistentKernel<Params> kernel, const char* name, const Params& params,
                       const Persistent& persistent, Pass pass, void* stream) {
  const Plan& plan = persistent.plan;
  const int element_bytes = params.dtype == Dtype::f32 ? 4 : 2;
  const Shape shape =
      shape_of(params.cell, element_bytes, pass, params.H, params.P,
               persistent.matrix[0][1] != nullptr, params.dtype == Dtype::f32 && !persistent.tf32);
  const SharedLayout layout = shared_layout(shape, plan);
  // Always to the most there is: another thread may be about to launch the same kernel.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             persistent.shared_limit),
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
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params, cut, layout);
  if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidClusterSize ||
      error == cudaErrorLaunchOutOfResources) {
    (void)cudaGetLastError();
    return false;
  }
  check(error, name);
  return true;
}

// (row, unit) pairs that a thread of this plan keeps.
inline int items_of(const Plan& plan) {
  const int tiles = plan.tiles[0] > plan.tiles[1] ? plan.tiles[0] : plan.tiles[1];
  return int(divide_up(int64_t(tiles) * plan.batch * kTile, kThreads));
}

template <Pass kPass>
using ParamsOf = std::conditional_t<kPass == Pass::forward, ForwardParams, BackwardParams>;

// The kernel of a pass, for a cell, a dtype, a way to exchange and items per thread.
template <Pass kPass, class Cell, class S, Product kProduct, bool kGrid, bool kProjected,
          int kItems>
PersistentKernel<ParamsOf<kPass>> kernel_of() {
  if constexpr (kPass == Pass::forward)
    return forward_kernel<Cell, S, kProduct, kGrid, kProjected, kItems>;
  else
    return backward_kernel<Cell, S, kProduct, kGrid, kProjected, kItems>;
}

template <Pass kPass, class Cell, class S, Product kProduct, int kItems>
PersistentKernel<ParamsOf<kPass>> kernel_of(bool grid, bool projected) {
  if constexpr (kHasC<Cell> && !kIsRegular<Cell>)  // an LSTM
    if (projected)
      return grid ? kernel_of<kPass, Cell, S, kProduct, true, true, kItems>()
                  : kernel_of<kPass, Cell, S, kProduct, false, true, kItems>();
  return grid ? kernel_of<kPass, Cell, S, kProduct, true, false, kItems>()
              : kernel_of<kPass, Cell, S, kProduct, false, false, kItems>();
}

template <Pass kPass, class Cell, class S, Product kProduct>
bool launch(const ParamsOf<kPass>& params, const Persistent& persistent, void* stream) {
  static_assert(kMostItems == 2);
  const bool grid = persistent.plan.tier == Tier::grid;
  const bool projected = persistent.matrix[0][1] != nullptr;
  return launch_persistent(items_of(persistent.plan) == 1
                               ? kernel_of<kPass, Cell, S, kProduct, 1>(grid, projected)
                               : kernel_of<kPass, Cell, S, kProduct, 2>(grid, projected),
                           kPass == Pass::forward ? "forward_kernel" : "backward_kernel", params,
                           persistent, kPass, stream);
}

// One of torch.nn's cells, unregularised.
template <Pass kPass, template <class> class Cell>
bool launch_cell(const ParamsOf<kPass>& params, const Persistent& persistent, void* stream) {
  if (params.dtype == Dtype::f16)
    return launch<kPass, Cell<Math<f16>>, f16, Product::f16>(params, persistent, stream);
  if (params.dtype == Dtype::bf16)
    return launch<kPass, Cell<Math<bf16>>, bf16, Product::bf16>(params, persistent, stream);
  if (persistent.tf32)
    return launch<kPass, Cell<Math<float>>, float, Product::tf32>(params, persistent, stream);
  return launch<kPass, Cell<Math<float>>, float, Product::tf32_3>(params, persistent, stream);
}

// A cell's kernels that regularise, if they are asked to. To be compiled within minutes they are
// fewer: always for two pairs per thread, and float32 as three TF32 products.
template <Pass kPass, class Cell, class S, Product kProduct>
bool launch_regular(const ParamsOf<kPass>& params, const Persistent& persistent, void* stream) {
  return launch_persistent(persistent.plan.tier == Tier::grid
                               ? kernel_of<kPass, Regular<Cell>, S, kProduct, true, false, 2>()
                               : kernel_of<kPass, Regular<Cell>, S, kProduct, false, false, 2>(),
                           kPass == Pass::forward ? "forward_kernel" : "backward_kernel", params,
                           persistent, kPass, stream);
}
template <Pass kPass, template <class> class Cell>
bool launch_regular_cell(const ParamsOf<kPass>& params, const Persistent& persistent,
                         void* stream) {
  if (params.dtype == Dtype::f16)
    return launch_regular<kPass, Cell<Math<f16>>, f16, Product::f16>(params, persistent, stream);
  if (params.dtype == Dtype::bf16)
    return launch_regular<kPass, Cell<Math<bf16>>, bf16, Product::bf16>(params, persistent, stream);
  return launch_regular<kPass, Cell<Math<float>>, float, Product::tf32_3>(params, persistent,
                                                                          stream);
}

}  // namespace seqkern::cuda
