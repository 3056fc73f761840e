// The half of deformable convolution that is not a matrix product (v1, v2 with a mask; groups; groups of offsets).
//
// A convolution is a matrix product: the pixels under the kernel, one row per place, times the weights. Here the pixels are read
// between the grid points, each kernel cell at its own offset. `deform_rows` makes the rows of some places, `deform_rows_backward`
// takes their gradient back to map, offsets and mask; the notebook multiplies, some hundred places at a time, so that rows stay in
// the cache. The map lies channels last: a sample is four runs of numbers.
#include "common.h"
#include <algorithm>
#include <optional>

namespace ndet {
namespace {

namespace ts = torch::stable;

struct Shape {
  int64_t B, C, H, W, K, kh, kw, sh, sw, ph, pw, dh, dw, groups, sets, oh, ow;   // sets: groups of offsets
  int64_t cells() const { return kh * kw; }
  int64_t places() const { return B * oh * ow; }
};

template <class T> struct Job {
  Shape s;
  const T *x, *offset, *mask;                      // [B,H,W,C]; [B,sets·cells·2,oh,ow]; [B,sets·cells,oh,ow] or null
  T *rows;                                         // [places,groups,cells,C/groups]: made, or their gradient
  T *dx, *doffset, *dmask;
  int64_t first;                                   // place that rows begins with
};

// Where cell k of one place reads for one set of offsets, and how much of its four neighbours
template <class T> struct Sample {
  const T* at[4] = {};
  int64_t where[4] = {};
  T w[4] = {}, fy = 0, fx = 0, m = 0;
  bool in[4] = {};

  INLINE bool make(const Job<T>& j, int64_t b, int64_t oy, int64_t ox, int64_t set, int64_t k) {
    const Shape& s = j.s;
    const int64_t area = s.oh * s.ow, here = oy * s.ow + ox, n = set * s.cells() + k;
    const T* o = j.offset + (b * s.sets * s.cells() * 2 + 2 * n) * area + here;
    m = j.mask ? j.mask[(b * s.sets * s.cells() + n) * area + here] : T(1);
    const T y = T(oy * s.sh - s.ph + k / s.kw * s.dh) + o[0], x = T(ox * s.sw - s.pw + k % s.kw * s.dw) + o[area];
    for (int c = 0; c < 4; c++) in[c] = false, w[c] = 0, where[c] = 0, at[c] = j.x;
    fy = fx = 0;
    if (!(y > T(-1) && y < T(s.H) && x > T(-1) && x < T(s.W))) return false;      // a number that is none reads nothing
    const T y0 = std::floor(y), x0 = std::floor(x);
    fy = y - y0, fx = x - x0;
    for (int c = 0; c < 4; c++) {
      const int64_t r = int64_t(y0) + c / 2, q = int64_t(x0) + c % 2;
      in[c] = r >= 0 && r < s.H && q >= 0 && q < s.W;
      if (in[c]) where[c] = ((b * s.H + r) * s.W + q) * s.C, at[c] = j.x + where[c], w[c] = (c / 2 ? fy : 1 - fy) * (c % 2 ? fx : 1 - fx);
    }
    return true;
  }
};

// f(first channel, end, set, group): runs of channels of one set of offsets and one group of weights
template <class F> INLINE void runs(const Shape& s, const F& f) {
  const int64_t per_set = s.C / s.sets, per_group = s.C / s.groups;
  for (int64_t c = 0; c < s.C;) {
    const int64_t set = c / per_set, group = c / per_group, end = std::min((set + 1) * per_set, (group + 1) * per_group);
    f(c, end, set, group);
    c = end;
  }
}

template <class T> INLINE T* row_of(const Job<T>& j, int64_t place, int64_t k, int64_t group, int64_t c) {
  const int64_t per_group = j.s.C / j.s.groups;
  return j.rows + ((place - j.first) * j.s.groups + group) * j.s.cells() * per_group + k * per_group + (c - group * per_group);
}

template <class T> struct Rows {
  static INLINE void run(const Job<T>* job, int64_t begin, int64_t end) {
    const Job<T>& j = *job;
    const Shape s = j.s;
    for (int64_t p = begin; p < end; p++) {
      const int64_t b = p / (s.oh * s.ow), oy = p / s.ow % s.oh, ox = p % s.ow;
      for (int64_t k = 0; k < s.cells(); k++) {
        Sample<T> t;
        int64_t made = -1;
        runs(s, [&](int64_t c, int64_t end, int64_t set, int64_t group) __attribute__((always_inline)) {
          if (set != made) t.make(j, b, oy, ox, set, k), made = set;
          const T *v0 = t.at[0] + c, *v1 = t.at[1] + c, *v2 = t.at[2] + c, *v3 = t.at[3] + c, a = t.w[0] * t.m, e = t.w[1] * t.m, g = t.w[2] * t.m, h = t.w[3] * t.m;
          T* __restrict to = row_of(j, p, k, group, c);
          const int64_t n = end - c;
          if (t.in[0] && t.in[1] && t.in[2] && t.in[3])
            for (int64_t i = 0; i < n; i++) to[i] = a * v0[i] + e * v1[i] + g * v2[i] + h * v3[i];
          else {
            for (int64_t i = 0; i < n; i++) to[i] = 0;
            for (int q = 0; q < 4; q++)
              if (t.in[q]) add(to, t.at[q] + c, t.w[q] * t.m, n);
          }
        });
      }
    }
  }
};

// Gradient of the rows → gradients of offsets and mask, for which products with each of the four neighbours are all it takes
// (slopes), and added to channels from … upto - 1 of the map (map). One thread does both at once; several share the places for the
// first and the channels for the second, so that no two add to one number.
template <bool slopes, bool map, class T> struct Back {
  static INLINE T product(const T* a, const T* b, int64_t n) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
  }
  static INLINE void write(const Job<T>& j, const Sample<T>& t, const T* d, int64_t b, int64_t n, int64_t here) {
    const int64_t area = j.s.oh * j.s.ow, all = j.s.sets * j.s.cells();
    T* o = j.doffset + (b * all * 2 + 2 * n) * area + here;
    o[0] = t.m * ((1 - t.fx) * (d[2] - d[0]) + t.fx * (d[3] - d[1]));
    o[area] = t.m * ((1 - t.fy) * (d[1] - d[0]) + t.fy * (d[3] - d[2]));
    if (j.dmask) j.dmask[(b * all + n) * area + here] = t.w[0] * d[0] + t.w[1] * d[1] + t.w[2] * d[2] + t.w[3] * d[3];
  }
  static INLINE void run(const Job<T>* job, int64_t begin, int64_t end, int64_t from, int64_t upto) {
    const Job<T>& j = *job;
    const Shape s = j.s;
    for (int64_t p = begin; p < end; p++) {
      const int64_t b = p / (s.oh * s.ow), here = p % (s.oh * s.ow), oy = here / s.ow, ox = here % s.ow;
      for (int64_t k = 0; k < s.cells(); k++) {
        Sample<T> t;
        int64_t made = -1;
        T d[4] = {};
        runs(s, [&](int64_t c, int64_t end, int64_t set, int64_t group) __attribute__((always_inline)) {
          if (set != made) {
            if (slopes && made >= 0) write(j, t, d, b, made * s.cells() + k, here);
            t.make(j, b, oy, ox, set, k), made = set;
            for (int q = 0; q < 4; q++) d[q] = 0;
          }
          const T* g = row_of(j, p, k, group, c);
          const int64_t c0 = std::max(c, from), c1 = std::min(end, upto);
          for (int q = 0; q < 4; q++) {
            if (!t.in[q]) continue;
            if (slopes) d[q] += product(g, t.at[q] + c, end - c);
            if (map && c0 < c1) add(j.dx + t.where[q] + c0, (const T*)g + (c0 - c), t.w[q] * t.m, c1 - c0);
          }
        });
        if (slopes) write(j, t, d, b, made * s.cells() + k, here);
      }
    }
  }
};

Shape shape_of(const Tensor& x, const Tensor& offset, const std::optional<Tensor>& mask, const std::vector<int64_t>& g, int64_t groups) {
  require(x.dim() == 4 && offset.dim() == 4 && g.size() == 8, "deform_rows: x and offset must be [B,C,H,W], and the geometry eight numbers");
  Shape s{x.size(0), x.size(1), x.size(2), x.size(3), 0, g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], groups, 0, offset.size(2), offset.size(3)};
  require(s.kh > 0 && s.kw > 0 && offset.size(0) == s.B && offset.size(1) % (2 * s.cells()) == 0, "deform_rows: offset must be [B, 2 · sets · kernel cells, h, w]");
  s.sets = offset.size(1) / (2 * s.cells());
  require(s.sets > 0 && groups > 0 && s.C % s.sets == 0 && s.C % groups == 0, "deform_rows: channels must divide by the groups and by the sets of offsets");
  require(!mask || (mask->dim() == 4 && mask->size(0) == s.B && mask->size(1) == s.sets * s.cells() && mask->size(2) == s.oh && mask->size(3) == s.ow &&
          mask->scalar_type() == x.scalar_type()), "deform_rows: mask must be [B, sets · kernel cells, h, w], of the type of x");
  require(offset.scalar_type() == x.scalar_type(), "deform_rows: offset must be of the type of x");
  return s;
}

