// elsa::attention and its backward on the CPU: from tensors to rows (attention_rows.h) and back.
//
// Work is cut into chunks of rows of one head. A chunk copies the value rows that it needs into
// padded buffers, a ring of span + 1 rows, where borders, strides and storage types no longer
// matter.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../problem.h"
#include "attention_rows.h"

namespace elsa::cpu {
namespace {

using at::Tensor;

// The best row kernels that the machine has, or fewer: like PyTorch's own, they heed
// ATEN_CPU_CAPABILITY (default, avx2 or avx512).
template <typename T>
const RowKernels<T>& row_kernels() {
  static const RowKernels<T> kernels = [] {
#if defined(__x86_64__)
    const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view limit = wanted ? wanted : "avx512";
    if (limit != "default" && limit != "avx2" && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
      return avx512::row_kernels<T>();
    if (limit != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return avx2::row_kernels<T>();
#endif
    return portable::row_kernels<T>();
  }();
  return kernels;
}

// Memory of the row buffers: vectors as wide as a cache line never straddle two.
template <typename T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kLine); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
template <typename T>
using Buffer = std::vector<T, Aligned<T>>;

struct Problem : elsa::Problem {
  RowShape row;

  int64_t depth() const { return channels / heads; }
  int64_t pixel(int64_t b, int64_t y) const { return (b * height + y) * width; }
};

Problem check(
    const Tensor& value, const Tensor& logits, const std::optional<Tensor>& ghost_add,
    const std::optional<Tensor>& ghost_mul, int64_t kernel_size, int64_t dilation,
    const Tensor& grad = {}) {
  const elsa::Problem p =
      check_problem(value, logits, ghost_add, ghost_mul, kernel_size, dilation, grad);
  const int64_t depth = RowShape::round_up(p.channels / p.heads, kLaneMultiple);
  return {p, {p.width, depth, kernel_size, dilation}};
}

// Ghost filters (C, K, K) as (G, K*K, depth) in the arithmetic type, padded with zeros.
template <typename T>
Tensor pack_ghost(const std::optional<Tensor>& ghost, const Problem& p, const Tensor& like) {
  Tensor packed = at::zeros(
      {p.heads, p.row.taps(), p.row.depth},
      like.options().dtype(c10::CppTypeToScalarType<T>::value));
  if (ghost)
    packed.narrow(2, 0, p.depth())
        .copy_(ghost->reshape({p.heads, p.depth(), p.row.taps()}).transpose(1, 2));
  return packed;
}

Tensor unpack_ghost(const Tensor& packed, const Problem& p, const Tensor& like) {
  return packed.narrow(2, 0, p.depth())
      .transpose(1, 2)
      .reshape({p.channels, p.kernel, p.kernel})
      .to(like.scalar_type())
      .contiguous();
}

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

// The last `span + 1` padded rows around the current one. Slots are re-used, their borders stay
// zero.
template <typename T>
class Ring {
 public:
  Ring(const RowShape& row, int64_t numbers_a_row)
      : slots_(row.span() + 1),
        numbers_(numbers_a_row),
        data_(slots_ * numbers_a_row),
        rows_(row.kernel) {}

  T* slot(int64_t y) { return data_.data() + (y + slots_) % slots_ * numbers_; }

  // Pointers to the rows that the taps of row y read; null outside of the image.
  T* const* around(int64_t y, int64_t height, const RowShape& row) {
    for (int64_t k = 0; k < row.kernel; ++k) {
      const int64_t source = y + k * row.dilation - row.span() / 2;
      rows_[k] = source >= 0 && source < height ? slot(source) : nullptr;
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
      : ring(p.row, p.row.positions() * p.row.depth),
        attention(p.row.positions() * p.row.padded_taps()),
        result(p.row.positions() * p.row.depth),
        logits(p.width * p.row.taps()) {}

  Ring<T> ring;
  Buffer<T> attention, result, logits;
};

template <typename T>
struct BackwardWork {
  explicit BackwardWork(const Problem& p)
      : value(p.row, p.row.positions() * p.row.depth),
        value_transposed(p.row, p.row.positions() * p.row.depth),
        grad_value(p.row, p.row.positions() * p.row.depth),
        grad((p.row.span() + p.row.positions()) * p.row.depth),
        grad_transposed(p.row.positions() * p.row.depth),
        attention((p.row.span() + p.row.positions()) * p.row.padded_taps()),
        attention_tile(2 * p.row.taps() * kTileMultiple),
        logits(p.width * p.row.taps()),
        grad_logits(p.width * p.row.taps()) {}

  Ring<T> value, value_transposed, grad_value;
  Buffer<T> grad, grad_transposed, attention, attention_tile, logits, grad_logits;
};

// Rows [begin, end) of image b, head g.
struct Chunk {
  int64_t b, g, begin, end;
};

template <typename S>
void forward_chunk(
    const Problem& p, const Chunk& chunk, ForwardWork<at::opmath_type<S>>& work,
    const Tensor& value, const Tensor& logits, const Tensor& ghost_add, const Tensor& ghost_mul,
    Tensor& out) {
  using T = at::opmath_type<S>;
  const RowShape& row = p.row;
  const int64_t radius = row.span() / 2, channel = chunk.g * p.depth(), taps = row.taps();
  const S* values = value.const_data_ptr<S>() + channel;
  S* outs = out.mutable_data_ptr<S>() + channel;
  int64_t next = std::max<int64_t>(0, chunk.begin - radius);
  for (int64_t y = chunk.begin; y < chunk.end; ++y) {
    for (; next <= std::min(y + radius, p.height - 1); ++next)
      copy_row(
          values + p.pixel(chunk.b, next) * value.stride(2), value.stride(2), p.width, p.depth(),
          work.ring.slot(next) + radius * row.depth, row.depth);
    const S* source = logits.const_data_ptr<S>() + (p.pixel(chunk.b, y) * p.heads + chunk.g) * taps;
    const auto [row_logits, stride] = logits_row<T>(source, p, work.logits);
    S* row_out = outs + p.pixel(chunk.b, y) * p.channels;
    const auto run = [&](T* result, int64_t result_stride) {
      row_kernels<T>().forward(
          row, {work.ring.around(y, p.height, row), row_logits, stride,
                ghost_add.const_data_ptr<T>() + chunk.g * taps * row.depth,
                ghost_mul.defined() ? ghost_mul.const_data_ptr<T>() + chunk.g * taps * row.depth
                                    : nullptr,
                work.attention.data(), result, result_stride});
    };
    if constexpr (std::is_same_v<T, S>) {
      if (p.depth() == row.depth) {
        run(row_out, p.channels);
        continue;
      }
    }
    run(work.result.data(), row.depth);
    copy_row(work.result.data(), row.depth, p.width, p.depth(), row_out, p.channels);
  }
}

// grad_value (arithmetic type) is added to; grad_ghost_* are this chunk's own (taps, depth), or
// null.
template <typename S>
void backward_chunk(
    const Problem& p, const Chunk& chunk, BackwardWork<at::opmath_type<S>>& work,
    const Tensor& grad, const Tensor& value, const Tensor& logits, const Tensor& ghost_add,
    const Tensor& ghost_mul, Tensor& grad_value, Tensor& grad_logits,
    at::opmath_type<S>* grad_ghost_add, at::opmath_type<S>* grad_ghost_mul) {
  using T = at::opmath_type<S>;
  const RowShape& row = p.row;
  const int64_t span = row.span(), radius = span / 2, channel = chunk.g * p.depth(),
                taps = row.taps();
  const int64_t positions = row.positions();

  const auto flush = [&](int64_t y) {
    T* target = grad_value.mutable_data_ptr<T>() + p.pixel(chunk.b, y) * p.channels + channel;
    T* source = work.grad_value.slot(y);
    for (int64_t x = 0; x < p.width; ++x)
      for (int64_t c = 0; c < p.depth(); ++c)
        target[x * p.channels + c] += source[(x + radius) * row.depth + c];
    std::fill_n(source, positions * row.depth, T(0));
  };

  int64_t next = std::max<int64_t>(0, chunk.begin - radius), flushed = next;
  for (int64_t y = chunk.begin; y < chunk.end; ++y) {
    for (; flushed < y - radius; ++flushed) flush(flushed);
    for (; next <= std::min(y + radius, p.height - 1); ++next) {
      T* slot = work.value.slot(next) + radius * row.depth;
      copy_row(
          value.const_data_ptr<S>() + p.pixel(chunk.b, next) * value.stride(2) + channel,
          value.stride(2), p.width, p.depth(), slot, row.depth);
      row_kernels<T>().transpose(
          slot, p.width, p.depth(), row.depth, work.value_transposed.slot(next) + radius,
          positions);
    }
    T* grad_begin = work.grad.data() + span * row.depth;
    copy_row(
        grad.const_data_ptr<S>() + p.pixel(chunk.b, y) * grad.stride(2) + channel, grad.stride(2),
        p.width, p.depth(), grad_begin, row.depth);
    row_kernels<T>().transpose(
        grad_begin, p.width, p.depth(), row.depth, work.grad_transposed.data(), positions);
    const int64_t logits_offset = (p.pixel(chunk.b, y) * p.heads + chunk.g) * taps;
    const auto [row_logits, stride] =
        logits_row<T>(logits.const_data_ptr<S>() + logits_offset, p, work.logits);
    row_kernels<T>().backward(
        row,
        {work.value.around(y, p.height, row), work.value_transposed.around(y, p.height, row),
         row_logits, stride, ghost_add.const_data_ptr<T>() + chunk.g * taps * row.depth,
         ghost_mul.defined() ? ghost_mul.const_data_ptr<T>() + chunk.g * taps * row.depth : nullptr,
         work.grad.data(), work.grad_transposed.data(), work.attention.data(),
         work.attention_tile.data(), work.grad_logits.data(), taps,
         work.grad_value.around(y, p.height, row), grad_ghost_add, grad_ghost_mul});
    copy_row(
        work.grad_logits.data(), taps, p.width, taps,
        grad_logits.mutable_data_ptr<S>() + logits_offset, p.heads * taps);
  }
  for (; flushed <= std::min(chunk.end - 1 + radius, p.height - 1); ++flushed) flush(flushed);
}

constexpr int64_t kChunkRows = 16;

// Runs body(work, index, chunk) for every `step`-th chunk of rows, from `first`, of all images and
// heads.
template <typename Work, typename Body>
void for_chunks(const Problem& p, int64_t rows, int64_t first, int64_t step, const Body& body) {
  const int64_t chunks = (p.height + rows - 1) / rows, used = (chunks - first + step - 1) / step;
  at::parallel_for(0, p.batch * used * p.heads, 1, [&](int64_t begin, int64_t end) {
    Work work(p);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i % p.heads, c = first + i / p.heads % used * step, b = i / p.heads / used;
      body(work, b * chunks + c, Chunk{b, g, c * rows, std::min((c + 1) * rows, p.height)});
    }
  });
}

Tensor attention(
    const Tensor& value, const Tensor& logits, const std::optional<Tensor>& ghost_add,
    const std::optional<Tensor>& ghost_mul, int64_t kernel_size, int64_t dilation) {
  const Problem p = check(value, logits, ghost_add, ghost_mul, kernel_size, dilation);
  const Tensor values = evenly_spaced(value), all_logits = logits.contiguous();
  Tensor out = at::empty(value.sizes(), value.options());
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "elsa::attention", [&] {
        using T = at::opmath_type<scalar_t>;
        const Tensor add = pack_ghost<T>(ghost_add, p, value);
        const Tensor mul = ghost_mul ? pack_ghost<T>(ghost_mul, p, value) : Tensor();
        for_chunks<ForwardWork<T>>(
            p, kChunkRows, 0, 1, [&](ForwardWork<T>& work, int64_t, const Chunk& chunk) {
              forward_chunk<scalar_t>(p, chunk, work, values, all_logits, add, mul, out);
            });
      });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& value, const Tensor& logits,
    const std::optional<Tensor>& ghost_add, const std::optional<Tensor>& ghost_mul,
    int64_t kernel_size, int64_t dilation) {
  const Problem p = check(value, logits, ghost_add, ghost_mul, kernel_size, dilation, grad);
  const Tensor grads = evenly_spaced(grad), values = evenly_spaced(value),
               all_logits = logits.contiguous();
  Tensor grad_value, grad_logits = at::empty(logits.sizes(), logits.options()), grad_add, grad_mul;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "elsa::attention_backward", [&] {
        using T = at::opmath_type<scalar_t>;
        const auto options = value.options().dtype(c10::CppTypeToScalarType<T>::value);
        // A chunk adds to `span` rows around it. Neighbours take turns, so that no two at work
        // touch the same row and the order of the sums, thus the result, does not depend on the
        // threads.
        const int64_t rows = std::max(kChunkRows, p.row.span());
        const int64_t chunks = (p.height + rows - 1) / rows;
        const Tensor add = pack_ghost<T>(ghost_add, p, value);
        const Tensor mul = ghost_mul ? pack_ghost<T>(ghost_mul, p, value) : Tensor();
        const std::vector<int64_t> parts = {p.batch * chunks, p.heads, p.row.taps(), p.row.depth};
        Tensor add_parts = ghost_add ? at::zeros(parts, options) : Tensor();
        Tensor mul_parts = ghost_mul ? at::zeros(parts, options) : Tensor();
        Tensor sum = at::zeros(values.sizes(), options);
        const int64_t part = p.row.taps() * p.row.depth;
        for (int64_t turn = 0; turn < 2; ++turn)
          for_chunks<BackwardWork<T>>(
              p, rows, turn, 2, [&](BackwardWork<T>& work, int64_t index, const Chunk& chunk) {
                const int64_t offset = (index * p.heads + chunk.g) * part;
                backward_chunk<scalar_t>(
                    p, chunk, work, grads, values, all_logits, add, mul, sum, grad_logits,
                    ghost_add ? add_parts.mutable_data_ptr<T>() + offset : nullptr,
                    ghost_mul ? mul_parts.mutable_data_ptr<T>() + offset : nullptr);
              });
        grad_value = sum.to(value.scalar_type());
        if (ghost_add) grad_add = unpack_ghost(add_parts.sum(0), p, value);
        if (ghost_mul) grad_mul = unpack_ghost(mul_parts.sum(0), p, value);
      });
  const Tensor none = at::zeros({0}, value.options());
  return {
      grad_value, grad_logits, ghost_add ? grad_add : none, ghost_mul ? grad_mul : none.clone()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(elsa, m) {
  m.def("cpu_capability() -> str", [] { return std::string(row_kernels<float>().name); });
}

TORCH_LIBRARY_IMPL(elsa, CPU, m) {
  m.impl("attention", &attention);
  m.impl("attention_backward", &attention_backward);
}

}  // namespace elsa::cpu
