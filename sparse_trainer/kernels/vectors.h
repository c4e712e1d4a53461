// Vectors of GCC and Clang, as wide as the target's registers; numbers in memory and in registers; threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

template <int N> struct VectorOf { typedef float type __attribute__((vector_size(N * 4), aligned(4), may_alias)); };
template <int N> using Vector = typename VectorOf<N>::type;

// Through the pointer, since a compiler that prefers half registers makes two moves and a detour over memory of a memcpy:
// twenty times slower.
template <int N> inline Vector<N> load(const float *from) { return *reinterpret_cast<const Vector<N> *>(from); }

template <int N> inline void store(float *to, Vector<N> value) { *reinterpret_cast<Vector<N> *>(to) = value; }

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

template <int N> inline Vector<N> load_wide(const float *from) { return load<N>(from); }
template <int N> inline Vector<N> load_wide(const BFloat16 *from) {
  float wide[N];
  for (int i = 0; i < N; i++) wide[i] = widen(from[i]);
  return load<N>(wide);
}

#if defined(__clang__) || __GNUC__ >= 12
// Of a square of N vectors, exchange the blocks of S rows and columns that lie across the diagonal.
template <int N, int S, size_t... J> inline void exchange(Vector<N> &a, Vector<N> &b, std::index_sequence<J...>) {
  const Vector<N> first = __builtin_shufflevector(a, b, (J & S ? int(J) - S + N : int(J))...);
  b = __builtin_shufflevector(a, b, (J & S ? int(J) + N : int(J) + S)...);
  a = first;
}

template <int N, int S> inline void transpose(Vector<N> *rows) {
  if constexpr (S > 0) {
    for (int i = 0; i < N; i++)
      if (!(i & S)) exchange<N, S>(rows[i], rows[i + S], std::make_index_sequence<N>());
    transpose<N, S / 2>(rows);
  }
}
#else
template <int N, int S> inline void transpose(Vector<N> *rows) {
  float plain[N][N];
  for (int i = 0; i < N; i++) store<N>(plain[i], rows[i]);
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++) rows[i][j] = plain[j][i];
}
#endif

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel of an OpenMP runtime

}  // namespace
