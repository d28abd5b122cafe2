// The emulated device: fibers, the scheduler, barriers, pushes and flags; then the runtime's host
// functions. See device.h.

#include "device.h"

#include <cuda_runtime.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ptx.h"

#if defined(__SANITIZE_ADDRESS__)
#define SEQKERN_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SEQKERN_ASAN 1
#endif
#endif
#ifdef SEQKERN_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace seqkern::cuda_on_cpu {
namespace {

// ---- what there is ------------------------------------------------------------------------------

// Where a suspended flow of control goes on.
struct Context {
  void* jump[5];
  const void* stack;  // its lowest address
  size_t stack_bytes;
  void* fake_stack;  // AddressSanitizer's
};

struct Fiber {
  Context context{};
  bool idle = false;  // started, and in fiber_main between two threads
};

struct Block;
struct Warp;

struct Thread {
  Block* block;
  Warp* warp;
  unsigned index;
  Fiber* fiber = nullptr;
  bool ended = false;
  // What it waits for, for reports and to find the waiters of an mbarrier.
  const char* wait = nullptr;
  const void* address = nullptr;
  uint32_t value = 0;
};

using Lanes = uint32_t;

struct Warp {
  Thread* threads;  // [lanes]
  Lanes all = 0;    // that exist
  Lanes ready = 0;  // can go on
  Lanes spun = 0;   // of these: only ask again, so once a visit is enough
  Lanes arrived = 0, ended = 0;
  Lanes behind = 0;  // kept back, for some rounds
  int64_t behind_until = 0;
  const char* operation = nullptr;  // that `arrived` are in
  void* arguments[32];
};

struct TransactionBarrier {
  size_t offset;
  int arrivals, pending;
  int64_t bytes = 0;  // expected and not there yet; negative: there and not yet expected
  int64_t phase = 0;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  size_t threads = 0, at_barrier = 0, ended = 0;
};

struct Block {
  unsigned index;
  int rank;
  Cluster* cluster;
  unsigned char* shared = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<TransactionBarrier> barriers;
  size_t at_barrier = 0, ended = 0;
  int64_t sleeps_until = 0;

  bool has_ended() const { return ended == threads.size(); }
  TransactionBarrier* barrier(size_t offset) {
    for (TransactionBarrier& each : barriers)
      if (each.offset == offset) return &each;
    return nullptr;
  }
};

struct Push {
  Block* to;
  size_t offset, barrier;
  unsigned from;  // the pushing block
  unsigned char bytes[16];
};

struct Release {
  uint32_t* flag;
  uint32_t value;
  const Block* from;
  int64_t due;  // round
};

// What a barrier's word in shared memory holds.
constexpr uint64_t kBarrierWord = 0x6d62617272696572;

// Rounds in which threads ask for flags and nothing else happens, until that counts as a deadlock.
constexpr int64_t kIdleRounds = 4096;

struct Random {
  uint64_t state = 0;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  unsigned below(size_t n) { return unsigned((next() >> 32) * n >> 32); }
  bool one_in(unsigned n) { return below(n) == 0; }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t n = items.size(); n > 1; n--) std::swap(items[n - 1], items[below(n)]);
  }
};

// One launch at a time in the process; what follows belongs to it.
std::mutex launching;
Facts device_facts;
uint64_t device_seed = 0;
Counters count{};

const Launch* launch;
Random rng;
Context host;
Thread* current;  // null: the host
std::vector<std::unique_ptr<Cluster>> clusters;
std::vector<Push> pushes;
std::vector<Release> releases;
int64_t now, progress;
std::string error;

// ---- fibers -------------------------------------------------------------------------------------

#ifdef SEQKERN_ASAN
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
// Not a power of two, or the busy part of every stack would share the same cache lines.
constexpr size_t kStride = kStack + (4 << 10) + 192;
constexpr size_t kSlab = 256;  // stacks allocated together

// Kept from launch to launch.
std::deque<Fiber> fibers;
std::vector<Fiber*> free_fibers;

// Not instrumented: AddressSanitizer would clear the marks of the whole stack at every jump.
__attribute__((noinline, no_sanitize_address)) void jump_to(Context& to) {
  __builtin_longjmp(to.jump, 1);
}

