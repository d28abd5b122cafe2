// The persistent kernels of torch.nn's cells that regularise.
#include "launch.cuh"

namespace seqkern::cuda {
namespace {

template <Pass kPass>
bool choose_cell(const ParamsOf<kPass>& params, const Persistent& persistent, void* stream) {
  if (params.cell == CellKind::lstm)
    return launch_regular_cell<kPass, LstmCell>(params, persistent, stream);
  if (params.cell == CellKind::gru)
    return launch_regular_cell<kPass, GruCell>(params, persistent, stream);
  return launch_regular_cell<kPass, RnnCell>(params, persistent, stream);
}

}  // namespace

bool regularised_forward(const ForwardParams& params, const Persistent& persistent, void* stream) {
  return choose_cell<Pass::forward>(params, persistent, stream);
}

bool regularised_backward(const BackwardParams& params, const Persistent& persistent,
                          void* stream) {
  return choose_cell<Pass::backward>(params, persistent, stream);
}

}  // namespace seqkern::cuda
