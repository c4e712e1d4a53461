// Attention within each image of a sheet of tokens: images of unequal lengths, in one call.
//
// A job is some queries of one head of one image. It copies the head's keys, transposed in blocks of a few vector
// registers, and its values, then takes QUERIES queries at a time: their scores with all keys, the softmax of each row,
// the weighted sum of the values. Nothing but the scores of these few queries is ever held. Sums are in float32. Every
// query goes through the same operations in the same order, whatever stands beside its image.

#include "vectors.h"

namespace {

constexpr int QUERIES = 6;  // at a time; with VECTORS registers of sums each
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int VECTORS = 4;
#else
constexpr int VECTORS = 2;
#endif
constexpr int BLOCK = VECTORS * LANES;  // keys
constexpr int64_t PART = 16 * QUERIES;  // queries of a job: each copies the keys again, which takes little beside so many
constexpr float LOWEST = -3.402823466e+38f;  // of all floats

template <int N> struct IntegersOf { typedef int32_t type __attribute__((vector_size(N * 4))); };
template <int N> using Integers = typename IntegersOf<N>::type;

// e^x for x <= 0 by 2^n e^r, |r| <= ln 2 / 2, with the polynomial of the Cephes library: within 2e-7 of it.
template <int N> inline Vector<N> exponential(Vector<N> x) {
  const Vector<N> least = broadcast<N>(-87.0f);
  x = x < least ? least : x;
  const Vector<N> shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: its last bits are the nearest whole number
  const Vector<N> n = shifted - 12582912.0f;
  const Vector<N> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector<N> p = broadcast<N>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Integers<N> power = ((Integers<N>)shifted << 23) + 0x3f800000;
  return p * (Vector<N>)power;
}

// Rows [count, width] of a sheet, `stride` apart -> [width, to_stride], the places behind the last row 0: one register.
template <class E> void transpose_keys(const E *from, int64_t stride, int count, int64_t width, float *to, int64_t to_stride) {
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) {
    Vector<LANES> square[LANES];
    for (int t = 0; t < LANES; t++) square[t] = t < count ? load_wide<LANES>(from + t * stride + c) : Vector<LANES>{};
    transpose<LANES, LANES / 2>(square);
    for (int i = 0; i < LANES; i++) store<LANES>(to + (c + i) * to_stride, square[i]);
  }
  for (; c < width; c++)
    for (int t = 0; t < LANES; t++) to[c * to_stride + t] = t < count ? widen(from[t * stride + c]) : 0.0f;
}

struct Attention {
  void (*work)(Attention *, float *);
  std::atomic<int64_t> next;
  int64_t jobs, parts;
  const void *query, *key, *value;
  int64_t query_strides[2], key_strides[2], value_strides[2];  // to the next token, to the next head
  void *output;
  const int64_t *starts;
  int64_t images, heads, width, padded, longest;
  float scale;
  int64_t buffer;
};

// QUERIES queries [width, QUERIES] against V registers of keys [width, V * LANES] -> scores, rows `stride` apart.
template <int V> inline void score(const float *queries, const float *keys, int64_t width, float *scores, int64_t stride) {
  Vector<LANES> s[QUERIES][V];
  for (int q = 0; q < QUERIES; q++)
    for (int v = 0; v < V; v++) s[q][v] = Vector<LANES>{};
  for (int64_t c = 0; c < width; c++, queries += QUERIES, keys += V * LANES) {
    Vector<LANES> k[V];
    for (int v = 0; v < V; v++) k[v] = load<LANES>(keys + v * LANES);
    for (int q = 0; q < QUERIES; q++)
      for (int v = 0; v < V; v++) s[q][v] += queries[q] * k[v];
  }
  for (int q = 0; q < QUERIES; q++)
    for (int v = 0; v < V; v++) store<LANES>(scores + q * stride + v * LANES, s[q][v]);
}

