// A small mask of probabilities, stretched over its box: as pixels of the picture, or straight to COCO's run-length code.
//
// A pixel of the answer is a bilinear mixture of four mask cells, compared with a threshold. Along one line of the picture (a row
// for pixels; a column for the code, which runs down the columns) the mixture across the line is the same for all pixels, so it is
// made once, and each pixel mixes two numbers. A result that lies within rounding of the threshold is made again by `exact`, which
// goes step by step like torch's grid_sample: the pixels are those of the notebook's formula, to the last one.
#include "common.h"
#include <algorithm>
#include <memory>

namespace ndet {
namespace {

namespace ts = torch::stable;

// Where the pixels first … end - 1 of an axis read: cells below and below + 1 (-1 and `cells` are outside and hold 0)
struct Axis {
  int first = 0, end = 0;
  std::vector<int32_t> below;
  std::vector<float> at, low, high;                // position in cells, weight of the lower cell, of the upper one

  void make(float lo, float hi, int cells, int64_t limit) {
    const double reach = (double(hi) - lo) / (2. * cells) + 1;
    first = int(std::max(0., std::floor(std::max(lo - reach, 0.))));
    end = int(std::min(double(limit), std::ceil(std::min(hi + reach, double(limit)))));
    const int n = std::max(0, end - first), pad = (n + 63) / 64 * 64;
    below.assign(pad, -1), at.assign(pad, -1.f), low.assign(pad, 0.f), high.assign(pad, 0.f);
    for (int i = 0; i < n; i++) {
      const float x = (float(first + i) + .5f - lo) / (hi - lo) * 2.f - 1.f;
      at[i] = float(double(x + 1.f) * double(cells / 2.f) - .5);      // one rounding, as a fused multiply-add has
      const float f = std::floor(at[i]);
      if (!(f >= -1.f && f < float(cells))) { at[i] = -2; continue; } // sees nothing: below stays -1, the weights 0
      below[i] = int32_t(f), high[i] = at[i] - f, low[i] = 1.f - high[i];
    }
  }
};

struct Picture { const float *masks, *boxes; int64_t N, h, w, H, W; float threshold; };

INLINE float fused(float a, float b, float c) { return float(double(a) * double(b) + double(c)); }

// One mask in its box. `along` is the axis of the line, `across` the other one.
struct Pasted {
  const Picture& p;
  const float* mask;
  Axis x, y;
  float margin = 0;                                // no mixture is further than this from the exact one
  std::vector<float> line;                         // the mask's cells along a line, mixed across it, with a 0 at either end
  std::vector<uint8_t> bits;

  explicit Pasted(const Picture& picture) : p(picture), mask(nullptr) {}

  bool make(int64_t n) {
    const float* b = p.boxes + 4 * n;
    mask = p.masks + n * p.h * p.w;
    bool finite = true;
    for (int k = 0; k < 4; k++) finite &= std::isfinite(b[k]);
    if (!finite || !(b[2] > b[0]) || !(b[3] > b[1])) return false;
    x.make(b[0], b[2], int(p.w), p.W), y.make(b[1], b[3], int(p.h), p.H);
    float most = 0;
    for (int64_t i = 0; i < p.h * p.w; i++) most = std::max(most, std::abs(mask[i]));
    margin = 2e-6f * most;
    return x.first < x.end && y.first < y.end;
  }

  float cell(int r, int c) const { return r < 0 || c < 0 || r >= p.h || c >= p.w ? 0.f : mask[r * p.w + c]; }

