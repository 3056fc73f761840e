// Deformable convolution (v1, v2 with a mask; groups; groups of offsets).
//
// A convolution is a matrix product: the pixels under the kernel, one row per place, times the weights. Here the pixels are read
// between the grid points, each kernel cell at its own offset. `deform_product` does both for a dozen places at a time (float32,
// one group). `deform_rows` makes the rows of some places for a product elsewhere, `deform_rows_backward` takes their gradient back
// to map, offsets and mask. The map lies channels last: a sample is four runs of numbers.
#include "common.h"
#include <algorithm>
#include <memory>
#include <optional>
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

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

// to = n channels of a sample, from channel c on
template <class T> INLINE void mix(const Sample<T>& t, int64_t c, T* __restrict to, int64_t n) {
  const T *v0 = t.at[0] + c, *v1 = t.at[1] + c, *v2 = t.at[2] + c, *v3 = t.at[3] + c, a = t.w[0] * t.m, e = t.w[1] * t.m, g = t.w[2] * t.m, h = t.w[3] * t.m;
  if (t.in[0] && t.in[1] && t.in[2] && t.in[3])
    for (int64_t i = 0; i < n; i++) to[i] = a * v0[i] + e * v1[i] + g * v2[i] + h * v3[i];
  else {
    for (int64_t i = 0; i < n; i++) to[i] = 0;
    for (int q = 0; q < 4; q++)
      if (t.in[q]) add(to, t.at[q] + c, t.w[q] * t.m, n);
  }
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
          mix(t, c, row_of(j, p, k, group, c), end - c);
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

// ------------------------------------------------------------------------------------------------------------ rows and product in one
//
// The product is nine tenths of the work, and a processor multiplies at full speed only what it need not fetch. So a tile of a few
// places has its sums in registers; its rows, 256 channels of one kernel cell, in the first cache, where they have just been made;
// the weights of that cell in the second, where some hundred places in turn find them. (Asking for the next tile's pixels early
// does not help: it costs what it saves.)
constexpr int NARROW = 6, WIDE = 12;                  // rows of a tile whose sums fit 16 or 32 registers, two registers a row
constexpr int64_t CHUNK = 256, BLOCK = 120;           // channels and places at a time
constexpr int64_t STRIDE = CHUNK + 16;                // from row to row, so that rows do not share lines of the cache

// sums [rows,columns] = (or +=) rows [rows,n] · weights [n,columns]; a step of the sums is `step`
struct Kernel {
  int64_t rows, columns;
  void (*run)(const float* rows, const float* weights, int64_t n, float* sums, int64_t step, bool more);
};

constexpr int64_t PLAIN = 4;
void plain(const float* a, const float* w, int64_t n, float* sums, int64_t step, bool more) {
  for (int64_t r = 0; r < PLAIN; r++) {
    float s[LANES<float>];
    for (int l = 0; l < LANES<float>; l++) s[l] = more ? sums[r * step + l] : 0;
    for (int64_t k = 0; k < n; k++) add(s, w + k * LANES<float>, a[r * STRIDE + k], LANES<float>);
    for (int l = 0; l < LANES<float>; l++) sums[r * step + l] = s[l];
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) void narrow(const float* a, const float* w, int64_t n, float* sums, int64_t step, bool more) {
  __m256 s[NARROW][2];
#pragma GCC unroll 16
  for (int r = 0; r < NARROW; r++)
    for (int h = 0; h < 2; h++) s[r][h] = more ? _mm256_loadu_ps(sums + r * step + 8 * h) : _mm256_setzero_ps();
  for (int64_t k = 0; k < n; k++) {
    const __m256 w0 = _mm256_loadu_ps(w + 16 * k), w1 = _mm256_loadu_ps(w + 16 * k + 8);
#pragma GCC unroll 16
    for (int r = 0; r < NARROW; r++) {
      const __m256 v = _mm256_set1_ps(a[r * STRIDE + k]);
      s[r][0] = _mm256_fmadd_ps(v, w0, s[r][0]), s[r][1] = _mm256_fmadd_ps(v, w1, s[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < NARROW; r++)
    for (int h = 0; h < 2; h++) _mm256_storeu_ps(sums + r * step + 8 * h, s[r][h]);
}
__attribute__((target("avx512f"))) void wide(const float* a, const float* w, int64_t n, float* sums, int64_t step, bool more) {
  __m512 s[WIDE][2];
#pragma GCC unroll 16
  for (int r = 0; r < WIDE; r++)
    for (int h = 0; h < 2; h++) s[r][h] = more ? _mm512_loadu_ps(sums + r * step + 16 * h) : _mm512_setzero_ps();
  for (int64_t k = 0; k < n; k++) {
    const __m512 w0 = _mm512_loadu_ps(w + 32 * k), w1 = _mm512_loadu_ps(w + 32 * k + 16);
#pragma GCC unroll 16
    for (int r = 0; r < WIDE; r++) {
      const __m512 v = _mm512_set1_ps(a[r * STRIDE + k]);
      s[r][0] = _mm512_fmadd_ps(v, w0, s[r][0]), s[r][1] = _mm512_fmadd_ps(v, w1, s[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < WIDE; r++)
    for (int h = 0; h < 2; h++) _mm512_storeu_ps(sums + r * step + 16 * h, s[r][h]);
}
#endif

Kernel kernel() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa() == 2) return {WIDE, 32, wide};
  if (isa() == 1 && __builtin_cpu_supports("fma")) return {NARROW, 16, narrow};
#endif
  return {PLAIN, LANES<float>, plain};
}

struct Multiply {
  Job<float> job;
  Kernel kernel;
  const float* panels;                                // [cells, C'/columns, C, columns]: the weights, a strip of columns after the other
  float* out;                                         // [places,C']

  struct Place { int64_t b, y, x; };

  // Channels from … upto - 1 of kernel cell k at one place
  static INLINE void sample(const Job<float>& j, Place at, int64_t k, int64_t from, int64_t upto, float* row) {
    const int64_t per_set = j.s.C / j.s.sets;
    for (int64_t c = from; c < upto;) {
      const int64_t set = c / per_set, end = std::min((set + 1) * per_set, upto);
      Sample<float> t;
      t.make(j, at.b, at.y, at.x, set, k);
      mix(t, c, row + (c - from), end - c);
      c = end;
    }
  }
  static INLINE void run(const Multiply* m, int64_t begin, int64_t end) {
    const Shape s = m->job.s;
    const Kernel f = m->kernel;
    const int64_t strips = (s.K + f.columns - 1) / f.columns;
    Place places[BLOCK];
    alignas(64) float rows[WIDE * STRIDE], rest[WIDE * 32];
    for (int64_t first = begin; first < end; first += BLOCK) {
      const int64_t block = std::min(BLOCK, end - first);
      for (int64_t p = 0; p < block; p++) places[p] = {(first + p) / (s.oh * s.ow), (first + p) / s.ow % s.oh, (first + p) % s.ow};
      for (int64_t k = 0; k < s.cells(); k++)
        for (int64_t c = 0; c < s.C; c += CHUNK) {
          const int64_t n = std::min(CHUNK, s.C - c);
          const bool more = k || c;
          for (int64_t p = 0; p < block; p += f.rows) {
            const int64_t count = std::min(f.rows, block - p);
            for (int64_t r = 0; r < count; r++) sample(m->job, places[p + r], k, c, c + n, rows + r * STRIDE);
            for (int64_t r = count; r < f.rows; r++) std::fill(rows + r * STRIDE, rows + r * STRIDE + n, 0.f);
            for (int64_t t = 0; t < strips; t++) {
              const float* w = m->panels + ((k * strips + t) * s.C + c) * f.columns;
              float* to = m->out + (first + p) * s.K + t * f.columns;
              const int64_t width = std::min(f.columns, s.K - t * f.columns);
              if (count == f.rows && width == f.columns) { f.run(rows, w, n, to, s.K, more); continue; }
              for (int64_t r = 0; r < count && more; r++) std::copy(to + r * s.K, to + r * s.K + width, rest + r * f.columns);   // at the edge: in a copy
              f.run(rows, w, n, rest, f.columns, more);
              for (int64_t r = 0; r < count; r++) std::copy(rest + r * f.columns, rest + r * f.columns + width, to + r * s.K);
            }
          }
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

Tensor deform_product(const Tensor& x_, const Tensor& offset_, const std::optional<Tensor>& mask_, const Tensor& weight_, const std::vector<int64_t>& geometry) {
  Tensor x = ts::contiguous(x_, NHWC), offset = ts::contiguous(offset_), weight = ts::contiguous(weight_);
  std::optional<Tensor> mask = whole(mask_);
  Shape s = shape_of(x, offset, mask, geometry, 1);
  require(x.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float, "deform_product: everything must be float32");
  require(weight.dim() == 4 && weight.size(1) == s.C && weight.size(2) == s.kh && weight.size(3) == s.kw, "deform_product: weight must be [C',C,kh,kw]");
  s.K = weight.size(0);
  Tensor result = ts::new_empty(x, {s.places(), s.K});
  if (!s.C) return ts::zero_(result);
  const Kernel f = kernel();
  const int64_t strips = (s.K + f.columns - 1) / f.columns;
  std::unique_ptr<float[]> panels(new float[s.cells() * strips * s.C * f.columns + 1]());
  const float* w = data<float>(weight);
  for (int64_t t = 0; t < strips; t++)
    for (int64_t first = 0; first < s.C; first += 16)                              // a few channels of all columns: what is written stays in the cache
      for (int64_t o = t * f.columns; o < std::min((t + 1) * f.columns, s.K); o++)
        for (int64_t c = first; c < std::min(first + 16, s.C); c++)
          for (int64_t k = 0; k < s.cells(); k++) panels[((k * strips + t) * s.C + c) * f.columns + o % f.columns] = w[(o * s.C + c) * s.cells() + k];
  const Multiply m{{s, data<float>(x), data<float>(offset), mask ? data<float>(*mask) : nullptr, nullptr, nullptr, nullptr, nullptr, 0}, f, panels.get(), out<float>(result)};
  spread(s.places(), 2e-8 * s.places() * s.cells() * s.C * s.K, [&](int64_t a, int64_t b) { dispatch<Multiply>(&m, a, b); });
  return result;
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
  m.impl("deform_product", TORCH_BOX(&ndet::deform_product));
  m.impl("deform_rows", TORCH_BOX(&ndet::deform_rows));
  m.impl("deform_rows_backward", TORCH_BOX(&ndet::deform_rows_backward));
}