// Scores -> e^(score - greatest); the inverse of each row's sum.
inline void exponentials(float *scores, int64_t stride, int64_t length, float *inverse) {
  const int64_t registers = (length + LANES - 1) / LANES;
  for (int q = 0; q < QUERIES; q++, scores += stride) {
    for (int64_t i = length; i < registers * LANES; i++) scores[i] = LOWEST;
    Vector<LANES> most = load<LANES>(scores);
    for (int64_t i = 1; i < registers; i++) {
      const Vector<LANES> s = load<LANES>(scores + i * LANES);
      most = s > most ? s : most;
    }
    float plain[LANES];
    store<LANES>(plain, most);
    float greatest = plain[0];
    for (int i = 1; i < LANES; i++) greatest = plain[i] > greatest ? plain[i] : greatest;
    Vector<LANES> sum = Vector<LANES>{};
    for (int64_t i = 0; i < registers; i++) {
      const Vector<LANES> e = exponential<LANES>(load<LANES>(scores + i * LANES) - greatest);
      store<LANES>(scores + i * LANES, e);
      sum += e;
    }
    store<LANES>(plain, sum);
    float total = 0.0f;
    for (int i = 0; i < LANES; i++) total += plain[i];
    inverse[q] = 1.0f / total;
  }
}

// V registers of the outputs of QUERIES queries: weights [QUERIES, stride] times values [length, row].
template <int V, class E>
inline void mix(const float *weights, int64_t stride, const float *values, int64_t row, int64_t length,
                const float *inverse, E *output, int64_t output_stride, int valid, int64_t width) {
  Vector<LANES> s[QUERIES][V];
  for (int q = 0; q < QUERIES; q++)
    for (int v = 0; v < V; v++) s[q][v] = Vector<LANES>{};
  for (int64_t j = 0; j < length; j++, values += row) {
    Vector<LANES> x[V];
    for (int v = 0; v < V; v++) x[v] = load<LANES>(values + v * LANES);
    for (int q = 0; q < QUERIES; q++)
      for (int v = 0; v < V; v++) s[q][v] += weights[q * stride + j] * x[v];
  }
  for (int q = 0; q < QUERIES; q++)
    for (int v = 0; v < V; v++) {
      const int64_t left = width - v * LANES;
      if (q < valid && left > 0)
        store_outputs<LANES>(output + q * output_stride + v * LANES, s[q][v] * inverse[q], left < LANES ? int(left) : LANES);
    }
}

