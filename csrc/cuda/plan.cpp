#include "plan.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <stdexcept>

#include "cut.h"
#include "kernels.h"

namespace seqkern::cuda {
namespace {

// What a step costs, in clock cycles of one multiprocessor. From data sheets and from what others
// measured; bench/sync.py measures each of them on the machine at hand.
constexpr double kClockGHz = 1.7;
constexpr double kLaunchUs = 4.0;             // of a kernel or a product, one after the other
constexpr double kMatrixCycles = 8;           // between two m16n8 products of a scheduler
constexpr double kLatencyCycles = 350;        // of load, products, sums, gates: once per step
constexpr double kSharedBytesPerCycle = 128;  // of a multiprocessor
constexpr double kL2BytesPerCycle = 40;       // of a multiprocessor
constexpr double kSyncCycles[] = {0, 50, 350, 1500};  // [Tier] besides, for the exchange
constexpr double kPointwiseCycles = 150;              // of a thread's item
constexpr double kRowSumCycles = 250;                 // of sums over a row, less the exchange

constexpr const char* kNames[] = {"step", "block", "cluster", "grid"};

int element_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::f64 ? 8 : 2; }

// Is float32 multiplied as three TF32 products?
bool three(const PlanRequest& r) { return r.dtype == Dtype::f32 && !one_tf32(r); }

std::string format(const char* text, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(buffer, sizeof(buffer), text, arguments);
  va_end(arguments);
  return buffer;
}

// Why no persistent kernel can run it, or "".
std::string no_persistent(const PlanRequest& r, const Facts& facts) {
  const CellShape& shape = cell_shape(r.cell);
  if (shape.hidden_gates == 0) return format("%s has no product", shape.name);
  if (r.projected && r.regularised) return "a projection's kernels do not regularise";
  if (r.dtype == Dtype::f64) return "float64 has no matrix instruction here";
  if (facts.capability < 80)
    return format("sm_%d has no such matrix instructions", facts.capability);
  if (r.T * r.B > 0x7fffffff) return "its rows are 2^31 or more";
  return "";
}

// Why this tier cannot run it, though persistent kernels could, or "".
std::string no_tier(Tier tier, const Facts& facts) {
  if (tier == Tier::cluster && facts.max_cluster < 2)
    return format("sm_%d has no clusters", facts.capability);
  return "";
}

double step_us(const PlanRequest& r, const Shape& shape, const Plan& plan) {
  const int columns = plan.batch / kColumn;
  const double products = three(r) ? 3 : 1;
  double cycles = 0;
  for (int i = 0; i < shape.legs; i++) {
    const LegShape& leg = shape.leg[i];
    const int64_t warps = plan.tiles[i] * plan.splits[i];
    const double per_warp = double(divide_up(leg.chunks, plan.splits[i]));
    const double beyond = std::max(0.0, per_warp - leg.register_chunks);
    cycles += kLatencyCycles + kSyncCycles[int(plan.tier)];
    cycles +=
        double(divide_up(warps, 4)) * per_warp * 2 * leg.m * columns * products * kMatrixCycles;
    cycles += double(warps) * beyond * leg.m * 1024 * columns / kSharedBytesPerCycle;
    cycles += 2 * double(warps) * columns * sum_bytes(leg.m) / kSharedBytesPerCycle;
    const double vector = double(plan.batch) * leg.chunks * kChunkBytes;
    cycles += vector * plan.tiles[i] /
              (plan.tier == Tier::grid ? kL2BytesPerCycle : kSharedBytesPerCycle);
    if (plan.tier == Tier::cluster) cycles += vector / kSharedBytesPerCycle * 4;  // as pushed
    cycles += double(divide_up(plan.tiles[i] * plan.batch / 2, kWarps)) * kPointwiseCycles;
  }
  cycles += shape.row_sums * (kRowSumCycles + kSyncCycles[int(plan.tier)]);
  const double rounds = double(divide_up(r.D * plan.slices, plan.groups));
  return rounds * cycles / (kClockGHz * 1e3);
}

Plan step_plan(const PlanRequest& r) {
  Plan plan;
  const CellShape& shape = cell_shape(r.cell);
  const double work = 2.0 * double(r.D * r.B) * double(r.H) * double(r.P) * 4;
  plan.step_us = (2 * kLaunchUs + work / 200e6) * (r.projected || shape.mid > 0 ? 2 : 1);
  if (shape.hidden_gates == 0) plan.step_us = kLatencyCycles / (kClockGHz * 1e3);
  return plan;
}

}  // namespace

const char* name_of(Tier tier) { return kNames[int(tier)]; }

