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

#include "attention_tiles.cuh"

namespace elsa::cuda::tiles {

constexpr int kKernel = 7, kRadius = 3, kTaps = 49;

// A warp has kStrip columns and kWarpRows rows of the tile's positions, or kWarpChannels channels.
// Its positions read kPixelRows image rows.
constexpr int kWarpRows = 4, kWarpChannels = kDepth / kWarps;
constexpr int kPixelRows = kWarpRows + 2 * kRadius;
constexpr int kStrips = kColumns / kStrip;
static_assert(kWarps == kStrips * kRows / kWarpRows);

// A chunk is what a row of a matrix takes: 8 numbers, 16 bytes, an eighth of all banks.
constexpr int kChunk = 8;
// Pixels of a tile, in which are 16 from each strip's first one, and of the positions alone.
constexpr int kTileColumns = kColumns + 8, kTilePixels = kHaloRows<kKernel> * kTileColumns;
constexpr int kGradPixels = kRows * kColumns;

// Where a chunk of a pixel's channels is. Chunks change places from pixel to pixel, so that those
// of 8 neighbouring pixels are in different banks; 8 pixels on, the places are the same.
template <int Depth>
__device__ int chunk_at(int pixel, int chunk) {
  constexpr int kChunks = Depth / kChunk;
  return pixel * Depth + (chunk ^ pixel / (8 / kChunks) % kChunks) * kChunk;
}
static_assert(kTileColumns % 8 == 0 && kColumns % 8 == 0);

// The same pixels channel by channel: a plane of a channel, of kTilePixels numbers or, in float32,
// of the sums for the tile's positions, one strip after the other.
constexpr int kPlane = kTilePixels, kStripSums = kRows * kStrip;
constexpr int kGradPlane = kGradPixels + kChunk;
// Planes are 8 banks apart, so that of 8 of them the last four have neighbouring chunks exchanged,
// and their sums begin 8 numbers later.
static_assert(kPlane / 2 % 32 == 8);
__device__ inline int exchanged(int channel) { return channel / 4 % 2; }
static_assert(kPlane * 2 >= (kStrips * kStripSums + 8) * 4);

// A row of taps takes 4 pairs. Those of an even column are in the order (0, 1) .. (6, none), those
// of an odd one (none, 0) .. (5, 6), so that a lane reads the pair that it holds in the band.
constexpr int kPairs = kTapRow / 2, kPositionPairs = kKernel * kPairs;
constexpr int kWeightPairs = kRows * kColumns * kPositionPairs;
constexpr int kFilterPairs = kDepth * kKernel * 2 * kPairs;
static_assert(kWeightPairs * 2 <= kDepth * kPlane);

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
__device__ inline int half_slot(int tap, int column) { return slot<kKernel>(tap) + column % 2; }

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

// Starts to copy Depth channels of Rows x Columns pixels from (top, left) into shared memory; zeros
// outside of the map and beyond the columns that taps read. A thread has a chunk of a column.
template <int Depth, int Rows, int Columns, typename S>
__device__ void copy_tile(
    S* tile, const Map<const S>& map, const Operands<S>& a, const Tile& t, int channel, int top,
    int left) {
  constexpr int kChunks = Depth / kChunk, kAtOnce = kThreads / (Columns * kChunks);
  const int chunk = threadIdx.x % kChunks, item = threadIdx.x / kChunks;
  const int column = item % Columns, first = item / Columns;
  if (first >= kAtOnce) return;
  const bool read = column < kHaloColumns<kKernel> && column_inside(a, left + column);
  const int64_t step = kAtOnce * a.width * map.stride;
  const S* from =
      map.data + pixel_at(a, t, top + first, left + column) * map.stride + channel + chunk * kChunk;
  S* to = tile + chunk_at<Depth>(first * Columns + column, chunk);
#pragma unroll
  for (int row = 0; row < Rows; row += kAtOnce) {
    copy_async(to + row * Columns * Depth, from, read && row_inside(a, top + first + row));
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

// Turns 8 channels of a tile into planes. Of each 4 * Parts matrices of 8 pixels a warp has the
// part's 4; place(i) is where matrix i is in its plane. Loads of kAtOnce matrices are under way at
// a time.
template <int Depth, int Pixels, int Plane, int Parts, typename S, typename Place>
__device__ void transpose(
    S* planes, const S* tile, int channel, int part, const Lane& lane, const Place& place) {
  constexpr int kMatrices = Pixels / 8, kStep = 4 * Parts, kAtOnce = 4 * kStep;
  const int own = part * 4 + lane.index / 8;
  const S* from = tile + chunk_at<Depth>(lane.index % 8, channel / kChunk) + own * 8 * Depth;
  S* to = planes + (channel + lane.row) * Plane + 2 * lane.column + part * 4 * kChunk;
#pragma unroll
  for (int begin = 0; begin < kMatrices; begin += kAtOnce) {
    Pair pairs[kAtOnce / kStep][4];
#pragma unroll
    for (int first = begin; first < begin + kAtOnce && first < kMatrices; first += kStep) {
      // The last step may have fewer; lanes without a matrix load one again.
      const int back = first + kStep > kMatrices ? max(0, first + own - kMatrices + 1) : 0;
      load_transposed(pairs[(first - begin) / kStep], from + (first - back) * 8 * Depth);
    }
#pragma unroll
    for (int first = begin; first < begin + kAtOnce && first < kMatrices; first += kStep)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first + kStep <= kMatrices || first + part * 4 + i < kMatrices)
          *reinterpret_cast<Pair*>(to + place(first + i)) = pairs[(first - begin) / kStep][i];
  }
}
template <int Depth, int Parts, typename S>
__device__ void transpose_pixels(
    S* planes, const S* tile, int channel, int part, const Lane& lane) {
  const int exchange = exchanged(lane.row) * kChunk;
  transpose<Depth, kTilePixels, kPlane, Parts>(planes, tile, channel, part, lane, [&](int i) {
    return i * kChunk + (i % 2 ? -exchange : exchange);
  });
}

// The lane's row of the matrices of a first factor, at the first row of a channel's plane: columns
// 0 to 7 of image rows, 8 to 15 twice, and 16 to 23. `exchange` is what exchanged chunks add in
// even rows of taps and subtract in odd ones.
struct PlaneRow {
  int offset, exchange;

  __device__ explicit PlaneRow(const Lane& lane) {
    const int chunk = lane.index % 8 * (kTileColumns / kChunk) + (lane.index / 8 + 1) / 2;
    offset = chunk * kChunk;
    exchange = chunk % 2 ? -kChunk : kChunk;
  }
};

// Planes of the sums over taps of filter[o, c] * tile[q + o, c], for 8 channels of the head and all
// positions q of the tile. A channel's plane of pixels makes room for its sums. In a product the
// rows of the first factor are image rows, of one strip and of the other, and their columns pixels;
// the second factor is the filter's band.
template <typename S>
__device__ void convolve(S* planes, const Pair* filter, int channel, const Lane& lane) {
  constexpr int kAtOnce = 2;
  const PlaneRow plane_row(lane);
  const Pair* band = filter + lane.row % 2 * kPairs + lane.pair();
  const bool left = lane.left();
#pragma unroll 1
  for (int end = channel + kWarpChannels; channel < end; channel += kAtOnce) {
    const int exchange = exchanged(channel) ? plane_row.exchange : 0;
    const S* even = planes + channel * kPlane + plane_row.offset + exchange;
    const S* odd = planes + channel * kPlane + plane_row.offset - exchange;
    float sums[kAtOnce][4] = {};
#pragma unroll
    for (int ky = 0; ky < kKernel; ++ky) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        Pair pixels[4];
        load_matrices(pixels, (ky % 2 ? odd : even) + i * kPlane + ky * kTileColumns);
        const Pair taps = band[((channel + i) * kKernel + ky) * 2 * kPairs];
        multiply_add<S>(sums[i], pixels, left ? taps : 0, left ? 0 : taps);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float* plane = reinterpret_cast<float*>(planes + (channel + i) * kPlane);
      float2* to = reinterpret_cast<float2*>(
          plane + exchanged(channel) * 8 + lane.row * kStrip + 2 * lane.column);
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
    transpose_pixels<kDepth, 1>(planes, tile, channel, 0, lane);
    __syncwarp();
    convolve(planes, filter, channel, lane);
    __syncthreads();
    const float* from = reinterpret_cast<const float*>(planes) + lane.strip * kRows +
                        lane.top * kStrip + lane.row + 2 * lane.column * (kPlane / 2) +
                        exchanged(2 * lane.column) * 8;
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row)
#pragma unroll
      for (int n = 0; n < kDepth / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          sums[row / 2][n][row % 2 * 2 + i] = from[row * kStrip + (n * 8 + i) * (kPlane / 2)];
  }

  const bool left = lane.left();
  const S* halves[2];  // of the channels
#pragma unroll
  for (int half = 0; half < 2; ++half)
    halves[half] = tile + chunk_at<kDepth>(
                              lane.top * kTileColumns + lane.strip + lane.index % 16,
                              2 * half + lane.index / 16);
#pragma unroll
  for (int row = 0; row < kPixelRows; ++row) {
    Pair pixels[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      load_transposed(pixels[half], halves[half] + row * kTileColumns * kDepth);
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

}  // namespace elsa::cuda::tiles
