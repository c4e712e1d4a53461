// Products of a sheet of tokens x [S, in] with a sparse weight [out, in]: y [S, out] = act(x W^T + bias).
//
// Two forms of W. *Rows in blocks* (Rx1): R neighbouring outputs have the same live inputs, so one vector register (or a
// few) holds a block's outputs, and each live input costs one load of R weights and one multiply-add for each token of a
// tile. *Any mask* (1x1): the vectors run over the tokens of a tile instead, and each live weight is broadcast.
//
// The first copies a tile of tokens, 16 inputs of each token side by side in a line of cache; the second transposes it,
// [in, tile]. Both work on some hundred inputs at a time, so that the tile stays in the nearest cache. Every token goes
// through the same operations in the same order, whatever stands beside it: its result does not depend on the batch. Tiles
// are worked on by the threads of the OpenMP runtime that the caller hands over; without one, by this thread.
//
// Nothing here knows torch or Python.

#include "vectors.h"

namespace {

// Tokens whose sums fit the vector registers, 32 or 16 of them, beside a weight.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MOST_TOKENS = 14;
#else
constexpr int MOST_TOKENS = 12;
#endif

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

constexpr int LINE = 16;  // inputs in a line of cache; the tile of a block kernel holds LINE tokens of each of them

// Tokens [count, in] of a sheet -> tile [in / LINE, LINE tokens, LINE]; those from `count` to `width` are 0.
template <class E> void copy_tile(const E *x, int64_t stride, int count, int width, int64_t in, float *tile) {
  for (int64_t c = 0; c < in; c += LINE, tile += LINE * LINE) {
    const int columns = in - c < LINE ? int(in - c) : LINE;
    for (int t = 0; t < count; t++) {
      const E *from = x + t * stride + c;
      if (columns == LINE)
        for (int i = 0; i < LINE; i += LANES) store<LANES>(tile + t * LINE + i, load_wide<LANES>(from + i));
      else
        for (int i = 0; i < columns; i++) tile[t * LINE + i] = widen(from[i]);
    }
    for (int t = count; t < width; t++)
      for (int i = 0; i < LINE; i++) tile[t * LINE + i] = 0.0f;
  }
}

// Tokens [count, in] of a sheet -> tile [in, width], the places behind the last token 0. `width` is whole registers.
template <class E> void transpose_tile(const E *x, int64_t stride, int count, int64_t in, int width, float *tile) {
  for (int t0 = 0; t0 < width; t0 += LANES) {
    const int tokens = count - t0 < 0 ? 0 : count - t0 < LANES ? count - t0 : LANES;
    for (int64_t c = 0; c < in; c += LANES) {
      float *to = tile + c * width + t0;
      if (in - c >= LANES) {
        Vector<LANES> square[LANES];
        for (int t = 0; t < LANES; t++)
          square[t] = t < tokens ? load_wide<LANES>(x + (t0 + t) * stride + c) : Vector<LANES>{};
        transpose<LANES, LANES / 2>(square);
        for (int i = 0; i < LANES; i++) store<LANES>(to + i * width, square[i]);
      } else {
        for (int64_t i = 0; i < in - c; i++)
          for (int t = 0; t < LANES; t++) to[i * width + t] = t < tokens ? widen(x[(t0 + t) * stride + c + i]) : 0.0f;
      }
    }
  }
}

// Inputs of the tokens that a thread takes next. They are asked for a few lines of cache at a time, beside the work on the
// inputs before them: a tile of a sheet that is larger than the caches would wait for each of its rows otherwise.
template <class E> struct Ahead {
  const E *from;
  int64_t stride, rows, row, line, lines, each;

  // Of `x`, `rows` tokens, `in` inputs each, in so many parts.
  Ahead(const E *x, int64_t x_stride, int64_t tokens, int64_t in, int64_t parts)
      : from(x), stride(x_stride), rows(tokens), row(0), line(0), lines((in * int64_t(sizeof(E)) + 63) / 64),
        each((rows * lines + parts - 1) / parts) {}

  __attribute__((noinline)) void fetch_part() {  // apart, so that its numbers take no registers
    for (int64_t i = 0; i < each && row < rows; i++) {
      __builtin_prefetch(reinterpret_cast<const char *>(from + row * stride) + line * 64);
      if (++line == lines) line = 0, row++;
    }
  }
};

// The live weights, as the caller laid them out.
struct Network {
  const float *weights;
  const int32_t *places;
  const int64_t *starts;
  const float *bias;
};

// A job that threads share: they take tile after tile.
struct Job {
  void (*work)(Job *, float *);
  std::atomic<int64_t> next;
  int64_t tiles;
  const void *x;
  Network network;
  void *y;
  int64_t tokens, in, out, x_stride, y_stride, chunk, buffer, threads;
  int activation;
};

constexpr int64_t CACHED = 1 << 22;  // bytes of a sheet that need not be fetched ahead

// What a thread reads after chunk `c` of tile `k`: the next chunk, or the first one of its next tile.
template <class E> Ahead<E> after(const Job *job, int64_t k, int64_t c, int64_t tile, int64_t parts) {
  const bool more = (c + 1) * job->chunk < job->in;
  const int64_t from = more ? (c + 1) * job->chunk : 0, token = (more ? k : k + job->threads) * tile;
  const bool cached = job->tokens * job->in * int64_t(sizeof(E)) < CACHED;
  const int64_t rows = cached ? 0 : job->tokens - token, inputs = job->in - from;
  const E *x = static_cast<const E *>(job->x) + token * job->x_stride + from;
  return Ahead<E>(x, job->x_stride, rows < 0 ? 0 : rows < tile ? rows : tile,
                  inputs < job->chunk ? inputs : job->chunk, parts);
}

// Rows in blocks ------------------------------------------------------------------------------------------------------

// N outputs of a block for T tokens, over the live inputs of a chunk. The sums begin as `bias` or go on from `sums`, and go
// to `sums` or, after the last chunk, to y.
template <int R, int N, int T, class E>
inline void outputs_of(const float *tile, const float *weights, const int32_t *places, int64_t live, const float *bias,
                       bool first, bool last, float *sums, int activation, E *y, int64_t y_stride, int valid,
                       int outputs) {
  Vector<N> s[T];
  if (first) {
    const Vector<N> start = bias ? load<N>(bias) : Vector<N>{};
    for (int t = 0; t < T; t++) s[t] = start;
  } else {
    for (int t = 0; t < T; t++) s[t] = load<N>(sums + t * R);
  }
  if (last && valid == T)
    for (int t = 0; t < T; t++) __builtin_prefetch(y + t * y_stride, 1);
  // Loads are what is short: one for each multiply-add, and two of a processor's in a cycle, as its multiply-adds. So weights
  // are not fetched ahead, which would be another one; they lie in order, and the processor sees that.
  int64_t i = 0;
  for (; i + 1 < live; i += 2, weights += 2 * R) {
    const float *x = tile + places[i], *z = tile + places[i + 1];
    const Vector<N> w = load<N>(weights), v = load<N>(weights + R);
    for (int t = 0; t < T; t++) s[t] += w * x[t * LINE];
    for (int t = 0; t < T; t++) s[t] += v * z[t * LINE];
  }
  if (i < live) {
    const float *x = tile + places[i];
    const Vector<N> w = load<N>(weights);
    for (int t = 0; t < T; t++) s[t] += w * x[t * LINE];
  }
  if (!last) {
    for (int t = 0; t < T; t++) store<N>(sums + t * R, s[t]);
  } else if (valid == T && outputs >= N) {
    for (int t = 0; t < T; t++) store_outputs<N>(y + t * y_stride, activate<N>(s[t], activation), N);
  } else {
    float plain[T][N];  // so that the sums need no address on the usual way
    for (int t = 0; t < T; t++) store<N>(plain[t], activate<N>(s[t], activation));
    for (int t = 0; t < valid; t++)
      if (outputs > 0) store_outputs<N>(y + t * y_stride, load<N>(plain[t]), outputs);
  }
}

template <int R, int T, class E> void blocks_work(Job *job, float *tile) {
  constexpr int N = R < LANES ? R : LANES;
  const int64_t groups = (job->out + R - 1) / R, chunks = (job->in + job->chunk - 1) / job->chunk;
  const E *x = static_cast<const E *>(job->x);
  E *y = static_cast<E *>(job->y);
  const auto [weights, places, starts, bias] = job->network;
  float *sums = tile + (job->chunk + LINE - 1) / LINE * LINE * LINE;
  for (;;) {
    const int64_t k = job->next.fetch_add(1, std::memory_order_relaxed);
    if (k >= job->tiles) return;
    const int64_t token = k * T;
    const int valid = job->tokens - token < T ? int(job->tokens - token) : T;
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t from = c * job->chunk, inputs = job->in - from < job->chunk ? job->in - from : job->chunk;
      copy_tile(x + token * job->x_stride + from, job->x_stride, valid, T, inputs, tile);
      Ahead<E> ahead = after<E>(job, k, c, T, groups);
      for (int64_t g = 0; g < groups; g++) {
        if (ahead.each) ahead.fetch_part();
        const int64_t start = starts[c * groups + g], live = starts[c * groups + g + 1] - start;
        for (int v = 0; v < R; v += N)
          outputs_of<R, N, T>(tile, weights + start * R + v, places + start, live, bias ? bias + g * R + v : nullptr,
                              c == 0, c == chunks - 1, sums + g * R * T + v, job->activation,
                              y + token * job->y_stride + g * R + v, job->y_stride, valid,
                              int(job->out - g * R) - v);
      }
    }
  }
}

