// The noise of noise.py and the rounding of stochastic.py for a CPU, in one pass over the weights.
//
// Same bits as the torch operations there, which say what the numbers mean: the arithmetic is copied
// operation by operation, and native.py compiles it so that no multiply and add are contracted. Work is
// cut into units of 2048 elements, whose noise stays in a core's first cache.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t UNIT = 2048;
constexpr int WORD = 32, BLOCK = 128, GAUSSIANS = 512, ROUNDINGS = 1024;

template <class To, class From>
inline To as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &value, sizeof to);
    return to;
}

struct BFloat16 {
    uint16_t bits;
};
using Float16 = _Float16;

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return as<float>(uint32_t(x.bits) << 16); }
inline float widen(Float16 x) { return float(x); }

template <class T>
inline T nearest(float x) {
    return T(x);
}
template <>
inline BFloat16 nearest<BFloat16>(float x) {
    const uint32_t u = as<uint32_t>(x);
    const uint32_t rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    return {uint16_t(x != x ? 0x7FC0 : rounded)};
}

// `bits`: 16 random ones.
template <class T>
inline T stochastic(float exact, uint32_t bits);
template <>
inline float stochastic<float>(float exact, uint32_t) {
    return exact;
}
template <>
inline BFloat16 stochastic<BFloat16>(float exact, uint32_t bits) {
    return {uint16_t((as<uint32_t>(exact) + bits) >> 16)};
}
template <>
inline Float16 stochastic<Float16>(float exact, uint32_t bits) {
    const float normal = as<float>((as<uint32_t>(exact) + (bits & 0x1FFF)) & ~0x1FFFu);
    const float units = exact * 0x1p24f, below = std::floor(units);
    const bool up = float(int32_t(bits)) >= 65536.0f - (units - below) * 65536.0f;
    const float subnormal = (below + (up ? 1.0f : 0.0f)) * 0x1p-24f;
    const bool small = std::fabs(exact) < 0x1p-14f;
    return Float16(small ? std::copysign(subnormal, exact) : normal);
}

// Where random bits come from: the key and two words of the counter; the other two number the block.
struct Stream {
    uint32_t key0, key1, step, word;
};

// The first words of N blocks, then their second ones, and so on. Philox4x32-10, see generator.py.
#ifdef __AVX512F__
// 64-bit lanes whose upper halves are left dirty: the products read the lower ones alone. Compilers widen and
// narrow at each of them, which takes three times as long.
template <int N>
inline void philox(const Stream& s, uint64_t first, uint32_t (&x)[4 * N]) {
    constexpr int LANES = 8, ABREAST = N % 16 ? 1 : 2;
    static_assert(N % LANES == 0);
    const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
    for (int i = 0; i < N; i += LANES * ABREAST) {
        __m512i x0[ABREAST], x1[ABREAST], x2[ABREAST], x3[ABREAST];
        for (int h = 0; h < ABREAST; h++) {
            const __m512i start = _mm512_set1_epi64(int64_t(first) + i + h * LANES);
            x0[h] = _mm512_add_epi64(start, _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
            x1[h] = _mm512_srli_epi64(x0[h], 32);
            x2[h] = _mm512_set1_epi64(s.step), x3[h] = _mm512_set1_epi64(s.word);
        }
        uint32_t k0 = s.key0, k1 = s.key1;
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++) {
            const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
            for (int h = 0; h < ABREAST; h++) {
                const __m512i p0 = _mm512_mul_epu32(m0, x0[h]), p1 = _mm512_mul_epu32(m1, x2[h]);
                constexpr int XOR_OF_THREE = 0x96;
                x0[h] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), x1[h], key0, XOR_OF_THREE);
                x2[h] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), x3[h], key1, XOR_OF_THREE);
                x1[h] = p1, x3[h] = p0;
            }
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        const auto put = [&](uint32_t* to, __m512i lanes) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi64_epi32(lanes));
        };
        for (int h = 0; h < ABREAST; h++) {
            uint32_t* to = x + i + h * LANES;
            put(to, x0[h]), put(to + N, x1[h]), put(to + 2 * N, x2[h]), put(to + 3 * N, x3[h]);
        }
    }
}
#else
template <int N>
inline void philox(const Stream& s, uint64_t first, uint32_t (&x)[4 * N]) {
#pragma omp simd
    for (int i = 0; i < N; i++) {
        const uint64_t number = first + uint64_t(i);
        uint32_t x0 = uint32_t(number), x1 = uint32_t(number >> 32), x2 = s.step, x3 = s.word;
        uint32_t k0 = s.key0, k1 = s.key1;
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++) {
            const uint64_t p0 = uint64_t(0xD2511F53u) * x0, p1 = uint64_t(0xCD9E8D57u) * x2;
            x0 = uint32_t(p1 >> 32) ^ x1 ^ k0;
            x2 = uint32_t(p0 >> 32) ^ x3 ^ k1;
            x1 = uint32_t(p1);
            x3 = uint32_t(p0);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        x[i] = x0, x[N + i] = x1, x[2 * N + i] = x2, x[3 * N + i] = x3;
    }
}
#endif

