// RoIAlign on a GPU: all levels of a pyramid in one launch, forward and backward.
//
// Maps that lie channels last: neighbouring threads take neighbouring channels, so that each of the four pixels around a sampling
// point is one unbroken read of a warp (32 threads), and the point's place and weights are reckoned once for four channels. A block
// has 128 channels of up to 32 bins of one RoI. Its results lie the other way round in memory than they were made (channels first),
// so they are turned in shared memory, and written by warps that walk along the bins.
//
// Maps of any other layout: a thread for each number of the result, neighbours along a row of bins, as in torchvision.
//
// Backward adds each bin's share to the pixels with atomics, as two bins may share a pixel: the order of the sums, and so the last
// bits of the gradient, are not the same each time. Python says so where deterministic algorithms are asked for (`alert` in roi.py).
// Half precision is read and written, but summed in float32.
#include "device.h"

namespace ndet {
namespace gpu {
namespace roi {
namespace {

constexpr int WARP = 32, WARPS = 8, EACH = 4, CHANNELS = WARP * EACH, BINS = 32, LEVELS = 8;

template <class T, class A> struct Level { T* data; int64_t B, H, W, image, channel, row, column; A scale; };   // steps in memory

template <class T, class A> struct Job {
  Level<T, A> levels[LEVELS];
  const A* rois;
  const int64_t* level;
  int64_t R, C;
  int L, P, Q, ratio;                               // levels; bins down and across
  bool aligned;
};

// A RoI on its level; `on`: is there such a level and image?
template <class T, class A> struct Roi {
  A x1, y1, w, h;
  int64_t image;
  const Level<T, A>* l;
  bool on;
  DEV Roi(const Job<T, A>& j, int64_t r) : image(0), l(j.levels), on(false) {
    const A* b = j.rois + 5 * r;
    const int64_t level = j.level[r];
    const A sum = b[0] + b[1] + b[2] + b[3] + b[4];
    if (level < 0 || level >= j.L || sum - sum != 0) return;     // NaN and ∞ are not 0
    l = j.levels + level;
    if (!(b[0] >= 0 && b[0] < A(l->B))) return;
    on = true, image = int64_t(b[0]);
    const A off = j.aligned ? A(.5) : A(0);
    x1 = b[1] * l->scale - off, y1 = b[2] * l->scale - off, w = b[3] * l->scale - off - x1, h = b[4] * l->scale - off - y1;
    if (!j.aligned) w = more(w, A(1)), h = more(h, A(1));
  }
  DEV Line<A> down(const Job<T, A>& j, int p) const { return Line<A>(y1, h / A(j.P), p, l->H, j.ratio); }
  DEV Line<A> across(const Job<T, A>& j, int q) const { return Line<A>(x1, w / A(j.Q), q, l->W, j.ratio); }
};

// f(offsets of the four pixels around a point, their weights) for every point of a bin; all count 1, the bin is their mean
template <class T, class A, class F> DEV void pixels(const Roi<T, A>& roi, const Line<A>& down, const Line<A>& across, F f) {
  const Level<T, A>& l = *roi.l;
  for (int64_t i = down.i0; i < down.i1; i++) {
    const Between<A> y(down.at(i), l.H);
    if (!y.on) continue;
    const int64_t low = roi.image * l.image + y.low * l.row, high = roi.image * l.image + y.high * l.row;
    const A v1 = y.part, v0 = A(1) - v1;
    for (int64_t k = across.i0; k < across.i1; k++) {
      const Between<A> x(across.at(k), l.W);
      if (!x.on) continue;
      const int64_t left = x.low * l.column, right = x.high * l.column;
      const A u1 = x.part, u0 = A(1) - u1;
      f(low + left, low + right, high + left, high + right, v0 * u0, v0 * u1, v1 * u0, v1 * u1);
    }
  }
}

template <class A> DEV A share(const Line<A>& down, const Line<A>& across) { return down.i1 > down.i0 && across.i1 > across.i0 ? A(1) / (down.n * across.n) : A(0); }

// Which piece of the work a block has
struct Piece {
  int64_t r, c0;
  int b0, bins, channels;
  DEV Piece(int64_t C, int total) {
    const int64_t chunks = (C + CHANNELS - 1) / CHANNELS, parts = (total + BINS - 1) / BINS, part = blockIdx.x % parts, per = (total + parts - 1) / parts;
    r = blockIdx.x / parts / chunks, c0 = blockIdx.x / parts % chunks * CHANNELS, b0 = int(part * per);
    bins = int(less<int64_t>(per, total - b0)), channels = int(less<int64_t>(CHANNELS, C - c0));
  }
};
inline int64_t blocks(int64_t R, int64_t C, int64_t total) { return R * pieces(C, CHANNELS) * pieces(total, BINS); }

template <class T, class A> __global__ void forward_last(const Job<T, A> j, T* pooled) {
  SHARED(A, turned, CHANNELS * (BINS + 1));
  const Piece piece(j.C, j.P * j.Q);
  const Roi<T, A> roi(j, piece.r);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  for (int b = warp; b < piece.bins; b += WARPS) {
    A sum[EACH] = {}, each = 0;
    if (roi.on) {
      const int bin = piece.b0 + b;
      const T* from = roi.l->data + piece.c0 + lane;
      const Line<A> down = roi.down(j, bin / j.Q), across = roi.across(j, bin % j.Q);
      each = share(down, across);
      pixels(roi, down, across, [&](int64_t a, int64_t b, int64_t c, int64_t d, A s, A t, A u, A v) {
#pragma unroll
        for (int e = 0; e < EACH; e++)
          if (lane + e * WARP < piece.channels) sum[e] += s * A(from[a + e * WARP]) + t * A(from[b + e * WARP]) + u * A(from[c + e * WARP]) + v * A(from[d + e * WARP]);
      });
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) turned[(lane + e * WARP) * (BINS + 1) + b] = each * sum[e];
  }
  __syncthreads();
  T* to = pooled + (piece.r * j.C + piece.c0) * j.P * j.Q + piece.b0;
  for (int c = warp; c < piece.channels; c += WARPS)
    if (lane < piece.bins) to[int64_t(c) * j.P * j.Q + lane] = T(turned[c * (BINS + 1) + lane]);
}

// `j.levels` are the gradients of the maps, in A
template <class T, class A> __global__ void backward_last(const Job<A, A> j, const T* pooled) {
  SHARED(A, turned, CHANNELS * (BINS + 1));
  const Piece piece(j.C, j.P * j.Q);
  const Roi<A, A> roi(j, piece.r);
  if (!roi.on) return;                              // the whole block
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const T* from = pooled + (piece.r * j.C + piece.c0) * j.P * j.Q + piece.b0;
  for (int c = warp; c < piece.channels; c += WARPS)
    if (lane < piece.bins) turned[c * (BINS + 1) + lane] = A(from[int64_t(c) * j.P * j.Q + lane]);
  __syncthreads();
  for (int b = warp; b < piece.bins; b += WARPS) {
    const int bin = piece.b0 + b;
    A* to = roi.l->data + piece.c0 + lane;
    const Line<A> down = roi.down(j, bin / j.Q), across = roi.across(j, bin % j.Q);
    const A each = share(down, across);
    pixels(roi, down, across, [&](int64_t at, int64_t bt, int64_t ct, int64_t dt, A s, A t, A u, A v) {
#pragma unroll
      for (int e = 0; e < EACH; e++) {
        if (lane + e * WARP >= piece.channels) continue;
        const A g = each * turned[(lane + e * WARP) * (BINS + 1) + b];
        atomicAdd(to + at + e * WARP, s * g), atomicAdd(to + bt + e * WARP, t * g);
        atomicAdd(to + ct + e * WARP, u * g), atomicAdd(to + dt + e * WARP, v * g);
      }
    });
  }
}

// Number i of [R,C,P,Q]
template <class T, class A> struct Place {
  int64_t r, c;
  int p, q;
  DEV Place(const Job<T, A>& j, int64_t i) : q(int(i % j.Q)) { i /= j.Q, p = int(i % j.P), i /= j.P, c = i % j.C, r = i / j.C; }
};

template <class T, class A> __global__ void forward_any(const Job<T, A> j, T* pooled) {
  for (int64_t i = me(); i < j.R * j.C * j.P * j.Q; i += all()) {
    const Place<T, A> o(j, i);
    const Roi<T, A> roi(j, o.r);
    A sum = 0;
    if (roi.on) {
      const T* from = roi.l->data + o.c * roi.l->channel;
      const Line<A> down = roi.down(j, o.p), across = roi.across(j, o.q);
      pixels(roi, down, across, [&](int64_t a, int64_t b, int64_t c, int64_t d, A s, A t, A u, A v) { sum += s * A(from[a]) + t * A(from[b]) + u * A(from[c]) + v * A(from[d]); });
      sum *= share(down, across);
    }
    pooled[i] = T(sum);
  }
}

template <class T, class A> __global__ void backward_any(const Job<A, A> j, const T* pooled) {
  for (int64_t i = me(); i < j.R * j.C * j.P * j.Q; i += all()) {
    const Place<A, A> o(j, i);
    const Roi<A, A> roi(j, o.r);
    if (!roi.on) continue;
    A* to = roi.l->data + o.c * roi.l->channel;
    const Line<A> down = roi.down(j, o.p), across = roi.across(j, o.q);
    const A g = A(pooled[i]) * share(down, across);
    pixels(roi, down, across, [&](int64_t a, int64_t b, int64_t c, int64_t d, A s, A t, A u, A v) {
      atomicAdd(to + a, s * g), atomicAdd(to + b, t * g), atomicAdd(to + c, u * g), atomicAdd(to + d, v * g);
    });
  }
}

// Everything that can be checked without looking at values on the device; `last`: do all maps lie channels last?
template <class T, class A> Job<T, A> prepare(const std::vector<Tensor>& maps, const Tensor& rois, const Tensor& level, int64_t P, int64_t Q, const std::vector<double>& scales, int64_t ratio, bool aligned, bool& last) {
  require(!maps.empty() && rois.dim() == 2 && rois.size(1) == 5 && level.dim() == 1 && level.size(0) == rois.size(0) && level.scalar_type() == ScalarType::Long,
          "roi_align: rois must be [R,5] and level [R] int64");
  require(scales.size() == maps.size() && P > 0 && Q > 0 && P * Q < INT32_MAX, "roi_align: as many scales as levels, and at least one bin");
  require(maps.size() <= LEVELS, "roi_align: a GPU takes 8 levels at most");
  require(rois.scalar_type() == WIDE<A>, "roi_align: rois must be float64 where features are, and float32 with all others");
  Job<T, A> j;
  j.rois = data<A>(rois), j.level = data<int64_t>(level), j.R = rois.size(0), j.C = maps[0].size(1), j.L = int(maps.size());
  j.P = int(P), j.Q = int(Q), j.ratio = int(less<int64_t>(ratio, INT32_MAX)), j.aligned = aligned, last = true;
  for (int k = 0; k < j.L; k++) {
    const Tensor& m = maps[k];
    require(m.dim() == 4 && m.size(1) == j.C && m.scalar_type() == maps[0].scalar_type(), "roi_align: features must be [B,C,H,W] of one type and number of channels");
    j.levels[k] = {const_cast<T*>(data<T>(m)), m.size(0), m.size(2), m.size(3), m.stride(0), m.stride(1), m.stride(2), m.stride(3), A(scales[k])};
    last = last && channels_last(m);
  }
  return j;
}

Tensor roi_align(const std::vector<Tensor>& maps, const Tensor& rois_, const Tensor& level_, int64_t P, int64_t Q, const std::vector<double>& scales, int64_t ratio, bool aligned) {
  require(!maps.empty(), "roi_align: at least one level");
  const On on(rois_, level_, maps);
  const Tensor rois = ts::contiguous(rois_), level = ts::contiguous(level_);
  Tensor pooled = ts::new_empty(maps[0], {rois.size(0), maps[0].size(1), P, Q});
  by_any_type("roi_align", maps[0], [&](auto t) {
    using T = decltype(t);
    bool last;
    const auto j = prepare<T, Wide<T>>(maps, rois, level, P, Q, scales, ratio, aligned, last);
    if (last) launch(on, forward_last<T, Wide<T>>, blocks(j.R, j.C, P * Q), WARP * WARPS, j, out<T>(pooled));
    else launch(on, forward_any<T, Wide<T>>, less<int64_t>(pieces(pooled.numel(), 256), 1 << 20), 256, j, out<T>(pooled));
  }, "features");
  return pooled;
}

std::vector<Tensor> roi_align_backward(const Tensor& grad_, const std::vector<Tensor>& maps, const Tensor& rois_, const Tensor& level_, int64_t P, int64_t Q,
                                       const std::vector<double>& scales, int64_t ratio, bool aligned) {
  require(!maps.empty(), "roi_align: at least one level");
  const On on(rois_, level_, maps, grad_);
  const Tensor grad = ts::contiguous(grad_), rois = ts::contiguous(rois_), level = ts::contiguous(level_);
  std::vector<Tensor> grads, sums;
  for (const Tensor& m : maps) {
    grads.push_back(m.dim() == 4 && channels_last(m) ? ts::empty_like(m) : ts::empty_like(ts::contiguous(m)));
    sums.push_back(grads.back().scalar_type() == rois.scalar_type() ? grads.back() : ts::to(grads.back(), rois.scalar_type()));
    ts::zero_(sums.back());
  }
  by_any_type("roi_align", maps[0], [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    bool last;
    const auto j = prepare<A, A>(sums, rois, level, P, Q, scales, ratio, aligned, last);
    require(grad.scalar_type() == maps[0].scalar_type() && grad.numel() == j.R * j.C * P * Q, "roi_align: the gradient must be [R,C,height,width] of the features' type");
    if (last) launch(on, backward_last<T, A>, blocks(j.R, j.C, P * Q), WARP * WARPS, j, data<T>(grad));
    else launch(on, backward_any<T, A>, less<int64_t>(pieces(grad.numel(), 256), 1 << 20), 256, j, data<T>(grad));
  }, "features");
  for (size_t k = 0; k < maps.size(); k++)
    if (grads[k].scalar_type() != sums[k].scalar_type()) ts::copy_(grads[k], sums[k]);
  return grads;
}

}  // namespace
}  // namespace roi
}  // namespace gpu
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(HOME, DEVICE, m) {
  m.impl("roi_align", TORCH_BOX(&ndet::gpu::roi::roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&ndet::gpu::roi::roi_align_backward));
}
