// The acceptance step of speculative decoding in one launch: logits to (tokens kept, next token).
// What is decided, and why it is lossless, stands in verify.py; support/accept_torch.py does it with
// 2K+1 rows of float64 probabilities.  Here no probability is ever written.
//
//   1. A row's softmax is two numbers, its largest logit and sum exp((z - largest) / T), and one
//      pass finds both: when the running maximum grows, what was summed so far is scaled down, as
//      exp(a - c) = exp(a - b) exp(b - c) ("online softmax", Milakov & Gimelshein 1805.02867).
//   2. Two probabilities decide about a token.  The token rule reads no row after a rejection; the
//      block rule takes w to the end of the chain, and notes at each place what it measured.
//   3. Block rule, back from the end to the first place whose coin is under its h: m takes a pass
//      over two rows.  But it is at most w_i - min(w_i target_p, draft_q)(x_{i+1}), which is known;
//      where the coin is not even under that h there is no pass, so few places have one.
//   4. That pass is also the first step of the draw, which searches: the mass of 32 pieces of the
//      row (together, m), then of 32 pieces of the piece that holds the coin, down to one id.
//
// Exponentials are float32, right to 1e-7 each; sums are float64, so a token of probability 1e-7
// beside one of 1 is drawn at its rate.  Decisions differ from accept_torch's only if a coin lies
// within about 1e-7 of a boundary; w_i is a product, so there i times that.
//
// All is written once, for a *team* of workers on a batch row: one CPU thread, 1024 GPU threads, in
// the tests 2 and 7 CPU threads, where a forgotten meeting shows.  They run the same lines, each on
// its own tiles of a row, and meet only in team.max and team.sum, which answer all alike.
// Letters: B batch rows, K drafted tokens, V vocabulary, W ids in a tile, z a logit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <cfloat>
#include <cmath>
#ifdef __CUDACC__  // nvcc makes the GPU's library of this file, any C++ compiler the CPU's
#include <cooperative_groups/reduce.h>
#define FN __device__ inline
#else
#define FN inline
#endif

using torch::headeronly::ScalarType, torch::stable::Tensor;
enum Status : int64_t { OK, BAD_COIN, BAD_TOKEN, BAD_TEMPERATURE, NO_DISTRIBUTION };  // verify.py

struct Temperature {
  double value;
  float hi, lo;  // log2(e) / T = hi + lo; hi is not 0 nor infinite: 0 * hi = 0, -inf * hi = -inf
  FN Temperature(double T = 1) : value(fabs(T)) {  // no -0
    const double slope = 1.4426950408889634 / value;
    hi = float(fmin(fmax(slope, double(FLT_MIN)), double(FLT_MAX)));  // T = 0: only the top is left
    lo = slope < FLT_MAX ? float(slope - hi) : 0;
  }
};

// exp(x / T) for x <= 0, as 2^n e^g with n = round(x hi) and |g| < 0.35, where seven terms of the
// series are enough; adding 1.5 * 2^23 rounds, and leaves n in the last bits.  No branch, no table,
// no library call: compilers run it on 16 numbers at once.  -inf gives 0, NaN and +inf give NaN.
FN float exp_over(float x, const Temperature& T) {
  float exponent = x * T.hi;
  float shifted = (exponent < -125 ? -125 : exponent) + 12582912.0f;
  float g = fmaf(x, T.lo, fmaf(x, T.hi, 12582912.0f - shifted)) * 0.6931471806f;
  float e = fmaf(g, fmaf(g, fmaf(g, 1 / 5040.0f, 1 / 720.0f), 1 / 120.0f), 1 / 24.0f);
  e = fmaf(g, fmaf(g, fmaf(g, fmaf(g, e, 1 / 6.0f), 0.5f), 1.0f), 1.0f);
  const uint32_t power = (c10::detail::fp32_to_bits(shifted) << 23) + 0x3f800000;  // 2^n
  return exponent < -125 ? 0 : e * c10::detail::fp32_from_bits(power);
}

template <int W, class Stored>  // z[i] = the logit of id first + i; there is none from `end` on
FN void load_as(const void* row, int64_t first, int64_t end, float* z) {
  const Stored* from = static_cast<const Stored*>(row) + first;
#ifdef __CUDACC__  // a GPU thread reads 16 bytes at once if they are aligned: of odd V, few are
  constexpr int N = 16 / sizeof(Stored);
  if (end - first >= W && W % N == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    for (int i = 0; i < W; i += N) {
      Stored pack[N];
      memcpy(pack, __builtin_assume_aligned(from + i, 16), 16);
      for (int j = 0; j < N; j++) z[i + j] = pack[j];
    }
    return;
  }
#endif
  for (int i = 0; i < W; i++) z[i] = i < end - first ? float(from[i]) : -INFINITY;
}

