// The acceptance step of speculative decoding, from raw logits to (tokens kept, next token), in one launch.
//
// What is decided, and why it is lossless, stands in verify.py; `accept_reference` there is the definition.  It makes
// 2K+1 rows of float64 probabilities and looks at a few of them.  Here none is ever written.  Step by step:
//
//   1. A row's softmax is two numbers, its largest logit and sum exp((z - largest) / T), and one pass finds both: when
//      the running maximum grows, what was summed so far is scaled down, as exp(a - c) = exp(a - b) exp(b - c)
//      ("online softmax", Milakov & Gimelshein 1805.02867).  So a row is read once, and nothing is written.
//   2. A draft token is decided by two probabilities: only these are computed, and no row after the first rejection
//      is read.  If the draft remembers its rows' log-sum-exp (draft_lse), one number is read of a kept token's row.
//   3. The draw reads the stop row again, by now in the cache, and searches: the mass of 32 pieces of the row, then of
//      32 pieces of the piece that holds the coin, and so on down to one id.
//
// Exponentials are float32, right to 1e-7 each; sums are float64, so a token of probability 1e-7 beside one of 1 is
// drawn at its rate.  A decision can differ from the reference only if a coin lies within about 1e-7 of a boundary.
//
// All is written once, for a *team* of workers on one batch row: one thread on the CPU, 1024 on a GPU, and in the tests
// 1, 2 and 7 CPU threads, where a forgotten meeting shows.  They run the same lines, each on its own tiles of the row,
// and meet only in team.max and team.sum, which answer all alike.
// Letters: B batch rows, K drafted tokens, V vocabulary, T temperature, W ids in a tile, z a logit.

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
enum Status : int64_t { OK, BAD_COIN, BAD_TOKEN, BAD_TEMPERATURE, NO_DISTRIBUTION };  // verify.py has the words

struct Temperature {
  double value;
  float hi, lo;  // log2(e) / T as a sum; hi is neither 0 nor infinite, so that 0 * hi = 0 and -inf * hi = -inf
  FN explicit Temperature(double T) : value(T) {
    double slope = T > 0 ? fmin(fmax(1.4426950408889634 / T, double(FLT_MIN)), double(FLT_MAX)) : FLT_MAX;  // 0: only the top
    hi = float(slope), lo = float(slope - hi);
  }
};

// exp(x / T) for x <= 0, as 2^n e^g with n = round(x hi) and |g| < 0.35, where seven terms of the series are enough.
// No branch, no table, no library call: compilers run it on 16 numbers at once.  -inf gives 0, NaN and +inf give NaN.
FN float weight(float x, const Temperature& T) {
  float exponent = x * T.hi;
  float shifted = (exponent < -125 ? -125 : exponent) + 12582912.0f;  // + 1.5 * 2^23: n is now in the last bits
  float g = fmaf(x, T.lo, fmaf(x, T.hi, 12582912.0f - shifted)) * 0.6931471806f;
  float e = fmaf(g, fmaf(g, fmaf(g, 1 / 5040.0f, 1 / 720.0f), 1 / 120.0f), 1 / 24.0f);
  e = fmaf(g, fmaf(g, fmaf(g, fmaf(g, e, 1 / 6.0f), 0.5f), 1.0f), 1.0f);
  return exponent < -125 ? 0 : e * c10::detail::fp32_from_bits((c10::detail::fp32_to_bits(shifted) << 23) + 0x3f800000);
}

// ---- a row of logits ----------------------------------------------------------------------------------------
template <int W, class Stored> FN void load_as(const Stored* from, int64_t count, float* z) {
#ifdef __CUDACC__  // a GPU thread reads 16 bytes at once if they are aligned (of odd V, most rows are not)
  constexpr int N = 16 / sizeof(Stored);
  if (count >= W && W % N == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    for (int i = 0; i < W; i += N) {
      Stored pack[N];
      memcpy(pack, __builtin_assume_aligned(from + i, 16), 16);
      for (int j = 0; j < N; j++) z[i + j] = pack[j];
    }
    return;
  }
#endif
  for (int i = 0; i < W; i++) z[i] = i < count ? float(from[i]) : -INFINITY;  // past the end: impossible ids
}

struct Row {  // V logits of one position; once measured, logit z has probability exp((z - top) / T) / sum
  const void* data;
  ScalarType dtype;
  int64_t V;
  const Temperature& T;
  float top = -FLT_MAX;  // not -inf, so that (-inf) - top is not NaN
  double sum = 0;

  template <int W> FN void load(int64_t first, int64_t end, float* z) const {  // z[i] = logit of id first + i
    if (dtype == ScalarType::Float) load_as<W>(static_cast<const float*>(data) + first, end - first, z);
    if (dtype == ScalarType::BFloat16) load_as<W>(static_cast<const c10::BFloat16*>(data) + first, end - first, z);
    if (dtype == ScalarType::Half) load_as<W>(static_cast<const c10::Half*>(data) + first, end - first, z);
  }
  FN double probability(int64_t id) const {
    float z = 0;
    load<1>(id, V, &z);
    return exp((z - double(top)) / T.value) / sum;
  }
  FN void assume(double lse) { top = lse * T.value, sum = exp(lse - top / T.value); }  // log of sum exp(z / T)
};

