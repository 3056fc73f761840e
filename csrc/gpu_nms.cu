// Non-maximum suppression on a GPU: results of a fixed size, and no word to the host in between.
//
// The greedy walk is a chain: whether a box stays hangs on all better ones. What is not a chain is the question which boxes overlap,
// and that is nearly all the work. So the boxes are sorted by falling score and cut into tiles of 64. `overlap` compares tile with
// tile, a thread for each row, and packs each row's answers into one word of 64 bits. `walk`, a single block, then goes down the
// tiles: inside a tile one thread follows the chain, a few bit operations for each box that stays; the words of those that stay are
// joined by all threads, and cross out boxes further down.
//
// Words for all pairs would take n²/8 bytes (312 MB for 50,000 boxes). They are made for a slab of rows at a time, at most 32 MB;
// the walk of one slab comes before the overlaps of the next, whose crossed-out rows are not compared at all. How many slabs there
// are hangs on n alone, so the host need not know how the walk went: when `max_keep` boxes are found, the kernels that follow end
// at once.
#include "device.h"
#include <cmath>

namespace ndet {
namespace gpu {
namespace nms {
namespace {

using Word = unsigned long long;
constexpr int TILE = 64, WALKERS = 512, TEAMS = 4;  // boxes in a tile: bits in a word; threads of the walk, and teams among them
#ifndef NDET_WORDS
#define NDET_WORDS 1 << 22
#endif
constexpr int64_t WORDS = NDET_WORDS;               // of a slab; tests ask for less, to have several

template <class T> struct alignas(4 * sizeof(T)) Box { T x1, y1, x2, y2; };
struct State { int64_t end, bad; };                 // candidates that take part; 1: a box, 2: a score is not a number

template <class T> struct Walk {
  const T *boxes, *score;                           // [rows,4], or [rows,classes,4] where each class has its own; falling
  const int64_t *order, *group;                     // candidate = row · classes + class, by falling score; null: its class
  int64_t n, classes;
  bool own, cut;                                    // cut: only scores above `least` take part
  T threshold, least;
  Box<T>* box;                                      // by falling score
  int64_t* member;                                  // group of each
  Word *removed, *words;                            // a bit for each box; a slab's rows × tiles
  State* state;
  int64_t max_keep;
  int64_t *row, *label, *count;                     // what comes out; label may be null
};

template <class T> __global__ void gather(const Walk<T> w) {
  for (int64_t i = me(); i < w.n; i += all()) {
    const int64_t id = w.order[i], row = id / w.classes;
    const T *b = w.boxes + 4 * (w.own ? id : row), s = w.score[i];
    w.box[i] = {b[0], b[1], b[2], b[3]};
    w.member[i] = w.group ? w.group[id] : id - row * w.classes;
    if (s != s) atomicMax((unsigned long long*)&w.state->bad, 2ull);
    if (b[0] != b[0] || b[1] != b[1] || b[2] != b[2] || b[3] != b[3]) atomicMax((unsigned long long*)&w.state->bad, 1ull);
    if ((!w.cut || s > w.least) && (i + 1 == w.n || (w.cut && !(w.score[i + 1] > w.least)))) w.state->end = i + 1;
  }
}

// torchvision's decision to the last bit
template <class T> DEV bool suppresses(const Box<T>& a, T area, const Box<T>& b, T threshold) {
  const T w = more(less(a.x2, b.x2) - more(a.x1, b.x1), T(0)), h = more(less(a.y2, b.y2) - more(a.y1, b.y1), T(0)), inter = w * h;
  return inter > 0 && inter / (area + (b.x2 - b.x1) * (b.y2 - b.y1) - inter) > threshold;
}

template <class T> DEV bool over(const Walk<T>& w, int64_t first) { return w.state->bad || first * TILE >= w.state->end || *w.count >= w.max_keep; }

// Words of rows in tiles r0 … r1 - 1 with the columns from r0 on; blocks of TILE threads
template <class T> __global__ void overlap(const Walk<T> w, int64_t r0, int64_t r1) {
  SHARED(Box<T>, column, TILE);
  SHARED(int64_t, member, TILE);
  if (over(w, r0)) return;
  const int64_t end = w.state->end, width = (w.n + TILE - 1) / TILE - r0, t = threadIdx.x;
  for (int64_t pair = blockIdx.x; pair < (r1 - r0) * width; pair += gridDim.x) {
    const int64_t down = r0 + pair / width, across = r0 + pair % width, row = down * TILE + t, c = across * TILE + t;
    if (across < down || across * TILE >= end) continue;
    __syncthreads();                                // the columns of the pair before have been read
    if (c < end) column[t] = w.box[c], member[t] = w.member[c];
    __syncthreads();
    if (row >= end || w.removed[down] >> t & 1) continue;
    const Box<T> a = w.box[row];
    const T area = (a.x2 - a.x1) * (a.y2 - a.y1);
    const int64_t mine = w.member[row], count = less<int64_t>(TILE, end - across * TILE);
    Word word = 0;
    for (int64_t k = across == down ? t + 1 : 0; k < count; k++)
      if (member[k] == mine && suppresses(a, area, column[k], w.threshold)) word |= Word(1) << k;
    w.words[(row - r0 * TILE) * width + across - r0] = word;
  }
}

// One block
template <class T> __global__ void __launch_bounds__(WALKERS, 1) walk(const Walk<T> w, int64_t r0, int64_t r1) {
  SHARED(Word, diagonal, TILE);
  SHARED(int, chosen, TILE);
  SHARED(int, total, 1);
  const int64_t t = threadIdx.x, end = w.state->end, tiles = (end + TILE - 1) / TILE, width = (w.n + TILE - 1) / TILE - r0;
  int64_t found = *w.count;
  if (over(w, r0)) {
    if (t == 0 && w.state->bad) *w.count = -w.state->bad;
    return;
  }
  for (int64_t down = r0; down < r1 && down * TILE < end && found < w.max_keep; down++) {
    const Word* row = w.words + (down - r0) * TILE * width + down - r0;
    if (t < TILE && down * TILE + t < end) diagonal[t] = row[t * width];
    __syncthreads();
    if (t == 0) {
      Word left = ~*(volatile Word*)(w.removed + down);          // others have crossed out in it: not from this thread's cache
      if (end - down * TILE < TILE) left &= (Word(1) << (end - down * TILE)) - 1;
      int n = 0;
      for (; left && found + n < w.max_keep; n++) {
        const int k = __ffsll((long long)left) - 1;
        chosen[n] = k, left &= ~(diagonal[k] | Word(1) << k);
      }
      *total = n;
    }
    __syncthreads();
    const int n = *total;
    if (t < n) {
      const int64_t id = w.order[down * TILE + chosen[t]];
      w.row[found + t] = id / w.classes;
      if (w.label) w.label[found + t] = id % w.classes;
    }
    const int64_t team = t / (WALKERS / TEAMS);
    for (int64_t k = t % (WALKERS / TEAMS) + 1; down + k < tiles; k += WALKERS / TEAMS) {
      Word gone = 0;
#pragma unroll 4
      for (int64_t i = team; i < n; i += TEAMS) gone |= row[chosen[i] * width + k];
      if (gone) atomicOr(w.removed + down + k, gone);
    }
    found += n;
    __syncthreads();
  }
  if (t == 0) *w.count = found;
}

struct Found { Tensor row, label, count; };

// `own`, `classes`: boxes are [n,4], or [rows,classes,4] of a table of scores
template <class T> Found find(const Tensor& boxes, const Tensor& scores, const Tensor* groups, bool table, const double* least, double threshold, int64_t max_keep) {
  require(threshold >= 0, "nms: iou_threshold must be 0 or more");
  const On on(boxes, scores, groups);
  const int64_t n = scores.numel(), classes = table ? more<int64_t>(scores.size(1), 1) : 1, keep = max_keep < 0 ? n : max_keep;
  const bool own = boxes.dim() == 3;
  require(boxes.numel() == 4 * (own || !table ? n : scores.size(0)) && scores.scalar_type() == boxes.scalar_type() && n <= INT32_MAX, "nms: boxes and scores must have one type and fit each other");
  require(!groups || (groups->scalar_type() == ScalarType::Long && groups->numel() == n), "nms: groups must be int64, one for each box");
  Found f{ts::new_empty(boxes, {keep}, ScalarType::Long), ts::new_empty(boxes, {table ? keep : 0}, ScalarType::Long), ts::new_empty(boxes, {}, ScalarType::Long)};
  ts::fill_(f.row, -1), ts::fill_(f.label, -1), ts::zero_(f.count);
  if (n == 0) return f;
  const auto [score, order] = sorted(ts::view(scores, {n}));
  const int64_t tiles = pieces(n, TILE), slab = less(tiles, more<int64_t>(1, WORDS / (tiles * TILE)));
  Tensor box = ts::new_empty(boxes, {n, 4}), member = ts::new_empty(boxes, {n}, ScalarType::Long), words = ts::new_empty(boxes, {slab * TILE * tiles}, ScalarType::Long);
  Tensor notes = ts::new_empty(boxes, {tiles + 2}, ScalarType::Long);
  ts::zero_(notes);
  int64_t* note = out<int64_t>(notes);
  T exact = T(threshold);                           // torchvision compares with a double: x > threshold is x > the T below it
  if (double(exact) > threshold) exact = std::nextafter(exact, T(-1));
  const Walk<T> w{data<T>(boxes), data<T>(score), data<int64_t>(order), groups ? data<int64_t>(*groups) : nullptr, n, classes, own, least != nullptr, exact, least ? T(*least) : T(0),
                  (Box<T>*)out<T>(box), out<int64_t>(member), (Word*)(note + 2), (Word*)out<int64_t>(words), (State*)note, keep,
                  out<int64_t>(f.row), table ? out<int64_t>(f.label) : nullptr, out<int64_t>(f.count)};
  launch(on, gather<T>, less<int64_t>(pieces(n, 256), 1024), 256, w);
  for (int64_t r0 = 0; r0 < tiles; r0 += slab) {
    const int64_t r1 = less(tiles, r0 + slab);
    launch(on, overlap<T>, less<int64_t>((r1 - r0) * (tiles - r0), 8192), TILE, w, r0, r1);
    launch(on, walk<T>, 1, WALKERS, w, r0, r1);
  }
  return f;
}

// So many as there are: here the host waits, once
Tensor first(Tensor& found, int64_t count) { return ts::clone(ts::narrow(found, 0, 0, count)); }
int64_t counted(const Tensor& count) {
  const Tensor here = ts::to(count, ts::Device(torch::headeronly::DeviceType::CPU));
  const int64_t n = *data<int64_t>(here);
  require(n != -1, "nms: boxes hold a value that is not a number (NaN)"), require(n != -2, "nms: scores hold a value that is not a number (NaN)");
  return n;
}

Found grouped(const Tensor& boxes_, const Tensor& scores_, const std::optional<Tensor>& groups_, double threshold, int64_t max_keep) {
  const Tensor boxes = ts::contiguous(boxes_), scores = ts::contiguous(scores_);
  const std::optional<Tensor> groups = whole(groups_);
  return by_type("nms", boxes, [&](auto t) { return find<decltype(t)>(boxes, scores, groups ? &*groups : nullptr, false, nullptr, threshold, max_keep); });
}

std::tuple<Tensor, Tensor> nms_fixed(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups, double threshold, int64_t max_keep) {
  Found f = grouped(boxes, scores, groups, threshold, max_keep);
  return {f.row, f.count};
}

Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& groups, double threshold, int64_t max_keep) {
  const int64_t n = scores.numel();
  Found f = grouped(boxes, scores, groups, threshold, max_keep < 0 ? n : less(max_keep, n));
  return first(f.row, counted(f.count));
}

Tensor nms(const Tensor& boxes, const Tensor& scores, double threshold, int64_t max_keep) {
  const int64_t n = scores.numel();
  Found f = grouped(boxes, scores, std::nullopt, threshold, max_keep < 0 ? n : less(max_keep, n));
  return first(f.row, counted(f.count));
}

std::tuple<Tensor, Tensor> multiclass_nms(const Tensor& boxes_, const Tensor& scores_, double score_threshold, double threshold, int64_t max_keep) {
  const Tensor boxes = ts::contiguous(boxes_), scores = ts::contiguous(scores_);
  const int64_t n = scores.numel();
  Found f = by_type("nms", boxes, [&](auto t) { return find<decltype(t)>(boxes, scores, nullptr, true, &score_threshold, threshold, max_keep < 0 ? n : less(max_keep, n)); });
  const int64_t count = counted(f.count);
  return {first(f.row, count), first(f.label, count)};
}

}  // namespace
}  // namespace nms
}  // namespace gpu
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(HOME, DEVICE, m) {
  m.impl("nms", TORCH_BOX(&ndet::gpu::nms::nms));
  m.impl("batched_nms", TORCH_BOX(&ndet::gpu::nms::batched_nms));
  m.impl("multiclass_nms", TORCH_BOX(&ndet::gpu::nms::multiclass_nms));
  m.impl("nms_fixed", TORCH_BOX(&ndet::gpu::nms::nms_fixed));
}