struct Row {  // V logits; once measured, logit z has probability exp((z - top) / T) / sum
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Undefined;
  int64_t V = 0;
  Temperature T;
  float top = -FLT_MAX;  // not -inf, so that (-inf) - top is not NaN
  double sum = 0;
  template <int W> FN void load(int64_t first, int64_t end, float* z) const {
    if (dtype == ScalarType::Float) load_as<W, float>(data, first, end, z);
    if (dtype == ScalarType::BFloat16) load_as<W, c10::BFloat16>(data, first, end, z);
    if (dtype == ScalarType::Half) load_as<W, c10::Half>(data, first, end, z);
  }
  FN double probability(int64_t id) const {
    float z = 0;
    load<1>(id, V, &z);
    return (z < top ? exp((z - double(top)) / T.value) : 1) / sum;
  }
};

// One pass over a row: its top and sum.  A NaN or +inf makes the sum NaN, nothing but -inf makes it
// 0: the row is a distribution if its sum is positive.
template <class Team> [[gnu::noinline]] FN void measure(Team& team, Row& row) {
  constexpr int W = Team::W;
  float z[W], top = row.top;
  double sum = 0;
  for (int64_t first = team.rank * W; first < row.V; first += team.size * W) {
    row.load<W>(first, row.V, z);
    const float before = top;
#pragma omp simd reduction(max : top)  // the compiler may keep 16 maxima, or sums, and join them
    for (int i = 0; i < W; i++) top = z[i] > top ? z[i] : top;
    sum *= exp_over(before - top, row.T);
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < W; i++) sum += exp_over(z[i] - top, row.T);
  }
  row.top = team.max(top);
  row.sum = sum * exp_over(top - row.top, row.T);
  team.sum(&row.sum, 1);
}

struct Place {  // of the chain: there, the next token is drawn from max(0, w target_p - draft_q)
  Row target, draft;  // a draft without logits has all its mass on the token that it proposed
  int64_t token = -1;  // -1: none was drafted, so nothing is subtracted
  double w = 1;
  FN double draft_q() const { return draft.data ? draft.probability(token) : 1; }  // of the token
  template <int W> FN double tile(int64_t first, int64_t end, double* mass) const {  // of W ids
    float z[W];
    target.load<W>(first, end, z);
    double sum = 0, p = w / target.sum, q = draft.data ? 1 / draft.sum : 0;
    for (int i = 0; i < W; i++) mass[i] = p * exp_over(z[i] - target.top, target.T);
    if (draft.data) {
      draft.load<W>(first, end, z);
      for (int i = 0; i < W; i++) mass[i] -= q * exp_over(z[i] - draft.top, target.T);
      for (int i = 0; i < W; i++) mass[i] = mass[i] > 0 ? mass[i] : 0;
    } else if (first <= token && token < first + W) {
      mass[token - first] = 0;
    }
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < W; i++) sum += mass[i];
    return sum;
  }
};

template <int W> FN int64_t piece_width(int64_t ids) { return ((ids - 1) / (W * 32) + 1) * W; }

// One pass over ids begin .. end: the mass of each of 32 pieces, whole tiles; and their sum.
template <class Team> [[gnu::noinline]]
FN double survey(Team& team, const Place& at, int64_t begin, int64_t end, double* piece) {
  constexpr int W = Team::W;
  const int64_t width = piece_width<W>(end - begin);
  double mass[W], total = 0;
  for (int i = 0; i < 32; i++) piece[i] = 0;
  for (int64_t first = begin + team.rank * W; first < end; first += team.size * W)
    piece[(first - begin) / width] += at.tile<W>(first, end, mass);
  team.sum(piece, 32);
  for (int i = 0; i < 32; i++) total += piece[i];
  return total;
}

// The first i of n with below + mass[0] + .. + mass[i] > threshold; `below` grows by what lies
// before it.  If rounding leaves none, the last that has mass: what is drawn is always possible.
FN int pick(const double* mass, int n, double threshold, double& below) {
  int last = 0;
  for (int i = 0; i < n; below += mass[i++]) {
    if (mass[i] > 0) last = i;
    if (mass[i] > 0 && below + mass[i] > threshold) return i;
  }
  return below -= mass[last], last;
}