std::optional<Tensor> whole(const std::optional<Tensor>& t) { return t ? std::optional<Tensor>(ts::contiguous(*t)) : std::nullopt; }

Tensor deform_rows(const Tensor& x_, const Tensor& offset_, const std::optional<Tensor>& mask_, const std::vector<int64_t>& geometry, int64_t groups, int64_t first, int64_t count) {
  Tensor x = ts::contiguous(x_, NHWC), offset = ts::contiguous(offset_), rows;
  std::optional<Tensor> mask = whole(mask_);
  const Shape s = shape_of(x, offset, mask, geometry, groups);
  require(first >= 0 && count >= 0 && first + count <= s.places(), "deform_rows: there are not so many places");
  rows = ts::new_empty(x, {count, groups, s.cells() * (s.C / groups)});
  by_type("deform_rows", x, [&](auto t) {
    using T = decltype(t);
    Job<T> j{s, data<T>(x), data<T>(offset), mask ? data<T>(*mask) : nullptr, out<T>(rows), nullptr, nullptr, nullptr, first};
    if (s.C) spread(count, 1e-6 * count * s.cells() * s.C, [&](int64_t a, int64_t b) { dispatch<Rows<T>>((const Job<T>*)&j, first + a, first + b); });
  }, "x");
  return rows;
}

