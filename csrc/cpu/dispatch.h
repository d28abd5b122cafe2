// Which instruction set's kernels run: the fastest that this machine has, until another is asked
// for.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

#pragma GCC visibility push(default)  // exported: the torch side calls it
namespace seqkern {

const KernelTable& kernels();
std::vector<std::string> instruction_sets();        // that were built and run here, slowest first
void set_instruction_set(const std::string& name);  // throws std::invalid_argument

}  // namespace seqkern
#pragma GCC visibility pop
