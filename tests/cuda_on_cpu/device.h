// A CUDA device on a CPU, for the kernels of csrc/cuda at small shapes: the part behind the CUDA
// names (cuda_runtime.h) and behind the instructions (ptx.h).
//
// A CUDA thread is a fiber. It runs until an operation that synchronises; then a scheduler, whose
// order of blocks, warps and lanes is drawn anew in every round from a seed, goes on with another.
// So a missing barrier shows as a wrong value under some seed. What is asynchronous on a GPU is
// late here: a push lands, and a released flag changes, some rounds afterwards.
//
// What a GPU would answer with a hang or with nonsense ends the launch as a std::runtime_error that
// names block, thread and operation: a deadlock, lanes that meet in different warp operations, a
// thread that leaves others waiting at a barrier, a push to a block that has ended or to no
// barrier, a barrier that is handed more bytes than it expects or is left with bytes missing.
//
// Not modelled: a weak memory order. Plain stores are seen at once, by everyone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace seqkern::cuda_on_cpu {

// ---- for the tests ------------------------------------------------------------------------------

struct Facts {
  int capability = 90;
  int sms = 132;
  int free_sms = 132;            // of these: the others are reserved, which no query tells
  int shared_bytes = 227 << 10;  // that a block may ask for
  int max_cluster = 16;          // 1: no clusters
};

struct Counters {
  int64_t launches, switches, rounds, pushes;
};

// The launches that follow draw their orders from `seed`; counters start again.
void configure(uint64_t seed, const Facts& facts);
const Facts& facts();
Counters counters();

// ---- for cuda_runtime.h -------------------------------------------------------------------------

struct Launch {
  unsigned grid, block, cluster;
  size_t shared_bytes;
  bool cooperative;
  const char* file;  // of the launch
  int line;
  std::function<void()> kernel;
};

// Runs it to its end. Throws std::runtime_error, see above.
void run(const Launch& launch);

// ---- for kernels (cuda_runtime.h, ptx.h): what the thread that runs calls -----------------------

unsigned char* shared_memory();
size_t shared_offset(const void* shared);
int cluster_rank();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void sync_block();
void sync_cluster();
void sync_warp();
void pause();  // lets others run
// Each lane gets the value of lane `from`.
uint64_t shuffle(uint64_t value, unsigned from);

enum class Matrix { f16, bf16, tf32 };
void mma(Matrix type, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

void release(uint32_t* flag, uint32_t value);
uint32_t acquire(const uint32_t* flag);

void mbarrier_init(uint64_t* shared, int arrivals);
void mbarrier_expect(uint64_t* shared, uint32_t bytes);
void mbarrier_wait(uint64_t* shared, uint32_t parity);
void push(void* shared, uint64_t* barrier, int rank, const void* bytes16);

}  // namespace seqkern::cuda_on_cpu
