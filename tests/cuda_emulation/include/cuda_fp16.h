// The conversions of half precision that the kernels use.
#pragma once

#include <torch/headeronly/util/Half.h>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  return torch::headeronly::Half(x.bits, torch::headeronly::Half::from_bits());
}
inline __half __float2half_rn(float x) { return {torch::headeronly::Half(x).x}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return {
      __float2half_rn(__half2float(a.x) * __half2float(b.x)),
      __float2half_rn(__half2float(a.y) * __half2float(b.y))};
}
