// The kernels for K = 7 and 32 channels per head, in 16-bit types, on tensor cores.
//
// A product of the tensor cores is one of dense matrices, and neither attention nor filters are
// dense. But a row of 7 taps of 8 neighbouring positions reads 14 pixels, and 8 x 16 is the size of
// half a factor: a band of 7 diagonals, zero elsewhere. Of the two pairs of numbers that a lane
// holds in a row of that band, the left one (pixels 2 * column and 2 * column + 1) or the right one
// (8 pixels on) lies within the band, never both, so that a row of 7 taps of 8 positions is one
// register of a warp.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_k7.cuh"

namespace elsa::cuda {
namespace k7 {
namespace {

// A warp has kStrip columns and kWarpRows rows of the tile's positions, or kWarpChannels channels.
constexpr int kWarpRows = 4, kWarpChannels = kDepth / kWarps;
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

// Parts of a block's shared memory, in bytes; each a multiple of 16.
constexpr int64_t kGatherBytes = (kTile + kPlanes) * 2 + kFilterPairs * 4;
constexpr int64_t kLogitsBytes = (kTile + kGrads) * 2 + kWeightPairs * 4;
constexpr int64_t kGhostBytes = (kTile + kGrads + kPlanes + kGradPlanes) * 2;

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
  constexpr int kPixelRows = kWarpRows + 2 * kRadius;
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

template <typename S>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(Forward<S> call) {
  S* tile = block_memory<S>();
  S* planes = tile + kTile;  // before, logits
  Pair* filter = reinterpret_cast<Pair*>(planes + kPlanes);
  const Operands<S>& a = call.operands;
  const Tile t = tile_of_block(a);
  const Lane lane;
  copy_tile<kHaloRows, kTileColumns>(tile, a.value, a, t, t.top - kRadius, t.left - kRadius);
  Pair* logits = reinterpret_cast<Pair*>(planes);
  load_logits(logits, a, t, lane);
  if (a.ghost_add) load_filter<false>(filter, a, t, lane);
  __syncwarp();
  Band attention;
#pragma unroll
  for (int row = 0; row < kWarpRows; ++row) {
    const int position = (lane.top + row) * kColumns + lane.strip + lane.row;
    float taps[2 * kKernel];
    softmax<S>(taps, logits + position * kPositionPairs, lane);
#pragma unroll
    for (int ky = 0; ky < kKernel; ++ky)
      attention[row][ky] = pack<S>(taps[2 * ky], taps[2 * ky + 1]);
  }
  wait_for_copies();
  __syncthreads();
  gather(tile, planes, filter, attention, a, t, lane, call.out);
}

// Gradient of the logits, and the softmax for the kernel that follows. In a product the rows of the
// first factor are the positions of two image rows, and the columns of the second the pixels of
// one; what lies outside of the band is left.
template <typename S>
__global__ void __launch_bounds__(kThreads, 3) logits_kernel(Backward<S> call) {
  constexpr int kPixelRows = kWarpRows + 2 * kRadius;
  S* tile = block_memory<S>();
  S* grads = tile + kTile;
  Pair* logits = reinterpret_cast<Pair*>(grads + kGrads);  // and their gradients
  const Operands<S>& a = call.operands;
  const Tile t = tile_of_block(a);
  const Lane lane;
  copy_tile<kHaloRows, kTileColumns>(tile, a.value, a, t, t.top - kRadius, t.left - kRadius);
  copy_tile<kRows, kColumns>(grads, call.grad, a, t, t.top, t.left);
  load_logits(logits, a, t, lane);
  wait_for_copies();
  __syncthreads();

  Pair grad[kWarpRows / 2][2][4];  // of two rows of positions, in two halves of the channels
  const S* grad_row = grads + ((lane.top + lane.index / 8 % 2) * kColumns + lane.strip) * kPixel +
                      lane.index % 8 * kPixel + lane.index / 16 * 8;
#pragma unroll
  for (int j = 0; j < kWarpRows / 2; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      load_matrices(grad[j][half], grad_row + j * 2 * kColumns * kPixel + half * kDepth / 2);

  float products[kWarpRows][2 * kKernel];
  const bool left = lane.left();
  const S* from = tile + (lane.top * kTileColumns + lane.strip) * kPixel + lane.index % 8 * kPixel +
                  lane.index / 8 * 8;
#pragma unroll
  for (int row = 0; row < kPixelRows; ++row) {
    Pair pixels[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      load_matrices(pixels[half], from + (row * kTileColumns + half * 8) * kPixel);
#pragma unroll
    for (int j = 0; j < kWarpRows / 2; ++j) {
      const int ky = row - 2 * j;  // of the upper positions; the lower ones' is one less
      if (ky < 0 || ky > kKernel) continue;
      float sums[2][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_add<S>(sums[half], grad[j][0], pixels[half][0], pixels[half][1]);
        multiply_add<S>(sums[half], grad[j][1], pixels[half][2], pixels[half][3]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (ky < kKernel) products[2 * j][2 * ky + i] = left ? sums[0][i] : sums[1][i];
        if (ky > 0) products[2 * j + 1][2 * ky - 2 + i] = left ? sums[0][2 + i] : sums[1][2 + i];
      }
    }
  }

  const int x = t.left + lane.strip + lane.row;
#pragma unroll
  for (int row = 0; row < kWarpRows; ++row) {
    const int position = (lane.top + row) * kColumns + lane.strip + lane.row;
    Pair* own = logits + position * kPositionPairs;
    float attention[2 * kKernel], dot = 0;
    const Softmax<float> normaliser = softmax<S>(attention, own, lane);
    const int y = t.top + lane.top + row;
    if (lane.column == 0 && inside(a, y, x))
      call.softmax[pixel_at(a, t, y, x) * a.heads + t.head] = normaliser;
#pragma unroll
    for (int i = 0; i < 2 * kKernel; ++i) dot += attention[i] * products[row][i];
    dot = quad_sum(dot);
#pragma unroll
    for (int i = 0; i < 2 * kKernel; ++i) attention[i] *= products[row][i] - dot;
#pragma unroll
    for (int ky = 0; ky < kKernel; ++ky)
      own[ky * kPairs + lane.pair()] = pack<S>(attention[2 * ky], attention[2 * ky + 1]);
  }
  __syncwarp();

  const int tap = lane.index, other = tap + kWarp, left_x = t.left + lane.strip;
  const int step = static_cast<int>(a.heads) * kTaps;
#pragma unroll 1
  for (int row = lane.top; row < lane.top + kWarpRows; ++row) {
    const int y = t.top + row;
    if (!row_inside(a, y)) break;
    S* to = call.grad_logits + (pixel_at(a, t, y, left_x) * a.heads + t.head) * kTaps + tap;
    const S* own = reinterpret_cast<S*>(logits + (row * kColumns + lane.strip) * kPositionPairs);
#pragma unroll
    for (int column = 0; column < kStrip; ++column) {
      const bool valid = column_inside(a, left_x + column);
      const S* numbers = own + column * 2 * kPositionPairs;
      if (valid) to[column * step] = numbers[half_slot(tap, column)];
      if (valid && other < kTaps) to[column * step + kWarp] = numbers[half_slot(other, column)];
    }
  }
}

// The band of a sum over taps in reverse order, which is the gradient of the values: attention with
// which pixels read the warp's positions.
template <typename S>
__device__ void read_readers(
    Band& band, const Softmax<float>* normalisers, const Operands<S>& a, const Tile& t,
    const Lane& lane) {
  constexpr int kPixelRows = kWarpRows + 2 * kRadius;
  // The lane's numbers are for two neighbouring pixels, whichever row of the image.
  const int height = static_cast<int>(a.height), width = static_cast<int>(a.width);
  int columns[2], taps[2];
  Pair valid = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int pixel = 2 * lane.column + (lane.left() ? 0 : 8) + i;
    const int x = t.left + lane.strip + pixel - kRadius, tap = pixel - lane.row;
    columns[i] = clamped(x, width);
    taps[i] = kKernel - 1 - clamped(tap, kKernel);
    if (tap == clamped(tap, kKernel) && column_inside(a, x)) valid |= 0xffffu << 16 * i;
  }
#pragma unroll
  for (int pixel_row = 0; pixel_row < kPixelRows; ++pixel_row) {
    const int y = t.top + lane.top + pixel_row - kRadius;
    const int64_t of_row = pixel_at(a, t, clamped(y, height), 0);
    const Pair mask = row_inside(a, y) ? valid : 0;
    Softmax<float> normaliser[2];
    const S* logits[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t pixel = of_row + columns[i];
      normaliser[i] = normalisers[pixel * a.heads + t.head];
      logits[i] = a.logits.data + pixel * a.logits.stride + t.head * kTaps + taps[i];
    }
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row) {
      const int ky = pixel_row - row;
      if (ky < 0 || ky >= kKernel) continue;
      float attention[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float logit = number(logits[i][(kKernel - 1 - ky) * kKernel]);
        attention[i] = power(logit, normaliser[i].max) * normaliser[i].scale;
      }
      band[row][ky] = pack<S>(attention[0], attention[1]) & mask;
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 4) value_kernel(Backward<S> call) {
  S* tile = block_memory<S>();
  S* planes = tile + kTile;
  Pair* filter = reinterpret_cast<Pair*>(planes + kPlanes);
  const Operands<S>& a = call.operands;
  const Tile t = tile_of_block(a);
  const Lane lane;
  copy_tile<kHaloRows, kTileColumns>(tile, call.grad, a, t, t.top - kRadius, t.left - kRadius);
  if (a.ghost_add) load_filter<true>(filter, a, t, lane);
  Band attention;
  read_readers(attention, call.softmax, a, t, lane);
  wait_for_copies();
  __syncthreads();
  gather(tile, planes, filter, attention, a, t, lane, call.grad_value);
}

// Gradient of the additive filters, summed over a part of the tiles. In a product the first factor
// has the pixels of a channel, columns of the image as rows, the second the gradients of a strip of
// positions; both are summed over the tile's rows and strips. Of the pixels that a position thus
// meets, those in the band are its taps.
template <typename S>
__global__ void __launch_bounds__(kThreads, 3) ghost_kernel(Backward<S> call, int64_t tiles) {
  S* tile = block_memory<S>();
  S* grads = tile + kTile;
  S* planes = grads + kGrads;
  S* grad_planes = planes + kPlanes;
  const Operands<S>& a = call.operands;
  const Lane lane;
  const int channel = lane.channel(), head = blockIdx.x;
  const S* from =
      planes + channel * kPlane + lane.index % 8 * kTileColumns + (lane.index / 8 + 1) / 2 * 8;
  const S* grad = grad_planes + channel * kGradPlane + lane.index % 8 * kColumns +
                  lane.index / 8 % 2 * 8 + lane.index / 16 * kGradPlane;
  // A lane's positions are the columns 2 * lane.column and the next one of a strip.
  const int first = lane.row - 2 * lane.column, second = first - 1;
  float sums[kWarpChannels][kKernel][2] = {};
  const int64_t end = tiles * (blockIdx.y + 1) / gridDim.y;
  const auto copy = [&](int64_t i) {
    const Tile t = tile_at(a, static_cast<unsigned>(i), head);
    copy_tile<kHaloRows, kTileColumns>(tile, a.value, a, t, t.top - kRadius, t.left - kRadius);
    copy_tile<kRows, kColumns>(grads, call.grad, a, t, t.top, t.left);
  };
  int64_t i = tiles * blockIdx.y / gridDim.y;
  if (i < end) copy(i);
  while (i < end) {
    wait_for_copies();
    __syncthreads();
    transpose<kTilePixels, kPlane>(planes, tile, channel, lane);
    transpose<kRows * kColumns, kGradPlane>(grad_planes, grads, channel, lane);
    __syncthreads();
    if (++i < end) copy(i);
#pragma unroll
    for (int two = 0; two < kWarpChannels; two += 2) {
      Pair positions[4];
      load_transposed(positions, grad + two * kGradPlane);
#pragma unroll
      for (int c = two; c < two + 2; ++c) {
#pragma unroll
        for (int ky = 0; ky < kKernel; ++ky) {
          Pair pixels[4];
          load_transposed(pixels, from + c * kPlane + ky * kTileColumns);
          float products[4] = {};
          multiply_add<S>(products, pixels, positions[c % 2 * 2], positions[c % 2 * 2 + 1]);
          sums[c][ky][0] += first >= 0 ? products[0] : products[2];
          sums[c][ky][1] += second >= 0 ? products[1] : products[3];
        }
      }
    }
  }

  // Each tap of a channel is in 8 numbers of the warp, one for each column of a strip.
  float* parts = reinterpret_cast<float*>(planes + channel * kPlane);  // [column][tap]
#pragma unroll
  for (int c = 0; c < kWarpChannels; ++c) {
    __syncwarp();
#pragma unroll
    for (int ky = 0; ky < kKernel; ++ky) {
      float* out = parts + 2 * lane.column * kKernel * kTapRow + ky * kTapRow;
      out[first & 7] = sums[c][ky][0];
      out[kKernel * kTapRow + (second & 7)] = sums[c][ky][1];
    }
    __syncwarp();
    for (int o = lane.index; o < kTaps; o += kWarp) {
      float total = 0;
      for (int column = 0; column < kStrip; ++column)
        total += parts[column * kKernel * kTapRow + slot(o)];
      call.add_parts[((blockIdx.y * kTaps + o) * a.heads + head) * kDepth + channel + c] = total;
    }
  }
}

}  // namespace
}  // namespace k7

int64_t shared_bytes_k7_matrix() {
  return std::max({k7::kGatherBytes, k7::kLogitsBytes, k7::kGhostBytes});
}

template <typename S>
bool has_k7_matrix() {
  cudaFuncAttributes attributes;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, k7::forward_kernel<S>));
  return attributes.ptxVersion >= 80;
}

template <typename S>
void forward_k7_matrix(const Forward<S>& call, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(k7::tile_count(call.operands)));
  launch(k7::forward_kernel<S>, blocks, k7::kThreads, k7::kGatherBytes, stream, call);
}

template <typename S>
void backward_k7_matrix(const Backward<S>& call, cudaStream_t stream) {
  const Operands<S>& a = call.operands;
  const int64_t tiles = k7::tile_count(a);
  const dim3 blocks(static_cast<unsigned>(tiles));
  launch(k7::logits_kernel<S>, blocks, k7::kThreads, k7::kLogitsBytes, stream, call);
  launch(k7::value_kernel<S>, blocks, k7::kThreads, k7::kGatherBytes, stream, call);
  if (!a.ghost_add) return;
  launch(
      k7::ghost_kernel<S>, dim3(static_cast<unsigned>(a.heads), static_cast<unsigned>(call.parts)),
      k7::kThreads, k7::kGhostBytes, stream, call, tiles / a.heads);
  launch_sum_parts(call, stream);
}

#define ELSA_INSTANTIATE(S)                                         \
  template bool has_k7_matrix<S>();                                 \
  template void forward_k7_matrix(const Forward<S>&, cudaStream_t); \
  template void backward_k7_matrix(const Backward<S>&, cudaStream_t);
ELSA_INSTANTIATE(__half)
ELSA_INSTANTIATE(__nv_bfloat16)
#undef ELSA_INSTANTIATE

}  // namespace elsa::cuda
