// Sigmoid focal loss on a GPU: the logits are read once forward and once backward, and nothing of their size is kept in between.
//
// The formulas are those of focal.cpp. A thread walks over the logits in steps that are the same for all, and carries its row and
// column along, so that it divides once. Sums are made in float64, in two launches without atomics, by a number of threads that
// hangs on the number of logits alone: the result is the same each time and on every GPU.
#include "device.h"

namespace ndet {
namespace gpu {
namespace focal {
namespace {

constexpr int THREADS = 256, BLOCKS = 4096;         // at most; 16 logits a thread, if there are that many

template <class T, class A> struct Job {
  const T *x, *weight;                              // weight: null, or one a row, or one an element
  const int64_t* label;
  int64_t N, K;
  bool each;
  A gamma, alpha;
};

// a pᵞ and softplus(z), p and 1 − p
template <class A> struct Parts {
  A power, soft, p, rest;
  DEV Parts(A z, A gamma) {
    const A e = exp(-fabs(z)), one = A(1) / (A(1) + e), other = e * one;
    p = z < 0 ? other : one, rest = z < 0 ? one : other, soft = more(z, A(0)) + log1p(e);
    power = gamma == A(2) ? p * p : gamma == A(0) ? A(1) : exp(-gamma * (soft - z));
  }
};

// f(place, logit turned against the truth, weight · α or 1 − α, is it the right column?) for each logit of this thread
template <class T, class A, class F> DEV void logits(const Job<T, A>& j, F f) {
  const int64_t step = all(), down = step / j.K, across = step % j.K;
  int64_t row = me() / j.K, column = me() % j.K;
  for (int64_t i = me(); i < j.N * j.K; i += step) {
    const bool right = j.label[row] == column;
    const A x = A(j.x[i]), a = right ? j.alpha : A(1) - j.alpha;
    f(i, right ? -x : x, j.weight ? a * A(j.weight[j.each ? i : row]) : a, right);
    row += down, column += across;
    if (column >= j.K) row++, column -= j.K;
  }
}

// Sum of a number of each thread of a block of THREADS; for thread 0
DEV double together(double* shared, double mine) {
  shared[threadIdx.x] = mine;
  for (int n = THREADS / 2; n > 0; n /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < n) shared[threadIdx.x] += shared[threadIdx.x + n];
  }
  return shared[0];
}

template <class T, class A> __global__ void sum(const Job<T, A> j, double* part) {
  SHARED(double, shared, THREADS);
  double mine = 0;
  logits(j, [&](int64_t, A z, A w, bool) { const Parts<A> p(z, j.gamma); mine += double(w * (p.power * p.soft)); });
  const double all = together(shared, mine);
  if (threadIdx.x == 0) part[blockIdx.x] = all;
}

template <class A> __global__ void add_up(const double* part, int n, A* total) {
  SHARED(double, shared, THREADS);
  double mine = 0;
  for (int k = threadIdx.x; k < n; k += THREADS) mine += part[k];
  const double all = together(shared, mine);
  if (threadIdx.x == 0) *total = A(all);
}

template <class T, class A> __global__ void slopes(const Job<T, A> j, const A* scale, T* grad) {
  const A s = *scale;
  logits(j, [&](int64_t i, A z, A w, bool right) {
    const Parts<A> p(z, j.gamma);
    const A slope = w * (p.power * (j.gamma * p.rest * p.soft + p.p));
    grad[i] = T(s * (right ? -slope : slope));
  });
}

// Logits, labels and weights of one call; f(job, blocks) runs it
template <class F> void prepare(const Tensor& x, const Tensor& label, const std::optional<Tensor>& weight, double gamma, double alpha, F f) {
  require(x.dim() == 2 && label.dim() == 1 && label.size(0) == x.size(0) && label.scalar_type() == ScalarType::Long, "focal_loss: logits must be [N,K], labels [N] int64");
  require(!weight || (weight->scalar_type() == x.scalar_type() && weight->size(0) == x.size(0) && (weight->dim() == 1 || (weight->dim() == 2 && weight->size(1) == x.size(1)))),
          "focal_loss: weights must be [N] or [N,K], of the logits' type");
  by_any_type("focal_loss", x, [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    f(Job<T, A>{data<T>(x), weight ? data<T>(*weight) : nullptr, data<int64_t>(label), x.size(0), x.size(1), weight && weight->dim() == 2, A(gamma), A(alpha)},
      less<int64_t>(pieces(x.numel(), 16 * THREADS), BLOCKS), A());
  }, "logits");
}

Tensor focal_loss(const Tensor& x_, const Tensor& label_, const std::optional<Tensor>& weight_, double gamma, double alpha) {
  const On on(x_, label_, weight_);
  const Tensor x = ts::contiguous(x_), label = ts::contiguous(label_);
  const std::optional<Tensor> weight = whole(weight_);
  Tensor total = ts::new_empty(x, {}, x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float), part = ts::new_empty(x, {BLOCKS}, ScalarType::Double);
  prepare(x, label, weight, gamma, alpha, [&](auto j, int64_t blocks, auto a) {
    using A = decltype(a);
    using T = std::remove_const_t<std::remove_pointer_t<decltype(j.x)>>;
    launch(on, sum<T, A>, blocks, THREADS, j, out<double>(part));
    launch(on, add_up<A>, 1, THREADS, (const double*)out<double>(part), int(blocks), out<A>(total));
  });
  return total;
}

Tensor focal_loss_backward(const Tensor& grad, const Tensor& x_, const Tensor& label_, const std::optional<Tensor>& weight_, double gamma, double alpha) {
  const On on(x_, label_, weight_, grad);
  const Tensor x = ts::contiguous(x_), label = ts::contiguous(label_);
  const std::optional<Tensor> weight = whole(weight_);
  Tensor to = ts::new_empty(x, x.sizes());
  prepare(x, label, weight, gamma, alpha, [&](auto j, int64_t blocks, auto a) {
    using A = decltype(a);
    using T = std::remove_const_t<std::remove_pointer_t<decltype(j.x)>>;
    require(grad.numel() == 1 && grad.scalar_type() == WIDE<A>, "focal_loss: the gradient of the sum must be one number of the sum's type");
    launch(on, slopes<T, A>, blocks, THREADS, j, data<A>(grad), out<T>(to));
  });
  return to;
}

}  // namespace
}  // namespace focal
}  // namespace gpu
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(HOME, DEVICE, m) {
  m.impl("focal_loss", TORCH_BOX(&ndet::gpu::focal::focal_loss));
  m.impl("focal_loss_backward", TORCH_BOX(&ndet::gpu::focal::focal_loss_backward));
}
