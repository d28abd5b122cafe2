// Threads: OpenMP teams, and the barrier that the members of a team meet at inside a sequence.
#pragma once

#include <omp.h>
#include <sched.h>

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

#include "amx.h"

namespace seqkern {
namespace SEQKERN_ISA {

// f(thread, threads) on `threads` threads, or on fewer if OpenMP grants fewer; none is started for
// one.
template <class F>
void parallel(int threads, const F& f) {
  if (threads <= 1) {
    [[maybe_unused]] TilesInUse tiles;
    return f(0, 1);
  }
#if defined(__SANITIZE_THREAD__)  // it does not see how libgomp's teams begin and end
  std::vector<std::thread> team;
  for (int i = 1; i < threads; i++) team.emplace_back([&f, i, threads] { f(i, threads); });
  f(0, threads);
  for (std::thread& member : team) member.join();
#else
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] TilesInUse tiles;
    f(omp_get_thread_num(), omp_get_num_threads());
  }
#endif
}

// The part of 0..n that belongs to thread i of `of`: [part_begin(n, i, of), part_begin(n, i + 1,
// of)).
SEQKERN_INLINE int64_t part_begin(int64_t n, int64_t i, int64_t of) { return n * i / of; }

// Meets `members` threads again and again. It spins briefly, then gives the core away: a member
// that waits must not hold up the one that it waits for.
struct alignas(64) Barrier {
  int arrived;
  alignas(64) int generation;

  void reset() { arrived = generation = 0; }

  void wait(int members) {
    const int mine = __atomic_load_n(&generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == members) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, mine + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == mine; spins++) {
      if (spins < kSpins) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

  static constexpr int kSpins = 2000;
};

}  // namespace SEQKERN_ISA
}  // namespace seqkern
