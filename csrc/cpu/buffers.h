// The buffers of a thread: rows of one head, padded, in the arithmetic type.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "../problem.h"
#include "attention_rows.h"

namespace elsa::cpu {

// Memory of the row buffers: vectors as wide as a cache line never straddle two.
template <typename T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  T* allocate(size_t n) {
    void* memory = ::operator new(n * sizeof(T), kLine, std::nothrow);
    require(memory, "elsa_attention: no memory for a buffer of ", n, " numbers");
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kLine); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
template <typename T>
using Buffer = std::vector<T, Aligned<T>>;

// Zeros.
template <typename T>
Buffer<T> buffer(std::initializer_list<int64_t> sizes) {
  return Buffer<T>(product(sizes));
}

struct Problem : elsa::Problem {
  RowShape row;
  int64_t rows_apart;  // neighbouring taps along a column; like row.dilation at most the map's side

  // Rows that the taps of a row reach above and below it.
  int64_t reach() const { return kernel / 2 * rows_apart; }
  int64_t depth() const { return channels / heads; }
  int64_t pixel(int64_t b, int64_t y) const { return (b * height + y) * width; }
};

// Copies the head's part of a row between tensor and row buffer, converting where the types differ.
template <typename T, typename S>
void copy_row(
    const S* source, int64_t source_stride, int64_t width, int64_t depth, T* out,
    int64_t out_stride) {
  // A size that the compiler knows saves a call for each of the short runs, which are too far apart
  // for the machine to foresee them.
  constexpr int64_t kRun = kLaneMultiple, kAhead = 8;
  for (int64_t x = 0; x < width; ++x, source += source_stride, out += out_stride) {
    __builtin_prefetch(source + kAhead * source_stride);
    __builtin_prefetch(source + kAhead * source_stride + depth - 1);
    if constexpr (!std::is_same_v<T, S>)
      std::transform(source, source + depth, out, [](S v) { return static_cast<T>(v); });
    else if (depth % kRun == 0)
      for (int64_t c = 0; c < depth; c += kRun) std::memcpy(out + c, source + c, kRun * sizeof(T));
    else
      std::memcpy(out, source, depth * sizeof(T));
  }
}

// Logits of a row in the arithmetic type: the tensor's own memory where it has that type already.
template <typename T, typename S>
std::pair<const T*, int64_t> logits_row(const S* source, const Problem& p, Buffer<T>& buffer) {
  const int64_t taps = p.row.taps(), stride = p.heads * taps;
  if constexpr (std::is_same_v<T, S>) {
    return {source, stride};
  } else {
    copy_row(source, stride, p.width, taps, buffer.data(), taps);
    return {buffer.data(), taps};
  }
}

// The padded rows within reach of the current one, in slots that are re-used; their borders stay
// zero.
template <typename T>
class Ring {
 public:
  explicit Ring(const Problem& p)
      : slots_(std::min(2 * p.reach() + 1, p.height)),
        numbers_(product({p.row.positions(), p.row.depth})),
        data_(buffer<T>({slots_, numbers_})),
        rows_(p.kernel) {}

  T* slot(int64_t y) { return data_.data() + y % slots_ * numbers_; }

  // Pointers to the rows that the taps of row y read; null outside of the image.
  T* const* around(int64_t y, const Problem& p) {
    for (int64_t k = 0; k < p.kernel; ++k) {
      const int64_t source = y + k * p.rows_apart - p.reach();
      rows_[k] = source >= 0 && source < p.height ? slot(source) : nullptr;
    }
    return rows_.data();
  }

 private:
  int64_t slots_, numbers_;
  Buffer<T> data_;
  std::vector<T*> rows_;
};

// Buffers of one thread, used for all of its chunks. What lies outside of the image stays zero
// throughout.
template <typename T>
struct ForwardWork {
  explicit ForwardWork(const Problem& p)
      : ring(p),
        attention(buffer<T>({kTileMultiple, p.row.padded_taps()})),
        result(buffer<T>({p.width, p.row.depth})),
        logits(buffer<T>({p.width, p.row.taps()})) {}

  Ring<T> ring;
  Buffer<T> attention, result, logits;
};

template <typename T>
struct BackwardWork {
  explicit BackwardWork(const Problem& p)
      : value(p),
        value_transposed(p),
        grad_value(p),
        grad(buffer<T>({p.row.span() + p.row.positions(), p.row.depth})),
        grad_transposed(buffer<T>({p.row.positions(), p.row.depth})),
        attention(buffer<T>({p.row.span() + p.row.positions(), p.row.padded_taps()})),
        attention_tile(buffer<T>({2, p.row.taps(), kTileMultiple})),
        logits(buffer<T>({p.width, p.row.taps()})),
        grad_logits(buffer<T>({p.width, p.row.taps()})) {}

  Ring<T> value, value_transposed, grad_value;
  Buffer<T> grad, grad_transposed, attention, attention_tile, logits, grad_logits;
};

}  // namespace elsa::cpu