// The signs of a unit: body(first element of 32, the word that has them).
template <class Body>
inline void each_word(const Stream& s, uint64_t unit, Body body) {
    constexpr int N = UNIT / BLOCK;
    uint32_t x[4 * N];
    philox<N>(s, unit * N, x);
    for (int b = 0; b < N; b++)
        for (int w = 0; w < 4; w++) body(b * BLOCK + w * WORD, x[w * N + b]);
}

// `size`, or -size where bit i of the word is set.
inline float with_sign(float size, uint32_t word, int64_t i) {
    return as<float>(as<uint32_t>(size) ^ (word << (31 - i) & 0x80000000u));
}

inline void rademacher(const Stream& s, uint64_t unit, float* z) {
    each_word(s, unit, [=](int first, uint32_t word) {
#pragma omp simd
        for (int i = 0; i < WORD; i++) z[first + i] = with_sign(1.0f, word, i);
    });
}

// Of both functions below, no result depends on a choice: a compiler would compute everything that follows twice.
inline float logarithm(float u) {
    const int32_t bits = as<int32_t>(u) - 0x3F3504F3;
    const float exponent = float(bits >> 23), f = as<float>((bits & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
    const float f2 = f * f, f4 = f2 * f2;
    const float a = f * -2.4999993993e-1f + 3.3333331174e-1f, b = f * -1.6668057665e-1f + 2.0000714765e-1f;
    const float c = f * -1.2420140846e-1f + 1.4249322787e-1f, d = f * -1.1514610310e-1f + 1.1676998740e-1f;
    const float p = (b * f2 + a) + ((d * f2 + c) + f4 * 7.0376836292e-2f) * f4;
    const float tail = p * f * f2 - (exponent * 2.12194440e-4f + f2 * 0.5f);
    return (f + tail) + exponent * 0.693359375f;
}

// One tile of 512: the cosines of 256 pairs, then their sines.
inline void gaussian(const Stream& s, uint64_t tile, float* z) {
    uint32_t x[4 * 128];
    philox<128>(s, tile * 128, x);
    const uint32_t *radial = x, *angular = x + 256;
    constexpr float STEP = 0x1p-31f - 0x1p-55f, TURN = float(3.141592653589793 * 0x1p-31);
#pragma omp simd
    for (int i = 0; i < GAUSSIANS / 2; i++) {
        const float u = float(int32_t(radial[i] & 0x7FFFFFFFu)) * STEP + 0x1p-32f;
        const float square = logarithm(u) * -2.0f, radius = square * (1.0f / std::sqrt(square));
        const int32_t turns = int32_t(angular[i]);
        const float angle = float(turns >> 2) * TURN, t = angle * angle;
        const float sine = ((t * -1.9515295891e-4f + 8.3321608736e-3f) * t - 1.6666654611e-1f) * t * angle + angle;
        const float cosine =
            ((t * 2.443315711809948e-5f - 1.388731625493765e-3f) * t + 4.166664568298827e-2f) * t * t - t * 0.5f + 1.0f;
        // Bit 0 of the turns swaps the two, and makes the first negative; bit 1 makes both so.
        const uint32_t odd = turns & 1, other = (as<uint32_t>(sine) ^ as<uint32_t>(cosine)) & (0u - odd);
        const float signed_radius = as<float>(as<uint32_t>(radius) ^ uint32_t(turns & 2) << 30);
        z[i] = signed_radius * as<float>(as<uint32_t>(cosine) ^ other ^ odd << 31);
        z[i + GAUSSIANS / 2] = signed_radius * as<float>(as<uint32_t>(sine) ^ other);
    }
}

// z of the elements [from, to) of a unit; more may be written.
inline void noise(int law, const Stream& s, uint64_t unit, int64_t from, int64_t to, float* z) {
    if (law == 0) {
        rademacher(s, unit, z);
        return;
    }
    for (int64_t tile = from / GAUSSIANS; tile * GAUSSIANS < to; tile++)
        gaussian(s, unit * (UNIT / GAUSSIANS) + uint64_t(tile), z + tile * GAUSSIANS);
}

// The odd constants of stochastic.py.
struct Factors {
    uint64_t of[32];
    constexpr Factors() : of() {
        uint64_t power = 1;
        for (auto& f : of) f = power *= 0xD1342543DE82EF95u;
    }
};
constexpr Factors FACTORS;

// 16 random bits for each element of a unit.
inline void random_bits(const Stream& s, uint64_t unit, uint32_t* out) {
    constexpr int N = UNIT / BLOCK, HALF = ROUNDINGS / BLOCK;
    uint32_t x[4 * N];
    philox<N>(s, unit * N, x);
    for (int tile = 0; tile < UNIT / ROUNDINGS; tile++) {
        uint64_t words[2 * HALF];
        for (int b = 0; b < HALF; b++) {
            const int i = tile * HALF + b;
            words[b] = x[i] | uint64_t(x[N + i]) << 32;
            words[b + HALF] = x[2 * N + i] | uint64_t(x[3 * N + i]) << 32;
        }
        for (int row = 0; row < 32; row++)
#pragma omp simd
            for (int c = 0; c < 2 * HALF; c++) {
                const uint64_t pair = words[c] * FACTORS.of[row] >> 16 & 0x0000FFFF0000FFFFu;
                std::memcpy(out + tile * ROUNDINGS + row * 32 + 2 * c, &pair, sizeof pair);
            }
    }
}

// body(unit, first and last element in it, first element in the tensors)
template <class Body>
void each_unit(uint64_t offset, int64_t numel, int threads, Body body) {
    if (numel <= 0) return;
    const uint64_t begin = offset / UNIT, end = (offset + uint64_t(numel) - 1) / UNIT + 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (end - begin > 8)
    for (uint64_t unit = begin; unit < end; unit++) {
        const int64_t start = int64_t(unit * UNIT - offset);  // of the unit, in the tensors
        const int64_t from = std::max<int64_t>(0, -start), to = std::min<int64_t>(UNIT, numel - start);
        body(unit, from, to, start);
    }
}

template <class T>
void shift(int law, T* plus, T* minus, const T* weight, int64_t numel, uint64_t offset, Stream s,
           const float* scales, int threads) {
    const float a = scales[0], b = minus ? scales[1] : 0.0f;
    each_unit(offset, numel, threads, [=](uint64_t unit, int64_t from, int64_t to, int64_t start) {
        float z[UNIT];
        noise(law, s, unit, from, to, z);
        if (minus) {
#pragma omp simd
            for (int64_t i = from; i < to; i++) {
                const float exact = widen(weight[start + i]);
                plus[start + i] = nearest<T>(exact + z[i] * a);
                minus[start + i] = nearest<T>(exact + z[i] * b);
            }
        } else {
#pragma omp simd
            for (int64_t i = from; i < to; i++)
                plus[start + i] = nearest<T>(widen(weight[start + i]) + z[i] * a);
        }
    });
}

// total += scale * z for each direction in order; total[0] is the element `from` of the unit.
inline void add_up(int law, Stream s, const uint32_t* words, const float* scales, int count, uint64_t unit,
                   int64_t from, int64_t to, float* total) {
    for (int d = 0; d < count; d++) {
        s.word = words[d];
        const float scale = scales[d];
        if (law == 0 && to - from == UNIT) {
            each_word(s, unit, [=](int first, uint32_t word) {
#pragma omp simd
                for (int i = 0; i < WORD; i++) total[first + i] += with_sign(scale, word, i);
            });
            continue;
        }
        float z[UNIT];
        noise(law, s, unit, from, to, z);
#pragma omp simd
        for (int64_t i = from; i < to; i++) total[i - from] += z[i] * scale;
    }
}

template <class T>
void update(int law, T* weight, T* lost, int64_t numel, uint64_t offset, Stream s, const uint32_t* words,
            const float* scales, int count, bool randomly, uint32_t rounding, float keep, float lr, int threads) {
    each_unit(offset, numel, threads, [=](uint64_t unit, int64_t from, int64_t to, int64_t start) {
        float total[UNIT];
        // -0 + x is x, where 0 + x would lose the sign of a zero: see Noise.combine.
        std::fill_n(total, UNIT, count == 1 ? -0.0f : 0.0f);
        add_up(law, s, words, scales, count, unit, from, to, total + from);
        if (randomly) {
            uint32_t bits[UNIT];
            random_bits({s.key0, s.key1, s.step, rounding}, unit, bits);
#pragma omp simd
            for (int64_t i = from; i < to; i++)
                weight[start + i] = stochastic<T>(widen(weight[start + i]) * keep - total[i] * lr, bits[i]);
        } else if (lost) {
#pragma omp simd
            for (int64_t i = from; i < to; i++) {
                T &w = weight[start + i], &l = lost[start + i];
                const float exact = (widen(w) + widen(l)) * keep - total[i] * lr;
                w = nearest<T>(exact);
                l = nearest<T>(exact - widen(w));
            }
        } else {
#pragma omp simd
            for (int64_t i = from; i < to; i++)
                weight[start + i] = nearest<T>(widen(weight[start + i]) * keep - total[i] * lr);
        }
    });
}

template <class T>
void round_to(T* out, const float* exact, int64_t numel, uint64_t offset, Stream s, int threads) {
    each_unit(offset, numel, threads, [=](uint64_t unit, int64_t from, int64_t to, int64_t start) {
        uint32_t bits[UNIT];
        random_bits(s, unit, bits);
#pragma omp simd
        for (int64_t i = from; i < to; i++) out[start + i] = stochastic<T>(exact[start + i], bits[i]);
    });
}

template <class T>
uint64_t fingerprint(const T* words, int64_t numel, uint64_t offset, int threads) {
    uint64_t total = 0;
#pragma omp parallel for simd num_threads(threads) schedule(static) reduction(+ : total)
    for (int64_t i = 0; i < numel; i++)
        total += uint64_t(int64_t(words[i])) * (2 * (offset + uint64_t(i)) + 1);
    return total;
}

// agreement.py: the sums of elements and of squares, each rounded to a whole number of its units first.
template <class T>
void moment_sums(const T* weight, int64_t numel, int64_t* sums, int threads) {
    int64_t first = 0, second = 0;
#pragma omp parallel for simd num_threads(threads) schedule(static) reduction(+ : first, second)
    for (int64_t i = 0; i < numel; i++) {
        const double x = std::min(32.0, std::max(-32.0, double(widen(weight[i]))));
        first += int64_t(std::nearbyint(x * 0x1p24));
        second += int64_t(std::nearbyint(x * x * 0x1p32));
    }
    sums[0] = first, sums[1] = second;
}

// Calls `function` with a null pointer of the weights' type, by the number native.py gives it.
template <class Function>
void with_type(int dtype, Function function) {
    if (dtype == 0) function(static_cast<float*>(nullptr));
    if (dtype == 1) function(static_cast<BFloat16*>(nullptr));
    if (dtype == 2) function(static_cast<Float16*>(nullptr));
}

}  // namespace

extern "C" {

void zo_shift(int dtype, int law, void* plus, void* minus, const void* weight, int64_t numel, uint64_t offset,
              const Stream* s, const float* scales, int threads) {
    with_type(dtype, [&](auto* type) {
        using T = decltype(type);
        shift(law, T(plus), T(minus), static_cast<const std::remove_pointer_t<T>*>(weight), numel, offset, *s,
              scales, threads);
    });
}

void zo_accumulate(int law, float* out, int64_t numel, uint64_t offset, const Stream* s, const uint32_t* words,
                   const float* scales, int count, int threads) {
    each_unit(offset, numel, threads, [=](uint64_t unit, int64_t from, int64_t to, int64_t start) {
        add_up(law, *s, words, scales, count, unit, from, to, out + (start + from));
    });
}

// agreement.py: the sum of the elements' bits, as integers of so many bytes, times odd numbers.
uint64_t zo_fingerprint(int bytes, const void* words, int64_t numel, uint64_t offset, int threads) {
    if (bytes == 1) return fingerprint(static_cast<const int8_t*>(words), numel, offset, threads);
    if (bytes == 2) return fingerprint(static_cast<const int16_t*>(words), numel, offset, threads);
    if (bytes == 4) return fingerprint(static_cast<const int32_t*>(words), numel, offset, threads);
    return fingerprint(static_cast<const int64_t*>(words), numel, offset, threads);
}

void zo_moment_sums(int dtype, const void* weight, int64_t numel, int64_t* sums, int threads) {
    with_type(dtype, [&](auto* type) {
        moment_sums(static_cast<decltype(type)>(const_cast<void*>(weight)), numel, sums, threads);
    });
}

void zo_round(int dtype, void* out, const float* exact, int64_t numel, uint64_t offset, const Stream* s,
              int threads) {
    with_type(dtype, [&](auto* type) {
        round_to(static_cast<decltype(type)>(out), exact, numel, offset, *s, threads);
    });
}

void zo_update(int dtype, int law, void* weight, void* lost, int64_t numel, uint64_t offset, const Stream* s,
               const uint32_t* words, const float* scales, int count, int randomly, uint32_t rounding, float keep,
               float lr, int threads) {
    with_type(dtype, [&](auto* type) {
        using T = decltype(type);
        update(law, T(weight), T(lost), numel, offset, *s, words, scales, count, randomly != 0, rounding, keep,
               lr, threads);
    });
}
}
