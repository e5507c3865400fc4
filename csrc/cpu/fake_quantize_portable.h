// Fake quantization in plain loops that a compiler turns into vectors, included once per instruction set; the includer
// defines AOTRAIN_ISA, the name of the namespace. No include guard for that reason.

namespace aotrain::AOTRAIN_ISA {

template <typename To, typename From>
inline To bits_as(From x) {
    return __builtin_bit_cast(To, x);
}

// Each dtype: its numbers as float, a finite float rounded to it, as float and as bits, and a NaN's bits.

struct Float32 {
    using Bits = uint32_t;
    using Key = int32_t;
    static constexpr Bits kNan = 0x7FC00000, kInfinity = 0x7F800000;
    static float value(Bits bits) { return bits_as<float>(bits); }
    static float round(float x) { return x; }
    static Bits bits(float x) { return bits_as<uint32_t>(x); }
};

struct Bfloat16 {
    using Bits = uint16_t;
    using Key = int16_t;
    static constexpr Bits kNan = 0x7FC0, kInfinity = 0x7F80;
    static float value(Bits bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }
    static uint32_t rounded(float x) {
        const uint32_t bits = bits_as<uint32_t>(x);
        return bits + 0x7FFF + (bits >> 16 & 1);
    }
    static float round(float x) { return bits_as<float>(rounded(x) & 0xFFFF0000); }
    static Bits bits(float x) { return static_cast<Bits>(rounded(x) >> 16); }
};

struct Float16 {
    using Bits = uint16_t;
    using Key = int16_t;
    static constexpr Bits kNan = 0x7E00, kInfinity = 0x7C00;
    static float value(Bits bits) {
        const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFF) << 13, exponent = magnitude & 0x0F800000;
        const uint32_t special = exponent == 0x0F800000 ? 112u << 23 : 0;  // infinities and NaNs
        const uint32_t normal = magnitude + (112u << 23) + special;
        const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude + (113u << 23)) - 0x1p-14f);
        const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
        return bits_as<float>((exponent ? normal : subnormal) | sign);
    }
    // Adding 2^13 times the power of two below |x|, or below the smallest normal number, leaves 10 bits after it.
    static float round(float x) {
        const uint32_t sign = bits_as<uint32_t>(x) & 0x80000000;
        const float magnitude = bits_as<float>(bits_as<uint32_t>(x) & 0x7FFFFFFF);
        const float within = magnitude < 65520.0f ? magnitude : 0.0f;
        uint32_t power = bits_as<uint32_t>(within) & 0x7F800000;
        power = (power > 113u << 23 ? power : 113u << 23) + (13u << 23);
        const float near = (within + bits_as<float>(power)) - bits_as<float>(power);
        return bits_as<float>((magnitude < 65520.0f ? bits_as<uint32_t>(near) : 0x7F800000) | sign);
    }
    static Bits bits(float x) {
        const uint32_t near = bits_as<uint32_t>(round(x)), magnitude = near & 0x7FFFFFFF;
        const uint32_t normal = (magnitude >> 13) - (112u << 10);
        const auto subnormal = static_cast<uint32_t>(static_cast<int32_t>(bits_as<float>(magnitude & 0x3FFFFFFF) * 0x1p24f));
        const uint32_t finite = magnitude < 113u << 23 ? subnormal : normal;
        return static_cast<Bits>((magnitude == 0x7F800000 ? kInfinity : finite) | near >> 16 >> 15 << 15);
    }
};

// Patterns as integers in the order of their numbers, and back.
template <class In>
inline typename In::Key key_of(typename In::Bits bits) {
    using Key = typename In::Key;
    constexpr auto kMagnitude = static_cast<Key>(static_cast<typename In::Bits>(-1) >> 1);
    const auto key = static_cast<Key>(bits);
    return static_cast<Key>(key < 0 ? key ^ kMagnitude : key);
}

