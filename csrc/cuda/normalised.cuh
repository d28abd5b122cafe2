// What the cells whose rows are normalised (layer_norm_lstm, layer_norm_gru) are to the kernels,
// and how the blocks of a persistent kernel learn a row's sums.
//
//   pre = gain_i norm(W_ih x) + gain_h norm(W_hh h) + biases   then the gates (cell.h);
//   an LSTM's h = o tanh(gain_c norm(c) + bias)
//   norm(v) = (v - mean) / sqrt(variance + eps), over all gates of a row
//
// The part of x waits for no step: normalised.cu makes it, and its gradients, for all rows at once.
#pragma once

#include "exchange.cuh"

namespace seqkern::cuda {

// kSaved: the gates' values of the reserve; the normalised W_ih x and W_hh h, of [kGates] each, lie
// before them. kRowPlanes, of dpre:
//   [G] W_ih x   [G] W_hh h   [G] its gain   [G] W_hh h's gain   [G] the pre-activations themselves
//   an LSTM: the gain of c, its bias   a GRU: W_hh h's n itself
template <class M>
struct NormalisedLstmCell {
  using V = typename M::V;
  using Gates = LayerNormLstmCell<M>;
  static constexpr int kGates = 4, kSlots = 4, kSaved = Gates::kSaved, kStates = 2;
  static constexpr int kOwn = 0, kRowPlanes = 5 * kGates + 2;
  static constexpr bool kNeedsH = false, kNeedsHPrev = false;
};
template <class M>
struct NormalisedGruCell {
  using V = typename M::V;
  using Gates = GruCell<M>;
  static constexpr int kGates = 3, kSlots = 3, kSaved = Gates::kSaved, kStates = 1;
  static constexpr int kOwn = 0, kRowPlanes = 5 * kGates + 1;
  static constexpr bool kNeedsH = false, kNeedsHPrev = true;
};

template <class Cell, class = void>
constexpr bool kNormalises = false;
template <class Cell>
constexpr bool kNormalises<Cell, std::void_t<decltype(Cell::kRowPlanes)>> = true;

template <class Cell>
struct ProductsOf<Cell, std::enable_if_t<kNormalises<Cell>>> {
  static constexpr int kFirst = Cell::kGates, kFirstSlot = 0;
  static constexpr int kMid = 0, kSecond = 1, kMidPlane = 0, kNumbers = 1;
  static constexpr int kPlanes = Cell::kRowPlanes;
};

// A unit's numbers in shared memory (cut.h): gain_h [G], bias_h [G]; an LSTM's gain_c, bias_c.
template <class Cell>
constexpr int kRowNumbers = 2 * (Cell::kGates + Cell::kStates - 1);

// From d, the gradient of a norm(v) that is x, to v's: over a row, of `count` numbers, d sums to
// `sum` and d x to `slope`.
template <class C>
__device__ __forceinline__ C through_norm(C d, C x, C sum, C slope, C count, C rstd) {
  return (d - sum / count - x * slope / count) * rstd;
}

// ---- moments ------------------------------------------------------------------------------------

// Of n numbers the mean and the sum of squares around it; two sets' together by Chan, Golub &
// LeVeque 1983. None are n = 0.
struct Moments {
  float n = 0, mean = 0, squares = 0;

  __device__ __forceinline__ void add(float n_, float mean_, float squares_) {
    const float apart = mean_ - mean, share = fast_divide(n_, fmaxf(n + n_, 1.0f));
    mean += apart * share;
    squares += squares_ + apart * apart * (n * share);
    n += n_;
  }

  // Of the 16 lanes that share a row; all of them get what the first one finds.
  __device__ __forceinline__ void over_units() {
#pragma unroll
    for (int distance = kTile / 2; distance > 0; distance /= 2) {
      const float n_ = __shfl_xor_sync(0xffffffffu, n, distance);
      const float mean_ = __shfl_xor_sync(0xffffffffu, mean, distance);
      const float squares_ = __shfl_xor_sync(0xffffffffu, squares, distance);
      add(n_, mean_, squares_);
    }
    const int first = int(threadIdx.x) % 32 / kTile * kTile;
    n = __shfl_sync(0xffffffffu, n, first);
    mean = __shfl_sync(0xffffffffu, mean, first);
    squares = __shfl_sync(0xffffffffu, squares, first);
  }

