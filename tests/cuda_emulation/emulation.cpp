// Threads of a block as contexts of one CPU thread. Between two barriers they run one after the
// other, in an order that ELSA_EMULATION_ORDER gives: 0 as they are numbered, 1 in reverse, others
// shuffled. A warp goes ahead of the others up to the block's barrier, but for those shuffled. A
// kernel whose threads race has other results in another order. Shared memory begins as
// NaN, and is NaN beyond what a launch asked for, where writing fails.
#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "include/cuda_runtime.h"

namespace {

constexpr int kMostShared = 232448, kPlainShared = 48 * 1024;  // bytes of a block, as on an H100
constexpr int kFence = 4096;                                   // bytes beyond it
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarp = 32, kMostExchanged = 64;  // bytes of a lane

}  // namespace

namespace elsa::cuda {
extern double2 shared[];
alignas(128) double2 shared[(kMostShared + kFence) / sizeof(double2)];
}  // namespace elsa::cuda

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

namespace {

enum class State { ready, at_block, at_warp, ended };

struct Thread {
  std::vector<char> stack = std::vector<char>(kStackBytes);
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  State state = State::ready;
  int exchanges = 0;
  struct Copy {
    void* to;
    const void* from;
    int count, size;
  };
  std::vector<Copy> copies;
};

std::vector<Thread> all;
Thread* current;
jmp_buf scheduler;
const std::function<void()>* body_of_all;
int device;         // the current one; kernels ask for their shared memory on each
int questions = 0;  // that the runtime has answered
std::map<std::pair<const void*, int>, int> allowed;
std::mutex one_launch;
char lanes[2][1024 * kMostExchanged];

int order() {
  const char* text = std::getenv("ELSA_EMULATION_ORDER");
  return text ? std::atoi(text) : 0;
}

void entry() {
  (*body_of_all)();
  current->state = State::ended;
  _longjmp(scheduler, 1);
}

void pause(State state) {
  current->state = state;
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

void resume(unsigned index) {
  current = &all[index];
  threadIdx = dim3(index);
  if (_setjmp(scheduler) != 0) return;
  if (current->started) _longjmp(current->place, 1);
  current->started = true;
  getcontext(&current->start);
  current->start.uc_stack.ss_sp = current->stack.data();
  current->start.uc_stack.ss_size = kStackBytes;
  makecontext(&current->start, entry, 0);
  setcontext(&current->start);
}

// Threads that go on: a warp whose barrier is complete, in the first order always the first one, in
// reverse the last one, or else all at the block's barrier; none at the end.
struct Range {
  size_t first, last;
};
Range release(std::mt19937& random, int chosen) {
  const size_t warps = all.size() / kWarp, start = chosen > 1 ? random() % warps : 0;
  for (size_t i = 0; i < warps; ++i) {
    const size_t first = (chosen == 1 ? warps - 1 - i : (start + i) % warps) * kWarp;
    const auto begin = all.begin() + first, end = begin + kWarp;
    const auto waits = [](const Thread& t) { return t.state == State::at_warp; };
    if (!std::all_of(begin, end, waits)) continue;
    std::for_each(begin, end, [](Thread& t) { t.state = State::ready; });
    return {first, first + kWarp};
  }
  bool any = false;
  for (Thread& t : all) {
    require(t.state != State::at_warp, "all lanes of a warp must come to its barrier");
    if (t.state != State::at_block) continue;
    t.state = State::ready;
    any = true;
  }
  return {0, any ? all.size() : 0};
}

void run_block(std::mt19937& random, int chosen) {
  for (Thread& t : all) {
    t.started = false;
    t.state = State::ready;
    t.exchanges = 0;
    t.copies.clear();
  }
  for (Range next{0, all.size()}; next.first < next.last; next = release(random, chosen)) {
    std::vector<unsigned> sequence(next.last - next.first);
    std::iota(sequence.begin(), sequence.end(), static_cast<unsigned>(next.first));
    if (chosen == 1) std::reverse(sequence.begin(), sequence.end());
    if (chosen > 1) std::shuffle(sequence.begin(), sequence.end(), random);
    for (const unsigned index : sequence)
      if (all[index].state == State::ready) resume(index);
  }
}

}  // namespace

void wait_for_block() { pause(State::at_block); }
void wait_for_warp() { pause(State::at_warp); }

// Two buffers take turns: a lane that is ahead by one exchange overwrites nothing.
const char* exchange(const void* bytes, int count) {
  require(count <= kMostExchanged, "lanes exchange a few bytes");
  const unsigned lane = threadIdx.x % kWarp;
  char* warp =
      lanes[current->exchanges++ % 2] + (threadIdx.x - lane) * static_cast<size_t>(kMostExchanged);
  std::memcpy(warp + lane * static_cast<size_t>(count), bytes, count);
  pause(State::at_warp);
  return warp;
}

void copy_later(void* to, const void* from, int count, int size) {
  current->copies.push_back({to, from, count, size});
}

void copy_now() {
  for (const auto& copy : current->copies) {
    std::memcpy(copy.to, copy.from, copy.count);
    std::memset(static_cast<char*>(copy.to) + copy.count, 0, copy.size - copy.count);
  }
  current->copies.clear();
}

void require(bool condition, const char* rule) {
  if (!condition) throw std::runtime_error(std::string("CUDA emulation: ") + rule);
}

cudaError_t run(
    const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> guard(one_launch);
  const auto known = allowed.find({kernel, device});
  const int most = known != allowed.end() ? known->second : kPlainShared;
  const dim3 grid = config.gridDim;
  if (config.dynamicSmemBytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
  if (config.blockDim.x > 1024 || config.blockDim.x % kWarp || grid.x == 0 ||
      grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535)
    return cudaErrorInvalidConfiguration;
  char* memory = reinterpret_cast<char*>(elsa::cuda::shared);
  const char* fence = memory + config.dynamicSmemBytes;
  all.resize(config.blockDim.x);
  body_of_all = &body;
  blockDim = config.blockDim;
  gridDim = grid;
  const int chosen = order();
  std::mt19937 random(chosen);
  const uint64_t count = uint64_t{grid.x} * grid.y;
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t index = chosen == 1 ? count - 1 - i : i;
    blockIdx = dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x));
    std::memset(memory, 0xff, config.dynamicSmemBytes + kFence);
    run_block(random, chosen);
    require(
        std::all_of(fence, fence + kFence, [](char byte) { return byte == '\xff'; }),
        "a block must not write beyond its shared memory");
  }
  return cudaSuccess;
}

}  // namespace emulation