template <class E> void attention_work(Attention *job, float *buffer) {
  const int64_t width = job->width, row = (width + LANES - 1) / LANES * LANES, padded = job->padded;
  float *keys = buffer, *values = keys + padded * width, *queries = values + job->longest * row;
  float *scores = queries + (QUERIES * width + LANES - 1) / LANES * LANES;
  const int64_t output_stride = job->heads * width;
  for (;;) {
    const int64_t number = job->next.fetch_add(1, std::memory_order_relaxed);
    if (number >= job->jobs) return;
    const int64_t image = job->images - 1 - number / (job->heads * job->parts);  // the longest come last in a sheet
    const int64_t head = number / job->parts % job->heads, first = number % job->parts * PART;
    const int64_t start = job->starts[image], length = job->starts[image + 1] - start;
    if (first >= length) continue;
    const int64_t end = length - first < PART ? length : first + PART;
    const E *query = static_cast<const E *>(job->query) + start * job->query_strides[0] + head * job->query_strides[1];
    const E *key = static_cast<const E *>(job->key) + start * job->key_strides[0] + head * job->key_strides[1];
    const E *value = static_cast<const E *>(job->value) + start * job->value_strides[0] + head * job->value_strides[1];
    E *output = static_cast<E *>(job->output) + start * output_stride + head * width;

    const int64_t registers = (length + LANES - 1) / LANES;
    for (int64_t r = 0; r < registers; r++) {
      const int64_t block = r / VECTORS, left = registers - block * VECTORS;
      const int64_t wide = (left < VECTORS ? left : VECTORS) * LANES;
      const int count = length - r * LANES < LANES ? int(length - r * LANES) : LANES;
      transpose_keys(key + r * LANES * job->key_strides[0], job->key_strides[0], count, width,
                     keys + block * BLOCK * width + r % VECTORS * LANES, wide);
    }
    for (int64_t t = 0; t < length; t++) {
      const E *from = value + t * job->value_strides[0];
      float *to = values + t * row;
      int64_t c = 0;
      for (; c + LANES <= width; c += LANES) store<LANES>(to + c, load_wide<LANES>(from + c));
      for (; c < row; c++) to[c] = c < width ? widen(from[c]) : 0.0f;
    }
    for (int64_t t = first; t < end; t += QUERIES) {
      const int valid = end - t < QUERIES ? int(end - t) : QUERIES;
      for (int q = 0; q < QUERIES; q++) {
        const E *from = query + (t + (q < valid ? q : valid - 1)) * job->query_strides[0];
        for (int64_t c = 0; c < width; c++) queries[c * QUERIES + q] = widen(from[c]) * job->scale;
      }
      for (int64_t r = 0; r < registers; r += VECTORS) {
        const float *block = keys + r * LANES * width;
        float *to = scores + r * LANES;
        switch (registers - r) {
        case 1: score<1>(queries, block, width, to, padded); break;
#if defined(__AVX512F__) || defined(__aarch64__)
        case 2: score<2>(queries, block, width, to, padded); break;
        case 3: score<3>(queries, block, width, to, padded); break;
#endif
        default: score<VECTORS>(queries, block, width, to, padded);
        }
      }
      float inverse[QUERIES];
      exponentials(scores, padded, length, inverse);
      for (int64_t c = 0; c < row; c += BLOCK) {
        E *to = output + t * output_stride + c;
        switch ((row - c) / LANES) {
        case 1: mix<1>(scores, padded, values + c, row, length, inverse, to, output_stride, valid, width - c); break;
#if defined(__AVX512F__) || defined(__aarch64__)
        case 2: mix<2>(scores, padded, values + c, row, length, inverse, to, output_stride, valid, width - c); break;
        case 3: mix<3>(scores, padded, values + c, row, length, inverse, to, output_stride, valid, width - c); break;
#endif
        default: mix<VECTORS>(scores, padded, values + c, row, length, inverse, to, output_stride, valid, width - c);
        }
      }
    }
  }
}

void attention_thread(void *pointer) {
  Attention *job = static_cast<Attention *>(pointer);
  float *buffer = new float[job->buffer + 16];
  job->work(job, reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(buffer) + 63) & ~uintptr_t(63)));
  delete[] buffer;
}

}  // namespace

extern "C" {

// softmax(scale q k^T) v for each image and head: image i has the tokens starts[i] .. starts[i + 1]. `strides`: to the next
// token and to the next head of query, key and value, in numbers; the numbers of a head lie side by side. `output` is
// [tokens, heads, width]. `longest`: tokens of an image, at most.
void sparse_attention(const void *query, const void *key, const void *value, const int64_t *strides, void *output,
                      const int64_t *starts, int64_t images, int64_t heads, int64_t width, int64_t longest, float scale,
                      int half, void *parallel, int threads) {
  const int64_t parts = (longest + PART - 1) / PART, padded = (longest + LANES - 1) / LANES * LANES;
  const int64_t row = (width + LANES - 1) / LANES * LANES;
  Attention job{half ? attention_work<BFloat16> : attention_work<float>, {0}, images * heads * parts, parts,
                query, key, value, {strides[0], strides[1]}, {strides[2], strides[3]}, {strides[4], strides[5]},
                output, starts, images, heads, width, padded, longest, scale,
                padded * width + longest * row + QUERIES * (width + LANES) + QUERIES * padded};
  if (parallel && threads > 1 && job.jobs > 1)
    reinterpret_cast<Parallel>(parallel)(attention_thread, &job, unsigned(threads), 0u);
  else
    attention_thread(&job);
}
}
