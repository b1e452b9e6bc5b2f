// Tiles of the kernels for K = 5 or 7 and 32 channels per head: what lies in shared memory, how it
// gets there, and the sum over taps that the forward pass and the gradient of the values share.
#pragma once

#include "device.cuh"
#include "instructions.cuh"

namespace elsa::cuda::tiles {

constexpr int kDepth = 32;

// A block computes kRows x kColumns positions of one head and has one thread for each of them. In
// the products over taps a thread has kStrip neighbours of a row instead.
constexpr int kRows = 8, kColumns = 16, kStrip = 8;
constexpr int kThreads = kRows * kColumns, kWarps = kThreads / kWarp;
template <int K>
constexpr int kHaloRows = kRows + K - 1;
template <int K>
constexpr int kHaloColumns = kColumns + K - 1;
template <int K>
constexpr int kWindow = kStrip + K - 1;

// Weights of a position: a row of taps takes 8 numbers, to be read in steps of 16 bytes. The
// distances of positions and rows are such that the threads of a quarter of a warp that read
// neighbours, of a row or of a column, meet in no memory bank.
constexpr int kTapRow = 8;
template <int K>
constexpr int kWeightPitch = K * kTapRow + 4;
template <int K>
constexpr int kWeightRow = kColumns * kWeightPitch<K> + 4;
template <int K>
constexpr int kWeights = kRows * kWeightRow<K>;
// Filters: 32 channels of a tap, likewise apart; the additive ones, then the multiplicative ones,
// for which there is code for K = 5 alone: no other models have them.
constexpr int kFilterPitch = kDepth + 4;
template <int K>
constexpr int kFilter = K * K * kFilterPitch;
template <int K>
constexpr bool kMultiplies = K == 5;

// Numbers from row to row of a tile of pixels: `padding` bytes more than the pixels take.
template <typename S>
constexpr int tile_pitch(int columns, int padding) {
  return columns * kDepth + padding / static_cast<int>(sizeof(S));
}
// The sum over taps reads half a warp's 16-bit numbers from two rows at once, the gradient of the
// logits reads all rows of a column at once.
template <int K, typename S>
constexpr int kGatherPitch = tile_pitch<S>(kHaloColumns<K>, 64);
template <int K, typename S>
constexpr int kValuePitch = tile_pitch<S>(kHaloColumns<K>, 16);
template <typename S>
constexpr int kGradPitch = tile_pitch<S>(kColumns, 16);

// Where a block is: image, the first position of its tile, and head.
struct Tile {
  int64_t image;
  int top, left, head;
};

template <typename S>
__host__ __device__ int64_t tile_count(const Operands<S>& a) {
  return a.batch * ((a.height + kRows - 1) / kRows) * ((a.width + kColumns - 1) / kColumns) *
         a.heads;
}

// A grid has fewer than 2^31 blocks, so that 32 bits do.
template <typename S>
__device__ Tile tile_at(const Operands<S>& a, unsigned tile, int head) {
  const auto rows = static_cast<unsigned>((a.height + kRows - 1) / kRows);
  const auto columns = static_cast<unsigned>((a.width + kColumns - 1) / kColumns);
  const unsigned strip = tile / columns, image = strip / rows;
  return {
      image, static_cast<int>(strip - image * rows) * kRows,
      static_cast<int>(tile - strip * columns) * kColumns, head};
}
// The tile with the next number, of the same head.
template <typename S>
__device__ void next_tile(Tile& t, const Operands<S>& a) {
  t.left += kColumns;
  if (t.left < a.width) return;
  t.left = 0;
  t.top += kRows;
  if (t.top < a.height) return;
  t.top = 0;
  ++t.image;
}
// Heads change fastest: neighbouring blocks read the same pixels' logits.
template <typename S>
__device__ Tile tile_of_block(const Operands<S>& a) {
  const auto heads = static_cast<unsigned>(a.heads);
  const unsigned tile = blockIdx.x / heads;
  return tile_at(a, tile, static_cast<int>(blockIdx.x - tile * heads));
}

template <typename S>
__device__ bool row_inside(const Operands<S>& a, int y) {
  return static_cast<unsigned>(y) < static_cast<unsigned>(a.height);
}
template <typename S>
__device__ bool column_inside(const Operands<S>& a, int x) {
  return static_cast<unsigned>(x) < static_cast<unsigned>(a.width);
}
template <typename S>
__device__ bool inside(const Operands<S>& a, int y, int x) {
  return row_inside(a, y) && column_inside(a, x);
}
template <typename S>
__device__ int64_t pixel_at(const Operands<S>& a, const Tile& t, int y, int x) {
  return (t.image * a.height + y) * a.width + x;
}

__device__ inline float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ inline float4 load4(const __half* from) {
  const __half2* pairs = reinterpret_cast<const __half2*>(from);
  const float2 low = __half22float2(pairs[0]), high = __half22float2(pairs[1]);
  return {low.x, low.y, high.x, high.y};
}
__device__ inline float4 load4(const __nv_bfloat16* from) {
  const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(from);
  const float2 low = __bfloat1622float2(pairs[0]), high = __bfloat1622float2(pairs[1]);
  return {low.x, low.y, high.x, high.y};
}
__device__ inline void store4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
__device__ inline void store4(__half* to, float4 x) {
  reinterpret_cast<__half2*>(to)[0] = __floats2half2_rn(x.x, x.y);
  reinterpret_cast<__half2*>(to)[1] = __floats2half2_rn(x.z, x.w);
}
__device__ inline void store4(__nv_bfloat16* to, float4 x) {
  reinterpret_cast<__nv_bfloat162*>(to)[0] = __floats2bfloat162_rn(x.x, x.y);
  reinterpret_cast<__nv_bfloat162*>(to)[1] = __floats2bfloat162_rn(x.z, x.w);
}

// Copies the head's channels of Rows x Columns pixels from (top, left) into shared memory, zeros
// where they are outside of the map. A warp copies row after row.
template <int Rows, int Columns, int Pitch, typename S>
__device__ void load_tile(
    S* tile, const Map<const S>& map, const Operands<S>& a, const Tile& t, int top, int left) {
  constexpr int kPack = 16 / sizeof(S), kPacks = kDepth / kPack, kAtOnce = kWarp / kPacks;
  const int lane = threadIdx.x % kWarp, channel = lane % kPacks * kPack, first = lane / kPacks;
  const int64_t step = kAtOnce * map.stride;
  for (int row = threadIdx.x / kWarp; row < Rows; row += kWarps) {
    const bool valid = row_inside(a, top + row);
    const S* from =
        map.data + pixel_at(a, t, top + row, left + first) * map.stride + t.head * kDepth + channel;
    S* to = tile + row * Pitch + first * kDepth + channel;
#pragma unroll
    for (int column = 0; column < Columns; column += kAtOnce, from += step) {
      if (column + kAtOnce > Columns && first >= Columns - column) break;
      uint4 pack = {0, 0, 0, 0};
      if (valid && column_inside(a, left + column + first))
        pack = *reinterpret_cast<const uint4*>(from);
      *reinterpret_cast<uint4*>(to + column * kDepth) = pack;
    }
  }
}

// Filters of the head as [tap][channel], the taps in reverse order if Flip; `none` where there are
// none.
template <int K, bool Flip, typename S>
__device__ void load_filter(float* filter, const S* ghost, float none, const Tile& t) {
  constexpr int kTaps = K * K;
  const int64_t first = static_cast<int64_t>(t.head) * kDepth * kTaps;
#pragma unroll 4
  for (int i = threadIdx.x; i < kDepth * kTaps; i += kThreads) {
    const int channel = i / kTaps, tap = i % kTaps;
    filter[(Flip ? kTaps - 1 - tap : tap) * kFilterPitch + channel] =
        ghost ? number(ghost[first + i]) : none;
  }
}
template <int K, bool Flip, typename S>
__device__ void load_filters(float* filters, const Operands<S>& a, const Tile& t) {
  load_filter<K, Flip>(filters, a.ghost_add, 0.0f, t);
  if constexpr (kMultiplies<K>) load_filter<K, Flip>(filters + kFilter<K>, a.ghost_mul, 1.0f, t);
}

template <int K>
__device__ int slot(int tap) {
  return tap / K * kTapRow + tap % K;
}
template <int K>
__device__ int weights_at(int row, int column) {
  return row * kWeightRow<K> + column * kWeightPitch<K>;
}

__device__ inline int clamped(int i, int size) { return max(0, min(i, size - 1)); }

// The taps of the head's logits at a pixel, given those at the first pixel of its row.
template <typename S>
__device__ const S* taps_at(const Operands<S>& a, const S* row, int x) {
  return row + static_cast<int64_t>(x) * static_cast<int>(a.logits.stride);
}

// Logits of the tile's positions; for those outside of the map the ones of a position at its
// border. A warp reads those of one position after the other.
template <int K, typename S>
__device__ void load_logits(float* weights, const Operands<S>& a, const Tile& t) {
  constexpr int kAtOnce = 8, kTaps = K * K;
  const int lane = threadIdx.x % kWarp, other = lane + kWarp;
  const int height = static_cast<int>(a.height), width = static_cast<int>(a.width);
#pragma unroll 1
  for (int i = threadIdx.x / kWarp * kAtOnce; i < kThreads; i += kWarps * kAtOnce) {
    const int row = i / kColumns, left = i % kColumns;
    const S* of_row = a.logits.data +
                      pixel_at(a, t, clamped(t.top + row, height), 0) * a.logits.stride +
                      t.head * kTaps;
    S numbers[kAtOnce][2];
#pragma unroll
    for (int column = 0; column < kAtOnce; ++column) {
      const S* taps = taps_at(a, of_row, clamped(t.left + left + column, width));
      if (lane < kTaps) numbers[column][0] = taps[lane];
      if (other < kTaps) numbers[column][1] = taps[other];
    }
    float* out = weights + weights_at<K>(row, left);
#pragma unroll
    for (int column = 0; column < kAtOnce; ++column, out += kWeightPitch<K>) {
      if (lane < kTaps) out[slot<K>(lane)] = number(numbers[column][0]);
      if (other < kTaps) out[slot<K>(other)] = number(numbers[column][1]);
    }
  }
}

// e^(x - max), as a power of 2: exact differences of large numbers come first.
__device__ inline float power(float x, float max) { return exponential2((x - max) * 1.44269504f); }

// The taps of one position, between shared memory and registers.
__device__ inline void read_row(float (&row)[kTapRow], const float* from) {
  const float4 low = load4(from), high = load4(from + 4);
  row[0] = low.x, row[1] = low.y, row[2] = low.z, row[3] = low.w;
  row[4] = high.x, row[5] = high.y, row[6] = high.z, row[7] = high.w;
}
template <int K>
__device__ void read_taps(float (&taps)[K * K], const float* from) {
#pragma unroll
  for (int ky = 0; ky < K; ++ky) {
    float row[kTapRow];
    read_row(row, from + ky * kTapRow);
#pragma unroll
    for (int kx = 0; kx < K; ++kx) taps[ky * K + kx] = row[kx];
  }
}
template <int K>
__device__ void write_row(float* to, const float* taps) {
  float row[kTapRow] = {};
#pragma unroll
  for (int kx = 0; kx < K; ++kx) row[kx] = taps[kx];
  store4(to, {row[0], row[1], row[2], row[3]});
  store4(to + 4, {row[4], row[5], row[6], row[7]});
}
template <int K>
__device__ void write_taps(float* to, const float (&taps)[K * K]) {
#pragma unroll
  for (int ky = 0; ky < K; ++ky) write_row<K>(to + ky * kTapRow, taps + ky * K);
}

// Turns the logits of one position into attention.
template <int kTaps>
__device__ Softmax<float> softmax(float (&taps)[kTaps]) {
  float max = taps[0];
#pragma unroll
  for (int o = 1; o < kTaps; ++o) max = fmaxf(max, taps[o]);
  float sum = 0;
#pragma unroll
  for (int o = 0; o < kTaps; ++o) {
    taps[o] = power(taps[o], max);
    sum += taps[o];
  }
  const float scale = 1 / sum;
#pragma unroll
  for (int o = 0; o < kTaps; ++o) taps[o] *= scale;
  return {max, scale};
}

// What a number of a tile counts in the sum over taps: the attention, weighted by the filters.
template <bool Multiplies>
__device__ float weighted(float attention, float mul, float add) {
  return Multiplies ? attention * mul + add : attention + add;
}

// out[q, c] = sum over taps of (weights[q, o] * mul[o, c] + add[o, c]) * tile[q + o, c], for all
// positions q of the tile and all channels c of the head. A thread has 4 channels of a strip of
// positions, so that a pixel that it reads serves up to K of them, and a weight 4 channels.
template <int K, typename S>
__device__ void gather(
    const S* tile, const float* weights, const float* filter, const Operands<S>& a, const Tile& t,
    S* out) {
  constexpr bool kMul = kMultiplies<K>;
  const int channel = threadIdx.x % 8 * 4, left = threadIdx.x / 16 % 2 * kStrip;
  const int row = threadIdx.x / kWarp * 2 + threadIdx.x / 8 % 2;
  float4 sum[kStrip] = {};
#pragma unroll 1
  for (int ky = 0; ky < K; ++ky) {
    const S* source = tile + (row + ky) * kGatherPitch<K, S> + left * kDepth + channel;
    float4 pixels[kWindow<K>], filters[K], factors[K];
#pragma unroll
    for (int i = 0; i < kWindow<K>; ++i) pixels[i] = load4(source + i * kDepth);
#pragma unroll
    for (int kx = 0; kx < K; ++kx) {
      const float* from = filter + (ky * K + kx) * kFilterPitch + channel;
      filters[kx] = load4(from);
      factors[kx] = kMul ? load4(from + kFilter<K>) : float4();
    }
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const float* from = weights + weights_at<K>(row, left + i) + ky * kTapRow;
      float taps[kTapRow];
      read_row(taps, from);
#pragma unroll
      for (int kx = 0; kx < K; ++kx) {
        const float4 &f = filters[kx], &m = factors[kx], &p = pixels[i + kx];
        sum[i].x += weighted<kMul>(taps[kx], m.x, f.x) * p.x;
        sum[i].y += weighted<kMul>(taps[kx], m.y, f.y) * p.y;
        sum[i].z += weighted<kMul>(taps[kx], m.z, f.z) * p.z;
        sum[i].w += weighted<kMul>(taps[kx], m.w, f.w) * p.w;
      }
    }
  }
  const int y = t.top + row;
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    const int x = t.left + left + i;
    if (inside(a, y, x))
      store4(out + (pixel_at(a, t, y, x) * a.heads + t.head) * kDepth + channel, sum[i]);
  }
}

}  // namespace elsa::cuda::tiles