__attribute__((noinline)) void switch_to(Context& from, Context& to) {
#ifdef SEQKERN_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
  if (__builtin_setjmp(from.jump) == 0) jump_to(to);
#ifdef SEQKERN_ASAN
  if (&from == &host)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
  else
    __sanitizer_finish_switch_fiber(from.fake_stack, &host.stack, &host.stack_bytes);
#endif
}

// The current thread stops here until the scheduler takes it up again.
void to_host() {
  const auto* here = static_cast<const char*>(__builtin_frame_address(0));
  if (here < static_cast<const char*>(current->fiber->context.stack) + 1024) {
    std::fprintf(stderr, "cuda_on_cpu: a thread's stack of %zu bytes is too small\n", kStack);
    std::abort();
  }
  switch_to(current->fiber->context, host);
}

void end_thread();

void fiber_main() {
#ifdef SEQKERN_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &host.stack, &host.stack_bytes);
#endif
  for (;;) {
    try {
      launch->kernel();
      if (error.empty()) end_thread();
    } catch (const std::exception& exception) {
      error = exception.what();
    } catch (...) {
      error = "an exception";
    }
    current->fiber->idle = true;
    to_host();
  }
}

__attribute__((noinline)) void start(Fiber& fiber) {
  static ucontext_t blank;
  static const bool once = (getcontext(&blank), true);
  (void)once;
  ucontext_t context = blank;
  context.uc_stack.ss_sp = const_cast<void*>(fiber.context.stack);
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
#ifdef SEQKERN_ASAN
  // An abandoned thread may have left its frames marked.
  __asan_unpoison_memory_region(fiber.context.stack, kStack);
  __sanitizer_start_switch_fiber(&host.fake_stack, fiber.context.stack, kStack);
#endif
  if (__builtin_setjmp(host.jump) == 0) setcontext(&context);
#ifdef SEQKERN_ASAN
  __sanitizer_finish_switch_fiber(host.fake_stack, nullptr, nullptr);
#endif
}

Fiber* new_fiber() {
  if (free_fibers.empty()) {
    const size_t bytes = kSlab * kStride;
    void* slab = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) throw std::bad_alloc();
    madvise(slab, bytes, MADV_NOHUGEPAGE);  // only the used end of each stack shall take memory
    for (size_t i = kSlab; i-- > 0;) {
      Fiber* fiber = &fibers.emplace_back();
      fiber->context.stack = static_cast<char*>(slab) + i * kStride;
      fiber->context.stack_bytes = kStack;
      free_fibers.push_back(fiber);
    }
  }
  Fiber* fiber = free_fibers.back();
  free_fibers.pop_back();
  return fiber;
}

// Runs a thread until it waits, or ends.
void resume(Thread& thread) {
  count.switches++;
  current = &thread;
  threadIdx.x = thread.index;
  blockIdx.x = thread.block->index;
  if (thread.fiber == nullptr) thread.fiber = new_fiber();
  if (thread.fiber->idle || thread.wait != nullptr) {
    thread.wait = nullptr;
    thread.fiber->idle = false;
    switch_to(host, thread.fiber->context);
  } else {
    start(*thread.fiber);
  }
  current = nullptr;
  if (thread.fiber->idle) {
    free_fibers.push_back(thread.fiber);
    thread.fiber = nullptr;
  }
}

// ---- waiting ------------------------------------------------------------------------------------

Lanes bit(const Thread& thread) { return Lanes(1) << thread.index % 32; }

void wake(Thread& thread) { thread.warp->ready |= bit(thread); }

// Until someone wakes it.
void wait_for(const char* what, const void* address = nullptr, uint32_t value = 0) {
  current->wait = what;
  current->address = address;
  current->value = value;
  current->warp->ready &= ~bit(*current);
  to_host();
}

// Until the scheduler's next visit.
void spin(const char* what, const void* address = nullptr, uint32_t value = 0) {
  current->wait = what;
  current->address = address;
  current->value = value;
  current->warp->spun |= bit(*current);
  to_host();
}

// Goes on at once or a little later.
void maybe_yield() {
  if (rng.one_in(4)) {
    current->wait = "nothing";
    to_host();
  }
}

void report(const char* format, va_list arguments) {
  if (!error.empty()) return;
  char text[600];
  std::vsnprintf(text, sizeof text, format, arguments);
  if (current != nullptr)
    error = "block " + std::to_string(current->block->index) + ", thread " +
            std::to_string(current->index) + ": ";
  error += text;
}

