#include "dispatch.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <stdexcept>

#include "build_facts.h"

namespace seqkern {
namespace {

// AMX is there, and the system lets this process use it (Linux: it has to be asked).
bool has_amx() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (name == "amx") return runs_here("avx512bf16") && has_amx();
  if (name == "avx512" || name == "avx512bf16") {
    const bool avx512 = runs_here("avx2") && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 && (name == "avx512" || (__builtin_cpu_supports("avx512bf16") &&
                                           __builtin_cpu_supports("avx512vnni")));
  }
#endif
  return name == "baseline";
}

std::vector<const KernelTable*> tables() {
  std::vector<const KernelTable*> found;
#define SEQKERN_TABLE(isa) \
  if (runs_here(#isa)) found.push_back(&isa::kernel_table());
  SEQKERN_FOR_EACH_ISA(SEQKERN_TABLE)
#undef SEQKERN_TABLE
  return found;
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{tables().back()};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const KernelTable* table : tables()) names.emplace_back(table->name);
  return names;
}

void set_instruction_set(const std::string& name) {
  std::string known;
  for (const KernelTable* table : tables()) {
    if (table->name == name) {
      current().store(table, std::memory_order_relaxed);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument("instruction set: expected one of " + known + ", got " + name);
}

}  // namespace seqkern
