// CUDA for people without a GPU: just enough of it to run gpu_*.cu on a CPU, for tests (tests/test_emulated.py), never for speed.
//
// A block's threads are coroutines on stacks of their own. Each runs until it waits at __syncthreads() or ends; when all wait, all
// go on. They run one at a time in an order that the test chooses (ascending, descending, shuffled), and so do blocks: a kernel
// whose result hangs on the order, because a barrier is missing or two threads write one place, gives different answers.
// Shared memory is filled with NaN before every block. What no imitation shows: speed, the true width of a memory access, limits
// on registers, the weaker guarantees of a GPU's memory between barriers.
#pragma once
#include <ucontext.h>

#include <math.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>

#define HOME notebook_det_emulated
#define DEVICE CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SHARED(type, name, count) type* const name = ::emulate::shared<type>(__LINE__, count)

struct Dim { unsigned x = 1, y = 1, z = 1; };
inline Dim gridDim, blockDim, blockIdx, threadIdx;

namespace emulate {

constexpr size_t STACK = 256 * 1024;
struct Thread { ucontext_t at; std::unique_ptr<char[]> stack; bool done; unsigned number; };

inline int order = 0;                               // 0 ascending, 1 descending, 2 shuffled
inline int64_t launches = 0, barriers = 0;
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline Thread* running = nullptr;
inline std::function<void()> body;
inline std::map<int, std::vector<char>> memory;     // of this block, by the line that declares it

template <class T> T* shared(int line, size_t count) {
  std::vector<char>& m = memory[line];
  if (m.empty()) m.assign(count * sizeof(T) + 64, char(0xff));
  return (T*)((uintptr_t(m.data()) + 63) & ~uintptr_t(63));
}

inline void begin() {                               // of a coroutine
  body();
  running->done = true;
  swapcontext(&running->at, &scheduler);
}

inline std::vector<unsigned> in_order(unsigned n, unsigned seed) {
  std::vector<unsigned> v(n);
  for (unsigned i = 0; i < n; i++) v[i] = order == 1 ? n - 1 - i : i;
  if (order == 2) std::shuffle(v.begin(), v.end(), std::mt19937(seed));
  return v;
}

inline void run_block(unsigned n, unsigned seed) {
  memory.clear();
  if (threads.size() < n) threads.resize(n);
  for (unsigned t = 0; t < n; t++) {
    Thread& a = threads[t];
    if (!a.stack) a.stack.reset(new char[STACK]);
    a.done = false, a.number = t;
    getcontext(&a.at);
    a.at.uc_stack.ss_sp = a.stack.get(), a.at.uc_stack.ss_size = STACK, a.at.uc_link = &scheduler;
    makecontext(&a.at, begin, 0);
  }
  unsigned done = 0;
  for (unsigned round = 0; done < n; round++) {
    const unsigned before = done;
    for (unsigned t : in_order(n, seed + round)) {
      if (threads[t].done) throw std::runtime_error("emulate: some threads of a block wait at a barrier, others have ended");
      running = &threads[t], threadIdx.x = t;
      swapcontext(&scheduler, &running->at);
      done += running->done;
    }
    if (done != before && done != n) throw std::runtime_error("emulate: some threads of a block wait at a barrier, others have ended");
  }
}

}  // namespace emulate

inline void __syncthreads() {
  emulate::Thread* me = emulate::running;
  emulate::barriers += me->number == 0;
  swapcontext(&me->at, &emulate::scheduler);
}

template <class T> T atomicAdd(T* to, T value) { const T old = *to; *to = old + value; return old; }
template <class T> T atomicMax(T* to, T value) { const T old = *to; *to = value > old ? value : old; return old; }
template <class T> T atomicMin(T* to, T value) { const T old = *to; *to = value < old ? value : old; return old; }
template <class T> T atomicOr(T* to, T value) { const T old = *to; *to = old | value; return old; }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

namespace ndet {
namespace gpu {

struct On { template <class... X> explicit On(const Tensor&, const X&...) {} };

template <class... P, class... A> void launch(const On&, void (*kernel)(P...), int64_t blocks, int threads, A... a) {
  if (blocks == 0) return;
  require(blocks <= INT32_MAX && threads > 0 && threads <= 1024, "emulate: a GPU refuses this number of blocks or threads");
  emulate::launches++;
  gridDim.x = unsigned(blocks), blockDim.x = unsigned(threads);
  emulate::body = [&] { kernel(P(a)...); };
  for (unsigned b : emulate::in_order(unsigned(blocks), 77)) blockIdx.x = b, emulate::run_block(unsigned(threads), b);
}

}  // namespace gpu
}  // namespace ndet

// For the test, through ctypes
extern "C" __attribute__((visibility("default"), used)) inline void emulate_order(int order) { emulate::order = order; }
extern "C" __attribute__((visibility("default"), used)) inline int64_t emulate_launches() { return emulate::launches; }
extern "C" __attribute__((visibility("default"), used)) inline int64_t emulate_barriers() { return emulate::barriers; }
