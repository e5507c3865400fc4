// The Adam(W) step in plain loops that a compiler turns into vectors, included once per instruction set; the includer
// defines AOTRAIN_ISA, the name of the namespace. No include guard for that reason.

namespace aotrain::AOTRAIN_ISA {

template <typename To, typename From>
inline To bits_as(From x) {
    return __builtin_bit_cast(To, x);
}

// philox_bits16 of elements index..index+n-1; returns where in `words` the first of them is.
//
// Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3.
inline const uint16_t* fill_noise(uint64_t key, int64_t index, int64_t n, uint32_t (*words)[4]) {
    const uint64_t first = static_cast<uint64_t>(index) >> 3;
    const int64_t calls = static_cast<int64_t>(((static_cast<uint64_t>(index) + n + 7) >> 3) - first);
    for (int64_t i = 0; i < calls; i++) {
        const uint64_t counter = first + static_cast<uint64_t>(i);
        uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
        uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
        for (int round = 0; round < 10; round++) {
            const uint64_t product0 = uint64_t{c0} * 0xD2511F53u, product1 = uint64_t{c2} * 0xCD9E8D57u;
            c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
            c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
            c1 = static_cast<uint32_t>(product1);
            c3 = static_cast<uint32_t>(product0);
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        words[i][0] = c0, words[i][1] = c1, words[i][2] = c2, words[i][3] = c3;
    }
    return reinterpret_cast<const uint16_t*>(words) + (index & 7);  // little-endian: low half first
}

inline void load(const void* from, bool bf16, float* to, int64_t n) {
    if (bf16) {
        const uint16_t* p = static_cast<const uint16_t*>(from);
        for (int64_t i = 0; i < n; i++) to[i] = bits_as<float>(static_cast<uint32_t>(p[i]) << 16);
    } else {
        __builtin_memcpy(to, from, static_cast<size_t>(n) * 4);
    }
}

// Nearest, ties to even; NaN is one NaN.
inline uint16_t nearest_bf16(float x) {
    const uint32_t bits = bits_as<uint32_t>(x), rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

// The upper neighbour if the dropped bits and the noise carry; finite values stay finite, others stay what they are.
inline uint16_t stochastic_bf16(float x, uint16_t noise) {
    const uint32_t bits = bits_as<uint32_t>(x), magnitude = bits & 0x7FFFFFFF;
    const uint32_t largest = 0x7F7F0000, limited = magnitude < largest ? magnitude : largest;
    const uint32_t rounded = (limited + noise) >> 16 | (bits >> 31) << 15;
    return static_cast<uint16_t>(magnitude >= 0x7F800000 ? nearest_bf16(x) : rounded);
}

inline void store(const float* from, const Block& b, const Options& o) {
    if (!o.param_bf16) {
        __builtin_memcpy(b.param, from, static_cast<size_t>(b.n) * 4);
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(b.param);
    if (o.stochastic) {
        uint32_t words[kMaxBlock / 8 + 2][4];
        const uint16_t* noise = fill_noise(b.key, b.index, b.n, words);
        for (int64_t i = 0; i < b.n; i++) to[i] = stochastic_bf16(from[i], noise[i]);
    } else {
        for (int64_t i = 0; i < b.n; i++) to[i] = nearest_bf16(from[i]);
    }
}

// The number of midpoints <= y; NaN takes the last code.
template <class Map>
inline int32_t dynamic_code(const Map& map, float y) {
    const int32_t bits = bits_as<int32_t>(y), sign = bits >> 31;  // -1 or 0
    // Below zero the midpoints < |y| count: those <= the float32 before it.
    const int32_t magnitude = Map::kSigned ? (bits & INT32_MAX) + sign : bits & ~sign;
    int32_t bucket = (magnitude >> kBucketShift) - kFirstBucket;
    bucket = bucket < 0 ? 0 : bucket;
    bucket = bucket < kNumBuckets ? bucket : kNumBuckets - 1;
    int32_t index = map.bucket[bucket];
    index += magnitude >= map.above[index];
    int32_t code = Map::kMiddle + (Map::kSigned ? (index ^ sign) - sign : index);
    code = code < 0 ? 0 : code;  // there is no code for -1
    return (bits & INT32_MAX) > 0x7F800000 ? Map::kLastCode : code;
}

inline int32_t float8_code(float y) {
    const uint32_t bits = bits_as<uint32_t>(y), magnitude = bits & 0x7FFFFFFF;
    const uint32_t largest = bits_as<uint32_t>(kFloat8Max), limited = magnitude < largest ? magnitude : largest;
    const uint32_t normal = ((limited + 0x7FFFF + ((limited >> 20) & 1)) >> 20) - (120u << 3);
    // The sum's last bit is 2^-9, the smallest subnormal.
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(limited) + 0x1p14f) & 0xF;
    const uint32_t code = limited < 0x3C800000 ? subnormal : normal;
    return static_cast<int32_t>(magnitude > 0x7F800000 ? 0x7F : code | (bits >> 31) << 7);
}

struct Float8Values {
    float value[256] = {};
    constexpr Float8Values() {
        for (int code = 0; code < 256; code++) {
            const int exponent = code >> 3 & 15, mantissa = code & 7;
            float x = static_cast<float>(exponent ? 8 + mantissa : mantissa) / 512.0f;
            for (int e = 1; e < exponent; e++) x *= 2.0f;
            if ((code & 127) == 127) x = __builtin_nanf("");
            value[code] = code & 128 ? -x : x;
        }
    }
};
inline constexpr Float8Values kFloat8Values{};

// The largest magnitude, at least kAmaxMin; NaN if any value is.
inline float block_amax(const float* x, int64_t n) {
    int32_t amax = 0;  // patterns of magnitudes have the order of the magnitudes, and NaN is above infinity
    for (int64_t i = 0; i < n; i++) {
        const int32_t bits = bits_as<int32_t>(x[i]) & INT32_MAX;
        amax = bits > amax ? bits : amax;
    }
    const float scale = bits_as<float>(amax);
    return scale < kAmaxMin ? kAmaxMin : scale;
}

template <class Map>
inline void decode_map(const Map& map, int bits, const uint8_t* codes, float scale, float* x, int64_t n) {
    if (bits == 8) {
        for (int64_t i = 0; i < n; i++) x[i] = map.value[codes[i]] * scale;
    } else {
        for (int64_t i = 0; i < n; i++) x[i] = map.value[codes[i >> 1] >> (i & 1 ? 0 : 4) & 15] * scale;
    }
}

template <bool Signed>
inline void decode(Format format, const void* state, const float* scale, float* x, int64_t n) {
    const uint8_t* codes = static_cast<const uint8_t*>(state);
    if (format == kFloat32) {
        __builtin_memcpy(x, state, static_cast<size_t>(n) * 4);
    } else if (format == kDynamic8) {
        decode_map(kMap<8, Signed>, 8, codes, *scale, x, n);
    } else if (format == kDynamic4) {
        decode_map(kMap<4, Signed>, 4, codes, *scale, x, n);
    } else {
        for (int64_t i = 0; i < n; i++) x[i] = kFloat8Values.value[codes[i]] * *scale;
    }
}

template <bool Signed>
inline void encode(Format format, float* x, void* state, float* scale, int64_t n) {
    uint8_t* codes = static_cast<uint8_t*>(state);
    if (format == kFloat32) {
        __builtin_memcpy(state, x, static_cast<size_t>(n) * 4);
        return;
    }
    const float amax = block_amax(x, n), divisor = *scale = format == kFloat8 ? amax / kFloat8Max : amax;
    for (int64_t i = 0; i < n; i++) x[i] = x[i] / divisor;
    int32_t code[kMaxBlock + 1];
    if (format == kDynamic8) {
        for (int64_t i = 0; i < n; i++) code[i] = dynamic_code(kMap<8, Signed>, x[i]);
    } else if (format == kDynamic4) {
        for (int64_t i = 0; i < n; i++) code[i] = dynamic_code(kMap<4, Signed>, x[i]);
        code[n] = 0;
        for (int64_t i = 0; i < n; i += 2) codes[i >> 1] = static_cast<uint8_t>(code[i] << 4 | code[i + 1]);
        return;
    } else {
        for (int64_t i = 0; i < n; i++) code[i] = float8_code(x[i]);
    }
    for (int64_t i = 0; i < n; i++) codes[i] = static_cast<uint8_t>(code[i]);
}

inline void update(float* p, float* g, float* m, float* v, int64_t n, const Options& o) {
    if (o.maximize)
        for (int64_t i = 0; i < n; i++) g[i] = -g[i];
    if (o.coupled_decay != 0.0f)
        for (int64_t i = 0; i < n; i++) g[i] = g[i] + p[i] * o.coupled_decay;
    for (int64_t i = 0; i < n; i++) {
        m[i] = m[i] + (g[i] - m[i]) * o.one_minus_beta1;
        v[i] = v[i] + (g[i] * g[i] - v[i]) * o.one_minus_beta2;
        const float denominator = __builtin_sqrtf(v[i]) * o.inv_sqrt_bias_correction2 + o.eps;
        p[i] = p[i] * o.decay_factor - m[i] / denominator * o.step_size;
    }
}

inline void step_range(const Tensor& tensor, const Options& o, int64_t first, int64_t last) {
    const Format format = static_cast<Format>(o.format);
    alignas(64) float p[kMaxBlock], g[kMaxBlock], m[kMaxBlock], v[kMaxBlock];
    for (int64_t number = first; number < last; number++) {
        const Block b = block_at(tensor, o, number);
        load(b.param, o.param_bf16, p, b.n);
        load(b.grad, o.grad_bf16, g, b.n);
        decode<true>(format, b.m, b.m_scale, m, b.n);
        decode<false>(format, b.v, b.v_scale, v, b.n);
        update(p, g, m, v, b.n, o);
        store(p, b, o);
        encode<true>(format, m, b.m, b.m_scale, b.n);
        encode<false>(format, v, b.v, b.v_scale, b.n);
    }
}

}  // namespace aotrain::AOTRAIN_ISA
