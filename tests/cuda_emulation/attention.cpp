// csrc/cuda/attention.cpp, registered for tensors of the CPU.
#include "../../csrc/elsa.cpp"

#undef STABLE_TORCH_LIBRARY_IMPL
#define CUDA CPU
#define STABLE_TORCH_LIBRARY_IMPL(space, key, m) _STABLE_TORCH_LIBRARY_IMPL(space, key, m, C10_UID)

#include "../../csrc/cuda/attention.cpp"
