// The operators' schemas (TORCH_LIBRARY) and the Python module seqkern._C, which tells what was
// built. No logic.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "build_facts.h"
#include "cuda/device.h"

namespace {

// seqkern/_extension.py searches the file for this text before it loads the module: loading an
// extension of another torch may crash.
[[gnu::used]] const char kBuiltForTorch[] = "seqkern was built for torch=" SEQKERN_TORCH_VERSION;

}  // namespace

TORCH_LIBRARY(seqkern, library) { (void)library; }

PYBIND11_MODULE(_C, module) {
  module.doc() = "seqkern's compiled operators: importing it registers torch.ops.seqkern";
  module.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = SEQKERN_TORCH_VERSION;
    info["compiler"] = SEQKERN_COMPILER;
    info["sanitize"] = SEQKERN_SANITIZE;
    info["cuda"] = SEQKERN_CUDA_VERSION;
    info["cuda_archs"] = SEQKERN_CUDA_ARCHS;
#define SEQKERN_NAME(isa) #isa,
    info["instruction_sets"] = std::vector<std::string>{SEQKERN_FOR_EACH_ISA(SEQKERN_NAME)};
#undef SEQKERN_NAME
    return info;
  });
  module.def("instruction_sets", [] { return std::vector<std::string>{"baseline"}; });
  module.def("instruction_set", [] { return std::string("baseline"); });
  module.def("set_instruction_set", [](const std::string& name) {
    if (name != "baseline")
      throw std::invalid_argument("instruction set: expected baseline, got " + name);
  });
  module.def("cuda_status", &seqkern::cuda::status);
}
