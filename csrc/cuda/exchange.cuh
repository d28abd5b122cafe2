// The exchange of a vector between the blocks of a group (recurrence.cuh), once per step: each
// block gives the numbers of its units for every row of the batch, all get all of them.
//
// Double buffered. With a vector's epochs counted from 1, a block writes epoch e + 2 over epoch e
// only after it has seen the whole of epoch e + 1, each piece of which was sent by a warp of a
// block that had finished with epoch e (sums are handed over by __syncthreads).
//   block     stores to shared memory, __syncthreads
//   cluster   16-byte pushes into every block's shared memory, counted by a transaction barrier
//   grid      stores to L2; each block then raises its flag to the epoch, and each warp waits for
//             the flags of the blocks whose units its chunks are
//
// In a buffer a vector lies as the matrix instructions want it: [columns][chunks][8 rows][64 bytes
// of k] (cut.h).
#pragma once

#include "cut.h"
#include "kernels.h"
#include "math.cuh"
#include "ptx.cuh"

namespace seqkern::cuda {

// How numbers stored as S are multiplied. 3 x TF32 (Ootomo & Yokota 2022: high and low parts,
// without low * low, summed outside of the tensor core) is as good as float32.
enum class Product { f16, bf16, tf32, tf32_3 };

// What a kernel is handed of a leg beside its params.
struct LegCut {
  int tiles, splits;      // of a block, as in Plan
  int all_tiles;          // of units that the matrix gives
  int chunks;             // of k
  int64_t Hp, Kp;         // the matrix: [m, Hp, Kp]
  const void* matrix[2];  // [way], of [heads] each
  // The vector: what its owners, the blocks with tiles of the other leg (or of the only one), give.
  int vector_tiles, all_vector_tiles;
  unsigned char* exchange;  // [groups][2][columns][chunks][8][64], Tier::grid only
  uint32_t* flags;          // [groups][blocks], Tier::grid only
};

struct Cut {
  int blocks, groups, batch, slices;  // as in Plan
  int log2_pairs;                     // of batch / 2
  int64_t Hp;                         // H rounded up to 16: the reserve's
  LegCut leg[2];
  unsigned char* row_sums;  // [groups][2][row_sum_bytes], Tier::grid only
  uint32_t* row_flags;      // [groups][blocks], Tier::grid only
};

// Where this thread stands.
struct Place {
  int warp, lane, group, member;  // member: of the group's blocks

  __device__ explicit Place(const Cut& cut)
      : warp(warp_uniform(int(threadIdx.x) / 32)),
        lane(int(threadIdx.x) % 32),
        group(int(blockIdx.x) / cut.blocks),
        member(int(blockIdx.x) % cut.blocks) {}
};

//   kNumbers  that a unit gives
//   kGrid     through L2, else through shared memory
template <class S, Product kProduct, int kNumbers, bool kGrid>
struct Vector {
  static constexpr int kTileBytes = kTile * int(sizeof(S)) * kNumbers;

  const Cut& cut;
  const LegCut& leg;
  const Place& place;
  const int buffer_bytes;
  uint32_t epoch;  // of the last exchange
  unsigned char *buffers, *stage;
  uint64_t* barriers;
  uint32_t* my_flag;
  const uint32_t* watched_flags = nullptr;  // of the blocks that this warp waits for
  int watched = 0;

  __device__ Vector(const Cut& cut, int i, const Place& place, unsigned char* shared,
                    const SharedLayout& at)
      : cut(cut),
        leg(cut.leg[i]),
        place(place),
        buffer_bytes(cut.batch * leg.chunks * kChunkBytes),
        epoch(0),
        buffers(kGrid ? leg.exchange + int64_t(place.group) * 2 * buffer_bytes
                      : shared + at.exchange[i]),
        stage(shared + at.stage + place.warp * at.stage_bytes),
        barriers(reinterpret_cast<uint64_t*>(shared + at.barriers) + 2 * i),
        my_flag(kGrid ? leg.flags + place.group * cut.blocks + place.member : nullptr) {
    if constexpr (!kGrid) {
      // What no unit writes must be zero: the last chunk may reach beyond the last tile.
      uint4* const pieces = reinterpret_cast<uint4*>(buffers);
      for (int64_t i = threadIdx.x; i < 2 * buffer_bytes / 16; i += kThreads)
        pieces[i] = uint4{0, 0, 0, 0};
      if (cut.blocks > 1) {
        if (threadIdx.x == 0) {
          mbarrier_init(&barriers[0], 1);
          mbarrier_init(&barriers[1], 1);
          mbarrier_init_done();
        }
        __syncwarp();
        cluster_sync();
      }
    }
    __syncthreads();
  }

