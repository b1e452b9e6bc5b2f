// Row kernels: the arithmetic of the operator for one head and one image row.
//
// They know neither tensors nor storage types: attention.cpp hands them rows of T (float or
// double), padded and contiguous. The same source is compiled once per instruction set
// (attention_rows_*.cpp) and the best one that the machine has is chosen at run time, so that a
// binary is portable.
#pragma once

#include <cstdint>

namespace elsa::cpu {

// A row buffer holds this many positions more than a multiple of itself, so that kernels work in
// whole tiles and whole vectors whatever the width; `depth` is a multiple of kLaneMultiple.
constexpr int64_t kTileMultiple = 16;
constexpr int64_t kLaneMultiple = 16;

struct RowShape {
  int64_t width;     // positions of the image row
  int64_t depth;     // channels of the head, rounded up to kLaneMultiple
  int64_t kernel;    // K
  int64_t dilation;  // distance of neighbouring taps along the row, at most its width

  int64_t taps() const { return kernel * kernel; }
  int64_t padded_taps() const { return round_up(taps(), kLaneMultiple); }
  int64_t span() const { return (kernel - 1) * dilation; }
  // Positions that every row buffer holds: the row in whole tiles, and a margin on either side.
  int64_t positions() const { return round_up(width, kTileMultiple) + 2 * span() + kTileMultiple; }

  static int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
  }
};

// Buffers named "padded" start span()/2 positions left of the image and are zero outside of it; a
// null row pointer is a row outside of the image.
template <typename T>
struct ForwardRow {
  const T* const* value;  // K pointers to padded rows (positions, depth)
  const T* logits;        // (width, taps), rows `logits_stride` apart
  int64_t logits_stride;
  const T* ghost_add;  // (taps, depth)
  const T* ghost_mul;  // (taps, depth), or null: 1 everywhere
  T* attention;        // scratch (kTileMultiple, padded_taps)
  T* out;              // (width, depth), rows `out_stride` apart
  int64_t out_stride;
};

template <typename T>
struct BackwardRow {
  const T* const* value;             // K pointers to padded rows (positions, depth)
  const T* const* value_transposed;  // K pointers to padded rows (depth, positions)
  const T* logits;
  int64_t logits_stride;
  const T* ghost_add;
  const T* ghost_mul;
  const T* grad;             // (span + positions, depth): `span` zero positions, then the row
  const T* grad_transposed;  // (depth, positions), not padded
  T* attention;              // scratch (span + positions, padded_taps), first `span` positions zero
  T* attention_tile;         // scratch (2, taps, kTileMultiple)
  T* grad_logits;            // out (width, taps), rows `grad_logits_stride` apart
  int64_t grad_logits_stride;
  T* const* grad_value;  // accumulated: K pointers to padded rows (positions, depth)
  T* grad_ghost_add;     // accumulated (taps, depth), or null
  T* grad_ghost_mul;     // accumulated (taps, depth), or null
};

template <typename T>
struct RowKernels {
  const char* name;
  void (*forward)(const RowShape&, const ForwardRow<T>&);
  void (*backward)(const RowShape&, const BackwardRow<T>&);
  // (rows, columns) to (columns, rows), with the distances between rows in numbers.
  void (*transpose)(
      const T* source, int64_t rows, int64_t columns, int64_t source_stride, T* out,
      int64_t out_stride);
};

namespace portable {
template <typename T>
RowKernels<T> row_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
template <typename T>
RowKernels<T> row_kernels();
}
namespace avx512 {
template <typename T>
RowKernels<T> row_kernels();
}
#endif

}  // namespace elsa::cpu
