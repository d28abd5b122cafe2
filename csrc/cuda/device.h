// What the CUDA half can say about the machine it runs on. No torch header, no CUDA header.
#pragma once

#include <string>

namespace seqkern::cuda {

// The driver, the runtime and every device, one line each; "no CUDA driver" where there is none.
// Never throws for a missing driver or device, starts no work, and leaves torch's current device
// alone.
std::string status();

}  // namespace seqkern::cuda