// From the host.
__attribute__((format(printf, 1, 2))) void refuse(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  report(format, arguments);
  va_end(arguments);
}

// ---- warps --------------------------------------------------------------------------------------

// All lanes meet; the last one runs finish(warp), then all go on.
template <class Finish>
void meet(const char* operation, void* arguments, const Finish& finish) {
  Warp& warp = *current->warp;
  if (warp.ended != 0) fail("%s, but lanes %08x of its warp have ended", operation, warp.ended);
  if (warp.arrived != 0 && warp.operation != operation)
    fail("%s, while lanes %08x of its warp are in %s", operation, warp.arrived, warp.operation);
  warp.operation = operation;
  warp.arguments[current->index % 32] = arguments;
  warp.arrived |= bit(*current);
  if (warp.arrived != warp.all) return wait_for(operation);
  finish(warp);
  warp.arrived = 0;
  warp.ready = warp.all;
  progress++;
  maybe_yield();
}

struct MatrixArguments {
  float* c;
  const uint32_t *a, *b;
};

float low(Matrix type, uint32_t pair) {
  return type == Matrix::f16 ? cuda::from_f16_bits(uint16_t(pair))
                             : cuda::from_bf16_bits(uint16_t(pair));
}

// As tensor cores add (Fasi et al. 2021): the terms are aligned to the largest one, cut off two
// bits below float's last, added exactly, and the sum is rounded to float towards zero.
double truncated_sum(const double* terms, int n) {
  double largest = 0, plain = 0;
  for (int i = 0; i < n; i++) {
    largest = std::max(largest, std::abs(terms[i]));
    plain += terms[i];
  }
  if (largest < 1e-30 || !std::isfinite(plain)) return plain;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 25), scale = 1 / unit;
  int64_t sum = 0;
  for (int i = 0; i < n; i++) sum += int64_t(terms[i] * scale);
  uint64_t size = uint64_t(sum < 0 ? -sum : sum);
  const int beyond = size == 0 ? 0 : 64 - __builtin_clzll(size) - 24;
  if (beyond > 0) size = size >> beyond << beyond;
  return (sum < 0 ? -double(size) : double(size)) * unit;
}

void multiply(Matrix type, const Warp& warp) {
  double a[16][16], b[16][8], c[16][8];
  const int K = type == Matrix::tf32 ? 8 : 16;
  for (int lane = 0; lane < 32; lane++) {
    const auto& in = *static_cast<const MatrixArguments*>(warp.arguments[lane]);
    const int r = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; i++) {  // a's register, then b's
      const int row = r + i % 2 * 8;
      if (type == Matrix::tf32) {
        a[row][q + i / 2 * 4] = __uint_as_float(in.a[i] & ~0x1fffu);
        if (i < 2) b[q + i * 4][r] = __uint_as_float(in.b[i] & ~0x1fffu);
      } else {
        const int k = 2 * q + i / 2 * 8;
        a[row][k] = low(type, in.a[i]);
        a[row][k + 1] = low(type, in.a[i] >> 16);
        if (i < 2) {
          b[2 * q + i * 8][r] = low(type, in.b[i]);
          b[2 * q + i * 8 + 1][r] = low(type, in.b[i] >> 16);
        }
      }
      c[r + i / 2 * 8][2 * q + i % 2] = in.c[i];
    }
  }
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 8; column++) {
      double terms[17] = {c[row][column]};
      for (int k = 0; k < K; k++) terms[k + 1] = a[row][k] * b[k][column];
      c[row][column] = truncated_sum(terms, K + 1);
    }
  for (int lane = 0; lane < 32; lane++) {
    const auto& out = *static_cast<const MatrixArguments*>(warp.arguments[lane]);
    const int r = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; i++) out.c[i] = float(c[r + i / 2 * 8][2 * q + i % 2]);
  }
}

// ---- blocks and clusters ------------------------------------------------------------------------

void wake_all(Block& block) {
  block.at_barrier = 0;
  for (Warp& warp : block.warps) warp.ready = warp.all;
}

void apply_release(size_t i) {
  *releases[i].flag = releases[i].value;
  releases.erase(releases.begin() + int64_t(i));
  progress++;
}

