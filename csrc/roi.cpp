// RoIAlign over all levels of a feature pyramid in one call, forward and backward.
//
// A bin's value is an average over a grid of points, each a bilinear mixture of four pixels. Both the grid and the mixture are
// products of an x part and a y part, so the bin is Σ_y Σ_x v(y) u(x) f(y, x): for each axis the weights of all points of a bin
// are merged into one weight per pixel first (`Axis`), then rows are mixed, then columns. 14 × 14 points of a RoI cost about
// as much as its pixels that way.
//
// Numbers are mixed along the channels. Maps that are stored pixel by pixel (channels last) are read as they lie. Of maps that are
// stored plane by plane the pixels under a RoI are turned into that order first, some channels at a time; or the whole map once,
// where the RoIs together cover it more than once. Backward goes the same way back. There each thread owns some channels: nothing
// is added to by two threads, and the sums do not depend on the number of threads.
#include "common.h"
#include <algorithm>
#include <cmath>

namespace ndet {
namespace {

namespace ts = torch::stable;

// One axis of one RoI: for each bin the pixels that it reads, ascending, and their weights
template <class T> struct Axis {
  std::vector<int32_t> first, pixel, place, used, order;   // of each bin: its first tap; of each tap: its pixel, and where in `used`; 0, 1, 2, …
  std::vector<T> weight;

  int count(int bin) const { return first[bin + 1] - first[bin]; }

  void tap(int32_t p, T w, size_t from) {
    for (size_t k = pixel.size(); k-- > from && pixel[k] >= p;)
      if (pixel[k] == p) { weight[k] += w; return; }
    size_t k = pixel.size();
    while (k > from && pixel[k - 1] > p) k--;
    pixel.insert(pixel.begin() + k, p), weight.insert(weight.begin() + k, w);
  }

  // Operation by operation what torchvision reckons, as the number of points hangs on the last bit
  void make(T start, T length, int bins, int size, int ratio) {
    first.clear(), pixel.clear(), weight.clear();
    const T bin = length / T(bins);
    const double points = ratio > 0 ? ratio : std::ceil(double(length / T(bins))), step = points > 0 ? double(bin) / points : 0;
    const T n = T(points);
    for (int b = 0; b < bins; b++) {
      const size_t from = pixel.size();
      first.push_back(int32_t(from));
      const double begin = double(start) + b * double(bin);
      double i0 = 0, i1 = points;                   // points before the map and after it are not even visited
      if (step > 0) {
        i0 = std::max(i0, std::floor((-1 - begin) / step - .5) - 2);
        i1 = std::min(i1, std::ceil((size - begin) / step - .5) + 2);
      }
      if (!(i1 < 9e15)) i1 = i0;                    // beyond 2⁵³ i + 1 is i; or a RoI whose width is no number
      for (double i = i0; i < i1; i++) {
        T at = start + T(b) * bin + (T(i) + T(.5)) * bin / n;
        if (!(at >= T(-1) && at <= T(size))) continue;
        if (at < 0) at = 0;
        int32_t p = int32_t(at);
        if (p >= size - 1) { tap(size - 1, T(1), from); continue; }
        const T high = at - T(p);
        tap(p, T(1) - high, from), tap(p + 1, high, from);
      }
      for (size_t k = from; k < weight.size(); k++) weight[k] /= n;
    }
    first.push_back(int32_t(pixel.size()));
    used.assign(pixel.begin(), pixel.end());
    std::sort(used.begin(), used.end());
    used.erase(std::unique(used.begin(), used.end()), used.end());
    place.resize(pixel.size());
    for (size_t k = 0; k < pixel.size(); k++) place[k] = int32_t(std::lower_bound(used.begin(), used.end(), pixel[k]) - used.begin());
    while (order.size() < used.size()) order.push_back(int32_t(order.size()));
  }
};

template <class T> struct Level { T* data; int64_t B, H, W; bool last; T scale; };   // last: channels last

template <class T> struct Job {
  std::vector<Level<T>> levels;
  const T* rois;
  const int64_t* level;
  int64_t R, C;
  int P, Q, ratio;                                  // bins down and across
  bool aligned;
  T* pooled;                                        // [R,C,P,Q]: written, or the gradient that comes in
};

template <class T> void axes(const Job<T>& j, int64_t r, Axis<T>& y, Axis<T>& x) {
  const Level<T>& l = j.levels[j.level[r]];
  const T *box = j.rois + 5 * r + 1, off = j.aligned ? T(.5) : T(0);
  const T x1 = box[0] * l.scale - off, y1 = box[1] * l.scale - off;
  T w = box[2] * l.scale - off - x1, h = box[3] * l.scale - off - y1;
  if (!j.aligned) w = std::max(w, T(1)), h = std::max(h, T(1));
  x.make(x1, w, j.Q, int(l.W), j.ratio), y.make(y1, h, j.P, int(l.H), j.ratio);
}

// [n,m] → [m,n], four by four; rows begin `step` apart in the source and `to_step` in the target. `sum` adds to what is there.
template <bool sum, class T> INLINE void transpose(const T* __restrict from, int64_t step, T* __restrict to, int64_t to_step, int64_t n, int64_t m) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 4) {
    using V = float __attribute__((vector_size(16)));
    using I = int32_t __attribute__((vector_size(16)));
    auto load = [](const float* p) { V v; std::memcpy(&v, p, 16); return v; };
    auto keep = [](float* p, V v) { if (sum) { V old; std::memcpy(&old, p, 16); v += old; } std::memcpy(p, &v, 16); };
    for (; i + 4 <= n; i += 4) {
      const T* f = from + i * step;
      int64_t k = 0;
      for (; k + 4 <= m; k += 4) {
        const V a = load(f + k), b = load(f + step + k), c = load(f + 2 * step + k), d = load(f + 3 * step + k);
        const V e = __builtin_shuffle(a, b, I{0, 4, 1, 5}), g = __builtin_shuffle(a, b, I{2, 6, 3, 7});
        const V h = __builtin_shuffle(c, d, I{0, 4, 1, 5}), l = __builtin_shuffle(c, d, I{2, 6, 3, 7});
        T* t = to + k * to_step + i;
        keep(t, __builtin_shuffle(e, h, I{0, 1, 4, 5})), keep(t + to_step, __builtin_shuffle(e, h, I{2, 3, 6, 7}));
        keep(t + 2 * to_step, __builtin_shuffle(g, l, I{0, 1, 4, 5})), keep(t + 3 * to_step, __builtin_shuffle(g, l, I{2, 3, 6, 7}));
      }
      for (; k < m; k++)
        for (int64_t r = 0; r < 4; r++) to[k * to_step + i + r] = sum ? to[k * to_step + i + r] + f[r * step + k] : f[r * step + k];
    }
  }
  for (; i < n; i++)
    for (int64_t k = 0; k < m; k++) to[k * to_step + i] = sum ? to[k * to_step + i] + from[i * step + k] : from[i * step + k];
}

