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
constexpr int kPixelRows = kWarpRows + 2 * kRadius;  // that a warp's positions read

// Taps go to the tensor cores in pairs: first those of two neighbouring columns, then those of the
// last column, of two neighbouring rows. Its first one is alone: the pixel below, which is a tap of
// the same position, is multiplied by 0.
constexpr int kRowTaps = kKernel / 2, kAcross = kKernel * kRowTaps, kPairs = kAcross + kRadius + 1;
constexpr int kNoTap = kTaps;
__host__ __device__ constexpr int tap_of(int pair, int second) {
  if (pair < kAcross) return pair / kRowTaps * kKernel + pair % kRowTaps * 2 + second;
  const int row = 2 * (pair - kAcross) - 1 + second;
  return pair > kAcross ? row * kKernel + kKernel - 1 : second ? kNoTap : kKernel - 1;
}
// Which pair of the last column has the tap of this row as its first one; none: -1.
__host__ __device__ constexpr int last_pair(int row) {
  if (row == 0) return kAcross;
  return row > 0 && row < kKernel && row % 2 ? kAcross + (row + 1) / 2 : -1;
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

// The chunks of a map that a thread reads: one of kChunks, at pixels around the tile's first one.
// Offsets of pixels fit in 32 bits, as kMostPitch says.
template <typename S>
struct Chunks {
  const S* first;
  int pitch, stride;

  __device__ Chunks(
      const Map<const S>& map, const GroupedConv<S>& a, const Place& place, int channel)
      : first(map.data + pixel_at(a, place, place.top, place.left) * map.stride + channel),
        pitch(static_cast<int>(a.width * map.stride)),
        stride(static_cast<int>(map.stride)) {}
  __device__ const S* at(int row, int column) const {
    return first + (row * pitch + column * stride);
  }
  __device__ uint4 load(int row, int column) const {
    return *reinterpret_cast<const uint4*>(at(row, column));
  }
};

// Writes the block's channels of a tile with a border of kRadius pixels to shared memory: the
// product of two maps, or one map; zeros outside of the map. A thread reads AtOnce pixels at a
// time.
template <int Rows, int Threads, int AtOnce, int Unroll, typename S, typename... Maps>
__device__ void load_tile(
    S* tile, const GroupedConv<S>& a, const Place& place, const Maps&... maps) {
  constexpr int kStep = Threads / kChunks, kPixels = kHaloPixels<Rows>;
  const int chunk = threadIdx.x % kChunks, channel = place.channel + chunk * kChunk;
  const int own = static_cast<int>(threadIdx.x) / kChunks;
  const bool has_channel = channel < a.channels;
  const Chunks<S> from[] = {Chunks<S>(maps, a, place, channel)...};
  S* to = tile + chunk * kTilePlane<Rows> + own * kChunk;
#pragma unroll(Unroll)
  for (int first = 0; first < kPixels; first += kStep * AtOnce) {
    uint4 numbers[AtOnce][sizeof...(maps)];
#pragma unroll
    for (int i = 0; i < AtOnce; ++i) {
      const int begin = first + i * kStep, pixel = begin + own;
      const int row = pixel / kHaloColumns - kRadius;
      const int column = pixel % kHaloColumns - kRadius;
      const bool read = has_channel && (begin + kStep <= kPixels || pixel < kPixels) &&
                        inside(a, place.top + row, place.left + column);
#pragma unroll
      for (size_t map = 0; map < sizeof...(maps); ++map) {
        numbers[i][map] = {0, 0, 0, 0};
        if (read) numbers[i][map] = from[map].load(row, column);
      }
    }
#pragma unroll
    for (int i = 0; i < AtOnce; ++i) {
      const int begin = first + i * kStep;
      uint4 chunk_of_pixel = numbers[i][0];
      if constexpr (sizeof...(maps) == 2) chunk_of_pixel = product<S>(numbers[i][0], numbers[i][1]);
      if (begin + kStep <= kPixels || begin + own < kPixels)
        *reinterpret_cast<uint4*>(to + begin * kChunk) = chunk_of_pixel;
    }
  }
}

}  // namespace elsa::cuda::grouped