// A block's flags change in the order in which it released them.
void apply_releases(const Block* from) {
  for (size_t i = 0; i < releases.size();)
    if (from == nullptr || releases[i].from == from)
      apply_release(i);
    else
      i++;
}

void end_block(Block& block) {
  for (const Push& each : pushes)
    if (each.to == &block)
      return refuse("the block ends while a push from block %u to it is on its way", each.from);
  for (const TransactionBarrier& each : block.barriers)
    if (each.bytes != 0)
      return refuse("the block ends with %lld bytes of its mbarrier at %zu outstanding",
                    static_cast<long long>(each.bytes), each.offset);
  std::free(block.shared);
  block.shared = nullptr;
}

void end_thread() {
  Thread& thread = *current;
  Block& block = *thread.block;
  if (thread.warp->arrived != 0)
    fail("ends while lanes %08x of its warp wait in %s", thread.warp->arrived,
         thread.warp->operation);
  if (block.at_barrier != 0)
    fail("ends while %zu threads of its block wait in __syncthreads", block.at_barrier);
  if (block.cluster->at_barrier != 0)
    fail("ends while %zu threads of its cluster wait in cluster_sync", block.cluster->at_barrier);
  thread.ended = true;
  thread.warp->ended |= bit(thread);
  thread.warp->ready &= ~bit(thread);
  block.ended++;
  block.cluster->ended++;
  progress++;
  if (block.has_ended()) end_block(block);
}

TransactionBarrier& barrier_at(Block& block, const char* operation, size_t offset) {
  TransactionBarrier* barrier = block.barrier(offset);
  if (barrier == nullptr)
    fail("%s: block %u has no mbarrier at %zu (yet)", operation, block.index, offset);
  uint64_t word;
  std::memcpy(&word, block.shared + offset, 8);
  if (word != kBarrierWord)
    fail("%s: the mbarrier of block %u at %zu was overwritten", operation, block.index, offset);
  return *barrier;
}

void end_phase_if_complete(Block& block, TransactionBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.phase++;
  progress++;
  const void* address = block.shared + barrier.offset;
  for (Thread& thread : block.threads)
    if (thread.wait != nullptr && thread.address == address) wake(thread);
}

void deliver(size_t i) {
  const Push push = pushes[i];
  pushes[i] = pushes.back();
  pushes.pop_back();
  progress++;
  Block& block = *push.to;  // lives: a block cannot end before
  TransactionBarrier* barrier = block.barrier(push.barrier);
  uint64_t word;
  std::memcpy(&word, block.shared + push.barrier, 8);
  if (barrier == nullptr || word != kBarrierWord)
    return refuse("a push from block %u to block %u: its mbarrier at %zu was overwritten",
                  push.from, block.index, push.barrier);
  std::memcpy(block.shared + push.offset, push.bytes, 16);
  barrier->bytes -= 16;
  end_phase_if_complete(block, *barrier);
}

void deliver_some() {
  if (pushes.empty()) return;
  size_t n = rng.one_in(2) ? 0 : rng.one_in(4) ? pushes.size() : rng.below(pushes.size() + 1);
  while (n-- > 0 && error.empty()) deliver(rng.below(pushes.size()));
}

// ---- the scheduler ------------------------------------------------------------------------------

void start_cluster(unsigned index) {
  auto cluster = std::make_unique<Cluster>();
  for (unsigned rank = 0; rank < launch->cluster; rank++) {
    auto block = std::make_unique<Block>();
    block->index = index * launch->cluster + rank;
    block->rank = int(rank);
    block->cluster = cluster.get();
    // Exactly as long as asked for, so that AddressSanitizer sees overruns.
    void* shared = nullptr;
    if (posix_memalign(&shared, 128, std::max<size_t>(launch->shared_bytes, 1)) != 0)
      throw std::bad_alloc();
    block->shared = static_cast<unsigned char*>(shared);
    std::memset(shared, 0xff, launch->shared_bytes);  // NaN
    block->threads.resize(launch->block);
    block->warps.resize((launch->block + 31) / 32);
    for (unsigned i = 0; i < launch->block; i++) {
      Warp& warp = block->warps[i / 32];
      block->threads[i] = {block.get(), &warp, i};
      if (i % 32 == 0) warp.threads = &block->threads[i];
      warp.all |= Lanes(1) << i % 32;
      warp.ready = warp.all;
    }
    cluster->threads += launch->block;
    cluster->blocks.push_back(std::move(block));
  }
  clusters.push_back(std::move(cluster));
}