// Any mask ------------------------------------------------------------------------------------------------------------

constexpr int OUTPUTS = 16;  // that are written together

template <int V, class E> void any_work(Job *job, float *tile) {
  constexpr int T = V * LANES;
  const E *x = static_cast<const E *>(job->x);
  E *y = static_cast<E *>(job->y);
  const auto [weights, columns, starts, bias] = job->network;
  const int64_t chunks = (job->in + job->chunk - 1) / job->chunk;
  float *sums = tile + job->chunk * T;
  float results[OUTPUTS * T];
  for (;;) {
    const int64_t k = job->next.fetch_add(1, std::memory_order_relaxed);
    if (k >= job->tiles) return;
    const int64_t token = k * T;
    const int valid = job->tokens - token < T ? int(job->tokens - token) : T;
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t from = c * job->chunk, inputs = job->in - from < job->chunk ? job->in - from : job->chunk;
      const int64_t *begin = starts + c * job->out;
      transpose_tile(x + token * job->x_stride + from, job->x_stride, valid, inputs, T, tile);
      for (int64_t o0 = 0; o0 < job->out; o0 += OUTPUTS) {
        const int outputs = job->out - o0 < OUTPUTS ? int(job->out - o0) : OUTPUTS;
        float *to = c == chunks - 1 ? results : sums + o0 * T;
        for (int o = 0; o < outputs; o += 2) {  // two at a time: each hides the latency of the other
          const bool two = o + 1 < outputs;
          Vector<LANES> a[V], b[V];
          if (c == 0) {
            const float first = bias ? bias[o0 + o] : 0.0f, second = bias && two ? bias[o0 + o + 1] : 0.0f;
            for (int v = 0; v < V; v++) a[v] = broadcast<LANES>(first), b[v] = broadcast<LANES>(second);
          } else {
            const float *so_far = sums + (o0 + o) * T;
            for (int v = 0; v < V; v++) a[v] = load<LANES>(so_far + v * LANES);
            for (int v = 0; v < V; v++) b[v] = two ? load<LANES>(so_far + T + v * LANES) : Vector<LANES>{};
          }
          int64_t i = begin[o0 + o], j = begin[o0 + o + 1];
          const int64_t i_end = j, j_end = two ? begin[o0 + o + 2] : j;
          for (; i < i_end && j < j_end; i++, j++) {
            const float *xi = tile + int64_t(columns[i]) * T, *xj = tile + int64_t(columns[j]) * T;
            const float wi = weights[i], wj = weights[j];
            for (int v = 0; v < V; v++) a[v] += wi * load<LANES>(xi + v * LANES);
            for (int v = 0; v < V; v++) b[v] += wj * load<LANES>(xj + v * LANES);
          }
          for (; i < i_end; i++)
            for (int v = 0; v < V; v++) a[v] += weights[i] * load<LANES>(tile + int64_t(columns[i]) * T + v * LANES);
          for (; j < j_end; j++)
            for (int v = 0; v < V; v++) b[v] += weights[j] * load<LANES>(tile + int64_t(columns[j]) * T + v * LANES);
          const int activation = c == chunks - 1 ? job->activation : int(NONE);
          for (int v = 0; v < V; v++) store<LANES>(to + o * T + v * LANES, activate<LANES>(a[v], activation));
          if (two)
            for (int v = 0; v < V; v++) store<LANES>(to + (o + 1) * T + v * LANES, activate<LANES>(b[v], activation));
        }
        if (c < chunks - 1) continue;
        E *out = y + token * job->y_stride + o0;
        if constexpr (sizeof(E) == 4) {
          if (outputs == OUTPUTS) {  // faster than the way below where y is larger than the caches
            for (int t = 0; t < valid; t++)
              for (int n = 0; n < OUTPUTS; n++) out[t * job->y_stride + n] = results[n * T + t];
            continue;
          }
        }
        for (int t0 = 0; t0 < valid; t0 += LANES)
          for (int n = 0; n < outputs; n += LANES) {
            Vector<LANES> square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = load<LANES>(results + (n + i) * T + t0);
            transpose<LANES, LANES / 2>(square);
            for (int t = t0; t < valid && t < t0 + LANES; t++)
              store_outputs<LANES>(out + t * job->y_stride + n, square[t - t0], outputs - n);
          }
      }
    }
  }
}