std::vector<Plan> plans(const PlanRequest& r, const Facts& facts) {
  std::vector<Plan> found;
  if (no_persistent(r, facts).empty()) {
    const Shape shape =
        shape_of(r.cell, element_bytes(r.dtype), r.pass, r.H, r.P, r.projected, three(r));
    // The leg with most tiles is shared out; of the other, blocks may have none.
    const int most_tiles = std::max(shape.leg[0].tiles, shape.leg[1].tiles);
    for (const Tier tier : {Tier::block, Tier::cluster, Tier::grid}) {
      for (int tiles = 1; tiles <= std::min(kWarps, most_tiles); tiles++) {
        Plan plan;
        plan.tier = tier;
        plan.blocks = int(divide_up(most_tiles, tiles));
        const int limit = tier == Tier::block     ? 1
                          : tier == Tier::cluster ? std::min(facts.max_cluster, facts.sms)
                                                  : facts.sms;
        if (plan.blocks > limit || (plan.blocks == 1) != (tier == Tier::block)) continue;
        for (int i = 0; i < shape.legs; i++) {
          plan.tiles[i] = int(divide_up(shape.leg[i].tiles, plan.blocks));
          plan.splits[i] = std::min(kWarps / plan.tiles[i], shape.leg[i].chunks);
        }
        for (int batch = kColumn; batch * tiles <= kMostTileRows; batch *= 2) {
          if (batch > kColumn && batch / 2 >= r.B) continue;
          plan.batch = batch;
          plan.slices = int(divide_up(r.B, batch));
          plan.groups =
              int(std::min<int64_t>(r.D * plan.slices, std::max(1, facts.sms / plan.blocks)));
          plan.shared_bytes = size_t(shared_layout(shape, plan).bytes);
          if (plan.shared_bytes > size_t(facts.shared_bytes)) continue;
          plan.step_us = step_us(r, shape, plan);
          found.push_back(plan);
        }
      }
    }
  }
  found.push_back(step_plan(r));
  std::stable_sort(found.begin(), found.end(),
                   [](const Plan& a, const Plan& b) { return a.step_us < b.step_us; });
  return found;
}

Plan choose(const PlanRequest& r, const Facts& facts, const Tier* wish) {
  const std::vector<Plan> found = plans(r, facts);
  if (wish == nullptr) return found.front();
  for (const Plan& plan : found)
    if (plan.tier == *wish) return plan;
  std::string why = no_persistent(r, facts);
  if (why.empty()) why = no_tier(*wish, facts);
  if (why.empty())
    why = *wish == Tier::block ? format("one block does not hold W_hh of H = %lld", (long long)r.H)
                               : format("no cut of H = %lld fits", (long long)r.H);
  throw std::invalid_argument(std::string("cuda tier '") + name_of(*wish) +
                              "' was asked for: " + why);
}

std::string explain(const PlanRequest& r, const Facts& facts) {
  std::string text;
  const std::string never = no_persistent(r, facts);
  const std::vector<Plan> found = plans(r, facts);
  Tier seen[4];
  int count = 0;
  for (const Plan& plan : found) {  // the best of each tier, the chosen one first
    if (std::find(seen, seen + count, plan.tier) != seen + count) continue;
    seen[count++] = plan.tier;
    const int most = plan.tiles[1] > plan.tiles[0];
    text += count == 1 ? "chosen: " : "not:    ";
    if (plan.tier == Tier::step && cell_shape(r.cell).hidden_gates == 0)
      text +=
          format("step, all in one launch, each unit by itself, ~%.1f us a step\n", plan.step_us);
    else if (plan.tier == Tier::step)
      text += format("step, a product and a launch per step, ~%.1f us a step\n", plan.step_us);
    else
      text += format(
          "%s, %d block%s hold W_hh for %d row%s: %d tile%s of 16 units each, %d split%s of k, %zu "
          "KiB "
          "shared; %d of %lld job%s at a time, ~%.1f us a step\n",
          name_of(plan.tier), plan.blocks, plan.blocks == 1 ? "" : "s", plan.batch,
          plan.batch == 1 ? "" : "s", plan.tiles[most], plan.tiles[most] == 1 ? "" : "s",
          plan.splits[most], plan.splits[most] == 1 ? "" : "s", (plan.shared_bytes + 1023) / 1024,
          plan.groups, (long long)(r.D * plan.slices), r.D * plan.slices == 1 ? "" : "s",
          plan.step_us);
  }
  for (const Tier tier : {Tier::block, Tier::cluster, Tier::grid}) {
    if (std::find(seen, seen + count, tier) != seen + count) continue;
    std::string why = never.empty() ? no_tier(tier, facts) : never;
    if (why.empty()) why = "no cut of H = " + std::to_string(r.H) + " fits";
    text += std::string("never:  ") + name_of(tier) + ", " + why + "\n";
  }
  return text;
}

MatrixShape matrix_shape(const PlanRequest& r, int leg) {
  const int bytes = element_bytes(r.dtype);
  const LegShape shape = shape_of(r.cell, bytes, r.pass, r.H, r.P, r.projected, three(r)).leg[leg];
  return {int64_t(shape.tiles) * kTile, int64_t(shape.chunks) * (kChunkBytes / bytes)};
}

size_t exchange_bytes(const PlanRequest& r, const Plan& plan) {
  if (plan.tier != Tier::grid) return 0;
  const Shape shape =
      shape_of(r.cell, element_bytes(r.dtype), r.pass, r.H, r.P, r.projected, three(r));
  const int64_t chunks = shape.leg[0].chunks + shape.leg[1].chunks;
  int64_t bytes = int64_t(plan.batch) * chunks * kChunkBytes;
  if (shape.row_sums > 0) bytes += row_sum_bytes(plan.batch, shape.leg[0].tiles);
  return size_t(plan.groups * 2 * bytes);
}

size_t flag_count(const Plan& plan) {
  return plan.tier == Tier::grid ? size_t(3) * size_t(plan.groups) * size_t(plan.blocks) : 0;
}

}  // namespace seqkern::cuda
