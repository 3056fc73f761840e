// Pooling with bins that move, and maximum pooling, on a GPU: a block for each bin of each RoI, its threads along the channels.
//
// Maps are turned channels last first (a copy, where they are not: a few microseconds beside the pooling), so that a warp reads or
// adds to 32 neighbouring numbers at once. The gradient of an offset is a sum over points and channels: each thread sums its own
// channels, and the block adds them up in shared memory, in a fixed order. The gradient of the map takes atomics, as RoIAlign's does.
#include "device.h"
#include <limits>

namespace ndet {
namespace gpu {
namespace pool {
namespace {

constexpr int MOST = 256;                           // threads of a block
inline int threads(int64_t C) { return C > MOST / 2 ? MOST : C > MOST / 4 ? MOST / 2 : MOST / 4; }

template <class T, class A> struct Job {
  const T *map, *offset;                            // [B,H,W,C]; [R,2,P,Q] (x, then y) or null
  const A* rois;                                    // [R,5]
  int64_t B, C, H, W;
  int P, Q, ratio;
  A scale, gamma;
};

template <class T, class A> DEV bool there(const Job<T, A>& j, const A* roi) {
  const A sum = roi[0] + roi[1] + roi[2] + roi[3] + roi[4];
  return sum - sum == 0 && roi[0] >= 0 && roi[0] < A(j.B);
}

// The bin of this block
template <class T, class A> struct Bin {
  int64_t r;
  int p, q;
  const A* roi;
  bool on;
  DEV explicit Bin(const Job<T, A>& j) : r(blockIdx.x / (j.P * j.Q)), p(int(blockIdx.x % (j.P * j.Q) / j.Q)), q(int(blockIdx.x % j.Q)), roi(j.rois + 5 * r), on(there(j, roi)) {}
};

// f(y, x, what it counts) for every point of the bin
template <class T, class A, class F> DEV void points(const Job<T, A>& j, const Bin<T, A>& b, F f) {
  const A x = b.roi[1] * j.scale - A(.5), y = b.roi[2] * j.scale - A(.5), w = b.roi[3] * j.scale - A(.5) - x, h = b.roi[4] * j.scale - A(.5) - y;
  const T* o = j.offset ? j.offset + (2 * b.r * j.P + b.p) * j.Q + b.q : nullptr;
  const A dx = o ? j.gamma * w * A(o[0]) : A(0), dy = o ? j.gamma * h * A(o[j.P * j.Q]) : A(0);
  const Line<A> down(y + dy, h / A(j.P), b.p, j.H, j.ratio), across(x + dx, w / A(j.Q), b.q, j.W, j.ratio);
  const A share = A(1) / (down.n * across.n);       // used where there are points
  for (int64_t i = down.i0; i < down.i1; i++) {
    const Between<A> v(down.at(i), j.H);
    if (!v.on) continue;
    for (int64_t k = across.i0; k < across.i1; k++) {
      const Between<A> u(across.at(k), j.W);
      if (u.on) f(v, u, share);
    }
  }
}

template <class T, class A> DEV int64_t pixel(const Job<T, A>& j, const Bin<T, A>& b, int64_t y, int64_t x) { return ((int64_t(b.roi[0]) * j.H + y) * j.W + x) * j.C; }

template <class T, class A> __global__ void forward(const Job<T, A> j, T* pooled) {
  const Bin<T, A> b(j);
  for (int64_t c = threadIdx.x; c < j.C; c += blockDim.x) {
    A sum = 0;
    if (b.on) points(j, b, [&](const Between<A>& v, const Between<A>& u, A share) {
      const T* m = j.map + c;
      const A up = (A(1) - u.part) * A(m[pixel(j, b, v.low, u.low)]) + u.part * A(m[pixel(j, b, v.low, u.high)]);
      const A low = (A(1) - u.part) * A(m[pixel(j, b, v.high, u.low)]) + u.part * A(m[pixel(j, b, v.high, u.high)]);
      sum += share * ((A(1) - v.part) * up + v.part * low);
    });
    pooled[int64_t(blockIdx.x) * j.C + c] = T(sum);
  }
}

// Sum of a number of each thread, the same in any order of the threads; for thread 0
template <class A> DEV A together(A* shared, A mine) {
  __syncthreads();
  shared[threadIdx.x] = mine;
  for (int n = blockDim.x / 2; n > 0; n /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < n) shared[threadIdx.x] += shared[threadIdx.x + n];
  }
  return shared[0];
}

template <class T, class A> __global__ void backward(const Job<T, A> j, const T* pooled, A* dmap, T* doffset) {
  SHARED(A, shared, MOST);
  const Bin<T, A> b(j);
  A sx = 0, sy = 0;
  for (int64_t c = threadIdx.x; b.on && c < j.C; c += blockDim.x) {
    const A g = A(pooled[int64_t(blockIdx.x) * j.C + c]);
    points(j, b, [&](const Between<A>& v, const Between<A>& u, A share) {
      const int64_t at[4] = {pixel(j, b, v.low, u.low) + c, pixel(j, b, v.low, u.high) + c, pixel(j, b, v.high, u.low) + c, pixel(j, b, v.high, u.high) + c};
      const A s = share * g, v0 = A(1) - v.part, u0 = A(1) - u.part;
      atomicAdd(dmap + at[0], s * v0 * u0);
      if (!u.held) atomicAdd(dmap + at[1], s * v0 * u.part);
      if (!v.held) atomicAdd(dmap + at[2], s * v.part * u0);
      if (!v.held && !u.held) atomicAdd(dmap + at[3], s * v.part * u.part);
      if (!doffset) return;
      const A f0 = A(j.map[at[0]]), f1 = A(j.map[at[1]]), f2 = A(j.map[at[2]]), f3 = A(j.map[at[3]]);
      if (!u.held) sx += s * (v0 * (f1 - f0) + v.part * (f3 - f2));
      if (!v.held) sy += s * (u0 * (f2 - f0) + u.part * (f3 - f1));
    });
  }
  if (!doffset) return;
  const A x = together(shared, sx), y = together(shared, sy);
  if (threadIdx.x) return;
  const A w = (b.roi[3] * j.scale - A(.5)) - (b.roi[1] * j.scale - A(.5)), h = (b.roi[4] * j.scale - A(.5)) - (b.roi[2] * j.scale - A(.5));
  T* o = doffset + (2 * b.r * j.P + b.p) * j.Q + b.q;
  o[0] = T(b.on ? j.gamma * w * x : A(0)), o[j.P * j.Q] = T(b.on ? j.gamma * h * y : A(0));
}

// The largest number of a bin whose edges are whole pixels, and which pixel it is
template <class A> DEV int clamped(double v, int64_t size) { return int(fmax(0., fmin(double(size), v))); }

template <class T, class A> __global__ void largest(const Job<T, A> j, T* pooled, int32_t* best) {
  const Bin<T, A> b(j);
  int top = 0, bottom = 0, left = 0, right = 0;
  if (b.on) {
    const A x = b.roi[1] * j.scale, y = b.roi[2] * j.scale, w = (b.roi[3] + 1) * j.scale - x, h = (b.roi[4] + 1) * j.scale - y, bw = w / A(j.Q), bh = h / A(j.P);
    top = clamped<A>(floor(A(b.p) * bh + y), j.H), bottom = h > 0 ? clamped<A>(ceil((A(b.p) + 1) * bh + y), j.H) : 0;
    left = clamped<A>(floor(A(b.q) * bw + x), j.W), right = w > 0 ? clamped<A>(ceil((A(b.q) + 1) * bw + x), j.W) : 0;
  }
  const bool none = bottom <= top || right <= left;
  for (int64_t c = threadIdx.x; c < j.C; c += blockDim.x) {
    A most = none ? A(0) : -std::numeric_limits<A>::max();
    int32_t at = -1;
    for (int y = none ? bottom : top; y < bottom; y++)
      for (int x = left; x < right; x++) {
        const A f = A(j.map[pixel(j, b, y, x) + c]);
        if (f > most) most = f, at = int32_t(y * j.W + x);
      }
    pooled[int64_t(blockIdx.x) * j.C + c] = T(most), best[int64_t(blockIdx.x) * j.C + c] = at;
  }
}

template <class T, class A> Job<T, A> prepare(const char* op, const Tensor& map, const Tensor& rois, const std::optional<Tensor>& offset, int64_t P, int64_t Q, double scale, int64_t ratio, double gamma) {
  require(map.dim() == 4 && rois.dim() == 2 && rois.size(1) == 5 && P > 0 && Q > 0 && P * Q < INT32_MAX && map.size(2) * map.size(3) < INT32_MAX,
          std::string(op) + ": features must be [B,C,H,W] and rois [R,5], with at least one bin");
  require(rois.scalar_type() == WIDE<A>, std::string(op) + ": rois must be float64 where features are, and float32 with all others");
  require(!offset || (offset->scalar_type() == map.scalar_type() && offset->numel() == rois.size(0) * 2 * P * Q), std::string(op) + ": offset must be [R,2,height,width] of the features' type");
  return {data<T>(map), offset ? data<T>(*offset) : nullptr, data<A>(rois), map.size(0), map.size(1), map.size(2), map.size(3), int(P), int(Q), int(less<int64_t>(ratio, INT32_MAX)), A(scale), A(gamma)};
}

Tensor deform_roi_pool(const Tensor& features, const Tensor& rois_, const std::optional<Tensor>& offset_, int64_t P, int64_t Q, double scale, int64_t ratio, double gamma) {
  const On on(features, rois_, offset_);
  const Tensor map = ts::contiguous(features, NHWC), rois = ts::contiguous(rois_);
  const std::optional<Tensor> offset = whole(offset_);
  Tensor pooled = ts::new_empty(map, {rois.size(0), P, Q, map.size(1)});
  by_any_type("deform_roi_pool", map, [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const auto j = prepare<T, A>("deform_roi_pool", map, rois, offset, P, Q, scale, ratio, gamma);
    launch(on, forward<T, A>, rois.size(0) * P * Q, threads(j.C), j, out<T>(pooled));
  }, "features");
  return pooled;
}

std::tuple<Tensor, Tensor> deform_roi_pool_backward(const Tensor& grad_, const Tensor& features, const Tensor& rois_, const std::optional<Tensor>& offset_, int64_t P, int64_t Q, double scale,
                                                    int64_t ratio, double gamma) {
  const On on(features, rois_, grad_, offset_);
  const Tensor grad = ts::contiguous(grad_), map = ts::contiguous(features, NHWC), rois = ts::contiguous(rois_);
  const std::optional<Tensor> offset = whole(offset_);
  Tensor dmap = ts::empty_like(map), sums = map.scalar_type() == rois.scalar_type() ? dmap : ts::to(dmap, rois.scalar_type());
  Tensor doffset = ts::new_empty(map, {offset ? rois.size(0) : 0, 2, P, Q});
  ts::zero_(sums);
  by_any_type("deform_roi_pool", map, [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const auto j = prepare<T, A>("deform_roi_pool", map, rois, offset, P, Q, scale, ratio, gamma);
    require(grad.scalar_type() == map.scalar_type() && grad.numel() == rois.size(0) * j.C * P * Q, "deform_roi_pool: the gradient must be [R,height,width,C] of the features' type");
    launch(on, backward<T, A>, rois.size(0) * P * Q, threads(j.C), j, data<T>(grad), out<A>(sums), offset ? out<T>(doffset) : nullptr);
  }, "features");
  if (dmap.scalar_type() != sums.scalar_type()) ts::copy_(dmap, sums);
  return {dmap, doffset};
}

std::tuple<Tensor, Tensor> max_roi_pool(const Tensor& features, const Tensor& rois_, int64_t P, int64_t Q, double scale) {
  const On on(features, rois_);
  const Tensor map = ts::contiguous(features, NHWC), rois = ts::contiguous(rois_);
  Tensor pooled = ts::new_empty(map, {rois.size(0), P, Q, map.size(1)}), best = ts::new_empty(map, {rois.size(0), P, Q, map.size(1)}, ScalarType::Int);
  by_any_type("max_roi_pool", map, [&](auto t) {
    using T = decltype(t);
    const auto j = prepare<T, Wide<T>>("max_roi_pool", map, rois, std::nullopt, P, Q, scale, 0, 0);
    launch(on, largest<T, Wide<T>>, rois.size(0) * P * Q, threads(j.C), j, out<T>(pooled), out<int32_t>(best));
  }, "features");
  return {pooled, best};
}

}  // namespace
}  // namespace pool
}  // namespace gpu
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(HOME, DEVICE, m) {
  m.impl("max_roi_pool", TORCH_BOX(&ndet::gpu::pool::max_roi_pool));
  m.impl("deform_roi_pool", TORCH_BOX(&ndet::gpu::pool::deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&ndet::gpu::pool::deform_roi_pool_backward));
}
