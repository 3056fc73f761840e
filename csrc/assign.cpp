// Max-IoU assignment without the priors × objects matrix.
//
// Priors come in blocks of 64 neighbours. Objects that do not touch a block's bounding box overlap none of its priors and are
// skipped: on an image that is nearly all of them. For the others 64 overlaps are computed at once, and each prior keeps its
// best object. Low-quality matching needs the priors whose overlap equals an object's best exactly: only the blocks that
// reach the best are remembered, and their 64 overlaps are computed once more at the end.
#include "common.h"
#include <algorithm>

namespace ndet {
namespace {

namespace ts = torch::stable;
constexpr int N = 64;                              // priors in a block

template <class T> struct Boxes { std::vector<T> x1, y1, x2, y2, area; };
template <class T> struct Block { T x1[N], y1[N], x2[N], y2[N], area[N]; };

template <class T> struct Job {
  const T* priors;
  int64_t A, G;
  const Boxes<T>* objects;
  T pos, lo, hi, min_pos;
  bool low_quality, all;
  int64_t* gt_index;
  int8_t* label;
  T* iou;
};

template <class T> INLINE int load(const Job<T>& j, int64_t first, Block<T>& b) {
  int n = int(std::min<int64_t>(N, j.A - first));
  const T* p = j.priors + 4 * first;
  for (int l = 0; l < n; l++) b.x1[l] = p[4 * l], b.y1[l] = p[4 * l + 1], b.x2[l] = p[4 * l + 2], b.y2[l] = p[4 * l + 3];
  for (int l = n; l < N; l++) b.x1[l] = p[0], b.y1[l] = p[1], b.x2[l] = p[2], b.y2[l] = p[3];   // fill up with the first
  for (int l = 0; l < N; l++) b.area[l] = (b.x2[l] - b.x1[l]) * (b.y2[l] - b.y1[l]);
  return n;
}

// The reference's overlap, operation by operation: inter / max(area + area' - inter, 1e-6)
template <class T> INLINE void overlaps(const Block<T>& b, const Boxes<T>& o, int64_t g, T* out) {
  const T x1 = o.x1[g], y1 = o.y1[g], x2 = o.x2[g], y2 = o.y2[g], area = o.area[g];
  for (int l = 0; l < N; l++) {
    T w = upper(lower(b.x2[l], x2) - upper(b.x1[l], x1), T(0));
    T h = upper(lower(b.y2[l], y2) - upper(b.y1[l], y1), T(0));
    T inter = w * h, both = b.area[l] + area - inter;
    out[l] = inter / (both < T(1e-6) ? T(1e-6) : both);     // NaN (∞ / ∞) stays: no comparison holds for it, so it counts as 0
  }
}

template <class T> struct Assign {
  static INLINE void run(const Job<T>* job) {
    const Job<T> j = *job;
    const Boxes<T>& o = *j.objects;
    std::vector<T> best(j.G, 0);                            // of each object
    std::vector<std::vector<int32_t>> where(j.G);           // the blocks that reach it
    std::vector<int32_t> near(j.G + 1);
    Block<T> b;
    T iou[N];
    for (int64_t first = 0; first < j.A; first += N) {
      const int n = load(j, first, b);
      T x1 = b.x1[0], y1 = b.y1[0], x2 = b.x2[0], y2 = b.y2[0];
      for (int l = 1; l < N; l++) x1 = lower(x1, b.x1[l]), y1 = lower(y1, b.y1[l]), x2 = upper(x2, b.x2[l]), y2 = upper(y2, b.y2[l]);
      int64_t hits = 0;
      for (int64_t g = 0; g < j.G; g++) {
        near[hits] = int32_t(g);
        hits += (o.x1[g] < x2) & (o.x2[g] > x1) & (o.y1[g] < y2) & (o.y2[g] > y1);
      }
      T top[N] = {};
      Int<T> who[N] = {};
      for (int64_t k = 0; k < hits; k++) {
        const int64_t g = near[k];
        overlaps(b, o, g, iou);
        for (int l = 0; l < N; l++) {
          who[l] = iou[l] > top[l] ? Int<T>(g) : who[l];
          top[l] = upper(iou[l], top[l]);
        }
        if (!j.low_quality) continue;
        for (int l = 0; l < N; l++) iou[l] = upper(iou[l], T(0));
        T m = most<N>(iou);
        if (m > best[g]) best[g] = m, where[g].clear();
        if (m == best[g] && m > 0) where[g].push_back(int32_t(first / N));
      }
      for (int l = 0; l < n; l++) {
        int8_t lab = top[l] >= j.lo && top[l] < j.hi ? 0 : 2;
        lab = top[l] >= j.pos ? 1 : lab;
        j.label[first + l] = lab, j.iou[first + l] = top[l], j.gt_index[first + l] = lab == 1 ? who[l] : 0;
      }
    }
    if (!j.low_quality) return;
    for (int64_t g = 0; g < j.G; g++) {                     // later objects overrule earlier ones
      if (!(best[g] >= j.min_pos)) continue;
      const bool none = best[g] == 0;                       // nothing touches it: every prior shares the best overlap, 0
      const int64_t blocks = none ? (j.A + N - 1) / N : int64_t(where[g].size());
      bool done = false;
      for (int64_t k = 0; k < blocks && !done; k++) {
        const int64_t first = N * (none ? k : where[g][k]);
        const int n = load(j, first, b);
        overlaps(b, o, g, iou);
        for (int l = 0; l < n && !done; l++)
          if (iou[l] == best[g] || (none && iou[l] != iou[l])) j.label[first + l] = 1, j.gt_index[first + l] = g, done = !j.all;
      }
    }
  }
};

template <class T> void assign(const Tensor& priors, const Tensor& objects, Job<T> j) {
  j.priors = (const T*)priors.const_data_ptr(), j.A = priors.size(0), j.G = objects.size(0);
  const T* p = (const T*)objects.const_data_ptr();
  refuse_nan("max_iou_assign", "priors", j.priors, 4 * j.A), refuse_nan("max_iou_assign", "objects", p, 4 * j.G);
  if (j.G == 0) {
    std::fill_n(j.gt_index, j.A, 0), std::fill_n(j.label, j.A, 0), std::fill_n(j.iou, j.A, T(0));
    return;
  }
  Boxes<T> o{std::vector<T>(j.G), std::vector<T>(j.G), std::vector<T>(j.G), std::vector<T>(j.G), std::vector<T>(j.G)};
  for (int64_t g = 0; g < j.G; g++, p += 4) o.x1[g] = p[0], o.y1[g] = p[1], o.x2[g] = p[2], o.y2[g] = p[3], o.area[g] = (p[2] - p[0]) * (p[3] - p[1]);
  j.objects = &o;
  dispatch<Assign<T>>((const Job<T>*)&j);
}

std::tuple<Tensor, Tensor, Tensor> max_iou_assign(const Tensor& priors_, const Tensor& objects_, double pos, double lo, double hi,
                                                  double min_pos, bool low_quality, bool all) {
  Tensor priors = ts::contiguous(priors_), objects = ts::contiguous(objects_);
  require(priors.dim() == 2 && priors.size(1) == 4 && objects.dim() == 2 && objects.size(1) == 4 && priors.scalar_type() == objects.scalar_type(),
          "max_iou_assign: priors and objects must be [N,4], of one type");
  const int64_t A = priors.size(0);
  Tensor gt_index = ts::new_empty(priors, {A}, ScalarType::Long), label = ts::new_empty(priors, {A}, ScalarType::Char), iou = ts::new_empty(priors, {A});
  by_type("max_iou_assign", priors, [&](auto t) {
    using T = decltype(t);
    assign<T>(priors, objects, {nullptr, 0, 0, nullptr, T(pos), T(lo), T(hi), T(min_pos), low_quality, all,
                                (int64_t*)gt_index.mutable_data_ptr(), (int8_t*)label.mutable_data_ptr(), (T*)iou.mutable_data_ptr()});
  });
  return {gt_index, label, iou};
}

}  // namespace
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(notebook_det, CPU, m) { m.impl("max_iou_assign", TORCH_BOX(&ndet::max_iou_assign)); }