  uint8_t exact(int r, int c) const {
    if (y.at[r] < -1 || x.at[c] < -1) return 0.f >= p.threshold;
    const int i = y.below[r], k = x.below[c];
    const float e = x.low[c], w = x.high[c], s = y.low[r], n = y.high[r];
    return fused(cell(i + 1, k + 1), w * n, fused(cell(i + 1, k), e * n, fused(cell(i, k + 1), w * s, cell(i, k) * (e * s)))) >= p.threshold;
  }
};

// bits[i] for the pixels of one line; false: none is set (and bits are left as they are)
struct Line {
  static INLINE void run(Pasted* pasted, bool row, int i, bool* any) {
    Pasted& m = *pasted;
    const Axis &along = row ? m.x : m.y, &across = row ? m.y : m.x;
    const int cells = int(row ? m.p.w : m.p.h), cut = int(row ? m.p.h : m.p.w), n = along.end - along.first, k = across.below[i];
    const int64_t step = row ? 1 : m.p.w, other = row ? m.p.w : 1;
    const bool first = k >= 0 && k < cut, second = k + 1 >= 0 && k + 1 < cut;   // a cell outside is 0, whatever its neighbours hold
    const float lo = across.low[i], hi = across.high[i], *a = m.mask + (first ? k : 0) * other, *b = m.mask + (second ? k + 1 : 0) * other;
    float* line = m.line.data() + 1;
    line[-1] = line[cells] = line[cells + 1] = 0;
    float most = 0;
    if (first && second)
      for (int c = 0; c < cells; c++) line[c] = lo * a[c * step] + hi * b[c * step];
    else
      for (int c = 0; c < cells; c++) line[c] = first ? lo * a[c * step] : second ? hi * b[c * step] : 0.f;
    for (int c = 0; c < cells; c++) most = upper(line[c], most);
    const float t = m.p.threshold, margin = m.margin;
    *any = !(most < t - margin);
    if (!*any) return;
    const int32_t* below = along.below.data();
    const float *low = along.low.data(), *high = along.high.data();
    uint8_t* bits = m.bits.data();
    int close = 0;
    for (int i = 0; i < n; i++) {
      const float v = low[i] * line[below[i]] + high[i] * line[below[i] + 1];
      bits[i] = v >= t;
      close |= (v - t < margin) & (t - v < margin);
    }
    if (!close) return;
    for (int c = 0; c < n; c++) {
      const float v = low[c] * line[below[c]] + high[c] * line[below[c] + 1];
      if (v - t < margin && t - v < margin) bits[c] = row ? m.exact(i, c) : m.exact(c, i);
    }
  }
};

INLINE bool fill(Pasted& m, bool row, int i) {
  bool any;
  dispatch<Line>(&m, row, i, &any);
  return any;
}

void room(Pasted& m) { m.line.resize(std::max(m.p.h, m.p.w) + 3), m.bits.resize(std::max(m.p.H, m.p.W) + 64); }

void paste(const Picture& p, bool* to, int64_t begin, int64_t end) {
  Pasted m(p);
  room(m);
  for (int64_t n = begin; n < end; n++) {
    bool* image = to + n * p.H * p.W;
    const bool some = m.make(n);
    int64_t done = 0;
    for (int y = m.y.first; some && y < m.y.end; y++) {
      if (!fill(m, true, y - m.y.first)) continue;
      const int64_t at = y * p.W + m.x.first;
      std::memset(image + done, 0, at - done);
      std::memcpy(image + at, m.bits.data(), m.x.end - m.x.first);
      done = at + m.x.end - m.x.first;
    }
    std::memset(image + done, 0, p.H * p.W - done);
  }
}

// The lengths of runs of 0 and 1 in turns, down the columns
struct Runs {
  std::vector<uint32_t> counts;
  uint64_t length = 0;
  uint8_t value = 0;
  void turn() { counts.push_back(uint32_t(length)), length = 0, value = !value; }
  void zeros(int64_t n) { if (n > 0 && value) turn(); length += n; }
  void bits(const uint8_t* b, int64_t n) {
    for (int64_t i = 0; i < n;) {
      uint64_t eight;
      if (i + 8 <= n && (std::memcpy(&eight, b + i, 8), eight == value * 0x0101010101010101ull)) { length += 8, i += 8; continue; }
      if (b[i] != value) turn();
      length++, i++;
    }
  }