// Bounds of group j, from the smallest and largest key: NaN where one is not finite.
template <class In>
inline void set_bounds(Scales& s, int64_t j, int32_t smallest, int32_t largest) {
    using Key = typename In::Key;
    constexpr auto kLimit = static_cast<int32_t>(In::kInfinity);
    const bool finite = largest < kLimit && smallest > -kLimit - 1;
    const float low = In::value(static_cast<typename In::Bits>(key_of<In>(static_cast<Key>(smallest))));
    const float high = In::value(static_cast<typename In::Bits>(largest));
    s.smallest[j] = finite ? low : __builtin_nanf("");
    s.largest[j] = high;
}

template <class In>
inline void find_bounds(const FakeQuantize& f, int64_t first, int64_t n, Scales& s) {
    const auto* x = static_cast<const typename In::Bits*>(f.x) + first * f.size;
    for (int64_t j = 0; j < n; j++, x += f.size) {
        typename In::Key smallest = 0, largest = 0;
        for (int64_t i = 0; i < f.size; i++) {
            const auto key = key_of<In>(x[i]);
            smallest = key < smallest ? key : smallest;
            largest = key > largest ? key : largest;
        }
        set_bounds<In>(s, j, smallest, largest);
    }
}

template <class To>
inline void round_all(float (&x)[kGroups]) {
    for (int64_t j = 0; j < kGroups; j++) x[j] = To::round(x[j]);
}

// Scales from bounds: AffineFormat.parameters and the reciprocal of its `steps`. `Round` is that of the arithmetic.
template <class Round, bool Narrow>
inline void find_scales(const FakeQuantize& f, Scales& s) {
    const auto lowest = static_cast<float>(f.lowest), highest = static_cast<float>(f.highest);
    const float eps = bits_as<float>(static_cast<uint32_t>(f.eps)), half_range = (highest - lowest) / 2;
    const float smallest_normal = f.scale_dtype == kFloat16Input ? 0x1p-14f : 0x1p-126f;
    float zero_point[kGroups];
    for (int64_t j = 0; j < kGroups; j++) {
        const float low = s.smallest[j] < 0 ? s.smallest[j] : 0.0f, high = s.largest[j] > 0 ? s.largest[j] : 0.0f;
        float scale;
        if (f.mapping == kSymmetric) {
            scale = Round::round((-low > high ? -low : high) / half_range);
        } else if (f.mapping == kAsymmetric) {
            scale = Round::round(Round::round(high - low) / (highest - lowest));
        } else {
            const float below = Round::round(low / lowest), above = Round::round(high / highest);
            scale = below > above ? below : above;
        }
        s.scale[j] = scale > eps ? scale : eps;
        const float shifted = lowest - (Round::round(low / s.scale[j]) + kRound - kRound);
        const float code = shifted < lowest ? lowest : shifted > highest ? highest : shifted;
        zero_point[j] = f.mapping == kAsymmetric ? code : static_cast<float>(f.zero_point);
    }
    if (!Narrow && f.scale_dtype == kBfloat16Input) round_all<Bfloat16>(s.scale);
    if (!Narrow && f.scale_dtype == kFloat16Input) round_all<Float16>(s.scale);
    for (int64_t j = 0; j < kGroups; j++) {
        const float scale = s.scale[j] > smallest_normal ? s.scale[j] : smallest_normal;
        const bool broken = s.smallest[j] != s.smallest[j] || scale > 3.4028234e38f;
        const float inverse = 1.0f / scale;
        s.scale[j] = broken ? __builtin_nanf("") : scale;
        s.inverse[j] = broken ? __builtin_nanf("") : Narrow ? Round::round(inverse) : inverse;
        s.low[j] = lowest - zero_point[j];
        s.high[j] = highest - zero_point[j];
    }
}

template <class In>
inline void fill_nan(void* out, int64_t at, int64_t n) {
    auto* to = static_cast<typename In::Bits*>(out) + at;
    for (int64_t i = 0; i < n; i++) to[i] = In::kNan;
}

