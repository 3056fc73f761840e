// Overlaps of all pairs of boxes: IoU, IoF or GIoU, [N,M], operation by operation as in the notebook's formula.
//
// The second boxes are turned into one array per coordinate, so that a row of the answer is computed 16 pairs at a time. What is
// slow about the formula in torch is not the arithmetic but its ten temporary matrices.
#include "common.h"
#include <algorithm>
#include <limits>

namespace ndet {
namespace {

namespace ts = torch::stable;
enum Kind { IOU, IOF, GIOU };

template <class T> struct Job {
  const T* a;
  int64_t N, M;
  const T *x1, *y1, *x2, *y2, *area, *nan;          // of the second boxes; nan: 0, or not a number where a coordinate is none
  T* to;
};

template <class T> INLINE T at_least(T x, T low) { return x < low ? low : x; }     // what is not a number stays

template <int kind, class T> struct Pairs {
  static INLINE void run(const Job<T>* job, int64_t begin, int64_t end) {
    const Job<T> j = *job;
    const T eps = T(1e-6);
    constexpr int64_t W = 512;                       // a piece of a row; its last lanes may go over the edge, so it is made apart
    T piece[W];
    for (int64_t i = begin; i < end; i++) {
      const T *a = j.a + 4 * i, x1 = a[0], y1 = a[1], x2 = a[2], y2 = a[3], area = (x2 - x1) * (y2 - y1);
      const T nan = x1 != x1 || y1 != y1 || x2 != x2 || y2 != y2 ? std::numeric_limits<T>::quiet_NaN() : T(0);
      for (int64_t k = 0; k < j.M; k += W) {
        const int64_t n = std::min(W, j.M - k), lanes = (n + LANES<T> - 1) / LANES<T> * LANES<T>;
        for (int64_t l = 0; l < lanes; l++) {
          const T bx1 = j.x1[k + l], by1 = j.y1[k + l], bx2 = j.x2[k + l], by2 = j.y2[k + l];
          const T w = at_least(lower(x2, bx2) - upper(x1, bx1), T(0)), h = at_least(lower(y2, by2) - upper(y1, by1), T(0));
          const T inter = w * h + (nan + j.nan[k + l]);
          if (kind == IOF) { piece[l] = inter / at_least(area, eps); continue; }
          const T both = at_least(area + j.area[k + l] - inter, eps), iou = inter / both;
          if (kind == IOU) { piece[l] = iou; continue; }
          const T W_ = at_least(upper(x2, bx2) - lower(x1, bx1), T(0)), H_ = at_least(upper(y2, by2) - lower(y1, by1), T(0));
          const T hull = at_least(W_ * H_, eps);
          piece[l] = iou - (hull - both) / hull;
        }
        std::memcpy(j.to + i * j.M + k, piece, n * sizeof(T));
      }
    }
  }
};

Tensor box_overlaps(const Tensor& a_, const Tensor& b_, int64_t kind) {
  Tensor a = ts::contiguous(a_), b = ts::contiguous(b_);
  require(a.dim() == 2 && a.size(1) == 4 && b.dim() == 2 && b.size(1) == 4 && a.scalar_type() == b.scalar_type(), "box_overlaps: boxes must be [N,4] and [M,4], of one type");
  require(kind >= IOU && kind <= GIOU, "box_overlaps: kind must be 0 (IoU), 1 (IoF) or 2 (GIoU)");
  const int64_t N = a.size(0), M = b.size(0);
  Tensor to = ts::new_empty(a, {N, M});
  by_type("box_overlaps", a, [&](auto t) {
    using T = decltype(t);
    const int64_t wide = (M + LANES<T> - 1) / LANES<T> * LANES<T>;
    std::vector<T> soa(6 * wide);
    T* s = soa.data();
    const T* p = data<T>(b);
    for (int64_t k = 0; k < M; k++, p += 4) {
      for (int c = 0; c < 4; c++) s[c * wide + k] = p[c];
      s[4 * wide + k] = (p[2] - p[0]) * (p[3] - p[1]);
      s[5 * wide + k] = p[0] != p[0] || p[1] != p[1] || p[2] != p[2] || p[3] != p[3] ? std::numeric_limits<T>::quiet_NaN() : T(0);
    }
    Job<T> j{data<T>(a), N, M, s, s + wide, s + 2 * wide, s + 3 * wide, s + 4 * wide, s + 5 * wide, out<T>(to)};
    spread(N, 2.5e-6 * N * M, [&](int64_t from, int64_t upto) {
      kind == IOU ? dispatch<Pairs<IOU, T>>((const Job<T>*)&j, from, upto)
          : kind == IOF ? dispatch<Pairs<IOF, T>>((const Job<T>*)&j, from, upto) : dispatch<Pairs<GIOU, T>>((const Job<T>*)&j, from, upto);
    });
  });
  return to;
}

}  // namespace
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(notebook_det, CPU, m) { m.impl("box_overlaps", TORCH_BOX(&ndet::box_overlaps)); }
