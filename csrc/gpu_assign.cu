// Max-IoU assignment on a GPU: a thread for each prior, objects in shared memory, no matrix.
//
// `match`: 256 neighbouring priors share a tile of objects; each thread keeps its best overlap. Low-quality matching needs each
// object's best overlap too. An overlap is not negative, so its bits, read as a whole number, have the same order, and a maximum of
// whole numbers is atomic and the same in any order: threads take it in shared memory first, and a block tells the whole device one
// number for each object that it touches. `finish` compares a second time, and only where a prior's best reaches the object's best.
#include "device.h"

namespace ndet {
namespace gpu {
namespace assign {
namespace {

constexpr int PRIORS = 256, TILE = 128;             // threads of a block; objects in shared memory at a time

template <class T> struct BitsOf { using type = unsigned; };
template <> struct BitsOf<double> { using type = unsigned long long; };
template <class T> using Bits = typename BitsOf<T>::type;

template <class T> DEV Bits<T> bits(T x) { Bits<T> b; memcpy(&b, &x, sizeof b); return b; }
template <class T> DEV T value(Bits<T> b) { T x; memcpy(&x, &b, sizeof x); return x; }

template <class T> struct Job {
  const T *priors, *objects;
  int64_t A, G;
  T pos, lo, hi, min_pos;
  bool low_quality, all;
  int64_t* gt_index;
  int8_t* label;
  T* iou;
  Bits<T>* best;                                    // [G], of each object
  int *first, *claim;                               // [G] its first prior; [A] the last object that claims each prior; for `all` = false
};

template <class T> struct Box { T x1, y1, x2, y2, area; };
template <class T> DEV Box<T> load(const T* p) { return {p[0], p[1], p[2], p[3], (p[2] - p[0]) * (p[3] - p[1])}; }

// The reference's overlap, operation by operation; NaN (∞ / ∞) fails every comparison, and so counts as 0
template <class T> DEV T overlap(const Box<T>& p, const Box<T>& o) {
  const T w = more(less(p.x2, o.x2) - more(p.x1, o.x1), T(0)), h = more(less(p.y2, o.y2) - more(p.y1, o.y1), T(0));
  const T inter = w * h, both = p.area + o.area - inter;
  return inter / (both < T(1e-6) ? T(1e-6) : both);
}

template <class T> __global__ void match(const Job<T> j) {
  SHARED(Box<T>, object, TILE);
  SHARED(Bits<T>, best, TILE);
  const int64_t a = me();
  const int t = threadIdx.x;
  const Box<T> p = load(j.priors + 4 * (a < j.A ? a : 0));
  T top = 0;
  int64_t who = 0;
  for (int64_t first = 0; first < j.G; first += TILE) {
    const int n = int(less<int64_t>(TILE, j.G - first));
    if (t < n) object[t] = load(j.objects + 4 * (first + t)), best[t] = 0;
    __syncthreads();
    if (a < j.A)
      for (int k = 0; k < n; k++) {
        const T iou = overlap(p, object[k]);
        if (!(iou > 0)) continue;
        if (iou > top) top = iou, who = first + k;
        if (j.low_quality && bits(iou) > ((volatile Bits<T>*)best)[k]) atomicMax(best + k, bits(iou));
      }
    __syncthreads();
    if (j.low_quality && t < n && best[t] > 0) atomicMax(j.best + first + t, best[t]);
  }                                                 // the thread that clears best[t] has read it itself
  if (a < j.A) j.iou[a] = top, j.gt_index[a] = who;
}

// Does prior a reach the best overlap of object g? An object that nothing touches shares its best, 0, with all
template <class T> DEV bool reaches(const Job<T>& j, int64_t a, const Box<T>& p, T top, int64_t g) {
  const T best = value<T>(j.best[g]);
  if (!(best >= j.min_pos) || best > top) return false;
  return best == 0 || overlap(p, load(j.objects + 4 * g)) == best;
}

// For `all` = false: the first prior of each object, then for each prior the last object
template <class T> __global__ void earliest(const Job<T> j) {
  const int64_t a = me();
  if (a >= j.A) return;
  const Box<T> p = load(j.priors + 4 * a);
  for (int64_t g = 0; g < j.G; g++)
    if (int(a) < ((volatile int*)j.first)[g] && reaches(j, a, p, j.iou[a], g)) atomicMin(j.first + g, int(a));
}
template <class T> __global__ void give(const Job<T> j) {
  const int64_t g = me();
  if (g < j.G && j.first[g] < j.A) atomicMax(j.claim + j.first[g], int(g));
}

template <class T> __global__ void finish(const Job<T> j) {
  const int64_t a = me();
  if (a >= j.A) return;
  const T top = j.iou[a];
  int64_t claim = -1;
  if (j.low_quality && j.all) {
    const Box<T> p = load(j.priors + 4 * a);
    for (claim = j.G - 1; claim >= 0 && !reaches(j, a, p, top, claim); claim--) {}
  } else if (j.low_quality) claim = j.claim[a];
  int8_t label = top >= j.lo && top < j.hi ? 0 : 2;
  label = top >= j.pos || claim >= 0 ? 1 : label;
  j.label[a] = label;
  j.gt_index[a] = claim >= 0 ? claim : label == 1 ? j.gt_index[a] : 0;
}

template <class T> void assign(const Tensor& priors, const Tensor& objects, Job<T> j) {
  const On on(priors, objects);
  const int64_t blocks = pieces(j.A, PRIORS);
  const ScalarType whole = sizeof(T) == 4 ? ScalarType::Int : ScalarType::Long;
  const int64_t G = j.G, firsts = j.all ? 0 : j.G, claims = j.all ? 0 : j.A;        // nvcc chokes on members inside of { }
  Tensor best = ts::new_empty(priors, {G}, whole), first = ts::new_empty(priors, {firsts}, ScalarType::Int), claim = ts::new_empty(priors, {claims}, ScalarType::Int);
  ts::zero_(best), ts::fill_(first, double(INT32_MAX)), ts::fill_(claim, -1);
  j.priors = data<T>(priors), j.objects = data<T>(objects), j.best = (Bits<T>*)best.mutable_data_ptr();
  j.first = out<int>(first), j.claim = out<int>(claim);
  launch(on, match<T>, blocks, PRIORS, j);
  if (j.low_quality && !j.all) launch(on, earliest<T>, blocks, PRIORS, j), launch(on, give<T>, pieces(j.G, PRIORS), PRIORS, j);
  launch(on, finish<T>, blocks, PRIORS, j);
}

std::tuple<Tensor, Tensor, Tensor> max_iou_assign(const Tensor& priors_, const Tensor& objects_, double pos, double lo, double hi, double min_pos, bool low_quality, bool all) {
  const Tensor priors = ts::contiguous(priors_), objects = ts::contiguous(objects_);
  require(priors.dim() == 2 && priors.size(1) == 4 && objects.dim() == 2 && objects.size(1) == 4 && priors.scalar_type() == objects.scalar_type(),
          "max_iou_assign: priors and objects must be [N,4], of one type");
  const int64_t A = priors.size(0), G = objects.size(0);
  require(A < INT32_MAX && G < INT32_MAX, "max_iou_assign: more than 2³¹ boxes");
  Tensor gt_index = ts::new_empty(priors, {A}, ScalarType::Long), label = ts::new_empty(priors, {A}, ScalarType::Char), iou = ts::new_empty(priors, {A});
  if (A == 0 || G == 0) {
    ts::zero_(gt_index), ts::zero_(label), ts::zero_(iou);
    return {gt_index, label, iou};
  }
  by_type("max_iou_assign", priors, [&](auto t) {
    using T = decltype(t);
    assign<T>(priors, objects, {nullptr, nullptr, A, G, T(pos), T(lo), T(hi), T(min_pos), low_quality, all, out<int64_t>(gt_index), out<int8_t>(label), out<T>(iou), nullptr, nullptr, nullptr});
  });
  return {gt_index, label, iou};
}

}  // namespace
}  // namespace assign
}  // namespace gpu
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(HOME, DEVICE, m) { m.impl("max_iou_assign", TORCH_BOX(&ndet::gpu::assign::max_iou_assign)); }
