// What every operator of this folder shares: which instructions to use, and three helpers for lanes of numbers.
//
// A hot loop is written once, as a plain loop over 64 bytes of numbers (16 floats or 8 doubles), in a struct with
// `static INLINE … run(…)`. `dispatch<Loop>(…)` compiles it three times (baseline x86-64, AVX2, AVX-512) and picks one when
// the program runs, so that one library is fast on every machine. Elsewhere than on x86 there is the baseline alone.
// flags.txt says how to build: with -ffp-contract=off, as a fused multiply-add rounds once where torch rounds twice, and
// results are compared bit by bit; with the LibTorch stable ABI of torch 2.11, so that one library serves every later torch;
// with -fopenmp-simd, which lets the few sums that are marked `omp simd` run in lanes (it brings no threads).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

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

// exp(x) for x ≤ 0, within 2 units in the last place (Cephes' polynomial)
INLINE float exp_(float x) {
  x = upper(x, -87.f);
  const float magic = 12582912.f, n = (x * 1.44269504f + magic) - magic;   // the nearest whole number
  const float r = (x - n * .693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f, y = y * r + 8.3334519073e-3f, y = y * r + 4.1665795894e-2f, y = y * r + 1.6666665459e-1f, y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return y * power;
}
INLINE double exp_(double x) { return std::exp(x); }

inline void require(bool ok, const std::string& sentence) {
  if (!ok) throw std::runtime_error(sentence);
}

template <class T> void refuse_nan(const char* op, const char* what, const T* x, int64_t n) {
  int bad = 0;
  for (int64_t i = 0; i < n; i++) bad |= x[i] != x[i];
  require(!bad, std::string(op) + ": " + what + " hold a value that is not a number (NaN)");
}

// Calls f with a value of the tensor's type
template <class F> auto by_type(const char* op, const Tensor& t, F f, const char* what = "boxes") {
  if (t.scalar_type() == ScalarType::Float) return f(float());
  if (t.scalar_type() == ScalarType::Double) return f(double());
  throw std::runtime_error(std::string(op) + ": " + what + " must be float32 or float64");
}

// f(begin, end) over 0 … n, by several threads where all of it takes more than 20 ms: a parallel region costs a slice of the
// scheduler's time as soon as another program wants the second core, more than all of a small job.
template <class F> void spread(int64_t n, double ms, const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  if (ms < 20 || threads < 2 || n < 2) return f(0, n);
  torch::stable::parallel_for(0, n, (n + threads - 1) / threads, f);
}

// Asks Linux for pages of 2 MB under a large result. The first write to a new page of 4 KB stops the program for a quarter of a
// microsecond, 16,000 times in 64 MB: as long as the arithmetic itself. It is a wish: nothing changes where it is not granted.
inline void huge_pages(void* at, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = ((uintptr_t)at + page - 1) / page * page, end = ((uintptr_t)at + bytes) / page * page;
  if (bytes >= 4 * page && begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// Data of a contiguous tensor of one type; never null
template <class T> const T* data(const Tensor& t) {
  static const T none{};
  return t.numel() ? (const T*)t.const_data_ptr() : &none;
}
template <class T> T* out(Tensor& t) {
  static T none{};
  if (!t.numel()) return &none;
  void* p = t.mutable_data_ptr();
  huge_pages(p, t.numel() * sizeof(T));
  return (T*)p;
}

// A new tensor, filled with zeros
inline Tensor cleared(Tensor t) {
  if (t.numel()) huge_pages(t.mutable_data_ptr(), t.numel() * t.element_size());
  return torch::stable::zero_(t);
}

constexpr auto NHWC = torch::headeronly::MemoryFormat::ChannelsLast;

// Is a [B,C,H,W] tensor stored pixel by pixel, all channels of one together?
inline bool channels_last(const Tensor& t) {
  int64_t want = 1;
  for (int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != want) return false;
    want *= t.size(d);
  }
  return true;
}

// to = Σ w[k] · row k of n numbers, k ascending; row k begins at from + at[k] · step
template <class T> INLINE void weigh(T* __restrict to, const T* __restrict from, const int32_t* at, int64_t step, const T* w, int count, int64_t n) {
  if (count == 0) { for (int64_t i = 0; i < n; i++) to[i] = 0; return; }
  auto row = [&](int k) { return from + at[k] * step; };
  const T *a = row(0), *b = row(count > 1), *c = row(count > 2 ? 2 : 0), *d = row(count > 3 ? 3 : 0);
  const T u = w[0], v = w[count > 1], x = w[count > 2 ? 2 : 0], y = w[count > 3 ? 3 : 0];
  if (count == 1) for (int64_t i = 0; i < n; i++) to[i] = u * a[i];
  else if (count == 2) for (int64_t i = 0; i < n; i++) to[i] = u * a[i] + v * b[i];
  else if (count == 3) for (int64_t i = 0; i < n; i++) to[i] = u * a[i] + v * b[i] + x * c[i];
  else for (int64_t i = 0; i < n; i++) to[i] = u * a[i] + v * b[i] + x * c[i] + y * d[i];
  int k = 4;
  for (; k + 1 < count; k += 2) { const T *a = row(k), *b = row(k + 1), u = w[k], v = w[k + 1]; for (int64_t i = 0; i < n; i++) to[i] = to[i] + u * a[i] + v * b[i]; }
  if (k < count) { const T *a = row(k), u = w[k]; for (int64_t i = 0; i < n; i++) to[i] += u * a[i]; }
}

// to += w · from
template <class T> INLINE void add(T* __restrict to, const T* __restrict from, T w, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] += w * from[i];
}

}  // namespace ndet
