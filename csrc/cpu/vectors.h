// What row kernels are written in: vectors of the compiler's extension, as wide as one instruction
// set has them. Included once per instruction set, after ELSA_ROWS_NAMESPACE, _VECTOR_BYTES and,
// but for the portable one, _TARGET are defined; the includer ends with ELSA_END_TARGET.
//
// No inline function or template of the standard library may be used here or by the includer: its
// code would be compiled for this instruction set and the linker might pick that copy for the
// whole program.
#include <cstdint>
#include <cstring>

#if defined(ELSA_ROWS_TARGET)
#define ELSA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ELSA_BEGIN_TARGET(isa) \
  ELSA_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define ELSA_END_TARGET _Pragma("clang attribute pop")
#else
#define ELSA_BEGIN_TARGET(isa) ELSA_PRAGMA(GCC target(isa))
#define ELSA_END_TARGET
#endif
ELSA_BEGIN_TARGET(ELSA_ROWS_TARGET)
#else
#define ELSA_END_TARGET
#endif

namespace elsa::cpu::ELSA_ROWS_NAMESPACE {
namespace {

#define ELSA_INLINE inline __attribute__((always_inline))

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(ELSA_ROWS_VECTOR_BYTES)));
  typedef float unaligned
      __attribute__((vector_size(ELSA_ROWS_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(ELSA_ROWS_VECTOR_BYTES)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(ELSA_ROWS_VECTOR_BYTES)));
  typedef double unaligned
      __attribute__((vector_size(ELSA_ROWS_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(ELSA_ROWS_VECTOR_BYTES)));
};

template <typename T>
using vec = typename Vector<T>::type;
template <typename T>
constexpr int kLanes = ELSA_ROWS_VECTOR_BYTES / sizeof(T);

template <typename T>
ELSA_INLINE vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(p);
}
template <typename T>
ELSA_INLINE void store(T* p, vec<T> v) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(p) = v;
}
template <typename T>
ELSA_INLINE vec<T> broadcast(T s) {
  return s - vec<T>{};  // not a sum: 0 + s is not s where s is -0, and so would be computed
}

// Lane i of the result is lane order[i] of a and b in a row.
template <typename T>
ELSA_INLINE vec<T> shuffle(vec<T> a, vec<T> b, typename Vector<T>::bits order) {
#if defined(__clang__)
  vec<T> out;
  for (int i = 0; i < kLanes<T>; ++i)
    out[i] = order[i] < kLanes<T> ? a[order[i]] : b[order[i] - kLanes<T>];
  return out;
#else
  return __builtin_shuffle(a, b, order);
#endif
}

// The lanes of v, each exchanged with the one `Distance` from it (a power of 2).
template <typename T, int Distance>
ELSA_INLINE vec<T> exchange(vec<T> v) {
  typename Vector<T>::bits order;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) order[i] = i ^ Distance;
  return shuffle<T>(v, v, order);
}

// The square of kLanes vectors, rows and columns exchanged.
template <typename T, int Distance = kLanes<T> / 2>
ELSA_INLINE void transpose(vec<T> (&x)[kLanes<T>]) {
  typename Vector<T>::bits upper, lower;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    upper[i] = i & Distance ? i - Distance + kLanes<T> : i;
    lower[i] = i & Distance ? i + kLanes<T> : i + Distance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & Distance) continue;
    const vec<T> a = x[i], b = x[i | Distance];
    x[i] = shuffle<T>(a, b, upper);
    x[i | Distance] = shuffle<T>(a, b, lower);
  }
  if constexpr (Distance > 1) transpose<T, Distance / 2>(x);
}

// Matrix (rows, columns) to (columns, rows), each with the distance of its rows in numbers.
template <typename T>
ELSA_INLINE void transpose_matrix(
    const T* source, int64_t rows, int64_t columns, int64_t source_stride, T* out,
    int64_t out_stride) {
  constexpr int L = kLanes<T>;
  const int64_t whole_rows = rows / L * L, whole_columns = columns / L * L;
  for (int64_t r = 0; r < whole_rows; r += L) {
    for (int64_t c = 0; c < whole_columns; c += L) {
      vec<T> tile[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) tile[i] = load(source + (r + i) * source_stride + c);
      transpose<T>(tile);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(out + (c + i) * out_stride + r, tile[i]);
    }
    for (int64_t c = whole_columns; c < columns; ++c)
      for (int i = 0; i < L; ++i) out[c * out_stride + r + i] = source[(r + i) * source_stride + c];
  }
  for (int64_t r = whole_rows; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = source[r * source_stride + c];
}

// Sum or maximum of all lanes, in every lane.
template <typename T, int Distance = kLanes<T> / 2>
ELSA_INLINE vec<T> lane_sum(vec<T> v) {
  v += exchange<T, Distance>(v);
  if constexpr (Distance > 1) return lane_sum<T, Distance / 2>(v);
  return v;
}
template <typename T, int Distance = kLanes<T> / 2>
ELSA_INLINE vec<T> lane_max(vec<T> v) {
  const vec<T> other = exchange<T, Distance>(v);
  v = other > v ? other : v;
  if constexpr (Distance > 1) return lane_max<T, Distance / 2>(v);
  return v;
}

// Asks for `n` numbers ahead of their use, where the machine cannot foresee it.
template <typename T>
ELSA_INLINE void prefetch(const T* p, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n + kLine; i += kLine) __builtin_prefetch(p + i);
}

}  // namespace
}  // namespace elsa::cpu::ELSA_ROWS_NAMESPACE