// Runs each of these lanes once, in a new order.
void run_lanes(Warp& warp, Lanes lanes) {
  const unsigned stride = rng.below(16) * 2 + 1, offset = rng.below(32);
  for (unsigned i = 0; i < 32 && error.empty(); i++) {
    const unsigned lane = (i * stride + offset) % 32;
    if (lanes >> lane & 1) resume(warp.threads[lane]);
  }
}

// One round over the blocks that are there. Returns whether anything ran, or was held back.
bool run_round(std::vector<Block*>& blocks, std::vector<Warp*>& warps) {
  bool active = false;
  blocks.clear();
  for (const auto& cluster : clusters)
    for (const auto& block : cluster->blocks)
      if (!block->has_ended()) blocks.push_back(block.get());
  rng.shuffle(blocks);
  for (Block* block : blocks) {
    warps.clear();
    for (Warp& warp : block->warps)
      if (warp.ready != 0) warps.push_back(&warp);
    if (warps.empty()) continue;
    active = true;
    if (blocks.size() > 1 && block->sleeps_until < now && rng.one_in(16))
      block->sleeps_until = now + 1 + rng.below(8);
    if (block->sleeps_until >= now) continue;
    rng.shuffle(warps);
    for (Warp* warp : warps) {
      if (block->has_ended()) break;
      if (warps.size() > 1 && rng.one_in(8)) continue;
      // Some warps run far ahead of others.
      warp->spun = 0;
      for (int visits = 1 << rng.below(9); visits > 0; visits--) {
        if (rng.one_in(32)) {  // some lanes stay far behind the others
          warp->behind = Lanes(rng.next());
          warp->behind_until = now + rng.below(12);
        }
        Lanes lanes = warp->ready & ~warp->spun;
        if (warp->behind_until >= now) lanes &= ~warp->behind;
        if (lanes == 0) break;
        run_lanes(*warp, lanes);
        if (!error.empty()) return true;
      }
      deliver_some();
      if (!error.empty()) return true;
    }
  }
  return active;
}

std::string ranges(const std::vector<unsigned>& numbers) {
  std::string text;
  for (size_t i = 0, j; i < numbers.size(); i = j) {
    for (j = i + 1; j < numbers.size() && numbers[j] == numbers[j - 1] + 1;) j++;
    text += (i > 0 ? "," : "") + std::to_string(numbers[i]);
    if (j > i + 1) text += "-" + std::to_string(numbers[j - 1]);
  }
  return text;
}

// Who waits for what.
std::string waiting() {
  std::string text;
  int lines = 0;
  for (const auto& cluster : clusters)
    for (const auto& block : cluster->blocks) {
      std::map<std::string, std::vector<unsigned>> threads;
      for (const Thread& thread : block->threads) {
        std::string what = thread.ended             ? "have ended"
                           : thread.wait == nullptr ? "have not started"
                                                    : std::string("wait in ") + thread.wait;
        char detail[80] = "";
        const auto* address = static_cast<const unsigned char*>(thread.address);
        if (thread.wait != nullptr && address != nullptr) {
          if (const TransactionBarrier* barrier =
                  block->shared != nullptr ? block->barrier(size_t(address - block->shared))
                                           : nullptr)
            std::snprintf(detail, sizeof detail,
                          "(at %zu, parity %u): phase %lld, %d arrivals and %lld bytes to come",
                          barrier->offset, thread.value, static_cast<long long>(barrier->phase),
                          barrier->pending, static_cast<long long>(barrier->bytes));
          else
            std::snprintf(detail, sizeof detail, "(%p), which is %u", thread.address,
                          *reinterpret_cast<const uint32_t*>(address));
        }
        threads[what + detail].push_back(thread.index);
      }
      for (const auto& [what, which] : threads) {
        if (++lines > 24) return text + "\n  ...";
        text +=
            "\n  block " + std::to_string(block->index) + ": threads " + ranges(which) + " " + what;
      }
    }
  return text;
}

