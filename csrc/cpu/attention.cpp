// elsa::attention and its backward on the CPU: from tensors to rows (attention_rows.h) and back.
//
// Work is cut into chunks of rows of one head. A chunk copies the value rows that it needs into
// padded buffers, a ring of the rows within reach, where borders, strides and storage types no
// longer matter.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "attention_rows.h"
#include "buffers.h"

namespace elsa::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::parallel_for;
using Ghost = std::optional<Tensor>;

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

Problem check(
    const Tensor& value, const Tensor& logits, const Ghost& ghost_add, const Ghost& ghost_mul,
    int64_t kernel_size, int64_t dilation, const Tensor* grad = nullptr) {
  const elsa::Problem p =
      check_problem(value, logits, ghost_add, ghost_mul, kernel_size, dilation, grad);
  const int64_t depth = RowShape::round_up(p.channels / p.heads, kLaneMultiple);
  // Taps beyond the map read zeros, however far away, so that its size bounds all buffers.
  const int64_t apart[] = {
      std::min(dilation, std::max<int64_t>(1, p.height)),
      std::min(dilation, std::max<int64_t>(1, p.width))};
  return {p, {p.width, depth, kernel_size, apart[1]}, apart[0]};
}

// A map's numbers, pixels `stride` apart.
template <typename S>
struct Map {
  explicit Map(const EvenMap& map)
      : data(static_cast<const S*>(map.tensor.const_data_ptr())), stride(map.stride) {}

  const S* data;
  int64_t stride;
};

template <typename S>
S* output(const Tensor& tensor) {
  return static_cast<S*>(tensor.mutable_data_ptr());
}

constexpr int64_t kGrain = 1 << 15;  // numbers that are worth a thread

// Ghost filters (C, K, K) as (G, K*K, depth) in the arithmetic type, padded with zeros; zeros where
// there are none.
template <typename S, typename T = Arithmetic<S>>
Buffer<T> pack_ghost(const Ghost& ghost, const Problem& p) {
  const int64_t taps = p.row.taps();
  Buffer<T> packed = buffer<T>({p.heads, taps, p.row.depth});
  if (!ghost) return packed;
  const Tensor filters = torch::stable::contiguous(*ghost);
  const S* source = static_cast<const S*>(filters.const_data_ptr());
  for (int64_t c = 0; c < p.channels; ++c) {
    T* out = packed.data() + c / p.depth() * taps * p.row.depth + c % p.depth();
    for (int64_t tap = 0; tap < taps; ++tap) out[tap * p.row.depth] = static_cast<T>(*source++);
  }
  return packed;
}

// The sum of `parts` packed filters as (C, K, K); in double, so that it is rounded once.
template <typename S, typename T = Arithmetic<S>>
Tensor sum_ghost(const Buffer<T>& packed, int64_t parts, const Problem& p) {
  Tensor ghost = empty(p, p.dtype, {p.channels, p.kernel, p.kernel});
  S* out = output<S>(ghost);
  const int64_t taps = p.row.taps(), depth = p.row.depth, size = p.heads * taps * depth;
  parallel_for(
      0, p.heads * taps, kGrain / std::max<int64_t>(1, parts * depth) + 1, [&](auto i, auto end) {
        std::vector<double> sum(depth);
        for (; i < end; ++i) {
          std::fill(sum.begin(), sum.end(), 0.0);
          for (int64_t part = 0; part < parts; ++part) {
            const T* numbers = packed.data() + part * size + i * depth;
            for (int64_t c = 0; c < depth; ++c) sum[c] += numbers[c];
          }
          S* target = out + i / taps * p.depth() * taps + i % taps;
          for (int64_t c = 0; c < p.depth(); ++c)
            target[c * taps] = static_cast<S>(static_cast<T>(sum[c]));
        }
      });
  return ghost;
}

// Rows [begin, end) of image b, head g.
struct Chunk {
  int64_t b, g, begin, end;
};

// The arrays of a call, whole. ghost_mul is empty where there is no such filter, a filter's parts
// also where nobody wants its gradient.
template <typename S>
struct Operands {
  using T = Arithmetic<S>;

  Map<S> value;
  const S* logits;
  Buffer<T> ghost_add, ghost_mul;
};
template <typename S>
struct Results {
  using T = Arithmetic<S>;

  T* grad_value;  // added to
  S* grad_logits;
  Buffer<T> add_parts, mul_parts;  // (parts, G, K*K, depth), added to
};

// The i-th filter of taps and channels; null where there are none.
template <typename Filters>
auto filter(Filters& filters, const Problem& p, int64_t i) {
  return filters.empty() ? nullptr : filters.data() + i * p.row.taps() * p.row.depth;
}

template <typename S>
Operands<S> operands(
    const Problem& p, const EvenMap& value, const Tensor& logits, const Ghost& ghost_add,
    const Ghost& ghost_mul) {
  Operands<S> call{
      Map<S>(value), static_cast<const S*>(logits.const_data_ptr()), pack_ghost<S>(ghost_add, p)};
  if (ghost_mul) call.ghost_mul = pack_ghost<S>(ghost_mul, p);
  return call;
}

