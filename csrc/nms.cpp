// Greedy non-maximum suppression: plain, inside groups, and over a whole boxes × classes table.
//
// One loop serves all three. It walks the candidates by falling score (ties: lower index first), and asks of each whether a
// box that its group has already kept overlaps it by more than the threshold. A group keeps its boxes in blocks of 64,
// coordinate by coordinate, so that 16 of them are compared at once. With `max_keep` the walk ends early, and what it never
// reaches is not even sorted.
//
// The decision is torchvision's to the last bit: inter / (area + area' - inter) > threshold. A division is slow, so a cheap
// bound comes first: inter > t·area + t·area' with t a little below threshold / (1 + threshold). Only where it holds (almost
// always because the box is in fact suppressed) is the block in question compared exactly.
#include "common.h"
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

namespace ndet {
namespace {

namespace ts = torch::stable;

// Sort keys: score upside down in the upper bits, index in the lower 32: ascending keys are falling scores, ties by index
template <class T> using Key = std::conditional_t<sizeof(T) == 4, uint64_t, unsigned __int128>;

template <class T> INLINE Key<T> key_of(T score, int64_t index) {
  using U = std::make_unsigned_t<Int<T>>;
  constexpr U sign = U(1) << (8 * sizeof(T) - 1);
  U u;
  score += T(0);                                   // -0 is 0
  std::memcpy(&u, &score, sizeof u);
  u = ~(u & sign ? ~u : u | sign);
  return Key<T>(u) << 32 | Key<T>(uint32_t(index));
}

// Radix sort, 11 bits of the score at a time (the indices are in order already)
template <class T> void sort_keys(Key<T>* keys, int64_t n) {
  if (n < 512) return std::sort(keys, keys + n);
  std::unique_ptr<Key<T>[]> spare(new Key<T>[n]);
  Key<T>*from = keys, *to = spare.get();
  for (unsigned shift = 32; shift < 32 + 8 * sizeof(T); shift += 11) {
    uint32_t start[2049] = {};
    for (int64_t i = 0; i < n; i++) start[(uint32_t(from[i] >> shift) & 2047) + 1]++;
    if (start[(uint32_t(from[0] >> shift) & 2047) + 1] == n) continue;   // all alike
    for (int d = 0; d < 2048; d++) start[d + 1] += start[d];
    for (int64_t i = 0; i < n; i++) to[start[uint32_t(from[i] >> shift) & 2047]++] = from[i];
    std::swap(from, to);
  }
  if (from != keys) std::copy(from, from + n, keys);
}

// Kept boxes of one group, coordinate by coordinate: four times 64 bytes, so that one branch serves 64 floats or 32 doubles
template <class T> constexpr int WIDE = 4 * LANES<T>;
template <class T> struct Block { T x1[WIDE<T>], y1[WIDE<T>], x2[WIDE<T>], y2[WIDE<T>], bound[WIDE<T>]; };

template <class T> struct Walk {
  const T* boxes;                                  // [rows,4], or [rows,classes,4] where each class has its own
  int64_t classes;                                 // candidate = row * classes + class
  bool own;
  const int32_t* group;                            // of each candidate; null: its class
  T threshold, t;                                  // the exact one, rounded down to T, and t of the bound
  Block<T>* kept;
  const int64_t* first;                            // first block of each group
  int64_t* count;                                  // boxes kept by each group
  const Key<T>* keys;                              // candidates by falling score
  const uint32_t* turn;                            // whose turn it is: places in `keys`; null: as they are
  uint8_t* stays;                                  // for each place
  int64_t found, max_keep;
  T zero;

  INLINE int64_t row(int64_t i) const { return classes == 1 ? i : uint32_t(i) / uint32_t(classes); }
  INLINE int64_t group_of(int64_t i) const { return group ? group[i] : i - row(i) * classes; }
  INLINE const T* box(int64_t i) const { return boxes + 4 * (own ? i : row(i)); }
  INLINE T bound(T area) const { T b = t * area; return b < T(1e-30) ? T(0) : b; }   // no denormals: they round differently
};

template <class T> struct Greedy {
  // Does the block hold a box that suppresses (x1, y1, x2, y2)?
  static INLINE bool exactly(const Block<T>& b, T x1, T y1, T x2, T y2, T threshold) {
    const T area = (x2 - x1) * (y2 - y1);
    Int<T> hit[LANES<T>] = {}, any = 0;
    for (int k = 0; k < WIDE<T>; k += LANES<T>)
      for (int l = 0; l < LANES<T>; l++) {
        T w = upper(lower(b.x2[k + l], x2) - upper(b.x1[k + l], x1), T(0));
        T h = upper(lower(b.y2[k + l], y2) - upper(b.y1[k + l], y1), T(0));
        T inter = w * h, other = (b.x2[k + l] - b.x1[k + l]) * (b.y2[k + l] - b.y1[k + l]);
        hit[l] |= inter / (other + area - inter) > threshold;
      }
    for (int l = 0; l < LANES<T>; l++) any |= hit[l] << l;
    return any != 0;
  }

  // The bound: can it? Unused lanes hold a box that overlaps nothing. `zero` is 0 behind the compiler's back: it would turn a
  // maximum with a plain 0 into a comparison and a mask. A negative height gives no positive product, as w ≥ 0.
  static INLINE bool perhaps(const Block<T>& b, T x1, T y1, T x2, T y2, T bound, T zero) {
    T most[LANES<T>] = {};
    for (int k = 0; k < WIDE<T>; k += LANES<T>)
      for (int l = 0; l < LANES<T>; l++) {
        T w = upper(lower(b.x2[k + l], x2) - upper(b.x1[k + l], x1), zero);
        T h = lower(b.y2[k + l], y2) - upper(b.y1[k + l], y1);
        most[l] = upper(w * h - b.bound[k + l], most[l]);
      }
    Int<T> any = 0;
    for (int l = 0; l < LANES<T>; l++) any |= Int<T>(most[l] > bound) << l;
    return any != 0;
  }

  static INLINE void run(Walk<T>* walk, int64_t begin, int64_t end) {
    Walk<T> w = *walk;
    const T zero = w.zero;
    for (int64_t k = begin; k < end && w.found != w.max_keep; k++) {
      const int64_t place = w.turn ? w.turn[k] : k, i = uint32_t(w.keys[place]), g = w.group_of(i);
      if (k + 8 < end) __builtin_prefetch(w.box(uint32_t(w.keys[w.turn ? w.turn[k + 8] : k + 8])));
      const T *box = w.box(i), x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3], bound = w.bound((x2 - x1) * (y2 - y1));
      Block<T>* kept = w.kept + w.first[g];
      const int64_t count = w.count[g], blocks = (count + WIDE<T> - 1) / WIDE<T>;
      bool gone = false;
      for (int64_t b = 0; b < blocks && !gone; b++)
        gone = perhaps(kept[b], x1, y1, x2, y2, bound, zero) && exactly(kept[b], x1, y1, x2, y2, w.threshold);
      if (gone) continue;
      Block<T>& last = kept[count / WIDE<T>];
      const int l = count % WIDE<T>;
      if (l == 0)
        for (int e = 0; e < WIDE<T>; e++) last.x1[e] = last.y1[e] = 1, last.x2[e] = last.y2[e] = last.bound[e] = 0;
      last.x1[l] = x1, last.y1[l] = y1, last.x2[l] = x2, last.y2[l] = y2, last.bound[l] = bound;
      w.count[g] = count + 1;
      w.stays[place] = 1, w.found++;
    }
    walk->found = w.found;
  }
};

// Where all groups are wanted to the end, one after the other is quicker: the boxes that it kept stay in the nearest cache
template <class T> const uint32_t* turns(const Walk<T>& w, int64_t n, const std::vector<int64_t>& sizes, std::vector<uint32_t>& turn) {
  std::vector<int64_t> at(sizes.size());
  for (size_t g = 1; g < sizes.size(); g++) at[g] = at[g - 1] + sizes[g - 1];
  turn.resize(n);
  for (int64_t k = 0; k < n; k++) turn[at[w.group_of(uint32_t(w.keys[k]))]++] = uint32_t(k);
  return turn.data();
}

// The common end: keys of all candidates and the number of them in each group are known; returns the kept candidates
template <class T>
std::vector<int64_t> walk_all(Walk<T> w, Key<T>* keys, int64_t n, const std::vector<int64_t>& sizes, double threshold, int64_t max_keep) {
  require(threshold >= 0, "nms: iou_threshold must be 0 or more");
  const int64_t G = sizes.size();
  if (max_keep < 0 || max_keep > n) max_keep = n;
  w.threshold = T(threshold);                      // torchvision compares with a double: x > threshold is x > the T below it
  if (double(w.threshold) > threshold) w.threshold = std::nextafter(w.threshold, T(-1));
  w.t = T(threshold / (1 + threshold) * (1 - 16 * double(std::numeric_limits<T>::epsilon())));
  std::vector<int64_t> first(G), count(G);
  std::vector<uint8_t> stays(n);
  std::vector<uint32_t> turn;
  int64_t blocks = 0;
  for (int64_t g = 0; g < G; g++) first[g] = blocks, blocks += (std::min(sizes[g], max_keep) + WIDE<T> - 1) / WIDE<T>;
  std::unique_ptr<Block<T>[]> kept(new Block<T>[blocks]);
  w.kept = kept.get(), w.first = first.data(), w.count = count.data(), w.keys = keys, w.turn = nullptr, w.stays = stays.data();
  w.found = 0, w.max_keep = max_keep, w.zero = 0;
  int64_t done = 0;
  for (int64_t step = std::max<int64_t>(1024, 4 * max_keep); done < n && w.found < max_keep; step *= 2) {
    int64_t upto = n - done <= 2 * step ? n : done + step;    // the next best `step`; all, where that is most of them
    if (upto < n) std::nth_element(keys + done, keys + upto, keys + n);
    if (upto < n || done) std::sort(keys + done, keys + upto);
    else sort_keys<T>(keys, n);                    // by index so far, as the radix sort wants it
    if (max_keep == n && G > 1) w.turn = turns(w, n, sizes, turn);
    dispatch<Greedy<T>>(&w, done, upto);
    done = upto;
  }
  std::vector<int64_t> out;
  out.reserve(w.found);
  for (int64_t k = 0; k < done; k++)
    if (stays[k]) out.push_back(uint32_t(keys[k]));
  return out;
}

// Groups of any numbers → 0, 1, 2, …, and the size of each
std::vector<int32_t> dense(const int64_t* group, int64_t n, std::vector<int64_t>& sizes) {
  std::vector<int32_t> out(n);
  sizes.assign(1, 0);
  if (n == 0) return out;
  auto [lo, hi] = std::minmax_element(group, group + n);
  if (uint64_t(*hi) - uint64_t(*lo) < uint64_t(4 * n + 1024)) {
    sizes.resize(*hi - *lo + 1);
    for (int64_t i = 0; i < n; i++) sizes[out[i] = int32_t(group[i] - *lo)]++;
    return out;
  }
  std::vector<int64_t> names(group, group + n);
  std::sort(names.begin(), names.end());
  names.erase(std::unique(names.begin(), names.end()), names.end());
  sizes.resize(names.size());
  for (int64_t i = 0; i < n; i++) sizes[out[i] = int32_t(std::lower_bound(names.begin(), names.end(), group[i]) - names.begin())]++;
  return out;
}

// Numbers of a contiguous tensor that has as many as it should, of the boxes' type; never null
template <class T> const T* numbers(const char* what, const Tensor& x, int64_t n, ScalarType type) {
  require(x.scalar_type() == type && x.numel() == n && n <= INT32_MAX, std::string("nms: ") + what + " have the wrong type or number");
  static const T none = 0;
  return n ? (const T*)x.const_data_ptr() : &none;
}

Tensor to_tensor(const std::vector<int64_t>& v, const Tensor& like) {
  Tensor t = ts::new_empty(like, {int64_t(v.size())}, ScalarType::Long);
  if (!v.empty()) std::memcpy(t.mutable_data_ptr(), v.data(), v.size() * sizeof(int64_t));
  return t;
}

template <class T>
std::vector<int64_t> grouped(const Tensor& boxes, const Tensor& scores, const Tensor* groups, double threshold, int64_t max_keep) {
  const int64_t n = boxes.size(0);
  const T *b = numbers<T>("boxes", boxes, 4 * n, boxes.scalar_type()), *s = numbers<T>("scores", scores, n, boxes.scalar_type());
  refuse_nan("nms", "boxes", b, 4 * n), refuse_nan("nms", "scores", s, n);
  std::vector<int64_t> sizes(1, n);
  std::vector<int32_t> id;
  if (groups) id = dense(numbers<int64_t>("groups", *groups, n, ScalarType::Long), n, sizes);
  std::unique_ptr<Key<T>[]> keys(new Key<T>[n]);
  for (int64_t i = 0; i < n; i++) keys[i] = key_of(s[i], i);
  return walk_all<T>(Walk<T>{b, 1, false, groups ? id.data() : nullptr}, keys.get(), n, sizes, threshold, max_keep);
}

Tensor nms(const Tensor& boxes_, const Tensor& scores_, double threshold, int64_t max_keep) {
  Tensor boxes = ts::contiguous(boxes_), scores = ts::contiguous(scores_);
  return to_tensor(by_type("nms", boxes, [&](auto t) { return grouped<decltype(t)>(boxes, scores, nullptr, threshold, max_keep); }), boxes);
}

Tensor batched_nms(const Tensor& boxes_, const Tensor& scores_, const Tensor& groups_, double threshold, int64_t max_keep) {
  Tensor boxes = ts::contiguous(boxes_), scores = ts::contiguous(scores_), groups = ts::contiguous(groups_);
  return to_tensor(by_type("nms", boxes, [&](auto t) { return grouped<decltype(t)>(boxes, scores, &groups, threshold, max_keep); }), boxes);
}

template <class T>
std::vector<int64_t> table(const Tensor& boxes, const Tensor& scores, double score_threshold, double threshold, int64_t max_keep) {
  const int64_t n = scores.size(0), K = scores.size(1);
  const bool own = boxes.dim() == 3;
  const int64_t coordinates = 4 * n * (own ? K : 1);
  const T *b = numbers<T>("boxes", boxes, coordinates, boxes.scalar_type()), *s = numbers<T>("scores", scores, n * K, boxes.scalar_type());
  refuse_nan("nms", "boxes", b, coordinates), refuse_nan("nms", "scores", s, n * K);
  const T least = T(score_threshold);
  std::vector<int64_t> sizes(K);
  for (int64_t i = 0; i < n; i++)
    for (int64_t c = 0; c < K; c++) sizes[c] += s[i * K + c] > least;
  std::unique_ptr<Key<T>[]> keys(new Key<T>[n * K + 1]);
  int64_t m = 0;
  for (int64_t i = 0; i < n * K; i++) keys[m] = i, m += s[i] > least;      // no branch to guess wrong
  for (int64_t i = 0; i < m; i++) keys[i] = key_of(s[int64_t(keys[i])], int64_t(keys[i]));
  return walk_all<T>(Walk<T>{b, std::max<int64_t>(K, 1), own, nullptr}, keys.get(), m, sizes, threshold, max_keep);
}

std::tuple<Tensor, Tensor> multiclass_nms(const Tensor& boxes_, const Tensor& scores_, double score_threshold, double threshold, int64_t max_keep) {
  Tensor boxes = ts::contiguous(boxes_), scores = ts::contiguous(scores_);
  auto row = by_type("nms", boxes, [&](auto t) { return table<decltype(t)>(boxes, scores, score_threshold, threshold, max_keep); });
  std::vector<int64_t> label(row.size());
  for (size_t i = 0; i < row.size(); i++) label[i] = row[i] % scores.size(1), row[i] /= scores.size(1);
  return {to_tensor(row, boxes), to_tensor(label, boxes)};
}

}  // namespace
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(notebook_det, CPU, m) {
  m.impl("nms", TORCH_BOX(&ndet::nms));
  m.impl("batched_nms", TORCH_BOX(&ndet::batched_nms));
  m.impl("multiclass_nms", TORCH_BOX(&ndet::multiclass_nms));
}
