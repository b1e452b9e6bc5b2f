// Tiles, bands and the sum over taps of the kernels on tensor cores.
//
// A product of the tensor cores is one of dense matrices, and neither attention nor filters are
// dense. But a row of 7 taps of 8 neighbouring positions reads 14 pixels, and 8 x 16 is the size of
// half a factor: a band of 7 diagonals, zero elsewhere. Of the two pairs of numbers that a lane
// holds in a row of that band, the left one (pixels 2 * column and 2 * column + 1) or the right one
// (8 pixels on) lies within the band, never both, so that a row of 7 taps of 8 positions is one
// register of a warp.
#pragma once

#include <cmath>
#include <cstring>

#include "attention_k7.cuh"

namespace elsa::cuda::k7 {

// A warp has kStrip columns and kWarpRows rows of the tile's positions, or kWarpChannels channels.
// Its positions read kPixelRows image rows.
constexpr int kWarpRows = 4, kWarpChannels = kDepth / kWarps;
constexpr int kPixelRows = kWarpRows + 2 * kRadius;
constexpr int kStrips = kColumns / kStrip;
static_assert(kWarps == kStrips * kRows / kWarpRows);

// In a tile of pixels 40 numbers are from pixel to pixel, so that 8 rows of a matrix, 16 bytes
// each, are in different banks; 16 pixels from each strip's first one are in it.
constexpr int kPixel = kDepth + 8;
constexpr int kTileColumns = kColumns + 8, kTilePixels = kHaloRows * kTileColumns;
constexpr int kTile = kTilePixels * kPixel;
constexpr int kGrads = kRows * kColumns * kPixel;

// The same pixels channel by channel: a plane of a channel, of kTilePixels numbers or, in float32,
// of the sums for the tile's positions, one strip after the other.
constexpr int kPlane = kTilePixels + 8, kStripSums = kRows * kStrip;
constexpr int kPlanes = kDepth * kPlane;
constexpr int kGradPlane = kRows * kColumns + 8, kGradPlanes = kDepth * kGradPlane;
static_assert(kPlane * 2 >= kStrips * kStripSums * 4);

// A row of taps takes 4 pairs. Those of an even column are in the order (0, 1) .. (6, none), those
// of an odd one (none, 0) .. (5, 6), so that a lane reads the pair that it holds in the band.
constexpr int kPairs = kTapRow / 2, kPositionPairs = kKernel * kPairs;
constexpr int kWeightPairs = kRows * kColumns * kPositionPairs;
constexpr int kFilterPairs = kDepth * kKernel * 2 * kPairs;
static_assert(kWeightPairs * 2 <= kPlanes);

template <typename S>
__device__ Pair pack(float x, float y) {
  S numbers[2];
  store(numbers, x);
  store(numbers + 1, y);
  Pair pair;
  memcpy(&pair, numbers, sizeof(pair));
  return pair;
}
template <typename S>
__device__ float2 unpack(Pair pair) {
  S numbers[2];
  memcpy(numbers, &pair, sizeof(pair));
  return {number(numbers[0]), number(numbers[1])};
}

// Where a thread is: in its warp's matrices, and in the block's tile.
struct Lane {
  int index = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int row = index / 4, column = index % 4;
  // The lane's row of the band is a position of this column of the tile.
  int strip = warp % kStrips * kStrip, top = warp / kStrips * kWarpRows;

  // The lane's position in a row of its warp, among those of the tile.
  __device__ int position(int warp_row) const { return (top + warp_row) * kColumns + strip + row; }
  // The channels of a warp's filters.
  __device__ int channel() const { return warp * kWarpChannels; }
  // Of a row of taps of the lane's position, its pair, and whether it is in the band's left half.
  __device__ int pair() const { return (column - row / 2) & 3; }
  __device__ bool left() const { return row / 2 <= column; }
};

// Where a tap is among the numbers of a position of the tile.
__device__ inline int half_slot(int tap, int column) { return slot(tap) + column % 2; }

template <typename T>
__device__ T quad_sum(T x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Of four lanes with four pairs each, lane i gets pair i of all.
__device__ inline void transpose_quad(Pair (&pairs)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      Pair &low = pairs[i], &high = pairs[i | step];
      const Pair other = __shfl_xor_sync(kAllLanes, upper ? low : high, step);
      (upper ? low : high) = other;
    }
  }
}

// Starts to copy the head's channels of Rows x Columns pixels from (top, left) into shared memory;
// zeros outside of the map and beyond the columns that taps read. A thread has a column.
template <int Rows, int Columns, typename S>
__device__ void copy_tile(
    S* tile, const Map<const S>& map, const Operands<S>& a, const Tile& t, int top, int left) {
  constexpr int kPack = 8, kPacks = kDepth / kPack, kAtOnce = kThreads / (Columns * kPacks);
  const int channel = threadIdx.x % kPacks * kPack, item = threadIdx.x / kPacks;
  const int column = item % Columns, first = item / Columns;
  if (first >= kAtOnce) return;
  const bool read = column < kHaloColumns && column_inside(a, left + column);
  const int64_t step = kAtOnce * a.width * map.stride;
  const S* from = map.data + pixel_at(a, t, top + first, left + column) * map.stride +
                  t.head * kDepth + channel;
  S* to = tile + (first * Columns + column) * kPixel + channel;
#pragma unroll
  for (int row = 0; row < Rows; row += kAtOnce) {
    copy_async(to + row * Columns * kPixel, from, read && row_inside(a, top + first + row));
    from += step;
  }
}

