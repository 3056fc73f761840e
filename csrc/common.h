// What every operator of this folder shares: which instructions to use, and three helpers for lanes of numbers.
//
// A hot loop is written once, as a plain loop over 64 bytes of numbers (16 floats or 8 doubles), in a struct with
// `static INLINE … run(…)`. `dispatch<Loop>(…)` compiles it three times (baseline x86-64, AVX2, AVX-512) and picks one when
// the program runs, so that one library is fast on every machine. Elsewhere than on x86 there is the baseline alone.
// flags.txt says how to build: with -ffp-contract=off, as a fused multiply-add rounds once where torch rounds twice, and
// results are compared bit by bit; with the LibTorch stable ABI of torch 2.11, so that one library serves every later torch.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace ndet {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

// 0 baseline, 1 AVX2, 2 AVX-512; NOTEBOOK_DET_ISA=0|1 asks for less (tests run all three)
inline int isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const int level = [] {
    __builtin_cpu_init();
    int best = !__builtin_cpu_supports("avx2") ? 0
        : __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") ? 2 : 1;
    const char* most = std::getenv("NOTEBOOK_DET_ISA");
    return most && *most >= '0' && *most - '0' < best ? *most - '0' : best;
  }();
  return level;
#else
  return 0;
#endif
}

#if defined(__x86_64__) && defined(__GNUC__)
template <class Loop, class... A> __attribute__((target("avx2"))) void run_avx2(A... a) { Loop::run(a...); }
template <class Loop, class... A>
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512"))) void run_avx512(A... a) { Loop::run(a...); }
template <class Loop, class... A> void dispatch(A... a) {
  switch (isa()) {
    case 2: return run_avx512<Loop>(a...);
    case 1: return run_avx2<Loop>(a...);
    default: return Loop::run(a...);
  }
}
#else
template <class Loop, class... A> void dispatch(A... a) { Loop::run(a...); }
#endif

template <class T> constexpr int LANES = 64 / sizeof(T);
template <class T> struct IntOf { using type = int32_t; };
template <> struct IntOf<double> { using type = int64_t; };
template <class T> using Int = typename IntOf<T>::type;  // as wide as T, so that both fit the same lanes

// One instruction each; a NaN in the first argument gives the second
template <class T> INLINE T lower(T a, T b) { return a < b ? a : b; }
template <class T> INLINE T upper(T a, T b) { return a > b ? a : b; }

// The largest of N lanes; those that are not numbers do not count
template <int N, class T> INLINE T most(T* lane) {
  if constexpr (N == 1) return lane[0];
  for (int l = 0; l < N / 2; l++) lane[l] = upper(lane[l], lane[l + N / 2]);
  if constexpr (N > 1) return most<N / 2>(lane);
}

inline void require(bool ok, const std::string& sentence) {
  if (!ok) throw std::runtime_error(sentence);
}

template <class T> void refuse_nan(const char* op, const char* what, const T* x, int64_t n) {
  int bad = 0;
  for (int64_t i = 0; i < n; i++) bad |= x[i] != x[i];
  require(!bad, std::string(op) + ": " + what + " hold a value that is not a number (NaN)");
}

// Calls f with a value of the tensor's type
template <class F> auto by_type(const char* op, const Tensor& t, F f) {
  if (t.scalar_type() == ScalarType::Float) return f(float());
  if (t.scalar_type() == ScalarType::Double) return f(double());
  throw std::runtime_error(std::string(op) + ": boxes must be float32 or float64");
}

}  // namespace ndet
