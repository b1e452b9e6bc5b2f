// What the kernels of elsa::grouped_conv take and write.
#pragma once

#include "attention.h"

namespace elsa::cuda {

// Served are K = 7, groups of 4 or 8 channels, and multiples of 8 channels. Maps must be aligned to
// 16 bytes, pixel by pixel, and rows be at most kMostPitch numbers apart, so that offsets within
// the 22 rows of a tile fit in 32 bits; so must be the height.
inline constexpr int64_t kMostPitch = 1 << 26;

template <typename S>
struct GroupedConv {
  int64_t batch, height, width;
  int channels, group_width;
  Map<const S> query, key;
  const S* weight;  // (C, group_width, K, K), contiguous
  const S* bias;    // (C), or null for none
  S* packed;        // work space for packed_weights() numbers
};

template <typename S>
struct GroupedConvForward {
  GroupedConv<S> operands;
  S* out;  // (B, H, W, C), contiguous as all results are
};

template <typename S>
struct GroupedConvBackward {
  GroupedConv<S> operands;
  Map<const S> grad;
  S *grad_query, *grad_key, *grad_weight;
  S* grad_bias;  // null where the bias is
  // Work space: sums over a part of the tiles, (parts, group_width * K * K, C) and (parts, C).
  int64_t parts;
  float *weight_parts, *bias_parts;
};

int64_t packed_weights(int64_t channels);
int64_t grouped_conv_parts(int64_t batch, int64_t height, int64_t width, int64_t channels);
// How many blocks a launch has at most.
int64_t grouped_conv_blocks(int64_t batch, int64_t height, int64_t width, int64_t channels);
// Whether the code that serves the current device was compiled for one with tensor cores for this.
template <typename S>
bool has_grouped_conv();
template <typename S>
void forward_grouped_conv(const GroupedConvForward<S>& call, cudaStream_t stream);
// In grouped_conv_weight.cu: the gradients of weight and bias, the second part of the next one.
template <typename S>
void backward_grouped_conv_weight(const GroupedConvBackward<S>& call, cudaStream_t stream);
template <typename S>
void backward_grouped_conv(const GroupedConvBackward<S>& call, cudaStream_t stream);

}  // namespace elsa::cuda