// The logits of the warp's positions, read one position after the other; for those outside of the
// map the ones of a position at its border. -infinity where there is no tap. A lane has a pair.
template <typename S>
__device__ void load_logits(Pair* pairs, const Operands<S>& a, const Tile& t, const Lane& lane) {
  if (lane.index >= kPositionPairs) return;
  const int ky = lane.index / kPairs, kx = lane.index % kPairs * 2;
  const bool last = kx == kKernel - 1, first = kx == 0;
  const int height = static_cast<int>(a.height), width = static_cast<int>(a.width);
  S none;
  store(&none, -INFINITY);
#pragma unroll 1
  for (int row = lane.top; row < lane.top + kWarpRows; ++row) {
    const S* of_row = a.logits.data +
                      pixel_at(a, t, clamped(t.top + row, height), 0) * a.logits.stride +
                      t.head * kTaps + ky * kKernel + kx;
    S numbers[kStrip][2];
#pragma unroll
    for (int column = 0; column < kStrip; ++column) {
      const S* tap = taps_at(a, of_row, clamped(t.left + lane.strip + column, width));
      const int odd = column % 2;
      numbers[column][0] = numbers[column][1] = none;
      if (!odd || !first) numbers[column][0] = tap[-odd];
      if (odd || !last) numbers[column][1] = tap[1 - odd];
    }
    Pair* out = pairs + (row * kColumns + lane.strip) * kPositionPairs + lane.index;
#pragma unroll
    for (int column = 0; column < kStrip; ++column)
      memcpy(out + column * kPositionPairs, numbers[column], sizeof(Pair));
  }
}

// Additive filters of the warp's channels, each row of taps for even and for odd columns; 0 where
// there is no tap.
template <bool Flip, typename S>
__device__ void load_filter(Pair* filter, const Operands<S>& a, const Tile& t, const Lane& lane) {
  constexpr int kRow = 2 * kTapRow, kChannel = kKernel * kRow;
  const S* from = a.ghost_add + (static_cast<int64_t>(t.head) * kDepth + lane.channel()) * kTaps;
  S* to = reinterpret_cast<S*>(filter) + lane.channel() * kChannel;
  S zero;
  store(&zero, 0.0f);
#pragma unroll
  for (int tap = lane.index; tap < kTaps; tap += kWarp) {
    const int at = Flip ? kTaps - 1 - tap : tap;
    S* even = to + at / kKernel * kRow + at % kKernel;
    S* odd = even + kTapRow + 1;
#pragma unroll
    for (int c = 0; c < kWarpChannels; ++c) {
      const S number = from[c * kTaps + tap];
      even[c * kChannel] = number;
      odd[c * kChannel] = number;
    }
  }
  for (int row = lane.index; row < kWarpChannels * kKernel; row += kWarp) {
    to[row * kRow + kTapRow - 1] = zero;
    to[row * kRow + kTapRow] = zero;
  }
}

// Attention of a position from its logits: the lane's numbers of each row of taps, 0 where a number
// is no tap.
template <typename S>
__device__ Softmax<float> softmax(
    float (&taps)[2 * kKernel], const Pair* logits, const Lane& lane) {
  float max = -INFINITY, sum = 0;
#pragma unroll
  for (int ky = 0; ky < kKernel; ++ky) {
    const float2 pair = unpack<S>(logits[ky * kPairs + lane.pair()]);
    taps[2 * ky] = pair.x;
    taps[2 * ky + 1] = pair.y;
    max = fmaxf(max, fmaxf(pair.x, pair.y));
  }
  max = quad_max(max);
#pragma unroll
  for (float& tap : taps) {
    tap = power(tap, max);
    sum += tap;
  }
  const float scale = 1 / quad_sum(sum);
#pragma unroll
  for (float& tap : taps) tap *= scale;
  return {max, scale};
}

// Attention of the warp's positions as a band: for each row of positions and each row of taps a
// pair.
using Band = Pair[kWarpRows][kKernel];

// The quarters of a factor whose upper half are 8 rows of one band and whose lower half of another.
__device__ inline void band_quarters(Pair (&quarters)[4], Pair upper, Pair lower, bool left) {
  quarters[0] = left ? upper : 0;
  quarters[1] = left ? lower : 0;
  quarters[2] = left ? 0 : upper;
  quarters[3] = left ? 0 : lower;
}

