// The persistent kernels of the other cells of one product.
#include "launch.cuh"

namespace seqkern::cuda {
namespace {

template <Pass kPass>
bool choose_cell(const ParamsOf<kPass>& params, const Persistent& persistent, void* stream) {
  if (params.cell == CellKind::peephole_lstm)
    return launch_regular_cell<kPass, PeepholeLstmCell>(params, persistent, stream);
  if (params.cell == CellKind::cifg_lstm)
    return launch_regular_cell<kPass, CifgLstmCell>(params, persistent, stream);
  return launch_regular_cell<kPass, SlstmCell>(params, persistent, stream);
}

}  // namespace

bool variant_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  return choose_cell<Pass::forward>(params, persistent, stream);
}

bool variant_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  return choose_cell<Pass::backward>(params, persistent, stream);
}

}  // namespace seqkern::cuda