void run_all() {
  std::vector<unsigned> order(launch->grid / launch->cluster);
  for (unsigned i = 0; i < order.size(); i++) order[i] = i;
  rng.shuffle(order);
  // Without the cooperative attribute nobody promises that blocks run at the same time.
  size_t resident = launch->cooperative ? order.size() : 1 + rng.below(4);
  if (launch->cluster > 1)
    resident = std::min<size_t>(resident, size_t(device_facts.free_sms) / launch->cluster);

  std::vector<Block*> blocks;
  std::vector<Warp*> warps;
  for (int64_t idle = 0; error.empty();) {
    std::erase_if(clusters, [](const auto& each) {
      return each->ended == each->threads &&
             std::none_of(releases.begin(), releases.end(), [&](const Release& release) {
               return release.from->cluster == each.get();
             });
    });
    while (clusters.size() < resident && !order.empty()) {
      start_cluster(order.back());
      order.pop_back();
    }
    if (clusters.empty()) break;

    now++;
    count.rounds++;
    const int64_t before = progress;
    bool active = run_round(blocks, warps);
    if (!error.empty()) break;
    for (size_t i = 0; i < releases.size();)
      if (releases[i].due <= now)
        apply_release(i);
      else
        i++;
    if (!active && !pushes.empty()) {
      deliver(rng.below(pushes.size()));
      active = true;
    }
    active = active || !releases.empty() || progress != before;
    idle = progress != before ? 0 : idle + 1;
    if (error.empty() && (!active || idle > kIdleRounds)) {
      error = "deadlock";
      if (!order.empty())
        error += ", " + std::to_string(order.size() * launch->cluster) + " blocks not started";
      error += waiting();
    }
  }
}

// After the launch, however it ended.
void clear() {
  for (const auto& cluster : clusters)
    for (const auto& block : cluster->blocks) {
      for (Thread& thread : block->threads)
        if (thread.fiber != nullptr) free_fibers.push_back(thread.fiber);  // abandoned: not idle
      std::free(block->shared);
    }
  clusters.clear();
  pushes.clear();
  releases.clear();
  error.clear();
}

}  // namespace

// ---- for the tests ------------------------------------------------------------------------------

void configure(uint64_t seed, const Facts& facts) {
  const std::lock_guard lock(launching);
  device_facts = facts;
  device_seed = seed;
  count = {};
}

const Facts& facts() { return device_facts; }

Counters counters() { return count; }

void run(const Launch& new_launch) {
  const std::lock_guard lock(launching);
  launch = &new_launch;
  rng.state = device_seed * 0x2545f4914f6cdd1d + uint64_t(count.launches++);
  now = progress = 0;
  threadIdx = blockIdx = {};
  blockDim = {launch->block};
  gridDim = {launch->grid};
  std::string text;
  try {
    run_all();
    text = error;
    if (text.empty()) apply_releases(nullptr);
  } catch (...) {  // no memory
    clear();
    throw;
  }
  clear();
  if (!text.empty()) {
    const char* name = std::strrchr(launch->file, '/');
    throw std::runtime_error("cuda_on_cpu: the kernel launched at " +
                             std::string(name != nullptr ? name + 1 : launch->file) + ":" +
                             std::to_string(launch->line) + ": " + text);
  }
}

// ---- for kernels --------------------------------------------------------------------------------

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  report(format, arguments);
  va_end(arguments);
  current->wait = "an error";
  for (;;) to_host();
}

unsigned char* shared_memory() { return current->block->shared; }

size_t shared_offset(const void* shared) {
  const size_t offset = size_t(static_cast<const unsigned char*>(shared) - shared_memory());
  if (offset >= launch->shared_bytes) fail("%p is not in the block's shared memory", shared);
  return offset;
}

int cluster_rank() { return device_facts.capability >= 90 ? current->block->rank : 0; }

void pause() { spin("__nanosleep"); }

void sync_block() {
  Block& block = *current->block;
  if (block.ended != 0) fail("__syncthreads, but %zu threads of its block have ended", block.ended);
  if (++block.at_barrier < block.threads.size()) return wait_for("__syncthreads");
  wake_all(block);
  progress++;
  maybe_yield();
}