// ELSA_EMULATION_CAPABILITY: what kernels count as compiled for, 9.0 if nothing is said.
int emulation::ptx_version() {
  ++questions;
  const char* text = std::getenv("ELSA_EMULATION_CAPABILITY");
  return text ? static_cast<int>(std::lround(10 * std::atof(text))) : 90;
}

cudaError_t cudaGetDevice(int* current) {
  *current = emulation::device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  ++emulation::questions;
  const char* text = std::getenv("ELSA_EMULATION_SHARED");
  *value = text ? std::atoi(text) : kMostShared;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  ++emulation::questions;
  if (bytes > kMostShared) return cudaErrorInvalidValue;
  emulation::allowed[{kernel, emulation::device}] = bytes;
  return cudaSuccess;
}

// For tests, by ctypes.
extern "C" {
__attribute__((visibility("default"))) void emulation_set_device(int device) {
  emulation::device = device;
}
__attribute__((visibility("default"))) int emulation_questions() { return emulation::questions; }
}

// What LibTorch does with a device: nothing to guard, one stream, and errors that have a text.
extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return 0; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }
AOTITorchError torch_c10_cuda_check_msg(
    int32_t error, const char*, const char*, uint32_t, bool, char** text) {
  if (error != cudaSuccess) *text = strdup(("CUDA error " + std::to_string(error)).c_str());
  return 0;
}
void torch_c10_cuda_free_error_msg(char* text) { std::free(text); }
}
