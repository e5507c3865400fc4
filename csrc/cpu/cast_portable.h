// The loops of scaled_cast that a compiler turns into vectors, included once per instruction set; the includer defines
// AOTRAIN_ISA, the name of the namespace. No include guard for that reason.

namespace aotrain::AOTRAIN_ISA {

template <typename To, typename From>
inline To bits_as(From x) {
    return __builtin_bit_cast(To, x);
}

struct Float32 {
    using Bits = uint32_t;
    using Pattern = int32_t;
    static float value(Bits bits) { return bits_as<float>(bits); }
};

struct Bfloat16 {
    using Bits = uint16_t;
    using Pattern = int16_t;
    static float value(Bits bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
    using Bits = uint16_t;
    using Pattern = int16_t;
    static float value(Bits bits) {
        const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFF) << 13, exponent = magnitude & 0x0F800000;
        const uint32_t special = exponent == 0x0F800000 ? 112u << 23 : 0;  // infinities and NaNs
        const uint32_t normal = magnitude + (112u << 23) + special;
        const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude + (113u << 23)) - 0x1p-14f);
        const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
        return bits_as<float>((exponent ? normal : subnormal) | sign);
    }
};

template <class In>
inline typename In::Pattern pattern_of(typename In::Bits bits) {
    constexpr int kSign = 8 * sizeof(bits) - 1;
    return static_cast<typename In::Pattern>(bits & ~(typename In::Bits{1} << kSign));
}

template <class In>
uint32_t amax(const void* from, int64_t n) {
    const auto* x = static_cast<const typename In::Bits*>(from);
    typename In::Pattern largest = 0;
    for (int64_t i = 0; i < n; i++) {
        const auto pattern = pattern_of<In>(x[i]);
        largest = pattern > largest ? pattern : largest;
    }
    return static_cast<uint32_t>(largest);
}

template <class In>
void amax_columns(const void* from, int64_t stride, int64_t rows, int64_t n, uint32_t* to) {
    const auto* x = static_cast<const typename In::Bits*>(from);
    alignas(64) typename In::Pattern largest[kChunk];
    for (int64_t i = 0; i < n; i++) largest[i] = pattern_of<In>(x[i]);
    for (int64_t row = 1; row < rows; row++) {
        const auto* next = x + row * stride;
        for (int64_t i = 0; i < n; i++) {
            const auto pattern = pattern_of<In>(next[i]);
            largest[i] = pattern > largest[i] ? pattern : largest[i];
        }
    }
    for (int64_t i = 0; i < n; i++) to[i] = static_cast<uint32_t>(largest[i]);
}

// The code of y, which is NaN or does not exceed E::kMax by more than rounding to nearest forgives. `Regular`: not NaN.
//
// Adding 2^k rounds |y| to a multiple of 2^(k - 23); k is so chosen that this is the format's step at |y|, a subnormal
// step included. The last bits of the sum then count steps: a mantissa with its leading one, added to the exponent.
template <class E, bool Regular>
inline uint8_t code_of(float y) {
    if (E::kSaturate) {  // a NaN passes both
        constexpr float kMax = static_cast<float>(E::kMax);
        y = y > kMax ? kMax : y < -kMax ? -kMax : y;
    }
    constexpr int kDropped = 23 - E::kMantissa;
    const uint32_t bits = bits_as<uint32_t>(y), magnitude = bits & 0x7FFFFFFF, smallest = E::kMinExponent << 23;
    const uint32_t own = bits & 0x7F800000, exponent = own > smallest ? own : smallest;
    const float sum = bits_as<float>(magnitude) + bits_as<float>(exponent + (kDropped << 23));
    const uint32_t code = bits_as<uint32_t>(sum) + (exponent >> kDropped) - (E::kMinExponent << E::kMantissa);
    constexpr int kSignShift = 31 - __builtin_ctz(E::kSign);
    const uint32_t signed_code = (code & (E::kSign - 1u)) | (bits >> kSignShift & E::kSign);
    return static_cast<uint8_t>(!Regular && magnitude > 0x7F800000 ? E::kNan : signed_code);
}

// The same for integers, where a NaN is 0. The last bits of the sum are the integer, in two's complement.
template <>
inline uint8_t code_of<Int8, true>(float y) {
    return static_cast<uint8_t>(bits_as<uint32_t>(y + 0x1.8p23f));
}
template <>
inline uint8_t code_of<Int8, false>(float y) {
    return y == y ? code_of<Int8, true>(y) : uint8_t{0};
}

template <class In, class E>
void encode(const void* from, int64_t n, float inverse, uint8_t* codes) {
    const auto* x = static_cast<const typename In::Bits*>(from);
    if (inverse > 0) {
        for (int64_t i = 0; i < n; i++) codes[i] = code_of<E, true>(In::value(x[i]) * inverse);
    } else {
        for (int64_t i = 0; i < n; i++) codes[i] = code_of<E, false>(In::value(x[i]) * inverse);
    }
}

template <class In, class E>
void encode_each(const void* from, int64_t n, const float* inverse, bool regular, uint8_t* codes) {
    const auto* x = static_cast<const typename In::Bits*>(from);
    if (regular) {
        for (int64_t i = 0; i < n; i++) codes[i] = code_of<E, true>(In::value(x[i]) * inverse[i]);
    } else {
        for (int64_t i = 0; i < n; i++) codes[i] = code_of<E, false>(In::value(x[i]) * inverse[i]);
    }
}

typedef uint8_t Bytes __attribute__((vector_size(16)));

#if defined(__clang__)
#define AOTRAIN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define AOTRAIN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bytes{__VA_ARGS__})
#endif

// Four times interleaving rows i and i + 8.
inline void transpose16(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
    Bytes a[16], b[16];
    for (int i = 0; i < 16; i++) __builtin_memcpy(&a[i], from + i * from_stride, 16);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            b[2 * i] = AOTRAIN_SHUFFLE(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            b[2 * i + 1] =
                AOTRAIN_SHUFFLE(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        for (int i = 0; i < 16; i++) a[i] = b[i];
    }
    for (int i = 0; i < 16; i++) __builtin_memcpy(to + i * to_stride, &a[i], 16);
}

#undef AOTRAIN_SHUFFLE

template <class In, class E>
inline constexpr CastLoops kLoops{amax<In>, amax_columns<In>, encode<In, E>, encode_each<In, E>, transpose16};

template <class In>
inline const CastLoops& select_element(const Cast& c) {
    if (saturates(c.scale_format)) {
        if (c.element == kE4m3) return kLoops<In, Saturating<E4m3>>;
        return c.element == kE5m2 ? kLoops<In, Saturating<E5m2>> : kLoops<In, Saturating<E2m1>>;
    }
    if (c.element == kE2m1) return kLoops<In, E2m1>;
    return c.element == kE4m3 ? kLoops<In, E4m3> : c.element == kE5m2 ? kLoops<In, E5m2> : kLoops<In, Int8>;
}

inline const CastLoops& select(const Cast& c) {
    if (c.input == kFloat32Input) return select_element<Float32>(c);
    return c.input == kBfloat16Input ? select_element<Bfloat16>(c) : select_element<Float16>(c);
}

}  // namespace aotrain::AOTRAIN_ISA
