// The rarer ways to pool a RoI: maximum over bins whose edges are not rounded, and deformable pooling, whose bins move.
//
// Both walk along the channels of a map that is turned channels last. A moved bin is still a grid of points, so its weights are
// a product of a y part and an x part as in roi.cpp, but each bin has its own. Moving it changes the weights: the slope of a
// weight with the position of the bin is kept beside it, which is all that the gradient of an offset needs.
#include "common.h"
#include <algorithm>
#include <limits>
#include <optional>

namespace ndet {
namespace {

namespace ts = torch::stable;

template <class T> struct Job {
  const T *map, *rois, *offset;                    // [B,H,W,C]; [R,5]; [R,2,P,Q] (x, then y) or null
  int64_t B, C, H, W, R;
  int P, Q, ratio;
  T scale, gamma;
  T* pooled;                                       // [R,P,Q,C], or its gradient
  int32_t* best;
  T *dmap, *doffset;
};

template <class T> void check(const char* op, const Tensor& map, const Tensor& rois, int64_t P, int64_t Q) {
  require(map.dim() == 4 && rois.dim() == 2 && rois.size(1) == 5 && map.scalar_type() == rois.scalar_type() && P > 0 && Q > 0 && map.size(2) * map.size(3) < INT32_MAX,
          std::string(op) + ": features must be [B,C,H,W] and rois [R,5], of one type, with at least one bin");
  const T* r = data<T>(rois);
  for (int64_t i = 0; i < rois.size(0); i++, r += 5) {
    for (int k = 0; k < 5; k++) require(std::isfinite(r[k]), std::string(op) + ": RoI " + std::to_string(i) + " holds a value that is not finite");
    require(r[0] >= 0 && r[0] < T(map.size(0)), std::string(op) + ": RoI " + std::to_string(i) + " asks for an image that is not there");
  }
}

// ------------------------------------------------------------------------------------------------------------------- maximum

INLINE int clamped(double v, int64_t size) { return int(std::max(0., std::min(double(size), v))); }

template <class T> struct Largest {
  static INLINE void run(const Job<T>* job, int64_t begin, int64_t end) {
    const Job<T>& j = *job;
    std::vector<T> pixel(j.C);
    for (int64_t r = begin; r < end; r++) {
      const T *roi = j.rois + 5 * r, x1 = roi[1] * j.scale, y1 = roi[2] * j.scale, w = (roi[3] + 1) * j.scale - x1, h = (roi[4] + 1) * j.scale - y1;
      const T bw = w / T(j.Q), bh = h / T(j.P);
      for (int b = 0; b < j.P * j.Q; b++) {
        const T p = T(b / j.Q), q = T(b % j.Q);
        const int top = clamped(std::floor(p * bh + y1), j.H), bottom = clamped(std::ceil((p + 1) * bh + y1), j.H);
        const int left = clamped(std::floor(q * bw + x1), j.W), right = clamped(std::ceil((q + 1) * bw + x1), j.W);
        T* to = j.pooled + (r * j.P * j.Q + b) * j.C;
        int32_t* at = j.best + (r * j.P * j.Q + b) * j.C;
        const bool none = !(w > 0) || !(h > 0) || bottom <= top || right <= left;
        std::fill_n(to, j.C, none ? T(0) : -std::numeric_limits<T>::max()), std::fill_n(at, j.C, -1);
        if (none) continue;
        for (int y = top; y < bottom; y++)
          for (int x = left; x < right; x++) {
            const int32_t here = int32_t(y * j.W + x);
            const T* f = j.map + (int64_t(roi[0]) * j.H * j.W + here) * j.C;
            for (int64_t c = 0; c < j.C; c++) at[c] = f[c] > to[c] ? here : at[c], to[c] = f[c] > to[c] ? f[c] : to[c];
          }
      }
    }
  }
};

std::tuple<Tensor, Tensor> max_roi_pool(const Tensor& features, const Tensor& rois_, int64_t P, int64_t Q, double scale) {
  Tensor map = ts::contiguous(features, NHWC), rois = ts::contiguous(rois_), pooled, best;
  by_type("max_roi_pool", map, [&](auto t) {
    using T = decltype(t);
    check<T>("max_roi_pool", map, rois, P, Q);
    const int64_t R = rois.size(0), C = map.size(1);
    pooled = ts::new_empty(map, {R, P, Q, C}), best = ts::new_empty(map, {R, P, Q, C}, ScalarType::Int);
    Job<T> j{data<T>(map), data<T>(rois), nullptr, map.size(0), C, map.size(2), map.size(3), R, int(P), int(Q), 0, T(scale), T(0), out<T>(pooled), out<int32_t>(best), nullptr, nullptr};
    if (C) spread(R, 2e-5 * R * C * P * Q, [&](int64_t a, int64_t b) { dispatch<Largest<T>>((const Job<T>*)&j, a, b); });
  }, "features");
  return {pooled, best};
}

// ---------------------------------------------------------------------------------------------------------------- deformable

// One axis of one bin: its pixels, their weights, and how those change when the bin moves
template <class T> struct Line {
  std::vector<int32_t> pixel;
  std::vector<T> weight, slope;
  void tap(int32_t p, T w, T s) {
    for (size_t k = pixel.size(); k-- > 0;)
      if (pixel[k] == p) { weight[k] += w, slope[k] += s; return; }
    pixel.push_back(p), weight.push_back(w), slope.push_back(s);
  }
  void make(T begin, T bin, int bin_number, double points, int64_t size) {   // begin: of the whole RoI, moved
    pixel.clear(), weight.clear(), slope.clear();
    const T n = T(points);
    const double step = points > 0 ? double(bin) / points : 0, first = double(begin) + bin_number * double(bin);
    double i0 = 0, i1 = points;
    if (step > 0) i0 = std::max(i0, std::floor((-1 - first) / step - .5) - 2), i1 = std::min(i1, std::ceil((size - first) / step - .5) + 2);
    if (!(i1 < 9e15) || first != first) i1 = i0;     // beyond 2⁵³ i + 1 is i; an offset that is no number: no point lies anywhere
    for (double i = i0; i < i1; i++) {
      const T at = begin + T(bin_number) * bin + (T(i) + T(.5)) * bin / n;
      if (!(at >= T(-1) && at <= T(size))) continue;
      if (at <= 0) { tap(0, 1, 0); continue; }
      const int32_t p = int32_t(at);
      if (p >= size - 1) { tap(int32_t(size - 1), 1, 0); continue; }
      tap(p, T(1) - (at - T(p)), -1), tap(p + 1, at - T(p), 1);
    }
    for (size_t k = 0; k < pixel.size(); k++) weight[k] /= n, slope[k] /= n;
  }
};

template <class T> struct Bin {
  Line<T> x, y;
  T w, h;                                          // of the RoI, feature pixels
  void make(const Job<T>& j, int64_t r, int p, int q) {
    const T *roi = j.rois + 5 * r, *o = j.offset ? j.offset + r * 2 * j.P * j.Q + p * j.Q + q : nullptr;
    T x1 = roi[1] * j.scale - T(.5), y1 = roi[2] * j.scale - T(.5);
    w = roi[3] * j.scale - T(.5) - x1, h = roi[4] * j.scale - T(.5) - y1;
    const double nx = j.ratio > 0 ? j.ratio : std::ceil(double(w / T(j.Q))), ny = j.ratio > 0 ? j.ratio : std::ceil(double(h / T(j.P)));
    if (o) x1 += j.gamma * w * o[0], y1 += j.gamma * h * o[j.P * j.Q];
    x.make(x1, w / T(j.Q), q, nx, j.W), y.make(y1, h / T(j.P), p, ny, j.H);
  }
};

template <class T> struct Deformed {
  static INLINE void run(const Job<T>* job, int64_t begin, int64_t end) {
    const Job<T>& j = *job;
    Bin<T> b;
    for (int64_t r = begin; r < end; r++)
      for (int p = 0; p < j.P; p++)
        for (int q = 0; q < j.Q; q++) {
          b.make(j, r, p, q);
          T* to = j.pooled + ((r * j.P + p) * j.Q + q) * j.C;
          std::fill_n(to, j.C, T(0));
          for (size_t k = 0; k < b.y.pixel.size(); k++)
            for (size_t i = 0; i < b.x.pixel.size(); i++)
              add(to, j.map + ((int64_t(j.rois[5 * r]) * j.H + b.y.pixel[k]) * j.W + b.x.pixel[i]) * j.C, b.y.weight[k] * b.x.weight[i], j.C);
        }
  }
};

template <class T> struct DeformedBack {           // channels from … upto - 1 of the map; offsets where from is 0, of all channels
  static INLINE T product(const T* a, const T* b, int64_t n) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
  }
  static INLINE void run(const Job<T>* job, int64_t from, int64_t upto) {
    const Job<T>& j = *job;
    Bin<T> b;
    for (int64_t r = 0; r < j.R; r++)
      for (int p = 0; p < j.P; p++)
        for (int q = 0; q < j.Q; q++) {
          b.make(j, r, p, q);
          const T* g = j.pooled + ((r * j.P + p) * j.Q + q) * j.C;
          T sx = 0, sy = 0;
          for (size_t k = 0; k < b.y.pixel.size(); k++)
            for (size_t i = 0; i < b.x.pixel.size(); i++) {
              const int64_t at = ((int64_t(j.rois[5 * r]) * j.H + b.y.pixel[k]) * j.W + b.x.pixel[i]) * j.C;
              add(j.dmap + at + from, g + from, b.y.weight[k] * b.x.weight[i], upto - from);
              if (from || !j.doffset) continue;
              const T d = product(g, j.map + at, j.C);
              sx += b.y.weight[k] * b.x.slope[i] * d, sy += b.y.slope[k] * b.x.weight[i] * d;
            }
          if (from || !j.doffset) continue;
          T* o = j.doffset + r * 2 * j.P * j.Q + p * j.Q + q;
          o[0] = j.gamma * b.w * sx, o[j.P * j.Q] = j.gamma * b.h * sy;
        }
  }
};

template <class F> void prepare(const Tensor& map, const Tensor& rois, const std::optional<Tensor>& offset, int64_t P, int64_t Q, double scale, int64_t ratio, double gamma, F f) {
  by_type("deform_roi_pool", map, [&](auto t) {
    using T = decltype(t);
    check<T>("deform_roi_pool", map, rois, P, Q);
    require(!offset || (offset->scalar_type() == map.scalar_type() && offset->numel() == rois.size(0) * 2 * P * Q), "deform_roi_pool: offset must be [R,2,height,width] of the features' type");
    f(Job<T>{data<T>(map), data<T>(rois), offset ? data<T>(*offset) : nullptr, map.size(0), map.size(1), map.size(2), map.size(3), rois.size(0), int(P), int(Q), int(ratio), T(scale), T(gamma),
             nullptr, nullptr, nullptr, nullptr});
  }, "features");
}

std::optional<Tensor> whole(const std::optional<Tensor>& t) { return t ? std::optional<Tensor>(ts::contiguous(*t)) : std::nullopt; }

Tensor deform_roi_pool(const Tensor& features, const Tensor& rois_, const std::optional<Tensor>& offset_, int64_t P, int64_t Q, double scale, int64_t ratio, double gamma) {
  Tensor map = ts::contiguous(features, NHWC), rois = ts::contiguous(rois_), pooled = ts::new_empty(map, {rois.size(0), P, Q, map.size(1)});
  const std::optional<Tensor> offset = whole(offset_);
  prepare(map, rois, offset, P, Q, scale, ratio, gamma, [&](auto j) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(j.map)>>;
    j.pooled = out<T>(pooled);
    if (j.C) spread(j.R, 2e-5 * j.R * j.C * P * Q, [&](int64_t a, int64_t b) { dispatch<Deformed<T>>((const Job<T>*)&j, a, b); });
  });
  return pooled;
}

