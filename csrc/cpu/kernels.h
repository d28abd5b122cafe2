// The kernels of every instruction set this build has (kernels.cpp, compiled once for each).
#pragma once

#include "../params.h"

namespace seqkern {

namespace baseline {
const KernelTable& kernel_table();
}
#if defined(__x86_64__)
namespace avx2 {
const KernelTable& kernel_table();
}
namespace avx512 {
const KernelTable& kernel_table();
}
namespace avx512bf16 {
const KernelTable& kernel_table();
}
namespace amx {
const KernelTable& kernel_table();
}
#endif

}  // namespace seqkern