// The whole number nearest x / scale.
template <class In, bool Narrow>
inline float step_of(typename In::Bits x, float inverse) {
    const float quotient = In::value(x) * inverse;
    return ((Narrow ? In::round(quotient) : quotient) + kRound) - kRound;
}

template <class In, bool Narrow>
inline void write_values(const FakeQuantize& f, int64_t at, const Scales& s, int64_t j) {
    const auto* x = static_cast<const typename In::Bits*>(f.x) + at;
    auto* out = static_cast<typename In::Bits*>(f.out) + at;
    const float low = s.low[j], high = s.high[j], scale = s.scale[j], inverse = s.inverse[j];
    for (int64_t i = 0; i < f.size; i++) {
        const float step = step_of<In, Narrow>(x[i], inverse);
        const float code = step < low ? low : step > high ? high : step;
        out[i] = In::bits(code * scale);
    }
}

// A bit for each element that has no code. No step of a group without a scale is within bounds.
template <class In, bool Narrow>
inline void write_saturated(const FakeQuantize& f, int64_t at, const Scales& s, int64_t j, uint32_t* saturated) {
    const auto* x = static_cast<const typename In::Bits*>(f.x) + at;
    for (int64_t i = 0; i < f.size; i += 32) {
        uint32_t word = 0;
        for (int64_t k = i; k < i + 32 && k < f.size; k++) {
            const float step = step_of<In, Narrow>(x[k], s.inverse[j]);
            word |= uint32_t{!(step >= s.low[j] && step <= s.high[j])} << (k - i);
        }
        *saturated++ = word;
    }
}

template <class In, bool Narrow>
inline void write_gradient(const FakeQuantize& f, int64_t at, const Scales& s, int64_t j) {
    using Bits = typename In::Bits;
    const auto* x = static_cast<const Bits*>(f.x) + at;
    const auto* grad = static_cast<const Bits*>(f.grad) + at;
    auto* out = static_cast<Bits*>(f.out) + at;
    const float low = s.low[j], high = s.high[j], inverse = s.inverse[j];
    for (int64_t i = 0; i < f.size; i++) {
        const float step = step_of<In, Narrow>(x[i], inverse);
        out[i] = step >= low && step <= high ? grad[i] : Bits{0};
    }
}

// n sums, and room for one more, to their sum: neighbours first.
inline float sum_pairwise(float* x, int64_t n) {
    for (; n > 1; n = (n + 1) / 2) {
        x[n] = 0;
        for (int64_t i = 0; i < n; i += 2) x[i / 2] = x[i] + x[i + 1];
    }
    return x[0] + 0.0f;
}

// The straight-through gradient, and what the scale's own is made of. `terms` has room for a group and one more.
template <class In, bool Narrow>
inline void write_gradient_with_scales(const FakeQuantize& f, int64_t at, Scales& s, int64_t j, float* terms) {
    using Bits = typename In::Bits;
    constexpr auto kMagnitude = static_cast<Bits>(static_cast<Bits>(-1) >> 1);
    const auto* x = static_cast<const Bits*>(f.x) + at;
    const auto* grad = static_cast<const Bits*>(f.grad) + at;
    auto* out = static_cast<Bits*>(f.out) + at;
    const float low = s.low[j], high = s.high[j], scale = s.scale[j], inverse = s.inverse[j];
    int64_t where = 0;
    for (int64_t i = 0; i < f.size; i++) {
        const float step = step_of<In, Narrow>(x[i], inverse);
        const float code = step < low ? low : step > high ? high : step, g = In::value(grad[i]);
        const Bits kept = step >= low && step <= high ? grad[i] : Bits{0};
        terms[i] = g * In::value(In::bits(code * scale)) - In::value(kept) * In::value(x[i]);
        out[i] = kept;
        if ((x[i] & kMagnitude) > (x[where] & kMagnitude)) where = i;
    }
    s.total[j] = sum_pairwise(terms, f.size);
    s.where[j] = where;
}