// One pass over a row: its top and sum.  A NaN or +inf makes the sum NaN, and nothing but -inf makes it 0; then every
// probability of the row is NaN, so nothing is kept, and what the draw finds is no number.
template <class Team> [[gnu::noinline]] FN void measure(Team& team, Row& row) {
  constexpr int W = Team::W;
  float z[W], top = row.top;
  double sum = 0;
  for (int64_t first = team.rank * W; first < row.V; first += team.size * W) {
    row.load<W>(first, row.V, z);
    const float before = top;
#pragma omp simd reduction(max : top)  // the compiler may keep 16 maxima, or sums, and join them at the end
    for (int i = 0; i < W; i++) top = z[i] > top ? z[i] : top;
    sum *= weight(before - top, row.T);
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < W; i++) sum += weight(z[i] - top, row.T);
  }
  row.top = team.max(top);
  row.sum = sum * weight(top - row.top, row.T);
  team.sum(&row.sum, 1);
}

// ---- the draw -----------------------------------------------------------------------------------------------
struct Mass {  // what the next token is drawn from: target_p or, given a rejected draft, what it has over draft_q
  const Row& target;
  const Row* draft;
  int64_t token;  // a draft without logits has all its mass on the token that it proposed

  template <int W> FN double tile(int64_t first, int64_t end, double* mass) const {  // of ids first + i; and its sum
    float z[W];
    target.load<W>(first, end, z);
    double sum = 0, p = 1 / target.sum, q = draft ? 1 / draft->sum : 0;
    for (int i = 0; i < W; i++) mass[i] = p * weight(z[i] - target.top, target.T);
    if (draft && draft->data) {
      draft->load<W>(first, end, z);
      for (int i = 0; i < W; i++) mass[i] -= q * weight(z[i] - draft->top, target.T);
      for (int i = 0; i < W; i++) mass[i] = mass[i] <= 0 ? 0 : mass[i];  // not max(0, .): NaN stays NaN
    } else if (draft && first <= token && token < first + W) {
      mass[token - first] = 0;
    }
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < W; i++) sum += mass[i];
    return sum;
  }
};

// The first i of n with below + mass[0] + .. + mass[i] > threshold; `below` grows by what lies before it.  If rounding
// leaves none, the last that has mass: what is drawn is always possible.
FN int pick(const double* mass, int n, double threshold, double& below) {
  int last = 0;
  for (int i = 0; i < n; below += mass[i++]) {
    if (mass[i] > 0) last = i;
    if (mass[i] > 0 && below + mass[i] > threshold) return i;
  }
  return below -= mass[last], last;
}

// The first id, ascending, whose cumulative mass exceeds coin * total.  -1: there is no mass; -2: it is NaN.
template <class Team> [[gnu::noinline]] FN int64_t draw(Team& team, const Mass& of, double coin) {
  constexpr int W = Team::W;
  double mass[W], below = 0, threshold = -1;
  int64_t begin = 0, end = of.target.V;
  do {  // which piece of begin .. end holds the coin?
    const int64_t width = ((end - begin - 1) / (W * 32) + 1) * W;  // whole tiles
    double piece[32] = {};
    for (int64_t first = begin + team.rank * W; first < end; first += team.size * W)
      piece[(first - begin) / width] += of.tile<W>(first, end, mass);
    team.sum(piece, 32);
    if (threshold < 0) {  // this was the whole row
      double total = 0;
      for (double x : piece) total += x;
      if (!(total > 0)) return total == 0 ? -1 : -2;
      threshold = coin * total;
    }
    begin += pick(piece, 32, threshold, below) * width;
    end = end < begin + width ? end : begin + width;
  } while (end - begin > W);
  of.tile<W>(begin, end, mass);
  return begin + pick(mass, W, threshold, below);
}

// ---- one round of one batch row -----------------------------------------------------------------------------
template <class Number> struct Table {  // (B, K, ..) by its strides, 64 bits wide; logits count theirs in bytes
  const Number* data = nullptr;
  int64_t batch_stride = 0, stride = 0;
  ScalarType dtype = ScalarType::Undefined;
  FN const Number& at(int64_t b, int64_t k) const { return data[b * batch_stride + k * stride]; }
};
struct Round {
  int64_t B, K, V;
  int64_t *kept, *next, *status;  // (B,) each: what is decided
  Table<char> target_logits, draft_logits;
  Table<double> draft_lse, coins, temperature;
  Table<int64_t> tokens;
};