// Threads -------------------------------------------------------------------------------------------------------------

void thread_main(void *pointer) {
  Job *job = static_cast<Job *>(pointer);
  float *buffer = new float[job->buffer + 16];
  float *aligned = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(buffer) + 63) & ~uintptr_t(63));
  job->work(job, aligned);
  delete[] buffer;
}

// Each thread has room for a tile and, where inputs come in several chunks, for the sums so far.
void run(Job *job, int64_t tile, int64_t sums, void *parallel, int threads) {
  job->buffer = tile + (job->chunk < job->in ? sums : 0);
  job->next = 0;
  job->threads = parallel && threads > 1 ? threads : 1;
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

// Numbers of a vector register of this build, and the tokens of the largest tile.
int sparse_lanes() { return LANES; }
int sparse_tokens() { return MOST_TOKENS; }

// Inputs come in chunks of `chunk`, a multiple of 16. Rows in blocks of `rows`: block g has, in chunk c, the live inputs
// starts[n] .. starts[n + 1], n = c * blocks + g, each with `rows` weights, and `places` where they lie in the tile:
// input / 16 * 256 + input % 16, counted from the chunk's first. `bias` and `weights` are padded to whole blocks. `tile`
// tokens at a time. Returns 0, or 1 where there is no such kernel.
int sparse_blocks(const void *x, int64_t x_stride, const float *weights, const int32_t *places, const int64_t *starts,
                  const float *bias, void *y, int64_t y_stride, int64_t tokens, int64_t in, int64_t out, int64_t chunk,
                  int rows, int tile, int half, int activation, void *parallel, int threads) {
  Work work = half ? blocks_of<BFloat16>(rows, tile) : blocks_of<float>(rows, tile);
  if (!work) return 1;
  Job job{work, {0}, (tokens + tile - 1) / tile, x, {weights, places, starts, bias}, y,
          tokens, in, out, x_stride, y_stride, chunk, 0, 1, activation};
  run(&job, (chunk + LINE - 1) / LINE * LINE * LINE, (out + rows - 1) / rows * rows * tile, parallel, threads);
  return 0;
}

// Any mask: output o has, in chunk c, the live inputs columns[starts[n] .. starts[n + 1]], n = c * out + o, counted from the
// chunk's first. `vectors` registers of tokens at a time.
int sparse_any(const void *x, int64_t x_stride, const float *weights, const int32_t *columns, const int64_t *starts,
               const float *bias, void *y, int64_t y_stride, int64_t tokens, int64_t in, int64_t out, int64_t chunk,
               int vectors, int half, int activation, void *parallel, int threads) {
  Work work = half ? any_of<BFloat16>(vectors) : any_of<float>(vectors);
  if (!work) return 1;
  const int tile = vectors * LANES;
  Job job{work, {0}, (tokens + tile - 1) / tile, x, {weights, columns, starts, bias}, y,
          tokens, in, out, x_stride, y_stride, chunk, 0, 1, activation};
  run(&job, chunk * tile, (out + OUTPUTS) / OUTPUTS * OUTPUTS * tile, parallel, threads);
  return 0;
}
}
