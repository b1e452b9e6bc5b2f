// Answers of CUDA's runtime that do not change, so that a call of the operator does not ask again.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/macros.h>

#include <map>
#include <mutex>

namespace elsa::cuda {

// The current device: of all questions to the runtime the one that costs nothing.
inline int current_device() {
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

// The answer for each key, asked for once. Threads may ask at the same time; a question that throws
// is asked again.
template <typename Key, typename Answer>
class Answers {
 public:
  template <typename Question>
  Answer get(const Key& key, const Question& question) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto known = answers_.find(key);
    return known != answers_.end() ? known->second
                                   : answers_.emplace(key, question()).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Answer> answers_;
};

}  // namespace elsa::cuda
