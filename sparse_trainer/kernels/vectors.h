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

template <int N> struct VectorOf { typedef float type __attribute__((vector_size(N * 4))); };
template <int N> using Vector = typename VectorOf<N>::type;
template <int N> struct BitsOf { typedef uint32_t type __attribute__((vector_size(N * 4))); };
template <int N> using Bits = typename BitsOf<N>::type;
template <int N> struct HalvesOf { typedef uint16_t type __attribute__((vector_size(N * 2))); };
template <int N> using Halves = typename HalvesOf<N>::type;

// A vector anywhere in memory. Through a pointer to it, since a compiler that prefers half registers makes two moves and a
// detour over memory of a memcpy: twenty times slower. A vector type with `aligned(4)` would not do: Clang forgets that in
// templates, and takes instructions that fault.
template <class V> struct __attribute__((packed, may_alias)) Anywhere { V value; };

template <int N> inline Vector<N> load(const float *from) {
  return reinterpret_cast<const Anywhere<Vector<N>> *>(from)->value;
}

template <int N> inline void store(float *to, Vector<N> value) {
  reinterpret_cast<Anywhere<Vector<N>> *>(to)->value = value;
}

template <int N> inline Vector<N> broadcast(float value) { return value - Vector<N>{}; }

struct BFloat16 { uint16_t bits; };

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

template <int N> inline void store_outputs(float *to, Vector<N> value, int count) {
  if (count >= N)
    store<N>(to, value);
  else
    std::memcpy(to, &value, 4 * count);
}

// Numbers in 16 bits, rounded to the nearest, ties to even; NaN stays NaN.
template <int N> inline Halves<N> narrow(Vector<N> value) {
  const Bits<N> bits = (Bits<N>)value;
  const Bits<N> rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits<N> chosen = value == value ? rounded : bits | 0x00400000u;
  return __builtin_convertvector(chosen >> 16, Halves<N>);
}

template <int N> inline void store_outputs(BFloat16 *to, Vector<N> value, int count) {
  const Halves<N> halves = narrow<N>(value);
  if (count >= N)
    reinterpret_cast<Anywhere<Halves<N>> *>(to)->value = halves;
  else
    std::memcpy(to, &halves, 2 * count);
}

template <int N> inline Vector<N> load_wide(const float *from) { return load<N>(from); }
template <int N> inline Vector<N> load_wide(const BFloat16 *from) {
  const Halves<N> halves = reinterpret_cast<const Anywhere<Halves<N>> *>(from)->value;
  return (Vector<N>)(__builtin_convertvector(halves, Bits<N>) << 16);
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
