// Which kernel runs a layer's recurrence, and how it is cut: pure functions of the sizes and of
// what the device has. No CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../params.h"

#pragma GCC visibility push(default)  // exported: the torch side calls it
namespace seqkern::cuda {

enum class Pass { forward, backward };

// Who holds one direction's W_hh for one slice of the batch, and so must exchange h every step.
//   step     nobody: a product and a launch of the gates per step
//   block    one block
//   cluster  the blocks of a cluster (sm_90 on), through distributed shared memory
//   grid     any blocks, through L2
enum class Tier { step, block, cluster, grid };
const char* name_of(Tier tier);

// What a device has.
struct Facts {
  int capability;    // 90 for sm_90
  int sms;           // multiprocessors
  int shared_bytes;  // shared memory that one block may ask for
  int max_cluster;   // blocks of the largest cluster; 1: none
};

// torch.nn's cells, whose kernels are compiled with and without regularisers.
constexpr bool is_torchs(CellKind cell) {
  return cell == CellKind::lstm || cell == CellKind::gru || cell == CellKind::rnn_tanh ||
         cell == CellKind::rnn_relu;
}

struct PlanRequest {
  CellKind cell;
  Dtype dtype;
  Pass pass;
  bool tf32;  // float32: TF32 is allowed
  int64_t T, B, H, P, D;
  bool projected;
  bool regularised;  // anything of params.h's Regularisers
};

// Is float32 multiplied as one TF32 product? Kernels that regularise always make three.
constexpr bool one_tf32(const PlanRequest& r) {
  return r.tf32 && is_torchs(r.cell) && !r.regularised;
}

struct Plan {
  Tier tier = Tier::step;
  int blocks = 0;      // of one group: the blocks that share a direction and a slice of the batch
  int groups = 0;      // that run at a time; they take the D * slices in turn
  int tiles[2] = {};   // [leg, see cut.h] of 16 units, per block
  int splits[2] = {};  // [leg] warps that share a tile's sum over k
  int batch = 0;       // rows of a slice, a multiple of 8
  int slices = 0;      // of the batch, per direction
  size_t shared_bytes = 0;  // per block
  double step_us = 0;       // the estimate that the choice rests on
};

// Every way to run it, the fastest first by the model in plan.cpp; Tier::step is always there.
std::vector<Plan> plans(const PlanRequest& request, const Facts& facts);

// The one to use: the first, or the first of the tier wished for.
// Throws std::invalid_argument where that tier cannot run it, with the reason.
Plan choose(const PlanRequest& request, const Facts& facts, const Tier* wish = nullptr);

// "cluster of 8: 2 tiles a block, 4 splits, ...": the choice and why not the others.
std::string explain(const PlanRequest& request, const Facts& facts);

}  // namespace seqkern::cuda
#pragma GCC visibility pop