  // These chunks are the warp's.
  __device__ void watch(int chunk0, int chunks) {
    if (!kGrid || chunks == 0) return;
    const int first = chunk0 * kChunkBytes / kTileBytes;
    int last = ((chunk0 + chunks) * kChunkBytes - 1) / kTileBytes;
    if (last >= leg.all_vector_tiles) last = leg.all_vector_tiles - 1;
    watched_flags = leg.flags + place.group * cut.blocks + first / leg.vector_tiles;
    watched = last / leg.vector_tiles - first / leg.vector_tiles + 1;
  }

  // Of the epoch last exchanged, column 0, from a chunk on.
  __device__ const unsigned char* at(int chunk) const {
    return buffers + ((epoch - 1) % 2 * buffer_bytes + chunk * (kColumn * kChunkBytes));
  }

  // In an epoch's buffer: byte k of row n's part of tile t.
  __device__ int offset(int t, int n, int k) const {
    const int byte = t * kTileBytes + k;
    const int line = (n / kColumn * leg.chunks + byte / kChunkBytes) * kColumn + n % kColumn;
    return line * kChunkBytes + byte % kChunkBytes;
  }

  static constexpr int kPieces = 2 * kTileBytes / 16;  // of a granule
  static constexpr int kSpan = kPieces <= 4 ? 4 : kPieces <= 8 ? 8 : kPieces <= 16 ? 16 : 32;
  static_assert(kPieces <= 32);

  // Where in a buffer a granule, rows n and its neighbour of tile t, goes, as far as this lane
  // writes it; the same in all epochs.
  __device__ int route(int t, int n) const {
    if (kGrid || cut.blocks == 1) return offset(t, n, place.lane % kTile * int(sizeof(S)));
    const int piece = place.lane % kSpan, row0 = n - place.lane / kTile;
    return offset(t, row0 + piece / (kPieces / 2), piece % (kPieces / 2) * 16);
  }

  // Sends one granule for the next epoch: each lane gives its unit's numbers. The whole warp.
  __device__ void send(int route, int t, const float (&value)[kNumbers]) const {
    unsigned char* const to = buffers + (epoch % 2 * buffer_bytes + route);
    S number[kNumbers];
#pragma unroll
    for (int g = 0; g < kNumbers; g++)
      number[g] = narrow<S>(kProduct == Product::tf32 ? to_tf32(value[g]) : value[g]);
    if (kGrid || cut.blocks == 1) {  // 16 lanes' numbers are whole sectors of L2
      const int first = t * kTileBytes % kChunkBytes;
#pragma unroll
      for (int g = 0; g < kNumbers; g++) {
        const int byte = first + g * kTile * int(sizeof(S));
        const int beyond = byte / kChunkBytes * (kColumn * kChunkBytes) + byte % kChunkBytes;
        *reinterpret_cast<S*>(to + (kNumbers == 1 ? 0 : beyond - first)) = number[g];
      }
      return;
    }
    S* const mine = reinterpret_cast<S*>(stage + place.lane / kTile * kTileBytes);
#pragma unroll
    for (int g = 0; g < kNumbers; g++) mine[g * kTile + place.lane % kTile] = number[g];
    __syncwarp();
    const int piece = place.lane % kSpan;  // a lane's is the same for every block
    if (piece < kPieces) {
      const uint4 v = reinterpret_cast<const uint4*>(stage)[piece];
      for (int rank = place.lane / kSpan; rank < cut.blocks; rank += 32 / kSpan)
        push(to, &barriers[epoch % 2], rank, v);
    }
    __syncwarp();
  }

  // After every granule has been sent.
  __device__ void publish() {
    epoch++;
    if (!kGrid && cut.blocks > 1) {
      if (threadIdx.x == 0)
        mbarrier_expect(&barriers[(epoch - 1) % 2],
                        uint32_t(cut.batch * leg.all_vector_tiles * kTileBytes));
      return;
    }
    __syncthreads();
    // Not the first warp: it has most to do.
    if (kGrid && threadIdx.x == kThreads - 32) release(my_flag, epoch);
  }

  // Until the warp's chunks are there; to be called by the whole block, which together waits for
  // all.
  __device__ void wait() const {
    if constexpr (kGrid) {
      for (int i = place.lane; i < watched; i += 32)
        while (int32_t(acquire(&watched_flags[i]) - epoch) < 0) {
        }
      __syncwarp();
    } else if (cut.blocks > 1) {
      mbarrier_wait(&barriers[(epoch - 1) % 2], (epoch - 1) / 2 % 2);
      __syncwarp();
    }
  }
};

}  // namespace seqkern::cuda