template <class T> struct Scratch {
  std::vector<T> row, piece, patch;
  static T* take(std::vector<T>& v, int64_t n) { if (int64_t(v.size()) < n) v.resize(n); return v.data(); }
};

// Where the pixels of a RoI lie: rows[tap] · row_step + cols[used column] · col_step, n channels each
template <class T> struct View { T* data; const int32_t *rows, *cols; int64_t row_step, col_step; };

// The pixels under a RoI, from planes to [rows, columns, n] or (back) added to the planes
template <bool back, class T> INLINE void turn(T* plane, const Level<T>& l, const Axis<T>& y, const Axis<T>& x, int64_t n, T* patch) {
  const int64_t columns = x.used.size(), HW = l.H * l.W;
  const bool dense = x.used.back() - x.used.front() + 1 == columns;
  for (int32_t row : y.used) {
    T* at = plane + row * l.W;
    for (int64_t i = 0; i < columns; i += dense ? columns : 1) {
      const int64_t m = dense ? columns : 1;
      if constexpr (back) transpose<true>((const T*)patch + i * n, n, at + x.used[i], HW, m, n);
      else transpose<false>((const T*)at + x.used[i], HW, patch + i * n, n, n, m);
    }
    patch += columns * n;
  }
}

// How many channels at a time: as many as leave the mixed row of a RoI in the nearest cache, and a patch in the next one
template <class T> int64_t block(const Level<T>& l, const Axis<T>& y, const Axis<T>& x, int64_t channels) {
  const int64_t columns = x.used.size(), rows = y.used.size();
  int64_t n = 32768 / int64_t(sizeof(T)) / columns;
  if (!l.last) n = std::min<int64_t>(n, 400000 / int64_t(sizeof(T)) / (columns * rows));
  return std::min(std::max<int64_t>(16, n / 16 * 16), channels);
}

