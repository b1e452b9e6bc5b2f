// csrc/cuda/grouped_conv.cpp, registered for tensors of the CPU.
#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define CUDA CPU
#define STABLE_TORCH_LIBRARY_IMPL(space, key, m) _STABLE_TORCH_LIBRARY_IMPL(space, key, m, C10_UID)

#include "../../csrc/cuda/grouped_conv.cpp"