  // COCO's characters: differences to the run before the last, five bits at a time
  void write(std::vector<uint8_t>& to) const {
    for (size_t i = 0; i < counts.size(); i++) {
      int64_t x = int64_t(counts[i]) - (i > 2 ? int64_t(counts[i - 2]) : 0);
      for (bool more = true; more;) {
        uint8_t c = x & 31;
        x >>= 5, more = c & 16 ? x != -1 : x != 0;
        to.push_back((more ? c | 32 : c) + 48);
      }
    }
  }
};

void encode(const Picture& p, std::vector<uint8_t>* to, int64_t begin, int64_t end) {
  Pasted m(p);
  room(m);
  Runs r;
  for (int64_t n = begin; n < end; n++) {
    r.counts.clear(), r.length = 0, r.value = 0;
    const bool some = m.make(n);
    int64_t done = 0;
    for (int x = m.x.first; some && x < m.x.end; x++) {
      if (!fill(m, false, x - m.x.first)) continue;
      const int64_t at = x * p.H + m.y.first;
      r.zeros(at - done);
      r.bits(m.bits.data(), m.y.end - m.y.first);
      done = at + m.y.end - m.y.first;
    }
    r.zeros(p.H * p.W - done);
    r.turn();
    r.write(to[n]);
  }
}

// Pixels that the masks' boxes cover, at most
double covered(const Picture& p) {
  double sum = 0;
  for (int64_t n = 0; n < p.N; n++) {
    const float* b = p.boxes + 4 * n;
    const double area = std::max(0., std::min<double>(b[2] - b[0], p.W)) * std::max(0., std::min<double>(b[3] - b[1], p.H));
    if (area == area) sum += area;
  }
  return sum;
}

Picture prepare(const Tensor& masks, const Tensor& boxes, int64_t H, int64_t W, double threshold) {
  require(masks.dim() == 3 && boxes.dim() == 2 && boxes.size(0) == masks.size(0) && boxes.size(1) == 4 && masks.scalar_type() == ScalarType::Float &&
          boxes.scalar_type() == ScalarType::Float, "paste_masks: masks must be [N,h,w] and boxes [N,4], float32");
  require(masks.numel() > 0 || masks.size(0) == 0, "paste_masks: masks must have at least one cell");
  require(H >= 0 && W >= 0 && H * W < (int64_t(1) << 32) && H < (1 << 30) && W < (1 << 30) && masks.size(1) < (1 << 20) && masks.size(2) < (1 << 20), "paste_masks: the picture is too large");
  return {data<float>(masks), data<float>(boxes), masks.size(0), masks.size(1), masks.size(2), H, W, float(threshold)};
}

Tensor paste_masks(const Tensor& masks_, const Tensor& boxes_, int64_t H, int64_t W, double threshold) {
  Tensor masks = ts::contiguous(masks_), boxes = ts::contiguous(boxes_);
  const Picture p = prepare(masks, boxes, H, W, threshold);
  Tensor pixels = ts::new_empty(masks, {p.N, H, W}, ScalarType::Bool);
  bool* to = out<bool>(pixels);
  spread(p.N, .5e-6 * p.N * H * W + 1e-6 * covered(p), [&](int64_t a, int64_t b) { paste(p, to, a, b); });
  return pixels;
}

std::tuple<Tensor, Tensor> paste_rle(const Tensor& masks_, const Tensor& boxes_, int64_t H, int64_t W, double threshold) {
  Tensor masks = ts::contiguous(masks_), boxes = ts::contiguous(boxes_);
  const Picture p = prepare(masks, boxes, H, W, threshold);
  std::vector<std::vector<uint8_t>> codes(p.N);
  spread(p.N, 1e-6 * covered(p), [&](int64_t a, int64_t b) { encode(p, codes.data(), a, b); });
  int64_t total = 0;
  for (auto& c : codes) total += c.size();
  Tensor text = ts::new_empty(masks, {total}, ScalarType::Byte), lengths = ts::new_empty(masks, {p.N}, ScalarType::Long);
  uint8_t* t = out<uint8_t>(text);
  for (int64_t n = 0; n < p.N; n++) t = std::copy(codes[n].begin(), codes[n].end(), t), out<int64_t>(lengths)[n] = codes[n].size();
  return {text, lengths};
}

}  // namespace
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(notebook_det, CPU, m) {
  m.impl("paste_masks", TORCH_BOX(&ndet::paste_masks));
  m.impl("paste_rle", TORCH_BOX(&ndet::paste_rle));
}
