// Products of a sheet of tokens x [S, in] with a sparse weight [out, in]: y [S, out] = act(x W^T + bias).
//
// Two forms of W. *Rows in blocks* (Rx1): R neighbouring outputs have the same live inputs, so one vector register (or a
// few) holds a block's outputs, and each live input costs one load of R weights and one multiply-add for each token of a
// tile. *Any mask* (1x1): the vectors run over the tokens of a tile instead, and each live weight is broadcast.
//
// Both read a tile of tokens that was transposed once, [in, tile], so that what a live input needs lies together. Every
// token goes through the same operations in the same order, whatever stands beside it: its result does not depend on the
// batch. Tiles are worked on by the threads of the OpenMP runtime that the caller hands over; without one, by this thread.
//
// Vectors are those of GCC and Clang, as wide as the target's registers. Nothing here knows torch or Python.

#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

template <int N> struct VectorOf { typedef float type __attribute__((vector_size(N * 4), aligned(4))); };
template <int N> using Vector = typename VectorOf<N>::type;

template <int N> inline Vector<N> load(const float *from) {
  Vector<N> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <int N> inline void store(float *to, Vector<N> value) { std::memcpy(to, &value, sizeof value); }

template <int N> inline Vector<N> broadcast(float value) { return value - Vector<N>{}; }

struct BFloat16 { uint16_t bits; };

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline void narrow(float value, float *to) { *to = value; }
inline void narrow(float value, BFloat16 *to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    bits |= 0x00400000u;  // NaN stays NaN
  else
    bits += 0x7fffu + ((bits >> 16) & 1u);  // to the nearest, ties to even
  to->bits = uint16_t(bits >> 16);
}

template <int N> inline void store_outputs(float *to, Vector<N> value, int count) {
  if (count >= N)
    store<N>(to, value);
  else
    std::memcpy(to, &value, 4 * count);
}

template <int N> inline void store_outputs(BFloat16 *to, Vector<N> value, int count) {
  float plain[N];
  store<N>(plain, value);
  for (int i = 0; i < N; i++)
    if (i < count) narrow(plain[i], to + i);
}

// Activations ---------------------------------------------------------------------------------------------------------

enum Activation { NONE = 0, GELU = 1, RELU = 2 };

// erf by a ratio of polynomials in x^2, fitted to it on [-4, 4]: within 5e-7, the rounding of float32 included.
template <int N> inline Vector<N> error_function(Vector<N> x) {
  const Vector<N> limit = broadcast<N>(4.0f);
  x = x > limit ? limit : x;
  x = x < -limit ? -limit : x;
  const Vector<N> u = x * x;
  Vector<N> p = broadcast<N>(1.921700311e-08f);
  p = p * u + -1.990058731e-06f;
  p = p * u + 1.554866879e-04f;
  p = p * u + 4.291135590e-03f;
  p = p * u + 5.242756039e-02f;
  p = p * u + 2.139009534e-01f;
  p = p * u + 1.128378679e+00f;
  Vector<N> q = broadcast<N>(1.097559162e-03f);
  q = q * u + 1.554727012e-02f;
  q = q * u + 1.207814202e-01f;
  q = q * u + 5.228924556e-01f;
  q = q * u + 1.0f;
  return x * p / q;
}

template <int N> inline Vector<N> activate(Vector<N> x, int activation) {
  if (activation == GELU) return x * 0.5f * (error_function<N>(x * 0.70710678118654752f) + 1.0f);
  if (activation == RELU) return x > Vector<N>{} ? x : Vector<N>{};
  return x;
}

// Tiles ---------------------------------------------------------------------------------------------------------------

// tokens [count, in] of a sheet -> tile [in, width], the places behind the last token 0.
template <class T> void transpose_tile(const T *x, int64_t stride, int count, int64_t in, int width, float *tile) {
  constexpr int BLOCK = 16;
  for (int64_t c0 = 0; c0 < in; c0 += BLOCK) {
    const int columns = in - c0 < BLOCK ? int(in - c0) : BLOCK;
    for (int t = 0; t < count; t++) {
      const T *row = x + t * stride + c0;
      float *to = tile + c0 * width + t;
      if (columns == BLOCK)
        for (int c = 0; c < BLOCK; c++) to[c * width] = widen(row[c]);
      else
        for (int c = 0; c < columns; c++) to[c * width] = widen(row[c]);
    }
    if (count < width)
      for (int c = 0; c < columns; c++)
        for (int t = count; t < width; t++) tile[(c0 + c) * width + t] = 0.0f;
  }
}

// A job that threads share: they take tile after tile.
struct Job {
  void (*work)(Job *, float *);
  std::atomic<int64_t> next;
  int64_t tiles;
  const void *x, *weights, *columns, *starts, *bias;
  void *y;
  int64_t tokens, in, out, x_stride, y_stride, buffer;
  int tile, activation;
};

// Rows in blocks ------------------------------------------------------------------------------------------------------

constexpr int ROW = 16;  // places of a tile for each input: a line of cache

template <int R, int T, class E>
inline void block_of_outputs(const float *tile, const float *weights, const int32_t *columns, int64_t live,
                             const float *bias, int activation, E *y, int64_t y_stride, int valid, int outputs) {
  constexpr int N = R < LANES ? R : LANES;
  constexpr int V = R / N;
  Vector<N> sums[T][V];
  for (int v = 0; v < V; v++) {
    const Vector<N> first = bias ? load<N>(bias + v * N) : Vector<N>{};
    for (int t = 0; t < T; t++) sums[t][v] = first;
  }
  for (int64_t i = 0; i < live; i++) {
    const float *x = tile + int64_t(columns[i]) * ROW;
    for (int v = 0; v < V; v++) {
      const Vector<N> w = load<N>(weights + i * R + v * N);
      for (int t = 0; t < T; t++) sums[t][v] += w * x[t];
    }
  }
  for (int t = 0; t < T; t++) {
    if (t >= valid) break;
    for (int v = 0; v < V; v++)
      if (outputs > v * N) store_outputs<N>(y + t * y_stride + v * N, activate<N>(sums[t][v], activation), outputs - v * N);
  }
}

template <int R, int T, class E> void blocks_work(Job *job, float *buffer) {
  const int64_t groups = (job->out + R - 1) / R;
  const E *x = static_cast<const E *>(job->x);
  E *y = static_cast<E *>(job->y);
  const float *weights = static_cast<const float *>(job->weights);
  const int32_t *columns = static_cast<const int32_t *>(job->columns);
  const int64_t *starts = static_cast<const int64_t *>(job->starts);
  const float *bias = static_cast<const float *>(job->bias);
  // Several tiles at a time, so that the weights of a block are read from the nearest cache.
  const int64_t size = job->in * ROW;
  const int64_t together = job->buffer / size > 0 ? job->buffer / size : 1;
  const int64_t rounds = (job->tiles + together - 1) / together;
  for (;;) {
    const int64_t round = job->next.fetch_add(1, std::memory_order_relaxed);
    if (round >= rounds) return;
    const int64_t first = round * together;
    const int64_t last = first + together < job->tiles ? first + together : job->tiles;
    for (int64_t k = first; k < last; k++) {
      const int64_t token = k * T;
      const int valid = job->tokens - token < T ? int(job->tokens - token) : T;
      transpose_tile(x + token * job->x_stride, job->x_stride, valid, job->in, ROW, buffer + (k - first) * size);
    }
    for (int64_t g = 0; g < groups; g++) {
      const int64_t start = starts[g], live = starts[g + 1] - start;
      const int outputs = job->out - g * R < R ? int(job->out - g * R) : R;
      for (int64_t k = first; k < last; k++) {
        const int64_t token = k * T;
        const int valid = job->tokens - token < T ? int(job->tokens - token) : T;
        block_of_outputs<R, T>(buffer + (k - first) * size, weights + start * R, columns + start, live,
                               bias ? bias + g * R : nullptr, job->activation, y + token * job->y_stride + g * R,
                               job->y_stride, valid, outputs);
      }
    }
  }
}

// Any mask ------------------------------------------------------------------------------------------------------------

constexpr int OUTPUTS = 16;  // that are written together

template <int V, class E> void any_work(Job *job, float *buffer) {
  constexpr int T = V * LANES;
  const E *x = static_cast<const E *>(job->x);
  E *y = static_cast<E *>(job->y);
  const float *weights = static_cast<const float *>(job->weights);
  const int32_t *columns = static_cast<const int32_t *>(job->columns);
  const int64_t *starts = static_cast<const int64_t *>(job->starts);
  const float *bias = static_cast<const float *>(job->bias);
  float results[OUTPUTS * T];
  for (;;) {
    const int64_t k = job->next.fetch_add(1, std::memory_order_relaxed);
    if (k >= job->tiles) return;
    const int64_t token = k * T;
    const int valid = job->tokens - token < T ? int(job->tokens - token) : T;
    transpose_tile(x + token * job->x_stride, job->x_stride, valid, job->in, T, buffer);
    for (int64_t o0 = 0; o0 < job->out; o0 += OUTPUTS) {
      const int outputs = job->out - o0 < OUTPUTS ? int(job->out - o0) : OUTPUTS;
      int o = 0;
      for (; o + 1 < outputs; o += 2) {  // two at a time: each hides the latency of the other
        Vector<LANES> a[V], b[V];
        const float first = bias ? bias[o0 + o] : 0.0f, second = bias ? bias[o0 + o + 1] : 0.0f;
        for (int v = 0; v < V; v++) a[v] = broadcast<LANES>(first), b[v] = broadcast<LANES>(second);
        int64_t i = starts[o0 + o], j = starts[o0 + o + 1];
        const int64_t i_end = j, j_end = starts[o0 + o + 2];
        for (; i < i_end && j < j_end; i++, j++) {
          const float *xi = buffer + int64_t(columns[i]) * T, *xj = buffer + int64_t(columns[j]) * T;
          const float wi = weights[i], wj = weights[j];
          for (int v = 0; v < V; v++) a[v] += wi * load<LANES>(xi + v * LANES);
          for (int v = 0; v < V; v++) b[v] += wj * load<LANES>(xj + v * LANES);
        }
        for (; i < i_end; i++)
          for (int v = 0; v < V; v++) a[v] += weights[i] * load<LANES>(buffer + int64_t(columns[i]) * T + v * LANES);
        for (; j < j_end; j++)
          for (int v = 0; v < V; v++) b[v] += weights[j] * load<LANES>(buffer + int64_t(columns[j]) * T + v * LANES);
        for (int v = 0; v < V; v++) {
          store<LANES>(results + o * T + v * LANES, activate<LANES>(a[v], job->activation));
          store<LANES>(results + (o + 1) * T + v * LANES, activate<LANES>(b[v], job->activation));
        }
      }
      for (; o < outputs; o++) {
        Vector<LANES> a[V];
        for (int v = 0; v < V; v++) a[v] = broadcast<LANES>(bias ? bias[o0 + o] : 0.0f);
        for (int64_t i = starts[o0 + o]; i < starts[o0 + o + 1]; i++)
          for (int v = 0; v < V; v++) a[v] += weights[i] * load<LANES>(buffer + int64_t(columns[i]) * T + v * LANES);
        for (int v = 0; v < V; v++) store<LANES>(results + o * T + v * LANES, activate<LANES>(a[v], job->activation));
      }
      for (int t = 0; t < valid; t++) {
        E *to = y + (token + t) * job->y_stride + o0;
        if (outputs == OUTPUTS)
          for (int n = 0; n < OUTPUTS; n++) narrow(results[n * T + t], to + n);
        else
          for (int n = 0; n < outputs; n++) narrow(results[n * T + t], to + n);
      }
    }
  }
}

// Threads -------------------------------------------------------------------------------------------------------------

constexpr int64_t FLOATS = 64 * 1024;  // of tiles that a thread holds at least room for: a quarter of a MiB

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel of an OpenMP runtime

void thread_main(void *pointer) {
  Job *job = static_cast<Job *>(pointer);
  float *buffer = new float[job->buffer + 16];
  float *aligned = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(buffer) + 63) & ~uintptr_t(63));
  job->work(job, aligned);
  delete[] buffer;
}