void deform_rows_backward(const Tensor& grad_, const Tensor& x_, const Tensor& offset_, const std::optional<Tensor>& mask_, const std::vector<int64_t>& geometry, int64_t groups,
                          int64_t first, Tensor dx, Tensor doffset, std::optional<Tensor> dmask) {
  Tensor grad = ts::contiguous(grad_), x = ts::contiguous(x_, NHWC), offset = ts::contiguous(offset_);
  std::optional<Tensor> mask = whole(mask_);
  const Shape s = shape_of(x, offset, mask, geometry, groups);
  const int64_t count = grad.size(0);
  require(grad.numel() == count * s.cells() * s.C && grad.scalar_type() == x.scalar_type() && first >= 0 && first + count <= s.places(), "deform_rows_backward: the gradient does not fit");
  require(dx.numel() == x.numel() && channels_last(dx) && doffset.numel() == offset.numel() && doffset.is_contiguous() && bool(dmask) == bool(mask) &&
          (!mask || (dmask->is_contiguous() && dmask->numel() == mask->numel())), "deform_rows_backward: the gradients to add to do not fit");
  by_type("deform_rows_backward", x, [&](auto t) {
    using T = decltype(t);
    const Job<T> j{s, data<T>(x), data<T>(offset), mask ? data<T>(*mask) : nullptr, const_cast<T*>(data<T>(grad)), out<T>(dx), out<T>(doffset), mask ? out<T>(*dmask) : nullptr, first};
    const double ms = 2e-6 * count * s.cells() * s.C;
    if (!s.C) return;
    if (ts::get_num_threads() == 1 || ms < 20) return dispatch<Back<true, true, T>>((const Job<T>*)&j, first, first + count, int64_t(0), s.C);
    spread(count, ms, [&](int64_t a, int64_t b) { dispatch<Back<true, false, T>>((const Job<T>*)&j, first + a, first + b, int64_t(0), s.C); });
    spread(s.C, ms, [&](int64_t a, int64_t b) { dispatch<Back<false, true, T>>((const Job<T>*)&j, first, first + count, a, b); });
  }, "x");
}

}  // namespace
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(notebook_det, CPU, m) {
  m.impl("deform_rows", TORCH_BOX(&ndet::deform_rows));
  m.impl("deform_rows_backward", TORCH_BOX(&ndet::deform_rows_backward));
}