std::tuple<Tensor, Tensor> deform_roi_pool_backward(const Tensor& grad_, const Tensor& features, const Tensor& rois_, const std::optional<Tensor>& offset_, int64_t P, int64_t Q, double scale,
                                                    int64_t ratio, double gamma) {
  Tensor grad = ts::contiguous(grad_), map = ts::contiguous(features, NHWC), rois = ts::contiguous(rois_), dmap = cleared(ts::empty_like(map)), doffset;
  const std::optional<Tensor> offset = whole(offset_);
  prepare(map, rois, offset, P, Q, scale, ratio, gamma, [&](auto j) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(j.map)>>;
    require(grad.scalar_type() == map.scalar_type() && grad.numel() == j.R * j.C * P * Q, "deform_roi_pool: the gradient must be [R,height,width,C] of the features' type");
    doffset = ts::new_empty(map, {offset ? j.R : 0, 2, P, Q});
    if (offset) ts::zero_(doffset);
    j.pooled = const_cast<T*>(data<T>(grad)), j.dmap = out<T>(dmap), j.doffset = offset ? out<T>(doffset) : nullptr;
    if (j.C) spread(j.C, 4e-5 * j.R * j.C * P * Q, [&](int64_t a, int64_t b) { dispatch<DeformedBack<T>>((const Job<T>*)&j, a, b); });
  });
  return {dmap, doffset};
}

}  // namespace
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(notebook_det, CPU, m) {
  m.impl("max_roi_pool", TORCH_BOX(&ndet::max_roi_pool));
  m.impl("deform_roi_pool", TORCH_BOX(&ndet::deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&ndet::deform_roi_pool_backward));
}