  __device__ __forceinline__ float rstd(float eps) const { return 1.0f / sqrtf(squares / n + eps); }
};

// Of a lane's kN numbers, of a unit that is there or not.
template <int kN>
__device__ __forceinline__ Moments moments_of(const float (&value)[kN], bool there) {
  Moments m;
  if (!there) return m;
  m.n = kN;
#pragma unroll
  for (int k = 0; k < kN; k++) m.mean += value[k];
  m.mean /= kN;
#pragma unroll
  for (int k = 0; k < kN; k++) m.squares += (value[k] - m.mean) * (value[k] - m.mean);
  return m;
}

// Sums over the 16 lanes that share a row, to all of them.
__device__ __forceinline__ void sum_over_units(float& a, float& b) {
#pragma unroll
  for (int distance = kTile / 2; distance > 0; distance /= 2) {
    a += __shfl_xor_sync(0xffffffffu, a, distance);
    b += __shfl_xor_sync(0xffffffffu, b, distance);
  }
}

// ---- the exchange of a row's sums ---------------------------------------------------------------

// Once a step, an LSTM's twice: two floats per row that each tile of units gives (mean and squares,
// or two sums), for every block of the group; as a Vector is exchanged (exchange.cuh), and double
// buffered for the same reason: a piece of epoch e + 1 is sent by a warp that has read what it
// wants of epoch e for that piece's rows. In a buffer: [rows / 2][tiles] of 16 bytes, a piece for a
// granule.
template <bool kGrid>
struct RowSums {
  const Cut& cut;
  const Place& place;
  const int buffer_bytes;
  uint32_t epoch = 0;
  unsigned char* buffers;
  uint64_t* barriers;
  uint32_t* flags;  // the group's

  __device__ RowSums(const Cut& cut, const Place& place, unsigned char* shared,
                     const SharedLayout& at)
      : cut(cut),
        place(place),
        buffer_bytes(row_sum_bytes(cut.batch, cut.leg[0].all_vector_tiles)),
        buffers(kGrid ? cut.row_sums + int64_t(place.group) * 2 * buffer_bytes
                      : shared + at.row_sums),
        barriers(reinterpret_cast<uint64_t*>(shared + at.barriers) + 4),
        flags(kGrid ? cut.row_flags + place.group * cut.blocks : nullptr) {
    if (!kGrid && cut.blocks > 1) {
      if (threadIdx.x == 0) {
        mbarrier_init(&barriers[0], 1);
        mbarrier_init(&barriers[1], 1);
        mbarrier_init_done();
      }
      __syncwarp();
      cluster_sync();
    }
  }

  __device__ int tiles() const { return cut.leg[0].all_vector_tiles; }

  // Sends one granule's, of tile t and rows n and its neighbour: the lanes of a row give the same
  // numbers. The whole warp.
  __device__ void send(int t, int n, float a, float b) const {
    const uint4 piece{__float_as_uint(__shfl_sync(0xffffffffu, a, 0)),
                      __float_as_uint(__shfl_sync(0xffffffffu, b, 0)),
                      __float_as_uint(__shfl_sync(0xffffffffu, a, kTile)),
                      __float_as_uint(__shfl_sync(0xffffffffu, b, kTile))};
    unsigned char* const to =
        buffers + (epoch % 2 * buffer_bytes + (n / 2 * tiles() + t) * int(sizeof(uint4)));
    if (kGrid || cut.blocks == 1) {
      if (place.lane == 0) *reinterpret_cast<uint4*>(to) = piece;
    } else if (place.lane < cut.blocks) {
      push(to, &barriers[epoch % 2], place.lane, piece);
    }
  }

  // After every granule has been sent: until those of all blocks are there. The whole block.
  __device__ void exchange() {
    epoch++;
    if (!kGrid && cut.blocks > 1) {
      uint64_t* const barrier = &barriers[(epoch - 1) % 2];
      if (threadIdx.x == 0) mbarrier_expect(barrier, uint32_t(buffer_bytes));
      mbarrier_wait(barrier, (epoch - 1) / 2 % 2);
      __syncwarp();
      return;
    }
    __syncthreads();
    if constexpr (kGrid) {
      if (threadIdx.x == kThreads - 32) release(&flags[place.member], epoch);
      for (int i = place.lane; i < cut.blocks; i += 32)
        while (int32_t(acquire(&flags[i]) - epoch) < 0) {
        }
      __syncwarp();
    }
  }

  // Row n's numbers, from every sixteenth tile on this lane's: use(tile, a, b).
  template <class Use>
  __device__ void take(int n, const Use& use) const {
    const unsigned char* const row =
        buffers + ((epoch - 1) % 2 * buffer_bytes + n / 2 * tiles() * int(sizeof(uint4)));
    for (int t = place.lane % kTile; t < tiles(); t += kTile) {
      const unsigned char* const at = row + t * int(sizeof(uint4));
      uint4 piece;
      if constexpr (kGrid)
        piece = load_from_l2(at);
      else
        piece = *reinterpret_cast<const uint4*>(at);
      use(t, __uint_as_float(n % 2 == 0 ? piece.x : piece.z),
          __uint_as_float(n % 2 == 0 ? piece.y : piece.w));
    }
  }

  // Of row n, of which each unit, of H, has given kN numbers. The whole warp, as the next one.
  template <int kN>
  __device__ Moments moments(int n, int H) const {
    Moments m;
    take(n, [&](int t, float mean, float squares) {
      const int units = H - t * kTile < kTile ? H - t * kTile : kTile;
      m.add(float(kN * units), mean, squares);
    });
    m.over_units();
    return m;
  }
  __device__ void sums(int n, float& a, float& b) const {
    a = b = 0;
    take(n, [&](int, float a_, float b_) { a += a_, b += b_; });
    sum_over_units(a, b);
  }
};

}  // namespace seqkern::cuda
