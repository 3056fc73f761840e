// What the kernels for GPUs share.
//
// A gpu_*.cu is an ordinary C++ file with three things more: functions that run on the device (`__global__`, `__device__`), memory that
// a block of threads shares (SHARED), and `launch`. nvcc makes kernels of it. Every C++ compiler makes a slow imitation of them
// with emulate.h in CUDA's place: the same arithmetic, indices, launch sizes and barriers, on tensors in main memory, so that a
// machine without a GPU can test what it compiles.
//
// Nothing here waits for the device, with one exception that says so (`first` in gpu_nms.cu). What a CPU kernel refuses by looking
// at values (a RoI of an image that is not there) is skipped here: it neither reads nor writes outside of a tensor.
// setup.py compiles with -fmad=false: a fused multiply-add rounds once where torch rounds twice, and overlaps are compared bit by bit.
#pragma once
#include "common.h"
#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>
#define HOME notebook_det
#define DEVICE CUDA
#define SHARED(type, name, count) __shared__ type name[count]
#else
#include "emulate.h"
#endif
#define DEV __device__ __forceinline__

namespace ndet {
namespace gpu {

namespace ts = torch::stable;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#ifdef __CUDACC__
// torch calls a kernel for GPUs as soon as one tensor lies there; an address of another device would end the whole process
inline bool on_gpu(int32_t index, const Tensor& t) { return t.is_cuda() && t.get_device_index() == index; }
inline bool on_gpu(int32_t index, const Tensor* t) { return !t || on_gpu(index, *t); }
inline bool on_gpu(int32_t index, const std::optional<Tensor>& t) { return !t || on_gpu(index, *t); }
inline bool on_gpu(int32_t index, const std::vector<Tensor>& all) { return std::all_of(all.begin(), all.end(), [&](const Tensor& t) { return on_gpu(index, t); }); }

template <class... X> int32_t shared_by(const Tensor& t, const X&... others) {
  const int32_t index = t.get_device_index();
  require((on_gpu(index, t) && ... && on_gpu(index, others)), "notebook_det: the tensors of a call must lie on one device");
  return index;
}

// Tensors are made, and kernels run, on the device of the first; the others must lie there too
struct On {
  int32_t index;
  ts::accelerator::DeviceGuard guard;
  template <class... X> explicit On(const Tensor& t, const X&... others) : index(shared_by(t, others...)), guard(index) {}
};

// kernel(arguments…) by blocks × threads, on the current stream
template <class... P, class... A> void launch(const On& on, void (*kernel)(P...), int64_t blocks, int threads, A... a) {
  if (blocks == 0) return;
  require(blocks <= INT32_MAX, "notebook_det: more than 2³¹ blocks of threads");
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.index, &stream));
  kernel<<<unsigned(blocks), unsigned(threads), 0, cudaStream_t(stream)>>>(P(a)...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
#endif

// Data of a new tensor; hides the one of common.h, which asks Linux for huge pages: an address of a GPU is none of Linux's business
template <class T> T* out(Tensor& t) {
  static T none{};
  return t.numel() ? (T*)t.mutable_data_ptr() : &none;
}

inline int64_t pieces(int64_t n, int64_t of) { return (n + of - 1) / of; }

// One of many that share work: `for (i = me(); i < n; i += all())`
DEV int64_t me() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
DEV int64_t all() { return int64_t(gridDim.x) * blockDim.x; }

template <class T> __host__ DEV T less(T a, T b) { return a < b ? a : b; }     // a NaN in the first argument gives the second
template <class T> __host__ DEV T more(T a, T b) { return a > b ? a : b; }

// Half precision is read and written; sums are made in float32
template <class T> using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T> constexpr ScalarType WIDE = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Calls f with a value of the tensor's type, half precision included
template <class F> auto by_any_type(const char* op, const Tensor& t, F f, const char* what) {
  if (t.scalar_type() == ScalarType::Half) return f(Half());
  if (t.scalar_type() == ScalarType::BFloat16) return f(BFloat16());
  return by_type(op, t, f, what);
}

inline std::optional<Tensor> whole(const std::optional<Tensor>& t) { return t ? std::optional<Tensor>(ts::contiguous(*t)) : std::nullopt; }

// Falling, ties by index: values and int64 indices
inline std::tuple<Tensor, Tensor> sorted(const Tensor& x) {
  std::array<StableIValue, 4> stack{ts::detail::from(x), ts::detail::from(std::optional<bool>(true)), ts::detail::from(int64_t(-1)), ts::detail::from(true)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {ts::detail::to<Tensor>(stack[0]), ts::detail::to<Tensor>(stack[1])};
}

// The points of one axis of one bin. Of `points` of them those from i0 to i1 - 1 can lie on the map, the others are not visited:
// a box of a billion pixels asks for 10¹⁶. Operation by operation what torchvision reckons, as their number hangs on the last bit.
template <class A> struct Line {
  A start, bin, n;
  int b;
  int64_t size, i0, i1;

  DEV Line(A start, A bin, int b, int64_t size, int ratio) : start(start), bin(bin), b(b), size(size), i0(0), i1(0) {
    const double points = ratio > 0 ? double(ratio) : ceil(double(bin)), step = points > 0 ? double(bin) / points : 0, begin = double(start) + b * double(bin);
    n = A(points);
    double from = 0, upto = points;
    if (step > 0) from = fmax(from, floor((-1 - begin) / step - .5) - 2), upto = fmin(upto, ceil((double(size) - begin) / step - .5) + 2);
    if (begin == begin && upto > from && from < 9e15 && upto < 9e15) i0 = int64_t(from), i1 = int64_t(upto);
  }
  DEV A at(int64_t i) const { return start + A(b) * bin + (A(i) + A(.5)) * bin / n; }
};

// Between which pixels a point lies, and how much of it is the upper one's; `held`: at the border, where moving changes nothing
template <class A> struct Between {
  int64_t low, high;
  A part;
  bool on, held;
  DEV Between(A at, int64_t size) : low(0), high(0), part(0), on(at >= A(-1) && at <= A(size)), held(true) {
    if (!on || at <= 0) return;
    low = high = int64_t(at);
    if (low >= size - 1) low = high = size - 1;
    else high = low + 1, part = at - A(low), held = false;
  }
};

}  // namespace gpu
}  // namespace ndet