// A map of planes, [B,C,H·W] → [B,H·W,C], a tile of pixels at a time
template <class T> struct Turn {
  static INLINE void run(const Level<T>* l, T* to, int64_t C, int64_t begin, int64_t end) {
    const int64_t HW = l->H * l->W, tiles = (HW + TILE - 1) / TILE;
    for (int64_t t = begin; t < end; t++) {
      const int64_t b = t / tiles, at = t % tiles * TILE, image = b * C * HW;
      transpose<false>((const T*)l->data + image + at, HW, to + image + at * C, C, C, std::min(TILE, HW - at));
    }
  }
  static constexpr int64_t TILE = 64;
};

// Maps of planes that the RoIs cover more than once are turned as a whole; the tensors that come back hold them
template <class T> std::vector<Tensor> turn_whole(Job<T>& j, const Tensor& like) {
  std::vector<double> wanted(j.levels.size());
  for (int64_t r = 0; r < j.R; r++) {
    const Level<T>& l = j.levels[j.level[r]];
    auto side = [&](int k, int64_t size) { return std::min(double(size), std::max(0., double(j.rois[5 * r + k + 2] - j.rois[5 * r + k]) * double(l.scale)) + 2); };
    wanted[j.level[r]] += side(1, l.W) * side(2, l.H);
  }
  std::vector<Tensor> held;
  for (size_t k = 0; k < j.levels.size(); k++) {
    Level<T>& l = j.levels[k];
    if (l.last || !j.C || wanted[k] <= double(l.B * l.H * l.W)) continue;
    held.push_back(ts::new_empty(like, {l.B, l.H, l.W, j.C}));
    T* to = out<T>(held.back());
    const int64_t tiles = l.B * ((l.H * l.W + Turn<T>::TILE - 1) / Turn<T>::TILE);
    spread(tiles, 5e-7 * held.back().numel(), [&](int64_t a, int64_t b) { dispatch<Turn<T>>((const Level<T>*)&l, to, j.C, a, b); });
    l.data = to, l.last = true;
  }
  return held;
}

template <class T> struct Forward {
  static INLINE void run(const Job<T>* job, int64_t begin, int64_t end) {
    const Job<T>& j = *job;
    Axis<T> y, x;
    Scratch<T> s;
    const int64_t bins = j.P * j.Q;
    for (int64_t r = begin; r < end; r++) {
      axes(j, r, y, x);
      T* to = j.pooled + r * j.C * bins;
      const Level<T>& l = j.levels[j.level[r]];
      T* map = l.data + int64_t(j.rois[5 * r]) * j.C * l.H * l.W;
      if (x.used.empty() || y.used.empty()) { std::fill_n(to, j.C * bins, T(0)); continue; }
      const int64_t columns = x.used.size(), most = block(l, y, x, j.C);
      T *row = s.take(s.row, columns * most), *piece = s.take(s.piece, bins * most), *patch = l.last ? nullptr : s.take(s.patch, columns * y.used.size() * most);
      for (int64_t c = 0; c < j.C; c += most) {
        const int64_t n = std::min(most, j.C - c);
        if (!l.last) turn<false>(map + c * l.H * l.W, l, y, x, n, patch);
        mix(j, l.last ? View<T>{map + c, y.pixel.data(), x.used.data(), l.W * j.C, j.C} : View<T>{patch, y.place.data(), x.order.data(), columns * n, n}, y, x, n, row, piece);
        transpose<false>((const T*)piece, n, to + c * bins, bins, bins, n);
      }
    }
  }

  static INLINE void mix(const Job<T>& j, View<T> v, const Axis<T>& y, const Axis<T>& x, int64_t n, T* row, T* piece) {
    const int64_t columns = x.used.size();
    for (int p = 0; p < j.P; p++) {
      const int32_t k = y.first[p];
      for (int64_t i = 0; i < columns; i++) weigh(row + i * n, v.data + v.cols[i] * v.col_step, v.rows + k, v.row_step, y.weight.data() + k, y.count(p), n);
      for (int q = 0; q < j.Q; q++) {
        const int32_t k = x.first[q];
        weigh(piece + (p * j.Q + q) * n, (const T*)row, x.place.data() + k, n, x.weight.data() + k, x.count(q), n);
      }
    }
  }
};