// The first id, ascending, whose cumulative mass exceeds the threshold; piece: the row's survey.
template <class Team> [[gnu::noinline]]
FN int64_t draw(Team& team, const Place& at, double threshold, double* piece) {
  constexpr int W = Team::W;
  double mass[W], below = 0;
  int64_t begin = 0, end = at.target.V;
  while (true) {  // which piece of begin .. end holds the coin?
    const int64_t width = piece_width<W>(end - begin);
    begin += pick(piece, 32, threshold, below) * width;
    end = end < begin + width ? end : begin + width;
    if (end - begin <= W) break;
    survey(team, at, begin, end, piece);
  }
  at.tile<W>(begin, end, mass);
  return begin + pick(mass, W, threshold, below);
}

template <class Number> struct Table {  // (B, K, ..) by its strides; logits count theirs in bytes
  const Number* data = nullptr;
  int64_t batch_stride = 0, stride = 0;
  ScalarType dtype = ScalarType::Undefined;
  FN const Number& at(int64_t b, int64_t k) const { return data[b * batch_stride + k * stride]; }
};
struct Round {
  int64_t B, K, V;
  bool block;
  int64_t *kept, *next, *status;  // (B,) each: what is decided
  Place* places;                  // (B, K+1) notes, in a tensor, as K may be any number
  Table<char> target_logits, draft_logits;
  Table<double> coins, temperature;
  Table<int64_t> tokens;
};

// Decides about batch row b, whose own K is `length`: keeps k tokens.
template <class Team>
FN Status judge(Team& team, const Round& r, int64_t b, int64_t length, int64_t& k, int64_t& next) {
  const Temperature T(r.temperature.at(b, 0));
  Place here, *places = r.places + b * (r.K + 1);
  double w = 1, piece[32];
  for (k = 0;; k++) {
    here = Place{{&r.target_logits.at(b, k), r.target_logits.dtype, r.V, T}};
    measure(team, here.target);
    if (!(here.target.sum > 0)) return NO_DISTRIBUTION;
    if (k == length) break;
    here.token = r.tokens.at(b, k), here.w = w;
    if (r.draft_logits.data && T.value > 0) {  // a greedy draft's choice is no draw
      here.draft = Row{&r.draft_logits.at(b, k), r.draft_logits.dtype, r.V, T};
      measure(team, here.draft);
      if (!(here.draft.sum > 0)) return NO_DISTRIBUTION;
    }
    double p = here.target.probability(here.token), q = here.draft_q();
    if (T.value == 0 && p > 0 && p < 1) {  // one of several at the top: the first is the argmax
      survey(team, Place{here.target}, 0, r.V, piece);
      p = draw(team, Place{here.target}, 0, piece) == here.token;
    }
    if (team.rank == 0) places[k] = here;  // all see it once they have met, at the next place
    // Here and below, coin < .. is strict, so that a coin of 0 keeps nothing impossible.
    if (r.block) w = fmin(1.0, w * p / fmax(q, 1e-300));
    else if (!(r.coins.at(b, k) * q < p)) break;
  }

  const auto under = [&](double m) {  // is the coin under h, were this m?  None can always be kept
    return k == 0 || r.coins.at(b, k - 1) * (m + (1 - here.w)) < m;
  };
  bool found = !r.block || k == 0 || r.coins.at(b, k - 1) < w;
  double m = found ? survey(team, here, 0, r.V, piece) : 0;
  while (!found) {
    here = places[--k];
    const double most = here.w - here.draft_q() * w;  // m is not more; w is of the place after
    if (under(most)) m = survey(team, here, 0, r.V, piece), found = under(m);
    w = here.w;
  }
  if (m == 0) here = Place{here.target}, m = survey(team, here, 0, r.V, piece);  // p = q, rounded
  const double coin = T.value > 0 ? r.coins.at(b, r.K) : 0;  // greedy: the first id with any mass
  next = draw(team, here, coin * m, piece);
  return OK;
}

template <class Team> FN void decide(Team& team, const Round& r, int64_t b) {
  Status status = r.temperature.at(b, 0) >= 0 ? OK : BAD_TEMPERATURE;
  int64_t length = 0, kept = 0, next = -1;
  for (int64_t k = 0; k < r.K; k++) {
    const int64_t token = r.tokens.at(b, k);
    if (token < -1 || token >= r.V || (token >= 0 && length < k)) status = BAD_TOKEN;
    if (token >= 0) length++;
  }
  for (int64_t k = 0; k <= r.K; k++)
    if (!(r.coins.at(b, k) >= 0 && r.coins.at(b, k) < 1)) status = BAD_COIN;
  if (status == OK) status = judge(team, r, b, length, kept, next);
  if (team.rank == 0) r.kept[b] = status == OK ? kept : 0, r.next[b] = next, r.status[b] = status;
}