void run(Job *job, int64_t least, void *parallel, int threads) {
  job->buffer = least > FLOATS ? least : FLOATS;
  job->next = 0;
  if (parallel && threads > 1 && job->tiles > 1)
    reinterpret_cast<Parallel>(parallel)(thread_main, job, unsigned(threads), 0u);
  else
    thread_main(job);
}

typedef void (*Work)(Job *, float *);

template <int R, class E> Work blocks_of(int tile) {
  switch (tile) {
  case 4: return blocks_work<R, 4, E>;
  case 6: return blocks_work<R, 6, E>;
  case 8: return blocks_work<R, 8, E>;
  case 10: return blocks_work<R, 10, E>;
  case 12: return blocks_work<R, 12, E>;
  case 13: return blocks_work<R, 13, E>;
  case 14: return blocks_work<R, 14, E>;
  default: return nullptr;
  }
}

template <class E> Work blocks_of(int rows, int tile) {
  switch (rows) {
  case 4: return blocks_of<4, E>(tile);
  case 8: return blocks_of<8, E>(tile);
  case 16: return blocks_of<16, E>(tile);
  case 32: return blocks_of<32, E>(tile);
  default: return nullptr;
  }
}

template <class E> Work any_of(int vectors) {
  switch (vectors) {
  case 1: return any_work<1, E>;
  case 2: return any_work<2, E>;
  case 4: return any_work<4, E>;
  default: return nullptr;
  }
}