void sync_cluster() {
  if (device_facts.capability < 90) return;
  Cluster& cluster = *current->block->cluster;
  if (cluster.ended != 0)
    fail("cluster_sync, but %zu threads of its cluster have ended", cluster.ended);
  apply_releases(current->block);
  if (++cluster.at_barrier < cluster.threads) return wait_for("cluster_sync");
  cluster.at_barrier = 0;
  for (const auto& block : cluster.blocks) wake_all(*block);
  progress++;
  maybe_yield();
}

void sync_warp() {
  meet("__syncwarp", nullptr, [](Warp&) {});
}

uint64_t shuffle(uint64_t value, unsigned from) {
  struct {
    uint64_t in, out;
    unsigned from;
  } mine{value, 0, from};
  using Arguments = decltype(mine);
  meet("__shfl_sync", &mine, [](Warp& warp) {
    for (unsigned lane = 0; lane < 32; lane++) {
      if (!(warp.all >> lane & 1)) continue;
      auto& to = *static_cast<Arguments*>(warp.arguments[lane]);
      if (!(warp.all >> to.from & 1)) fail("__shfl_sync from lane %u, which is not", to.from);
      to.out = static_cast<Arguments*>(warp.arguments[to.from])->in;
    }
  });
  return mine.out;
}

void mma(Matrix type, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static constexpr const char* kNames[] = {"mma_f16", "mma_bf16", "mma_tf32"};
  if (current->warp->all != ~Lanes(0)) fail("mma in a warp of less than 32 lanes");
  MatrixArguments mine{c, a, b};
  meet(kNames[int(type)], &mine, [type](Warp& warp) { multiply(type, warp); });
}

void release(uint32_t* flag, uint32_t value) {
  int64_t due = now + (rng.one_in(2) ? 0 : rng.below(rng.one_in(4) ? 20 : 4));
  for (const Release& each : releases)
    if (each.from == current->block) due = std::max(due, each.due);
  releases.push_back({flag, value, current->block, due});
  if (rng.one_in(4)) apply_releases(current->block);
}

uint32_t acquire(const uint32_t* flag) {
  spin("acquire", flag);
  for (const Release& each : releases)
    if (each.flag == flag && each.from == current->block) {
      apply_releases(current->block);
      break;
    }
  return *static_cast<const volatile uint32_t*>(flag);
}

void mbarrier_init(uint64_t* shared, int arrivals) {
  if (device_facts.capability < 90) return;
  const size_t offset = shared_offset(shared);
  if (offset % 8 != 0) fail("mbarrier_init: %zu is not a multiple of 8", offset);
  if (arrivals < 1) fail("mbarrier_init: %d arrivals", arrivals);
  if (current->block->barrier(offset) != nullptr) fail("mbarrier_init: twice at %zu", offset);
  std::memcpy(shared, &kBarrierWord, 8);
  current->block->barriers.push_back({offset, arrivals, arrivals});
}

void mbarrier_expect(uint64_t* shared, uint32_t bytes) {
  if (device_facts.capability < 90) return;
  TransactionBarrier& barrier =
      barrier_at(*current->block, "mbarrier_expect", shared_offset(shared));
  barrier.pending--;
  barrier.bytes += bytes;
  if (barrier.bytes > 0xfffff) fail("mbarrier_expect: more than 2^20 - 1 bytes");
  if (barrier.pending == 0 && barrier.bytes < 0)
    fail("mbarrier_expect: %lld bytes more came in phase %lld of the mbarrier at %zu than expected",
         -static_cast<long long>(barrier.bytes), static_cast<long long>(barrier.phase),
         barrier.offset);
  progress++;
  end_phase_if_complete(*current->block, barrier);
}

void mbarrier_wait(uint64_t* shared, uint32_t parity) {
  if (device_facts.capability < 90) return;
  const size_t offset = shared_offset(shared);
  if (parity > 1) fail("mbarrier_wait: parity %u", parity);
  maybe_yield();
  // Asked again after waking, as the hardware does: who comes two phases late waits on.
  while (uint32_t(barrier_at(*current->block, "mbarrier_wait", offset).phase & 1) == parity)
    wait_for("mbarrier_wait", shared, parity);
}

