// Sigmoid focal loss with whole-number labels: the weighed sum in one pass, its gradient in another.
//
// With z = −x in the right column of a row and x elsewhere, p = σ(z) is the probability of the wrong answer, and
//   loss = a pᵞ softplus(z),   d loss / dz = a pᵞ (γ (1 − p) softplus(z) + p).
// One exponential e = exp(−|z|) gives everything: p is 1 / (1 + e) or e / (1 + e), softplus(z) = max(z, 0) + log(1 + e), and
// log p = −softplus(−z), so that a power needs no logarithm. Nothing of the size of the logits is kept between the passes: to
// compute e once more costs less than to write and read a gradient that still lacks its scale.
#include "common.h"
#include <algorithm>
#include <cmath>
#include <optional>

namespace ndet {
namespace {

namespace ts = torch::stable;
constexpr int64_t ROWS = 256;                      // of a piece, whose sum is taken by itself: the result does not depend on threads

// 1 / (1 + e) and log(1 + e) for 0 ≤ e ≤ 1. The logarithm is 2 artanh(e / (2 + e)), accurate for small e too; both quotients
// share one division, the slowest instruction of the loop.
INLINE void ratio_and_log(float e, float& one, float& l) {
  const float a = 1.f + e, b = 2.f + e, inverse = 1.f / (a * b), s = e * (a * inverse), q = s * s;
  const float y = ((.140059965f * q + .140009021f) * q + .200107637f) * q + .333332081f;     // (artanh(s) / s − 1) / q within 4e-8
  one = b * inverse, l = 2.f * (s + s * q * y);
}
INLINE void ratio_and_log(double e, double& one, double& l) { one = 1 / (1 + e), l = std::log1p(e); }

// a pᵞ and softplus(z), p and 1 − p of one logit
template <bool square, class T> INLINE void parts(T z, T gamma, T& power, T& soft, T& p, T& rest) {
  const T e = exp_(-std::abs(z));
  T one, l;
  ratio_and_log(e, one, l);
  const T other = e * one;
  p = z < 0 ? other : one, rest = z < 0 ? one : other;
  soft = upper(z, T(0)) + l;
  power = square ? p * p : exp_(-gamma * (soft - z));
}

template <class T> struct Job {
  const T *x, *weight;                              // weight: null, or one a row, or one an element
  const int64_t* label;
  int64_t N, K;
  bool each;
  T gamma, alpha, scale;
  double* sum;                                      // of each piece
  T* grad;
};

// Rows are summed in 16 lanes, the same on every machine
template <bool square, class T> struct Sum {
  static INLINE T loss(T z, T gamma) {
    T power, soft, p, rest;
    parts<square>(z, gamma, power, soft, p, rest);
    return power * soft;
  }
  static INLINE void run(const Job<T>* job, int64_t begin, int64_t end) {
    const Job<T> j = *job;
    constexpr int64_t W = 256;
    T part[W];
    for (int64_t piece = begin; piece < end; piece++) {
      double total = 0;
      for (int64_t r = piece * ROWS; r < std::min(j.N, (piece + 1) * ROWS); r++) {
        const T *x = j.x + r * j.K, *w = j.weight + (j.each ? r * j.K : r);
        T lane[16] = {}, row = 0;
        for (int64_t k = 0; k < j.K; k += W) {
          const int64_t n = std::min(W, j.K - k), lanes = (n + 15) / 16 * 16;
          for (int64_t l = 0; l < n; l++) part[l] = loss(x[k + l], j.gamma);
          if (j.weight && j.each)
            for (int64_t l = 0; l < n; l++) part[l] *= w[k + l];
          for (int64_t l = n; l < lanes; l++) part[l] = 0;
          for (int64_t i = 0; i < lanes; i += 16)
            for (int l = 0; l < 16; l++) lane[l] += part[i + l];
        }
        for (int l = 0; l < 16; l++) row += lane[l];
        row *= T(1) - j.alpha;
        const int64_t right = j.label[r];
        if (right >= 0 && right < j.K) row += (j.alpha * loss(-x[right], j.gamma) - (T(1) - j.alpha) * loss(x[right], j.gamma)) * (j.weight && j.each ? w[right] : T(1));
        total += double(j.weight && !j.each ? row * *w : row);
      }
      j.sum[piece] = total;
    }
  }
};

template <bool square, class T> struct Grad {
  static INLINE T slope(T z, const Job<T>& j) {
    T power, soft, p, rest;
    parts<square>(z, j.gamma, power, soft, p, rest);
    return power * (j.gamma * rest * soft + p);
  }
  static INLINE void run(const Job<T>* job, int64_t begin, int64_t end) {
    const Job<T> j = *job;
    for (int64_t r = begin; r < end; r++) {
      const T *x = j.x + r * j.K, *w = j.weight + (j.each ? r * j.K : r);
      T* g = j.grad + r * j.K;
      const T no = (T(1) - j.alpha) * j.scale * (j.weight && !j.each ? *w : T(1)), yes = -j.alpha * j.scale * (j.weight && !j.each ? *w : T(1));
      if (j.weight && j.each)
        for (int64_t k = 0; k < j.K; k++) g[k] = no * w[k] * slope(x[k], j);
      else
        for (int64_t k = 0; k < j.K; k++) g[k] = no * slope(x[k], j);
      const int64_t right = j.label[r];
      if (right >= 0 && right < j.K) g[right] = yes * (j.weight && j.each ? w[right] : T(1)) * slope(-x[right], j);
    }
  }
};

// Logits, labels and weights of one call; f(job) runs it
template <class F> void prepare(const Tensor& x, const Tensor& label, const std::optional<Tensor>& weight, double gamma, double alpha, F f) {
  require(x.dim() == 2 && label.dim() == 1 && label.size(0) == x.size(0) && label.scalar_type() == ScalarType::Long, "focal_loss: logits must be [N,K], labels [N] int64");
  require(!weight || (weight->scalar_type() == x.scalar_type() && weight->size(0) == x.size(0) && (weight->dim() == 1 || (weight->dim() == 2 && weight->size(1) == x.size(1)))),
          "focal_loss: weights must be [N] or [N,K], of the logits' type");
  by_type("focal_loss", x, [&](auto t) {
    using T = decltype(t);
    f(Job<T>{data<T>(x), weight ? data<T>(*weight) : nullptr, data<int64_t>(label), x.size(0), x.size(1), weight && weight->dim() == 2, T(gamma), T(alpha), T(1), nullptr, nullptr});
  }, "logits");
}

std::optional<Tensor> whole(const std::optional<Tensor>& t) { return t ? std::optional<Tensor>(ts::contiguous(*t)) : std::nullopt; }

Tensor focal_loss(const Tensor& x_, const Tensor& label_, const std::optional<Tensor>& weight_, double gamma, double alpha) {
  Tensor x = ts::contiguous(x_), label = ts::contiguous(label_), total = ts::new_empty(x, {});
  std::optional<Tensor> weight = whole(weight_);
  prepare(x, label, weight, gamma, alpha, [&](auto j) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(j.x)>>;
    std::vector<double> sums((j.N + ROWS - 1) / ROWS);
    j.sum = sums.data();
    spread(sums.size(), 1.5e-6 * j.N * j.K, [&](int64_t a, int64_t b) {
      gamma == 2 ? dispatch<Sum<true, T>>((const Job<T>*)&j, a, b) : dispatch<Sum<false, T>>((const Job<T>*)&j, a, b);
    });
    double sum = 0;
    for (double s : sums) sum += s;
    *out<T>(total) = T(sum);
  });
  return total;
}

Tensor focal_loss_backward(const Tensor& grad, const Tensor& x_, const Tensor& label_, const std::optional<Tensor>& weight_, double gamma, double alpha) {
  Tensor x = ts::contiguous(x_), label = ts::contiguous(label_), slopes = ts::new_empty(x, x.sizes());
  require(grad.numel() == 1 && grad.scalar_type() == x.scalar_type(), "focal_loss: the gradient of the sum must be one number of the logits' type");
  std::optional<Tensor> weight = whole(weight_);
  prepare(x, label, weight, gamma, alpha, [&](auto j) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(j.x)>>;
    j.scale = *data<T>(grad), j.grad = out<T>(slopes);
    spread(j.N, 3e-6 * j.N * j.K, [&](int64_t a, int64_t b) {
      gamma == 2 ? dispatch<Grad<true, T>>((const Job<T>*)&j, a, b) : dispatch<Grad<false, T>>((const Job<T>*)&j, a, b);
    });
  });
  return slopes;
}

}  // namespace
}  // namespace ndet

STABLE_TORCH_LIBRARY_IMPL(notebook_det, CPU, m) {
  m.impl("focal_loss", TORCH_BOX(&ndet::focal_loss));
  m.impl("focal_loss_backward", TORCH_BOX(&ndet::focal_loss_backward));
}