void run(const Round& r, int device);  // decide() for every batch row
template <class Number>
Table<Number> table(const Tensor& x, const Tensor& like, std::vector<int64_t> shape) {
  const ScalarType type = x.scalar_type();
  bool fits = type == (std::is_integral_v<Number> ? ScalarType::Long : ScalarType::Double);
  if (sizeof(Number) == 1)  // logits
    fits = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
  fits &= x.is_cpu() == like.is_cpu() && x.get_device() == like.get_device();
  fits &= x.dim() == int64_t(shape.size());
  for (size_t i = 0; fits && i < shape.size(); i++) fits = x.size(i) == shape[i];
  fits = fits && (x.dim() < 3 || x.size(2) == 1 || x.stride(2) == 1);
  STD_TORCH_CHECK(fits, "a shape, dtype, device or stride does not fit; verify.accept tells more");
  const int64_t unit = x.element_size() / sizeof(Number), stride = x.dim() > 1 ? x.stride(1) : 0;
  return {static_cast<const Number*>(x.const_data_ptr()), x.stride(0) * unit, stride * unit, type};
}

auto accept(Tensor target_logits, std::optional<Tensor> draft_logits, Tensor tokens, Tensor coins,
            Tensor temperature, bool block) {
  const int64_t B = tokens.size(0), K = tokens.size(1), V = target_logits.size(2);
  const auto out = [&](int64_t n) { return torch::stable::new_empty(tokens, {&n, 1}); };
  const auto data = [](Tensor& x) { return static_cast<int64_t*>(x.mutable_data_ptr()); };
  Tensor kept = out(B), next = out(B), status = out(B);
  Tensor places = out(B * (K + 1) * (sizeof(Place) / sizeof(int64_t)));
  Round r{B, K, V, block, data(kept), data(next), data(status), (Place*)data(places)};
  r.target_logits = table<char>(target_logits, tokens, {B, K + 1, V});
  if (draft_logits) r.draft_logits = table<char>(*draft_logits, tokens, {B, K, V});
  r.coins = table<double>(coins, tokens, {B, K + 1});
  r.temperature = table<double>(temperature, tokens, {B});
  r.tokens = table<int64_t>(tokens, tokens, {B, K});
  if (B) run(r, tokens.get_device());
  return std::make_tuple(kept, next, status);
}

#ifndef __CUDACC__
struct Alone {  // one CPU thread
  static constexpr int W = 256;
  int64_t rank = 0, size = 1;
  double max(double x) { return x; }
  void sum(double*, int) {}
};
void run(const Round& r, int) {
  const int64_t grain = 1 + (1 << 18) / (1 + r.V * (r.K + 1));  // rows that are worth a thread
  torch::stable::parallel_for(0, r.B, grain, [&](int64_t begin, int64_t end) {
    Alone team;
    for (int64_t b = begin; b < end; b++) decide(team, r, b);
  });
}
STABLE_TORCH_LIBRARY_IMPL(aurora, CPU, library) { library.impl("accept", TORCH_BOX(&accept)); }
#else
struct Block {  // 1024 GPU threads: 32 warps of 32
  static constexpr int W = 16;
  int64_t rank, size;
  double (*board)[33];  // (32, 33), in memory that the block shares

  template <class Fold> FN void meet(double* x, int n, Fold fold) {  // n <= 32 numbers of each
    namespace cg = cooperative_groups;
    const auto warp = cg::tiled_partition<32>(cg::this_thread_block());
    const int which = warp.meta_group_rank(), lane = warp.thread_rank();
    for (int i = 0; i < n; i++) board[i][which] = cg::reduce(warp, x[i], fold);
    __syncthreads();
    if (which < n) board[which][32] = cg::reduce(warp, board[which][lane], fold);
    __syncthreads();
    for (int i = 0; i < n; i++) x[i] = board[i][32];
  }
  FN double max(double x) { return meet(&x, 1, cooperative_groups::greater<double>()), x; }
  FN void sum(double* x, int n) { meet(x, n, cooperative_groups::plus<double>()); }
};
__global__ void __launch_bounds__(1024, 1) accept_kernel(Round r) {
  __shared__ double board[32][33];
  Block team{threadIdx.x, 1024, board};
  decide(team, r, blockIdx.x);
}
void run(const Round& r, int device) {
  torch::stable::accelerator::DeviceGuard guard(device);
  auto stream = torch::stable::accelerator::getCurrentStream(device);
  accept_kernel<<<r.B, 1024, 0, static_cast<cudaStream_t>(stream.nativeHandle())>>>(r);
  STD_TORCH_CHECK(cudaGetLastError() == cudaSuccess, "aurora::accept: the GPU did not take it");
}
STABLE_TORCH_LIBRARY_IMPL(aurora, CUDA, library) { library.impl("accept", TORCH_BOX(&accept)); }
#endif
