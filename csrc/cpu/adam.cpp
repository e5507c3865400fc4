// One Adam(W) step with 8-bit dynamic state in one pass: decode both moments, update, encode both, write back.
//
// Bit for bit what aotrain/optim/step.py and aotrain/optim/state.py compute: float32, one rounding per operation in
// the same order, square root and division correctly rounded. Compile with -ffp-contract=off. The only fused
// multiply-adds are explicit, in the AVX-512 encoder, where an error bound guards them.
//
// C ABI, no torch headers: one build serves every torch version.
#include "adam.h"

#include <cmath>
#include <cstring>

namespace aotrain {

extern constexpr Map<true> kSigned{};
extern constexpr Map<false> kUnsigned{};

namespace {

template <bool Signed>
constexpr const Map<Signed>& map_of() {
    if constexpr (Signed)
        return kSigned;
    else
        return kUnsigned;
}

float load(const float* p) { return *p; }

float load(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

void store(float* p, float x) { *p = x; }

void store(uint16_t* p, float x) {  // round to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    *p = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

// The largest magnitude, at least kAmaxMin; NaN if any value is.
float block_scale(const float* x, int64_t n) {
    uint32_t amax = 0;  // patterns of magnitudes have the order of the magnitudes, and NaN is above infinity
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7FFFFFFF;
        amax = bits > amax ? bits : amax;
    }
    float scale;
    std::memcpy(&scale, &amax, 4);
    return scale < kAmaxMin ? kAmaxMin : scale;
}

// The number of midpoints <= y: for a negative y, 127 less the number of midpoints below its magnitude.
template <bool Signed>
uint8_t encode_one(float y) {
    constexpr const Map<Signed>& map = map_of<Signed>();
    if (y != y) return 255;
    const bool negative = y < 0.0f;
    if (negative && !Signed) return 0;
    const float a = std::fabs(y);
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    const int bucket = static_cast<int>(bits >> kBucketShift) - kFirstBucket;
    int index = 0;
    if (bucket >= 0) {
        index = bucket < kNumBuckets ? map.bucket[bucket] : Map<Signed>::kLast;
        index += a >= map.midpoint[index + 1];
    }
    if (!Signed) return static_cast<uint8_t>(index);
    if (!negative) return static_cast<uint8_t>(kZeroCode + index);
    index -= a <= map.midpoint[index];
    return static_cast<uint8_t>(index > kZeroCode ? 0 : kZeroCode - index);
}

}  // namespace

template <bool Signed>
void encode_scalar(const float* x, uint8_t* codes, float scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) codes[i] = encode_one<Signed>(x[i] / scale);
}
template void encode_scalar<true>(const float*, uint8_t*, float, int64_t);
template void encode_scalar<false>(const float*, uint8_t*, float, int64_t);

template <typename P, typename G>
void step_block_scalar(const Block<P, G>& b, const Scalars& s) {
    float m[kMaxBlock], v[kMaxBlock];
    const float m_scale = *b.m_scale, v_scale = *b.v_scale;
    for (int64_t i = 0; i < b.n; i++) {
        m[i] = kSigned.value[b.m_codes[i]] * m_scale;
        v[i] = kUnsigned.value[b.v_codes[i]] * v_scale;
    }
    for (int64_t i = 0; i < b.n; i++) {
        const float p = load(b.param + i);
        float g = load(b.grad + i);
        if (s.maximize) g = -g;
        if (s.coupled_decay != 0.0f) g = g + p * s.coupled_decay;
        m[i] = m[i] + (g - m[i]) * s.one_minus_beta1;
        v[i] = v[i] + (g * g - v[i]) * s.one_minus_beta2;
        const float denominator = std::sqrt(v[i]) * s.inv_sqrt_bias_correction2 + s.eps;
        store(b.param + i, p * s.decay_factor - m[i] / denominator * s.step_size);
    }
    *b.m_scale = block_scale(m, b.n);
    *b.v_scale = block_scale(v, b.n);
    encode_scalar<true>(m, b.m_codes, *b.m_scale, b.n);
    encode_scalar<false>(v, b.v_codes, *b.v_scale, b.n);
}

}  // namespace aotrain

#if defined(__x86_64__)
#include "adam_avx512.h"
#endif

namespace aotrain {
namespace {

template <typename P, typename G>
void step(P* param, const G* grad, const State& state, const Shape& shape, const Scalars& s, int isa, int threads) {
    const int64_t per_row = (shape.row_length + shape.block_size - 1) / shape.block_size;
    const int64_t blocks = shape.rows * per_row;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t index = 0; index < blocks; index++) {
        const int64_t row = index / per_row, column = index % per_row * shape.block_size;
        const int64_t at = row * shape.row_length + column;
        const int64_t left = shape.row_length - column;
        const Block<P, G> block{param + at,
                                grad + at,
                                state.m_codes + at,
                                state.m_scale + index,
                                state.v_codes + at,
                                state.v_scale + index,
                                left < shape.block_size ? left : shape.block_size};
#if defined(__x86_64__)
        if (isa == kAvx512) {
            step_block_avx512(block, s);
            continue;
        }
#endif
        step_block_scalar(block, s);
    }
}

}  // namespace
}  // namespace aotrain

extern "C" {

// The fastest path this CPU has.
int aotrain_adam_isa() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return aotrain::kAvx512;
#endif
    return aotrain::kScalar;
}

int64_t aotrain_adam_max_block() { return aotrain::kMaxBlock; }

// One step. `param_bf16` and `grad_bf16` say bfloat16 instead of float32; `isa` must be one that the CPU has.
void aotrain_adam(void* param, int param_bf16, const void* grad, int grad_bf16, uint8_t* m_codes, float* m_scale,
                        uint8_t* v_codes, float* v_scale, int64_t rows, int64_t row_length, int64_t block_size,
                        const aotrain::Scalars* scalars, int isa, int threads) {
    using aotrain::step;
    const aotrain::State state{m_codes, m_scale, v_codes, v_scale};
    const aotrain::Shape shape{rows, row_length, block_size};
    auto* p32 = static_cast<float*>(param);
    auto* p16 = static_cast<uint16_t*>(param);
    const auto* g32 = static_cast<const float*>(grad);
    const auto* g16 = static_cast<const uint16_t*>(grad);
    if (param_bf16 && grad_bf16)
        step(p16, g16, state, shape, *scalars, isa, threads);
    else if (param_bf16)
        step(p16, g32, state, shape, *scalars, isa, threads);
    else if (grad_bf16)
        step(p32, g16, state, shape, *scalars, isa, threads);
    else
        step(p32, g32, state, shape, *scalars, isa, threads);
}
}