template <class T> struct Backward {
  static INLINE void run(const Job<T>* job, int64_t begin, int64_t end) {     // channels begin … end - 1 of all RoIs
    const Job<T>& j = *job;
    Axis<T> y, x;
    Scratch<T> s;
    const int64_t bins = j.P * j.Q;
    for (int64_t r = 0; r < j.R; r++) {
      axes(j, r, y, x);
      if (x.used.empty() || y.used.empty()) continue;
      const Level<T>& l = j.levels[j.level[r]];
      T* map = l.data + int64_t(j.rois[5 * r]) * j.C * l.H * l.W;
      const T* from = j.pooled + r * j.C * bins;
      const int64_t columns = x.used.size(), pixels = columns * y.used.size(), most = block(l, y, x, end - begin);
      T *row = s.take(s.row, columns * most), *piece = s.take(s.piece, bins * most), *patch = l.last ? nullptr : s.take(s.patch, pixels * most);
      for (int64_t c = begin; c < end; c += most) {
        const int64_t n = std::min(most, end - c);
        transpose<false>(from + c * bins, bins, piece, n, n, bins);
        if (!l.last) std::fill_n(patch, pixels * n, T(0));
        mix(j, l.last ? View<T>{map + c, y.pixel.data(), x.used.data(), l.W * j.C, j.C} : View<T>{patch, y.place.data(), x.order.data(), columns * n, n}, y, x, n, row, piece);
        if (!l.last) turn<true>(map + c * l.H * l.W, l, y, x, n, patch);
      }
    }
  }

  static INLINE void mix(const Job<T>& j, View<T> v, const Axis<T>& y, const Axis<T>& x, int64_t n, T* row, const T* piece) {
    const int64_t columns = x.used.size();
    for (int p = 0; p < j.P; p++) {
      if (!y.count(p)) continue;
      std::fill_n(row, columns * n, T(0));
      for (int q = 0; q < j.Q; q++)
        for (int32_t k = x.first[q]; k < x.first[q + 1]; k++) add(row + x.place[k] * n, piece + (p * j.Q + q) * n, x.weight[k], n);
      for (int32_t k = y.first[p]; k < y.first[p + 1]; k++)
        for (int64_t i = 0; i < columns; i++) add(v.data + v.rows[k] * v.row_step + v.cols[i] * v.col_step, (const T*)row + i * n, y.weight[k], n);
    }
  }
};

// Everything that could lead out of a tensor is refused
template <class T> void check(const Job<T>& j, const std::vector<double>& scales) {
  require(scales.size() == j.levels.size() && j.P > 0 && j.Q > 0, "roi_align: as many scales as levels, and at least one bin");
  for (int64_t r = 0; r < j.R; r++) {
    const T* roi = j.rois + 5 * r;
    require(j.level[r] >= 0 && j.level[r] < int64_t(j.levels.size()), "roi_align: RoI " + std::to_string(r) + " asks for level " + std::to_string(j.level[r]));
    for (int k = 0; k < 5; k++) require(std::isfinite(roi[k]), "roi_align: RoI " + std::to_string(r) + " holds a value that is not finite");
    require(roi[0] >= 0 && roi[0] < T(j.levels[j.level[r]].B), "roi_align: RoI " + std::to_string(r) + " asks for an image that is not there");
  }
}