struct Masking {
  float *values;
  const uint8_t *live;
  int64_t size, share;
  std::atomic<int64_t> next;
};

void mask_thread(void *pointer) {
  Masking *job = static_cast<Masking *>(pointer);
  const int64_t begin = job->next.fetch_add(job->share);
  const int64_t end = begin + job->share < job->size ? begin + job->share : job->size;
  float *__restrict values = job->values;
  const uint8_t *__restrict live = job->live;
  for (int64_t i = begin; i < end; ++i) values[i] *= float(live[i]);
}

}  // namespace

extern "C" {

// values *= live, element by element: in one pass over the memory, with no copy of the mask as floats.
void sparse_mask(float *values, const uint8_t *live, int64_t size, void *parallel, int threads) {
  if (!parallel || threads < 1) threads = 1;
  Masking job{values, live, size, (size + threads - 1) / threads, {0}};
  if (threads > 1)
    reinterpret_cast<Parallel>(parallel)(mask_thread, &job, unsigned(threads), 0u);
  else
    mask_thread(&job);
}

// Numbers of a vector register of this build.
int sparse_lanes() { return LANES; }

// Rows in blocks of `rows`: block g has the live inputs columns[starts[g]..starts[g + 1]), each with `rows` weights.
// `bias` and `weights` are padded to whole blocks. `tile` tokens at a time. Returns 0, or 1 where there is no such kernel.
int sparse_blocks(const void *x, int64_t x_stride, const float *weights, const int32_t *columns, const int64_t *starts,
                  const float *bias, void *y, int64_t y_stride, int64_t tokens, int64_t in, int64_t out, int rows,
                  int tile, int half, int activation, void *parallel, int threads) {
  Work work = half ? blocks_of<BFloat16>(rows, tile) : blocks_of<float>(rows, tile);
  if (!work) return 1;
  Job job{work, {0}, (tokens + tile - 1) / tile, x, weights, columns, starts, bias, y,
          tokens, in, out, x_stride, y_stride, 0, tile, activation};
  // No more than an even share of the tiles at a time, so that all threads have work.
  const int64_t share = threads > 0 ? (job.tiles + threads - 1) / threads : job.tiles;
  int64_t together = FLOATS / (in * ROW);
  const int64_t rounds = together > 0 ? (share + together - 1) / together : share;
  together = rounds > 0 ? (share + rounds - 1) / rounds : 1;
  if (together < 1) together = 1;
  job.buffer = together * in * ROW;
  job.next = 0;
  if (parallel && threads > 1 && job.tiles > together)
    reinterpret_cast<Parallel>(parallel)(thread_main, &job, unsigned(threads), 0u);
  else
    thread_main(&job);
  return 0;
}

// Any mask: output o has the live inputs columns[starts[o]..starts[o + 1]). `vectors` registers of tokens at a time.
int sparse_any(const void *x, int64_t x_stride, const float *weights, const int32_t *columns, const int64_t *starts,
               const float *bias, void *y, int64_t y_stride, int64_t tokens, int64_t in, int64_t out, int vectors,
               int half, int activation, void *parallel, int threads) {
  Work work = half ? any_of<BFloat16>(vectors) : any_of<float>(vectors);
  if (!work) return 1;
  const int tile = vectors * LANES;
  Job job{work, {0}, (tokens + tile - 1) / tile, x, weights, columns, starts, bias, y,
          tokens, in, out, x_stride, y_stride, 0, tile, activation};
  run(&job, in * tile, parallel, threads);
  return 0;
}
}
