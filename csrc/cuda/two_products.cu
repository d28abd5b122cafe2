// The persistent kernels of the cells of two products.
#include "launch.cuh"

namespace seqkern::cuda {
namespace {

template <Pass kPass>
bool choose_cell(const ParamsOf<kPass>& params, const Persistent& persistent, void* stream) {
  if (params.cell == CellKind::gru_reset_before)
    return launch_regular_cell<kPass, GruResetBeforeCell>(params, persistent, stream);
  if (params.cell == CellKind::mgu)
    return launch_regular_cell<kPass, MguCell>(params, persistent, stream);
  if (params.cell == CellKind::nested_lstm)
    return launch_regular_cell<kPass, NestedLstmCell>(params, persistent, stream);
  return launch_regular_cell<kPass, NestedGruCell>(params, persistent, stream);
}

}  // namespace

bool two_products_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  return choose_cell<Pass::forward>(params, persistent, stream);
}

bool two_products_backward(const BackwardParams& params, const Persistent& persistent,
                           void* stream) {
  return choose_cell<Pass::backward>(params, persistent, stream);
}

}  // namespace seqkern::cuda
