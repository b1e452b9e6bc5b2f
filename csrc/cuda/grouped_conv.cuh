// Tiles of the grouped convolution, and how weights are laid out for tensor cores.
//
// A product of the tensor cores has 8 channels, a chunk: a group of 8, or two groups of 4 with
// zeros between them. A pixel's chunk is 16 bytes, a row of a matrix that a warp loads.
#pragma once

#include <cstring>

#include "grouped_conv.h"
#include "instructions.cuh"

namespace elsa::cuda::grouped {

constexpr int kKernel = 7, kRadius = kKernel / 2, kTaps = kKernel * kKernel;
// A block has kChunks chunks, one for each of the warps that share their positions, and a tile of
// kColumns columns; a warp has kWarpRows rows of it.
constexpr int kChunk = 8, kChunks = 4, kColumns = 16, kWarpRows = 8;
constexpr int kHaloColumns = kColumns + 2 * kRadius;
// Image rows that a warp's positions read, and the pairs of them.
constexpr int kPixelRows = kWarpRows + 2 * kRadius, kRowPairs = kPixelRows / 2;
static_assert(kPixelRows % 2 == 0);

// Taps go to the tensor cores in pairs: first those of two neighbouring columns, then those of the
// last column, of two neighbouring rows; the last pair has one tap.
constexpr int kRowTaps = kKernel / 2, kAcross = kKernel * kRowTaps,
              kPairs = kAcross + kKernel / 2 + 1;
__host__ __device__ constexpr int tap_of(int pair, int second) {
  if (pair < kAcross) return pair / kRowTaps * kKernel + pair % kRowTaps * 2 + second;
  return ((pair - kAcross) * 2 + second) * kKernel + kKernel - 1;  // kTaps and more: none
}

// A tile of pixels is kept chunk by chunk. Planes begin in different banks for two neighbouring
// pixels of four chunks, which eight lanes write at a time.
constexpr int plane_of(int pixels) { return (pixels + 2) * kChunk; }
template <int Rows>
constexpr int kHaloPixels = (Rows + 2 * kRadius) * kHaloColumns;
template <int Rows>
constexpr int kTilePlane = plane_of(kHaloPixels<Rows>);
static_assert(kTilePlane<8> / kChunk % 8 == 6 && kTilePlane<16> / kChunk % 8 == 6);

// Where a block is: its image, its first position there, and its first channel.
struct Place {
  int64_t image;
  int top, left, channel;
};

template <typename S>
__device__ bool inside(const GroupedConv<S>& a, int y, int x) {
  return static_cast<unsigned>(y) < static_cast<unsigned>(a.height) &&
         static_cast<unsigned>(x) < static_cast<unsigned>(a.width);
}
template <typename S>
__device__ int64_t pixel_at(const GroupedConv<S>& a, const Place& place, int y, int x) {
  return (place.image * a.height + y) * a.width + x;
}

template <int Rows>
int64_t tile_count(int64_t batch, int64_t height, int64_t width) {
  return batch * ((height + Rows - 1) / Rows) * ((width + kColumns - 1) / kColumns);
}
// How many blocks have all channels of a tile.
__host__ __device__ inline unsigned chunk_blocks(int64_t channels) {
  return static_cast<unsigned>((channels + kChunks * kChunk - 1) / (kChunks * kChunk));
}
template <int Rows, typename S>
__device__ Place place_of(const GroupedConv<S>& a, unsigned tile, unsigned chunks) {
  const unsigned columns = static_cast<unsigned>((a.width + kColumns - 1) / kColumns);
  const unsigned rows = static_cast<unsigned>((a.height + Rows - 1) / Rows);
  const unsigned row = tile / columns;
  return {
      row / rows, static_cast<int>(row % rows * Rows),
      static_cast<int>((tile - row * columns) * kColumns),
      static_cast<int>(chunks * kChunks * kChunk)};
}

template <typename S>
__device__ Pair pack(float x, float y) {
  S numbers[2];
  store(numbers, x);
  store(numbers + 1, y);
  Pair pair;
  memcpy(&pair, numbers, sizeof(pair));
  return pair;
}

// Products of two 16-bit numbers each, rounded as PyTorch rounds them.
template <typename S>
__device__ Pair product(Pair a, Pair b) {
  using Two = std::conditional_t<std::is_same_v<S, __half>, __half2, __nv_bfloat162>;
  Two x, y;
  memcpy(&x, &a, sizeof(a));
  memcpy(&y, &b, sizeof(b));
  x = __hmul2(x, y);
  memcpy(&a, &x, sizeof(a));
  return a;
}
template <typename S>
__device__ uint4 product(const uint4& a, const uint4& b) {
  return {product<S>(a.x, b.x), product<S>(a.y, b.y), product<S>(a.z, b.z), product<S>(a.w, b.w)};
}

template <typename S>
__device__ uint4 load_chunk(const Map<const S>& map, int64_t pixel, int channel) {
  return *reinterpret_cast<const uint4*>(map.data + pixel * map.stride + channel);
}

// Writes the block's channels of a tile with a border of kRadius pixels to shared memory: the
// product of two maps, or one map; zeros outside of the map. A thread reads AtOnce pixels at a
// time.
template <int Rows, int Threads, int AtOnce, typename S, typename... Maps>
__device__ void load_tile(
    S* tile, const GroupedConv<S>& a, const Place& place, const Maps&... maps) {
  constexpr int kStep = Threads / kChunks, kPixels = kHaloPixels<Rows>;
  const int chunk = threadIdx.x % kChunks, channel = place.channel + chunk * kChunk;
  const bool has_channel = channel < a.channels;
#pragma unroll
  for (int first = 0; first < kPixels; first += kStep * AtOnce) {
    uint4 numbers[AtOnce][sizeof...(maps)];
#pragma unroll
    for (int i = 0; i < AtOnce; ++i) {
      const int pixel = first + i * kStep + static_cast<int>(threadIdx.x) / kChunks;
      const int row = pixel / kHaloColumns;
      const int y = place.top + row - kRadius;
      const int x = place.left + pixel - row * kHaloColumns - kRadius;
      const bool read = has_channel && pixel < kPixels && inside(a, y, x);
      int map = 0;
      ((numbers[i][map++] =
            read ? load_chunk(maps, pixel_at(a, place, y, x), channel) : uint4{0, 0, 0, 0}),
       ...);
    }
#pragma unroll
    for (int i = 0; i < AtOnce; ++i) {
      const int pixel = first + i * kStep + static_cast<int>(threadIdx.x) / kChunks;
      uint4 chunk_of_pixel = numbers[i][0];
      if constexpr (sizeof...(maps) == 2) chunk_of_pixel = product<S>(numbers[i][0], numbers[i][1]);
      if (pixel < kPixels)
        *reinterpret_cast<uint4*>(tile + chunk * kTilePlane<Rows> + pixel * kChunk) =
            chunk_of_pixel;
    }
  }
}

}  // namespace elsa::cuda::grouped
