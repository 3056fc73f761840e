// Soft non-maximum suppression: the best box lowers the scores of those that it overlaps instead of deleting them.
//
// Every pick changes scores, and the next pick is the best of the changed ones: there is no order to sort by. But a pick changes
// only its neighbours. Boxes are laid along a curve that keeps neighbours together (Morton's), in blocks of 64. A block knows its
// bounds and its best score: the next pick is the best of the blocks' bests, and blocks that it does not touch are left alone.
// Ties go to the lower index; a pair whose overlap is not a number (two boxes without area) does not count as overlapping.
#include "common.h"
#include <algorithm>
#include <cmath>
#include <limits>

namespace ndet {
namespace {

namespace ts = torch::stable;
enum Method { LINEAR, GAUSSIAN, NAIVE };
constexpr int W = 64;

template <class T> struct Block {
  T x1[W], y1[W], x2[W], y2[W], area[W], score[W]; // a box that is gone or was never there has the score −∞
  int64_t index[W];
  T left, top, right, bottom, best;
  int who;
};

template <class T> struct Job {
  std::vector<Block<T>>* blocks;
  T threshold, sigma, least;
  int64_t most;
  std::vector<int64_t>* picked;
  std::vector<T>* scores;
};

template <int method, class T> struct Soft {
  static INLINE void best(Block<T>& b) {
    T lane[W];
    for (int l = 0; l < W; l++) lane[l] = b.score[l];
    b.best = most<W>(lane), b.who = -1;
    for (int l = 0; l < W; l++)
      if (b.score[l] == b.best && (b.who < 0 || b.index[l] < b.index[b.who])) b.who = l;
  }

  static INLINE void lower_scores(Block<T>& b, T x1, T y1, T x2, T y2, const Job<T>& j) {
    const T area = (x2 - x1) * (y2 - y1), none = -std::numeric_limits<T>::infinity();
    for (int l = 0; l < W; l++) {
      const T w = upper(lower(b.x2[l], x2) - upper(b.x1[l], x1), T(0)), h = upper(lower(b.y2[l], y2) - upper(b.y1[l], y1), T(0));
      const T inter = w * h, raw = inter / (area + b.area[l] - inter), iou = raw == raw ? raw : T(0);
      T keep = iou >= j.threshold ? (method == LINEAR ? T(1) - iou : T(0)) : T(1);
      if (method == GAUSSIAN) keep = exp_(-(iou * iou) / j.sigma);
      const T s = keep == T(1) ? b.score[l] : b.score[l] * keep;
      b.score[l] = s < j.least ? none : s;         // −∞ · 0 is not a number, but a box that is gone has been marked so already:
      b.score[l] = b.score[l] == b.score[l] ? b.score[l] : none;
    }
  }

  static INLINE void run(const Job<T>* job) {
    const Job<T> j = *job;
    std::vector<Block<T>>& blocks = *j.blocks;
    const T none = -std::numeric_limits<T>::infinity();
    for (Block<T>& b : blocks) best(b);
    while (int64_t(j.picked->size()) < j.most) {
      Block<T>* top = nullptr;
      for (Block<T>& b : blocks)
        if (b.best > none && (!top || b.best > top->best || (b.best == top->best && b.index[b.who] < top->index[top->who]))) top = &b;
      if (!top) return;
      const int l = top->who;
      const T x1 = top->x1[l], y1 = top->y1[l], x2 = top->x2[l], y2 = top->y2[l];
      j.picked->push_back(top->index[l]), j.scores->push_back(top->score[l]);
      top->score[l] = none;
      for (Block<T>& b : blocks) {
        const bool touches = b.left < x2 && b.right > x1 && b.top < y2 && b.bottom > y1 && b.best > none;
        if (touches || &b == top) lower_scores(b, x1, y1, x2, y2, j), best(b);
      }
    }
  }
};

// Bits of x and y in turns: numbers that are near on this line are near in the plane
uint32_t morton(uint32_t x, uint32_t y) {
  auto apart = [](uint32_t v) { v = (v | v << 8) & 0x00ff00ff, v = (v | v << 4) & 0x0f0f0f0f, v = (v | v << 2) & 0x33333333; return (v | v << 1) & 0x55555555; };
  return apart(x & 0xffff) | apart(y & 0xffff) << 1;
}

template <class T> std::vector<Block<T>> lay_out(const T* boxes, const T* scores, int64_t n, T least) {
  std::vector<std::pair<uint32_t, int64_t>> order;
  T lo[2] = {0, 0}, hi[2] = {0, 0};
  auto middle = [&](int64_t i, int d) { const T m = (boxes[4 * i + d] + boxes[4 * i + 2 + d]) / 2; return std::isfinite(m) ? m : T(0); };
  for (int64_t i = 0; i < n; i++)
    for (int d = 0; d < 2; d++) lo[d] = i ? std::min(lo[d], middle(i, d)) : middle(i, d), hi[d] = i ? std::max(hi[d], middle(i, d)) : middle(i, d);
  for (int64_t i = 0; i < n; i++) {
    if (!(scores[i] >= least)) continue;
    uint32_t at[2];
    for (int d = 0; d < 2; d++) at[d] = hi[d] > lo[d] ? uint32_t(std::min(65535., 65535. * double(middle(i, d) / 2 - lo[d] / 2) / double(hi[d] / 2 - lo[d] / 2))) : 0;
    order.push_back({morton(at[0], at[1]), i});
  }
  std::sort(order.begin(), order.end());
  const T inf = std::numeric_limits<T>::infinity();
  std::vector<Block<T>> blocks((order.size() + W - 1) / W);
  for (size_t k = 0; k < blocks.size() * W; k++) {
    Block<T>& b = blocks[k / W];
    const int l = k % W;
    if (l == 0) b.left = b.top = inf, b.right = b.bottom = -inf;
    if (k >= order.size()) { b.x1[l] = b.y1[l] = b.x2[l] = b.y2[l] = b.area[l] = 0, b.score[l] = -inf, b.index[l] = INT64_MAX; continue; }
    const T* p = boxes + 4 * (b.index[l] = order[k].second);
    b.x1[l] = p[0], b.y1[l] = p[1], b.x2[l] = p[2], b.y2[l] = p[3], b.area[l] = (p[2] - p[0]) * (p[3] - p[1]), b.score[l] = scores[b.index[l]];
    b.left = std::min(b.left, p[0]), b.top = std::min(b.top, p[1]), b.right = std::max(b.right, p[2]), b.bottom = std::max(b.bottom, p[3]);
  }
  return blocks;
}

std::tuple<Tensor, Tensor> soft_nms(const Tensor& boxes_, const Tensor& scores_, double threshold, double sigma, double least, int64_t method, int64_t most) {
  Tensor boxes = ts::contiguous(boxes_), scores = ts::contiguous(scores_), index, kept;
  const int64_t n = boxes.size(0);
  require(boxes.dim() == 2 && boxes.size(1) == 4 && scores.dim() == 1 && scores.size(0) == n && scores.scalar_type() == boxes.scalar_type(),
          "soft_nms: boxes must be [N,4] and scores [N], of one type");
  by_type("soft_nms", boxes, [&](auto t) {
    using T = decltype(t);
    const T *b = data<T>(boxes), *s = data<T>(scores);
    refuse_nan("soft_nms", "boxes", b, 4 * n), refuse_nan("soft_nms", "scores", s, n);
    const T inf = std::numeric_limits<T>::infinity();
    std::vector<Block<T>> blocks = lay_out(b, s, n, std::max(T(least), -std::numeric_limits<T>::max()));
    std::vector<int64_t> picked;
    std::vector<T> got;
    Job<T> j{&blocks, T(threshold), T(sigma), std::max(T(least), -inf), most < 0 ? n : most, &picked, &got};
    method == LINEAR ? dispatch<Soft<LINEAR, T>>((const Job<T>*)&j) : method == GAUSSIAN ? dispatch<Soft<GAUSSIAN, T>>((const Job<T>*)&j) : dispatch<Soft<NAIVE, T>>((const Job<T>*)&j);
    index = ts::new_empty(boxes, {int64_t(picked.size())}, ScalarType::Long), kept = ts::new_empty(scores, {int64_t(got.size())});
    std::copy(picked.begin(), picked.end(), out<int64_t>(index)), std::copy(got.begin(), got.end(), out<T>(kept));
  });
  return {index, kept};
}

}  // namespace
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(notebook_det, CPU, m) { m.impl("soft_nms", TORCH_BOX(&ndet::soft_nms)); }
