// The conversions of bfloat16 that the kernels use.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return torch::headeronly::BFloat16(x.bits, torch::headeronly::BFloat16::from_bits());
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {torch::headeronly::BFloat16(x).x}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) {
  return {__bfloat162float(pair.x), __bfloat162float(pair.y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {
      __float2bfloat16_rn(__bfloat162float(a.x) * __bfloat162float(b.x)),
      __float2bfloat16_rn(__bfloat162float(a.y) * __bfloat162float(b.y))};
}