template <class Team> FN void decide(Team& team, const Round& r, int64_t b) {
  const Temperature T(r.temperature.at(b, 0));
  Status status = T.value >= 0 ? OK : BAD_TEMPERATURE;
  for (int64_t k = 0; k < r.K; k++)
    if (r.tokens.at(b, k) < -1 || r.tokens.at(b, k) >= r.V) status = BAD_TOKEN;
  for (int64_t k = 0; k <= r.K; k++)
    if (!(r.coins.at(b, k) >= 0 && r.coins.at(b, k) < 1)) status = BAD_COIN;
  const double coin = T.value > 0 ? r.coins.at(b, r.K) : 0;  // greedy: the first id that has any mass
  int64_t kept = 0, next = -1;
  while (status == OK && next < 0) {
    Row target{&r.target_logits.at(b, kept), r.target_logits.dtype, r.V, T};
    Row draft{nullptr, r.draft_logits.dtype, r.V, T};
    measure(team, target);
    const int64_t token = kept < r.K ? r.tokens.at(b, kept) : -1;  // -1: all were kept, or the draft was shorter
    if (token >= 0) {
      double q = 1, p = T.value > 0 ? target.probability(token) : token == draw(team, {target, nullptr, -1}, 0);
      if (r.draft_logits.data && T.value > 0) {
        draft.data = &r.draft_logits.at(b, kept);
        if (!r.draft_lse.data) measure(team, draft);
        else draft.assume(r.draft_lse.at(b, kept));
        q = draft.probability(token);
      }
      if (r.coins.at(b, kept) * q < p) {  // strict: a coin of 0 keeps nothing impossible; and NaN is never less
        kept++;
        continue;
      }
      next = draw(team, {target, &draft, token}, coin);
    }
    if (next == -1) next = draw(team, {target, nullptr, -1}, coin);  // also if target_p = draft_q, up to rounding
    if (next < 0) status = NO_DISTRIBUTION;
  }
  if (team.rank == 0) r.kept[b] = kept, r.next[b] = next, r.status[b] = status;
}

// ---- the operator -------------------------------------------------------------------------------------------
void run(const Round& r, int device);  // decide() for every batch row
template <class Number>
Table<Number> table(const Tensor& x, const Tensor& like, std::vector<int64_t> shape) {
  const ScalarType type = x.scalar_type();
  bool fits = x.dim() == int64_t(shape.size()) && x.is_cpu() == like.is_cpu() && x.get_device() == like.get_device();
  const bool logits = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
  fits &= sizeof(Number) == 1 ? logits : type == (std::is_integral_v<Number> ? ScalarType::Long : ScalarType::Double);
  for (size_t i = 0; fits && i < shape.size(); i++) fits = x.size(i) == shape[i];
  fits = fits && (x.dim() < 3 || x.size(2) == 1 || x.stride(2) == 1);
  STD_TORCH_CHECK(fits, "aurora::accept: a shape, dtype, device or stride does not fit; verify.accept tells more");
  const int64_t unit = x.element_size() / sizeof(Number), stride = x.dim() > 1 ? x.stride(1) * unit : 0;
  return {static_cast<const Number*>(x.const_data_ptr()), x.stride(0) * unit, stride, type};
}

auto accept(Tensor target_logits, std::optional<Tensor> draft_logits, std::optional<Tensor> draft_lse, Tensor tokens,
            Tensor coins, Tensor temperature) {
  const int64_t B = tokens.size(0), K = tokens.size(1), V = target_logits.size(2);
  const auto out = [&] { return torch::stable::new_empty(tokens, {&B, 1}); };
  const auto data = [](Tensor& x) { return static_cast<int64_t*>(x.mutable_data_ptr()); };
  Tensor kept = out(), next = out(), status = out();
  Round r{B, K, V, data(kept), data(next), data(status), table<char>(target_logits, tokens, {B, K + 1, V})};
  if (draft_logits) r.draft_logits = table<char>(*draft_logits, tokens, {B, K, V});
  if (draft_lse) r.draft_lse = table<double>(*draft_lse, tokens, {B, K});
  r.coins = table<double>(coins, tokens, {B, K + 1});
  r.temperature = table<double>(temperature, tokens, {B});
  r.tokens = table<int64_t>(tokens, tokens, {B, K});
  if (B) run(r, tokens.get_device());
  return std::make_tuple(kept, next, status);
}

// ---- teams, and how they are sent to work -------------------------------------------------------------------
#ifndef __CUDACC__
struct Alone {  // one CPU thread
  static constexpr int W = 256;
  int64_t rank = 0, size = 1;
  double max(double x) { return x; }
  void sum(double*, int) {}
};
void run(const Round& r, int) {
  const int64_t grain = 1 + (1 << 18) / (1 + r.V * (r.K + 1));  // batch rows that are worth a thread
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

  template <class Fold> FN void meet(double* x, int n, Fold fold) {  // folds n <= 32 numbers over all threads
    const auto warp = cooperative_groups::tiled_partition<32>(cooperative_groups::this_thread_block());
    const int w = warp.meta_group_rank(), lane = warp.thread_rank();
    for (int i = 0; i < n; i++) board[i][w] = cooperative_groups::reduce(warp, x[i], fold);
    __syncthreads();
    if (w < n) board[w][32] = cooperative_groups::reduce(warp, board[w][lane], fold);  // warp i folds number i
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
  STD_TORCH_CHECK(cudaGetLastError() == cudaSuccess, "aurora::accept: the GPU did not take the kernel");
}
STABLE_TORCH_LIBRARY_IMPL(aurora, CUDA, library) { library.impl("accept", TORCH_BOX(&accept)); }
#endif
