// The persistent kernels of the cells whose rows are normalised.
#include "launch.cuh"

namespace seqkern::cuda {
namespace {

template <Pass kPass>
bool choose_cell(const ParamsOf<kPass>& params, const Persistent& persistent, void* stream) {
  if (params.cell == CellKind::layer_norm_lstm)
    return launch_regular_cell<kPass, NormalisedLstmCell>(params, persistent, stream);
  return launch_regular_cell<kPass, NormalisedGruCell>(params, persistent, stream);
}

}  // namespace

bool layer_norm_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  return choose_cell<Pass::forward>(params, persistent, stream);
}

bool layer_norm_backward(const BackwardParams& params, const Persistent& persistent, void* stream) {
  return choose_cell<Pass::backward>(params, persistent, stream);
}

}  // namespace seqkern::cuda