void push(void* shared, uint64_t* barrier, int rank, const void* bytes16) {
  if (device_facts.capability < 90) fail("push: there are no clusters before sm_90");
  const size_t offset = shared_offset(shared), at = shared_offset(barrier);
  if (offset % 16 != 0 || offset + 16 > launch->shared_bytes)
    fail("push: 16 bytes at %zu of %zu", offset, launch->shared_bytes);
  Cluster& cluster = *current->block->cluster;
  if (rank < 0 || size_t(rank) >= cluster.blocks.size())
    fail("push: rank %d in a cluster of %zu", rank, cluster.blocks.size());
  Block& to = *cluster.blocks[size_t(rank)];
  if (to.has_ended()) fail("push: block %u has ended", to.index);
  barrier_at(to, "push", at);
  Push push{&to, offset, at, current->block->index, {}};
  std::memcpy(push.bytes, bytes16, 16);
  pushes.push_back(push);
  count.pushes++;
}

}  // namespace seqkern::cuda_on_cpu

// ---- the runtime's host functions ---------------------------------------------------------------

using namespace seqkern::cuda_on_cpu;

namespace {

constexpr int kPortableCluster = 8, kPortableShared = 48 << 10;

struct KernelAttributes {
  int shared_bytes = kPortableShared;
  bool any_cluster = false;
};
std::mutex attributes_lock;
std::map<const void*, KernelAttributes> kernel_attributes;
thread_local cudaError_t last_error = cudaSuccess;

KernelAttributes attributes_of(const void* kernel) {
  const std::lock_guard lock(attributes_lock);
  return kernel_attributes[kernel];
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

struct Shape {
  unsigned cluster = 1;
  bool cooperative = false;
};

Shape shape_of(const cudaLaunchConfig_t& config) {
  Shape shape;
  for (unsigned i = 0; i < config.numAttrs; i++) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& dim = attribute.val.clusterDim;
      shape.cluster = dim.y == 1 && dim.z == 1 ? dim.x : 0;
    } else if (attribute.id == cudaLaunchAttributeCooperative) {
      shape.cooperative = attribute.val.cooperative != 0;
    }
  }
  return shape;
}

cudaError_t check(const void* kernel, const cudaLaunchConfig_t& config) {
  const KernelAttributes attributes = attributes_of(kernel);
  const Shape shape = shape_of(config);
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (grid.x == 0 || grid.y != 1 || grid.z != 1 || block.x == 0 || block.x > 1024 || block.y != 1 ||
      block.z != 1)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > size_t(attributes.shared_bytes)) return cudaErrorInvalidValue;
  if (shape.cluster == 0 || grid.x % shape.cluster != 0) return cudaErrorInvalidConfiguration;
  if (shape.cluster > 1 &&
      (facts().capability < 90 ||
       shape.cluster > unsigned(std::min(facts().max_cluster, facts().free_sms)) ||
       (shape.cluster > kPortableCluster && !attributes.any_cluster)))
    return cudaErrorInvalidClusterSize;
  if (shape.cooperative && grid.x > facts().free_sms / shape.cluster * shape.cluster)
    return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorInvalidClusterSize:
      return "Invalid cluster size";
  }
  return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : result(cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  const Facts& has = facts();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = has.sms;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = has.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = has.capability % 10;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = has.shared_bytes;
      break;
    case cudaDevAttrClusterLaunch:
      *value = has.capability >= 90;
      break;
    default:
      return result(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(attributes_lock);
  KernelAttributes& attributes = kernel_attributes[kernel];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > facts().shared_bytes) return result(cudaErrorInvalidValue);
    attributes.shared_bytes = value;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    attributes.any_cluster = value != 0;
  } else {
    return result(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 64;
  attributes->ptxVersion = attributes->binaryVersion = facts().capability;
  attributes->maxDynamicSharedSizeBytes = attributes_of(kernel).shared_bytes;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, const void*,
                                                 const cudaLaunchConfig_t*) {
  *blocks = facts().max_cluster;
  return cudaSuccess;
}

cudaError_t cuda_on_cpu_launch(const cuda_on_cpu_site& site, const void* kernel,
                               std::function<void()> call) {
  const cudaLaunchConfig_t& config = *site.config;
  if (const cudaError_t error = check(kernel, config)) return result(error);
  const Shape shape = shape_of(config);
  run({config.gridDim.x, config.blockDim.x, shape.cluster, config.dynamicSmemBytes,
       shape.cooperative, site.file, site.line, std::move(call)});
  return cudaSuccess;
}
