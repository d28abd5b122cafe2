// The operators' schemas (TORCH_LIBRARY) and the Python module seqkern._C, which tells what was
// built. No logic.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "build_facts.h"
#include "cpu/dispatch.h"
#include "cuda/device.h"
#include "cuda/layer.h"
#include "cuda/plan.h"
#include "operators.h"

namespace {

// seqkern/_extension.py searches the file for this text before it loads the module: loading an
// extension of another torch may crash.
[[gnu::used]] const char kBuiltForTorch[] = "seqkern was built for torch=" SEQKERN_TORCH_VERSION;

// The value that has this name.
template <class T>
T named(const char* what, const std::string& name, const std::map<std::string, T>& values) {
  const auto found = values.find(name);
  if (found == values.end()) throw std::invalid_argument(std::string(what) + ": got " + name);
  return found->second;
}

// Which CUDA kernel a layer's pass takes on a device with these facts, and why. No device is asked.
std::string cuda_plan(const std::string& cell, const std::string& dtype, const std::string& pass,
                      bool tf32, int64_t T, int64_t B, int64_t H, int64_t P, int64_t D,
                      bool regularised, int capability, int sms, int shared_bytes,
                      int max_cluster) {
  using namespace seqkern;
  const cuda::PlanRequest request{
      cell == "rnn" ? CellKind::rnn_tanh : cell_named(cell),
      named<Dtype>("dtype", dtype,
                   {{"float32", Dtype::f32},
                    {"float64", Dtype::f64},
                    {"bfloat16", Dtype::bf16},
                    {"float16", Dtype::f16}}),
      named<cuda::Pass>("pass", pass,
                        {{"forward", cuda::Pass::forward}, {"backward", cuda::Pass::backward}}),
      tf32,
      T,
      B,
      H,
      P,
      D,
      /*projected=*/P != H,
      regularised};
  return cuda::explain(request, {capability, sms, shared_bytes, max_cluster});
}

}  // namespace

TORCH_LIBRARY(seqkern, library) {
  seqkern::define_layers(library);
  // Attention's pieces (params.h), for seqkern/ops/attention_cpu.py, which has the operators that
  // autograd knows. q, k, v [B, heads, rows, E]; pieces [n, 9] int64; mask [B, N, L, S] float or
  // bool; weights [B, N or 1, L, S] float, zero.
  library.def(
      "attention_pieces_forward(Tensor q, Tensor k, Tensor v, Tensor pieces, Tensor? mask, "
      "Tensor? key_valid, Tensor? query_valid, Tensor? seed, float scale, int left, int right, "
      "float dropout_p, Tensor(a!) out, Tensor(b!)? lse, Tensor(c!)? weights) -> ()");
  library.def(
      "attention_pieces_backward(Tensor dout, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,"
      " Tensor pieces, Tensor? mask, Tensor? key_valid, Tensor? query_valid, Tensor? seed, "
      "float scale, int left, int right, float dropout_p, Tensor(a!)? dq, Tensor(b!)? dk, "
      "Tensor(c!)? dv) -> ()");
}

TORCH_LIBRARY_IMPL(seqkern, CUDA, library) { seqkern::cuda::implement_layers(library); }

// Free-threaded Pythons may go on without their lock: what is shared here is atomic or constant.
PYBIND11_MODULE(_C, module, pybind11::mod_gil_not_used()) {
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
  module.def("instruction_sets", &seqkern::instruction_sets);
  module.def("instruction_set", [] { return std::string(seqkern::kernels().name); });
  module.def("set_instruction_set", &seqkern::set_instruction_set);
  // For tests and benchmarks.
  module.def("activation", [](const std::string& name, const std::vector<float>& x) {
    std::vector<float> y(x.size());
    seqkern::kernels().activation(name.c_str(), x.data(), y.data(), int64_t(x.size()));
    return y;
  });
  module.def("fma_peak", [](int threads, double seconds) {
    return seqkern::kernels().fma_peak(threads, seconds);
  });
  module.def("read_bandwidth", [](int threads, int64_t bytes, double seconds) {
    return seqkern::kernels().read_bandwidth(threads, bytes, seconds);
  });
  module.def("cuda_status", &seqkern::cuda::status);
  module.def("set_cuda_tier",
             [](const std::string& name) { seqkern::cuda::force_tier(name.c_str()); });
  module.def("cuda_plan", &cuda_plan);
  module.def("cuda_facts", [](int device) {
    const seqkern::cuda::Facts facts = seqkern::cuda::device_facts(device);
    return std::make_tuple(facts.capability, facts.sms, facts.shared_bytes, facts.max_cluster);
  });
}