// Turns 8 channels of a tile of Pixels pixels into planes.
template <int Pixels, int Plane, typename S>
__device__ void transpose(S* planes, const S* tile, int channel, const Lane& lane) {
  constexpr int kMatrices = Pixels / 8;
  const S* from = tile + lane.index % 8 * kPixel + channel;
  S* to = planes + (channel + lane.row) * Plane + 2 * lane.column;
#pragma unroll
  for (int first = 0; first < kMatrices; first += 4) {
    const int own = first + lane.index / 8;
    Pair pairs[4];
    load_transposed(pairs, from + (own < kMatrices ? own : kMatrices - 1) * 8 * kPixel);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + i < kMatrices) *reinterpret_cast<Pair*>(to + (first + i) * 8) = pairs[i];
  }
}

// Planes of the sums over taps of filter[o, c] * tile[q + o, c], for 8 channels of the head and all
// positions q of the tile. A channel's plane of pixels makes room for its sums. In a product the
// rows of the first factor are image rows, of one strip and of the other, and their columns pixels;
// the second factor is the filter's band.
template <typename S>
__device__ void convolve(S* planes, const Pair* filter, int channel, const Lane& lane) {
  constexpr int kAtOnce = 2;
  const S* from = planes + lane.index % 8 * kTileColumns + (lane.index / 8 + 1) / 2 * 8;
  const Pair* band = filter + lane.row % 2 * kPairs + lane.pair();
  const bool left = lane.left();
#pragma unroll 1
  for (int end = channel + kWarpChannels; channel < end; channel += kAtOnce) {
    float sums[kAtOnce][4] = {};
#pragma unroll
    for (int ky = 0; ky < kKernel; ++ky) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        Pair pixels[4];
        load_matrices(pixels, from + (channel + i) * kPlane + ky * kTileColumns);
        const Pair taps = band[((channel + i) * kKernel + ky) * 2 * kPairs];
        multiply_add<S>(sums[i], pixels, left ? taps : 0, left ? 0 : taps);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float* plane = reinterpret_cast<float*>(planes + (channel + i) * kPlane);
      float2* to = reinterpret_cast<float2*>(plane + lane.row * kStrip + 2 * lane.column);
      to[0] = {sums[i][0], sums[i][1]};
      to[kStripSums / 2] = {sums[i][2], sums[i][3]};
    }
  }
}

// out[q, c] = sum over taps of (attention[q, o] + filter[o, c]) * tile[q + o, c], for all positions
// q of the tile and all channels c of the head. In a product of attention the rows of the first
// factor are the positions of two image rows, its columns the pixels of one, and the columns of the
// second factor are channels.
template <typename S>
__device__ void gather(
    const S* tile, S* planes, const Pair* filter, const Band& attention, const Operands<S>& a,
    const Tile& t, const Lane& lane, S* out) {
  float sums[kWarpRows / 2][kDepth / 8][4] = {};
  if (a.ghost_add) {
    const int channel = lane.channel();
    transpose<kTilePixels, kPlane>(planes, tile, channel, lane);
    __syncwarp();
    convolve(planes, filter, channel, lane);
    __syncthreads();
    const float* from = reinterpret_cast<const float*>(planes) + lane.strip * kRows +
                        lane.top * kStrip + lane.row + 2 * lane.column * (kPlane / 2);
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row)
#pragma unroll
      for (int n = 0; n < kDepth / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          sums[row / 2][n][row % 2 * 2 + i] = from[row * kStrip + (n * 8 + i) * (kPlane / 2)];
  }

  const bool left = lane.left();
  const S* from = tile + (lane.top * kTileColumns + lane.strip) * kPixel +
                  lane.index % 16 * kPixel + lane.index / 16 * 8;
#pragma unroll
  for (int row = 0; row < kPixelRows; ++row) {
    Pair pixels[2][4];
    load_transposed(pixels[0], from + row * kTileColumns * kPixel);
    load_transposed(pixels[1], from + row * kTileColumns * kPixel + kDepth / 2);
#pragma unroll
    for (int j = 0; j < kWarpRows / 2; ++j) {
      const int ky = row - 2 * j;  // of the upper positions; the lower ones' is one less
      if (ky < 0 || ky > kKernel) continue;
      const Pair upper = ky < kKernel ? attention[2 * j][ky % kKernel] : 0;
      const Pair lower = ky > 0 ? attention[2 * j + 1][(ky + kKernel - 1) % kKernel] : 0;
      Pair band[4];
      band_quarters(band, upper, lower, left);
#pragma unroll
      for (int n = 0; n < kDepth / 8; ++n)
        multiply_add<S>(sums[j][n], band, pixels[n / 2][n % 2 * 2], pixels[n / 2][n % 2 * 2 + 1]);
    }
  }

  const int x = t.left + lane.strip + lane.row;
#pragma unroll
  for (int row = 0; row < kWarpRows; ++row) {
    Pair pairs[4];
#pragma unroll
    for (int n = 0; n < kDepth / 8; ++n) {
      const float* pair = sums[row / 2][n] + row % 2 * 2;
      pairs[n] = pack<S>(pair[0], pair[1]);
    }
    transpose_quad(pairs);
    const int y = t.top + lane.top + row;
    if (inside(a, y, x))
      *reinterpret_cast<uint4*>(
          out + (pixel_at(a, t, y, x) * a.heads + t.head) * kDepth + lane.column * 8) = {
          pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

}  // namespace elsa::cuda::k7