template <typename S>
void forward_chunk(
    const Problem& p, const Chunk& chunk, ForwardWork<Arithmetic<S>>& work, const Operands<S>& call,
    S* out) {
  using T = Arithmetic<S>;
  const RowShape& row = p.row;
  const int64_t radius = row.span() / 2, reach = p.reach(), channel = chunk.g * p.depth(),
                taps = row.taps();
  int64_t next = std::max<int64_t>(0, chunk.begin - reach);
  for (int64_t y = chunk.begin; y < chunk.end; ++y) {
    for (; next <= std::min(y + reach, p.height - 1); ++next)
      copy_row(
          call.value.data + p.pixel(chunk.b, next) * call.value.stride + channel, call.value.stride,
          p.width, p.depth(), work.ring.slot(next) + radius * row.depth, row.depth);
    const S* source = call.logits + (p.pixel(chunk.b, y) * p.heads + chunk.g) * taps;
    const auto [row_logits, stride] = logits_row<T>(source, p, work.logits);
    S* row_out = out + p.pixel(chunk.b, y) * p.channels + channel;
    const auto run = [&, logits = row_logits, logits_stride = stride](T* result, int64_t stride) {
      row_kernels<T>().forward(
          row, {work.ring.around(y, p), logits, logits_stride, filter(call.ghost_add, p, chunk.g),
                filter(call.ghost_mul, p, chunk.g), work.attention.data(), result, stride});
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

// `index` counts chunks of rows: each has parts of its own.
template <typename S>
void backward_chunk(
    const Problem& p, const Chunk& chunk, int64_t index, BackwardWork<Arithmetic<S>>& work,
    const Map<S>& grad, const Operands<S>& call, Results<S>& results) {
  using T = Arithmetic<S>;
  const RowShape& row = p.row;
  const int64_t span = row.span(), radius = span / 2, reach = p.reach(),
                channel = chunk.g * p.depth(), taps = row.taps();
  const int64_t positions = row.positions();

  const auto flush = [&](int64_t y) {
    T* target = results.grad_value + p.pixel(chunk.b, y) * p.channels + channel;
    T* source = work.grad_value.slot(y);
    for (int64_t x = 0; x < p.width; ++x)
      for (int64_t c = 0; c < p.depth(); ++c)
        target[x * p.channels + c] += source[(x + radius) * row.depth + c];
    std::fill_n(source, positions * row.depth, T(0));
  };

  int64_t next = std::max<int64_t>(0, chunk.begin - reach), flushed = next;
  for (int64_t y = chunk.begin; y < chunk.end; ++y) {
    for (; flushed < y - reach; ++flushed) flush(flushed);
    for (; next <= std::min(y + reach, p.height - 1); ++next) {
      T* slot = work.value.slot(next) + radius * row.depth;
      copy_row(
          call.value.data + p.pixel(chunk.b, next) * call.value.stride + channel, call.value.stride,
          p.width, p.depth(), slot, row.depth);
      row_kernels<T>().transpose(
          slot, p.width, p.depth(), row.depth, work.value_transposed.slot(next) + radius,
          positions);
    }
    T* grad_begin = work.grad.data() + span * row.depth;
    copy_row(
        grad.data + p.pixel(chunk.b, y) * grad.stride + channel, grad.stride, p.width, p.depth(),
        grad_begin, row.depth);
    row_kernels<T>().transpose(
        grad_begin, p.width, p.depth(), row.depth, work.grad_transposed.data(), positions);
    const int64_t logits_offset = (p.pixel(chunk.b, y) * p.heads + chunk.g) * taps;
    const auto [row_logits, stride] = logits_row<T>(call.logits + logits_offset, p, work.logits);
    row_kernels<T>().backward(
        row, {work.value.around(y, p), work.value_transposed.around(y, p), row_logits, stride,
              filter(call.ghost_add, p, chunk.g), filter(call.ghost_mul, p, chunk.g),
              work.grad.data(), work.grad_transposed.data(), work.attention.data(),
              work.attention_tile.data(), work.grad_logits.data(), taps,
              work.grad_value.around(y, p), filter(results.add_parts, p, index * p.heads + chunk.g),
              filter(results.mul_parts, p, index * p.heads + chunk.g)});
    copy_row(
        work.grad_logits.data(), taps, p.width, taps, results.grad_logits + logits_offset,
        p.heads * taps);
  }
  for (; flushed <= std::min(chunk.end - 1 + reach, p.height - 1); ++flushed) flush(flushed);
}

constexpr int64_t kChunkRows = 16;

// Runs body(work, index, chunk) for every `step`-th chunk of rows, from `first`, of all images and
// heads.
template <typename Work, typename Body>
void for_chunks(const Problem& p, int64_t rows, int64_t first, int64_t step, const Body& body) {
  const int64_t chunks = (p.height + rows - 1) / rows, used = (chunks - first + step - 1) / step;
  std::mutex guard;
  std::string problem;  // what parallel_for would not tell of an exception
  parallel_for(0, p.batch * used * p.heads, 1, [&](int64_t begin, int64_t end) {
    try {
      Work work(p);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t g = i % p.heads, c = first + i / p.heads % used * step;
        const int64_t b = i / p.heads / used;
        body(work, b * chunks + c, Chunk{b, g, c * rows, std::min((c + 1) * rows, p.height)});
      }
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> lock(guard);
      problem = error.what();
    }
  });
  if (!problem.empty()) fail(problem);
}

Tensor attention(
    const Tensor& value, const Tensor& logits, const Ghost& ghost_add, const Ghost& ghost_mul,
    int64_t kernel_size, int64_t dilation) {
  const Problem p = check(value, logits, ghost_add, ghost_mul, kernel_size, dilation);
  Tensor out = empty(p, p.dtype, {p.batch, p.height, p.width, p.channels});
  if (p.is_empty()) return out;
  const EvenMap values = evenly_spaced(p, value);
  const Tensor all_logits = torch::stable::contiguous(logits);
  with_type<Half, BFloat16>(p, [&](auto number) {
    using S = decltype(number);
    using Work = ForwardWork<Arithmetic<S>>;
    const Operands<S> call = operands<S>(p, values, all_logits, ghost_add, ghost_mul);
    S* numbers = output<S>(out);
    for_chunks<Work>(p, kChunkRows, 0, 1, [&](Work& work, int64_t, const Chunk& chunk) {
      forward_chunk<S>(p, chunk, work, call, numbers);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& value, const Tensor& logits, const Ghost& ghost_add,
    const Ghost& ghost_mul, int64_t kernel_size, int64_t dilation, bool ghost_gradients) {
  const Problem p = check(value, logits, ghost_add, ghost_mul, kernel_size, dilation, &grad);
  const bool has_add = ghost_gradients && ghost_add, has_mul = ghost_gradients && ghost_mul;
  const auto like_value = [&](int32_t dtype) {
    return empty(p, dtype, {p.batch, p.height, p.width, p.channels});
  };
  Tensor grad_value = like_value(p.dtype);
  Tensor grad_logits = empty(p, p.dtype, {p.batch, p.height, p.width, p.heads * p.row.taps()});
  const auto zeros = [&](bool wanted) {
    Tensor filters =
        wanted ? empty(p, p.dtype, {p.channels, p.kernel, p.kernel}) : empty(p, p.dtype, {0});
    return torch::stable::zero_(filters);
  };
  Tensor grad_add = zeros(has_add), grad_mul = zeros(has_mul);
  if (p.is_empty()) return {grad_value, grad_logits, grad_add, grad_mul};
  const EvenMap grads = evenly_spaced(p, grad), values = evenly_spaced(p, value);
  const Tensor all_logits = torch::stable::contiguous(logits);
  with_type<Half, BFloat16>(p, [&](auto number) {
    using S = decltype(number);
    using T = Arithmetic<S>;
    using Work = BackwardWork<T>;
    // A chunk adds to rows within reach of it. Neighbours take turns, so that no two at work
    // touch the same row and the order of the sums, thus the result, does not depend on the
    // threads.
    const int64_t rows = std::max(kChunkRows, 2 * p.reach());
    const int64_t parts = p.batch * ((p.height + rows - 1) / rows);
    const auto filters = [&](bool wanted) {
      return buffer<T>({wanted ? parts : 0, p.heads, p.row.taps(), p.row.depth});
    };
    const Operands<S> call = operands<S>(p, values, all_logits, ghost_add, ghost_mul);
    const Map<S> upstream(grads);
    constexpr bool kSameType = std::is_same_v<T, S>;
    const Tensor sum = kSameType ? grad_value : like_value(dtype_of<T>());
    Results<S> results{output<T>(sum), output<S>(grad_logits), filters(has_add), filters(has_mul)};
    const int64_t numbers = p.pixels() * p.channels;
    parallel_for(0, numbers, kGrain, [&](int64_t begin, int64_t end) {
      std::fill(results.grad_value + begin, results.grad_value + end, T(0));
    });
    for (int64_t turn = 0; turn < 2; ++turn)
      for_chunks<Work>(p, rows, turn, 2, [&](Work& work, int64_t index, const Chunk& chunk) {
        backward_chunk<S>(p, chunk, index, work, upstream, call, results);
      });
    if constexpr (!kSameType)
      parallel_for(
          0, numbers, kGrain, [&, out = output<S>(grad_value)](int64_t begin, int64_t end) {
            std::transform(
                results.grad_value + begin, results.grad_value + end, out + begin,
                [](T x) { return static_cast<S>(x); });
          });
    if (has_add) grad_add = sum_ghost<S>(results.add_parts, parts, p);
    if (has_mul) grad_mul = sum_ghost<S>(results.mul_parts, parts, p);
  });
  return {grad_value, grad_logits, grad_add, grad_mul};
}

std::string cpu_capability() { return row_kernels<float>().name; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(elsa, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(elsa, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL(elsa, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace elsa::cpu