// What is due to scales goes to the elements that they follow.
template <class In>
inline void add_due(const FakeQuantize& f, int64_t group, int64_t n, const Scales& s) {
    using Bits = typename In::Bits;
    const float bound = bits_as<float>(static_cast<uint32_t>(f.constant_below));
    const auto* x = static_cast<const Bits*>(f.x) + group * f.size;
    auto* out = static_cast<Bits*>(f.out) + group * f.size;
    Bits extremes[kGroups] = {}, moved[kGroups] = {};
    for (int64_t j = 0; j < n; j++) {
        extremes[j] = x[j * f.size + s.where[j]];
        moved[j] = out[j * f.size + s.where[j]];
    }
    for (int64_t j = 0; j < kGroups; j++) {
        const float extreme = In::value(extremes[j]), due = s.total[j] / extreme;
        const bool follows = (extreme < 0 ? -extreme : extreme) > bound && s.scale[j] == s.scale[j];
        const float sum = In::value(moved[j]) + (follows ? due : 0.0f);
        const Bits bits = In::bits(sum);
        moved[j] = sum == sum ? bits : In::kNan;
    }
    for (int64_t j = 0; j < n; j++) out[j * f.size + s.where[j]] = moved[j];
}

template <class In, class Round, bool Narrow>
void group_range(const FakeQuantize& f, int64_t first, int64_t last) {
    Scales s{};
    std::vector<float> terms(f.with_scales ? f.size + 1 : 0);
    for (int64_t group = first; group < last; group += kGroups) {
        const int64_t n = last - group < kGroups ? last - group : kGroups;
        find_bounds<In>(f, group, n, s);
        find_scales<Round, Narrow>(f, s);
        for (int64_t j = 0; j < n; j++) {
            const int64_t at = (group + j) * f.size;
            if (f.saturated)
                write_saturated<In, Narrow>(f, at, s, j, f.saturated + (group + j) * words_of(f.size));
            if (f.with_scales)
                write_gradient_with_scales<In, Narrow>(f, at, s, j, terms.data());
            else if (f.grad)
                write_gradient<In, Narrow>(f, at, s, j);
            else if (s.scale[j] != s.scale[j])
                fill_nan<In>(f.out, at, f.size);
            else
                write_values<In, Narrow>(f, at, s, j);
        }
        if (f.with_scales) add_due<In>(f, group, n, s);
    }
}

template <class Bits>
inline void clear_words(Bits* grad, const uint32_t* saturated, int64_t size) {
    for (int64_t i = 0; i < size; i += 32)
        for (uint32_t word = *saturated++; word; word &= word - 1) grad[i + __builtin_ctz(word)] = 0;
}

// Zeros for the elements of groups whose bits are set.
inline void clear_range(const Clear& c, int64_t first, int64_t last) {
    for (int64_t group = first; group < last; group++) {
        const uint32_t* saturated = c.saturated + group * words_of(c.size);
        if (c.bytes == 2)
            clear_words(static_cast<uint16_t*>(c.grad) + group * c.size, saturated, c.size);
        else
            clear_words(static_cast<uint32_t*>(c.grad) + group * c.size, saturated, c.size);
    }
}

template <class In>
inline GroupRange select_arithmetic(const FakeQuantize& f) {
    if (is_narrow(f)) return group_range<In, In, true>;
    return f.wide ? group_range<In, Float32, false> : group_range<In, In, false>;
}

inline GroupRange select(const FakeQuantize& f) {
    if (f.input == kFloat32Input) return group_range<Float32, Float32, false>;
    return f.input == kBfloat16Input ? select_arithmetic<Bfloat16>(f) : select_arithmetic<Float16>(f);
}

}  // namespace aotrain::AOTRAIN_ISA
