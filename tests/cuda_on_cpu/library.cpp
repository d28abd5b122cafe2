// The recurrent operators of csrc/cuda for CPU tensors, as torch.ops.seqkern_cuda_on_cpu, and the
// emulated device's controls.

#include <torch/library.h>

#include <string>
#include <vector>

#include "cuda/layer.h"
#include "device.h"
#include "operators.h"

namespace {

namespace device = seqkern::cuda_on_cpu;

void configure(int64_t seed, int64_t capability, int64_t sms, int64_t shared_bytes,
               int64_t max_cluster, int64_t free_sms) {
  device::configure(uint64_t(seed), {int(capability), int(sms), int(free_sms), int(shared_bytes),
                                     int(max_cluster)});
}

void force_tier(const std::string& tier) { seqkern::cuda::force_tier(tier.c_str()); }

std::vector<int64_t> counters() {
  const device::Counters count = device::counters();
  return {count.launches, count.switches, count.rounds, count.pushes};
}

}  // namespace

TORCH_LIBRARY(seqkern_cuda_on_cpu, library) {
  seqkern::define_layers(library);
  library.def(
      "configure(int seed, int capability, int sms, int shared_bytes, int max_cluster, int "
      "free_sms) -> ()",
      &configure);
  library.def("force_tier(str tier) -> ()", &force_tier);
  library.def("counters() -> int[]", &counters);
}

TORCH_LIBRARY_IMPL(seqkern_cuda_on_cpu, CPU, library) { seqkern::cuda::implement_layers(library); }
