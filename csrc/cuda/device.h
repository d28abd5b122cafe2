// What the CUDA half can say about the machine it runs on. No torch header, no CUDA header.
#pragma once

#include <string>

#include "plan.h"

#pragma GCC visibility push(default)  // exported: the torch side calls it
namespace seqkern::cuda {

// The driver, the runtime and every device, one line each; "no CUDA driver" where there is none.
// Never throws for a missing driver or device, starts no work, and leaves torch's current device
// alone.
std::string status();

// Both throw std::runtime_error when CUDA refuses.
//
// Makes it the current device of this module's CUDA runtime, which is not torch's: each of them has
// its own idea of the current device.
void use_device(int device);

Facts device_facts(int device);

}  // namespace seqkern::cuda
#pragma GCC visibility pop