template <class T> Job<T> prepare(const std::vector<Tensor>& maps, const Tensor& rois, const Tensor& level, int64_t P, int64_t Q, const std::vector<double>& scales,
                                  int64_t ratio, bool aligned) {
  Job<T> j;
  require(!maps.empty() && rois.dim() == 2 && rois.size(1) == 5 && level.dim() == 1 && level.size(0) == rois.size(0) && level.scalar_type() == ScalarType::Long,
          "roi_align: rois must be [R,5] and level [R] int64");
  j.R = rois.size(0), j.C = maps[0].size(1), j.P = int(P), j.Q = int(Q), j.ratio = int(std::min<int64_t>(ratio, INT32_MAX)), j.aligned = aligned;
  j.rois = data<T>(rois), j.level = data<int64_t>(level);
  for (size_t k = 0; k < maps.size(); k++) {
    const Tensor& m = maps[k];
    require(m.dim() == 4 && m.size(1) == j.C && m.scalar_type() == rois.scalar_type(), "roi_align: features must be [B,C,H,W] of one type and number of channels, rois of that type");
    j.levels.push_back({const_cast<T*>(data<T>(m)), m.size(0), m.size(2), m.size(3), channels_last(m) && m.size(1) > 1, T(k < scales.size() ? scales[k] : 0)});
  }
  check(j, scales);
  return j;
}

std::vector<Tensor> ready(const std::vector<Tensor>& features) {
  std::vector<Tensor> out;
  for (const Tensor& f : features) out.push_back(f.dim() == 4 && channels_last(f) ? f : ts::contiguous(f));
  return out;
}

Tensor roi_align(const std::vector<Tensor>& features, const Tensor& rois_, const Tensor& level_, int64_t P, int64_t Q, const std::vector<double>& scales,
                 int64_t ratio, bool aligned) {
  Tensor rois = ts::contiguous(rois_), level = ts::contiguous(level_);
  const std::vector<Tensor> maps = ready(features);
  Tensor pooled;
  by_type("roi_align", rois, [&](auto t) {
    using T = decltype(t);
    Job<T> j = prepare<T>(maps, rois, level, P, Q, scales, ratio, aligned);
    const std::vector<Tensor> held = turn_whole(j, rois);
    pooled = ts::new_empty(rois, {j.R, j.C, P, Q});
    j.pooled = out<T>(pooled);
    if (j.C) spread(j.R, 6e-6 * j.R * j.C * P * Q, [&](int64_t a, int64_t b) { dispatch<Forward<T>>((const Job<T>*)&j, a, b); });
  }, "rois");
  return pooled;
}

std::vector<Tensor> roi_align_backward(const Tensor& grad_, const std::vector<Tensor>& features, const Tensor& rois_, const Tensor& level_, int64_t P, int64_t Q,
                                       const std::vector<double>& scales, int64_t ratio, bool aligned) {
  Tensor grad = ts::contiguous(grad_), rois = ts::contiguous(rois_), level = ts::contiguous(level_);
  std::vector<Tensor> grads;
  for (const Tensor& f : ready(features)) grads.push_back(cleared(ts::empty_like(f)));
  by_type("roi_align", rois, [&](auto t) {
    using T = decltype(t);
    Job<T> j = prepare<T>(grads, rois, level, P, Q, scales, ratio, aligned);
    require(grad.scalar_type() == rois.scalar_type() && grad.numel() == j.R * j.C * P * Q, "roi_align: the gradient must be [R,C,height,width] of the features' type");
    j.pooled = const_cast<T*>(data<T>(grad));
    if (j.C) spread((j.C + 15) / 16, 8e-6 * j.R * j.C * P * Q, [&](int64_t a, int64_t b) { dispatch<Backward<T>>((const Job<T>*)&j, 16 * a, std::min(16 * b, j.C)); });
  }, "rois");
  return grads;
}

}  // namespace
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(notebook_det, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&ndet::roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&ndet::roi_align_backward));
}
