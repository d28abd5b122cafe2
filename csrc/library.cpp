// The operators' schemas (TORCH_LIBRARY) and the Python module seqkern._C, which tells what was
// built. No logic.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "build_facts.h"
#include "cpu/dispatch.h"
#include "cuda/device.h"

namespace {

// seqkern/_extension.py searches the file for this text before it loads the module: loading an
// extension of another torch may crash.
[[gnu::used]] const char kBuiltForTorch[] = "seqkern was built for torch=" SEQKERN_TORCH_VERSION;

}  // namespace

// One recurrent layer each. x [T, B, I], or [N, I] with batch_sizes; h0 [D, B, P]; c0 [D, B, H];
// params: per direction w_ih, w_hh[, b_ih, b_hh][, w_hr]; reserve: what backward needs, opaque.
// What they compute: seqkern/reference.
TORCH_LIBRARY(seqkern, library) {
  library.def(
      "rnn_forward(Tensor x, Tensor h0, Tensor[] params, Tensor? lengths, Tensor? batch_sizes, "
      "bool relu, bool save)"
      " -> (Tensor y, Tensor h_n, Tensor reserve)");
  library.def(
      "rnn_backward(Tensor? dy, Tensor? dh_n, Tensor x, Tensor h0, Tensor[] params, Tensor? "
      "lengths,"
      " Tensor? batch_sizes, Tensor y, Tensor reserve, bool relu, bool need_dx, bool need_dparams)"
      " -> (Tensor dx, Tensor dh0, Tensor[] dparams)");
  library.def(
      "gru_forward(Tensor x, Tensor h0, Tensor[] params, Tensor? lengths, Tensor? batch_sizes, "
      "bool save)"
      " -> (Tensor y, Tensor h_n, Tensor reserve)");
  library.def(
      "gru_backward(Tensor? dy, Tensor? dh_n, Tensor x, Tensor h0, Tensor[] params, Tensor? "
      "lengths,"
      " Tensor? batch_sizes, Tensor y, Tensor reserve, bool need_dx, bool need_dparams)"
      " -> (Tensor dx, Tensor dh0, Tensor[] dparams)");
  library.def(
      "lstm_forward(Tensor x, Tensor h0, Tensor c0, Tensor[] params, Tensor? lengths, Tensor? "
      "batch_sizes, bool save)"
      " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor reserve)");
  library.def(
      "lstm_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor h0, Tensor c0, "
      "Tensor[] params,"
      " Tensor? lengths, Tensor? batch_sizes, Tensor y, Tensor reserve, bool need_dx, bool "
      "need_dparams)"
      " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dparams)");
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
}
